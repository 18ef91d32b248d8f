//! What a disk is made from.

use std::path::PathBuf;

use thiserror::Error;

use super::image::{ImageError, probe};

/// Most queues of a disk.
pub const QUEUES_MAX: u16 = 256;
/// Largest queue of a disk.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Most requests in flight of a disk: queues by their size.
pub const IN_FLIGHT_MAX: u32 = 16384;

/// How the image's format is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageType {
    /// Raw unless its first bytes are those of another format, which is refused: a guest that
    /// wrote them to a raw disk must not have the host read it as something else later.
    #[default]
    Detect,
    /// Raw whatever its first bytes are.
    Raw,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkConfig {
    /// The device's name, as in `vm.info`.
    pub id: String,
    /// A file or a block device.
    pub path: PathBuf,
    pub image_type: ImageType,
    pub readonly: bool,
    /// Past the host's page cache (O_DIRECT).
    pub direct: bool,
    /// 1 to [`QUEUES_MAX`].
    pub num_queues: u16,
    /// A power of two up to [`QUEUE_SIZE_MAX`].
    pub queue_size: u16,
    /// The guest may give back room of the image: a discard, and zeroes, make holes in it.
    pub sparse: bool,
    /// What the guest reads as identification, 20 bytes of it; the id where absent.
    pub serial: Option<String>,
}

impl Default for BlkConfig {
    fn default() -> Self {
        Self {
            id: String::new(),
            path: PathBuf::new(),
            image_type: ImageType::default(),
            readonly: false,
            direct: false,
            num_queues: 1,
            queue_size: 128,
            sparse: true,
            serial: None,
        }
    }
}

/// A disk cannot be made.
#[derive(Debug, Error)]
pub enum BlkError {
    #[error("A disk has 1 to {QUEUES_MAX} queues, not {0}")]
    Queues(u16),
    #[error("A disk's queue size is a power of two from 2 to {QUEUE_SIZE_MAX}, not {0}")]
    QueueSize(u16),
    #[error("The disk's queues hold {0} requests, more than {IN_FLIGHT_MAX}")]
    InFlight(u32),
    #[error("The disk's image is not usable")]
    Image(#[source] ImageError),
}

impl BlkConfig {
    /// Checks the numbers, and looks at the image without locking it. The image's size in bytes.
    pub(super) fn validate(&self) -> Result<u64, BlkError> {
        if !(1..=QUEUES_MAX).contains(&self.num_queues) {
            return Err(BlkError::Queues(self.num_queues));
        }
        let size = self.queue_size;
        if !(2..=QUEUE_SIZE_MAX).contains(&size) || !size.is_power_of_two() {
            return Err(BlkError::QueueSize(size));
        }
        let in_flight = u32::from(self.num_queues) * u32::from(size);
        if in_flight > IN_FLIGHT_MAX {
            return Err(BlkError::InFlight(in_flight));
        }
        probe(&self.path, self.image_type).map_err(BlkError::Image)
    }

    /// What GET_ID answers.
    pub(super) fn identification(&self) -> [u8; 20] {
        let text = self.serial.as_ref().unwrap_or(&self.id).as_bytes();
        let mut bytes = [0; 20];
        let len = text.len().min(bytes.len());
        bytes[..len].copy_from_slice(&text[..len]);
        bytes
    }

    /// The name of a thread of the disk: its id, cut so that the whole is at most 15 bytes, the
    /// most that the kernel keeps.
    pub(super) fn thread_name(&self, suffix: &str) -> String {
        let mut len = self.id.len().min(15_usize.saturating_sub(suffix.len()));
        while !self.id.is_char_boundary(len) {
            len -= 1;
        }
        format!("{}{suffix}", &self.id[..len])
    }
}
