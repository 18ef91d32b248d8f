//! Calls of the `etcd:` arbiter, one request and one answer after the other.

use std::collections::BTreeMap;
use std::io::ErrorKind;

use rand::Rng;
use replication::ownership::etcd::{Learnt, Place};

use super::super::cluster::{Cluster, Condition, Fate, MEMBERS, Reply, Request};
use super::super::etcd::{Client, Next, Said, Wait};
use super::{Broken, Event, MS, Run, claim};

/// Limits of the client's for a connection and for a call.
const CONNECT_US: u64 = 1_500 * MS;
const CALL_US: u64 = 4_000 * MS;

/// What happens to requests and answers.
#[derive(Clone, Debug)]
pub(super) enum Turn {
    /// A client's request comes to a member; it was sent then.
    Arrives(u64, Request, u64),
    /// A client hears of it.
    Hears(u64, Said),
    /// A client has waited since it had heard so much.
    Silence(u64, usize),
    /// A request comes of which nobody hears.
    Stray(Request),
    Trouble,
    /// A member that was in this trouble is well again.
    Mends(usize, u64),
}

/// The cluster, and who is at it.
#[derive(Debug, Default)]
pub(super) struct Etcd {
    pub(super) cluster: Cluster,
    clients: BTreeMap<u64, Client>,
    clients_made: u64,
    /// What an engine's arbiter has learnt.
    learnt: BTreeMap<(usize, u64), Learnt>,
    /// There is no leader before this.
    elected_us: u64,
    troubles: u64,
    /// The last trouble of each member.
    trouble: [u64; MEMBERS],
}

impl Run {
    /// A host's arbiter is called, for an engine that may hear of it.
    pub(super) fn begins_at_etcd(&mut self, at: usize, life: u64, action: claim::Action) {
        let learnt = self.etcd.learnt.get(&(at, life)).copied().unwrap_or_default();
        let client = Client::new(at, life, self.beside[at].process, action, learnt);
        self.etcd.clients_made += 1;
        if self.etcd.clients_made == 1 {
            self.after(0, Event::Etcd(None, Turn::Trouble));
        }
        self.goes_on_at_etcd(self.etcd.clients_made, client, None);
    }

    pub(super) fn etcd(&mut self, turn: Turn) {
        match turn {
            Turn::Arrives(number, request, sent_us) => {
                self.arrives_at_etcd(number, request, sent_us)
            }
            Turn::Hears(number, said) => self.hears_of_etcd(number, said, None),
            Turn::Silence(number, heard) => self.hears_of_etcd(number, Said::Silence, Some(heard)),
            Turn::Stray(request) => drop(self.carries_out(&request)),
            Turn::Trouble => self.troubles_etcd(),
            Turn::Mends(member, trouble) => {
                if self.etcd.trouble[member] == trouble {
                    self.etcd.cluster.becomes(member, Condition::Well);
                }
            }
        }
    }

    /// `waited_since`: for a silence, which is none if something was heard.
    fn hears_of_etcd(&mut self, number: u64, said: Said, waited_since: Option<usize>) {
        let Some(mut client) = self.etcd.clients.remove(&number) else { return };
        let at = client.host;
        if !self.hosts[at].alive || self.beside[at].process != client.process {
            // It was killed: what it had asked is done or not, and nothing follows.
            return;
        }
        client.under_way -= usize::from(matches!(said, Said::Answer(..)));
        let waits = match said {
            Said::Posted(_) => client.waits == Some(Wait::Posted),
            // A read's answer beside a transaction is one to nobody.
            _ => matches!(client.waits, Some(Wait::Answer(_))),
        };
        if waits && waited_since.is_none_or(|heard| heard == client.heard()) {
            self.goes_on_at_etcd(number, client, Some(said));
        } else {
            self.etcd.clients.insert(number, client);
        }
    }

    fn goes_on_at_etcd(&mut self, number: u64, mut client: Client, said: Option<Said>) {
        let at = client.host;
        match client.run(said, self.broken) {
            Next::Ends(event) => {
                self.etcd.learnt.insert((at, client.life), client.learnt);
                self.after(0, Event::Answer(at, client.life, event));
            }
            Next::Waits { asks, post, wait } => {
                for request in asks.into_iter().chain(post) {
                    let way_us = self.up_to(self.plan.arbiter_us_max / 3);
                    let arrives = Turn::Arrives(number, request, self.now_us);
                    self.after(way_us, Event::Etcd(None, arrives));
                }
                match wait {
                    Wait::Answer(Some(within)) => {
                        let within_us = u64::try_from(within.as_micros()).unwrap_or(u64::MAX);
                        let silence = Turn::Silence(number, client.heard());
                        self.after(within_us, Event::Etcd(Some(at), silence));
                    }
                    Wait::Answer(None) if client.under_way == 0 => {
                        self.after(0, Event::Etcd(Some(at), Turn::Hears(number, Said::Nobody)));
                    }
                    Wait::Answer(None) | Wait::Posted => {}
                }
                self.etcd.clients.insert(number, client);
            }
        }
    }

    fn arrives_at_etcd(&mut self, number: u64, request: Request, sent_us: u64) {
        if self.now_us < self.etcd.elected_us && !self.are_faults_over() {
            let elected_us = self.etcd.elected_us;
            return self.at(elected_us, Event::Etcd(None, Turn::Arrives(number, request, sent_us)));
        }
        // Other VMs have keys, too.
        let changes = if self.rng.random_ratio(1, 2) { self.rng.random_range(1..6) } else { 0 };
        self.etcd.cluster.goes_on(changes);
        let client = self.etcd.clients.get(&number);
        let (host, knows) = client.map_or((None, None), |one| (Some(one.host), one.knows()));
        let (reply, limit_us) = match self.etcd.cluster.condition(request.server) {
            Condition::Well => {
                let fate = self.etcd_fate(host);
                self.summary.etcd_faults += u64::from(fate != Fate::Well);
                self.answers_at_etcd(&request, fate)
            }
            condition => {
                self.summary.etcd_faults += 1;
                self.fails_at_etcd(&request, condition, knows)
            }
        };
        self.summary.etcd_requests += 1;
        let Some(at) = host else { return };
        let way_us = self.up_to(self.plan.arbiter_us_max / 3);
        let ends_us = (sent_us + CALL_US).max(self.now_us);
        let hears_us = (self.now_us + way_us).max(sent_us + limit_us);
        let reply = if hears_us > ends_us { Reply::Lost(ErrorKind::TimedOut) } else { reply };
        let hears_us = hears_us.min(ends_us);
        let said = if request.path.ends_with("/range") {
            Said::Answer(request.server, reply)
        } else {
            Said::Posted(reply)
        };
        self.at(hears_us, Event::Etcd(Some(at), Turn::Hears(number, said)));
        // When it hurts: between a read and what it is read for.
        if !self.are_faults_over() && self.rng.random_ratio(1, 8) {
            self.etcd_member_fails(request.server);
        }
    }

    fn carries_out(&mut self, request: &Request) -> Reply {
        let compares = self.broken != Some(Broken::CompareIsIgnored);
        self.etcd.cluster.serves(request, compares)
    }

    /// What comes of a request at a member that is well, and which limit of the client's ends it.
    fn answers_at_etcd(&mut self, request: &Request, fate: Fate) -> (Reply, u64) {
        let lost = |run: &mut Self| {
            if run.rng.random_ratio(1, 2) {
                (Reply::Lost(ErrorKind::TimedOut), CALL_US)
            } else {
                (Reply::Lost(ErrorKind::ConnectionReset), 0)
            }
        };
        match fate {
            Fate::Well => (self.carries_out(request), 0),
            Fate::Refused => (Reply::Status(503, "etcdserver: leader changed"), 0),
            Fate::Lost => lost(self),
            Fate::Unheard => {
                let _ = self.carries_out(request);
                lost(self)
            }
            Fate::Late => {
                self.comes_later(request);
                lost(self)
            }
            Fate::Repeated => {
                let _ = self.carries_out(request);
                (self.carries_out(request), 0)
            }
            Fate::RepeatedLater => {
                self.comes_later(request);
                (self.carries_out(request), 0)
            }
            Fate::Malformed(how) => (self.carries_out(request).malformed(how), 0),
        }
    }

    fn comes_later(&mut self, request: &Request) {
        let later_us = self.up_to(3_000 * MS);
        self.after(later_us, Event::Etcd(None, Turn::Stray(request.clone())));
    }

    /// What comes of a request at a member that is not.
    fn fails_at_etcd(
        &mut self,
        request: &Request,
        condition: Condition,
        knows: Option<Place>,
    ) -> (Reply, u64) {
        let silent = (Reply::Lost(ErrorKind::TimedOut), CALL_US);
        let is_quick = self.rng.random_ratio(1, 2);
        match condition {
            Condition::Down if is_quick => (Reply::Lost(ErrorKind::ConnectionRefused), 0),
            Condition::Down => (Reply::Lost(ErrorKind::TimedOut), CONNECT_US),
            Condition::Alone if self.broken == Some(Broken::MemberDecidesAlone) => {
                (self.etcd.cluster.serves_alone(request), 0)
            }
            Condition::Alone if is_quick => (Reply::Status(503, "etcdserver: no leader"), 0),
            // Who knows nothing of the cluster could not tell.
            Condition::Another if knows.is_some() => {
                (self.etcd.cluster.serves_elsewhere(request), 0)
            }
            Condition::Restored(more) => {
                (self.etcd.cluster.serves_restored(request, more, knows), 0)
            }
            Condition::Silent | Condition::Alone | Condition::Another | Condition::Well => silent,
        }
    }

    fn etcd_fate(&mut self, host: Option<usize>) -> Fate {
        // An operation has two requests or more.
        let wrong = self.rng.random_ratio(self.plan.arbiter_wrong, 2000);
        let cut = host.is_some_and(|at| self.beside[at].arbiter_cut);
        if self.are_faults_over() || !(wrong || cut) {
            return Fate::Well;
        }
        match self.rng.random_range(0..8) {
            _ if cut && self.rng.random_ratio(3, 4) => Fate::Lost,
            0 | 1 => Fate::Late,
            _ if cut => Fate::Lost,
            2 => Fate::Unheard,
            3 => Fate::Refused,
            4 => Fate::Repeated,
            5 => Fate::RepeatedLater,
            6 => Fate::Malformed(self.rng.random_range(0..5)),
            _ => Fate::Lost,
        }
    }

    /// Members fail one by one, or two at a time.
    fn troubles_etcd(&mut self) {
        if self.are_faults_over() {
            return self.etcd.cluster.mends();
        }
        let member = self.rng.random_range(0..MEMBERS);
        self.etcd_member_fails(member);
        if self.rng.random_ratio(1, 4) {
            self.etcd_member_fails((member + 1) % MEMBERS);
        }
        let next_us = self.about(self.plan.fault_every_us);
        self.after(next_us, Event::Etcd(None, Turn::Trouble));
    }

    fn etcd_member_fails(&mut self, member: usize) {
        let condition = match self.rng.random_range(0..5) {
            0 => Condition::Down,
            1 => Condition::Silent,
            2 => Condition::Alone,
            3 => Condition::Another,
            _ => Condition::Restored(self.rng.random_range(0..4)),
        };
        self.etcd.cluster.becomes(member, condition);
        if self.rng.random_ratio(1, 3) {
            // It led.
            self.etcd.elected_us = self.now_us + self.up_to(1_500 * MS);
        }
        self.etcd.troubles += 1;
        self.etcd.trouble[member] = self.etcd.troubles;
        let long_us = self.about(1_000 * MS);
        self.after(long_us, Event::Etcd(None, Turn::Mends(member, self.etcd.troubles)));
    }
}
