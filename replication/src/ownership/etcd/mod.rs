//! `etcd:<url>[,<url>]`: one key per VM in an etcd cluster, by its JSON gateway (`/v3/kv/…`).
//!
//! A swap reads the key, and then asks for a transaction: *if* the revision of the key's last change
//! is still the one that was read (0: there is no key), put the new record, *else* say what stands.
//! The cluster orders transactions and revisions only grow, so of all that have read one revision at
//! most one puts. Nothing rests on a lease, a lock, a clock or the life of a connection.
//!
//! ```text
//!   linearizable range ── older than expected, or none ───> Vanished
//!        │            ├── our own record ────────────────> won
//!        │            └── a later one ───────────────────> lost
//!        v the expected one, at revision r
//!   txn: mod_revision == r ? put : range
//!        ├── succeeded ──────────────────────────────────> won
//!        ├── refused: our own record stands ─────────────> won   (see below)
//!        ├── refused: a later one ───────────────────────> lost
//!        └── no answer ──────────────────────────────────> error: outcome unknown
//! ```
//!
//! **Reads** go to the server that answered last, and to one more beside it each time that nobody has
//! answered for a moment, or one failed. They are linearizable, so whichever answers first says what
//! the majority has agreed upon; a server without a majority does not answer at all.
//!
//! **A transaction is sent once**, to the server that has just answered the read, and never again
//! by this module. Sending it anew elsewhere would do no harm (the revision that it compares is gone
//! once it took place), but its answer would then be "refused", whoever won. Instead every failure
//! is an error, upon which the claim reads before it swaps again (`protocol::ownership`), and finds
//! either its own record, or the old one, or another's. Something between here and the cluster may
//! repeat a request by itself all the same; so a refusal that finds our own record standing is won:
//! a record names its host and its generation, and nobody else writes it.
//!
//! **Won** needs nothing more: etcd answers once a majority has the change on disk, and a
//! linearizable read shows nothing else.
//!
//! **One cluster, one history.** Two clusters would be two arbiters, and one that was restored from a
//! backup may lack a generation that this process never heard of. So an answer of another cluster
//! than before, or of an earlier revision, is no answer.

mod answer;
mod client;
mod error;
mod files;
mod gateway;
mod http;
mod servers;

use std::path::PathBuf;

use api::endpoint::EtcdCluster;

pub use answer::Place;
pub use client::Learnt;
pub use error::{CallError, EtcdError, FileError, Malformed};
pub use gateway::{Gateway, Heard, Round};
pub use servers::Servers;

use self::answer::{Entry, SwapOutcome};
use self::client::{Calls, Client};
use super::{Arbiter, ArbiterError, Outcome, Record};
use crate::ids::Generation;

/// How the servers are talked to, beside their URLs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Folder with `ca-cert.pem`, `client-cert.pem` and `client-key.pem`, the first or the last two
    /// or all of them. They are read anew for each operation, so they can be renewed in place.
    pub tls_dir: Option<PathBuf>,
    /// File with `<user>:<password>`; read at each login.
    pub credentials: Option<PathBuf>,
}

/// The arbiter in an etcd cluster.
#[derive(Debug)]
pub struct EtcdArbiter<G = Servers> {
    key: String,
    client: Client<G>,
}

/// What stands, and the revision to compare.
struct Standing {
    record: Option<Record>,
    revision: i64,
}

impl EtcdArbiter {
    /// Looks at the files; asks no server.
    ///
    /// # Errors
    /// The option that names it, and what is wrong with a file.
    pub fn new(cluster: EtcdCluster, access: Access) -> Result<Self, (&'static str, FileError)> {
        let EtcdCluster { servers, key } = cluster;
        Ok(Self { key, client: Client::new(Servers::new(servers, access)?) })
    }
}

/// For a simulator, which runs an operation more than once.
#[cfg(any(test, feature = "testing"))]
impl<G: Gateway> EtcdArbiter<G> {
    /// At servers that somebody else looks after, knowing what an earlier operation has left.
    #[must_use]
    pub fn over(key: &str, gateway: G, learnt: Learnt) -> Self {
        let client = Client::new(gateway);
        client.learnt.set(learnt);
        Self { key: key.to_owned(), client }
    }

    /// What is left to the next operation.
    #[must_use]
    pub fn learnt(&self) -> Learnt {
        self.client.learnt.get()
    }
}

impl<G: Gateway> EtcdArbiter<G> {
    fn standing(&self, entry: Option<&Entry>) -> Result<Standing, EtcdError> {
        let Some(entry) = entry else { return Ok(Standing { record: None, revision: 0 }) };
        let damaged = |reason| EtcdError::Damaged { key: self.key.clone(), reason };
        let record = answer::record(&entry.value).map_err(damaged)?;
        Ok(Standing { record: Some(record), revision: entry.revision })
    }

    /// What `standing` means for a swap; `None` if it is the record to be replaced.
    fn judge(
        &self,
        standing: &Standing,
        expected: Generation,
        next: &Record,
    ) -> Result<Option<Outcome>, ArbiterError> {
        let found = standing.record.map_or(Generation(0), |record| record.generation);
        if found < expected {
            // The key was deleted, or belongs to a cluster that lost what it had.
            return Err(ArbiterError::Vanished(expected));
        }
        if let Some(record) = standing.record.filter(|record| record.vm != next.vm) {
            let (key, record) = (self.key.clone(), record.to_string());
            return Err(EtcdError::OtherVm { key, record }.into());
        }
        if standing.record == Some(*next) {
            return Ok(Some(Outcome::Won));
        }
        if found > expected {
            return Ok(Some(Outcome::Lost(standing.record)));
        }
        Ok(None)
    }

    fn swap(
        &self,
        calls: &Calls<'_, G>,
        server: usize,
        revision: i64,
        next: &Record,
    ) -> Result<SwapOutcome, EtcdError> {
        let value = serde_json::to_vec(next).map_err(|error| EtcdError::Damaged {
            key: self.key.clone(),
            reason: error.to_string(),
        })?;
        calls.swap(server, self.key.as_bytes(), revision, &value)
    }
}

impl<G: Gateway> Arbiter for EtcdArbiter<G> {
    fn begin_anew(&self) {
        self.client.learnt.set(Learnt { place: None, ..self.client.learnt.get() });
    }

    fn read(&self) -> Result<Option<Record>, ArbiterError> {
        let (_, entry) = self.client.calls()?.range(self.key.as_bytes())?;
        Ok(self.standing(entry.as_ref())?.record)
    }

    fn compare_and_swap(
        &self,
        expected: Generation,
        next: &Record,
    ) -> Result<Outcome, ArbiterError> {
        assert_eq!(next.generation, expected.next(), "a swap raises the generation by one");
        let calls = self.client.calls()?;
        let (server, entry) = calls.range(self.key.as_bytes())?;
        let standing = self.standing(entry.as_ref())?;
        if let Some(outcome) = self.judge(&standing, expected, next)? {
            return Ok(outcome);
        }
        match self.swap(&calls, server, standing.revision, next)? {
            SwapOutcome::Done => Ok(Outcome::Won),
            SwapOutcome::Refused(entry) => {
                let standing = self.standing(entry.as_ref())?;
                let outcome = self.judge(&standing, expected, next)?;
                // The generation stands, its revision does not: somebody's hand.
                outcome.ok_or_else(|| EtcdError::Rewritten(self.key.clone()).into())
            }
        }
    }
}

/// What reads bytes of servers, for the fuzz targets.
#[cfg(feature = "fuzzing")]
pub mod fuzzing {
    pub use super::answer::{
        ANSWER_BYTES_MAX, Entry, Found, Place, SwapOutcome, Swapped, range, record, refusal, swap,
        token,
    };
}

#[cfg(test)]
mod tests;
