//! What a request asks for, checked against itself and against this build.

use api::replication::ReplicateData;

use crate::error::Error;
use crate::ownership::{Arbiter, ArbiterError, open};
use crate::transport::{Address, check};
use crate::wire::CONNECTIONS_MAX;

/// A request that can be carried out.
pub(super) struct Checked {
    pub(super) options: ReplicateData,
    pub(super) address: Address,
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
        Ok(address) => {
            check(&address).map_err(Error::Transport)?;
            Ok(address)
        }
        Err(error) => invalid(option, error.to_string()),
    }
}

/// Opens the arbiter of a request.
pub(crate) fn arbiter(url: Option<&str>) -> Result<Option<Box<dyn Arbiter>>, Error> {
    match url.map(open).transpose() {
        Ok(arbiter) => Ok(arbiter),
        Err(error @ ArbiterError::Unsupported(_)) => invalid("arbiter", error.to_string()),
        Err(error) => Err(Error::Arbiter(error)),
    }
}

impl Checked {
    pub(super) fn new(options: ReplicateData) -> Result<Self, Error> {
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
        if options.tls_dir.is_some() {
            return invalid("tls_dir", "this build has no TLS");
        }
        let address = address("destination_url", &options.destination_url)?;
        let arbiter = arbiter(options.arbiter.as_deref())?;
        Ok(Self { options, address, arbiter })
    }
}
