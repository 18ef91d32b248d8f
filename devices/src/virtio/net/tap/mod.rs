//! The tap: how frames enter and leave the host (tun(4)).
//!
//! What enters: a name or open descriptors, and what the interface shall be like. What leaves: a
//! [`TapQueue`] for each queue pair. What always holds: queues never block; each frame has a
//! header of [`HEADER_BYTES`] in front; a tap that was there before is changed only where the
//! configuration asks for it, or to be up, and is left as it is where it has that already, since
//! that needs no privilege.

#[allow(unsafe_code)]
mod ioctl;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use thiserror::Error;

use self::ioctl::{Interface, NAME_BYTES};
use super::features::{GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_UFO, GuestOffloads};
use super::frame::HEADER_BYTES;
use super::mac::MacAddress;
use crate::virtio::device::AttachError;

const TUN: &str = "/dev/net/tun";
/// The kernel puts a number in the place of `%d`.
const NAME_PATTERN: &str = "vmtap%d";
/// Of an address that came without one, as upstream's default.
const IPV4_MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// One queue of a tap.
pub trait TapQueue: Send + Sync {
    /// Its descriptor, for epoll.
    fn fd(&self) -> RawFd;
    /// Reads a frame; what does not fit is lost. [`io::ErrorKind::WouldBlock`] if there is none.
    fn read(&self, frame: &mut [u8]) -> io::Result<usize>;
    /// Writes a frame. [`io::ErrorKind::WouldBlock`] if the host takes none now.
    fn write(&self, frame: &[u8]) -> io::Result<usize>;
    /// What may be read from now on, from any queue of this tap.
    fn set_offloads(&self, offloads: GuestOffloads) -> io::Result<()>;
    /// Whether the host uses this queue.
    fn set_enabled(&self, enabled: bool) -> io::Result<()>;
}

/// Which tap.
#[derive(Debug)]
pub enum TapSource {
    /// By name: made where there is none.
    Named(String),
    /// A new one, with a name of the kernel's choice.
    Unnamed,
    /// Open descriptors, one for each queue pair, from whoever has configured the tap.
    Descriptors(Vec<OwnedFd>),
}

/// What the host's end of the tap shall be like. Not applied to descriptors.
#[derive(Clone, Debug, Default)]
pub struct TapSettings {
    pub ip: Option<IpAddr>,
    /// Of the address; where absent, or of the other family, /24 of IPv4 and /64 of IPv6.
    pub mask: Option<IpAddr>,
    pub mac: Option<MacAddress>,
    pub mtu: Option<u16>,
}

/// A tap cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    #[error("{0:?} is no name of a tap: 1 to 15 bytes are needed, without '/' and white space")]
    Name(String),
    #[error("Cannot open {TUN} for the tap {name}: {hint}")]
    Device { name: String, hint: &'static str, source: io::Error },
    #[error("Cannot use the tap {name}: {hint}")]
    Bind { name: String, hint: &'static str, source: io::Error },
    #[error("Cannot set {what} of the tap {name}: {hint}")]
    Configure { name: String, what: &'static str, hint: &'static str, source: io::Error },
    #[error("{found} descriptors of a tap were given for {needed} queue pairs")]
    Descriptors { found: usize, needed: usize },
    #[error("Descriptor {fd} is not usable as a tap: {hint}")]
    Descriptor { fd: RawFd, hint: &'static str, source: Option<io::Error> },
    #[error("The mask {0} of a tap has gaps")]
    Mask(IpAddr),
}

impl From<TapError> for AttachError {
    fn from(error: TapError) -> Self {
        let what = error.to_string();
        let source = match error {
            TapError::Device { source, .. }
            | TapError::Bind { source, .. }
            | TapError::Configure { source, .. } => Some(source),
            TapError::Descriptor { source, .. } => source,
            TapError::Name(_) | TapError::Descriptors { .. } | TapError::Mask(_) => None,
        };
        Self { what, source }
    }
}

/// Opens a tap for `pairs` queue pairs. `source` stays as it is, so that a caller may try again:
/// of descriptors there are copies then.
pub fn open(
    source: &TapSource,
    pairs: usize,
    settings: &TapSettings,
) -> Result<Vec<Arc<dyn TapQueue>>, TapError> {
    let queues = match source {
        TapSource::Named(name) => open_named(name, pairs, settings)?,
        TapSource::Unnamed => open_named(NAME_PATTERN, pairs, settings)?,
        TapSource::Descriptors(fds) => adopt(fds, pairs)?,
    };
    Ok(queues.into_iter().map(|queue| Arc::new(queue) as Arc<dyn TapQueue>).collect())
}

/// A queue of a real tap.
#[derive(Debug)]
struct Queue(File);

impl TapQueue for Queue {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(frame)
    }

    fn write(&self, frame: &[u8]) -> io::Result<usize> {
        (&self.0).write(frame)
    }

    fn set_offloads(&self, offloads: GuestOffloads) -> io::Result<()> {
        let bits = tun_offloads(offloads);
        match ioctl::set_offloads(self.0.as_fd(), bits) {
            // Some kernels know no UDP fragmentation; not to receive it is always right.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                ioctl::set_offloads(self.0.as_fd(), bits & !libc::TUN_F_UFO)
            }
            result => result,
        }
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        ioctl::set_enabled(self.0.as_fd(), enabled)
    }
}

/// The kernel's names of what the guest can receive.
fn tun_offloads(offloads: GuestOffloads) -> u32 {
    [
        (GUEST_CSUM, libc::TUN_F_CSUM),
        (GUEST_TSO4, libc::TUN_F_TSO4),
        (GUEST_TSO6, libc::TUN_F_TSO6),
        (GUEST_ECN, libc::TUN_F_TSO_ECN),
        (GUEST_UFO, libc::TUN_F_UFO),
    ]
    .into_iter()
    .filter(|(feature, _)| offloads.has(*feature))
    .fold(0, |bits, (_, bit)| bits | bit)
}

/// Whether [`open`] would get the tap as things are: one with a name is opened and let go, and nothing is set.
pub fn try_open(source: &TapSource, pairs: usize) -> Result<(), TapError> {
    match source {
        TapSource::Named(name) => bind_named(name, pairs).map(drop),
        // What whoever gave it has opened is there, and a new one is nobody else's.
        TapSource::Descriptors(_) | TapSource::Unnamed => Ok(()),
    }
}

fn open_named(name: &str, pairs: usize, settings: &TapSettings) -> Result<Vec<Queue>, TapError> {
    let (queues, bytes) = bind_named(name, pairs)?;
    configure(&bytes, settings)?;
    Ok(queues)
}

/// The queues of a tap, and its name as the kernel has it.
fn bind_named(name: &str, pairs: usize) -> Result<(Vec<Queue>, [u8; NAME_BYTES]), TapError> {
    let mut bytes = name_bytes(name)?;
    let mut queues = Vec::with_capacity(pairs);
    for _ in 0..pairs {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(TUN)
            .map_err(|source| TapError::Device {
                name: name.to_owned(),
                hint: device_hint(&source),
                source,
            })?;
        bytes = bind(&file, &bytes, pairs).map_err(|source| TapError::Bind {
            name: name.to_owned(),
            hint: bind_hint(&source, pairs),
            source,
        })?;
        prepare(&file).map_err(|source| configure_error(&bytes, "the header", source))?;
        queues.push(Queue(file));
    }
    Ok((queues, bytes))
}

/// A tap of one queue may have been made for several; the kernel wants that said.
fn bind(file: &File, name: &[u8; NAME_BYTES], pairs: usize) -> io::Result<[u8; NAME_BYTES]> {
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    let several = if pairs > 1 { IFF_MULTI_QUEUE } else { 0 };
    match ioctl::bind(file.as_fd(), name, flags | several) {
        Err(error) if pairs == 1 && error.raw_os_error() == Some(libc::EINVAL) => {
            ioctl::bind(file.as_fd(), name, flags | IFF_MULTI_QUEUE)
        }
        result => result,
    }
}

fn adopt(fds: &[OwnedFd], pairs: usize) -> Result<Vec<Queue>, TapError> {
    if fds.len() != pairs {
        return Err(TapError::Descriptors { found: fds.len(), needed: pairs });
    }
    fds.iter().map(adopt_one).collect()
}

fn adopt_one(fd: &OwnedFd) -> Result<Queue, TapError> {
    let raw = fd.as_raw_fd();
    let refused = |hint, source| TapError::Descriptor { fd: raw, hint, source };
    let (_, flags) = ioctl::bound_to(fd.as_fd())
        .map_err(|source| refused("it is not bound to a tap", Some(source)))?;
    if flags & IFF_TAP == 0 {
        return Err(refused("it is a tun device, which carries no Ethernet frames", None));
    }
    if flags & IFF_NO_PI == 0 {
        return Err(refused("it was opened without IFF_NO_PI", None));
    }
    if flags & IFF_VNET_HDR == 0 {
        return Err(refused("it was opened without IFF_VNET_HDR", None));
    }
    let failed = |source| refused("it cannot be configured", Some(source));
    let status = fcntl(fd, FcntlArg::F_GETFL).map_err(|errno| failed(errno.into()))?;
    let status = OFlag::from_bits_retain(status) | OFlag::O_NONBLOCK;
    fcntl(fd, FcntlArg::F_SETFL(status)).map_err(|errno| failed(errno.into()))?;
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|errno| failed(errno.into()))?;
    let file = File::from(fd.try_clone().map_err(failed)?);
    prepare(&file).map_err(failed)?;
    Ok(Queue(file))
}

/// Makes a queue speak as the guest does: the long header, and no offloads until the driver has
/// chosen.
fn prepare(file: &File) -> io::Result<()> {
    let bytes = i32::try_from(HEADER_BYTES).map_err(io::Error::other)?;
    ioctl::set_header_bytes(file.as_fd(), bytes)?;
    ioctl::set_little_endian(file.as_fd())?;
    ioctl::set_offloads(file.as_fd(), 0)
}

fn configure(name: &[u8; NAME_BYTES], settings: &TapSettings) -> Result<(), TapError> {
    let failed = |what| move |source| configure_error(name, what, source);
    // Any socket will do; it names the network namespace.
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(failed("the interface"))?;
    let interface = Interface { socket: socket.as_fd(), name };
    if let Some(mac) = settings.mac
        && interface.mac().map_err(failed("the MAC address"))? != mac.bytes()
    {
        interface.set_mac(mac.bytes()).map_err(failed("the MAC address"))?;
    }
    if let Some(mtu) = settings.mtu
        && interface.mtu().map_err(failed("the MTU"))? != i32::from(mtu)
    {
        interface.set_mtu(mtu).map_err(failed("the MTU"))?;
    }
    match settings.ip {
        Some(IpAddr::V4(address)) => {
            interface.set_ipv4(address).map_err(failed("the address"))?;
            // The kernel would take the mask of the address's class.
            let mask = match settings.mask {
                Some(IpAddr::V4(mask)) => mask,
                _ => IPV4_MASK,
            };
            interface.set_ipv4_mask(mask).map_err(failed("the mask"))?;
        }
        Some(IpAddr::V6(address)) => set_ipv6(name, address, settings.mask)?,
        None => {}
    }
    if !interface.is_up().map_err(failed("the link"))? {
        interface.set_up().map_err(failed("the link"))?;
    }
    Ok(())
}

fn set_ipv6(
    name: &[u8; NAME_BYTES],
    address: Ipv6Addr,
    mask: Option<IpAddr>,
) -> Result<(), TapError> {
    let failed = |source: io::Error| configure_error(name, "the address", source);
    let prefix_bits = match mask {
        Some(IpAddr::V6(mask)) => {
            let bits = mask.to_bits();
            if bits.leading_ones() + bits.trailing_zeros() < u128::BITS {
                return Err(TapError::Mask(mask.into()));
            }
            bits.leading_ones()
        }
        _ => 64,
    };
    let index = if_nametoindex(shown(name).as_str()).map_err(|errno| failed(errno.into()))?;
    let index = i32::try_from(index).map_err(|error| failed(io::Error::other(error)))?;
    let socket = socket(AddressFamily::Inet6, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|errno| failed(errno.into()))?;
    let interface = Interface { socket: socket.as_fd(), name };
    interface.set_ipv6(address, prefix_bits, index).map_err(failed)
}

/// A name as the kernel takes it: with a zero at the end.
fn name_bytes(name: &str) -> Result<[u8; NAME_BYTES], TapError> {
    let usable = |byte: u8| byte != b'/' && byte > b' ';
    if name.is_empty() || name.len() >= NAME_BYTES || !name.bytes().all(usable) {
        return Err(TapError::Name(name.to_owned()));
    }
    let mut bytes = [0; NAME_BYTES];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    Ok(bytes)
}

fn shown(name: &[u8; NAME_BYTES]) -> String {
    let len = name.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
    String::from_utf8_lossy(&name[..len]).into_owned()
}

fn configure_error(name: &[u8; NAME_BYTES], what: &'static str, source: io::Error) -> TapError {
    let hint = match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "this needs CAP_NET_ADMIN, or a tap that was set up beforehand, without this option"
        }
        Some(libc::EINVAL) => "the kernel does not accept the value",
        _ => "the kernel refuses",
    };
    TapError::Configure { name: shown(name), what, hint, source }
}

fn device_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "load the kernel module (modprobe tun), or give the device node to the container"
        }
        Some(libc::EPERM | libc::EACCES) => "this user or container may not open it",
        _ => "the kernel refuses",
    }
}

fn bind_hint(error: &io::Error, pairs: usize) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "this needs CAP_NET_ADMIN, or a tap that was made for this user (ip tuntap add dev \
             NAME mode tap user USER vnet_hdr)"
        }
        Some(libc::EBUSY) => "another process uses it: end that, or choose another tap",
        Some(libc::EINVAL) if pairs > 1 => {
            "it is no tap or has one queue: several pairs need one made with multi_queue"
        }
        Some(libc::EINVAL) => "an interface of this name exists and is no tap",
        Some(libc::E2BIG) => "all of its queues are in use",
        _ => "the kernel refuses",
    }
}

#[cfg(test)]
mod tests;
