//! What a request asks for, checked against itself and against this build.

use std::path::Path;

use api::replication::{
    RDMA_DEPTH, RDMA_DEVICE_BYTES_MAX, RDMA_GID_INDEX, RDMA_PORT, ReplicateData,
};

use crate::error::{Error, chain};
use crate::ownership::{Arbiter, ArbiterError, open};
use crate::transport::{Address, Destination, name, rdma, tls};
use crate::wire::CONNECTIONS_MAX;

/// A request that can be carried out.
pub(super) struct Checked {
    pub(super) options: ReplicateData,
    pub(super) destination: Destination,
    /// Where data goes by RDMA.
    pub(super) rdma: Option<rdma::Asked>,
    /// Why it does not, although the URL says so.
    pub(super) fell_back: Option<String>,
    pub(super) arbiter: Option<Box<dyn Arbiter>>,
}

fn invalid<T>(option: &'static str, reason: impl Into<String>) -> Result<T, Error> {
    Err(Error::Option { option, reason: reason.into() })
}

/// Checks the times that both sides give.
pub(crate) fn validate_paces(heartbeat_ms: u64, timeout_ms: u64) -> Result<(), Error> {
    if !(10..=60_000).contains(&heartbeat_ms) {
        return invalid("heartbeat_ms", "expected 10 to 60000");
    }
    if timeout_ms < 2 * heartbeat_ms || timeout_ms > 3_600_000 {
        return invalid("timeout_ms", "expected twice heartbeat_ms to 3600000");
    }
    Ok(())
}

/// Reads an endpoint.
pub(crate) fn address(option: &'static str, url: &str) -> Result<Address, Error> {
    match url.parse::<Address>() {
        Ok(address) => Ok(address),
        Err(error) => invalid(option, error.to_string()),
    }
}

/// What a request with this address asks of RDMA; `numbers` are port, GID index and depth. Whether
/// this host can do it is for [`rdma::Asked::check`] to say.
pub(crate) fn asked_of_rdma(
    address: &Address,
    device: Option<&str>,
    numbers: [Option<u32>; 3],
) -> Result<Option<rdma::Asked>, Error> {
    const NAMES: [&str; 3] = ["rdma_port", "rdma_gid_index", "rdma_depth"];
    if !matches!(address, Address::Rdma { .. }) {
        let given = NAMES.iter().zip(numbers).filter_map(|(name, number)| number.map(|_| *name));
        return match device.map(|_| "rdma_device").into_iter().chain(given).next() {
            Some(option) => invalid(option, "it is for rdma: only"),
            None => Ok(None),
        };
    }
    if device.is_some_and(|name| name.is_empty() || name.len() > RDMA_DEVICE_BYTES_MAX) {
        return invalid("rdma_device", format!("expected 1 to {RDMA_DEVICE_BYTES_MAX} bytes"));
    }
    for ((name, number), range) in
        NAMES.iter().zip(numbers).zip([RDMA_PORT, RDMA_GID_INDEX, RDMA_DEPTH])
    {
        if number.is_some_and(|number| !range.contains(&number)) {
            return invalid(name, format!("expected {} to {}", range.start(), range.end()));
        }
    }
    let [port, gid_index, depth] = numbers;
    let byte = |number: Option<u32>| number.and_then(|number| u8::try_from(number).ok());
    let device = device.map(str::to_owned);
    Ok(Some(rdma::Asked { device, port: byte(port), gid_index: byte(gid_index), depth }))
}

/// Opens the arbiter of a request; `own` are the directory and the file that only `etcd:` has.
pub(crate) fn arbiter(
    url: Option<&str>,
    own: [Option<&str>; 2],
) -> Result<Option<Box<dyn Arbiter>>, Error> {
    let [tls_dir, credentials] = own.map(|path| path.map(Path::new));
    if url.is_none() {
        for (option, path) in [("arbiter_tls_dir", tls_dir), ("arbiter_credentials", credentials)] {
            if path.is_some() {
                return invalid(option, "there is no arbiter");
            }
        }
    }
    match url.map(|url| open(url, tls_dir, credentials)).transpose() {
        Ok(arbiter) => Ok(arbiter),
        Err(ArbiterError::Option { option, reason }) => invalid(option, reason),
        Err(error) => Err(Error::Arbiter(error)),
    }
}

/// What a side with this address needs for TLS; `load` reads it for the address's host.
pub(crate) fn certificates<T>(
    address: &Address,
    directory: Option<&str>,
    load: impl FnOnce(&Path, &str) -> Result<T, tls::CredentialError>,
) -> Result<Option<T>, Error> {
    const OPTION: &str = "tls_dir";
    match (directory, address) {
        (None, _) => Ok(None),
        (Some(directory), Address::Tcp { host, .. } | Address::Rdma { host, .. }) => {
            match load(Path::new(directory), host) {
                Ok(loaded) => Ok(Some(loaded)),
                Err(error) => invalid(OPTION, chain(&error)),
            }
        }
        // Who may open the socket is what its directory's permissions say, and its bytes stay here.
        (Some(_), Address::Unix(_)) => invalid(OPTION, "it is for tcp: and rdma: only"),
    }
}

/// Whether a request could be carried out, as far as this host can say.
pub(crate) fn check(options: ReplicateData) -> Result<(), Error> {
    Checked::new(options, None).map(drop)
}

impl Checked {
    /// Checks `options`. `fell_back` says why data goes by TCP where they ask for RDMA.
    pub(super) fn new(options: ReplicateData, fell_back: Option<&str>) -> Result<Self, Error> {
        if !(1..=10_000).contains(&options.epoch_ms) {
            return invalid("epoch_ms", "expected 1 to 10000");
        }
        if options.epoch_min_ms > options.epoch_ms {
            return invalid("epoch_min_ms", "exceeds epoch_ms");
        }
        let longest = options.epoch_ms..=10_000;
        if options.epoch_max_ms.is_some_and(|most| !longest.contains(&most)) {
            return invalid("epoch_max_ms", "expected epoch_ms to 10000");
        }
        if !(1..=CONNECTIONS_MAX).contains(&options.connections) {
            return invalid("connections", format!("expected 1 to {CONNECTIONS_MAX}"));
        }
        validate_paces(options.heartbeat_ms, options.timeout_ms)?;
        let address = address("destination_url", &options.destination_url)?;
        let numbers = [options.rdma_port, options.rdma_gid_index, options.rdma_depth];
        let asked = asked_of_rdma(&address, options.rdma_device.as_deref(), numbers)?;
        let for_rdma = [(options.rdma_pin.is_some(), "rdma_pin"), (options.fallback, "fallback")];
        if let Some((_, option)) = for_rdma.iter().find(|(is_given, _)| *is_given)
            && asked.is_none()
        {
            return invalid(option, "it is for rdma: only");
        }
        let (rdma, fell_back) = way(asked, options.fallback, fell_back)?;
        let own = [&options.arbiter_tls_dir, &options.arbiter_credentials];
        let arbiter = arbiter(options.arbiter.as_deref(), own.map(Option::as_deref))?;
        let tls = certificates(&address, options.tls_dir.as_deref(), tls::Client::load)?;
        Ok(Self { options, destination: Destination { address, tls }, rdma, fell_back, arbiter })
    }

    /// What carries the data, as clients are told.
    pub(super) fn transport(&self) -> &'static str {
        let Destination { address, tls } = &self.destination;
        match (&self.fell_back, tls) {
            (Some(_), Some(_)) => "tcp+tls",
            (Some(_), None) => "tcp",
            (None, tls) => name(address, tls.is_some()),
        }
    }
}

/// Whether data goes by RDMA, as was asked for, or why not. Whether this host can do it is looked at here, before
/// anything else is begun.
fn way(
    asked: Option<rdma::Asked>,
    falls_back: bool,
    fell_back: Option<&str>,
) -> Result<(Option<rdma::Asked>, Option<String>), Error> {
    let Some(asked) = asked else { return Ok((None, None)) };
    if let Some(reason) = fell_back {
        return Ok((None, Some(reason.to_owned())));
    }
    match asked.check() {
        Ok(()) => Ok((Some(asked), None)),
        Err(error) if falls_back => Ok((None, Some(chain(&error)))),
        Err(error) => Err(Error::Transport(error)),
    }
}
