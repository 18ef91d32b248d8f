//! 16550 serial port.
//!
//! What enters: port accesses of the guest, input bytes of the host; what leaves: interrupts, and
//! output bytes through an [`OutputGate`]. What always holds: a vCPU never waits for the host
//! side, and input that does not fit the FIFO waits on the host side.
//!
//! The registers are vm-superio's. What is added here: the transmitter shows itself busy (LSR
//! THRE and TEMT clear) while the gate is throttled, and interrupts once that ends, so a driver
//! that polls and one that waits for the interrupt both slow down; input can be parked, so that
//! no state changes while the machine is quiesced.

mod port;
/// What of a port is saved.
pub mod state;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_superio::Serial as Uart;
use vm_superio::serial::SerialEvents;

pub use self::port::SerialPort;
pub use self::state::{SerialState, SerialStateError};

use crate::bus::BusDevice;
use crate::console::{Input, Room};
use crate::counters::{Counter, Counters};
use crate::irq::IrqLine;
use crate::output_gate::OutputGate;

/// First port of COM1.
pub const SERIAL_BASE: u64 = 0x3f8;
/// Ports of a UART.
pub const SERIAL_LEN: u64 = 8;
/// Interrupt of COM1.
pub const SERIAL_GSI: u32 = 4;

const IER_OFFSET: u8 = 1;
const LCR_OFFSET: u8 = 3;
const MCR_OFFSET: u8 = 4;
const LSR_OFFSET: u8 = 5;
const IER_THR_EMPTY: u8 = 1 << 1;
const LCR_DLAB: u8 = 1 << 7;
const MCR_LOOP: u8 = 1 << 4;
/// Transmitter holding register empty, transmitter empty.
const LSR_TX_IDLE: u8 = (1 << 5) | (1 << 6);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.signal();
    }
}

/// Lets vm-superio write into the gate.
#[derive(Debug)]
struct GateWriter(Arc<OutputGate>);

impl Write for GateWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Registers = Uart<IrqLine, Arc<Room>, GateWriter>;

#[derive(Debug)]
struct Inner {
    uart: Registers,
    /// No input is taken.
    parked: bool,
    /// The guest has seen the transmitter busy, and was not told of its end yet. The gate may have room again by now:
    /// whoever emptied it tells without the device's lock.
    tx_waits: bool,
}

/// The device, without its host side ([`SerialPort`] has both).
#[derive(Debug)]
pub struct Serial {
    inner: Mutex<Inner>,
    irq: IrqLine,
    gate: Arc<OutputGate>,
    space: Arc<Room>,
    input_bytes: Counter,
    irq_errors: Counter,
}

impl Serial {
    /// A UART after reset.
    pub fn new(irq: IrqLine, gate: Arc<OutputGate>) -> io::Result<Arc<Self>> {
        let space = Arc::new(Room::new()?);
        let uart =
            Uart::with_events(irq.clone(), Arc::clone(&space), GateWriter(Arc::clone(&gate)));
        let serial = Arc::new(Self {
            inner: Mutex::new(Inner { uart, parked: false, tx_waits: false }),
            irq,
            gate: Arc::clone(&gate),
            space,
            input_bytes: Counter::default(),
            irq_errors: Counter::default(),
        });
        let weak: Weak<Self> = Arc::downgrade(&serial);
        gate.set_space_waker(Arc::new(move || {
            if let Some(serial) = weak.upgrade() {
                serial.announce_tx_space(&mut serial.lock());
            }
        }));
        Ok(serial)
    }

    /// The gate that output goes through.
    #[must_use]
    pub fn gate(&self) -> &Arc<OutputGate> {
        &self.gate
    }

    /// The line to register as irqfd.
    #[must_use]
    pub fn irq(&self) -> &IrqLine {
        &self.irq
    }

    /// Until [`Serial::unpark`] only the guest changes the device.
    pub fn park(&self) {
        self.lock().parked = true;
    }

    /// Input flows again.
    pub fn unpark(&self) {
        self.lock().parked = false;
        self.space.signal();
    }

    /// The device's state, output included that was not written yet (see [`OutputGate::pending`]).
    #[must_use]
    pub fn save(&self) -> SerialState {
        let inner = self.lock();
        let tx_waits = inner.tx_waits || self.gate.throttled();
        SerialState::from_parts(inner.uart.state(), tx_waits, self.gate.pending())
    }

    /// Takes the place of a saved device: an interrupt that was pending is raised again, output
    /// that was pending is written. On an error nothing has changed.
    pub fn restore(&self, state: &SerialState) -> Result<(), SerialStateError> {
        let registers = state.registers()?;
        let mut inner = self.lock();
        let uart = Uart::from_state(
            &registers,
            self.irq.clone(),
            Arc::clone(&self.space),
            GateWriter(Arc::clone(&self.gate)),
        )
        .map_err(|error| SerialStateError::Interrupt(error.to_string()))?;
        inner.uart = uart;
        self.gate.write(&state.pending_output);
        inner.tx_waits = state.tx_throttled;
        if state.tx_throttled && !self.gate.throttled() {
            self.announce_tx_space(&mut inner);
        }
        drop(inner);
        self.space.signal();
        Ok(())
    }

    /// Raises the transmitter-empty interrupt. vm-superio does that on a write to IER, which
    /// leaves the register as it is but is only reachable while DLAB is clear.
    fn announce_tx_space(&self, inner: &mut Inner) {
        inner.tx_waits = false;
        let uart = &mut inner.uart;
        let state = uart.state();
        if state.interrupt_enable & IER_THR_EMPTY == 0 {
            return;
        }
        let result = uart
            .write(LCR_OFFSET, state.line_control & !LCR_DLAB)
            .and_then(|()| uart.write(IER_OFFSET, state.interrupt_enable))
            .and_then(|()| uart.write(LCR_OFFSET, state.line_control));
        if result.is_err() {
            self.irq_errors.add(1);
        }
    }

    fn read_register(&self, inner: &mut Inner, offset: u8) -> u8 {
        let value = inner.uart.read(offset);
        if offset == LSR_OFFSET
            && self.gate.throttled()
            && inner.uart.state().modem_control & MCR_LOOP == 0
        {
            inner.tx_waits = true;
            return value & !LSR_TX_IDLE;
        }
        value
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut inner = self.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = u8::try_from(at).map_or(0xff, |at| self.read_register(&mut inner, at));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        for (at, byte) in (offset..).zip(data) {
            let Ok(at) = u8::try_from(at) else { continue };
            if inner.uart.write(at, *byte).is_err() {
                self.irq_errors.add(1);
            }
            if at == MCR_OFFSET {
                // Leaving loopback lets input in again, and no read announces that.
                self.space.signal();
            }
        }
    }
}

impl Counters for Serial {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.gate.counters();
        counters.push(("input_bytes", self.input_bytes.get()));
        counters.push(("irq_errors", self.irq_errors.get()));
        counters
    }
}

impl Input for Serial {
    fn take(&self, bytes: &[u8]) -> usize {
        let mut inner = self.lock();
        let room = inner.uart.fifo_capacity();
        let mut taken = 0;
        if !inner.parked && room > 0 {
            match inner.uart.enqueue_raw_bytes(bytes) {
                Ok(count) => taken = count,
                // The bytes are in the FIFO, only the edge is lost: the next one tells.
                Err(_) => {
                    self.irq_errors.add(1);
                    taken = bytes.len().min(room);
                }
            }
        }
        if taken < bytes.len() {
            self.space.set_wanted(true);
        }
        self.input_bytes.add_len(taken);
        taken
    }

    fn room(&self) -> &Room {
        &self.space
    }
}
