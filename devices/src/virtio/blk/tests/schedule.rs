//! The schedule against a plain list.

use proptest::prelude::*;

use super::super::schedule::{Access, Class, RUNNING_BYTES_MAX, Schedule, Ticket};

#[derive(Clone, Debug)]
enum Step {
    Insert(u64, Class, u64, u64),
    Start,
    Finish(usize),
    Again(usize),
    Abandon(u64),
    Hold,
    Seal,
    Commit(u64),
    Pass,
    Discard,
}

fn step() -> impl Strategy<Value = Step> {
    let class = prop::sample::select(vec![Class::Read, Class::Change, Class::Change, Class::Flush]);
    prop_oneof![
        8 => (0u64..2, class, 0u64..12, 1u64..5)
            .prop_map(|(owner, class, start, len)| Step::Insert(owner, class, start, len)),
        8 => Just(Step::Start),
        6 => (0usize..8).prop_map(Step::Finish),
        1 => (0usize..8).prop_map(Step::Again),
        1 => (0u64..2).prop_map(Step::Abandon),
        1 => Just(Step::Hold),
        2 => Just(Step::Seal),
        2 => (0u64..3).prop_map(Step::Commit),
        1 => Just(Step::Pass),
        1 => Just(Step::Discard),
    ]
}

/// A request of the model: what may start is found by looking at all before it.
#[derive(Clone, Debug)]
struct Model {
    id: usize,
    owner: u64,
    access: Access,
    /// None: not sealed; 0: may go; MAX: never.
    epoch: Option<u64>,
    running: Option<Ticket>,
}

impl Model {
    fn is_output(&self) -> bool {
        self.access.class != Class::Read
    }
}

fn conflict(one: &Access, other: &Access) -> bool {
    let touch = one.range.clone().any(|at| other.range.contains(&at));
    touch && [one.class, other.class].contains(&Class::Change)
}

fn may_start(list: &[Model]) -> Option<usize> {
    list.iter().enumerate().position(|(at, request)| {
        request.running.is_none()
            && request.epoch == Some(0)
            && !list[..at].iter().any(|before| conflict(&before.access, &request.access))
    })
}

/// The schedule, and what it should be.
struct Both {
    schedule: Schedule<usize>,
    list: Vec<Model>,
    holding: bool,
    discarded: bool,
    epoch: u64,
    next: usize,
}

impl Both {
    fn new() -> Self {
        let (schedule, list) = (Schedule::new(), Vec::new());
        Self { schedule, list, holding: false, discarded: false, epoch: 1, next: 0 }
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Insert(owner, class, start, len) => self.insert(owner, class, start, len),
            Step::Start => self.start(),
            Step::Finish(which) => self.end(which, true),
            Step::Again(which) => self.end(which, false),
            Step::Abandon(owner) => {
                self.schedule.abandon(owner);
                self.list.retain(|request| request.owner != owner || request.running.is_some());
            }
            Step::Hold => {
                self.schedule.hold();
                self.holding = !self.discarded;
            }
            Step::Seal => {
                self.schedule.seal(self.epoch);
                for request in &mut self.list {
                    request.epoch.get_or_insert(self.epoch);
                }
                self.epoch += 1;
            }
            Step::Commit(back) => {
                let upto = self.epoch.saturating_sub(back);
                self.schedule.commit(upto);
                self.tag(0, |request| request.epoch.is_some_and(|epoch| epoch <= upto));
            }
            Step::Pass => {
                self.schedule.pass();
                self.holding = false;
                self.tag(0, |request| request.epoch != Some(u64::MAX));
            }
            Step::Discard => {
                self.schedule.discard();
                (self.discarded, self.holding) = (true, false);
                self.tag(u64::MAX, |request| request.is_output() && request.running.is_none());
            }
        }
    }

    fn tag(&mut self, epoch: u64, which: impl Fn(&Model) -> bool) {
        for request in self.list.iter_mut().filter(|request| which(request)) {
            request.epoch = Some(epoch);
        }
    }

    fn insert(&mut self, owner: u64, class: Class, start: u64, len: u64) {
        let range = if class == Class::Flush { 0..0 } else { start..start + len };
        let access = Access { class, range, data_bytes: len };
        let id = self.next;
        self.next += 1;
        self.schedule.insert(owner, access.clone(), 4096, id);
        let mut request = Model { id, owner, access, epoch: Some(0), running: None };
        if request.is_output() && self.discarded {
            request.epoch = Some(u64::MAX);
        } else if request.is_output() && self.holding {
            request.epoch = None;
        }
        self.list.push(request);
    }

    fn start(&mut self) {
        let expected = may_start(&self.list);
        let started = self.schedule.start(true);
        assert_eq!(started.map(|(_, id)| id), expected.map(|at| self.list[at].id));
        if let (Some(at), Some((ticket, _))) = (expected, started) {
            self.list[at].running = Some(ticket);
        }
    }

    /// The end of a running request, or of a piece of it.
    fn end(&mut self, which: usize, whole: bool) {
        let running = self.list.iter_mut().enumerate();
        let mut running = running.filter(|(_, request)| request.running.is_some());
        let Some((at, request)) = running.nth(which) else { return };
        let ticket = request.running.take().unwrap();
        if whole {
            self.schedule.finish(ticket);
            self.list.remove(at);
            return;
        }
        self.schedule.again(ticket, request.id);
        if self.discarded && request.is_output() {
            request.epoch = Some(u64::MAX);
        }
    }

    fn check(&self) {
        for owner in 0..2 {
            let expected = self.list.iter().filter(|request| request.owner == owner);
            let expected: Vec<_> = expected.map(|request| request.id).collect();
            assert_eq!(self.schedule.of(owner).copied().collect::<Vec<_>>(), expected);
        }
        let settled = [Some(0), Some(u64::MAX)];
        let waiting = self.list.iter().filter(|request| !settled.contains(&request.epoch));
        assert_eq!(self.schedule.held().requests, waiting.count());
        let open = self.list.iter().filter(|request| request.epoch.is_none());
        assert_eq!(self.schedule.open().requests, open.count());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_calls_keeps_the_promises(steps in prop::collection::vec(step(), 0..120)) {
        let mut both = Both::new();
        for step in &steps {
            both.apply(step);
            both.check();
        }
    }
}

#[test]
fn running_buffers_are_bounded() {
    let mut schedule = Schedule::new();
    let read = |at: u64| Access { class: Class::Read, range: at..at + 1, data_bytes: 1 };
    for at in 0..40 {
        schedule.insert(0, read(at), 1 << 20, at);
    }
    let running: Vec<_> = std::iter::from_fn(|| schedule.start(true)).collect();
    assert_eq!(running.len() << 20, RUNNING_BYTES_MAX);
    schedule.finish(running[5].0);
    assert_eq!(schedule.start(true).unwrap().1, 32);
    assert!(schedule.start(true).is_none());
    // What does not fit at all runs alone.
    let mut schedule = Schedule::new();
    schedule.insert(0, read(0), RUNNING_BYTES_MAX + 1, 0);
    schedule.insert(0, read(1), 1, 1);
    let (first, _) = schedule.start(true).unwrap();
    assert!(schedule.start(true).is_none());
    schedule.finish(first);
    assert_eq!(schedule.start(true).unwrap().1, 1);
}

#[test]
#[should_panic(expected = "sealed after epoch")]
fn epochs_do_not_descend() {
    let mut schedule = Schedule::new();
    schedule.hold();
    schedule.insert(0, Access { class: Class::Flush, range: 0..0, data_bytes: 0 }, 1, ());
    schedule.seal(2);
    schedule.seal(1);
}

/// Each of thousands of reads behind a change is looked at once when that ends, however many a guest
/// queues: the schedule's lock is held meanwhile, and an epoch's pause waits for it.
#[test]
fn the_end_of_a_change_looks_at_what_lies_before_it_only() {
    const READS: u64 = 2000;
    let access = |class| Access { class, range: 0..512, data_bytes: 512 };
    let mut schedule = Schedule::new();
    let (change, _) = schedule.insert(0, access(Class::Change), 512, ());
    assert_eq!(schedule.start(true).map(|(ticket, ())| ticket), Some(change));
    for _ in 0..READS {
        schedule.insert(0, access(Class::Read), 0, ());
    }
    let before = schedule.looked_at();
    schedule.finish(change);
    assert!(schedule.looked_at() - before <= READS, "{}", schedule.looked_at() - before);
    let started = std::iter::from_fn(|| schedule.start(true)).count();
    assert_eq!(u64::try_from(started).unwrap(), READS);
}
