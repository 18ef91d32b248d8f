use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn gate(lanes: usize) -> TxGate {
    TxGate::new(lanes, Limits::default())
}

fn push(gate: &TxGate, lane: usize, frame: &[u8]) {
    gate.push(lane, frame.to_vec()).expect("there is room");
}

/// What the worker of a lane would write.
fn drain(gate: &TxGate, lane: usize) -> Vec<Vec<u8>> {
    std::iter::from_fn(|| gate.next(lane)).collect()
}

fn counting_waker() -> (Waker, Arc<AtomicUsize>) {
    let count = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&count);
    let waker: Waker = Arc::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    (waker, count)
}

fn counter(gate: &TxGate, name: &str) -> u64 {
    gate.counters().into_iter().find(|(found, _)| *found == name).unwrap().1
}

#[test]
fn frames_leave_only_when_their_epoch_is_committed() {
    let gate = gate(2);
    push(&gate, 0, b"before");
    gate.hold();
    push(&gate, 0, b"one");
    push(&gate, 1, b"one too");
    gate.seal(1);
    gate.seal(1);
    push(&gate, 0, b"two");
    assert_eq!(drain(&gate, 0), [b"before"]);
    gate.seal(2);
    push(&gate, 0, b"three");
    gate.seal(5);
    push(&gate, 0, b"open");
    assert_eq!((gate.held_bytes(), gate.open_bytes()), (3 + 7 + 3 + 5 + 4, 4));
    gate.commit(0);
    assert!(drain(&gate, 0).is_empty());
    gate.commit(1);
    assert_eq!(gate.released_frames(), 2);
    assert_eq!(drain(&gate, 0), [b"one"]);
    assert_eq!(drain(&gate, 1), [b"one too"]);
    gate.commit(4);
    assert_eq!(drain(&gate, 0), [b"two"]);
    gate.pass();
    assert_eq!(drain(&gate, 0), [&b"three"[..], b"open"]);
    push(&gate, 0, b"free");
    assert_eq!(drain(&gate, 0), [b"free"]);
    assert_eq!((gate.held_bytes(), gate.open_bytes()), (0, 0));
    assert_eq!((counter(&gate, "tx_held_frames"), counter(&gate, "tx_held_bytes")), (5, 22));
}

#[test]
#[should_panic(expected = "sealed after epoch")]
fn epochs_do_not_descend() {
    let gate = gate(1);
    gate.hold();
    push(&gate, 0, b"a");
    gate.seal(2);
    push(&gate, 0, b"b");
    gate.seal(1);
}

#[test]
fn what_is_discarded_never_leaves() {
    let gate = gate(1);
    push(&gate, 0, b"committed");
    gate.hold();
    push(&gate, 0, b"sealed");
    gate.seal(1);
    push(&gate, 0, b"open");
    gate.discard();
    gate.discard();
    push(&gate, 0, b"late");
    gate.commit(9);
    gate.pass();
    gate.hold();
    push(&gate, 0, b"later");
    gate.seal(10);
    gate.commit(10);
    gate.pass();
    assert_eq!(drain(&gate, 0), [b"committed"]);
    assert_eq!((gate.held_bytes(), gate.released_frames()), (0, 0));
    assert_eq!(counter(&gate, "tx_discarded_frames"), 4);
    assert_eq!(counter(&gate, "tx_discarded_bytes"), 6 + 4 + 4 + 5);
}

#[test]
fn a_frame_that_the_tap_refused_is_the_next_again() {
    let gate = gate(1);
    push(&gate, 0, b"first");
    push(&gate, 0, b"second");
    gate.hold();
    push(&gate, 0, b"held");
    let frame = gate.next(0).unwrap();
    gate.give_back(0, frame);
    gate.discard();
    assert_eq!(drain(&gate, 0), [&b"first"[..], b"second"]);
}

#[test]
fn the_wakers_are_called_when_there_is_something_to_do() {
    let gate = gate(2);
    let (opened, opened_count) = counting_waker();
    let (first, first_count) = counting_waker();
    let (second, second_count) = counting_waker();
    gate.set_waker(opened);
    gate.set_lane_waker(0, first);
    gate.set_lane_waker(1, second);
    let counts =
        || [&opened_count, &first_count, &second_count].map(|count| count.load(Ordering::Relaxed));
    push(&gate, 0, b"pass");
    assert_eq!(counts(), [0, 0, 0]);
    gate.hold();
    push(&gate, 0, b"a");
    push(&gate, 1, b"b");
    assert_eq!(counts(), [1, 0, 0], "open output appeared once");
    gate.seal(1);
    push(&gate, 0, b"c");
    assert_eq!(counts(), [2, 0, 0]);
    gate.commit(1);
    assert_eq!(counts(), [2, 1, 1]);
    gate.seal(2);
    gate.commit(2);
    assert_eq!(counts(), [2, 2, 1], "only a lane with something new");
    gate.commit(3);
    assert_eq!(counts(), [2, 2, 1]);
    push(&gate, 1, b"d");
    gate.pass();
    assert_eq!(counts(), [3, 2, 2]);
}

#[test]
fn a_full_gate_refuses_and_resumes_at_half() {
    let limits = Limits { bytes: 2 * FRAME_BYTES_MAX, frames: 8 };
    let gate = TxGate::new(2, limits);
    let (waker, count) = counting_waker();
    gate.set_lane_waker(1, waker);
    gate.hold();
    for _ in 0..8 {
        push(&gate, 0, b"frame");
    }
    assert!(!gate.is_full());
    assert_eq!(gate.push(1, b"ninth".to_vec()), Err(b"ninth".to_vec()));
    assert_eq!((gate.is_full(), gate.held_bytes()), (true, 40));
    gate.seal(1);
    gate.commit(1);
    assert!(gate.is_full(), "released frames still wait for the tap");
    for _ in 0..3 {
        gate.next(0).unwrap();
    }
    assert_eq!((gate.is_full(), count.load(Ordering::Relaxed)), (true, 0));
    gate.next(0).unwrap();
    assert_eq!((gate.is_full(), count.load(Ordering::Relaxed)), (false, 1));
    assert_eq!(drain(&gate, 0).len(), 4);
    assert_eq!(count.load(Ordering::Relaxed), 1);
    // Bytes count as well as frames.
    push(&gate, 0, &vec![0; FRAME_BYTES_MAX]);
    push(&gate, 0, &vec![0; FRAME_BYTES_MAX]);
    assert!(gate.push(0, vec![0]).is_err());
    assert_eq!(counter(&gate, "tx_gate_full"), 2);
    gate.discard();
    assert!(!gate.is_full());
    assert_eq!(count.load(Ordering::Relaxed), 2);
}

#[test]
fn the_longest_wait_is_remembered() {
    let gate = gate(1);
    gate.hold();
    push(&gate, 0, b"a");
    thread::sleep(Duration::from_millis(5));
    gate.seal(1);
    gate.commit(1);
    let longest = counter(&gate, "tx_held_us_max");
    assert!(longest >= 5000, "{longest}");
    push(&gate, 0, b"b");
    gate.pass();
    assert!(counter(&gate, "tx_held_us_max") >= longest);
}

#[derive(Clone, Debug)]
enum Op {
    Push(usize, usize),
    Seal,
    Commit(u64),
    Hold,
    Pass,
    Discard,
    Next(usize),
    GiveBack(usize),
}

const LANES: usize = 3;
/// Small, so that the bounds are met.
const LIMITS: Limits = Limits { bytes: 2 * FRAME_BYTES_MAX, frames: 12 };

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0..LANES, prop_oneof![4 => 1usize..40, 1 => Just(FRAME_BYTES_MAX)])
            .prop_map(|(lane, len)| Op::Push(lane, len)),
        3 => Just(Op::Seal),
        3 => (0u64..3).prop_map(Op::Commit),
        2 => Just(Op::Hold),
        1 => Just(Op::Pass),
        1 => prop_oneof![9 => Just(Op::Seal), 1 => Just(Op::Discard)],
        5 => (0..LANES).prop_map(Op::Next),
        2 => (0..LANES).prop_map(Op::GiveBack),
    ]
}

/// A frame of the model: its number, its length, and its epoch (None: not sealed, 0: may leave).
type Modelled = (u64, usize, Option<u64>);

fn numbered(number: u64, len: usize) -> Vec<u8> {
    let mut frame = vec![0; len.max(8)];
    frame[..8].copy_from_slice(&number.to_le_bytes());
    frame
}

fn seal(model: &mut [Vec<Modelled>], epoch: u64) {
    for (_, _, tag) in model.iter_mut().flatten() {
        tag.get_or_insert(epoch);
    }
}

fn commit(model: &mut [Vec<Modelled>], upto: u64) {
    for (_, _, tag) in model.iter_mut().flatten() {
        if tag.is_some_and(|tag| tag <= upto) {
            *tag = Some(0);
        }
    }
}

proptest! {
    /// Against a list of frames and their epochs for each lane: what leaves is what the commits
    /// allow, in order; what stays is counted to the byte; what is refused had no room.
    #[test]
    fn any_order_of_calls_keeps_the_promise(ops in prop::collection::vec(op(), 0..120)) {
        let gate = TxGate::new(LANES, LIMITS);
        let mut model: [Vec<Modelled>; LANES] = Default::default();
        let (mut number, mut epoch, mut mode) = (0u64, 1u64, Mode::Pass);
        for op in ops {
            match op {
                Op::Push(lane, len) => {
                    number += 1;
                    let frame = numbered(number, len);
                    let len = frame.len();
                    let waiting: Vec<_> = model.iter().flatten().map(|(_, len, _)| *len).collect();
                    let fits = waiting.iter().sum::<usize>() + len <= LIMITS.bytes
                        && waiting.len() < LIMITS.frames;
                    let taken = gate.push(lane, frame).is_ok();
                    prop_assert_eq!(taken, fits || mode == Mode::Discarded);
                    if taken && mode != Mode::Discarded {
                        model[lane].push((number, len, (mode == Mode::Pass).then_some(0)));
                    }
                }
                Op::Seal => {
                    gate.seal(epoch);
                    seal(&mut model, epoch);
                    epoch += 1;
                }
                Op::Commit(back) => {
                    let upto = epoch.saturating_sub(back);
                    gate.commit(upto);
                    commit(&mut model, upto);
                }
                Op::Hold => {
                    gate.hold();
                    if mode == Mode::Pass { mode = Mode::Hold; }
                }
                Op::Pass => {
                    gate.pass();
                    if mode == Mode::Hold {
                        mode = Mode::Pass;
                        seal(&mut model, 0);
                        commit(&mut model, u64::MAX);
                    }
                }
                Op::Discard => {
                    gate.discard();
                    mode = Mode::Discarded;
                    for lane in &mut model {
                        lane.retain(|(_, _, tag)| *tag == Some(0));
                    }
                }
                Op::Next(lane) | Op::GiveBack(lane) => {
                    let expected = model[lane].first().filter(|(_, _, tag)| *tag == Some(0));
                    let expected = expected.map(|(number, len, _)| numbered(*number, *len));
                    let found = gate.next(lane);
                    prop_assert_eq!(&found, &expected);
                    match found {
                        Some(frame) if matches!(op, Op::GiveBack(_)) => gate.give_back(lane, frame),
                        Some(_) => drop(model[lane].remove(0)),
                        None => {}
                    }
                }
            }
            let held = |sealed: fn(&Option<u64>) -> bool| -> usize {
                let frames = model.iter().flatten().filter(|(_, _, tag)| sealed(tag));
                frames.map(|(_, len, _)| *len).sum()
            };
            prop_assert_eq!(gate.held_bytes(), held(|tag| *tag != Some(0)));
            prop_assert_eq!(gate.open_bytes(), held(Option::is_none));
            let free = model.iter().flatten().filter(|(_, _, tag)| *tag == Some(0)).count();
            prop_assert_eq!(gate.released_frames(), free);
        }
    }
}
