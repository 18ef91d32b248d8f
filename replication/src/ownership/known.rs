//! What a process knows of its VMs' records from one session to the next.
//!
//! Enters: generations under which a VM was this host's. Leaves: the highest of them, below which an
//! arbiter's answer is none. Always holds: only what the other side of a pair had seen as well counts, or
//! what was won in its place. A directory that nothing was mounted over is seen by this host alone: what
//! stands there is not what the one behind the mount has to reach.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{ArbiterError, HostIdentity, Record, VmId};
use crate::error::Error;
use crate::ids::Generation;

/// Of all VMs and arbiters that this process has dealt with. Another arbiter, by another URL, begins anew.
#[derive(Clone, Debug, Default)]
pub struct Known(Arc<Mutex<HashMap<(VmId, String), Seen>>>);

impl Known {
    /// What is known of `vm` at the arbiter of this URL; without an arbiter what only this asker knows.
    #[must_use]
    pub fn of(&self, vm: VmId, arbiter: Option<&str>) -> Seen {
        let Some(arbiter) = arbiter else { return Seen::default() };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry((vm, arbiter.to_owned())).or_default().clone()
    }
}

/// The highest generation that is known of one record.
#[derive(Clone, Debug, Default)]
pub struct Seen(Arc<AtomicU64>);

impl Seen {
    /// The record of `generation` was this host's, and both sides of the pair have seen it or what it
    /// followed.
    pub fn raise(&self, generation: Generation) {
        self.0.fetch_max(generation.0, Ordering::AcqRel);
    }

    /// Records of an older generation are gone.
    #[must_use]
    pub fn generation(&self) -> Generation {
        Generation(self.0.load(Ordering::Acquire))
    }

    /// The generation to go on from, if this host may protect the VM at all. Whatever is older than what is
    /// known is storage that is away, another cluster, or an old view, whoever it names: that may pass.
    pub(crate) fn admit(
        &self,
        record: Option<Record>,
        identity: HostIdentity,
    ) -> Result<Generation, Error> {
        let (found, known) =
            (record.map_or(Generation(0), |record| record.generation), self.generation());
        match record {
            _ if found < known => Err(Error::Arbiter(ArbiterError::Vanished(known))),
            // There was one of this VM: other storage is mounted.
            Some(record) if record.vm != identity.vm && known > Generation(0) => {
                Err(Error::Arbiter(ArbiterError::OtherVm(record)))
            }
            Some(record) if !record.is_of(identity) => Err(Error::Conflict(format!(
                "The arbiter holds the record of another owner ({record}): use an empty directory, or \
                 a key of its own, for each VM, or protect the VM on the host that owns it"
            ))),
            _ => Ok(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::ownership::{HostId, Standing};

    #[test]
    fn each_vm_and_each_arbiter_has_its_own_and_none_goes_back() {
        let known = Known::default();
        let [one, other] = [1, 2].map(|n| VmId(Uuid::from_u128(n)));
        let seen = known.of(one, Some("file:/a"));
        seen.raise(Generation(4));
        seen.raise(Generation(3));
        assert_eq!(known.clone().of(one, Some("file:/a")).generation(), Generation(4));
        for (vm, arbiter) in [(one, Some("file:/b")), (other, Some("file:/a")), (one, None)] {
            assert_eq!(known.of(vm, arbiter).generation(), Generation(0), "{arbiter:?}");
        }
        known.of(one, None).raise(Generation(9));
        assert_eq!(known.of(one, None).generation(), Generation(0), "nobody keeps a record");
    }

    #[test]
    fn what_is_older_than_what_is_known_is_no_answer_whoever_it_names() {
        let [me, other] = [1, 2].map(|n| HostId(Uuid::from_u128(n)));
        let identity = HostIdentity { host: me, vm: VmId(Uuid::from_u128(3)) };
        let record = |generation, owner| {
            let standing = Standing::Solo { owner };
            Some(Record { generation: Generation(generation), vm: identity.vm, standing })
        };
        let new = Seen::default();
        assert_eq!(new.admit(None, identity).unwrap(), Generation(0));
        assert_eq!(new.admit(record(7, me), identity).unwrap(), Generation(7));
        let seen = Seen::default();
        seen.raise(Generation(4));
        for old in [None, record(3, me), record(3, other)] {
            let error = seen.admit(old, identity).unwrap_err();
            assert!(error.may_pass() && error.chain().contains("generation 4"), "{error:?}");
        }
        for generation in [4, 5] {
            let admitted = seen.admit(record(generation, me), identity).unwrap();
            assert_eq!(admitted, Generation(generation));
        }
        let another = HostIdentity { vm: VmId(Uuid::from_u128(9)), ..identity };
        let error = seen.admit(record(5, me), another).unwrap_err();
        assert!(error.may_pass(), "other storage may be mounted: {error:?}");
        for seen in [new, seen] {
            let error = seen.admit(record(5, other), identity).unwrap_err();
            assert!(!error.may_pass(), "{error:?}");
        }
        assert!(!Seen::default().admit(record(5, me), another).unwrap_err().may_pass());
    }
}
