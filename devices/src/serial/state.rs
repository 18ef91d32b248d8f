//! What of a serial port is saved: registers, receive FIFO, output not yet written.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::SerialState as Registers;

use crate::output_gate::GATE_BYTES_MAX;

/// Bytes in the receive FIFO of vm-superio's UART.
pub const RX_FIFO_BYTES_MAX: usize = 64;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_TX_IDLE: u8 = (1 << 5) | (1 << 6);
const IER_VALID: u8 = 0x0f;
const IIR_VALID: u8 = 0x0f;

/// Errors of restoring a port.
#[derive(Debug, Error)]
pub enum SerialStateError {
    /// The receive FIFO holds more than it can.
    #[error("Serial state has {0} bytes in a FIFO of {RX_FIFO_BYTES_MAX}")]
    RxFifo(usize),
    /// More output is pending than a gate holds.
    #[error("Serial state has {0} bytes of pending output, more than {GATE_BYTES_MAX}")]
    PendingOutput(usize),
    /// A pending interrupt could not be raised.
    #[error("Restoring the serial port failed: {0}")]
    Interrupt(String),
}

/// A saved port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// At most [`RX_FIFO_BYTES_MAX`] bytes.
    pub rx_fifo: Vec<u8>,
    /// The guest saw a busy transmitter and may wait for the interrupt that ends it.
    pub tx_throttled: bool,
    /// Output that the saved machine had produced and not yet written to its backend; at most
    /// [`GATE_BYTES_MAX`] bytes, none outside replication.
    pub pending_output: Vec<u8>,
}

impl SerialState {
    pub(super) fn from_parts(uart: Registers, tx_throttled: bool, pending: Vec<u8>) -> Self {
        Self {
            baud_divisor_low: uart.baud_divisor_low,
            baud_divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            rx_fifo: uart.in_buffer,
            tx_throttled,
            pending_output: pending,
        }
    }

    /// Checks what [`super::Serial::restore`] would refuse.
    pub fn validate(&self) -> Result<(), SerialStateError> {
        if self.rx_fifo.len() > RX_FIFO_BYTES_MAX {
            return Err(SerialStateError::RxFifo(self.rx_fifo.len()));
        }
        if self.pending_output.len() > GATE_BYTES_MAX {
            return Err(SerialStateError::PendingOutput(self.pending_output.len()));
        }
        Ok(())
    }

    /// The registers, with bits that contradict the FIFO or do not exist put right.
    pub(super) fn registers(&self) -> Result<Registers, SerialStateError> {
        self.validate()?;
        let ready = if self.rx_fifo.is_empty() { 0 } else { LSR_DATA_READY };
        Ok(Registers {
            baud_divisor_low: self.baud_divisor_low,
            baud_divisor_high: self.baud_divisor_high,
            interrupt_enable: self.interrupt_enable & IER_VALID,
            interrupt_identification: self.interrupt_identification & IIR_VALID,
            line_control: self.line_control,
            line_status: LSR_TX_IDLE | ready,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.rx_fifo.clone(),
        })
    }
}
