//! Where things are in a virtio function: its identity, its capabilities and its BAR.
//!
//! | BAR 0 | What | virtio 1.2 |
//! |---|---|---|
//! | 0x0000 | common configuration | 4.1.4.3 |
//! | 0x1000 | interrupt status | 4.1.4.5 |
//! | 0x2000 | device configuration | 4.1.4.6 |
//! | 0x3000 | notifications, 4 bytes a queue | 4.1.4.4 |
//! | 0x4000 | MSI-X table | |
//! | 0x6000 | MSI-X pending bits | |

use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{CAPABILITY_MSIX, Msix};
use crate::virtio::device::DeviceType;

/// Bytes of the BAR.
pub const BAR_BYTES: u64 = 0x8000;
/// Most queues of a device: their doorbells and vectors have room in the BAR.
pub const QUEUES_MAX: usize = 256;

pub(super) const COMMON: u64 = 0;
/// Without the registers of VIRTIO_F_NOTIF_CONFIG_DATA and VIRTIO_F_RING_RESET.
pub(super) const COMMON_BYTES: u64 = 0x38;
pub(super) const ISR: u64 = 0x1000;
pub(super) const ISR_BYTES: u64 = 1;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const DEVICE_BYTES: u64 = 0x1000;
pub(super) const NOTIFY: u64 = 0x3000;
pub(super) const NOTIFY_BYTES: u64 = 0x1000;
pub(super) const NOTIFY_MULTIPLIER: u64 = 4;
pub(super) const TABLE: u64 = 0x4000;
pub(super) const PENDING: u64 = 0x6000;

const VENDOR: u16 = 0x1af4;
/// Modern device ids begin here (4.1.2).
const DEVICE_BASE: u16 = 0x1040;
/// At least 1 for a device that is not transitional (4.1.2.2).
const REVISION: u8 = 1;
/// At least 0x40 for such a device (4.1.2.1).
const SUBSYSTEM: u16 = 0x40;

const CAPABILITY_VENDOR: u8 = 0x09;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// Bytes of `struct virtio_pci_cap` past its id and link.
const CAP_BODY: usize = 14;
const CAP_BAR: usize = 4;
const CAP_OFFSET: usize = 8;
const CAP_LENGTH: usize = 12;
const CAP_DATA: usize = 16;

/// A function's configuration space, and where in it the two capabilities with an effect are.
pub(super) struct Layout {
    pub config: ConfigSpace,
    pub msix: usize,
    pub access: usize,
}

pub(super) fn build(kind: DeviceType, vectors: u16, base: u64) -> Layout {
    let mut config = ConfigSpace::new(&identity(kind));
    config.set_memory_bar(base, BAR_BYTES);
    let plain = |kind, offset, len| vendor_capability(kind, offset, len, &[]);
    let fixed = |config: &mut ConfigSpace, body: &[u8]| {
        config.add_capability(CAPABILITY_VENDOR, body, &vec![0; body.len()]);
    };
    fixed(&mut config, &plain(COMMON_CFG, COMMON, COMMON_BYTES));
    fixed(&mut config, &plain(ISR_CFG, ISR, ISR_BYTES));
    fixed(&mut config, &plain(DEVICE_CFG, DEVICE, DEVICE_BYTES));
    let multiplier = word(NOTIFY_MULTIPLIER);
    fixed(&mut config, &vendor_capability(NOTIFY_CFG, NOTIFY, NOTIFY_BYTES, &multiplier));
    // Access through configuration space (4.1.4.9): bar, offset, length and data are the driver's.
    let body = vendor_capability(PCI_CFG, 0, 0, &[0; 4]);
    let mut writable = vec![0; body.len()];
    writable[CAP_BAR - 2] = 0xff;
    writable[CAP_OFFSET - 2..].fill(0xff);
    let access = config.add_capability(CAPABILITY_VENDOR, &body, &writable);
    let (body, writable) = Msix::capability(
        vectors,
        u32::from_le_bytes(word(TABLE)),
        u32::from_le_bytes(word(PENDING)),
    );
    let msix = config.add_capability(CAPABILITY_MSIX, &body, &writable);
    Layout { config, msix, access }
}

fn identity(kind: DeviceType) -> Identity {
    let (number, class) = match kind {
        DeviceType::Net => (1, 0x02_0000),
        DeviceType::Block => (2, 0x01_8000),
        DeviceType::Console => (3, 0x07_8000),
        DeviceType::Entropy => (4, 0xff_0000),
    };
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + number,
        revision: REVISION,
        class,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    }
}

/// `struct virtio_pci_cap` (4.1.4) past its id and link, and what follows it.
fn vendor_capability(kind: u8, offset: u64, len: u64, rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(CAP_BODY + rest.len());
    let size = u8::try_from(2 + CAP_BODY + rest.len()).unwrap_or(u8::MAX);
    // BAR 0, id 0, two bytes of padding.
    body.extend([size, kind, 0, 0, 0, 0]);
    body.extend(word(offset));
    body.extend(word(len));
    body.extend(rest);
    body
}

fn word(value: u64) -> [u8; 4] {
    u32::try_from(value).unwrap_or(0).to_le_bytes()
}

/// What the driver set up in the access capability: a place in the BAR, 1, 2 or 4 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub offset: u64,
    pub len: usize,
}

/// The access that touching `at..at + len` of configuration space is to make, if any.
pub(super) fn access(
    config: &ConfigSpace,
    capability: usize,
    at: usize,
    len: usize,
) -> Option<Access> {
    let data = data_of(capability);
    if at >= data + 4 || at.saturating_add(len) <= data {
        return None;
    }
    let bar = config.u8_at(capability + CAP_BAR);
    let offset = u64::from(config.u32_at(capability + CAP_OFFSET));
    let width = config.u32_at(capability + CAP_LENGTH);
    let fits = matches!(width, 1 | 2 | 4)
        && offset.is_multiple_of(width.into())
        && offset + u64::from(width) <= BAR_BYTES;
    (bar == 0 && fits).then_some(Access { offset, len: usize::try_from(width).ok()? })
}

/// Where the access capability's data is.
pub(super) fn data_of(capability: usize) -> usize {
    capability + CAP_DATA
}
