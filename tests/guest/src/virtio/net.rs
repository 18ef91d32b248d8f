//! The network card (virtio 1.2, 5.1): one pair of queues, no offloads, frames of up to 1514
//! bytes, as smoltcp's device.
//!
//! A VMM that has taken over announces a guest that cannot do it (VIRTIO_NET_F_GUEST_ANNOUNCE),
//! so this driver leaves that to it.

use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use virtio_drivers::transport::{DeviceType, Transport};

use super::NoDevice;
use super::ring::Ring;
use crate::pci::Function;
use crate::pool;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZE: usize = 128;
/// `struct virtio_net_hdr` of a modern device; all zero, as there are no offloads.
const HEADER_BYTES: usize = 12;
/// An Ethernet header and 1500 bytes.
const FRAME_BYTES_MAX: usize = 1514;
const BUFFER_BYTES: usize = 2048;

bitflags::bitflags! {
    #[derive(Clone, Copy, Debug)]
    struct Features: u64 {
        const MAC = 1 << 5;
        const VERSION_1 = 1 << 32;
    }
}

type Buffer = [u8; BUFFER_BYTES];

pub struct Net {
    mac: [u8; 6],
    receive: Receive,
    transmit: Transmit,
    /// Dropping it would reset the device.
    _function: Function,
}

/// Buffers that the device fills. Buffer n is always in chain n: each chain has one descriptor,
/// and the one taken back is the next to be added.
struct Receive {
    ring: Ring<QUEUE_SIZE>,
    buffers: &'static mut [Buffer],
}

struct Transmit {
    ring: Ring<QUEUE_SIZE>,
    buffers: &'static mut [Buffer],
    /// Buffers that are ours: the first `count`.
    free: [u16; QUEUE_SIZE],
    count: usize,
    /// The buffer of each token that the device has.
    held: [u16; QUEUE_SIZE],
}

impl Net {
    pub fn open() -> Result<Self, NoDevice> {
        let function = Function::open(DeviceType::Network).ok_or(NoDevice("is missing"))?;
        let mut function = function.map_err(NoDevice)?;
        let features = function.transport.begin_init(Features::all());
        if !features.contains(Features::MAC | Features::VERSION_1) {
            return Err(NoDevice("has no address of its own"));
        }
        let unreadable = |_| NoDevice("has no configuration");
        let mac = function.transport.read_config_space::<[u8; 6]>(0).map_err(unreadable)?;
        let unusable = |_| NoDevice("has no such queues");
        let receive = Ring::new(&mut function, RECEIVE).map_err(unusable)?;
        let transmit = Ring::new(&mut function, TRANSMIT).map_err(unusable)?;
        function.transport.finish_init();
        let mut receive = Receive { ring: receive, buffers: buffers()? };
        for index in 0..QUEUE_SIZE {
            receive.offer(index);
        }
        receive.ring.kick();
        let free = core::array::from_fn(|index| u16::try_from(index).unwrap_or(0));
        let held = [0; QUEUE_SIZE];
        let transmit =
            Transmit { ring: transmit, buffers: buffers()?, free, count: QUEUE_SIZE, held };
        Ok(Self { mac, receive, transmit, _function: function })
    }

    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Whether a frame has arrived. Only reads.
    #[must_use]
    pub fn has_received(&self) -> bool {
        self.receive.ring.done().is_some()
    }

    /// Tells the device of the frames to be sent and the buffers to be filled.
    pub fn kick(&mut self) {
        self.transmit.ring.kick();
        self.receive.ring.kick();
    }
}

fn buffers() -> Result<&'static mut [Buffer], NoDevice> {
    pool::slice(QUEUE_SIZE, |_| [0; BUFFER_BYTES]).ok_or(NoDevice("has no memory"))
}

impl Receive {
    fn offer(&mut self, index: usize) {
        let buffer = &mut self.buffers[index];
        // SAFETY: the buffers are there for good, and this one is not touched before `take`.
        let token = unsafe { self.ring.add(&[], &mut [buffer]) };
        assert_eq!(token.map(usize::from), Ok(index), "a receive buffer changed its place");
    }
}

impl Transmit {
    /// Takes back what the device has sent; whether there is a buffer.
    fn reclaim(&mut self) -> bool {
        while let Some(token) = self.ring.done() {
            let index = self.held[usize::from(token)];
            let buffer = &self.buffers[usize::from(index)];
            // SAFETY: it is the buffer that was added with this token.
            let taken = unsafe { self.ring.take(token, &[buffer], &mut []) };
            assert!(taken.is_ok(), "the device gave back what it did not have");
            self.free[self.count] = index;
            self.count += 1;
        }
        self.count > 0
    }
}

/// A frame that has arrived.
pub struct Received<'a>(&'a mut Receive);

/// Room for a frame to be sent.
pub struct Sending<'a>(&'a mut Transmit);

impl phy::Device for Net {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Sending<'_>)> {
        let is_possible = self.has_received() && self.transmit.reclaim();
        is_possible.then_some((Received(&mut self.receive), Sending(&mut self.transmit)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sending<'_>> {
        self.transmit.reclaim().then_some(Sending(&mut self.transmit))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES_MAX;
        capabilities
    }
}

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, use_frame: F) -> R {
        let Self(receive) = self;
        let token = receive.ring.done().expect("a token stands for a frame");
        let index = usize::from(token);
        // SAFETY: buffer n was added as chain n.
        let taken = unsafe { receive.ring.take(token, &[], &mut [&mut receive.buffers[index]]) };
        let written = taken.expect("the device gave back what it did not have");
        // Too short for a header: an empty frame, which is dropped further up.
        let frame = receive.buffers[index].get(HEADER_BYTES..written).unwrap_or_default();
        let result = use_frame(frame);
        receive.offer(index);
        result
    }
}

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill_frame: F) -> R {
        let Self(transmit) = self;
        transmit.count -= 1;
        let index = transmit.free[transmit.count];
        let buffer = &mut transmit.buffers[usize::from(index)];
        let result = fill_frame(&mut buffer[HEADER_BYTES..HEADER_BYTES + length]);
        // The header stays as it was made, all zero.
        // SAFETY: the buffers are there for good, and this one is not touched before `take`.
        let token = unsafe { transmit.ring.add(&[&buffer[..HEADER_BYTES + length]], &mut []) };
        let token = token.expect("there are as many descriptors as buffers");
        transmit.held[usize::from(token)] = index;
        result
    }
}
