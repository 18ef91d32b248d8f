//! What two hosts tell each other to connect, and how patient a connection is.

use std::time::Duration;

use crate::context::mtu_code;
use crate::error::Error;
use crate::memory::Access;

/// Queue pair numbers and packet sequence numbers have so many bits.
const NUMBER_MASK: u32 = (1 << 24) - 1;
/// The unit of `timeout`.
const TIMEOUT_UNIT: Duration = Duration::from_nanos(4096);

/// One end of a connection, as the other one must know it. Plain numbers, to be sent over a connection
/// that is trusted: whoever knows them, and a key, may write into the region that the key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// 24 bits.
    pub queue_pair: u32,
    /// The sequence number of this end's first packet; 24 bits.
    pub packet_number: u32,
    /// IPv6, or IPv4 mapped into it, on Ethernet.
    pub gid: [u8; 16],
    /// InfiniBand's local address; 0 on Ethernet.
    pub lid: u16,
    /// 256, 512, 1024, 2048 or 4096: the port's; the smaller one of both ends' is used.
    pub mtu_bytes: u16,
    /// READs that this end answers at a time.
    pub reads_answered: u8,
}

impl Endpoint {
    /// Checks what a peer said of itself.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let refuse = |what: String| Err(Error::Endpoint { what });
        if self.queue_pair > NUMBER_MASK || self.queue_pair < 2 {
            return refuse(format!("no queue pair has the number {}", self.queue_pair));
        }
        if self.packet_number > NUMBER_MASK {
            return refuse(format!("{} is no sequence number of 24 bits", self.packet_number));
        }
        if mtu_code(self.mtu_bytes).is_none() {
            return refuse(format!("packets have no {} bytes", self.mtu_bytes));
        }
        if self.gid == [0; 16] && self.lid == 0 {
            return refuse("it has neither a GID nor a LID".to_owned());
        }
        Ok(())
    }

    /// A number of 24 bits that nobody can guess from the last one.
    pub(crate) fn packet_number(random: u32) -> u32 {
        random & NUMBER_MASK
    }
}

/// How much a queue pair is to hold. The device may grant more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depths {
    /// Requests that were posted and have not completed.
    pub sends: u32,
    /// Receives that were posted and have not completed.
    pub receives: u32,
    /// Segments of a request.
    pub send_segments: u32,
    /// Segments of a receive; 1 at least, also if all receives are empty.
    pub receive_segments: u32,
    /// Of a SEND whose bytes are copied when it is posted.
    pub inline_bytes: u32,
}

impl Default for Depths {
    fn default() -> Self {
        Self { sends: 128, receives: 128, send_segments: 16, receive_segments: 1, inline_bytes: 64 }
    }
}

/// How a queue pair is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectOptions {
    /// The largest payload of a packet; the ports' is used where it is smaller. Default 4096.
    pub mtu_bytes_max: u16,
    /// How long a packet may go without an answer before it is sent again: 4.096 us * 2^timeout, 0 to
    /// 31, where 0 is for ever. Devices take up to four times as long, and some have a least value of
    /// half a second. Default 14: 67 ms.
    pub timeout: u8,
    /// How often a packet is sent again without an answer, 0 to 7, before the connection fails. With
    /// the time above: 7 * 67 ms, half a second, by default 6: Soft-RoCE takes 7 for "for ever", and never says
    /// that a peer is gone.
    pub retries: u8,
    /// How often a packet is sent again that found no receive posted, 0 to 6; 7 is for ever. Default 7:
    /// a receiver that is late is slow, not dead.
    pub receiver_retries: u8,
    /// How long this end asks the peer to wait when it has no receive posted: the IB specification's
    /// code, 0 to 31; 1 is 0.01 ms, 12 is 0.64 ms, 31 is 491 ms, 0 is 655 ms. Default 12.
    pub receiver_wait: u8,
    /// READs of ours under way, at most as many as the peer answers and the device does. Default 16.
    pub reads_begun_max: u8,
    /// Routers that packets may cross (the IP header's hop limit). Default 64.
    pub hop_limit: u8,
    /// The IP header's traffic class: six bits DSCP, two bits ECN. Default 0.
    pub traffic_class: u8,
    /// InfiniBand's service level, 0 to 15; on Ethernet the first three bits are the priority of a
    /// VLAN. Default 0.
    pub service_level: u8,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            mtu_bytes_max: 4096,
            timeout: 14,
            retries: 6,
            receiver_retries: 7,
            receiver_wait: 12,
            reads_begun_max: 16,
            hop_limit: 64,
            traffic_class: 0,
            service_level: 0,
        }
    }
}

impl ConnectOptions {
    /// The code of the shortest timeout that is at least this long.
    #[must_use]
    pub fn timeout_of(least: Duration) -> u8 {
        (1..31).find(|code| TIMEOUT_UNIT * (1 << code) >= least).unwrap_or(31)
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first that is out of its range.
    pub fn validate(&self) -> Result<(), Error> {
        let ranges = [
            ("timeout", self.timeout, 31),
            ("retries", self.retries, 7),
            ("receiver_retries", self.receiver_retries, 7),
            ("receiver_wait", self.receiver_wait, 31),
            ("service_level", self.service_level, 15),
        ];
        if let Some((name, value, max)) = ranges.iter().find(|(_, value, max)| value > max) {
            return Err(Error::Option { what: format!("{name} is {value}, the largest is {max}") });
        }
        if mtu_code(self.mtu_bytes_max).is_none() {
            let what = format!("packets have no {} bytes, but 256 to 4096", self.mtu_bytes_max);
            return Err(Error::Option { what });
        }
        Ok(())
    }
}

/// Where and for what a queue pair is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// From 1 on.
    pub port: u8,
    pub gid_index: u8,
    /// What the peer may do through this queue pair, with regions that permit it.
    pub access: Access,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint() -> Endpoint {
        Endpoint {
            queue_pair: 17,
            packet_number: NUMBER_MASK,
            gid: [1; 16],
            lid: 0,
            mtu_bytes: 1024,
            reads_answered: 16,
        }
    }

    #[test]
    fn a_peer_s_endpoint_is_checked() {
        endpoint().validate().unwrap();
        let wrong = [
            Endpoint { queue_pair: 1, ..endpoint() },
            Endpoint { queue_pair: 1 << 24, ..endpoint() },
            Endpoint { packet_number: 1 << 24, ..endpoint() },
            Endpoint { mtu_bytes: 1500, ..endpoint() },
            Endpoint { gid: [0; 16], ..endpoint() },
        ];
        for endpoint in wrong {
            let error = endpoint.validate().unwrap_err().to_string();
            assert!(error.starts_with("The peer's RDMA endpoint makes no sense: "), "{error}");
        }
    }

    #[test]
    fn timeouts_are_powers_of_two() {
        assert_eq!(ConnectOptions::timeout_of(Duration::from_millis(67)), 14);
        assert_eq!(ConnectOptions::timeout_of(Duration::from_millis(68)), 15);
        assert_eq!(ConnectOptions::timeout_of(Duration::ZERO), 1);
        assert_eq!(ConnectOptions::timeout_of(Duration::from_secs(9000)), 31);
    }

    #[test]
    fn options_have_ranges() {
        ConnectOptions::default().validate().unwrap();
        let error = ConnectOptions { retries: 8, ..ConnectOptions::default() }.validate();
        let error = error.unwrap_err().to_string();
        assert_eq!(error, "An RDMA option is out of range: retries is 8, the largest is 7");
        let error = ConnectOptions { mtu_bytes_max: 1500, ..ConnectOptions::default() }.validate();
        assert!(error.is_err());
    }
}
