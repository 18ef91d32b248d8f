//! A serial port with its host side: files, ptys, sockets, the terminal.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use devices::bus::BusDevice;
use devices::console::{BackendError, PortMode};
use devices::counters::Counters;
use devices::irq::IrqLine;
use devices::output_gate::{STALLED_BYTES_MAX, THROTTLE_BYTES};
use devices::serial::SerialPort;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, SetArg, cfmakeraw, tcgetattr, tcsetattr};

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const LSR: u64 = 5;
const LSR_DATA: u8 = 1;
const LSR_TX_EMPTY: u8 = 1 << 5;

fn open(mode: &PortMode) -> SerialPort {
    SerialPort::open(mode, IrqLine::new().unwrap()).unwrap()
}

fn get(port: &SerialPort, register: u64) -> u8 {
    let mut data = [0];
    port.device().read(register, &mut data);
    data[0]
}

fn put(port: &SerialPort, register: u64, value: u8) {
    port.device().write(register, &[value]);
}

fn print(port: &SerialPort, text: &[u8]) {
    for byte in text {
        put(port, DATA, *byte);
    }
}

/// Waits for an edge of the interrupt.
fn wait_interrupt(port: &SerialPort) {
    let event = port.device().irq().event().try_clone().unwrap();
    while event.read().is_err() {
        std::thread::yield_now();
    }
}

/// Receives as a driver does: interrupt, then all that is there.
fn receive(port: &SerialPort, len: usize) -> Vec<u8> {
    let mut received = Vec::new();
    put(port, IER, 1);
    while received.len() < len {
        wait_interrupt(port);
        get(port, IIR);
        while get(port, LSR) & LSR_DATA != 0 {
            received.push(get(port, DATA));
        }
    }
    received
}

fn counter(port: &SerialPort, name: &str) -> u64 {
    port.counters().into_iter().find(|(found, _)| *found == name).unwrap().1
}

fn read_exactly(mut from: impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn null_takes_everything() {
    let port = open(&PortMode::Null);
    print(&port, b"into the void");
    assert_eq!(counter(&port, "output_bytes"), 13);
    assert_eq!(port.pty_path(), None);
}

#[test]
fn a_file_is_appended_to_and_complete_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::write(&path, b"old\n").unwrap();
    let port = open(&PortMode::File(path.clone()));
    let text: Vec<u8> = (0..100_000u32).map(|at| b'a' + at.to_le_bytes()[0] % 26).collect();
    print(&port, &text);
    drop(port);
    let written = fs::read(&path).unwrap();
    assert_eq!(&written[..4], b"old\n");
    assert_eq!(&written[4..], text);
}

#[test]
fn held_output_reaches_the_file_at_commit_and_not_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let port = open(&PortMode::File(path.clone()));
    let gate = port.device().gate().clone();
    gate.hold();
    print(&port, b"committed ");
    gate.seal(1);
    print(&port, b"sealed ");
    gate.seal(2);
    print(&port, b"open");
    gate.commit(1);
    drop(port);
    assert_eq!(fs::read(&path).unwrap(), b"committed ");
}

#[test]
fn a_file_that_cannot_be_written_is_counted_and_stops_nobody() {
    let port = open(&PortMode::File("/dev/full".into()));
    print(&port, b"no room");
    while counter(&port, "output_dropped_bytes") < 7 {
        std::thread::yield_now();
    }
    assert!(counter(&port, "write_errors") >= 1);
}

#[test]
fn a_file_that_cannot_be_opened_is_an_error_that_names_it() {
    let mode = PortMode::File("/nonexistent/log".into());
    let error = SerialPort::open(&mode, IrqLine::new().unwrap()).unwrap_err();
    assert!(matches!(error, BackendError::File { .. }));
    assert!(error.to_string().contains("/nonexistent/log"));
}

fn open_pty(port: &SerialPort) -> File {
    OpenOptions::new().read(true).write(true).open(port.pty_path().unwrap()).unwrap()
}

#[test]
fn a_pty_carries_bytes_both_ways() {
    let port = open(&PortMode::Pty);
    let mut terminal = open_pty(&port);
    print(&port, b"login: \n");
    assert_eq!(read_exactly(&terminal, 8), b"login: \n");
    // More than the FIFO holds, and bytes that a terminal in cooked mode would act upon.
    let input: Vec<u8> = (0..=255).cycle().take(3000).collect();
    terminal.write_all(&input).unwrap();
    assert_eq!(receive(&port, input.len()), input);
    // A reader may leave and another one come.
    drop(terminal);
    print(&port, b"again");
    assert_eq!(read_exactly(open_pty(&port), 5), b"again");
}

#[test]
fn a_pty_s_reader_gets_the_last_words() {
    for round in 0..50 {
        let port = open(&PortMode::Pty);
        let terminal = open_pty(&port);
        let reader = std::thread::spawn(move || {
            // As busy as a reader may be.
            std::thread::sleep(std::time::Duration::from_millis(5));
            read_exactly(&terminal, 5)
        });
        print(&port, b"words");
        drop(port);
        assert_eq!(reader.join().unwrap(), b"words", "round {round}");
    }
}

#[test]
fn a_pty_without_a_reader_holds_up_neither_guest_nor_end() {
    let port = open(&PortMode::Pty);
    put(&port, IER, 2);
    get(&port, IIR);
    // A driver that respects the busy transmitter, past the point where it shows.
    for at in 0..2 * THROTTLE_BYTES {
        while get(&port, LSR) & LSR_TX_EMPTY == 0 {
            wait_interrupt(&port);
            get(&port, IIR);
        }
        put(&port, DATA, b'0' + at.to_le_bytes()[0] % 10);
    }
    assert!(counter(&port, "output_dropped_bytes") > 0);
    print(&port, b"last words");
    // A reader that comes late finds the kernel's few bytes and then the newest of ours.
    let mut terminal = open_pty(&port);
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !seen.ends_with(b"last words") {
        let len = terminal.read(&mut buffer).unwrap();
        seen.extend_from_slice(&buffer[..len]);
    }
    assert!(seen.len() > STALLED_BYTES_MAX, "{}", seen.len());
    // Stuck again: the end does not wait for a reader.
    print(&port, &vec![b'x'; 100_000]);
    drop(port);
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial.sock");
    let port = open(&PortMode::Socket(path.clone()));
    print(&port, b"nobody listens");
    while counter(&port, "output_dropped_bytes") < 14 {
        std::thread::yield_now();
    }
    for round in 0..3 {
        let mut client = UnixStream::connect(&path).unwrap();
        // The port serves this client once its input arrives.
        client.write_all(b"hello").unwrap();
        assert_eq!(receive(&port, 5), b"hello");
        let next = UnixStream::connect(&path).unwrap();
        let text = format!("round {round}");
        print(&port, text.as_bytes());
        assert_eq!(read_exactly(&client, text.len()), text.as_bytes());
        // Half-closed: it still reads.
        client.shutdown(std::net::Shutdown::Write).unwrap();
        print(&port, b"still there");
        assert_eq!(read_exactly(&client, 11), b"still there");
        drop((client, next));
    }
    drop(port);
    assert!(!path.exists());
}

#[test]
fn a_socket_client_gets_the_last_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let words = [b'w'; 3000];
    for round in 0..100 {
        let port = open(&PortMode::Socket(path.clone()));
        let mut client = UnixStream::connect(&path).unwrap();
        // The client is there when it has been heard.
        client.write_all(b"?").unwrap();
        receive(&port, 1);
        port.device().gate().hold();
        print(&port, &words);
        port.device().gate().seal(1);
        port.device().gate().commit(1);
        drop(port);
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).unwrap();
        assert_eq!(heard.len(), words.len(), "round {round}");
    }
}

#[test]
fn a_fifo_without_a_reader_holds_up_neither_guest_nor_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let port = open(&PortMode::File(path.clone()));
    // More than a pipe holds: the newest are kept.
    print(&port, &vec![b'x'; 2 * THROTTLE_BYTES]);
    let mut reader = OpenOptions::new().read(true).open(&path).unwrap();
    print(&port, b"!");
    let mut buffer = [0; 4096];
    while !buffer.contains(&b'!') {
        assert!(reader.read(&mut buffer).unwrap() > 0);
    }
    print(&port, &vec![b'x'; 2 * THROTTLE_BYTES]);
    drop(port);
}

#[test]
fn a_socket_client_that_does_not_read_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial.sock");
    let port = open(&PortMode::Socket(path.clone()));
    let mut stuck = UnixStream::connect(&path).unwrap();
    stuck.write_all(b"x").unwrap();
    assert_eq!(receive(&port, 1), b"x");
    print(&port, &vec![b'.'; THROTTLE_BYTES]);
    // Its leaving frees the port for the next one.
    drop(stuck);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"y").unwrap();
    assert_eq!(receive(&port, 1), b"y");
    print(&port, b"<welcome>");
    let mut seen = Vec::new();
    while !seen.ends_with(b"<welcome>") {
        seen.extend(read_exactly(&client, 1));
    }
}

#[test]
fn a_socket_path_is_taken_over_only_from_the_dead() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial.sock");
    let mode = PortMode::Socket(path.clone());
    let in_use = |mode: &PortMode| {
        let error = SerialPort::open(mode, IrqLine::new().unwrap()).unwrap_err();
        assert!(matches!(error, BackendError::SocketInUse(_)), "{error}");
    };
    let alive = UnixListener::bind(&path).unwrap();
    in_use(&mode);
    drop(alive);
    assert!(path.exists());
    drop(open(&mode));
    fs::write(&path, b"precious").unwrap();
    in_use(&mode);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    let deep = PortMode::Socket(Path::new("/nonexistent/serial.sock").to_owned());
    let error = SerialPort::open(&deep, IrqLine::new().unwrap()).unwrap_err();
    assert!(matches!(error, BackendError::Socket { .. }));
}

const TTY_CHILD: &str = "UNDERSTUDY_TEST_TTY_CHILD";

/// Not a test of its own: the process whose terminal `the_terminal_is_raw_and_restored` made.
#[test]
#[ignore = "started by the_terminal_is_raw_and_restored"]
fn tty_child() {
    if std::env::var_os(TTY_CHILD).is_none() {
        return;
    }
    let port = open(&PortMode::Tty);
    print(&port, b"<ready>");
    let received = receive(&port, 3);
    print(&port, b"<got ");
    print(&port, &received);
    print(&port, b">");
}

fn read_until(from: &mut File, end: &[u8]) {
    let mut seen = Vec::new();
    while !seen.ends_with(end) {
        let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE).unwrap();
        seen.extend(read_exactly(&*from, 1));
    }
}

#[test]
fn the_terminal_is_raw_and_restored() {
    let pty = openpty(None, None).unwrap();
    let stdio = |fd: &OwnedFd| Stdio::from(fd.try_clone().unwrap());
    let before = tcgetattr(&pty.slave).unwrap();
    assert!(before.local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO));
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tty_child", "--ignored", "--nocapture", "--test-threads=1"])
        .env(TTY_CHILD, "1")
        .stdin(stdio(&pty.slave))
        .stdout(stdio(&pty.slave))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut terminal = File::from(pty.master);
    read_until(&mut terminal, b"<ready>");
    let during = tcgetattr(&pty.slave).unwrap();
    assert!(!during.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO));
    // Control-C goes to the guest.
    terminal.write_all(b"a\x03b").unwrap();
    read_until(&mut terminal, b"<got a\x03b>");
    assert!(child.wait().unwrap().success());
    let mut after = tcgetattr(&pty.slave).unwrap();
    assert_eq!(after, before);
    // The comparison can fail.
    cfmakeraw(&mut after);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &after).unwrap();
    assert_ne!(tcgetattr(&pty.slave).unwrap(), before);
}
