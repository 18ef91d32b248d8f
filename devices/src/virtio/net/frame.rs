//! Frames as driver and tap exchange them: a header, then Ethernet (virtio 1.2, 5.1.6).
//!
//! | Bytes | Field |
//! |---|---|
//! | 0 | `flags` |
//! | 1 | `gso_type` |
//! | 2..10 | `hdr_len`, `gso_size`, `csum_start`, `csum_offset` |
//! | 10..12 | `num_buffers` |

use super::mac::{MAC_BYTES, MacAddress};

/// Bytes of the header: a modern device always has `num_buffers`.
pub const HEADER_BYTES: usize = 12;
/// Bytes of an Ethernet header.
pub const ETHERNET_BYTES: usize = 14;
/// Longest Ethernet frame: a packet of 64 KiB and two VLAN tags.
pub const ETHERNET_BYTES_MAX: usize = ETHERNET_BYTES + 2 * 4 + (64 << 10);
/// Longest frame with its header.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + ETHERNET_BYTES_MAX;
/// Shortest frame with its header.
pub const FRAME_BYTES_MIN: usize = HEADER_BYTES + ETHERNET_BYTES;

/// `flags`: the checksum is yet to be made.
const NEEDS_CSUM: u8 = 1;

pub const GSO_NONE: u8 = 0;
pub const GSO_TCPV4: u8 = 1;
pub const GSO_UDP: u8 = 3;
pub const GSO_TCPV6: u8 = 4;
pub const GSO_ECN: u8 = 0x80;

/// The header at the start of a frame.
#[derive(Debug)]
pub struct FrameHeader<'a>(&'a mut [u8; HEADER_BYTES]);

impl<'a> FrameHeader<'a> {
    /// The header of `frame`, unless it is too short for one.
    pub fn new(frame: &'a mut [u8]) -> Option<Self> {
        frame.first_chunk_mut().map(Self)
    }

    #[must_use]
    pub fn needs_checksum(&self) -> bool {
        self.0[0] & NEEDS_CSUM != 0
    }

    pub fn clear_flags(&mut self) {
        self.0[0] = 0;
    }

    #[must_use]
    pub fn gso_type(&self) -> u8 {
        self.0[1]
    }

    /// Over how many buffers the frame is spread (5.1.6.3.1).
    pub fn set_buffers(&mut self, buffers: u16) {
        self.0[10..12].copy_from_slice(&buffers.to_le_bytes());
    }
}

/// Bytes of an announcement, padded to Ethernet's shortest frame.
pub const ANNOUNCEMENT_BYTES: usize = HEADER_BYTES + 60;

/// "Who knows my address", a reverse ARP request (RFC 903) from `mac` to everybody: nobody needs
/// to answer, but every switch on the way learns on which of its ports `mac` is now.
#[must_use]
pub fn announcement(mac: MacAddress) -> [u8; ANNOUNCEMENT_BYTES] {
    const ETHERTYPE_RARP: u16 = 0x8035;
    const HARDWARE_ETHERNET: u16 = 1;
    const PROTOCOL_IPV4: u16 = 0x0800;
    const REQUEST_REVERSE: u16 = 3;

    let mac = mac.bytes();
    let mut frame = [0; ANNOUNCEMENT_BYTES];
    let mut at = HEADER_BYTES;
    let mut put = |bytes: &[u8]| {
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&[0xff; MAC_BYTES]);
    put(&mac);
    put(&ETHERTYPE_RARP.to_be_bytes());
    put(&HARDWARE_ETHERNET.to_be_bytes());
    put(&PROTOCOL_IPV4.to_be_bytes());
    // Lengths of both kinds of address.
    put(&[6, 4]);
    put(&REQUEST_REVERSE.to_be_bytes());
    // Sender and target: the same station, whose IPv4 address is the question.
    for _ in 0..2 {
        put(&mac);
        put(&[0; 4]);
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_a_reverse_arp_request() {
        let frame = announcement("52:54:00:12:34:56".parse().unwrap());
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        assert_eq!(frame.len(), 72);
        assert_eq!(frame[..12], [0; 12], "header");
        assert_eq!(frame[12..18], [0xff; 6], "destination");
        assert_eq!(frame[18..24], mac, "source");
        assert_eq!(frame[24..26], [0x80, 0x35], "type");
        assert_eq!(frame[26..34], [0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(frame[34..40], mac, "sender");
        assert_eq!(frame[44..50], mac, "target");
        assert_eq!(frame[50..], [0; 22], "no address and padding");
    }
}
