//! The calls of the kernel on taps and interfaces (tun(4), netdevice(7)), as safe functions.
//!
//! What enters: descriptors and plain values; what leaves: the kernel's answer. The only `unsafe`
//! of the crate: each call names the type that its request takes, and all of them are plain bytes
//! in memory of ours.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::super::mac::MAC_BYTES;

/// Bytes of an interface's name, with its terminating zero.
pub const NAME_BYTES: usize = libc::IFNAMSIZ;
/// Hardware type of Ethernet (ARPHRD_ETHER).
const HARDWARE_ETHERNET: u16 = 1;

/// `struct ifreq`: an interface's name, and bytes whose meaning depends on the call.
#[repr(C, align(8))]
struct InterfaceRequest {
    name: [u8; NAME_BYTES],
    data: [u8; 24],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl InterfaceRequest {
    fn new(name: &[u8; NAME_BYTES], data: &[u8]) -> Self {
        let mut request = Self { name: *name, data: [0; 24] };
        request.data[..data.len()].copy_from_slice(data);
        request
    }

    fn call(mut self, fd: BorrowedFd<'_>, code: libc::Ioctl) -> io::Result<Self> {
        // SAFETY: every code that this module passes here takes a pointer to a `struct ifreq`,
        // whose size the assertion above compares; it is ours for the duration of the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), code, &raw mut self) })?;
        Ok(self)
    }

    fn start<const N: usize>(&self) -> [u8; N] {
        let mut start = [0; N];
        start.copy_from_slice(&self.data[..N]);
        start
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Binds an open /dev/net/tun to the tap `name`, which is made where there is none, and returns
/// its name (TUNSETIFF).
pub fn bind(
    fd: BorrowedFd<'_>,
    name: &[u8; NAME_BYTES],
    flags: u16,
) -> io::Result<[u8; NAME_BYTES]> {
    let request = InterfaceRequest::new(name, &flags.to_ne_bytes());
    Ok(request.call(fd, libc::TUNSETIFF)?.name)
}

/// The name and the flags of the tap that `fd` is bound to (TUNGETIFF).
pub fn bound_to(fd: BorrowedFd<'_>) -> io::Result<([u8; NAME_BYTES], u16)> {
    let answer = InterfaceRequest::new(&[0; NAME_BYTES], &[]).call(fd, libc::TUNGETIFF)?;
    Ok((answer.name, u16::from_ne_bytes(answer.start())))
}

/// Attaches or detaches one queue of a tap (TUNSETQUEUE).
pub fn set_enabled(fd: BorrowedFd<'_>, enabled: bool) -> io::Result<()> {
    const ATTACH: u16 = 0x0200;
    const DETACH: u16 = 0x0400;
    let flags = if enabled { ATTACH } else { DETACH };
    InterfaceRequest::new(&[0; NAME_BYTES], &flags.to_ne_bytes()).call(fd, libc::TUNSETQUEUE)?;
    Ok(())
}

/// What the reader of the tap can take: a set of TUN_F_ bits (TUNSETOFFLOAD).
pub fn set_offloads(fd: BorrowedFd<'_>, bits: u32) -> io::Result<()> {
    // SAFETY: this call takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
}

/// Length of the header before each frame (TUNSETVNETHDRSZ).
pub fn set_header_bytes(fd: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    set_int(fd, libc::TUNSETVNETHDRSZ, bytes)
}

/// The header's fields are little endian, whatever the host is (TUNSETVNETLE).
pub fn set_little_endian(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_int(fd, libc::TUNSETVNETLE, 1)
}

fn set_int(fd: BorrowedFd<'_>, code: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
    // SAFETY: both codes above take a pointer to an int, which they only read.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), code, &raw const value) })
}

/// An interface, reached through any socket of its network namespace.
#[derive(Clone, Copy)]
pub struct Interface<'a> {
    pub socket: BorrowedFd<'a>,
    pub name: &'a [u8; NAME_BYTES],
}

impl Interface<'_> {
    fn request(&self, code: libc::Ioctl, data: &[u8]) -> io::Result<InterfaceRequest> {
        InterfaceRequest::new(self.name, data).call(self.socket, code)
    }

    /// Longest packet, bytes.
    pub fn mtu(&self) -> io::Result<i32> {
        Ok(i32::from_ne_bytes(self.request(libc::SIOCGIFMTU, &[])?.start()))
    }

    pub fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        self.request(libc::SIOCSIFMTU, &i32::from(mtu).to_ne_bytes()).map(drop)
    }

    pub fn mac(&self) -> io::Result<[u8; MAC_BYTES]> {
        let address: [u8; 2 + MAC_BYTES] = self.request(libc::SIOCGIFHWADDR, &[])?.start();
        let mut mac = [0; MAC_BYTES];
        mac.copy_from_slice(&address[2..]);
        Ok(mac)
    }

    pub fn set_mac(&self, mac: [u8; MAC_BYTES]) -> io::Result<()> {
        let mut address = [0; 2 + MAC_BYTES];
        address[..2].copy_from_slice(&HARDWARE_ETHERNET.to_ne_bytes());
        address[2..].copy_from_slice(&mac);
        self.request(libc::SIOCSIFHWADDR, &address).map(drop)
    }

    /// Whether frames pass.
    pub fn is_up(&self) -> io::Result<bool> {
        Ok(self.flags()? & IFF_UP != 0)
    }

    pub fn set_up(&self) -> io::Result<()> {
        let flags = self.flags()? | IFF_UP;
        self.request(libc::SIOCSIFFLAGS, &flags.to_ne_bytes()).map(drop)
    }

    fn flags(&self) -> io::Result<u16> {
        Ok(u16::from_ne_bytes(self.request(libc::SIOCGIFFLAGS, &[])?.start()))
    }

    pub fn set_ipv4(&self, address: Ipv4Addr) -> io::Result<()> {
        self.request(libc::SIOCSIFADDR, &socket_address(address)).map(drop)
    }

    pub fn set_ipv4_mask(&self, mask: Ipv4Addr) -> io::Result<()> {
        self.request(libc::SIOCSIFNETMASK, &socket_address(mask)).map(drop)
    }

    /// `socket` is one of IPv6 here.
    pub fn set_ipv6(&self, address: Ipv6Addr, prefix_bits: u32, index: i32) -> io::Result<()> {
        let address = libc::in6_ifreq {
            ifr6_addr: libc::in6_addr { s6_addr: address.octets() },
            ifr6_prefixlen: prefix_bits,
            ifr6_ifindex: index,
        };
        // A socket of another family reads a `struct ifreq`, so there are as many bytes as that.
        let request = SetIpv6 { address, _rest: [0; 40] };
        // SAFETY: on a socket of IPv6 this code takes a pointer to a `struct in6_ifreq`, on others
        // to a `struct ifreq`: there are enough bytes for both, and they are only read.
        check(unsafe {
            libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFADDR, &raw const request)
        })
    }
}

#[repr(C)]
struct SetIpv6 {
    address: libc::in6_ifreq,
    _rest: [u8; 40],
}

/// The interface is up.
const IFF_UP: u16 = 1;

/// `struct sockaddr_in` without a port.
fn socket_address(address: Ipv4Addr) -> [u8; 8] {
    const AF_INET: u16 = 2;
    let mut bytes = [0; 8];
    bytes[..2].copy_from_slice(&AF_INET.to_ne_bytes());
    bytes[4..].copy_from_slice(&address.octets());
    bytes
}
