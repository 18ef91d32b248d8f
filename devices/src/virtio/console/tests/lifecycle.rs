//! Activating, parking, saving, restoring.

use std::fs;

use super::*;
use crate::output_gate::GATE_BYTES_MAX;

#[test]
fn a_console_is_what_the_specification_says() {
    let bench = Bench::idle();
    let console = &bench.console;
    assert_eq!((console.id(), console.device_type()), ("__console", DeviceType::Console));
    assert_eq!(console.queue_sizes(), [256, 256]);
    assert_eq!(console.features(), 1 | 1 << 29);
    console.shared.size.store(80 << 16 | 25, Ordering::SeqCst);
    let mut config = [0xff; 12];
    console.read_config(0, &mut config);
    assert_eq!(config, [80, 0, 25, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    console.write_config(0, &[0xff; 12]);
    console.read_config(2, &mut config[..2]);
    assert_eq!(config[..2], [25, 0]);
    for far in [4, 4096, u64::MAX] {
        console.read_config(far, &mut config);
        assert_eq!(config, [0; 12]);
    }
    console.attach().unwrap();
}

#[test]
fn a_console_without_a_terminal_has_no_size_and_tells_none() {
    let bench = Bench::idle();
    bench.console.shared.size.store(1, Ordering::SeqCst);
    bench.activate(SIZE);
    settle();
    let mut config = [0xff; 4];
    bench.console.read_config(0, &mut config);
    assert_eq!(config, [0; 4]);
    assert_eq!(bench.heard.config.load(Ordering::SeqCst), 0);
}

#[test]
fn a_driver_hears_of_the_size_if_it_looks_at_it() {
    for (features, times) in [(SIZE, 1), (0, 0)] {
        let bench = Bench::idle();
        bench.console.park();
        bench.activate(features);
        bench.console.shared.size.store(80 << 16 | 25, Ordering::SeqCst);
        settle();
        assert_eq!(bench.heard.config.load(Ordering::SeqCst), 0, "parked");
        bench.console.unpark();
        settle();
        let heard = &bench.heard.config;
        wait_for("the size is told", || heard.load(Ordering::SeqCst) >= times);
        bench.console.park();
        bench.console.unpark();
        settle();
        assert_eq!(heard.load(Ordering::SeqCst), times, "told once");
    }
}

#[test]
fn a_driver_without_a_transmit_queue_is_refused() {
    let bench = Bench::idle();
    let mut activation = bench.activation(0);
    activation.queues.remove(1);
    let refused = bench.console.activate(activation);
    assert!(matches!(refused, Err(ActivateError::Queues { found: 1, needed: 2 })));
    // One without a receive queue is not.
    let mut activation = bench.activation(0);
    activation.queues.remove(0);
    bench.console.activate(activation).unwrap();
}

#[test]
fn threads_are_named_and_end_with_the_device() {
    let bench = Bench::idle();
    let names = || -> Vec<String> {
        let tasks = fs::read_dir("/proc/self/task").unwrap();
        let names =
            tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
        names.map(|name| name.trim().to_owned()).collect()
    };
    wait_for("the threads", || {
        let all = ["__console", "console-in", "console-out"];
        all.iter().all(|name| names().iter().any(|found| found == name))
    });
    // Parked and all: it ends.
    bench.activate(0);
    bench.console.park();
    drop(bench);
}

#[test]
fn a_pty_carries_bytes_both_ways() {
    let mut bench = Bench::idle();
    bench.console = Console::open("__console", &PortMode::Pty).unwrap();
    bench.activate(0);
    let path = bench.console.pty_path().unwrap().to_owned();
    let mut terminal = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    bench.print(b"login: ");
    let mut heard = [0; 7];
    terminal.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"login: ");
    bench.offer(0, 16);
    terminal.write_all(b"root\n").unwrap();
    assert_eq!(bench.receive.wait_used(1), [(0, 5)]);
    assert_eq!(bench.input(0, 5), b"root\n");
}

#[test]
fn a_parked_console_touches_nothing() {
    let mut bench = Bench::new();
    bench.offer(0, 16);
    settle();
    bench.console.park();
    let before = (bench.console.save(), bench.console.queue_positions());
    bench.say(b"typed");
    bench.print(b"printed");
    settle();
    assert_eq!((bench.console.save(), bench.console.queue_positions()), before);
    assert_eq!((bench.receive.take_used(), bench.transmit.take_used()), (vec![], vec![]));
    assert_eq!(bench.input(0, 5), [b'?', 0, 0, 0, 0], "what was there");
    bench.console.unpark();
    assert_eq!(bench.receive.wait_used(1), [(0, 5)]);
    assert_eq!(bench.input(0, 5), b"typed");
    assert_eq!(bench.hear(7), b"printed");
}

#[test]
fn an_idle_console_dirties_no_page_from_epoch_to_epoch() {
    for features in [EVENT_IDX, 0] {
        let mut bench = Bench::idle();
        bench.activate(features);
        bench.print(b"x");
        bench.transmit.wait_used(1);
        settle();
        let rings = bench.bytes(0, 0x10_0000);
        bench.memory.write_slice(&[0x5a; 0x10_0000], GuestAddress(0)).unwrap();
        for _ in 0..5 {
            bench.console.park();
            bench.console.unpark();
            settle();
        }
        let seen = bench.bytes(0, 0x10_0000);
        assert!(seen.iter().all(|byte| *byte == 0x5a));
        bench.memory.write_slice(&rings, GuestAddress(0)).unwrap();
        bench.print(b"y");
        bench.transmit.wait_used(1);
    }
}

/// Carries the guest of `primary` over: memory, rings, and what the transport saves of them.
fn take_over(primary: &mut Bench, state: &DeviceState) -> Bench {
    let mut backup = Bench::idle();
    backup.console.park();
    let positions = primary.console.queue_positions();
    backup.console.restore(state).unwrap();
    assert_eq!(state_of(&backup.console).taken_bytes, state_of(&primary.console).taken_bytes);
    backup.memory = Arc::clone(&primary.memory);
    std::mem::swap(&mut backup.receive, &mut primary.receive);
    std::mem::swap(&mut backup.transmit, &mut primary.transmit);
    let mut activation = backup.activation(0);
    for (queue, position) in activation.queues.iter_mut().zip(&positions) {
        assert_eq!(queue.index, position.index);
        queue.queue.set_next_avail(position.next_avail);
        queue.queue.set_next_used(position.next_used);
    }
    backup.console.activate(activation).unwrap();
    assert_eq!(backup.console.queue_positions(), positions);
    backup.console.unpark();
    backup
}

#[test]
fn a_take_over_writes_what_the_primary_may_not_have_written_and_goes_on() {
    let mut primary = Bench::new();
    primary.console.gate().hold();
    primary.print(b"1");
    primary.transmit.wait_used(1);
    primary.console.gate().seal(1);
    primary.print(b"2");
    primary.transmit.wait_used(1);
    primary.console.park();
    primary.print(b"3");
    let state = primary.console.save();
    assert_eq!(state_of(&primary.console).pending_output, b"12");
    // From here on the primary is dead. Its client has heard nothing.
    primary.hears_nothing();
    let mut backup = take_over(&mut primary, &state);
    backup.transmit.wait_used(1);
    backup.say(b"!");
    backup.offer(0, 8);
    backup.receive.wait_used(1);
    assert_eq!(backup.input(0, 1), b"!");
    // The client may have come too late for it: then it is counted.
    assert_eq!(backup.counter("output_bytes"), 3);
    backup.print(b"4");
    let mut heard = Vec::new();
    while !heard.ends_with(b"4") {
        heard.extend(backup.hear(1));
    }
    assert!(b"1234".ends_with(&heard), "{heard:?}");
}

#[test]
fn what_the_backup_writes_is_in_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let console = Console::open("__console", &PortMode::File(path.clone())).unwrap();
    console.park();
    let state = ConsoleState { taken_bytes: 0, pending_output: b"held ".to_vec() };
    console.restore(&DeviceState::Console(state)).unwrap();
    let mut bench = Bench::idle();
    bench.console = console;
    bench.print(b"and after");
    bench.activate(0);
    bench.console.unpark();
    bench.transmit.wait_used(1);
    bench.console.finish();
    assert_eq!(fs::read(&path).unwrap(), b"held and after");
}

/// The primary dies with half of a long chain in its gate.
#[test]
fn a_chain_that_was_taken_in_part_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let text = pattern(0x30_0000);
    let mut primary = Bench::new();
    primary.memory.write_slice(&text, GuestAddress(BUFFERS)).unwrap();
    primary.console.gate().hold();
    primary.transmit.add(&[(BUFFERS, 0x30_0000, 0)]);
    primary.transmit.kick();
    let gate = Arc::clone(primary.console.gate());
    wait_for("the gate is throttled", || gate.throttled());
    settle();
    primary.console.park();
    let state = primary.console.save();
    let ConsoleState { taken_bytes, pending_output } = state_of(&primary.console);
    assert_eq!((taken_bytes, pending_output.len()), (1 << 20, 1 << 20));
    let mut backup = Bench::idle();
    backup.console = Console::open("__console", &PortMode::File(path.clone())).unwrap();
    backup.console.park();
    backup.console.restore(&state).unwrap();
    assert_eq!(state_of(&backup.console).taken_bytes, taken_bytes);
    backup.memory = Arc::clone(&primary.memory);
    std::mem::swap(&mut backup.transmit, &mut primary.transmit);
    backup.activate(0);
    backup.console.unpark();
    assert_eq!(backup.transmit.wait_used(1), [(0, 0)]);
    backup.console.finish();
    assert!(fs::read(&path).unwrap() == text);
    // A reset forgets what was taken.
    backup.console.reset();
    backup.console.restore(&state).unwrap();
    backup.console.reset();
    assert_eq!(state_of(&backup.console).taken_bytes, 0);
}

#[test]
fn a_state_that_is_not_the_device_s_is_refused() {
    let bench = Bench::idle();
    let unusable = |state: ConsoleState| {
        let refused = bench.console.restore(&DeviceState::Console(state));
        assert!(matches!(refused, Err(StateError::Unusable(_))), "{refused:?}");
    };
    let pending_output = vec![0; GATE_BYTES_MAX + 1];
    unusable(ConsoleState { pending_output, ..ConsoleState::default() });
    assert_eq!(bench.console.restore(&DeviceState::Stateless), Err(StateError::Kind));
    let odd = ConsoleState { taken_bytes: u64::MAX, pending_output: vec![] };
    bench.console.restore(&DeviceState::Console(odd)).unwrap();
    bench.activate(0);
    unusable(ConsoleState::default());
}

#[test]
fn a_state_survives_both_encodings() {
    let pending_output = b"out".to_vec();
    let state = DeviceState::Console(ConsoleState { taken_bytes: 7, pending_output });
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<DeviceState>(&json).unwrap(), state);
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<DeviceState>(&bytes).unwrap(), state);
}
