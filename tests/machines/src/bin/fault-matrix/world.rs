//! The hosts of a pair, their arbiter and their clients, each in a network namespace of its own; the
//! hosts with a view of the file systems of their own, too.
//!
//! ```text
//!   clients  10.77.0.1 bridge ─┬─ world ─ bridge ─ tap-a   A   repl 10.78.0.1 ─┬─ bridge 10.78.0.9
//!                              └─ world ─ bridge ─ tap-b   B   repl 10.78.0.2 ─┘         arbiter
//! ```
//!
//! Cuts are made where packets arrive, so that their sender learns nothing, as on a network.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use understudy_tests::network::{BACKUP_TAP, Namespace, PRIMARY_TAP, output, run};

/// A view of the file systems: what is mounted in one is not in another.
pub struct Mounts(File);

impl Mounts {
    /// A copy of the calling thread's view.
    pub fn copy() -> Result<Self> {
        let made = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                isolate()?;
                File::open("/proc/thread-self/ns/mnt").context("Cannot open a mount namespace")
            });
            thread.join().expect("it does not panic")
        });
        Ok(Self(made?))
    }

    /// Runs a command that sees the file systems so.
    pub fn run(&self, program: &str, arguments: &str) -> Result<()> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // Threads share what setns(2) is to change for this one alone.
                unshare(CloneFlags::CLONE_FS)
                    .and_then(|()| setns(&self.0, CloneFlags::CLONE_NEWNS))
                    .context("Cannot enter a mount namespace")?;
                run(program, arguments)
            });
            thread.join().expect("it does not panic")
        })
    }
}

/// Gives the calling thread a view of the file systems of its own.
pub fn isolate() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("Cannot make a mount namespace: this needs root")?;
    run("mount", "--make-rprivate /")
}

/// One of the two.
pub struct Host {
    pub network: Namespace,
    pub mounts: Mounts,
    pub tap: &'static str,
    pub address: &'static str,
}

impl Host {
    fn new(tap: &'static str, address: &'static str) -> Result<Self> {
        Ok(Self { network: Namespace::new()?, mounts: Mounts::copy()?, tap, address })
    }

    /// What a process of this host is in.
    #[must_use]
    pub fn namespaces(&self) -> [BorrowedFd<'_>; 2] {
        [self.network.as_fd(), self.mounts.0.as_fd()]
    }

    /// How many frames its VM has sent to the world so far.
    pub fn frames(&self) -> Result<u64> {
        self.network.frames_from(self.tap)
    }
}

/// All of them.
pub struct World {
    pub a: Host,
    pub b: Host,
    pub arbiter: Namespace,
    pub clients: Namespace,
}

/// A place in the replication network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    A,
    B,
    Arbiter,
}

/// The arbiter's address there.
pub const ARBITER: &str = "10.78.0.9";

/// A packet that begins a request for etcd's transaction, to nft(8): 12 bytes after a TCP header with the
/// timestamps that Linux sends, `POST /v3/kv/txn` has `txn`.
const TRANSACTION: &str = "@th,352,24 0x74786e";

impl World {
    /// The hosts see what the calling thread has mounted so far.
    pub fn new() -> Result<Self> {
        ensure!(Path::new("/dev/net/tun").exists(), "this needs /dev/net/tun: modprobe tun");
        let world = Self {
            a: Host::new(PRIMARY_TAP, "10.78.0.1")?,
            b: Host::new(BACKUP_TAP, "10.78.0.2")?,
            arbiter: Namespace::new()?,
            clients: Namespace::new()?,
        };
        world.clients.within(|| hub("world", "10.77.0.1/24", &world))??;
        world.arbiter.within(|| hub("repl", &format!("{ARBITER}/24"), &world))??;
        for host in [&world.a, &world.b] {
            host.network.within(|| connect(host))??;
        }
        for place in [Place::A, Place::B, Place::Arbiter] {
            world.namespace(place).within(filter)??;
        }
        Ok(world)
    }

    fn namespace(&self, place: Place) -> &Namespace {
        match place {
            Place::A => &self.a.network,
            Place::B => &self.b.network,
            Place::Arbiter => &self.arbiter,
        }
    }

    fn address(&self, place: Place) -> &'static str {
        match place {
            Place::A => self.a.address,
            Place::B => self.b.address,
            Place::Arbiter => ARBITER,
        }
    }

    /// Nothing from one place reaches the other any more.
    pub fn cut_one_way(&self, from: Place, to: Place) -> Result<()> {
        self.drop(from, to, "")
    }

    /// Nothing passes between two places any more.
    pub fn cut(&self, one: Place, other: Place) -> Result<()> {
        self.cut_one_way(one, other).and_then(|()| self.cut_one_way(other, one))
    }

    /// Of the packets between the hosts this share is lost, in each direction.
    pub fn lose(&self, percent: u32) -> Result<()> {
        let some = format!("numgen random mod 100 < {percent} ");
        self.drop(Place::A, Place::B, &some).and_then(|()| self.drop(Place::B, Place::A, &some))
    }

    /// No answer of etcd to a transaction that this host asks for arrives any more; all else does, so that
    /// what is asked for comes about.
    pub fn cut_verdicts(&self, host: Place) -> Result<()> {
        let asks =
            format!("add rule inet fault out ip daddr {ARBITER} {TRANSACTION} ct mark set 1");
        self.namespace(host).within(|| run("nft", &asks))??;
        // Words, and not the connection's beginning and end.
        self.drop(Place::Arbiter, host, "ct mark 1 tcp flags & psh == psh ")
    }

    fn drop(&self, from: Place, to: Place, which: &str) -> Result<()> {
        let rule = format!("add rule inet fault in ip saddr {} {which}drop", self.address(from));
        self.namespace(to).within(|| run("nft", &rule))?
    }

    /// All packets between the hosts pass a token bucket (tc-tbf(8)) of this rate in either direction:
    /// they wait in a queue, and are lost where that is too long.
    pub fn throttle(&self, rate: &str, latency: &str) -> Result<()> {
        let rule = format!("qdisc add dev repl root tbf rate {rate} burst 32k latency {latency}");
        for host in [&self.a, &self.b] {
            host.network.within(|| run("tc", &rule))??;
        }
        Ok(())
    }

    /// Packets between two places pass again.
    pub fn mend(&self, one: Place, other: Place) -> Result<()> {
        for (from, to) in [(one, other), (other, one)] {
            let others: Vec<Place> = [Place::A, Place::B, Place::Arbiter]
                .into_iter()
                .filter(|place| *place != from && *place != to)
                .collect();
            let kept = self.cuts(to)?;
            self.namespace(to).within(|| run("nft", "flush chain inet fault in"))??;
            for other in others {
                if kept.contains(self.address(other)) {
                    self.cut_one_way(other, to)?;
                }
            }
        }
        Ok(())
    }

    /// What is dropped on its arrival, as nft(8) lists it.
    fn cuts(&self, at: Place) -> Result<String> {
        self.namespace(at).within(|| output("nft", "list chain inet fault in"))?
    }

    /// The link is as fast as it is.
    pub fn hurry(&self) -> Result<()> {
        for host in [&self.a, &self.b] {
            host.network.within(|| run("tc", "qdisc del dev repl root"))??;
        }
        Ok(())
    }

    /// All packets pass again.
    pub fn heal(&self) -> Result<()> {
        for place in [Place::A, Place::B, Place::Arbiter] {
            self.namespace(place).within(|| run("nft", "flush chain inet fault in"))??;
        }
        Ok(())
    }
}

/// In the clients' or the arbiter's namespace: the switch between both hosts' devices `name`.
fn hub(name: &str, address: &str, world: &World) -> Result<()> {
    run("ip", "link add hub type bridge forward_delay 0")?;
    run("ip", &format!("address add {address} dev hub"))?;
    for (port, host) in [("to-a", &world.a), ("to-b", &world.b)] {
        let peer = host.network.path();
        run("ip", &format!("link add {port} type veth peer name {name} netns {peer}"))?;
        run("ip", &format!("link set {port} master hub up"))?;
    }
    run("ip", "link set hub up")
}

/// In a host's namespace: its VM's way to the world, and its address.
fn connect(host: &Host) -> Result<()> {
    run("ip", "link add wire type bridge forward_delay 0")?;
    run("ip", &format!("tuntap add dev {} mode tap", host.tap))?;
    for port in ["world", host.tap] {
        run("ip", &format!("link set {port} master wire up"))?;
    }
    run("ip", "link set wire up")?;
    run("ip", &format!("address add {}/24 dev repl", host.address))?;
    run("ip", "link set repl up")
}

/// The chain that cuts go into, and one in which packets are marked.
fn filter() -> Result<()> {
    run("nft", "add table inet fault")?;
    run("nft", "add chain inet fault out { type filter hook output priority 0 ; }")?;
    run("nft", "add chain inet fault in { type filter hook input priority 0 ; }")
}
