//! What a virtio device is to its transport.
//!
//! ```text
//!              activate                       (driver set DRIVER_OK, or a state is restored)
//!   idle ────────────────────▶ active
//!    ▲                           │ reset      (driver wrote 0 to the status)
//!    └───────────────────────────┘
//! ```
//!
//! Parking is independent of that: a device that is activated while parked touches nothing until
//! it is unparked.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::state::DeviceState;

/// Guest memory as devices see it: the VMM's one mapping, whose bitmap sees their writes.
pub type GuestMemory = guest_memory::Mapping;

/// Device types, virtio 1.2 section 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum DeviceType {
    Net = 1,
    Block = 2,
    Console = 3,
    Entropy = 4,
}

/// Interrupts a device's driver.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` were used. Call it only if the queue says that the driver wants it
    /// ([`virtio_queue::QueueT::needs_notification`]), and under a pass.
    fn queue(&self, index: u16);
    /// The configuration space changed. Under a pass.
    fn config(&self);
    /// The device met something that it cannot go on from: sets DEVICE_NEEDS_RESET (virtio 1.2,
    /// 2.1.1) and tells the driver. Under a pass. The device answers nothing until it is reset.
    fn needs_reset(&self, why: &str);
}

/// One queue that the driver has set up. Its addresses and size were checked to lie in guest
/// memory; what it contains is as hostile as ever.
pub struct ActiveQueue {
    /// Its number in the device.
    pub index: u16,
    pub queue: Queue,
    /// Signalled when the driver has made buffers available, and once after activation.
    pub doorbell: EventFd,
}

/// What a driver has set up.
pub struct Activation {
    pub memory: Arc<GuestMemory>,
    /// The features that the driver accepted, a subset of what was offered.
    pub features: u64,
    /// The queues that the driver enabled, ascending; not necessarily all.
    pub queues: Vec<ActiveQueue>,
    pub interrupt: Arc<dyn Interrupt>,
}

/// A device cannot begin to work.
#[derive(Debug, Error)]
pub enum ActivateError {
    #[error("The driver enabled {found} queues, the device needs {needed}")]
    Queues { found: usize, needed: usize },
    #[error("Cannot start a thread of the device")]
    Thread(#[source] io::Error),
    #[error("Cannot watch the device's events")]
    Events(#[source] io::Error),
    #[error("The device was not attached to its host resource")]
    NotAttached,
}

/// What the host lends a device cannot be had: an image, a tap.
#[derive(Debug, Error)]
#[error("{what}")]
pub struct AttachError {
    /// What failed, and on what.
    pub what: String,
    #[source]
    pub source: Option<io::Error>,
}

/// A saved state does not fit the device.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum StateError {
    #[error("The state is that of another kind of device")]
    Kind,
    #[error("The state is not usable: {0}")]
    Unusable(String),
}

/// A virtio device without its transport.
///
/// The transport calls `activate` and `reset` from vCPU threads, one after the other; the VMM calls
/// the rest from the control loop or the replication engine. No call may wait for host I/O. Both
/// may come while the device is parked, and then must not wait for its `unpark`: that comes only
/// after the vCPU that calls has stopped too.
pub trait VirtioDevice: Send + Sync {
    /// The device's name, as in `vm.info` and `vm.counters`.
    fn id(&self) -> &str;
    fn device_type(&self) -> DeviceType;
    /// The largest size of each queue, powers of two up to 32768. Asked once, before `attach`, as
    /// are the features: a backup must know both before it owns anything.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Feature bits on offer, without VIRTIO_F_VERSION_1, which the transport adds.
    fn features(&self) -> u64;
    /// Fills `data` from the device's configuration space; zeroes past its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Takes what the driver writes there; most devices have nothing that can be written.
    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }
    /// Takes what the host lends for good: opens and locks an image, opens a tap. Called once,
    /// before the first activation, by a VMM that owns the VM: a backup does it at its take-over.
    fn attach(&self) -> Result<(), AttachError>;
    /// Begins to work on the queues. What [`VirtioDevice::restore`] left in flight is carried out
    /// first. On an error the device is as before.
    fn activate(&self, activation: Activation) -> Result<(), ActivateError>;
    /// Ends the work: on return nothing of the last activation touches guest memory any more. Host
    /// I/O that is under way is left to end by itself, without effect on the guest. Comes for idle
    /// devices too: they forget what the driver wrote, and what [`VirtioDevice::restore`] left in
    /// flight.
    fn reset(&self);
    /// Stops at a request boundary: on return nothing touches guest memory, rings or state, and
    /// nobody interrupts, until [`VirtioDevice::unpark`].
    fn park(&self);
    fn unpark(&self);
    /// The device's own state, queue positions included. Only while parked.
    fn save(&self) -> DeviceState;
    /// Whether [`VirtioDevice::restore`] would take this, by an idle device.
    fn check(&self, state: &DeviceState) -> Result<(), StateError>;
    /// Takes a saved state; an activation follows if the device was active. Only while parked and
    /// idle. Nothing of the state is trusted.
    fn restore(&self, state: &DeviceState) -> Result<(), StateError>;
    /// Where the active queues stand, by queue number. Only while parked.
    fn queue_positions(&self) -> Vec<QueuePosition>;
    fn counters(&self) -> Vec<(&'static str, u64)>;

    /// The VM goes on from a replica here: the world is told where it is now. Default: nothing.
    fn announce(&self) {}

    /// The same, and nothing may leave yet: only the guest is asked to say it. Default: nothing.
    fn announce_to_guest(&self) {}
}

/// How far a queue has got (virtio 1.2, 2.7): what the driver cannot see in the rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct QueuePosition {
    pub index: u16,
    pub next_avail: u16,
    pub next_used: u16,
}
