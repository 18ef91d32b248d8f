//! The server: what arrives goes to the connections, what they want logged to the journal, and
//! the answers back.

use guest_logic::cmdline::Wait;
use guest_logic::kv::Status;
use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, SocketSet, SocketStorage,
};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};

use super::connection::{Connection, Store};
use super::journal::Journal;
use crate::clock::tsc;
use crate::pool;
use crate::serial::say;
use crate::virtio::Net;
use crate::world::World;

/// Connections at once, and places where the next one can arrive.
const CONNECTIONS: usize = 64;
/// Of each direction of a connection, so many bytes.
const BUFFER_BYTES: usize = 4096;
/// Frames taken in before others get their turn.
const INGRESS_MAX: usize = 128;
/// How fast the network's clock runs. smoltcp waits for a second at least before it sends again
/// what was lost (RFC 6298, 2.4), as at a take-over; with this it is 200 ms, as in Linux.
const HASTE: u64 = 5;
/// A peer that says nothing for so long has gone: 60 s and 15 s of real time.
const TIMEOUT: Duration = Duration::from_secs(60 * HASTE);
const KEEP_ALIVE: Duration = Duration::from_secs(15 * HASTE);

/// Looking for news costs nothing but the processor, which is wanted elsewhere if none comes: after
/// a while there are naps, each a part of the wait so far, so that news is late by no more.
const EAGER_NS: u64 = 200_000;
const NAP_PART: u64 = 4;
const NAP_NS_MAX: u64 = 1_000_000;
/// The last answers have so long to be acknowledged.
const DRAIN_NS: u64 = 2_000_000_000;

/// How far the end has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    No,
    /// Nothing new is taken; what has been taken is being logged.
    Logging,
    /// The last answers are on their way, no longer than this.
    Draining {
        until_ns: u64,
    },
    Done,
}

pub struct Server {
    world: &'static World,
    net: Net,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: &'static mut [Connection],
    /// The connection that is served first, in turn.
    first: usize,
    values: &'static mut [u64],
    journal: Journal,
    /// When the network wants to be looked after, whatever arrives.
    network_ns: u64,
    /// When there was something to do.
    active_ns: u64,
    puts: u64,
    gets: u64,
    stop: Stop,
}

impl Server {
    pub fn new(
        world: &'static World,
        mut net: Net,
        journal: Journal,
        values: &'static mut [u64],
    ) -> Option<Self> {
        let now_ns = world.clock.now_ns();
        let mac = EthernetAddress(net.mac());
        let mut config = Config::new(HardwareAddress::Ethernet(mac));
        config.random_seed = tsc();
        let mut interface = Interface::new(config, &mut net, instant(now_ns));
        interface.update_ip_addrs(|addresses| {
            let own = world.config.ip.map(|ip| IpCidr::new(ip.address.into(), ip.prefix));
            addresses.extend(own);
        });
        let mut sockets = SocketSet::new(pool::slice(CONNECTIONS, |_| SocketStorage::EMPTY)?);
        let mut handles = [None; CONNECTIONS];
        for handle in &mut handles {
            *handle = Some(sockets.add(socket(world.config.port)?));
        }
        let connections = pool::slice(CONNECTIONS, |index| {
            Connection::new(handles[index].unwrap_or_default(), index)
        })?;
        Some(Self {
            world,
            net,
            interface,
            sockets,
            connections,
            first: 0,
            values,
            journal,
            network_ns: 0,
            active_ns: now_ns,
            puts: 0,
            gets: 0,
            stop: Stop::No,
        })
    }

    /// Does what there is to do; when to come again.
    pub fn step(&mut self, now_ns: u64) -> u64 {
        let has_news = self.net.has_received() || self.journal.has_news();
        if !has_news && now_ns < self.network_ns {
            return self.rest(now_ns);
        }
        self.active_ns = now_ns;
        self.ingress(now_ns);
        self.settle();
        self.serve();
        self.journal.begin();
        self.egress(now_ns);
        self.go_on_stopping(now_ns);
        0
    }

    /// Asks the server to end, which takes some further steps.
    pub fn stop(&mut self) {
        if self.stop == Stop::No {
            self.stop = Stop::Logging;
            self.network_ns = 0;
        }
    }

    /// Sectors of the log; 0 if there is none.
    #[must_use]
    pub fn log_sectors(&self) -> u64 {
        self.journal.sectors()
    }

    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.stop == Stop::Done
    }

    pub fn report(&self) {
        say!("KV puts {} gets {}", self.puts, self.gets);
    }

    fn rest(&self, now_ns: u64) -> u64 {
        let quiet_ns = now_ns.saturating_sub(self.active_ns);
        if quiet_ns < EAGER_NS || self.world.config.wait == Wait::Spin {
            return 0;
        }
        self.network_ns.min(now_ns + (quiet_ns / NAP_PART).min(NAP_NS_MAX))
    }

    fn ingress(&mut self, now_ns: u64) {
        let now = instant(now_ns);
        for _ in 0..INGRESS_MAX {
            let (net, sockets) = (&mut self.net, &mut self.sockets);
            let result = self.interface.poll_ingress_single(now, net, sockets);
            if matches!(result, PollIngressSingleResult::None) {
                break;
            }
        }
    }

    fn egress(&mut self, now_ns: u64) {
        let now = instant(now_ns);
        let (net, sockets) = (&mut self.net, &mut self.sockets);
        while self.interface.poll_egress(now, net, sockets) != PollResult::None {}
        net.kick();
        let next = self.interface.poll_at(now, sockets);
        let micros = |at: Instant| u64::try_from(at.total_micros()).unwrap_or(0);
        self.network_ns = next.map_or(u64::MAX, |at| micros(at).saturating_mul(1000) / HASTE);
    }

    /// Applies and answers the puts of a batch that has ended.
    fn settle(&mut self) {
        let Some(status) = self.journal.advance() else { return };
        for put in self.journal.ended() {
            if status == Status::Ok {
                self.puts += 1;
                if let Some(value) = self.values.get_mut(put.request.key as usize) {
                    *value = put.request.value;
                }
            }
            if let Some(connection) = self.connections.get_mut(put.connection) {
                connection.logged(self.sockets.get_mut(connection.handle), put, status);
            }
        }
        self.journal.settle();
    }

    fn serve(&mut self) {
        if self.stop != Stop::No {
            return;
        }
        let Self { values, journal, gets, .. } = self;
        let mut store = Store { values, journal, gets };
        self.first = (self.first + 1) % self.connections.len();
        let (before, from_first) = self.connections.split_at_mut(self.first);
        for connection in from_first.iter_mut().chain(before) {
            let socket = self.sockets.get_mut(connection.handle);
            if connection.serve(socket, &mut store, self.world.config.port) {
                self.stop = Stop::Logging;
                return;
            }
        }
    }

    fn go_on_stopping(&mut self, now_ns: u64) {
        match self.stop {
            Stop::Logging if self.journal.is_idle() => {
                self.stop = Stop::Draining { until_ns: now_ns + DRAIN_NS };
                for connection in self.connections.iter() {
                    // An answer that has been given is still sent.
                    self.sockets.get_mut::<Socket<'_>>(connection.handle).close();
                }
                self.network_ns = 0;
            }
            Stop::Draining { until_ns } => {
                let sent = |connection: &Connection| {
                    self.sockets.get::<Socket<'_>>(connection.handle).send_queue() == 0
                };
                if now_ns >= until_ns || self.connections.iter().all(sent) {
                    self.stop = Stop::Done;
                }
                self.network_ns = self.network_ns.min(until_ns);
            }
            Stop::No | Stop::Logging | Stop::Done => {}
        }
    }
}

/// A socket that listens.
fn socket(port: u16) -> Option<Socket<'static>> {
    let buffer = || Some(SocketBuffer::new(pool::pages(BUFFER_BYTES / 4096)?));
    let mut socket = Socket::new(buffer()?, buffer()?);
    socket.set_nagle_enabled(false);
    socket.set_timeout(Some(TIMEOUT));
    socket.set_keep_alive(Some(KEEP_ALIVE));
    // A new socket is closed, and a port is not zero.
    let _ = socket.listen(port);
    Some(socket)
}

/// The network's time.
fn instant(now_ns: u64) -> Instant {
    let micros = now_ns.saturating_mul(HASTE) / 1000;
    Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
}
