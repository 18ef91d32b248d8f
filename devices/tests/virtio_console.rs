//! A console on the terminal that its process was started on.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use devices::console::PortMode;
use devices::virtio::console::Console;
use devices::virtio::device::{Activation, ActiveQueue, GuestMemory, Interrupt, VirtioDevice};
use nix::pty::{Winsize, openpty};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const CHILD: &str = "UNDERSTUDY_TEST_CONSOLE_CHILD";
const SIZE: u64 = 1;
/// Ends a test that has failed; nothing depends on it otherwise.
const PATIENCE: Duration = Duration::from_secs(20);

struct Line(Sender<()>);

impl Interrupt for Line {
    fn queue(&self, _index: u16) {}

    fn config(&self) {
        self.0.send(()).unwrap();
    }

    fn needs_reset(&self, why: &str) {
        panic!("{why}");
    }
}

/// Not a test of its own: the process whose terminal `a_driver_hears_of_the_terminal_s_size` made.
#[test]
#[ignore = "started by a_driver_hears_of_the_terminal_s_size"]
fn console_child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let console = Console::open("__console", &PortMode::Tty).unwrap();
    let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_desc_table_address(GuestAddress(0x1000)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(0x2000)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(0x3000)).unwrap();
    queue.set_ready(true);
    let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
    let (told, hear) = channel();
    let queues = vec![ActiveQueue { index: 1, queue, doorbell }];
    let interrupt = Arc::new(Line(told));
    console.activate(Activation { memory, features: SIZE, queues, interrupt }).unwrap();
    hear.recv_timeout(PATIENCE).unwrap();
    let mut config = [0; 4];
    console.read_config(0, &mut config);
    console.gate().write(format!("<{config:?}>").as_bytes());
}

#[test]
fn a_driver_hears_of_the_terminal_s_size() {
    let size = Winsize { ws_row: 50, ws_col: 0x0184, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).unwrap();
    let stdio = |fd: &OwnedFd| Stdio::from(fd.try_clone().unwrap());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "console_child", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .stdin(stdio(&pty.slave))
        .stdout(stdio(&pty.slave))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(pty.slave);
    assert!(child.wait().unwrap().success());
    let mut seen = Vec::new();
    // With nobody on the other side any more, reading ends in EIO.
    let _ = File::from(pty.master).read_to_end(&mut seen);
    let seen = String::from_utf8_lossy(&seen);
    assert!(seen.contains("<[132, 1, 50, 0]>"), "{seen}");
}
