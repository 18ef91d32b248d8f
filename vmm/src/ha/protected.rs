//! A machine as replication protects it.

use std::io;
use std::sync::Arc;

use api::replication::{ConsoleOutput, DiskMode, ReplicateData};
use devices::virtio::blk::KeptDurable;
use replication::Error;
use replication::disk::Disks;
use replication::guest::{Guest, GuestError, Waker};
use replication::ids::EpochId;
use replication::ram::{PageSet, Ram};

use super::codec::Captured;
use super::description::Description;
use super::disks::ReplicatedDisks;
use crate::device_manager::Holds;
use crate::machine::Machine;

/// What waits for its epoch under these options.
#[must_use]
pub fn holds(data: &ReplicateData) -> Holds {
    Holds {
        console: data.console_output == ConsoleOutput::Hold,
        disks: data.disk_mode == DiskMode::Shared,
    }
}

/// The running machine of the control loop, handed to the engine.
pub struct ProtectedVm {
    machine: Arc<Machine>,
    /// Those whose images are to be on both hosts.
    disks: Option<Arc<ReplicatedDisks>>,
    holds: Holds,
    /// What was answered on a disk that both hosts see is on it, also when this host is gone.
    durable: Vec<KeptDurable>,
    /// Whether the last capture said that a person had paused the VM.
    captured_paused: bool,
}

impl ProtectedVm {
    #[must_use]
    pub fn new(machine: Arc<Machine>, holds: Holds) -> Self {
        // Disks whose changes wait are those of one image that both hosts see.
        let disks = if holds.disks { vec![] } else { machine.devices().writable_disks() };
        let disks = (!disks.is_empty()).then(|| Arc::new(ReplicatedDisks(disks)));
        Self { machine, disks, holds, durable: vec![], captured_paused: false }
    }

    /// Makes what the guest was told durable, and keeps it so while this guest is protected: on disks that
    /// the backup sees as well. Waits for the storage.
    ///
    /// # Errors
    /// The storage's.
    pub fn keep_durable(&mut self) -> Result<(), Error> {
        if self.holds.disks {
            let what = "make what its disks have durable on the storage";
            let disks = self.machine.devices().writable_disks();
            let kept = disks.iter().map(|disk| disk.keep_durable());
            let kept: io::Result<Vec<_>> = kept.collect();
            self.durable = kept.map_err(|error| Error::Guest { what, source: error.into() })?;
        }
        Ok(())
    }
}

impl Guest for ProtectedVm {
    type State = Captured;

    fn ram(&self) -> Ram {
        self.machine.memory().ram().clone()
    }

    fn disks(&self) -> Option<Arc<dyn Disks>> {
        self.disks.clone().map(|disks| disks as _)
    }

    fn describe(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(Description::of(&self.machine).encode()?)
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.set_tracking(true)?)
    }

    fn tracking_name(&self) -> Option<&'static str> {
        Some(self.machine.tracking().name())
    }

    fn stop_tracking(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.set_tracking(false)?)
    }

    fn quiesce(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.quiesce()?)
    }

    fn hold(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.hold()?)
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        Ok(self.machine.harvest(dirty)?)
    }

    fn written_pages(&mut self) -> Result<Option<u64>, GuestError> {
        Ok(self.machine.written_pages()?)
    }

    fn drop_untouched(&mut self, pages: &mut PageSet) {
        self.machine.memory().drop_unpopulated(pages);
    }

    fn capture(&mut self) -> Result<Captured, GuestError> {
        let paused = self.machine.is_user_paused();
        self.captured_paused = paused;
        Ok(Captured { machine: self.machine.capture()?, paused })
    }

    fn hold_output(&mut self) {
        self.machine.devices().hold_output(self.holds);
    }

    fn settle_output(&mut self) {
        self.machine.devices().settle_output();
    }

    fn seal_output(&mut self, epoch: EpochId) {
        self.machine.devices().seal_output(epoch.0);
    }

    fn release(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.release()?)
    }

    fn commit_output(&mut self, epoch: EpochId) {
        self.machine.devices().commit_output(epoch.0);
    }

    fn hand_over_output(&mut self, epoch: EpochId) {
        self.machine.devices().hand_over_output(epoch.0);
    }

    fn pass_output(&mut self) {
        self.machine.devices().pass_output();
    }

    fn output_held_bytes(&self) -> u64 {
        self.machine.devices().output_held_bytes()
    }

    fn output_waiting(&self) -> bool {
        // A pause writes no page: without this the backup would not hear of it.
        self.captured_paused != self.machine.is_user_paused()
            || self.machine.devices().output_waiting()
    }

    fn set_output_waker(&mut self, waker: Waker) {
        let wake: Arc<dyn Fn() + Send + Sync> = Arc::new(move || waker.wake());
        self.machine.devices().set_output_waker(&wake);
    }

    fn suspend(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.pause_alone()?)
    }

    fn regain(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.end_pause_alone()?)
    }

    fn destroy(&mut self) {
        self.machine.destroy();
    }
}
