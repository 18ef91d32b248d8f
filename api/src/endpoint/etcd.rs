//! `etcd:<url>[,<url>]`: the servers of one etcd cluster, and the key that holds the record.
//!
//! ```text
//! url = ( "http://" | "https://" ) host [ ":" port ] [ "/" [ key ] ]
//! ```
//!
//! The path of a URL, less its first slash, names the key. One URL with a path is enough, wherever
//! it stands; where several have one, it must be the same. Without any the key is
//! [`ETCD_KEY_DEFAULT`]. It is printed behind the last URL.

use std::fmt;

use super::{EndpointError, host_port};

/// Port of a URL that names none: the one that IANA assigned to etcd's clients.
pub const ETCD_PORT_DEFAULT: u16 = 2379;
/// Key of URLs that name none.
pub const ETCD_KEY_DEFAULT: &str = "understudy";
/// Bytes of a key.
pub const ETCD_KEY_BYTES_MAX: usize = 256;
/// Servers of a cluster that may be named.
pub const ETCD_URLS_MAX: usize = 16;

/// The servers of a cluster, in the order in which they are asked, and the key of a VM's record.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EtcdCluster {
    /// 1 to [`ETCD_URLS_MAX`].
    pub servers: Vec<EtcdServer>,
    /// 1 to [`ETCD_KEY_BYTES_MAX`] bytes: letters, digits and `-._:/`.
    pub key: String,
}

/// Where a server of a cluster takes requests. Prints as a URL without a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EtcdServer {
    /// Whether by `https:`.
    pub tls: bool,
    pub host: String,
    pub port: u16,
}

impl EtcdCluster {
    /// Reads what stands behind `etcd:`.
    pub(super) fn parse(text: &str) -> Result<Self, EndpointError> {
        let mut servers = Vec::new();
        let mut key: Option<String> = None;
        for text in text.split(',') {
            let (server, named) = url(text)?;
            servers.push(server);
            match (&key, named) {
                (Some(before), Some(named)) if before != named => {
                    return Err(EndpointError::EtcdKeys(before.clone(), named.to_owned()));
                }
                (None, Some(named)) => key = Some(named.to_owned()),
                _ => {}
            }
        }
        if servers.len() > ETCD_URLS_MAX {
            return Err(EndpointError::TooManyUrls);
        }
        Ok(Self { servers, key: key.unwrap_or_else(|| ETCD_KEY_DEFAULT.to_owned()) })
    }
}

impl fmt::Display for EtcdCluster {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<String> = self.servers.iter().map(EtcdServer::to_string).collect();
        out.write_str(&servers.join(","))?;
        if self.key == ETCD_KEY_DEFAULT { Ok(()) } else { write!(out, "/{}", self.key) }
    }
}

impl fmt::Display for EtcdServer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tls, host, port } = self;
        let scheme = if *tls { "https" } else { "http" };
        if host.contains(':') {
            write!(out, "{scheme}://[{host}]:{port}")
        } else {
            write!(out, "{scheme}://{host}:{port}")
        }
    }
}

/// A server, and the key where the URL has one.
fn url(text: &str) -> Result<(EtcdServer, Option<&str>), EndpointError> {
    // Whatever it is, it may hold a password, which no message repeats.
    if text.contains('@') {
        return Err(EndpointError::UserInUrl);
    }
    let malformed = || EndpointError::Url(text.to_owned());
    let (tls, rest) = match text.strip_prefix("https://") {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix("http://").ok_or_else(malformed)?),
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if authority.is_empty() {
        return Err(malformed());
    }
    let has_port = if authority.starts_with('[') {
        !authority.ends_with(']')
    } else {
        authority.contains(':')
    };
    let (host, port) = if has_port {
        host_port(authority)?
    } else {
        host_port(&format!("{authority}:{ETCD_PORT_DEFAULT}"))?
    };
    let is_key = path.len() <= ETCD_KEY_BYTES_MAX
        && path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._:/".contains(&byte));
    if !is_key {
        return Err(EndpointError::EtcdKey(path.to_owned()));
    }
    Ok((EtcdServer { tls, host, port }, Some(path).filter(|key| !key.is_empty())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::ArbiterUrl;

    fn parse(text: &str) -> Result<EtcdCluster, EndpointError> {
        match text.parse() {
            Ok(ArbiterUrl::Etcd(cluster)) => Ok(cluster),
            Ok(other) => panic!("{text} is {other:?}"),
            Err(error) => Err(error),
        }
    }

    #[test]
    fn the_key_is_the_path_of_any_url() {
        for (text, key) in [
            ("etcd:http://a", "understudy"),
            ("etcd:http://a/", "understudy"),
            ("etcd:http://a/vm1", "vm1"),
            ("etcd:http://a/vm1,http://b", "vm1"),
            ("etcd:http://a,https://b:2379/ha/vm1", "ha/vm1"),
            ("etcd:http://a//ha/vm1", "/ha/vm1"),
            ("etcd:http://a/vm1,http://b/,http://c/vm1", "vm1"),
        ] {
            assert_eq!(parse(text).unwrap().key, key, "{text}");
        }
        let two = EndpointError::EtcdKeys("vm1".to_owned(), "vm2".to_owned());
        assert_eq!(parse("etcd:http://a/vm1,http://b/vm2"), Err(two));
        let longest = format!("etcd:http://a/{}", "k".repeat(ETCD_KEY_BYTES_MAX));
        assert!(parse(&longest).is_ok());
        for text in ["http://a/a b", "http://a/a%20b", "http://a/a?b", "http://a/ü", "http://a/a#b"]
        {
            let error = parse(&format!("etcd:{text}")).unwrap_err();
            assert!(matches!(error, EndpointError::EtcdKey(_)), "{text}: {error}");
        }
        assert!(matches!(parse(&format!("{longest}k")), Err(EndpointError::EtcdKey(_))));
    }

    #[test]
    fn a_server_has_the_port_of_etcd_unless_it_says_another() {
        let server = |tls, host: &str, port| EtcdServer { tls, host: host.to_owned(), port };
        let cluster = parse("etcd:http://a,https://b:1,http://[::1],http://[::1]:7/x").unwrap();
        let servers = [server(false, "a", 2379), server(true, "b", 1), server(false, "::1", 2379)];
        assert_eq!(cluster.servers[..3], servers);
        assert_eq!(cluster.servers[3], server(false, "::1", 7));
        let text = "etcd:http://a:2379,https://b:1,http://[::1]:2379,http://[::1]:7/x";
        assert_eq!(ArbiterUrl::Etcd(cluster).to_string(), text);
    }

    #[test]
    fn a_password_in_a_url_is_refused_and_not_repeated() {
        let error = parse("etcd:http://a,http://root:secret@b/x").unwrap_err();
        assert_eq!(error, EndpointError::UserInUrl);
        assert!(!error.to_string().contains("secret"));
    }
}
