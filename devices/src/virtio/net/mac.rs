//! Ethernet addresses.
//!
//! What enters: six hexadecimal bytes from a configuration, or the host's random numbers. What
//! always holds: an address of this type can be a station's, so it is neither a group address nor
//! all zeroes.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

use thiserror::Error;

/// Bytes of an address.
pub const MAC_BYTES: usize = 6;

/// First octet: the address stands for a group (IEEE 802, individual/group bit).
const GROUP: u8 = 0x01;
/// First octet: the address was given out by nobody (universal/local bit).
const LOCAL: u8 = 0x02;

/// The address of one station.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress([u8; MAC_BYTES]);

/// A text or some bytes are no station's address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MacError {
    #[error("{0:?} is no MAC address: six bytes such as 52:54:00:12:34:56 are needed")]
    Syntax(String),
    #[error("{0} is the address of a group or of nobody, not of one network card")]
    NotAStation(String),
}

impl MacAddress {
    /// Takes an address as it stands on the wire.
    pub fn from_bytes(bytes: [u8; MAC_BYTES]) -> Result<Self, MacError> {
        if bytes[0] & GROUP != 0 || bytes == [0; MAC_BYTES] {
            return Err(MacError::NotAStation(Self(bytes).to_string()));
        }
        Ok(Self(bytes))
    }

    /// A random address of the range that everybody may use. A configuration without an address
    /// is given one once, by the VMM, so that a backup's device has the same.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; MAC_BYTES];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        bytes[0] = (bytes[0] | LOCAL) & !GROUP;
        Ok(Self(bytes))
    }

    /// The address as it stands on the wire.
    #[must_use]
    pub fn bytes(self) -> [u8; MAC_BYTES] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let syntax = || MacError::Syntax(text.to_owned());
        let mut bytes = [0; MAC_BYTES];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(syntax)?;
            let digits = (1..=2).contains(&part.len());
            if !digits || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(syntax());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| syntax())?;
        }
        if parts.next().is_some() {
            return Err(syntax());
        }
        Self::from_bytes(bytes)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_shown() {
        let mac: MacAddress = "52:54:00:aB:0:ff".parse().unwrap();
        assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0xab, 0, 0xff]);
        assert_eq!(mac.to_string(), "52:54:00:ab:00:ff");
    }

    #[test]
    fn what_is_no_station_is_refused() {
        for text in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:+5", "5254"] {
            assert_eq!(text.parse::<MacAddress>(), Err(MacError::Syntax(text.to_owned())));
        }
        for text in ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "00:00:00:00:00:00"] {
            let refused = Err(MacError::NotAStation(text.to_owned()));
            assert_eq!(text.parse::<MacAddress>(), refused);
        }
    }

    #[test]
    fn a_random_address_is_local_and_of_one_station() {
        for _ in 0..64 {
            let mac = MacAddress::random().unwrap();
            assert_eq!(mac.bytes()[0] & (LOCAL | GROUP), LOCAL);
        }
        assert_ne!(MacAddress::random().unwrap(), MacAddress::random().unwrap());
    }
}
