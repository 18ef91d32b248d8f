//! Calls of the `file:` arbiter, one call of the storage after the other.

use rand::Rng;

use super::super::storage::{Client, Fate, Op};
use super::{Event, Kind, MS, Run, claim};

impl Run {
    /// A host's arbiter is called, for an engine that may hear of it.
    pub(super) fn begins_client(&mut self, at: usize, life: u64, action: claim::Action) {
        if self.plan.kind == Kind::Etcd {
            return self.begins_at_etcd(at, life, action);
        }
        let mut client = Client::new(at, life, self.beside[at].process, action);
        let heard = client.run(None, self.broken);
        assert!(heard.is_none(), "nothing is known without the storage");
        client.away = self.beside[at].is_unmounted && !client.expects_nothing();
        self.clients_made += 1;
        self.clients.insert(self.clients_made, client);
        self.asks_storage(self.clients_made);
    }

    fn asks_storage(&mut self, number: u64) {
        let way_us = self.up_to(self.plan.arbiter_us_max / 3);
        self.after(way_us, Event::Storage(number));
    }

    /// The storage does what a client asked.
    pub(super) fn storage(&mut self, number: u64) {
        let Some(mut client) = self.clients.remove(&number) else { return };
        let Some(op) = client.wants.take() else { return };
        let at = client.host;
        if !self.hosts[at].alive || self.beside[at].process != client.process {
            // It was killed: what it had asked is done or not, and nothing follows.
            if self.rng.random_ratio(1, 2) {
                self.storage.call(&op, Fate::Well, self.broken);
            }
            return;
        }
        let fate = self.storage_fate(&client, &op);
        if fate == Fate::Late {
            self.later(&op);
        }
        self.summary.storage_calls += 1;
        self.summary.storage_faults += u64::from(fate != Fate::Well);
        let answer = self.storage.call(&op, fate, self.broken);
        if matches!(op, Op::Link(..)) && !self.are_faults_over() && self.rng.random_ratio(1, 12) {
            // When it hurts: the name is there, and is not synced.
            let soon_us = self.up_to(self.plan.arbiter_us_max);
            self.after(soon_us, Event::PowerCut);
        }
        match client.run(Some(answer), self.broken) {
            None => {
                self.clients.insert(number, client);
                self.asks_storage(number);
            }
            Some(event) => self.after(0, Event::Answer(at, client.life, event)),
        }
    }

    fn storage_fate(&mut self, client: &Client, op: &Op) -> Fate {
        if client.away {
            return Fate::Away;
        }
        // An operation has up to eight calls.
        let wrong = self.rng.random_ratio(self.plan.arbiter_wrong, 3000);
        if self.are_faults_over() || !(wrong || self.beside[client.host].arbiter_cut) {
            return Fate::Well;
        }
        match self.rng.random_range(0..6) {
            0 if !self.beside[client.host].arbiter_cut => Fate::Unheard,
            1 => Fate::Late,
            2 if matches!(op, Op::Create(..)) => Fate::Torn,
            3 if matches!(op, Op::Names) => Fate::Stale(self.rng.random_range(1..3)),
            4 => Fate::Fails(std::io::ErrorKind::StorageFull),
            _ => Fate::Fails(std::io::ErrorKind::Other),
        }
    }

    /// Only a link matters to others when it is late: its file is there although its name is gone.
    fn later(&mut self, op: &Op) {
        if let Op::Link(from, to) = op
            && let Some(bytes) = self.storage.bytes(from)
        {
            let later_us = self.up_to(1_000 * MS);
            self.after(later_us, Event::LateLink(to.clone(), bytes));
        }
    }

    pub(super) fn late_link(&mut self, to: &str, bytes: Vec<u8>) {
        self.storage.link(to, bytes, self.broken);
    }

    /// The storage loses what was not synced; nobody is told.
    pub(super) fn power_cut(&mut self) {
        self.summary.records_lost += self.storage.loses() as u64;
    }
}
