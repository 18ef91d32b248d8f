//! A guest: memory of two regions with a hole between them, rings anywhere, and a driver that does
//! as the input says.
//!
//! What enters: [`GuestAct`]s. What always holds: a ring that is given to a device has passed the
//! checks of the transport, as all do; what the rings and the memory contain is arbitrary.

use std::sync::Arc;
use std::sync::Mutex;

use arbitrary::{Arbitrary, Result, Unstructured};
use devices::virtio::device::{Activation, ActiveQueue, GuestMemory, Interrupt, QueuePosition};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const EVENT_IDX: u64 = 1 << 29;

/// Largest queue.
pub const SIZE_MAX: u16 = 64;
const REGION_BYTES: usize = 0x8_0000;
const SECOND: u64 = 0x10_0000;
const END: u64 = 0x18_0000;
/// Where well-placed rings are; each queue has a place of its own.
const RINGS: u64 = 0x1000;
const RING_BYTES: u64 = 0x4000;
/// Where the driver puts headers and data.
pub const DATA: u64 = 0x2_0000;
const DATA_END: u64 = 0x4_0000;
/// Places at whose sides things go wrong.
const EDGES: [u64; 6] = [0, 0x8_0000, SECOND, END, 1 << 32, u64::MAX];

/// An address that is often one that others have, too.
#[derive(Clone, Copy, Debug)]
pub struct Address(pub u64);

impl<'a> Arbitrary<'a> for Address {
    fn arbitrary(from: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self(match from.int_in_range(0..=7)? {
            0..=2 => DATA + u64::from(from.arbitrary::<u8>()?) * 16,
            3 => DATA + u64::from(from.arbitrary::<u16>()?),
            4 => u64::from(from.arbitrary::<u16>()?),
            5 => from.choose(&EDGES)?.wrapping_add_signed(i64::from(from.arbitrary::<i8>()?)),
            6 => SECOND + u64::from(from.arbitrary::<u16>()?),
            _ => from.arbitrary()?,
        }))
    }
}

/// A length that is often a usual one.
#[derive(Clone, Copy, Debug)]
pub struct Length(pub u32);

impl<'a> Arbitrary<'a> for Length {
    fn arbitrary(from: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self(match from.int_in_range(0..=7)? {
            0 => 1,
            1 => 16,
            2 => 512,
            3 => u32::from(from.arbitrary::<u8>()?) * 512,
            4 | 5 => u32::from(from.arbitrary::<u8>()?),
            6 => from.arbitrary::<u16>()?.into(),
            _ => from.arbitrary()?,
        }))
    }
}

/// A head or an index: mostly one within a queue.
#[derive(Clone, Copy, Debug)]
pub struct Slot(pub u16);

impl<'a> Arbitrary<'a> for Slot {
    fn arbitrary(from: &mut Unstructured<'a>) -> Result<Self> {
        let wild = from.ratio(1, 16)?;
        Ok(Self(if wild { from.arbitrary()? } else { from.int_in_range(0..=SIZE_MAX - 1)? }))
    }
}

/// As many as there are bytes for, at the end of an input. A plain list ends, on average, after two
/// elements: a bit of its own before each says whether there is one.
#[derive(Debug)]
pub struct Rest<T>(pub Vec<T>);

impl<'a, T: Arbitrary<'a>> Arbitrary<'a> for Rest<T> {
    fn arbitrary(from: &mut Unstructured<'a>) -> Result<Self> {
        let mut list = Vec::new();
        while !from.is_empty() {
            list.push(from.arbitrary()?);
        }
        Ok(Self(list))
    }
}

/// Bytes behind their number, which is often that of a small structure.
#[derive(Clone, Debug)]
pub struct Blob(pub Vec<u8>);

impl<'a> Arbitrary<'a> for Blob {
    fn arbitrary(from: &mut Unstructured<'a>) -> Result<Self> {
        let len = match from.int_in_range(0..=9)? {
            at @ 0..=7 => [0, 1, 2, 8, 16, 28, 32, 40][at],
            8 => from.arbitrary::<u8>()?.into(),
            _ => from.arbitrary::<u16>()?.into(),
        };
        let len = len.min(from.len());
        Ok(Self(from.bytes(len)?.to_vec()))
    }
}

/// Where a driver puts a queue. Taken as it is if the transport would.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Place {
    desc: Address,
    avail: Address,
    used: Address,
    size_shift: u8,
    position: u16,
    /// Used entries behind the available ones, as after a failed driver.
    behind: u8,
}

/// Part of a chain.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Part {
    pub address: Address,
    pub len: Length,
    pub writable: bool,
}

/// What a guest does with its memory.
#[derive(Arbitrary, Clone, Debug)]
pub enum GuestAct {
    /// A linked chain, offered; behind an indirect descriptor if so.
    Chain {
        queue: u8,
        parts: Vec<Part>,
        indirect: bool,
    },
    Descriptor {
        queue: u8,
        slot: Slot,
        address: Address,
        len: Length,
        flags: u16,
        next: Slot,
    },
    Offer {
        queue: u8,
        head: Slot,
    },
    /// Moves the available index.
    Jump {
        queue: u8,
        by: i8,
    },
    /// Which used entry the driver wants to hear of.
    Event {
        queue: u8,
        index: u16,
    },
    Poke {
        address: Address,
        bytes: Blob,
    },
    Kick {
        queue: u8,
    },
}

/// Hears a device.
#[derive(Default)]
pub struct Heard {
    pub resets: Mutex<Vec<String>>,
}

impl Interrupt for Heard {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
    fn needs_reset(&self, why: &str) {
        self.resets.lock().unwrap().push(why.to_owned());
    }
}

/// The driver's side of a queue.
pub struct Ring {
    pub index: u16,
    pub size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    /// As the transport would restore them.
    position: QueuePosition,
    slot: u16,
    available: u16,
    seen: u16,
    data: u64,
    doorbell: EventFd,
}

/// Guest memory and its rings.
pub struct Guest {
    pub memory: Arc<GuestMemory>,
    pub heard: Arc<Heard>,
    pub rings: Vec<Ring>,
}

impl Guest {
    /// A queue for each place, where `None` is a good one.
    pub fn new(places: impl IntoIterator<Item = Option<Place>>) -> Self {
        let ranges = [(GuestAddress(0), REGION_BYTES), (GuestAddress(SECOND), REGION_BYTES)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory"));
        let mut rings = Vec::new();
        for (index, place) in (0..).zip(places) {
            let ring = place.and_then(|place| Ring::placed(&memory, index, place));
            rings.push(ring.unwrap_or_else(|| Ring::at_home(index)));
        }
        let guest = Self { memory, heard: Arc::default(), rings };
        for ring in &guest.rings {
            guest.put(ring.avail + 2, &ring.available.to_le_bytes());
            guest.put(ring.used + 2, &ring.seen.to_le_bytes());
        }
        guest
    }

    /// A driver that has come to its senses: good places, empty rings, memory as it is.
    pub fn settle(&mut self) {
        for ring in &mut self.rings {
            *ring = Ring::at_home(ring.index);
        }
        let zeroes = vec![0; usize::try_from(RING_BYTES).expect("small") * self.rings.len()];
        self.put(RINGS, &zeroes);
        self.heard.resets.lock().unwrap().clear();
    }

    /// What the transport would hand to the device. Bells ring once, as after an activation.
    pub fn activation(&self, features: u64) -> Activation {
        let active = |ring: &Ring| ActiveQueue {
            index: ring.index,
            queue: ring.queue(features).expect("checked when placed"),
            doorbell: ring.doorbell.try_clone().expect("a descriptor"),
        };
        let queues = self.rings.iter().map(active).collect();
        self.rings.iter().for_each(Ring::kick);
        let (memory, interrupt) = (Arc::clone(&self.memory), Arc::clone(&self.heard));
        Activation { memory, features, queues, interrupt }
    }

    /// Where a restored device's queues go on.
    pub fn set_positions(&mut self, positions: &[QueuePosition]) {
        for position in positions {
            if let Some(ring) = self.rings.get_mut(usize::from(position.index)) {
                ring.position = *position;
            }
        }
    }

    /// Whether the device has said that it waits for its reset.
    pub fn must_reset(&self) -> bool {
        !self.heard.resets.lock().unwrap().is_empty()
    }

    pub fn act(&mut self, act: &GuestAct) {
        match act {
            GuestAct::Chain { queue, parts, indirect } => {
                let parts: Vec<_> = parts.iter().take(usize::from(SIZE_MAX)).collect();
                let parts: Vec<_> = parts
                    .iter()
                    .map(|part| (part.address.0, part.len.0, if part.writable { WRITE } else { 0 }))
                    .collect();
                if parts.is_empty() {
                    return;
                }
                let at = self.pick(*queue);
                let head =
                    if *indirect { self.indirect(at, &parts) } else { self.chain(at, &parts) };
                self.offer(at, head);
            }
            GuestAct::Descriptor { queue, slot, address, len, flags, next } => {
                let at = self.pick(*queue);
                let slot = slot.0 % self.rings[at].size;
                let descriptor = Descriptor::new(address.0, len.0, *flags, next.0);
                self.store(self.rings[at].desc, slot, descriptor);
            }
            GuestAct::Offer { queue, head } => self.offer(self.pick(*queue), head.0),
            GuestAct::Jump { queue, by } => {
                let at = self.pick(*queue);
                let available = self.rings[at].available.wrapping_add_signed(i16::from(*by));
                self.rings[at].available = available;
                self.put(self.rings[at].avail + 2, &available.to_le_bytes());
            }
            GuestAct::Event { queue, index } => {
                let ring = &self.rings[self.pick(*queue)];
                self.put(ring.avail + 4 + 2 * u64::from(ring.size), &index.to_le_bytes());
            }
            GuestAct::Poke { address, bytes } => {
                // One that does not fit is none.
                let _ = self.memory.write_slice(&bytes.0, GuestAddress(address.0));
            }
            GuestAct::Kick { queue } => self.rings[self.pick(*queue)].kick(),
        }
    }

    fn pick(&self, queue: u8) -> usize {
        usize::from(queue) % self.rings.len()
    }

    /// Puts bytes where there is memory for sure.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).expect("a place in memory");
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).expect("a place in memory");
        bytes
    }

    /// Room for data of ring `at`.
    pub fn room(&mut self, at: usize, len: usize) -> u64 {
        let ring = &mut self.rings[at];
        let len = u64::try_from(len).expect("small").next_multiple_of(16);
        if ring.data + len > DATA_END {
            ring.data = DATA;
        }
        let place = ring.data;
        ring.data += len;
        place
    }

    pub fn place(&mut self, at: usize, bytes: &[u8]) -> u64 {
        let place = self.room(at, bytes.len());
        self.put(place, bytes);
        place
    }

    fn store(&self, table: u64, slot: u16, descriptor: Descriptor) {
        // A table of a wild chain may be anywhere.
        let at = GuestAddress(table + 16 * u64::from(slot));
        let _ = self.memory.write_obj(descriptor, at);
    }

    /// Links (address, length, flags) and gives the head.
    pub fn chain(&mut self, at: usize, parts: &[(u64, u32, u16)]) -> u16 {
        let ring = &self.rings[at];
        let (desc, size, head) = (ring.desc, ring.size, ring.slot);
        let mut slot = head;
        for (number, (address, len, flags)) in parts.iter().enumerate() {
            let next = (slot + 1) % size;
            let more = if number + 1 < parts.len() { NEXT } else { 0 };
            self.store(desc, slot, Descriptor::new(*address, *len, flags | more, next));
            slot = next;
        }
        self.rings[at].slot = slot;
        head
    }

    fn indirect(&mut self, at: usize, parts: &[(u64, u32, u16)]) -> u16 {
        let table = self.room(at, parts.len() * 16);
        for (number, (address, len, flags)) in (0u16..).zip(parts) {
            let more = if usize::from(number) + 1 < parts.len() { NEXT } else { 0 };
            self.store(table, number, Descriptor::new(*address, *len, flags | more, number + 1));
        }
        let len = u32::try_from(parts.len() * 16).expect("small");
        self.chain(at, &[(table, len, INDIRECT)])
    }

    pub fn offer(&mut self, at: usize, head: u16) {
        let ring = &mut self.rings[at];
        let place = ring.avail + 4 + 2 * u64::from(ring.available % ring.size);
        ring.available = ring.available.wrapping_add(1);
        let (index, available) = (ring.avail + 2, ring.available);
        self.put(place, &head.to_le_bytes());
        self.put(index, &available.to_le_bytes());
    }

    /// The next used entry: head and length.
    pub fn used(&mut self, at: usize) -> Option<(u32, u32)> {
        let ring = &self.rings[at];
        if self.get(ring.used + 2, 2) == ring.seen.to_le_bytes() {
            return None;
        }
        let entry = self.get(ring.used + 4 + 8 * u64::from(ring.seen % ring.size), 8);
        self.rings[at].seen = self.rings[at].seen.wrapping_add(1);
        let word =
            |from: usize| u32::from_le_bytes(entry[from..from + 4].try_into().expect("four"));
        Some((word(0), word(4)))
    }
}

impl Ring {
    fn at_home(index: u16) -> Self {
        let desc = RINGS + RING_BYTES * u64::from(index);
        Self::new(index, SIZE_MAX, [desc, desc + 0x1000, desc + 0x2000])
    }

    fn new(index: u16, size: u16, [desc, avail, used]: [u64; 3]) -> Self {
        Self {
            index,
            size,
            desc,
            avail,
            used,
            position: QueuePosition { index, ..QueuePosition::default() },
            slot: 0,
            available: 0,
            seen: 0,
            data: DATA,
            doorbell: EventFd::new(EFD_NONBLOCK).expect("a descriptor"),
        }
    }

    /// A ring where the driver wants it, unless the transport refuses it.
    fn placed(memory: &GuestMemory, index: u16, place: Place) -> Option<Self> {
        let size = 1 << (place.size_shift % 7);
        let places = [place.desc.0 & !15, place.avail.0 & !1, place.used.0 & !3];
        let mut ring = Self::new(index, size, places);
        let bytes = usize::from(size);
        let lens = [16 * bytes, 6 + 2 * bytes, 6 + 8 * bytes];
        let inside = |(at, len): (u64, usize)| at != 0 && memory.check_range(GuestAddress(at), len);
        if !places.into_iter().zip(lens).all(inside) || ring.queue(0).is_none() {
            return None;
        }
        ring.available = place.position;
        ring.seen = place.position.wrapping_sub(u16::from(place.behind));
        ring.position = QueuePosition { index, next_avail: ring.available, next_used: ring.seen };
        Some(ring)
    }

    /// As the transport makes it of its registers.
    fn queue(&self, features: u64) -> Option<Queue> {
        let queue = Queue::try_from(QueueState {
            max_size: SIZE_MAX,
            next_avail: self.position.next_avail,
            next_used: self.position.next_used,
            event_idx_enabled: features & EVENT_IDX != 0,
            size: self.size,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        });
        queue.ok().filter(|queue| queue.ready())
    }

    pub fn kick(&self) {
        self.doorbell.write(1).expect("a bell");
    }
}
