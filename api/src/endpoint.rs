//! Where a peer or an arbiter is: `tcp:<host>:<port>`, `unix:<path>`, `rdma:<host>:<port>`,
//! `file:<dir>`, `etcd:<url>[,<url>]`.
//!
//! Every value prints as it is parsed, `etcd:` with what it leaves out. An IPv6 address stands in
//! brackets: `tcp:[::1]:4000`.

mod etcd;

use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

pub use etcd::{
    ETCD_KEY_BYTES_MAX, ETCD_KEY_DEFAULT, ETCD_PORT_DEFAULT, ETCD_URLS_MAX, EtcdCluster, EtcdServer,
};

/// Bytes of a UNIX socket's path (`sun_path`, unix(7), less the closing zero).
pub const UNIX_PATH_BYTES_MAX: usize = 107;
/// Bytes of a host name (RFC 1035, 2.3.4).
const HOST_BYTES_MAX: usize = 253;

/// Why a text names no place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    #[error("Expected tcp:<host>:<port>, unix:<path> or rdma:<host>:<port>, found {0:?}")]
    Scheme(String),
    #[error("Expected file:<dir> or etcd:<url>[,<url>], found {0:?}")]
    ArbiterScheme(String),
    #[error("Expected <host>:<port>, found {0:?}")]
    HostPort(String),
    #[error("Host is neither a name nor an address: {0:?}")]
    Host(String),
    #[error("Port is not between 1 and 65535: {0:?}")]
    Port(String),
    #[error("Path is empty")]
    EmptyPath,
    #[error("Path of a UNIX socket is longer than {UNIX_PATH_BYTES_MAX} bytes")]
    LongPath,
    #[error("Expected http[s]://<host>[:<port>][/<key>], found {0:?}")]
    Url(String),
    #[error("A URL holds no user: <user>:<password> stands in the file arbiter_credentials")]
    UserInUrl,
    #[error("A key has {ETCD_KEY_BYTES_MAX} letters, digits or -._:/ at most, found {0:?}")]
    EtcdKey(String),
    #[error("The URLs name different keys, {0:?} and {1:?}: one cluster keeps one record of a VM")]
    EtcdKeys(String, String),
    #[error("More than {ETCD_URLS_MAX} URLs")]
    TooManyUrls,
}

/// Where a peer listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
    Rdma { host: String, port: u16 },
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if let Some(rest) = text.strip_prefix("tcp:") {
            let (host, port) = host_port(rest)?;
            Ok(Self::Tcp { host, port })
        } else if let Some(rest) = text.strip_prefix("rdma:") {
            let (host, port) = host_port(rest)?;
            Ok(Self::Rdma { host, port })
        } else if let Some(path) = text.strip_prefix("unix:") {
            match path.len() {
                0 => Err(EndpointError::EmptyPath),
                1..=UNIX_PATH_BYTES_MAX => Ok(Self::Unix(PathBuf::from(path))),
                _ => Err(EndpointError::LongPath),
            }
        } else {
            Err(EndpointError::Scheme(text.to_owned()))
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match self {
            Self::Unix(path) => return write!(out, "unix:{}", path.display()),
            Self::Tcp { host, port } => ("tcp", host, port),
            Self::Rdma { host, port } => ("rdma", host, port),
        };
        if host.contains(':') {
            write!(out, "{scheme}:[{host}]:{port}")
        } else {
            write!(out, "{scheme}:{host}:{port}")
        }
    }
}

/// Where the record of ownership is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ArbiterUrl {
    /// A directory that both hosts see.
    File(PathBuf),
    /// A key in an etcd cluster.
    Etcd(EtcdCluster),
}

impl FromStr for ArbiterUrl {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if let Some(path) = text.strip_prefix("file:") {
            if path.is_empty() {
                return Err(EndpointError::EmptyPath);
            }
            return Ok(Self::File(PathBuf::from(path)));
        }
        let Some(rest) = text.strip_prefix("etcd:") else {
            return Err(EndpointError::ArbiterScheme(text.to_owned()));
        };
        EtcdCluster::parse(rest).map(Self::Etcd)
    }
}

impl fmt::Display for ArbiterUrl {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(out, "file:{}", path.display()),
            Self::Etcd(cluster) => write!(out, "etcd:{cluster}"),
        }
    }
}

fn host_port(text: &str) -> Result<(String, u16), EndpointError> {
    let malformed = || EndpointError::HostPort(text.to_owned());
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once("]:").ok_or_else(malformed)?;
            host.parse::<Ipv6Addr>().map_err(|_| EndpointError::Host(host.to_owned()))?;
            (host, port)
        }
        None => {
            let (host, port) = text.split_once(':').ok_or_else(malformed)?;
            let named = !host.is_empty()
                && host.len() <= HOST_BYTES_MAX
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
            if !named {
                return Err(EndpointError::Host(host.to_owned()));
            }
            (host, port)
        }
    };
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    match port.parse::<u16>() {
        Ok(number) if digits && number != 0 => Ok((host.to_owned(), number)),
        _ => Err(EndpointError::Port(port.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn places_print_as_they_are_parsed() {
        for text in [
            "tcp:localhost:4000",
            "tcp:10.0.0.1:1",
            "tcp:[::1]:65535",
            "rdma:[fe80::1]:7",
            "rdma:h-1.example_2:18515",
            "unix:/run/a b:c",
            "unix:relative",
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        for text in ["file:/shared/vm", "etcd:http://a:2379,https://[::1]:2379/vm1"] {
            assert_eq!(text.parse::<ArbiterUrl>().unwrap().to_string(), text);
        }
        assert_eq!("tcp:[::1]:9".parse(), Ok(Endpoint::Tcp { host: "::1".to_owned(), port: 9 }));
    }

    #[test]
    fn what_is_no_place_is_refused() {
        for text in [
            "",
            "tcp",
            "TCP:a:1",
            "tcp://a:1",
            "tcp:a",
            "tcp::1",
            "tcp:a:",
            "tcp:a:0",
            "tcp:a:65536",
            "tcp:a:+1",
            "tcp:a:1:2",
            "tcp:::1:9",
            "tcp:[::1]",
            "tcp:[::1:9",
            "tcp:[a]:9",
            "tcp:a b:1",
            "tcp:a/b:1",
            "unix:",
            "http://a:1",
            "rdma:a",
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
        for text in [
            "",
            "file:",
            "/shared",
            "etcd:",
            "etcd:a:1",
            "etcd:http://",
            "etcd:http:///a",
            "etcd:http://a:0",
            "etcd:http://a:",
            "etcd:http://[::1",
            "etcd:http://[::1]x",
            "etcd:ftp://a",
            "etcd:http://a,",
            "zk:http://a",
        ] {
            assert!(text.parse::<ArbiterUrl>().is_err(), "{text}");
        }
        let longest = format!("unix:/{}", "x".repeat(UNIX_PATH_BYTES_MAX - 1));
        assert!(longest.parse::<Endpoint>().is_ok());
        assert_eq!(format!("{longest}x").parse::<Endpoint>(), Err(EndpointError::LongPath));
        let many = format!("etcd:{}", vec!["http://a"; ETCD_URLS_MAX + 1].join(","));
        assert_eq!(many.parse::<ArbiterUrl>(), Err(EndpointError::TooManyUrls));
    }

    proptest! {
        #[test]
        fn no_text_breaks_a_place(text in "(tcp|rdma|unix|file|etcd|etcd:http://|etcd:https://a)?:?.{0,30}") {
            if let Ok(place) = text.parse::<Endpoint>() {
                prop_assert_eq!(place.to_string().parse(), Ok(place));
            }
            if let Ok(place) = text.parse::<ArbiterUrl>() {
                prop_assert_eq!(place.to_string().parse(), Ok(place));
            }
        }
    }
}
