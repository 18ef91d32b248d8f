//! Brings the tap in line with what the driver has chosen: offloads and queues.
//!
//! The calls take a lock of the kernel's network configuration, which the host may hold for long:
//! only a worker makes them, and never under a pass.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::features::GuestOffloads;
use super::shared::Shared;
use super::tap::TapQueue;

/// The side of the tap that all pairs share. Owned by the first pair's worker.
pub struct HostSide {
    taps: Vec<Arc<dyn TapQueue>>,
    offloads: Option<GuestOffloads>,
    enabled: Vec<bool>,
    /// What was asked for last, whether or not it could be done.
    asked: Option<(GuestOffloads, u16)>,
}

impl HostSide {
    /// All queues of a tap are enabled when it was opened.
    pub fn new(taps: Vec<Arc<dyn TapQueue>>) -> Self {
        let enabled = vec![true; taps.len()];
        Self { taps, offloads: None, enabled, asked: None }
    }

    /// [`HostSide::apply`], unless that was asked for last: what failed is not tried without end.
    pub fn sync(&mut self, shared: &Shared, offloads: GuestOffloads, pairs: u16) {
        if self.asked == Some((offloads, pairs)) {
            return;
        }
        if let Err(error) = self.apply(shared, offloads, pairs) {
            tracing::debug!("The tap of {} was not configured: {error}", shared.id);
        }
    }

    /// Makes the tap deliver what `offloads` says, on the first `pairs` queues. What failed is as
    /// before, the rest is done.
    pub fn apply(
        &mut self,
        shared: &Shared,
        offloads: GuestOffloads,
        pairs: u16,
    ) -> io::Result<()> {
        self.asked = Some((offloads, pairs));
        let mut result = Ok(());
        if self.offloads != Some(offloads) {
            match self.taps[0].set_offloads(offloads) {
                Ok(()) => self.offloads = Some(offloads),
                Err(error) => result = Err(error),
            }
        }
        let pairs = usize::from(pairs).min(self.taps.len());
        // Workers must not wait for a queue that is disabled: it reports errors without end.
        if pairs < shared.taps_enabled.load(Ordering::SeqCst) {
            shared.taps_enabled.store(pairs, Ordering::SeqCst);
            shared.wake_all();
        }
        for (index, tap) in self.taps.iter().enumerate() {
            let wanted = index < pairs;
            if self.enabled[index] == wanted {
                continue;
            }
            match tap.set_enabled(wanted) {
                Ok(()) => self.enabled[index] = wanted,
                Err(error) => result = Err(error),
            }
        }
        let enabled = self.enabled.iter().take(pairs).take_while(|enabled| **enabled).count();
        if enabled != shared.taps_enabled.swap(enabled, Ordering::SeqCst) {
            shared.wake_all();
        }
        result
    }
}
