//! Lets workers through one request at a time, and stops them all between two.
//!
//! ```text
//!   worker:  enter ─▶ Pass ─ rings, guest memory, state, interrupt ─ drop
//!   parker:  park ─ waits for passes that are out ─▶ nobody is inside until unpark
//! ```
//!
//! A pass is held for copying and never for host I/O, so parking waits for microseconds.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Inner {
    parked: bool,
    inside: usize,
}

/// The turnstile of one device.
#[derive(Debug, Default)]
pub struct Turnstile {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Turnstile {
    /// Waits until the device is not parked, and goes in.
    pub fn enter(&self) -> Pass<'_> {
        let inner = self.lock();
        let mut inner = self
            .changed
            .wait_while(inner, |inner| inner.parked)
            .unwrap_or_else(PoisonError::into_inner);
        inner.inside += 1;
        Pass { turnstile: self }
    }

    /// Goes in unless the device is parked.
    pub fn try_enter(&self) -> Option<Pass<'_>> {
        let mut inner = self.lock();
        if inner.parked {
            return None;
        }
        inner.inside += 1;
        Some(Pass { turnstile: self })
    }

    /// Closes the turnstile and waits until nobody is inside.
    pub fn park(&self) {
        let mut inner = self.lock();
        inner.parked = true;
        drop(
            self.changed
                .wait_while(inner, |inner| inner.inside > 0)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Opens it again.
    pub fn unpark(&self) {
        self.lock().parked = false;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to touch a device's rings and guest memory; ends when dropped.
#[derive(Debug)]
pub struct Pass<'a> {
    turnstile: &'a Turnstile,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut inner = self.turnstile.lock();
        inner.inside -= 1;
        if inner.inside == 0 && inner.parked {
            drop(inner);
            self.turnstile.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn parking_waits_for_who_is_inside_and_keeps_the_others_out() {
        let turnstile = Arc::new(Turnstile::default());
        let pass = turnstile.enter();
        let parked = Arc::new(AtomicBool::new(false));
        let parker = thread::spawn({
            let (turnstile, parked) = (Arc::clone(&turnstile), Arc::clone(&parked));
            move || {
                turnstile.park();
                parked.store(true, Ordering::SeqCst);
            }
        });
        while turnstile.try_enter().is_some() {
            thread::yield_now();
        }
        assert!(!parked.load(Ordering::SeqCst));
        drop(pass);
        parker.join().unwrap();
        let (went_in, seen) = channel();
        let worker = thread::spawn({
            let turnstile = Arc::clone(&turnstile);
            move || {
                let _pass = turnstile.enter();
                went_in.send(()).unwrap();
            }
        });
        assert!(seen.recv_timeout(Duration::from_millis(50)).is_err());
        turnstile.unpark();
        seen.recv().unwrap();
        worker.join().unwrap();
        assert!(turnstile.try_enter().is_some());
    }
}
