//! Real etcd servers for tests: one, or several that are a cluster, with their data in a temporary
//! folder. Each is killed by its own id when dropped, and by the kernel when the thread that started
//! it ends, however that comes about.
//!
//! A cluster has a loopback address of its own, made of this process's id, so its ports are taken by
//! nobody: not by another test, nor as the near end of a connection.

mod http;

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

pub use http::{answer, request};

/// Longest wait for a cluster; a machine under load is slow, a broken one for ever.
const LIMIT: Duration = Duration::from_secs(60);
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);
/// First port; each member has three.
const PORT_FIRST: u16 = 23_700;
const PORTS_EACH: u16 = 3;

/// Files for `https:`.
#[derive(Clone, Debug)]
pub struct Tls {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Servers that agree with each other.
pub struct Cluster {
    members: Vec<Member>,
    folder: TempDir,
    address: Ipv4Addr,
    tls: Option<Tls>,
}

struct Member {
    name: String,
    /// Of clients; that of peers and that of metrics follow.
    port: u16,
    child: Option<Child>,
}

/// An address of the loopback that other processes do not use: 127.64.0.0/10 holds 22 bits, which
/// are a process's id (`PID_MAX_LIMIT` of Linux).
#[must_use]
pub fn own_address() -> Ipv4Addr {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 64 | (high & 0x3f), middle, low)
}

/// Ports that this process has not given away yet.
fn ports(count: u16) -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(PORT_FIRST);
    NEXT.fetch_add(count, Ordering::Relaxed)
}

/// In a child before its exec: it dies with the thread that forked it.
fn die_with(parent: libc::pid_t) -> std::io::Result<()> {
    // SAFETY: PR_SET_PDEATHSIG (prctl(2)) takes one number, and no memory.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: getppid(2) takes nothing and cannot fail.
    if unsafe { libc::getppid() } != parent {
        // It ended before we asked to be told.
        return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

impl Cluster {
    /// Starts `count` servers and waits until they serve.
    ///
    /// # Errors
    /// etcd is missing, or does not serve.
    pub fn start(count: u16) -> Result<Self> {
        Self::start_with(count, None)
    }

    /// As [`Cluster::start`], on an address of the calling thread's network namespace, from which
    /// alone it is to be asked.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub fn start_on(count: u16, address: Ipv4Addr) -> Result<Self> {
        Self::start_at(count, None, address)
    }

    /// As [`Cluster::start`], by `https:`, for clients with a certificate of the authority only.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub fn start_with(count: u16, tls: Option<Tls>) -> Result<Self> {
        Self::start_at(count, tls, own_address())
    }

    fn start_at(count: u16, tls: Option<Tls>, address: Ipv4Addr) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let first = ports(count * PORTS_EACH);
        let member = |number: u16| Member {
            name: format!("m{number}"),
            port: first + number * PORTS_EACH,
            child: None,
        };
        let members = (0..count).map(member).collect();
        let mut cluster = Self { members, folder, address, tls };
        for member in 0..cluster.members.len() {
            cluster.restart(member)?;
        }
        cluster.wait_serving()?;
        Ok(cluster)
    }

    /// Starts a member that was killed; it takes part when it can.
    ///
    /// # Errors
    /// etcd is missing.
    pub fn restart(&mut self, member: usize) -> Result<()> {
        ensure!(self.members[member].child.is_none(), "member {member} runs already");
        let mut command = self.command(&self.members[member])?;
        let child = command.spawn().context(
            "Cannot start `etcd`, which these tests need: install etcd-server (Debian), or put a \
             release of etcd into the PATH",
        )?;
        self.members[member].child = Some(child);
        Ok(())
    }

    fn command(&self, member: &Member) -> Result<Command> {
        let url = |port: u16| format!("http://{}", self.at(port));
        let peers: Vec<String> = self
            .members
            .iter()
            .map(|member| format!("{}={}", member.name, url(member.port + 1)))
            .collect();
        let log = File::create(self.log(member))?;
        let mut command = Command::new("etcd");
        command.args(["--name", &member.name]);
        command.arg("--data-dir").arg(self.folder.path().join(&member.name));
        command.args(["--listen-client-urls", &self.client_url(member)]);
        command.args(["--advertise-client-urls", &self.client_url(member)]);
        command.args(["--listen-peer-urls", &url(member.port + 1)]);
        command.args(["--initial-advertise-peer-urls", &url(member.port + 1)]);
        command.args(["--listen-metrics-urls", &url(member.port + 2)]);
        command.args(["--initial-cluster", &peers.join(",")]);
        let first = self.members.first().map_or(0, |first| first.port);
        command.args(["--initial-cluster-token", &format!("{}-{first}", std::process::id())]);
        // Elections in tests need not take as long as between hosts.
        command.args(["--heartbeat-interval", "50", "--election-timeout", "500"]);
        if let Some(tls) = &self.tls {
            command.arg("--cert-file").arg(&tls.certificate).arg("--key-file").arg(&tls.key);
            command.arg("--trusted-ca-file").arg(&tls.ca).arg("--client-cert-auth");
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let parent = libc::pid_t::try_from(std::process::id())?;
        // SAFETY: between fork and exec the closure calls prctl(2) and getppid(2) only, which are
        // safe there (signal-safety(7)); it allocates nothing.
        unsafe { command.pre_exec(move || die_with(parent)) };
        Ok(command)
    }

    fn at(&self, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(self.address, port)
    }

    fn client_url(&self, member: &Member) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.at(member.port))
    }

    fn log(&self, member: &Member) -> PathBuf {
        self.folder.path().join(format!("{}.log", member.name))
    }

    /// How many members it has, dead ones included.
    #[must_use]
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// Where a member takes requests.
    #[must_use]
    pub fn client(&self, member: usize) -> SocketAddrV4 {
        self.at(self.members[member].port)
    }

    /// Where a member takes requests, as a URL.
    #[must_use]
    pub fn url(&self, member: usize) -> String {
        self.client_url(&self.members[member])
    }

    /// All of them as an arbiter's option, with this key.
    #[must_use]
    pub fn arbiter(&self, key: &str) -> String {
        let urls: Vec<String> = (0..self.members.len()).map(|member| self.url(member)).collect();
        format!("etcd:{}/{key}", urls.join(","))
    }

    /// The folder for data and logs.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Kills a member as a power failure would.
    ///
    /// # Errors
    /// It is dead already, or cannot be killed.
    pub fn kill(&mut self, member: usize) -> Result<()> {
        let mut child = self.members[member].child.take().context("it is dead already")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Stops a member as SIGSTOP does: its connections stay, and nobody answers.
    ///
    /// # Errors
    /// It is dead.
    pub fn freeze(&self, member: usize) -> Result<()> {
        self.signal(member, libc::SIGSTOP)
    }

    /// Lets a frozen member go on.
    ///
    /// # Errors
    /// It is dead.
    pub fn thaw(&self, member: usize) -> Result<()> {
        self.signal(member, libc::SIGCONT)
    }

    fn signal(&self, member: usize, signal: libc::c_int) -> Result<()> {
        let child = self.members[member].child.as_ref().context("it is dead")?;
        let pid = libc::pid_t::try_from(child.id())?;
        // SAFETY: kill(2) takes two numbers; the child has not been waited for, so the id is its own.
        if unsafe { libc::kill(pid, signal) } != 0 {
            return Err(std::io::Error::last_os_error()).context("Cannot signal etcd");
        }
        Ok(())
    }

    /// The member that leads.
    ///
    /// # Errors
    /// None does within the limit.
    pub fn leader(&mut self) -> Result<usize> {
        self.wait("a leader", |cluster| {
            (0..cluster.members.len()).find(|member| {
                let metrics = cluster.metrics(*member, "/metrics").unwrap_or_default();
                metrics.lines().any(|line| line == "etcd_server_is_leader 1")
            })
        })
    }

    /// Waits until every member that lives serves reads that a majority agrees upon.
    ///
    /// # Errors
    /// They do not within the limit, or one ended.
    pub fn wait_serving(&mut self) -> Result<()> {
        self.wait("the cluster", |cluster| {
            let serves = |member: usize| {
                let health = cluster.metrics(member, "/health").unwrap_or_default();
                health.contains("\"true\"")
            };
            let living =
                (0..cluster.members.len()).filter(|at| cluster.members[*at].child.is_some());
            living.into_iter().all(serves).then_some(())
        })
    }

    fn metrics(&self, member: usize, path: &str) -> Result<String> {
        let member = &self.members[member];
        ensure!(member.child.is_some(), "it is dead");
        let (status, body) = request(self.at(member.port + 2).into(), "GET", path, &[], "")?;
        ensure!(status == 200, "status {status}");
        Ok(body)
    }

    fn wait<T>(&mut self, what: &str, look: impl Fn(&Self) -> Option<T>) -> Result<T> {
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(found) = look(self) {
                return Ok(found);
            }
            for at in 0..self.members.len() {
                let member = &mut self.members[at];
                let Some(child) = &mut member.child else { continue };
                if let Some(status) = child.try_wait()? {
                    let log = fs::read_to_string(self.log(&self.members[at]))?;
                    bail!("etcd ended with {status}:\n{log}");
                }
            }
            if Instant::now() > until {
                let logs: Vec<String> = self
                    .members
                    .iter()
                    .map(|member| fs::read_to_string(self.log(member)).unwrap_or_default())
                    .collect();
                bail!("No {what} within {LIMIT:?}:\n{}", logs.join("\n"));
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            if let Some(mut child) = member.child.take() {
                // A child that ended by itself cannot be killed, and is waited for all the same.
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}
