//! The device without its host side.

use std::sync::Arc;

use super::*;
use crate::output_gate::{GATE_BYTES_MAX, THROTTLE_BYTES};

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const SCR: u64 = 7;

const IER_RX: u8 = 1;
const IIR_NONE: u8 = 1;
const IIR_THR_EMPTY: u8 = 2;
const IIR_RX: u8 = 4;
const LSR_DATA: u8 = 1;

fn serial() -> Arc<Serial> {
    Serial::new(IrqLine::new().unwrap(), Arc::new(OutputGate::new())).unwrap()
}

fn get(serial: &Serial, register: u64) -> u8 {
    let mut data = [0];
    serial.read(register, &mut data);
    data[0]
}

fn put(serial: &Serial, register: u64, value: u8) {
    serial.write(register, &[value]);
}

/// True once after each edge.
fn interrupted(serial: &Serial) -> bool {
    serial.irq().event().read().is_ok()
}

fn released(serial: &Serial) -> Vec<u8> {
    let mut chunk = Vec::new();
    serial.gate().close();
    let mut all = Vec::new();
    while serial.gate().next_chunk(&mut chunk) {
        all.extend_from_slice(&chunk);
        serial.gate().consume(chunk.len());
    }
    all
}

#[test]
fn what_the_guest_writes_leaves_in_order() {
    let serial = serial();
    for byte in b"hello" {
        assert_eq!(get(&serial, LSR) & LSR_TX_IDLE, LSR_TX_IDLE);
        put(&serial, DATA, *byte);
    }
    assert_eq!(released(&serial), b"hello");
}

#[test]
fn loopback_returns_what_is_written_and_nothing_leaves() {
    let serial = serial();
    put(&serial, IER, IER_RX);
    put(&serial, MCR, MCR_LOOP);
    put(&serial, DATA, b'q');
    assert!(interrupted(&serial));
    assert_eq!(get(&serial, IIR) & 0x0f, IIR_RX);
    assert_eq!(get(&serial, LSR) & LSR_DATA, LSR_DATA);
    assert_eq!(get(&serial, DATA), b'q');
    assert_eq!(get(&serial, LSR) & LSR_DATA, 0);
    // Input waits for the end of loopback, and is told.
    assert_eq!(serial.take(b"x"), 0);
    assert!(serial.room().event().read().is_err());
    put(&serial, MCR, 0);
    assert_eq!(serial.room().event().read(), Ok(1));
    assert_eq!(serial.take(b"x"), 1);
    assert_eq!(released(&serial), b"");
}

#[test]
fn input_interrupts_and_waits_for_room() {
    let serial = serial();
    put(&serial, IER, IER_RX);
    let input: Vec<u8> = (0..100).collect();
    assert_eq!(serial.take(&input), 64);
    assert!(interrupted(&serial));
    assert_eq!(serial.take(&input[64..]), 0);
    for byte in &input[..63] {
        assert_eq!(get(&serial, DATA), *byte);
    }
    assert!(serial.room().event().read().is_err());
    assert_eq!(get(&serial, DATA), 63);
    assert_eq!(serial.room().event().read(), Ok(1));
    assert_eq!(serial.take(&input[64..]), 36);
    assert_eq!(get(&serial, DATA), 64);
}

#[test]
fn parked_input_waits() {
    let serial = serial();
    serial.park();
    let before = serial.save();
    assert_eq!(serial.take(b"x"), 0);
    assert_eq!(serial.save(), before);
    serial.unpark();
    assert_eq!(serial.room().event().read(), Ok(1));
    assert_eq!(serial.take(b"x"), 1);
}

#[test]
fn a_full_gate_shows_a_busy_transmitter_and_interrupts_when_it_ends() {
    let serial = serial();
    put(&serial, IER, IER_THR_EMPTY);
    serial.gate().hold();
    serial.gate().write(&vec![b'.'; THROTTLE_BYTES - 1]);
    put(&serial, DATA, b'.');
    assert_eq!(get(&serial, LSR) & LSR_TX_IDLE, 0);
    // The driver's handler finds it busy and returns; DLAB is set by some other code of its.
    assert_eq!(get(&serial, IIR) & 0x0f, IIR_THR_EMPTY);
    interrupted(&serial);
    put(&serial, LCR, LCR_DLAB | 3);
    put(&serial, IER, 0x5a);
    serial.gate().seal(1);
    serial.gate().commit(1);
    assert_eq!(get(&serial, LSR) & LSR_TX_IDLE, 0);
    assert!(!interrupted(&serial));
    serial.gate().consume(THROTTLE_BYTES);
    assert!(interrupted(&serial));
    assert_eq!(get(&serial, LSR) & LSR_TX_IDLE, LSR_TX_IDLE);
    assert_eq!(get(&serial, IIR) & 0x0f, IIR_THR_EMPTY);
    // The registers are as the guest left them.
    assert_eq!((get(&serial, LCR), get(&serial, IER)), (LCR_DLAB | 3, 0x5a));
    put(&serial, LCR, 3);
    assert_eq!(get(&serial, IER), IER_THR_EMPTY);
}

#[test]
fn a_guest_that_ignores_the_busy_transmitter_loses_bytes_and_memory_is_bounded() {
    let serial = serial();
    serial.gate().hold();
    serial.gate().write(&vec![b'.'; GATE_BYTES_MAX]);
    put(&serial, DATA, b'!');
    assert_eq!(serial.gate().held_bytes(), GATE_BYTES_MAX);
    assert!(serial.counters().contains(&("output_dropped_bytes", 1)));
}

/// A device with something in every field.
fn busy() -> Arc<Serial> {
    let serial = serial();
    serial.gate().hold();
    put(&serial, LCR, LCR_DLAB);
    put(&serial, DATA, 0x12);
    put(&serial, IER, 0x34);
    put(&serial, LCR, 3);
    put(&serial, SCR, 0x77);
    put(&serial, IER, IER_RX);
    put(&serial, MCR, 0x0b);
    for byte in b"output" {
        put(&serial, DATA, *byte);
    }
    assert_eq!(serial.take(b"input"), 5);
    serial
}

#[test]
fn a_state_survives_both_encodings_and_a_restore() {
    let state = busy().save();
    assert_eq!(state.pending_output, b"output");
    assert_eq!(state.rx_fifo, b"input");
    let json = serde_json::to_vec(&state).unwrap();
    assert_eq!(serde_json::from_slice::<SerialState>(&json).unwrap(), state);
    let binary = postcard::to_stdvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<SerialState>(&binary).unwrap(), state);

    let restored = serial();
    restored.gate().hold();
    restored.restore(&state).unwrap();
    assert_eq!(restored.save(), state);
    assert!(interrupted(&restored), "the pending interrupt is raised again");
    assert_eq!(get(&restored, IIR) & 0x0f, IIR_RX);
    for byte in b"input" {
        assert_eq!(get(&restored, DATA), *byte);
    }
    restored.gate().pass();
    assert_eq!(released(&restored), b"output");
}

#[test]
fn a_restored_device_without_pending_interrupt_is_quiet() {
    let state = serial().save();
    let restored = serial();
    restored.restore(&state).unwrap();
    assert!(!interrupted(&restored));
    assert_eq!(get(&restored, IIR) & 0x0f, IIR_NONE);
}

#[test]
fn a_take_over_writes_what_the_primary_may_not_have_written() {
    let primary = serial();
    primary.gate().hold();
    put(&primary, DATA, b'1');
    primary.gate().seal(1);
    put(&primary, DATA, b'2');
    // Captured for epoch 2, before it is sealed; the primary dies before it can write either.
    let state = primary.save();
    put(&primary, DATA, b'3');
    let backup = serial();
    backup.restore(&state).unwrap();
    put(&backup, DATA, b'3');
    assert_eq!(released(&backup), b"123");
}

#[test]
fn a_guest_that_waited_for_room_is_told_after_a_take_over() {
    let primary = serial();
    put(&primary, IER, IER_THR_EMPTY);
    primary.gate().hold();
    primary.gate().write(&vec![b'.'; THROTTLE_BYTES]);
    get(&primary, IIR);
    let state = SerialState { pending_output: Vec::new(), ..primary.save() };
    assert!(state.tx_throttled);
    let backup = serial();
    backup.restore(&state).unwrap();
    assert!(interrupted(&backup));

    // With the output, the interrupt comes when there is room.
    let backup = serial();
    backup.restore(&primary.save()).unwrap();
    assert!(!interrupted(&backup));
    backup.gate().consume(THROTTLE_BYTES);
    assert!(interrupted(&backup));
}

/// The state is captured while the thread that made room is about to say so.
#[test]
fn a_guest_that_is_about_to_be_told_is_told_after_a_take_over() {
    let primary = serial();
    put(&primary, IER, IER_THR_EMPTY);
    primary.gate().write(&vec![b'.'; THROTTLE_BYTES]);
    assert_eq!(get(&primary, LSR) & LSR_TX_IDLE, 0);
    get(&primary, IIR);
    let (saved, device) = (Arc::new(Mutex::new(None)), Arc::clone(&primary));
    let slot = Arc::clone(&saved);
    primary.gate().set_space_waker(Arc::new(move || {
        *slot.lock().unwrap() = Some(device.save());
    }));
    primary.gate().consume(THROTTLE_BYTES);
    let state = saved.lock().unwrap().take().expect("there is room");
    let backup = serial();
    backup.restore(&state).unwrap();
    assert!(interrupted(&backup));
    // Once: whoever is saved after that waits for nothing.
    assert!(!backup.save().tx_throttled);
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_changes_nothing() {
    let serial = busy();
    let before = serial.save();
    let fifo = SerialState { rx_fifo: vec![0; 65], ..SerialState::default() };
    assert!(matches!(serial.restore(&fifo), Err(SerialStateError::RxFifo(65))));
    let output =
        SerialState { pending_output: vec![0; GATE_BYTES_MAX + 1], ..SerialState::default() };
    assert!(matches!(serial.restore(&output), Err(SerialStateError::PendingOutput(_))));
    assert_eq!(serial.save(), before);
}

#[test]
fn a_state_that_contradicts_itself_is_put_right() {
    let odd = SerialState {
        line_status: 0xff,
        interrupt_enable: 0xff,
        interrupt_identification: 0xff,
        ..SerialState::default()
    };
    let serial = serial();
    serial.restore(&odd).unwrap();
    assert_eq!(get(&serial, LSR), LSR_TX_IDLE);
    assert_eq!(get(&serial, IER), 0x0f);
}
