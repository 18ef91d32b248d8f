//! Which transitions of the shipped machines a run has made.

use std::collections::BTreeMap;

use replication::primary::simulated::Step;
use replication::protocol::backup::{self, State as B};
use replication::protocol::ownership::{self, State as C};
use replication::protocol::primary::{self, Purpose, State as P};

#[derive(Clone, Debug, Default)]
pub struct Coverage(BTreeMap<String, u64>);

fn name(step: Step) -> String {
    match step {
        Step::Primary(from, to) => format!("primary {from:?} -> {to:?}"),
        Step::Backup(from, to) => format!("backup {from:?} -> {to:?}"),
        Step::Claim(from, to) => format!("claim {from:?} -> {to:?}"),
    }
}

/// Every transition that the tables of the machines allow.
#[must_use]
pub fn all() -> Vec<String> {
    let claiming = [Purpose::PeerLost, Purpose::Stop, Purpose::Resync, Purpose::GiveUp];
    let mut primaries = vec![P::Calling, P::Syncing, P::Pairing, P::Protected, P::HandingOver];
    primaries.push(P::Undecided);
    primaries.extend(claiming.map(P::Claiming));
    primaries.extend([P::Alone, P::Gone, P::Heir, P::Stopped, P::Failed]);
    let backups = [
        B::Idle,
        B::Syncing,
        B::Replica,
        B::Heir,
        B::Claiming,
        B::Orphan,
        B::Starting,
        B::TakenOver,
        B::Stopped,
    ];
    let claims = [C::Swapping, C::Waiting, C::Reading, C::Decided];
    let mut all = vec![];
    for from in &primaries {
        let valid = primaries.iter().filter(|to| primary::is_transition_valid(*from, **to));
        all.extend(valid.map(|to| name(Step::Primary(*from, *to))));
    }
    for from in backups {
        let valid = backups.iter().filter(|to| backup::is_transition_valid(from, **to));
        all.extend(valid.map(|to| name(Step::Backup(from, *to))));
    }
    for from in claims {
        let valid = claims.iter().filter(|to| ownership::is_transition_valid(from, **to));
        all.extend(valid.map(|to| name(Step::Claim(from, *to))));
    }
    all
}

impl Coverage {
    pub fn note(&mut self, step: Step) {
        *self.0.entry(name(step)).or_default() += 1;
    }

    pub fn add(&mut self, other: &Self) {
        for (name, count) in &other.0 {
            *self.0.entry(name.clone()).or_default() += count;
        }
    }

    /// How often each was made, in the order of the tables.
    #[must_use]
    pub fn counts(&self) -> Vec<(String, u64)> {
        let count = |name: String| {
            let count = self.0.get(&name).copied().unwrap_or(0);
            (name, count)
        };
        all().into_iter().map(count).collect()
    }

    /// What no table allows.
    #[must_use]
    pub fn strangers(&self) -> Vec<String> {
        let known = all();
        self.0.keys().filter(|name| !known.contains(name)).cloned().collect()
    }
}
