//! `ib_write_bw` and `ib_send_bw` of the package perftest: what an RDMA device does by itself.
//!
//! Enters: the device that a pair used, and this host's address on it. Leaves: MiB a second. Both ends
//! are processes of this host, as a pair's are.

use std::io::Read;
use std::net::{IpAddr, TcpListener};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use api::replication::RdmaPath;

/// As long as a WRITE of a first copy, by one data connection, of pages that lie side by side.
pub const MESSAGE_BYTES: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(20);

/// What is sent, and how a client learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// WRITEs; it asks again and again, which takes a core. It has no other way with them.
    PolledWrites,
    /// SENDs; both ends sleep until the device has something to say.
    AwaitedSends,
}

impl Kind {
    /// The program, as it is called.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::PolledWrites => "ib_write_bw",
            Self::AwaitedSends => "ib_send_bw",
        }
    }
}

/// A process of it, killed when dropped, and what it prints.
struct End {
    program: &'static str,
    child: Child,
    said: Option<JoinHandle<String>>,
}

impl End {
    fn start(program: &'static str, arguments: &[String]) -> Result<Self> {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("Cannot start {program}: install the package perftest"))?;
        let outputs = (child.stdout.take(), child.stderr.take());
        let said = std::thread::spawn(move || {
            let (mut text, mut errors) = (String::new(), String::new());
            // What cannot be read is not said; the errors are few and fit their pipe meanwhile.
            let _ = outputs.0.map(|mut output| output.read_to_string(&mut text));
            let _ = outputs.1.map(|mut output| output.read_to_string(&mut errors));
            text + &errors
        });
        Ok(Self { program, child, said: Some(said) })
    }

    /// Its end, and all that it said.
    fn finish(&mut self) -> Result<(ExitStatus, String)> {
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(began.elapsed() < LIMIT, "{} does not end", self.program);
            std::thread::sleep(POLL);
        };
        let said = self.said.take().and_then(|said| said.join().ok());
        Ok((status, said.unwrap_or_default()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends `messages` over one queue pair; MiB a second on average, by the program's own account.
///
/// # Errors
/// If the program is not there, does not connect, or prints something else.
pub fn rate(path: &RdmaPath, address: IpAddr, messages: u64, kind: Kind) -> Result<f64> {
    let program = kind.program();
    let tcp_port = TcpListener::bind((address, 0))?.local_addr()?.port();
    let mut arguments: Vec<String> = ["-d", &path.device, "-F"].map(str::to_owned).to_vec();
    let numbers = [
        ("-i", u64::from(path.port)),
        ("-x", u64::from(path.gid_index)),
        ("-m", u64::from(path.mtu_bytes)),
        ("-s", MESSAGE_BYTES),
        ("-n", messages),
        ("-p", u64::from(tcp_port)),
    ];
    for (name, number) in numbers {
        arguments.extend([name.to_owned(), number.to_string()]);
    }
    if kind == Kind::AwaitedSends {
        arguments.push("-e".to_owned());
    }
    let mut server = End::start(program, &arguments)?;
    arguments.push(address.to_string());
    let began = Instant::now();
    // The server says nothing when it listens, and takes whoever connects for its client.
    let said = loop {
        let mut client = End::start(program, &arguments)?;
        let (status, said) = client.finish()?;
        if status.success() {
            break said;
        }
        if server.child.try_wait()?.is_some() || began.elapsed() > LIMIT {
            let (_, heard) = server.finish()?;
            bail!("{program} failed ({status}): {said}\nits server: {heard}");
        }
        std::thread::sleep(POLL);
    };
    server.finish()?;
    average(&said).with_context(|| format!("{program} printed no rate:\n{said}"))
}

/// The fourth number of the only line of numbers: size, messages, peak, average, messages a second.
fn average(said: &str) -> Option<f64> {
    let line = said.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_ours = words.first().and_then(|word| word.parse().ok()) == Some(MESSAGE_BYTES);
        (is_ours && words.len() >= 5).then_some(words)
    })?;
    line[3].parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_is_the_fourth_number() {
        let said = " Number of qps   : 1\t\tTransport type : IB\n\
                     #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n \
                     1048576    64               71.30              70.25              0.000070\n---\n";
        assert_eq!(average(said), Some(70.25));
        assert_eq!(average(&said.replace("70.25", "nan")), None);
        assert_eq!(average("Couldn't connect to 10.77.0.1:18515\n"), None);
    }
}
