//! The thread that serves the rings' doorbells.
//!
//! ```text
//!   transmit doorbell, gate has room ─▶ transmit ring ─▶ gate
//!   receive doorbell, unpark ─────────▶ the input thread is told of room
//! ```
//!
//! What always holds: the thread blocks in its wait only, enters the turnstile without waiting, and
//! touches no guest memory where there is nothing to do: an idle console dirties no page.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::EpollEvent;

use super::shared::{Notice, Shared, Token};
use super::tx::{self, TakeEnd};
use crate::console::Input;
use crate::virtio::ring::RingError;

/// Events that are fetched at once.
const EVENTS: usize = 4;

pub struct Worker {
    shared: Arc<Shared>,
    /// There may be chains in the transmit ring.
    transmit: bool,
    scratch: tx::Scratch,
}

impl Worker {
    pub fn spawn(shared: &Arc<Shared>) -> io::Result<JoinHandle<()>> {
        let (shared, scratch) = (Arc::clone(shared), tx::Scratch::default());
        let worker = Self { shared, transmit: true, scratch };
        thread::Builder::new().name(worker.shared.id.clone()).spawn(move || worker.run())
    }

    /// A worker that does nothing by itself.
    #[cfg(feature = "fuzzing")]
    pub fn by_hand(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared), transmit: true, scratch: tx::Scratch::default() }
    }

    /// A round as after a signal of the driver.
    #[cfg(feature = "fuzzing")]
    pub fn turn(&mut self) -> bool {
        self.transmit = true;
        self.tell_size();
        self.transmit()
    }

    /// Input of the host.
    #[cfg(feature = "fuzzing")]
    pub fn input(&self, bytes: &[u8]) -> usize {
        self.shared.take(bytes)
    }

    fn run(mut self) {
        while !self.shared.ends.load(Ordering::SeqCst) {
            self.tell_size();
            let again = self.transmit();
            self.wait(again);
        }
    }

    /// Waits for something to do, or only fetches what has happened.
    fn wait(&mut self, again: bool) {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.shared.epoll.wait(if again { 0 } else { -1 }, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("a worker's own epoll descriptor is valid: {error}"),
        };
        for event in &events[..count] {
            let token = event.data();
            // Not for a mere wake: an epoch ends with one, and a look at the ring writes to it. What
            // could not be served before is still to be.
            self.transmit |= token == Token::Transmit as u64;
            if token != Token::Transmit as u64 {
                self.shared.room().signal();
            }
        }
    }

    /// Takes output of the guest. True if there may be more.
    fn transmit(&mut self) -> bool {
        // Back-pressure: what the gate does not take is not taken from the guest either. The gate
        // wakes this worker when it has room.
        if !self.transmit || self.shared.gate.throttled() {
            return false;
        }
        let shared = Arc::clone(&self.shared);
        let end = shared.with_active(|active, taken, _| {
            let Some(transmit) = &mut active.transmit else {
                return Ok::<_, RingError>((TakeEnd::Empty, None));
            };
            let (end, interrupt) = tx::take(
                &mut transmit.queue,
                &active.memory,
                taken,
                &shared.gate,
                &shared.output_errors,
                &mut self.scratch,
            )?;
            Ok((end, interrupt.then_some(Notice::Queue(transmit.index))))
        });
        match end {
            Some(TakeEnd::Budget) => true,
            // It may have got room again before it was known to be throttled.
            Some(TakeEnd::Throttled) => !shared.gate.throttled(),
            Some(TakeEnd::Empty) => {
                self.transmit = false;
                false
            }
            None => false,
        }
    }

    /// Tells the driver to look at the size, where there is one.
    fn tell_size(&self) {
        let shared = &self.shared;
        if !shared.size_due.load(Ordering::SeqCst) {
            return;
        }
        shared.with_active(|active, _, _| {
            shared.size_due.store(false, Ordering::SeqCst);
            let is_told = active.sized && shared.size.load(Ordering::SeqCst) != 0;
            Ok::<_, RingError>(((), is_told.then_some(Notice::Config)))
        });
    }
}
