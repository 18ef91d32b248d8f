//! TCP, with Nagle's delay off: an acknowledgement must never wait for company.

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, getsockopt, recv, setsockopt, sockopt};
use nix::{getsockopt_impl, sockopt_impl};

use super::{Accept, Accepted, Address, Delivery, Incoming, Stream, TransportError, read_socket};
use crate::ram::Slice;

/// Words of `struct tcp_info` (include/uapi/linux/tcp.h) up to `tcpi_delivery_rate`, which the kernel
/// has had since 4.9. It gives no more than is asked for.
const TCP_INFO_WORDS: usize = 21;
const DELIVERY_RATE_WORD: usize = 20;
/// The eighth byte has flags, `tcpi_delivery_rate_app_limited` the first of them.
const APP_LIMITED_BIT: u32 = 56;

sockopt_impl!(
    /// What TCP knows about a connection.
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    [u64; TCP_INFO_WORDS]
);

impl Stream for TcpStream {
    fn read_memory(&mut self, into: &Slice<'_>) -> io::Result<usize> {
        read_socket(self, into)
    }

    fn read_arrived(&mut self, into: &mut [u8]) -> io::Result<usize> {
        recv(self.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from)
    }

    fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }

    fn close(&self) {
        // Fails only where there is no connection any more.
        let _ = self.shutdown(Shutdown::Both);
    }

    fn finish(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }

    fn local_address(&self) -> Option<IpAddr> {
        self.local_addr().ok().map(|address| address.ip().to_canonical())
    }

    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Self::set_read_timeout(self, timeout)
    }

    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Self::set_write_timeout(self, timeout)
    }

    /// TCP's own estimate (net/ipv4/tcp_rate.c): it goes by acknowledgements, also of what was
    /// written long before and lay in the socket's buffer.
    fn delivery(&self) -> Option<Delivery> {
        let info = getsockopt(self, TcpInfo).ok()?;
        let bytes_per_s = info[DELIVERY_RATE_WORD];
        let is_least = info[0].to_le() >> APP_LIMITED_BIT & 1 == 1;
        (bytes_per_s > 0).then_some(Delivery { bytes_per_s, is_least })
    }

    fn keep_alive(&self, interval: Duration) -> io::Result<()> {
        let seconds = u32::try_from(interval.as_secs()).unwrap_or(u32::MAX).clamp(1, 3600);
        setsockopt(self, sockopt::TcpKeepIdle, &seconds)?;
        setsockopt(self, sockopt::TcpKeepInterval, &seconds)?;
        Ok(setsockopt(self, sockopt::KeepAlive, &true)?)
    }
}

fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, TransportError> {
    let name = format!("{host}:{port}");
    match (host, port).to_socket_addrs() {
        Ok(addresses) => Ok(addresses.collect()),
        Err(error) => Err(TransportError::Resolve(name, error)),
    }
}

pub(super) fn connect(
    host: &str,
    port: u16,
    timeout: Duration,
) -> Result<TcpStream, TransportError> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in resolve(host, port)? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                stream.set_nodelay(true).map_err(TransportError::Setup)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(TransportError::Connect(format!("tcp:{host}:{port}"), last))
}

impl Accept for TcpListener {
    fn accept(&self) -> io::Result<Accepted> {
        let (stream, peer) = TcpListener::accept(self)?;
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        Ok((Incoming::Tcp(stream), format!("tcp:{peer}")))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

pub(super) fn listen(host: &str, port: u16) -> Result<(Box<dyn Accept>, Address), TransportError> {
    let failed = |error| TransportError::Listen(format!("tcp:{host}:{port}"), error);
    let addresses = resolve(host, port)?;
    let listener = TcpListener::bind(addresses.as_slice()).map_err(failed)?;
    // A connection that is gone by the time it is accepted must not block the acceptor.
    listener.set_nonblocking(true).map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    Ok((Box::new(listener), Address::Tcp { host: host.to_owned(), port }))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// A write ends when the socket's buffer has it; how fast that empties is seen all the same.
    #[test]
    fn a_slow_peer_is_seen_behind_a_large_buffer() {
        const PIECE: usize = 64 << 10;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        setsockopt(&listener, sockopt::RcvBuf, &(32 << 10)).unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        // 13 MB/s at most.
        let reader = std::thread::spawn(move || {
            let mut piece = vec![0; PIECE];
            while matches!(theirs.read(&mut piece), Ok(1..)) {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let piece = vec![7; PIECE];
        (0..64).for_each(|_| ours.write_all(&piece).unwrap());
        let delivery = Stream::delivery(&ours).expect("something arrived");
        assert!((10_000..200_000_000).contains(&delivery.bytes_per_s), "{delivery:?}");
        assert!(!delivery.is_least, "{delivery:?}");
        Stream::close(&ours);
        reader.join().unwrap();
    }

    #[test]
    fn a_stream_without_traffic_says_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(Stream::delivery(&ours), None);
    }
}
