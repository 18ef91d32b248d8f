//! `kv`: a key-value server on the network that logs a put on the disk before it answers
//! (`guest_logic::kv` says what it understands). The first processor alone runs it.
//!
//! ```text
//!   frames ─▶ ingress ─▶ connections ─▶ journal ─▶ disk: write, flush
//!                            ▲                          │
//!   frames ◀─ egress ◀───────┴──── map, answers ◀───────┘
//! ```
//!
//! What always holds: a get sees what has been logged and nothing else; the map changes in the
//! order of the log; an answer to a put leaves after its record is on stable storage.

mod connection;
mod journal;
mod server;

use core::ops::{Deref, DerefMut};

use guest_logic::kv::KEYS;

use crate::pool;
use crate::serial::say;
use crate::virtio::{Disk, Net, NoDevice};
use crate::world::World;
use journal::Journal;
use server::Server;

/// Memory of the server, buffers and queues of its devices included: 2 MiB.
pub const PAGES: u64 = 512;

/// The server, in memory of its own: it is too large for the stacks of those who do not run it.
pub struct Kv(&'static mut Server);

/// What cannot be had, and why.
#[derive(Debug)]
pub struct NotStarted {
    pub what: &'static str,
    pub why: &'static str,
}

impl Kv {
    /// Opens the devices, plays the log back and begins to listen. Called once.
    pub fn start(world: &'static World) -> Result<Self, NotStarted> {
        let of = |what| move |NoDevice(why)| NotStarted { what, why };
        let no_memory = NotStarted { what: "server", why: "has no memory" };
        // SAFETY: world.rs took the pages out of the free memory for this.
        unsafe { pool::fill(world.kv_memory, PAGES) };
        let Some(values) = pool::slice(KEYS as usize, |_| 0) else { return Err(no_memory) };
        let disk = Disk::open().transpose().map_err(of("disk"))?;
        if disk.is_none() {
            say!("KV no disk: puts are not logged");
        }
        let journal = Journal::open(disk, values).map_err(of("disk"))?;
        let net = Net::open().map_err(of("network card"))?;
        let server = Server::new(world, net, journal, values).and_then(pool::place);
        let Some(server) = server else { return Err(no_memory) };
        if let Some(ip) = world.config.ip {
            let (port, sectors) = (world.config.port, server.log_sectors());
            say!("KV READY ip {} port {port} disk {sectors}", ip.address);
        }
        Ok(Self(server))
    }
}

impl Deref for Kv {
    type Target = Server;

    fn deref(&self) -> &Server {
        self.0
    }
}

impl DerefMut for Kv {
    fn deref_mut(&mut self) -> &mut Server {
        self.0
    }
}
