//! Feature bits and the configuration space (virtio 1.2, 5.1.3 and 5.1.4).
//!
//! What enters: what the configuration allows and what the driver accepted. What leaves: the bits
//! on offer, the offloads of the receive path ([`GuestOffloads`]) and the bytes that the driver
//! reads. What always holds: the bits on offer depend on the configuration alone, never on the
//! host, so that primary and backup offer the same.

use super::frame::{FrameHeader, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP};

use virtio_bindings::virtio_net as bits;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Bytes of the configuration space, up to and with `mtu`: what comes after belongs to features
/// that are not on offer.
pub const CONFIG_BYTES: usize = 12;

/// `status`: the link is up.
const STATUS_LINK_UP: u16 = 1;
/// `status`: the driver shall tell the network where it is (5.1.6.5.4).
const STATUS_ANNOUNCE: u16 = 2;

pub const CSUM: u64 = 1 << bits::VIRTIO_NET_F_CSUM;
pub const GUEST_CSUM: u64 = 1 << bits::VIRTIO_NET_F_GUEST_CSUM;
pub const CTRL_GUEST_OFFLOADS: u64 = 1 << bits::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
pub const MTU: u64 = 1 << bits::VIRTIO_NET_F_MTU;
pub const MAC: u64 = 1 << bits::VIRTIO_NET_F_MAC;
pub const GUEST_TSO4: u64 = 1 << bits::VIRTIO_NET_F_GUEST_TSO4;
pub const GUEST_TSO6: u64 = 1 << bits::VIRTIO_NET_F_GUEST_TSO6;
pub const GUEST_ECN: u64 = 1 << bits::VIRTIO_NET_F_GUEST_ECN;
pub const GUEST_UFO: u64 = 1 << bits::VIRTIO_NET_F_GUEST_UFO;
pub const HOST_TSO4: u64 = 1 << bits::VIRTIO_NET_F_HOST_TSO4;
pub const HOST_TSO6: u64 = 1 << bits::VIRTIO_NET_F_HOST_TSO6;
pub const HOST_ECN: u64 = 1 << bits::VIRTIO_NET_F_HOST_ECN;
pub const HOST_UFO: u64 = 1 << bits::VIRTIO_NET_F_HOST_UFO;
pub const MRG_RXBUF: u64 = 1 << bits::VIRTIO_NET_F_MRG_RXBUF;
pub const STATUS: u64 = 1 << bits::VIRTIO_NET_F_STATUS;
pub const CTRL_VQ: u64 = 1 << bits::VIRTIO_NET_F_CTRL_VQ;
pub const GUEST_ANNOUNCE: u64 = 1 << bits::VIRTIO_NET_F_GUEST_ANNOUNCE;
pub const MQ: u64 = 1 << bits::VIRTIO_NET_F_MQ;
pub const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// All bits that say what the guest can receive.
const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO;

/// Which offloads a configuration allows, in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums. Segmentation needs them, so without them there is none (5.1.3.1).
    pub csum: bool,
    /// TCP segmentation, with or without congestion marks.
    pub tso: bool,
    /// UDP fragmentation.
    pub ufo: bool,
}

/// The bits on offer.
#[must_use]
pub fn offered(offloads: Offloads, pairs: u16, mtu: bool) -> u64 {
    let mut features = MAC | STATUS | MRG_RXBUF | CTRL_VQ | GUEST_ANNOUNCE;
    features |= INDIRECT_DESC | EVENT_IDX;
    if mtu {
        features |= MTU;
    }
    if pairs > 1 {
        features |= MQ;
    }
    if offloads.csum {
        features |= CSUM | GUEST_CSUM | CTRL_GUEST_OFFLOADS;
        if offloads.tso {
            features |= HOST_TSO4 | HOST_TSO6 | HOST_ECN | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;
        }
        if offloads.ufo {
            features |= HOST_UFO | GUEST_UFO;
        }
    }
    features
}

/// What the guest can receive unprepared: a set of GUEST_ feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestOffloads(u64);

impl GuestOffloads {
    /// The offloads among `features`, all of which are on after activation (5.1.6.5.6).
    #[must_use]
    pub fn negotiated(features: u64) -> Self {
        Self(features & GUEST_OFFLOADS)
    }

    /// The set of bits `set`, where the driver negotiated each.
    #[must_use]
    pub fn chosen(set: u64, features: u64) -> Option<Self> {
        (set & !(features & GUEST_OFFLOADS) == 0).then_some(Self(set))
    }

    /// The feature bits.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Whether segmentation of the kinds `feature` reaches the guest. None of it does without
    /// checksums, whatever a driver accepted.
    #[must_use]
    pub fn has(self, feature: u64) -> bool {
        self.0 & GUEST_CSUM != 0 && self.0 & feature == feature
    }

    /// Whether the guest can take a frame with this header, from which a hint that it did not
    /// ask for is removed. A frame that it cannot take was queued before it chose.
    #[must_use]
    pub fn admit(self, header: &mut FrameHeader<'_>) -> bool {
        if !self.has(GUEST_CSUM) {
            if header.needs_checksum() {
                return false;
            }
            header.clear_flags();
        }
        let gso = header.gso_type();
        if gso & GSO_ECN != 0 && !self.has(GUEST_ECN) {
            return false;
        }
        match gso & !GSO_ECN {
            GSO_NONE => true,
            GSO_TCPV4 => self.has(GUEST_TSO4),
            GSO_TCPV6 => self.has(GUEST_TSO6),
            GSO_UDP => self.has(GUEST_UFO),
            _ => false,
        }
    }
}

/// What the configuration space says.
#[derive(Clone, Copy, Debug)]
pub struct ConfigSpace {
    pub mac: [u8; 6],
    /// The driver shall announce itself.
    pub announce: bool,
    pub queue_pairs_max: u16,
    /// Zero where the feature is not on offer.
    pub mtu: u16,
}

impl ConfigSpace {
    /// The layout of `struct virtio_net_config` (5.1.4), little endian.
    #[must_use]
    pub fn bytes(&self) -> [u8; CONFIG_BYTES] {
        let status = STATUS_LINK_UP | if self.announce { STATUS_ANNOUNCE } else { 0 };
        let mut bytes = [0; CONFIG_BYTES];
        bytes[..6].copy_from_slice(&self.mac);
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.queue_pairs_max.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        bytes
    }

    /// Fills `data` from `offset` on, with zeroes past the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(CONFIG_BYTES);
        let len = data.len().min(CONFIG_BYTES - start);
        data[..len].copy_from_slice(&bytes[start..start + len]);
        data[len..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::net::frame::HEADER_BYTES;

    const ALL: Offloads = Offloads { csum: true, tso: true, ufo: true };

    #[test]
    fn the_offer_follows_the_configuration() {
        let all = offered(ALL, 2, true);
        for bit in [0, 1, 2, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 21, 22, 28, 29] {
            assert_ne!(all & (1 << bit), 0, "bit {bit}");
        }
        assert_eq!(all.count_ones(), 20);
        let one = offered(ALL, 1, false);
        assert_eq!(all & !one, MQ | MTU);
        let no_tso = offered(Offloads { tso: false, ..ALL }, 1, false);
        assert_eq!(one & !no_tso, (0b111 << 7) | (0b111 << 11));
        let no_ufo = offered(Offloads { ufo: false, ..ALL }, 1, false);
        assert_eq!(one & !no_ufo, GUEST_UFO | HOST_UFO);
        let bare = offered(Offloads { csum: false, ..ALL }, 1, false);
        assert_eq!(bare & (GUEST_OFFLOADS | CSUM | HOST_TSO4 | HOST_UFO), 0);
    }

    #[test]
    fn the_configuration_space_has_the_layout_of_the_specification() {
        let config = ConfigSpace {
            mac: [0x52, 0x54, 0, 1, 2, 3],
            announce: true,
            queue_pairs_max: 0x0102,
            mtu: 9000,
        };
        let mut all = [0xff; 16];
        config.read(0, &mut all);
        assert_eq!(all, [0x52, 0x54, 0, 1, 2, 3, 3, 0, 2, 1, 0x28, 0x23, 0, 0, 0, 0]);
        let mut mtu = [0xff; 4];
        config.read(10, &mut mtu);
        assert_eq!(mtu, [0x28, 0x23, 0, 0]);
        for far in [12, 4096, u64::MAX] {
            let mut nothing = [0xff; 2];
            config.read(far, &mut nothing);
            assert_eq!(nothing, [0, 0]);
        }
        let mut status = [0; 2];
        ConfigSpace { announce: false, ..config }.read(6, &mut status);
        assert_eq!(u16::from_le_bytes(status), 1);
    }

    #[test]
    fn a_guest_receives_only_what_it_can() {
        let admit = |offloads: GuestOffloads, flags: u8, gso: u8| {
            let mut bytes = [0; HEADER_BYTES];
            (bytes[0], bytes[1]) = (flags, gso);
            let taken = offloads.admit(&mut FrameHeader::new(&mut bytes).unwrap());
            (taken, bytes[0])
        };
        let features = GUEST_CSUM | GUEST_TSO4;
        let offloads = GuestOffloads::negotiated(features | MRG_RXBUF);
        assert_eq!(admit(offloads, 1, GSO_TCPV4), (true, 1));
        assert_eq!(admit(offloads, 1, GSO_TCPV4 | GSO_ECN), (false, 1));
        assert_eq!(admit(offloads, 1, GSO_TCPV6), (false, 1));
        assert_eq!(admit(offloads, 1, GSO_UDP), (false, 1));
        assert_eq!(admit(offloads, 0, 77), (false, 0));
        let none = GuestOffloads::chosen(0, features).unwrap();
        assert_eq!(admit(none, 1, 0), (false, 1));
        assert_eq!(admit(none, 2, 0), (true, 0), "an unasked hint is removed");
        assert_eq!(GuestOffloads::chosen(GUEST_TSO6, features), None);
        // A driver that accepted segmentation without checksums gets neither.
        let odd = GuestOffloads::negotiated(GUEST_TSO4);
        assert_eq!(admit(odd, 0, GSO_TCPV4), (false, 0));
    }
}
