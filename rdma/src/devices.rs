//! Which devices, ports and GIDs there are. Linux: Documentation/ABI/stable/sysfs-class-infiniband.
//!
//! Enters: a folder like /sys/class/infiniband. Leaves: its devices, in the order of their names. What
//! the kernel only tells about an opened device (the MTU) is added by [`crate::Library::devices`].

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

use crate::error::Error;

pub(crate) const FOLDER: &str = "/sys/class/infiniband";

/// A device of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    pub ports: Vec<Port>,
    /// Why it cannot be used, for a person; none: it can.
    pub problem: Option<String>,
}

/// A port of a device; the first has the number 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub number: u8,
    pub state: PortState,
    pub link_layer: LinkLayer,
    /// The largest payload of a packet now, in bytes; none: the device was not opened.
    pub mtu_bytes: Option<u16>,
    /// Those that are in use.
    pub gids: Vec<GidEntry>,
}

/// Whether a port carries anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    Down,
    /// The link is there, the subnet is not set up.
    Init,
    Armed,
    Active,
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    InfiniBand,
    Ethernet,
    Other,
}

/// A place of a port's table of GIDs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GidEntry {
    pub index: u8,
    pub gid: Gid,
    pub kind: GidKind,
    /// The network interface whose address it is.
    pub interface: Option<String>,
}

/// How packets from a GID are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GidKind {
    InfiniBand,
    /// Ethernet frames of their own kind: one network segment only.
    RoceV1,
    /// UDP, port 4791.
    RoceV2,
}

/// The address of a port: an IPv6 address, or an IPv4 one mapped into it, on Ethernet.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// The GID that a network interface with this address has.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self(v4.to_ipv6_mapped().octets()),
            IpAddr::V6(v6) => Self(v6.octets()),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok().map(|address: Ipv6Addr| Self(address.octets()))
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ipv6Addr::from(self.0).fmt(f)
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({self})")
    }
}

impl fmt::Display for GidKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InfiniBand => "InfiniBand",
            Self::RoceV1 => "RoCE v1",
            Self::RoceV2 => "RoCE v2",
        })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {} ({:?}, {:?})", self.number, self.link_layer, self.state)?;
        for GidEntry { index, gid, kind, interface } in &self.gids {
            write!(f, ", gid {index} {gid} ({kind}")?;
            match interface {
                Some(interface) => write!(f, ", {interface})")?,
                None => f.write_str(")")?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(problem) = &self.problem {
            write!(f, " ({problem})")?;
        }
        for port in &self.ports {
            write!(f, " {port}")?;
        }
        Ok(())
    }
}

/// The devices of a folder like /sys/class/infiniband, without what only an opened device tells. A host
/// without the folder has no device.
pub(crate) fn scan(folder: &Path) -> Result<Vec<Device>, Error> {
    let mut devices = Vec::new();
    for name in names(folder)? {
        let ports = folder.join(&name).join("ports");
        let mut numbers: Vec<u8> = names(&ports)?.iter().filter_map(|n| n.parse().ok()).collect();
        numbers.sort_unstable();
        let ports = numbers.into_iter().map(|number| port(&ports.join(number.to_string()), number));
        devices.push(Device { name, ports: ports.collect::<Result<_, _>>()?, problem: None });
    }
    Ok(devices)
}

fn port(folder: &Path, number: u8) -> Result<Port, Error> {
    let link_layer = match read(&folder.join("link_layer"))?.as_str() {
        "InfiniBand" => LinkLayer::InfiniBand,
        "Ethernet" => LinkLayer::Ethernet,
        _ => LinkLayer::Other,
    };
    // "4: ACTIVE"
    let state = read(&folder.join("state"))?;
    let state = match state.split(':').next().unwrap_or("") {
        "1" => PortState::Down,
        "2" => PortState::Init,
        "3" => PortState::Armed,
        "4" => PortState::Active,
        _ => PortState::Other,
    };
    let mut indices: Vec<u8> =
        names(&folder.join("gids"))?.iter().filter_map(|n| n.parse().ok()).collect();
    indices.sort_unstable();
    let gids = indices.into_iter().filter_map(|index| gid(folder, index, link_layer)).collect();
    Ok(Port { number, state, link_layer, mtu_bytes: None, gids })
}

/// An entry that is in use; reading one that is not, or that goes at this moment, fails or gives zeroes.
fn gid(folder: &Path, index: u8, link_layer: LinkLayer) -> Option<GidEntry> {
    let attribute = |name: &str| read(&folder.join(name).join(index.to_string())).ok();
    let gid = Gid::parse(&attribute("gids")?).filter(|gid| gid.0 != [0; 16])?;
    let kind = match (link_layer, attribute("gid_attrs/types").as_deref()) {
        (LinkLayer::Ethernet, Some("RoCE v2")) => GidKind::RoceV2,
        (LinkLayer::Ethernet, Some(_)) => GidKind::RoceV1,
        (LinkLayer::Ethernet, None) => return None,
        _ => GidKind::InfiniBand,
    };
    Some(GidEntry { index, gid, kind, interface: attribute("gid_attrs/ndevs") })
}

/// The names in a folder, sorted; none if it does not exist.
fn names(folder: &Path) -> Result<Vec<String>, Error> {
    let failed = |source| Error::Sysfs { path: folder.display().to_string(), source };
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(failed)?.file_name().into_string().ok());
    }
    names.sort_unstable();
    Ok(names)
}

fn read(file: &Path) -> Result<String, Error> {
    let text = fs::read_to_string(file);
    let text = text.map_err(|source| Error::Sysfs { path: file.display().to_string(), source })?;
    Ok(text.trim().to_owned())
}
