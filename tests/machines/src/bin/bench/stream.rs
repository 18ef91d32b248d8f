//! A bare TCP stream over the loopback from one memory into another: the floor of a first sync.
//!
//! The memories are as a VM's are, and the one that is written to is as fresh as a backup's.

use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::config::MemoryConfig;
use replication::ram::Mapping;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm::memory::Memory;

/// Bytes that go to the kernel and come from it at once.
const CHUNK: usize = 1 << 20;

/// Touches `bytes` of memory that is free and frees it again. Where this host is a virtual machine
/// itself, the first touch of what it did not use for some seconds may be a fault of its host's, which
/// takes longer than all that is measured here; so each column gets its memory right after this.
pub fn back_free_memory(bytes: u64) -> Result<()> {
    let memory = Memory::new(&MemoryConfig { size: bytes, ..MemoryConfig::default() })?;
    let chunk = vec![1; CHUNK];
    chunks(memory.mapping())
        .into_iter()
        .try_for_each(|address| memory.mapping().write_slice(&chunk, address).map_err(Into::into))
}

/// A memory of which every page has a content.
pub struct Source(Memory);

impl Source {
    pub fn new(bytes: u64) -> Result<Self> {
        let memory = Memory::new(&MemoryConfig { size: bytes, ..MemoryConfig::default() })?;
        let chunk: Vec<u8> = (0..CHUNK).map(|at| u8::try_from(at % 251).unwrap_or(1)).collect();
        for address in chunks(memory.mapping()) {
            memory.mapping().write_slice(&chunk, address)?;
        }
        Ok(Self(memory))
    }

    /// Sends all of it over `connections` connections at once into a fresh memory.
    pub fn send(&self, connections: usize) -> Result<Duration> {
        let size = self.0.size();
        let target = Memory::new(&MemoryConfig { size, ..MemoryConfig::default() })?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut pairs = Vec::new();
        for _ in 0..connections {
            let out = TcpStream::connect(listener.local_addr()?)?;
            out.set_nodelay(true)?;
            pairs.push((out, listener.accept()?.0));
        }
        let start = Instant::now();
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (number, (mut out, mut into)) in pairs.into_iter().enumerate() {
                let mine = move |memory: &Mapping| {
                    chunks(memory).into_iter().skip(number).step_by(connections)
                };
                let (from, to) = (self.0.mapping(), target.mapping());
                threads.push(scope.spawn(move || -> Result<()> {
                    mine(from).try_for_each(|at| {
                        whole(at, |at, left| Ok(from.write_volatile_to(at, &mut out, left)?))
                    })
                }));
                threads.push(scope.spawn(move || -> Result<()> {
                    mine(to).try_for_each(|at| {
                        whole(at, |at, left| Ok(to.read_volatile_from(at, &mut into, left)?))
                    })
                }));
            }
            threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
        })?;
        let took = start.elapsed();
        let last = chunks(target.mapping()).pop().context("an empty memory")?;
        let [sent, came] = [self.0.mapping(), target.mapping()]
            .map(|memory| memory.read_obj::<[u8; 32]>(last).unwrap_or_default());
        ensure!(sent == came && sent != [0; 32], "the stream did not arrive");
        Ok(took)
    }
}

/// Goes on with what is left of a chunk until all of it is through.
fn whole(
    start: GuestAddress,
    mut some: impl FnMut(GuestAddress, usize) -> Result<usize>,
) -> Result<()> {
    let mut done = 0;
    while done < CHUNK {
        let count = some(GuestAddress(start.0 + u64::try_from(done)?), CHUNK - done)?;
        ensure!(count > 0, "the stream ended");
        done += count;
    }
    Ok(())
}

fn chunks(memory: &Mapping) -> Vec<GuestAddress> {
    let of_region = |start: GuestAddress, size: u64| {
        (0..size).step_by(CHUNK).map(move |offset| GuestAddress(start.0 + offset))
    };
    memory.iter().flat_map(|region| of_region(region.start_addr(), region.len())).collect()
}
