//! Output commit for a disk that two hosts share.
//!
//! The calls mean what those of [`crate::output_gate::OutputGate`] mean; here a request is held
//! instead of bytes. None of them blocks, waits for the host or touches guest memory, so the
//! replication engine may call them parked or not.
//!
//! After a take-over the replica carries out again what its state has in flight, on an image that
//! may contain some of it. So a read that was in flight together with a later write may find this
//! write. No driver can tell: between requests in flight there is no order (virtio 1.2, 5.2.6).

use std::time::Duration;

use super::disk::Disk;
use super::schedule::Held;
use crate::output_gate::Waker;

impl Disk {
    /// From now on a request that changes the image, and a flush, wait for the commit of the epoch
    /// in whose course they are taken from the ring. Those that were taken before do not.
    pub fn hold(&self) {
        self.core.schedule().hold();
    }

    /// Tags what was taken since the last seal with `epoch`. While parked, as everything that
    /// ends an epoch. Epochs never descend while anything sealed waits.
    pub fn seal(&self, epoch: u64) {
        self.core.schedule().seal(epoch);
    }

    /// The host may have everything tagged with `epoch` or an earlier one.
    pub fn commit(&self, epoch: u64) {
        if self.core.schedule().commit(epoch) {
            self.wake_worker();
        }
    }

    /// The host may have everything, and nothing is held any more.
    pub fn pass(&self) {
        if self.core.schedule().pass() {
            self.wake_worker();
        }
    }

    /// The peer owns the VM: nothing reaches the host from here any more, neither what is held nor
    /// what was released and has not begun, since the peer carries out both. Final: reads are not
    /// carried out either. What the host is doing at this moment cannot be called back; the image's
    /// lock ends with it, whoever still holds the disk, so that the peer can have the image.
    pub fn discard(&self) {
        self.core.schedule().discard();
        if let Some(engine) = self.core.engine.get() {
            engine.close(Duration::ZERO);
        }
        self.let_go_of_image();
    }

    /// What belongs to uncommitted epochs, unsealed requests included.
    pub fn held(&self) -> Held {
        self.core.schedule().held()
    }

    /// What waits for a seal.
    pub fn open(&self) -> Held {
        self.core.schedule().open()
    }

    /// `waker` is called whenever open output goes from none to some: on a worker's thread, under
    /// a pass, so it may only signal.
    pub fn set_waker(&self, waker: Waker) {
        self.core.schedule().set_waker(waker);
    }
}
