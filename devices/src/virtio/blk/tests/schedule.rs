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

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_calls_keeps_the_promises(steps in prop::collection::vec(step(), 0..120)) {
        let mut schedule = Schedule::new();
        let mut list: Vec<Model> = Vec::new();
        let (mut holding, mut discarded, mut epoch, mut next) = (false, false, 1, 0);
        for step in steps {
            match step {
                Step::Insert(owner, class, start, len) => {
                    let range = if class == Class::Flush { 0..0 } else { start..start + len };
                    let access = Access { class, range, data_bytes: len };
                    let output = class != Class::Read;
                    let epoch = match () {
                        () if discarded && output => Some(u64::MAX),
                        () if holding && output => None,
                        () => Some(0),
                    };
                    schedule.insert(owner, access.clone(), 4096, next);
                    list.push(Model { id: next, owner, access, epoch, running: None });
                    next += 1;
                }
                Step::Start => {
                    let expected = may_start(&list);
                    let started = schedule.start();
                    prop_assert_eq!(started.map(|(_, id)| id), expected.map(|at| list[at].id));
                    if let (Some(at), Some((ticket, _))) = (expected, started) {
                        list[at].running = Some(ticket);
                    }
                }
                Step::Finish(which) | Step::Again(which) => {
                    let running = list.iter().filter(|request| request.running.is_some());
                    let Some(id) = running.map(|request| request.id).nth(which) else { continue };
                    let at = list.iter().position(|request| request.id == id).unwrap();
                    let ticket = list[at].running.take().unwrap();
                    if let Step::Finish(_) = step {
                        schedule.finish(ticket);
                        list.remove(at);
                    } else {
                        schedule.again(ticket, id);
                        if discarded && list[at].access.class != Class::Read {
                            list[at].epoch = Some(u64::MAX);
                        }
                    }
                }
                Step::Abandon(owner) => {
                    schedule.abandon(owner);
                    list.retain(|request| request.owner != owner || request.running.is_some());
                }
                Step::Hold => { schedule.hold(); holding = !discarded; }
                Step::Seal => {
                    schedule.seal(epoch);
                    list.iter_mut().for_each(|request| { request.epoch.get_or_insert(epoch); });
                    epoch += 1;
                }
                Step::Commit(back) => {
                    let upto = epoch.saturating_sub(back);
                    schedule.commit(upto);
                    for request in &mut list {
                        if request.epoch.is_some_and(|epoch| epoch <= upto) {
                            request.epoch = Some(0);
                        }
                    }
                }
                Step::Pass => {
                    schedule.pass();
                    holding = false;
                    for request in &mut list {
                        if request.epoch != Some(u64::MAX) {
                            request.epoch = Some(0);
                        }
                    }
                }
                Step::Discard => {
                    schedule.discard();
                    (discarded, holding) = (true, false);
                    for request in &mut list {
                        if request.access.class != Class::Read && request.running.is_none() {
                            request.epoch = Some(u64::MAX);
                        }
                    }
                }
            }
            for owner in 0..2 {
                let expected = list.iter().filter(|request| request.owner == owner);
                let expected: Vec<_> = expected.map(|request| request.id).collect();
                prop_assert_eq!(schedule.of(owner).copied().collect::<Vec<_>>(), expected);
            }
            let settled = [Some(0), Some(u64::MAX)];
            let waiting = |request: &&Model| !settled.contains(&request.epoch);
            prop_assert_eq!(schedule.held().requests, list.iter().filter(waiting).count());
            prop_assert_eq!(
                schedule.open().requests,
                list.iter().filter(|request| request.epoch.is_none()).count()
            );
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
    let running: Vec<_> = std::iter::from_fn(|| schedule.start()).collect();
    assert_eq!(running.len() << 20, RUNNING_BYTES_MAX);
    schedule.finish(running[5].0);
    assert_eq!(schedule.start().unwrap().1, 32);
    assert!(schedule.start().is_none());
    // What does not fit at all runs alone.
    let mut schedule = Schedule::new();
    schedule.insert(0, read(0), RUNNING_BYTES_MAX + 1, 0);
    schedule.insert(0, read(1), 1, 1);
    let (first, _) = schedule.start().unwrap();
    assert!(schedule.start().is_none());
    schedule.finish(first);
    assert_eq!(schedule.start().unwrap().1, 1);
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
