//! Features and configuration space, virtio 1.2 sections 5.2.3 and 5.2.4.

use super::config::BlkConfig;

/// The unit of capacities and positions (virtio 1.2, 5.2.4), whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
pub(super) const SECTOR_SHIFT: u32 = 9;
/// Bytes of an identification (virtio 1.2, 5.2.6).
pub(super) const SERIAL_BYTES: u64 = 20;

/// Most segments of data in a request.
const SEGMENTS_MAX: u16 = 254;
/// 2 GiB: the file system is only told, so this takes no time.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 22;
/// 64 MiB: where the file system cannot zero a range, that much is written.
pub(super) const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 17;
/// What file systems can free: 4 KiB.
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;
/// 4 KiB physical blocks of 512-byte logical ones.
const PHYSICAL_BLOCK_EXP: u8 = 3;

pub(super) const F_SEG_MAX: u64 = 1 << 2;
pub(super) const F_RO: u64 = 1 << 5;
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_FLUSH: u64 = 1 << 9;
pub(super) const F_TOPOLOGY: u64 = 1 << 10;
pub(super) const F_MQ: u64 = 1 << 12;
pub(super) const F_DISCARD: u64 = 1 << 13;
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;
pub(super) const F_INDIRECT_DESC: u64 = 1 << 28;
pub(super) const F_EVENT_IDX: u64 = 1 << 29;

/// What a disk offers.
pub(super) fn features(config: &BlkConfig) -> u64 {
    let mut features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ;
    features |= F_INDIRECT_DESC | F_EVENT_IDX;
    features |= match (config.readonly, config.sparse) {
        (true, _) => F_RO,
        (false, true) => F_DISCARD | F_WRITE_ZEROES,
        (false, false) => F_WRITE_ZEROES,
    };
    features
}

/// Bytes of [`config_space`].
pub(super) const CONFIG_BYTES: usize = 60;

/// The configuration space up to the fields of features that are not offered.
pub(super) fn config_space(config: &BlkConfig, capacity_sectors: u64) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, field: &[u8]| space[at..at + field.len()].copy_from_slice(field);
    // A driver puts a header and a status around the data, and a small queue has no more room.
    let segments = u32::from(SEGMENTS_MAX.min(config.queue_size.saturating_sub(2)).max(1));
    put(0, &capacity_sectors.to_le_bytes());
    // 8: size_max and 16: geometry are not offered.
    put(12, &segments.to_le_bytes());
    put(20, &512u32.to_le_bytes());
    // Topology: exponent, alignment offset, and the suggested minimal and optimal sizes in blocks.
    put(24, &[PHYSICAL_BLOCK_EXP, 0]);
    put(26, &(1u16 << PHYSICAL_BLOCK_EXP).to_le_bytes());
    // 32: writeback belongs to CONFIG_WCE.
    put(34, &config.num_queues.to_le_bytes());
    let offered = features(config);
    if offered & F_DISCARD != 0 {
        put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
    }
    if offered & F_WRITE_ZEROES != 0 {
        put(48, &WRITE_ZEROES_SECTORS_MAX.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        // Zeroes may give room back.
        put(56, &[config.sparse.into()]);
    }
    space
}
