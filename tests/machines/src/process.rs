//! One VMM process. It is killed, by its own id, when dropped, and by the kernel when the thread
//! that started it ends, however that comes about.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use api::client::{Answer, Client, Method};
use api::replication::{ReplicationInfo, ReplicationState};
use api::response::{VmInfo, VmState};

use crate::interrupt;

/// How often a condition is looked at.
pub const POLL: Duration = Duration::from_millis(10);

/// A running (or ended) `cloud-hypervisor`.
pub struct Vmm {
    name: String,
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    status: Option<ExitStatus>,
}

/// The folder with our binaries: `UNDERSTUDY_BIN_DIR`, or beside the running one.
pub fn binary(name: &str) -> Result<PathBuf> {
    let folder = match std::env::var_os("UNDERSTUDY_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let own = std::env::current_exe().context("Cannot tell where this program is")?;
            let mut folder = own.parent().unwrap_or(Path::new(".")).to_owned();
            if folder.file_name() == Some(OsStr::new("deps")) {
                folder.pop();
            }
            folder
        }
    };
    let path = folder.join(name);
    ensure!(
        path.is_file(),
        "{} is missing: run `cargo build --workspace` with the same profile first",
        path.display()
    );
    Ok(path)
}

/// In a child before its exec: it dies with the thread that forked it (prctl(2),
/// `PR_SET_PDEATHSIG`), and inherits none of the signals that our programs block.
fn tie_to(parent: libc::pid_t) -> std::io::Result<()> {
    // SAFETY: this option takes one number, and no memory.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: getppid(2) takes nothing and cannot fail.
    if unsafe { libc::getppid() } != parent {
        // It ended before we asked to be told.
        return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
    }
    interrupt::unblock()
}

/// In a child before its exec: goes into namespaces.
fn enter(namespaces: &[libc::c_int]) -> std::io::Result<()> {
    for namespace in namespaces {
        // SAFETY: setns(2) takes two numbers, and no memory.
        if unsafe { libc::setns(*namespace, 0) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

impl Vmm {
    /// Starts the VMM with an API socket in `folder` and waits until it answers.
    pub fn start<S: AsRef<OsStr>>(folder: &Path, name: &str, arguments: &[S]) -> Result<Self> {
        Self::start_with(folder, name, arguments, &[])
    }

    /// As [`Vmm::start`], with variables of its environment.
    pub fn start_with<S: AsRef<OsStr>>(
        folder: &Path,
        name: &str,
        arguments: &[S],
        environment: &[(String, String)],
    ) -> Result<Self> {
        Self::start_in(folder, name, arguments, environment, &[])
    }

    /// As [`Vmm::start_with`], in these namespaces in the place of the caller's.
    pub fn start_in<S: AsRef<OsStr>>(
        folder: &Path,
        name: &str,
        arguments: &[S],
        environment: &[(String, String)],
        namespaces: &[BorrowedFd],
    ) -> Result<Self> {
        let mut vmm = Self::spawn_with(folder, name, arguments, environment, namespaces)?;
        vmm.wait("its API socket to answer", Duration::from_secs(30), |vmm| {
            vmm.get("vmm.ping").is_ok().then_some(())
        })?;
        Ok(vmm)
    }

    /// Starts the VMM and does not wait: for command lines that are meant to fail.
    ///
    /// The VMM lives no longer than the calling *thread*: start it on one that outlives its use.
    pub fn spawn<S: AsRef<OsStr>>(folder: &Path, name: &str, arguments: &[S]) -> Result<Self> {
        Self::spawn_with(folder, name, arguments, &[], &[])
    }

    fn spawn_with<S: AsRef<OsStr>>(
        folder: &Path,
        name: &str,
        arguments: &[S],
        environment: &[(String, String)],
        namespaces: &[BorrowedFd],
    ) -> Result<Self> {
        let socket = folder.join(format!("{name}.sock"));
        let log = folder.join(format!("{name}.log"));
        let output = File::create(&log).context("Cannot create the log")?;
        let mut command = Command::new(binary("cloud-hypervisor")?);
        command
            .arg("--api-socket")
            .arg(format!("path={}", socket.display()))
            .args(arguments)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let parent = libc::pid_t::try_from(std::process::id())?;
        // Open until the child has run `enter`: the caller lends them, and `spawn` waits for its exec.
        let namespaces: Vec<_> = namespaces.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: between fork and exec only async-signal-safe calls are allowed: `tie_to` and
        // `enter` make nothing but system calls, and allocate nothing.
        unsafe { command.pre_exec(move || tie_to(parent).and_then(|()| enter(&namespaces))) };
        let child = command.spawn().context("Cannot start cloud-hypervisor")?;
        Ok(Self { name: name.to_owned(), child, socket, log, status: None })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What the process printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map_or(String::new(), |log| String::from_utf8_lossy(&log).into())
    }

    pub fn get(&self, name: &str) -> Result<Answer> {
        self.call(Method::Get, name, None)
    }

    pub fn put(&self, name: &str, body: Option<&str>) -> Result<Answer> {
        self.call(Method::Put, name, body)
    }

    /// A PUT that must succeed.
    pub fn put_ok(&self, name: &str, body: Option<&str>) -> Result<()> {
        let answer = self.put(name, body)?;
        let (status, text) = (answer.status, &answer.body);
        ensure!(answer.is_success(), "{name} of {}: {status} {text}", self.name);
        Ok(())
    }

    /// A GET that must be answered with exactly this status; the body.
    pub fn get_expect(&self, name: &str, status: u16) -> Result<String> {
        let answer = self.get(name)?;
        self.expect(name, &answer, status)?;
        Ok(answer.body)
    }

    /// A PUT that must be answered with exactly this status; what the error's causes say in one
    /// line, nothing for a success.
    pub fn put_expect(&self, name: &str, body: Option<&str>, status: u16) -> Result<String> {
        let answer = self.put(name, body)?;
        self.expect(name, &answer, status)?;
        if answer.is_success() {
            return Ok(String::new());
        }
        let chain: Vec<String> = serde_json::from_str(&answer.body)?;
        Ok(chain.join(": "))
    }

    /// An error's body is an array of messages, none of them empty.
    fn expect(&self, name: &str, answer: &Answer, status: u16) -> Result<()> {
        let (found, body) = (answer.status, &answer.body);
        ensure!(
            found == status,
            "{name} of {}: {found} {body}, not {status}\n{}",
            self.name,
            self.log()
        );
        if !answer.is_success() {
            let chain: Vec<String> = serde_json::from_str(body)
                .with_context(|| format!("{name}: {found} with the body '{body}'"))?;
            let is_empty = chain.is_empty() || chain.iter().any(String::is_empty);
            ensure!(!is_empty, "{name}: {found} says nothing: {body}");
        }
        Ok(())
    }

    /// What `vm.info` says.
    pub fn info(&self) -> Result<VmInfo> {
        let text = self.get_expect("vm.info", 200)?;
        serde_json::from_str(&text).with_context(|| format!("vm.info is not documented: {text}"))
    }

    pub fn vm_state(&self) -> Result<VmState> {
        Ok(self.info()?.state)
    }

    fn call(&self, method: Method, name: &str, body: Option<&str>) -> Result<Answer> {
        let failed = || format!("{name} of {} failed", self.name);
        let mut client = Client::connect(&self.socket).with_context(failed)?;
        client.exchange(method, name, body).with_context(failed)
    }

    pub fn replication(&self) -> Result<ReplicationInfo> {
        let answer = self.get("vm.replication-info")?;
        let (status, text) = (answer.status, &answer.body);
        ensure!(status == 200, "vm.replication-info: {status} {text}");
        serde_json::from_str(text).context("vm.replication-info is not what is documented")
    }

    pub fn wait_state(
        &mut self,
        wanted: ReplicationState,
        limit: Duration,
    ) -> Result<ReplicationInfo> {
        self.wait(&format!("replication state {wanted:?}"), limit, |vmm| {
            vmm.replication().ok().filter(|info| info.state == wanted)
        })
    }

    /// Looks until `condition` holds, the process ends or the limit has passed.
    pub fn wait<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut(&Self) -> Option<T>,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(value) = condition(self) {
                return Ok(value);
            }
            if let Some(status) = self.child.try_wait()? {
                self.status = Some(status);
                bail!("{} ended ({status}) while waiting for {what}:\n{}", self.name, self.log());
            }
            if start.elapsed() > limit {
                bail!("{} kept us waiting {limit:?} for {what}:\n{}", self.name, self.log());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Sends a signal to this process.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        // SAFETY: kill(2) takes no memory; the child is ours and not reaped, so the id is its.
        let result = unsafe { libc::kill(pid, signal) };
        ensure!(result == 0, "kill({pid}): {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// SIGKILL, and wait until the process is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(libc::SIGKILL)?;
        let status = self.child.wait()?;
        ensure!(status.signal() == Some(libc::SIGKILL), "{} ended itself: {status}", self.name);
        self.status = Some(status);
        Ok(())
    }

    /// Waits for the end of the process.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.status = Some(status);
                return Ok(status);
            }
            ensure!(start.elapsed() < limit, "{} does not end:\n{}", self.name, self.log());
            std::thread::sleep(POLL);
        }
    }

    /// Whether the process still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}
