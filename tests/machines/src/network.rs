//! The network of a pair and its clients, in network namespaces of their own.
//!
//! ```text
//! hosts:    primary ─ tap-a ─┬─ bridge ─┬─ tap-b ─ backup      (replication: its loopback)
//!                            │          └─ to-clients
//! clients:                   └──────────── to-hosts 10.77.0.1/24
//! ```
//!
//! The namespaces have no names: with the last process, thread or open file in them they are gone,
//! and with them all devices, however that process ended.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};

pub const PRIMARY_TAP: &str = "tap-a";
pub const BACKUP_TAP: &str = "tap-b";
/// The guest's address, as its command line takes it.
pub const GUEST_IP: &str = "10.77.0.2/24";
/// Where the guest's server listens.
pub const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2)), 7);

/// A network namespace.
pub struct Namespace(File);

impl Namespace {
    /// A new one with nothing in it but its loopback. Needs root.
    pub fn new() -> Result<Self> {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .context("Cannot make a network namespace: this needs root")?;
            ip("link set lo up")?;
            File::open("/proc/thread-self/ns/net").context("Cannot open a network namespace")
        });
        Ok(Self(made.join().expect("it does not panic")?))
    }

    /// The calling thread's.
    pub fn own() -> Result<Self> {
        let file = File::open("/proc/thread-self/ns/net");
        file.map(Self).context("Cannot open a network namespace")
    }

    /// Moves the calling thread, and what it starts from now on, into the namespace.
    pub fn enter(&self) -> Result<()> {
        setns(&self.0, CloneFlags::CLONE_NEWNET).context("Cannot enter a network namespace")
    }

    /// Runs something in the namespace, on a thread of its own.
    pub fn within<T: Send>(&self, run: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| self.enter().map(|()| run()));
            thread.join().expect("it does not panic")
        })
    }

    /// How many frames were written to a tap of it so far.
    pub fn frames_from(&self, tap: &str) -> Result<u64> {
        let table = self.within(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
        frames_received(&table, tap).with_context(|| format!("{tap} has no counters:\n{table}"))
    }

    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// A path that others can open it by, while this process lives.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// A bridge with two taps for a pair, and a way to it for clients.
pub struct Network {
    pub hosts: Namespace,
    pub clients: Namespace,
}

impl Network {
    pub fn new() -> Result<Self> {
        ensure!(Path::new("/dev/net/tun").exists(), "this needs /dev/net/tun: modprobe tun");
        let network = Self { hosts: Namespace::new()?, clients: Namespace::new()? };
        let clients = network.clients.path();
        network.hosts.within(|| -> Result<()> {
            ip("link add bridge type bridge forward_delay 0")?;
            ip(&format!("link add to-clients type veth peer name to-hosts netns {clients}"))?;
            for tap in [PRIMARY_TAP, BACKUP_TAP] {
                ip(&format!("tuntap add dev {tap} mode tap"))?;
            }
            for port in ["to-clients", PRIMARY_TAP, BACKUP_TAP] {
                ip(&format!("link set {port} master bridge up"))?;
            }
            ip("link set bridge up")
        })??;
        network.clients.within(|| -> Result<()> {
            ip("address add 10.77.0.1/24 dev to-hosts")?;
            ip("link set to-hosts up")
        })??;
        Ok(network)
    }

    /// How many frames a VMM has sent into its tap so far.
    pub fn frames_from(&self, tap: &str) -> Result<u64> {
        self.hosts.frames_from(tap)
    }
}

/// Of the kernel's table: what a device received, which for a tap is what was written to it.
fn frames_received(table: &str, device: &str) -> Option<u64> {
    let line =
        table.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn ip(arguments: &str) -> Result<()> {
    run("ip", arguments)
}

/// Runs a command whose arguments have no spaces, in the calling thread's namespaces.
pub fn run(program: &str, arguments: &str) -> Result<()> {
    output(program, arguments).map(|_| ())
}

/// As [`run`]; what it prints.
pub fn output(program: &str, arguments: &str) -> Result<String> {
    let output = Command::new(program)
        .args(arguments.split(' '))
        .output()
        .with_context(|| format!("Cannot run '{program}': it is missing, or not to be run"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments}: {}", said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read() {
        let table = "Inter-|   Receive  \n face |bytes\n  lo:  10 1 0\n tap-b: 7 9 0\n \
                     tap-a:    1200      17    0    0\n";
        assert_eq!(frames_received(table, "tap-a"), Some(17));
        assert_eq!(frames_received(table, "lo"), Some(1));
        assert_eq!(frames_received(table, "tap"), None);
    }
}
