//! Many clients, each on a thread and a connection of its own, as fast as they are answered.
//!
//! All of them work on a small window of keys, so that operations on a key overlap, and the window
//! moves on, so that many keys keep a last value that nothing but the server remembers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest_logic::kv::KEYS;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::client::Client;
use super::history::{Operation, Sequence};
use super::violation::Violation;
use crate::network::Namespace;
use crate::process::POLL;

/// Operations on a key before the window moves on, on average.
const OPERATIONS_PER_KEY: u64 = 64;
/// Keys of the window for each client. Fewer make longer times in which a key is never at rest, and
/// those are what the search for a linearization is slow with.
const KEYS_PER_CLIENT: u32 = 3;
/// Of all operations this share reads any key, to meet values that were written long ago.
const ANY_KEY: f64 = 0.1;
/// And half of the rest are writes.
const PUT: f64 = 0.5;

/// How a crowd is made.
#[derive(Clone, Debug)]
pub struct Plan {
    pub clients: u32,
    pub address: SocketAddr,
    /// How long a client waits for an answer.
    pub silence_limit: Duration,
    pub seed: u64,
}

struct Shared {
    sequence: Arc<Sequence>,
    is_over: AtomicBool,
    /// Answers so far, by client.
    answers: Vec<AtomicU64>,
    /// Clients that found something wrong.
    failed: AtomicU64,
}

/// Clients at work.
pub struct Crowd {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<(Client, Option<Violation>)>>,
}

/// What a crowd saw.
pub struct Seen {
    /// Those that found nothing wrong, still connected.
    pub clients: Vec<Client>,
    pub operations: Vec<Operation>,
    pub violations: Vec<Violation>,
    pub sequence: Arc<Sequence>,
}

impl Crowd {
    /// Connects all clients, in `namespace` where there is one, and sets them to work.
    pub fn start(plan: &Plan, namespace: Option<&Namespace>) -> Result<Self> {
        Self::start_in(plan, namespace, &Arc::default(), 0)
    }

    /// As [`Crowd::start`], in a history that others have begun; the clients' numbers from `first` on
    /// are none of theirs.
    pub fn start_in(
        plan: &Plan,
        namespace: Option<&Namespace>,
        sequence: &Arc<Sequence>,
        first: u32,
    ) -> Result<Self> {
        let sequence = Arc::clone(sequence);
        let connect =
            |number| Client::connect(first + number, plan.address, plan.silence_limit, &sequence);
        let connect_all = || (0..plan.clients).map(connect).collect::<Result<Vec<_>>>();
        let clients = match namespace {
            Some(namespace) => namespace.within(connect_all)??,
            None => connect_all()?,
        };
        let shared = Arc::new(Shared {
            sequence,
            is_over: AtomicBool::new(false),
            answers: clients.iter().map(|_| AtomicU64::new(0)).collect(),
            failed: AtomicU64::new(0),
        });
        let threads = clients.into_iter().enumerate().map(|(number, client)| {
            let shared = Arc::clone(&shared);
            let random = StdRng::seed_from_u64(plan.seed ^ (1 + number as u64) << 32);
            std::thread::Builder::new()
                .name(format!("client-{number}"))
                .spawn(move || work(client, number, random, &shared))
        });
        let threads = threads.collect::<std::io::Result<_>>().context("Cannot start a client")?;
        Ok(Self { shared, threads })
    }

    /// Waits until each client was answered `count` times more, or any found something wrong.
    pub fn wait_answers(&self, count: u64, limit: Duration) -> Result<()> {
        let now = |answers: &AtomicU64| answers.load(Ordering::SeqCst);
        let wanted: Vec<u64> = self.shared.answers.iter().map(|a| now(a) + count).collect();
        let start = Instant::now();
        while !self.has_failed() {
            let waiting = self.shared.answers.iter().zip(&wanted).filter(|(a, w)| now(a) < **w);
            let waiting = waiting.count();
            if waiting == 0 {
                return Ok(());
            }
            if start.elapsed() > limit {
                bail!("{waiting} clients wait for {count} answers since {limit:?}");
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// The order of their events, for others who join them.
    #[must_use]
    pub fn sequence(&self) -> Arc<Sequence> {
        Arc::clone(&self.shared.sequence)
    }

    /// Answers to all clients so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.shared.answers.iter().map(|answers| answers.load(Ordering::SeqCst)).sum()
    }

    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.shared.failed.load(Ordering::SeqCst) > 0
    }

    /// Lets each client finish what it asked, and looks whether all are still connected.
    #[must_use]
    pub fn finish(self) -> Seen {
        self.shared.is_over.store(true, Ordering::SeqCst);
        let mut seen = Seen {
            clients: Vec::new(),
            operations: Vec::new(),
            violations: Vec::new(),
            sequence: Arc::clone(&self.shared.sequence),
        };
        for thread in self.threads {
            let (client, violation) = thread.join().expect("a client does not panic");
            match violation.or_else(|| client.check_idle().err()) {
                Some(violation) => {
                    seen.violations.push(violation);
                    seen.operations.extend(client.into_operations());
                }
                None => seen.clients.push(client),
            }
        }
        seen
    }
}

impl Seen {
    /// Has one client read all that any wrote: over its old connection or, where all are broken, a
    /// new one made by `connect`. It can then stop the guest.
    pub fn read_back(
        &mut self,
        connect: impl FnOnce(&Arc<Sequence>) -> Result<Client>,
    ) -> Result<Client> {
        let mut clients = std::mem::take(&mut self.clients);
        let mut reader = match clients.pop() {
            Some(client) => client,
            None => connect(&self.sequence)?,
        };
        for client in clients {
            self.operations.extend(client.into_operations());
        }
        let mut keys = reader.keys();
        keys.extend(self.operations.iter().map(|operation| operation.key));
        for key in keys {
            if let Err(violation) = reader.get(key) {
                self.violations.push(violation);
                break;
            }
        }
        self.operations.extend(reader.take_operations());
        Ok(reader)
    }
}

fn work(
    mut client: Client,
    number: usize,
    mut random: StdRng,
    shared: &Shared,
) -> (Client, Option<Violation>) {
    let clients = u32::try_from(shared.answers.len()).unwrap_or(KEYS);
    let width = clients.saturating_mul(KEYS_PER_CLIENT).clamp(1, KEYS);
    while !shared.is_over.load(Ordering::SeqCst) {
        let result = if random.random_bool(ANY_KEY) {
            client.get(random.random_range(0..KEYS)).map(|_| ())
        } else {
            let key = window(shared.sequence.current(), width) + random.random_range(0..width);
            let put = random.random_bool(PUT);
            if put { client.put(key % KEYS) } else { client.get(key % KEYS).map(|_| ()) }
        };
        if let Err(violation) = result {
            shared.failed.fetch_add(1, Ordering::SeqCst);
            return (client, Some(violation));
        }
        shared.answers[number].fetch_add(1, Ordering::SeqCst);
    }
    (client, None)
}

/// The first key of the window; two events of the sequence are an operation.
fn window(sequence: u64, width: u32) -> u32 {
    let moved = sequence / (2 * OPERATIONS_PER_KEY * u64::from(width));
    let first = moved * u64::from(width) % u64::from(KEYS);
    u32::try_from(first).unwrap_or(0)
}
