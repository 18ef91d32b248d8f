//! One run: a seed, a clock that is ours, and whatever the seed makes happen.

mod backup_side;
mod call;
mod connection;
mod control;
mod engines;
mod etcd;
mod files;
mod primary_side;
mod trouble;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replication::VmId;
use replication::ids::{EpochId, Generation};
use replication::ownership::{HostId, HostIdentity, Known, Record, Standing};
use replication::primary::simulated::set_time;
use replication::protocol::backup::State as BackupState;
use replication::protocol::ownership::{self as claim};
use replication::protocol::primary::State as PrimaryState;
use uuid::Uuid;

use super::coverage::Coverage;
use super::host::{Backup, Host, Role};
use super::machine::{CLIENTS, Machine};
use super::oracle::Oracle;
use super::plan::{Kind, Plan};
use super::storage::{Client, Storage};
use crate::arbiter::{Arbiter, Fate};
use crate::broken::Broken;
use crate::ghost::Ghost;
use crate::host::{Around, Effect, primary};
use crate::vm::Vm;
use call::Call;
use connection::Item;
use control::Control;
use engines::Told;
use etcd::Etcd;

/// Positions of a history are counted in 16 bits.
const SEALS_MAX: u16 = 60_000;
const MS: u64 = 1000;
/// How long a guest may stand for room in its backup's staging when a run is to end.
const STAND_US: u64 = 3_000 * MS;
/// How long before a run's end a machine was protected, at the least.
const UNPROTECTED_US: u64 = 5_000 * MS;

const VM: VmId = VmId(Uuid::from_u128(0xace));

#[derive(Clone, Debug)]
enum Event {
    Arrives(usize, u64, Item),
    /// A host says that it lives, in this session.
    Beat(usize, u64),
    /// The thread of an engine gets to what is in its queue, or is due.
    Turn(usize, u64),
    /// A connection sends what is next.
    Sends(usize, u64, usize),
    /// The writer of a console writes.
    Prints(usize),
    Timer(usize, u64),
    Call(usize, u64),
    Answer(usize, u64, claim::Event),
    Stray(claim::Action),
    /// The arbiter's storage does what the client of this number asked.
    Storage(u64),
    PowerCut,
    /// A record's file gets its name long after its writer was told that it did not.
    LateLink(String, Vec<u8>),
    /// Between a host and the arbiter's cluster; of the host, if it is one's.
    Etcd(Option<usize>, etcd::Turn),
    Client(usize),
    Compute,
    Fault,
    /// A fault beside the others, when it hurts.
    Mishap,
    Heal(usize),
    ArbiterHeals(usize),
    Ask,
    /// A stop, beside the others.
    StopSoon(usize),
    LostSoon(usize),
    CrashSoon(usize),
    FailoverSoon(usize),
    LargeSoon(usize),
    GiveUpSoon(usize),
    ImageSoon(usize),
    Repair,
    Connect(usize),
    /// The new primary of a reversed pair calls its old host.
    Reach(usize, u64),
    /// It has waited for that long enough.
    Forsaken(usize, u64),
    /// Who called in this session has waited long enough for a sign of the backup.
    CallLate(usize, u64),
}

/// For the queue: the time, and the order in which events were made.
struct Entry(u64, u64, Event);

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// The way to one of the hosts.
#[derive(Clone, Debug, Default)]
struct Way {
    /// When the last item arrives, of the control connection and of the pages'.
    last_us: u64,
    data_us: [u64; 2],
    bell_us: u64,
    /// Nothing passes; what is sent waits.
    cut: bool,
    waiting: Vec<Item>,
    /// The connection broke: nothing arrives after this.
    dead_us: Option<u64>,
    /// This end is open; what arrives until then was read before it was closed.
    open: bool,
    grace_us: u64,
}

/// Beside the host itself.
#[derive(Debug, Default)]
struct Beside {
    process: u128,
    /// Grows with every process and engine: events of an older one are nothing.
    life: u64,
    asleep_us: u64,
    /// When the engine's thread has its next turn, if it has one.
    turn_us: Option<u64>,
    /// What the process knows of records.
    known: Known,
    /// For one broken rule: the last look at the record counts as a won swap.
    misreads: bool,
    calls: VecDeque<(u64, claim::Action)>,
    calling: bool,
    arbiter_cut: bool,
    /// Connections that are about to send.
    sends: [bool; 2],
    /// A bit of what comes next on a data connection is turned over.
    garbles: bool,
    /// Nothing is mounted where the arbiter's directory is to be.
    is_unmounted: bool,
    /// A primary's end of the control connection.
    control: Option<Control>,
    /// The call that waits for the backup's word.
    call: Option<Call>,
    /// A session that its primary has left, at a backup that has not noticed.
    older: Option<u64>,
    /// A backup's engine is about to hear of something for which it gives up what it has.
    gives_up: bool,
    /// For two broken rules: seals that are not acknowledged, and the last that was before its time.
    seals: VecDeque<(EpochId, Generation)>,
    early: Option<EpochId>,
}

/// What a run came to.
#[derive(Debug, Default)]
pub struct Summary {
    pub coverage: Coverage,
    pub events: u64,
    pub commits: u64,
    pub responses: u64,
    pub lines: u64,
    pub takeovers: u64,
    /// Sessions that went on from what a backup had kept.
    pub bases: u64,
    /// Calls that a backup refused.
    pub refused: u64,
    /// Bits that were turned over on their way.
    pub garbled: u64,
    /// Calls of the arbiter's storage, those that went wrong, and records that a power cut took.
    pub storage_calls: u64,
    pub storage_faults: u64,
    pub records_lost: u64,
    /// Requests that the arbiter's cluster got, and those that went wrong.
    pub etcd_requests: u64,
    pub etcd_faults: u64,
    /// Of pages, with what is around them.
    pub wire_bytes: u64,
    pub failure: Option<String>,
    pub trace: Vec<String>,
    /// Of all that happened, in its order.
    pub hash: u64,
}

pub struct Run {
    rng: StdRng,
    plan: Plan,
    broken: Option<Broken>,
    now_us: u64,
    queue: BinaryHeap<Reverse<Entry>>,
    made: u64,
    hosts: [Host; 2],
    beside: [Beside; 2],
    ways: [Way; 2],
    session: u64,
    /// When an epoch was acknowledged last.
    committed_us: u64,
    arbiter: Arbiter,
    /// Of the `file:` arbiter, and the clients that are at it.
    storage: Storage,
    clients: BTreeMap<u64, Client>,
    clients_made: u64,
    etcd: Etcd,
    ghost: Ghost,
    oracle: Oracle,
    summary: Summary,
    tracing: bool,
}

/// Runs a seed.
#[must_use]
pub fn run(seed: u64, broken: Option<Broken>, tracing: bool) -> Summary {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut plan = Plan::draw(&mut rng);
    if let Some(broken) = broken {
        plan.arbiter = broken != Broken::OrphanStarts;
        plan.kind = match broken {
            _ if Broken::OF_FILES.contains(&broken) => Kind::Files,
            _ if Broken::OF_ETCD.contains(&broken) => Kind::Etcd,
            _ => plan.kind,
        };
        plan.reverses |=
            matches!(broken, Broken::HeirStartsWithoutSwap | Broken::SpeaksBeforeReached);
    }
    let mut run = Run {
        hosts: [
            Host::running(identity(1), Machine::new()),
            Host::listening(identity(2), &plan, broken),
        ],
        rng,
        plan,
        broken,
        now_us: 0,
        queue: BinaryHeap::new(),
        made: 0,
        beside: [Beside::default(), Beside::default()],
        ways: [Way::default(), Way::default()],
        session: 0,
        committed_us: 0,
        arbiter: Arbiter::default(),
        storage: Storage::default(),
        clients: BTreeMap::new(),
        clients_made: 0,
        etcd: Etcd::default(),
        ghost: Ghost::default(),
        oracle: Oracle::default(),
        summary: Summary::default(),
        tracing,
    };
    (run.beside[0].process, run.beside[1].process) = (1, 2);
    let ended = run.whole();
    run.summary.failure = ended.err();
    run.summary.commits = run.oracle.commits;
    run.summary.responses = run.oracle.responses;
    run.summary.lines = run.oracle.lines;
    run.summary.takeovers = run.ghost.started.len() as u64;
    run.summary
}

fn identity(process: u128) -> HostIdentity {
    HostIdentity { host: HostId(Uuid::from_u128(process)), vm: VM }
}

/// FNV-1a: tells two runs of a seed apart.
fn mix(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

impl Run {
    fn whole(&mut self) -> Result<(), String> {
        set_time(Duration::ZERO);
        self.connect(0)?;
        for client in 0..CLIENTS {
            self.after(MS, Event::Client(client));
        }
        self.after(MS, Event::Compute);
        self.after(MS, Event::Prints(0));
        self.after(MS, Event::Prints(1));
        self.after(self.plan.fault_every_us, Event::Fault);
        self.after(self.plan.ask_every_us, Event::Ask);
        self.after(500 * MS, Event::Repair);
        while let Some(Reverse(Entry(at_us, made, event))) = self.queue.pop() {
            if at_us > self.plan.end_us && (self.goes_on() || at_us > self.plan.end_us + STAND_US) {
                break;
            }
            self.now_us = at_us;
            set_time(Duration::from_micros(at_us));
            if let Some(host) = of(&event)
                && self.beside[host].asleep_us > at_us
            {
                let wakes_us = self.beside[host].asleep_us;
                // In the order in which they were made, however often it falls asleep again.
                self.queue.push(Reverse(Entry(wakes_us, made, event)));
                continue;
            }
            self.summary.events += 1;
            if self.tracing {
                self.note(&event);
            }
            self.happens(event)?;
            self.holds()?;
        }
        if !self.goes_on() {
            return Err("nobody goes on after faults have stopped".into());
        }
        if self.plan.arbiter && self.is_unprotected() {
            return Err("a machine is not protected again after faults have stopped".into());
        }
        Ok(())
    }

    /// Whether a machine runs, and nothing of it was acknowledged for long. Without an arbiter that may be as
    /// it should: a person is to decide first. So may it where storage has lost a record which somebody had
    /// seen: what is older is no answer.
    fn is_unprotected(&self) -> bool {
        let runs = self.hosts.iter().any(|host| host.vm.is_some());
        runs && self.summary.records_lost == 0
            && !self.ghost.is_start_lost
            && self.now_us - self.committed_us > UNPROTECTED_US
    }

    fn note(&mut self, event: &Event) {
        let line = format!("{:>9} {event:?}", self.now_us);
        self.summary.hash = mix(self.summary.hash, line.as_bytes());
        self.summary.trace.push(line);
    }

    fn at(&mut self, at_us: u64, event: Event) {
        self.made += 1;
        self.queue.push(Reverse(Entry(at_us, self.made, event)));
    }

    fn after(&mut self, us: u64, event: Event) {
        self.at(self.now_us + us, event);
    }

    /// Half of it to half more.
    fn about(&mut self, us: u64) -> u64 {
        self.rng.random_range(us / 2..=us + us / 2)
    }

    fn up_to(&mut self, us: u64) -> u64 {
        self.rng.random_range(0..=us)
    }

    fn are_faults_over(&self) -> bool {
        self.now_us >= self.plan.faults_end_us
    }

    /// What must hold after every event.
    fn holds(&self) -> Result<(), String> {
        let ghost = &self.ghost;
        let free = self.hosts.iter().filter(|host| host.is_free()).count();
        let lost =
            if self.plan.arbiter { !ghost.is_nothing_lost() } else { !ghost.is_promise_kept() };
        let rules = [
            (free <= 1 && ghost.is_continued_once(), "two hosts own the machine"),
            (!self.plan.arbiter || ghost.has_one_speaker(), "two hosts spoke under a generation"),
            (!lost, "released output is not in the state that goes on"),
            (ghost.is_said_once(), "what was handed over was said twice"),
            (ghost.is_acknowledged(), "a take-over did not start from the last acknowledged epoch"),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, what)) => Err(what.to_owned()),
            None => Ok(()),
        }
    }

    fn happens(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Arrives(to, session, item) => self.arrives(to, session, item),
            Event::Beat(at, session) => {
                self.beat(at, session);
                Ok(())
            }
            Event::Turn(at, life) if self.is_current(at, life) => self.turns(at),
            Event::Sends(at, life, connection) if self.is_current(at, life) => {
                self.sends(at, connection)
            }
            Event::Prints(at) => {
                self.prints(at)?;
                let next_us = self.about(5 * MS);
                self.after(next_us, Event::Prints(at));
                Ok(())
            }
            Event::Timer(at, life) if self.is_current(at, life) => {
                self.tell_caller(at, primary::Input::Timer)
            }
            Event::Call(at, life) if self.is_current(at, life) => {
                self.calls(at);
                Ok(())
            }
            Event::Answer(at, life, event) if self.is_current(at, life) => self.answers(at, event),
            Event::Turn(..)
            | Event::Sends(..)
            | Event::Timer(..)
            | Event::Call(..)
            | Event::Answer(..) => Ok(()),
            Event::Stray(action) => {
                self.arbiter.call(&action, Fate::Well);
                Ok(())
            }
            Event::Storage(number) => {
                self.storage(number);
                Ok(())
            }
            Event::PowerCut => {
                self.power_cut();
                Ok(())
            }
            Event::LateLink(to, bytes) => {
                self.late_link(&to, bytes);
                Ok(())
            }
            Event::Etcd(_, turn) => {
                self.etcd(turn);
                Ok(())
            }
            Event::Client(client) => self.client(client),
            Event::Compute => self.compute(),
            Event::Fault => self.fault(),
            Event::Mishap => self.mishap(),
            Event::StopSoon(at) => self.stop(at),
            Event::LostSoon(at) => self.tell(at, Told::Lost),
            Event::FailoverSoon(at) => self.fail_over(at),
            Event::LargeSoon(at) => {
                self.floods(at);
                Ok(())
            }
            Event::ImageSoon(at) => {
                self.image_fails(at);
                Ok(())
            }
            Event::GiveUpSoon(at) => self.gives_up(at),
            Event::CrashSoon(at) => {
                self.crash(at);
                Ok(())
            }
            Event::Heal(to) => {
                self.heal(to);
                Ok(())
            }
            Event::ArbiterHeals(at) => {
                self.beside[at].arbiter_cut = false;
                self.beside[at].is_unmounted = false;
                Ok(())
            }
            Event::Ask => self.ask(),
            Event::Repair => self.repair(),
            Event::Connect(at) => self.connect(at),
            Event::Reach(at, life) if self.is_current(at, life) => self.reach(at),
            Event::Forsaken(at, life) if self.is_current(at, life) => self.forsaken(at),
            Event::Reach(..) | Event::Forsaken(..) => Ok(()),
            Event::CallLate(at, session) => {
                self.call_late(at, session);
                Ok(())
            }
        }
    }

    /// The record that stands.
    fn record(&self) -> Option<Record> {
        match self.plan.kind {
            Kind::Any => self.arbiter.standing(),
            Kind::Files => self.storage.standing(),
            Kind::Etcd => self.etcd.cluster.standing(),
        }
    }

    fn generation(&self) -> Generation {
        self.record().map_or(Generation(0), |record| record.generation)
    }

    fn is_current(&self, at: usize, life: u64) -> bool {
        self.beside[at].life == life
    }

    fn goes_on(&self) -> bool {
        let runs = |at: usize| {
            let Some(vm) = &self.hosts[at].vm else { return false };
            let protected = self.hosts[at].primary().is_some_and(|primary| {
                primary.machine().state() == PrimaryState::Protected && primary.is_connected()
            });
            !vm.stands() && (vm.is_free() || protected)
        };
        if runs(0) || runs(1) || self.ghost.is_start_lost {
            return true;
        }
        let undecided = |host: &Host| {
            let primary = host.primary().map(|primary| primary.machine().state());
            let backup = host.backup().map(Backup::state);
            primary == Some(PrimaryState::Undecided) || backup == Some(BackupState::Orphan)
        };
        if !self.plan.arbiter {
            // Only a person knows; or the only one who had it is dead.
            return self.hosts.iter().any(undecided) || self.hosts.iter().all(|h| h.vm.is_none());
        }
        let alive = |owner: HostId| self.hosts.iter().any(|h| h.alive && h.identity.host == owner);
        match self.record().map(|record| record.standing) {
            Some(Standing::Solo { owner }) => !alive(owner),
            Some(Standing::Pair { primary, .. }) => !alive(primary) && self.ghost.owes.is_none(),
            None => self.hosts.iter().all(|host| host.vm.is_none()),
        }
    }
}

/// Whose event it is.
fn of(event: &Event) -> Option<usize> {
    match event {
        Event::Arrives(at, ..)
        | Event::Beat(at, _)
        | Event::Turn(at, _)
        | Event::Sends(at, ..)
        | Event::Prints(at)
        | Event::Timer(at, _)
        | Event::Answer(at, ..)
        | Event::Reach(at, _)
        | Event::Forsaken(at, _)
        | Event::CallLate(at, _)
        | Event::Connect(at) => Some(*at),
        Event::Etcd(at, _) => *at,
        Event::Call(..)
        | Event::Stray(_)
        | Event::Storage(_)
        | Event::LateLink(..)
        | Event::PowerCut
        | Event::Client(_)
        | Event::Compute
        | Event::Fault
        | Event::Mishap
        | Event::StopSoon(_)
        | Event::LostSoon(_)
        | Event::CrashSoon(_)
        | Event::FailoverSoon(_)
        | Event::LargeSoon(_)
        | Event::GiveUpSoon(_)
        | Event::ImageSoon(_)
        | Event::Heal(_)
        | Event::ArbiterHeals(_)
        | Event::Ask
        | Event::Repair => None,
    }
}
