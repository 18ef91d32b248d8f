//! The control loop with machines that run nothing of note and a replication between two ends of
//! this process. They need /dev/kvm.

use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use api::config::{ConsoleConfig, ConsoleOutputMode, DiskConfig, SnapshotConfig};
use api::replication::{ReceiveReplicaData, ReplicateData, ReplicationState};
use devices::acpi::pm::PowerEvent;
use replication::Observer;
use replication::backup::{self, BackupHandle};
use replication::ids::Generation;
use replication::primary;
use replication::testing::{self, MemoryBuilder, MemoryGuest, Recorder, ReplicaLog};
use serde_json::json;
use tempfile::TempDir;

use super::*;

const LIMIT: Duration = Duration::from_secs(30);

/// A PVH image whose guest halts for ever.
fn halting_kernel() -> Vec<u8> {
    const ENTRY: u64 = 0x10_0000;
    /// cli; hlt; jmp to the hlt.
    const CODE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
    const HEADERS_BYTES: u64 = 64 + 2 * 56;
    const NOTE_BYTES: u64 = 24;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    // ET_EXEC, EM_X86_64, version 1.
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    [ENTRY, 64, 0].iter().for_each(|field| image.extend(field.to_le_bytes()));
    image.extend([0; 4]);
    [64_u16, 56, 2, 0, 0, 0].iter().for_each(|field| image.extend(field.to_le_bytes()));
    let mut header = |kind: u32, offset: u64, address: u64, bytes: u64| {
        image.extend(kind.to_le_bytes());
        image.extend(5_u32.to_le_bytes());
        [offset, address, address, bytes, bytes, 4]
            .iter()
            .for_each(|field| image.extend(field.to_le_bytes()));
    };
    header(1, HEADERS_BYTES + NOTE_BYTES, ENTRY, 4);
    header(4, HEADERS_BYTES, 0, NOTE_BYTES);
    // XEN_ELFNOTE_PHYS32_ENTRY.
    [4_u32, 8, 18].iter().for_each(|field| image.extend(field.to_le_bytes()));
    image.extend(b"Xen\0");
    image.extend(ENTRY.to_le_bytes());
    image.extend(CODE);
    image
}

struct Bed {
    controller: Controller,
    notices: Receiver<Notice>,
    folder: TempDir,
}

impl Bed {
    fn new() -> Self {
        let (notices, queue) = unbounded();
        let hypervisor = Arc::new(Hypervisor::open().unwrap());
        let controller = Controller::new(hypervisor, EventMonitor::disabled(), notices);
        Self { controller, notices: queue, folder: tempfile::tempdir().unwrap() }
    }

    /// With a VM that runs.
    fn running() -> Self {
        let mut bed = Self::new();
        let kernel = bed.kernel();
        std::fs::write(&kernel, halting_kernel()).unwrap();
        let null = ConsoleConfig::new(ConsoleOutputMode::Null);
        let mut config = VmConfig { serial: null.clone(), console: null, ..VmConfig::default() };
        config.memory.size = 64 << 20;
        config.payload.kernel = Some(kernel);
        bed.ask(Request::VmCreate(Box::new(config))).unwrap();
        bed.ask(Request::VmBoot).unwrap();
        bed
    }

    fn kernel(&self) -> std::path::PathBuf {
        self.folder.path().join("kernel")
    }

    fn machine(&self) -> Arc<Machine> {
        Arc::clone(self.controller.machine.as_ref().unwrap())
    }

    fn begin(&mut self, request: Request) -> Receiver<Answer> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        self.controller.serve(Call { request, fds: vec![], reply });
        answer
    }

    /// Works until the answer is there.
    fn wait(&mut self, answer: &Receiver<Answer>) -> Answer {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Ok(answer) = answer.try_recv() {
                return answer;
            }
            if let Ok(notice) = self.notices.recv_timeout(Duration::from_millis(1)) {
                self.controller.notice(notice);
            }
            assert!(Instant::now() < deadline, "no answer");
        }
    }

    fn ask(&mut self, request: Request) -> Answer {
        let answer = self.begin(request);
        self.wait(&answer)
    }

    fn is_protected_by(&mut self, pair: &Pair) {
        self.controller.protection = Protection::Primary {
            handle: Arc::clone(&pair.primary),
            machine: Arc::downgrade(self.controller.machine.as_ref().unwrap()),
            way_back: None,
            shares_disks: false,
        };
    }
}

#[track_caller]
fn refused(answer: Answer, kind: FailureKind, part: &str) {
    let failure = answer.expect_err("it is done");
    let line = failure.chain.join(": ");
    assert!(failure.kind == kind && line.contains(part), "{:?}: {line}", failure.kind);
}

/// A protection of a guest of plain memory, without an arbiter.
struct Pair {
    guest: Arc<testing::Machine>,
    primary: Arc<PrimaryHandle>,
    backup: BackupHandle,
    log: Arc<ReplicaLog>,
    _folder: TempDir,
}

impl Pair {
    fn new(at_backup: Arc<dyn Observer>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("unix:{}", folder.path().join("backup").display());
        let builder = MemoryBuilder::default();
        let log = Arc::clone(&builder.log);
        let options: ReceiveReplicaData = serde_json::from_value(json!({
            "receiver_url": url, "heartbeat_ms": 50, "timeout_ms": 400,
        }))
        .unwrap();
        let backup = backup::receive(builder, options, at_backup).unwrap();
        let guest = testing::Machine::new(testing::memory(&[(0, 16)]));
        let events = Arc::<Recorder>::default();
        let options = replicate(&url);
        let (identity, known) = (HostIdentity::random(), Known::default());
        let observer = Arc::clone(&events) as _;
        let guarded = MemoryGuest(Arc::clone(&guest));
        let primary = primary::protect(guarded, options, identity, &known, observer).unwrap();
        events.wait(|event| *event == Event::Synced).unwrap();
        Self { guest, primary: Arc::new(primary), backup, log, _folder: folder }
    }

    fn state(&self) -> ReplicationState {
        self.primary.info().state
    }
}

fn replicate(url: &str) -> ReplicateData {
    serde_json::from_value(json!({
        "destination_url": url, "heartbeat_ms": 50, "timeout_ms": 400, "reconnect": false,
    }))
    .unwrap()
}

#[track_caller]
fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The backup may run the VM: what goes on here for a moment would be a second one.
#[test]
fn a_process_that_ends_after_a_cut_switch_over_lets_nothing_of_its_vm_go_on() {
    let pair = Pair::new(Arc::<Recorder>::default());
    let mut bed = Bed::running();
    let machine = bed.machine();
    bed.is_protected_by(&pair);
    let starting = pair.log.starting.lock().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| pair.primary.failover(false).unwrap_err());
        until("a cut", || pair.state() == ReplicationState::Suspended);
    });
    assert!(pair.primary.is_handing_over() && pair.guest.is_holding());
    let passed = Arc::<AtomicBool>::default();
    let flag = Arc::clone(&passed);
    pair.guest.before_pass(Box::new(move || {
        flag.store(true, std::sync::atomic::Ordering::Release);
    }));
    bed.controller.take_down();
    assert!(!passed.load(std::sync::atomic::Ordering::Acquire), "its output passed");
    assert!(pair.guest.is_holding());
    assert_eq!(pair.state(), ReplicationState::Suspended);
    assert!(bed.controller.machine.is_none() && bed.controller.config.is_none());
    assert!(matches!(machine.pause(), Err(MachineError::Destroyed)));
    drop(starting);
}

#[test]
fn a_vm_that_its_backup_may_own_cannot_be_booted_a_second_time() {
    let failure = Failure::new(FailureKind::Internal, "Not decided");
    let conflict = Failure::new(FailureKind::Conflict, "Gone");
    let mut bed = Bed::running();
    let (reply, answer) = crossbeam_channel::bounded(1);
    bed.controller.winding_down = true;
    bed.controller.parted(After::Shutdown(reply), Parting::Undecided(failure.clone()));
    refused(bed.wait(&answer), FailureKind::Internal, "its backup may run it");
    refused(bed.ask(Request::VmBoot), FailureKind::NotFound, "No VM");
    refused(bed.ask(Request::VmInfo), FailureKind::NotFound, "No VM");
    for parting in [Parting::Undecided(failure), Parting::Elsewhere(conflict)] {
        let mut bed = Bed::running();
        bed.controller.no_shutdown = true;
        bed.controller.winding_down = true;
        bed.controller.parted(After::PowerOff, parting);
        assert!(bed.controller.ending.is_none());
        refused(bed.ask(Request::VmBoot), FailureKind::NotFound, "No VM");
    }
    // It ended in order: nobody else has it.
    let mut bed = Bed::running();
    let (reply, answer) = crossbeam_channel::bounded(1);
    bed.controller.parted(After::Shutdown(reply), Parting::InOrder);
    bed.wait(&answer).unwrap();
    bed.ask(Request::VmBoot).unwrap();
}

/// The state shows the end of a switch-over before the loop hears of it, which has yet to see to the way
/// back.
#[test]
fn a_vm_whose_switch_over_has_ended_is_not_ended_here() {
    let again = Request::VmReplicate(Box::new(replicate("unix:/nonexistent/replica")));
    for request in [
        Request::VmDelete,
        Request::VmShutdown,
        Request::VmStopReplication,
        Request::VmPause,
        again,
    ] {
        let pair = Pair::new(Arc::<Recorder>::default());
        let mut bed = Bed::running();
        bed.is_protected_by(&pair);
        pair.primary.failover(false).unwrap();
        assert_eq!(pair.state(), ReplicationState::Lost);
        let what = format!("{request:?}");
        let answer = bed.ask(request);
        refused(answer, FailureKind::Conflict, "goes on there");
        assert!(bed.controller.machine.is_some() && !bed.controller.winding_down, "{what}");
        assert!(matches!(bed.controller.protection, Protection::Primary { .. }), "{what}");
        let number = bed.controller.heard;
        let event = Event::FailoverFinished { generation: Generation(2) };
        bed.controller.notice(Notice::Replication { protection: number, event });
        assert!(bed.controller.machine.is_none() && bed.controller.config.is_none(), "{what}");
        refused(bed.ask(Request::VmStopReplication), FailureKind::Conflict, "goes on there");
        bed.ask(Request::VmDelete).unwrap();
        pair.backup.join();
    }
}

/// The backup takes the VM between the loop's look and the order to end it.
#[test]
fn a_protection_that_ended_with_a_take_over_did_not_end_in_order() {
    let pair = Pair::new(Arc::<Recorder>::default());
    pair.primary.failover(false).unwrap();
    assert!(matches!(Parting::of(&pair.primary, Ok(())), Parting::Elsewhere(_)));
    pair.backup.join();
}

/// Its old protection is Lost still, and is none of it.
#[test]
fn a_vm_that_comes_after_one_that_was_handed_over_is_ended_as_any() {
    let pair = Pair::new(Arc::<Recorder>::default());
    let mut bed = Bed::running();
    bed.is_protected_by(&pair);
    let config = bed.controller.config.clone().unwrap();
    pair.primary.failover(false).unwrap();
    let event = Event::FailoverFinished { generation: Generation(2) };
    bed.controller.notice(Notice::Replication { protection: 0, event });
    bed.ask(Request::VmCreate(Box::new(config))).unwrap();
    bed.ask(Request::VmBoot).unwrap();
    bed.ask(Request::VmShutdown).unwrap();
    bed.ask(Request::VmDelete).unwrap();
}

/// One that another was to take the place of, and that goes on.
#[test]
fn a_protection_that_is_put_back_is_heard_again() {
    let pair = Pair::new(Arc::<Recorder>::default());
    let mut bed = Bed::running();
    bed.is_protected_by(&pair);
    let (machine, number) = (bed.machine(), bed.controller.heard);
    let before = bed.controller.protection.replaceable().unwrap();
    bed.controller.number();
    bed.controller.protection = Protection::Connecting {
        machine: Arc::clone(&machine),
        stays: Some((number, Box::new(before))),
        way_back: None,
        shares_disks: false,
        is_held: false,
    };
    let (reply, answer) = crossbeam_channel::bounded(1);
    let handle = Err(Failure::new(FailureKind::Internal, "No thread"));
    bed.controller.notice(Notice::Protected { machine, handle, reply });
    refused(answer.recv().unwrap(), FailureKind::Internal, "No thread");
    pair.primary.failover(false).unwrap();
    let event = Event::FailoverFinished { generation: Generation(2) };
    bed.controller.notice(Notice::Replication { protection: number, event });
    assert!(bed.controller.machine.is_none() && bed.controller.config.is_none());
}

#[test]
fn a_reboot_ends_the_pause_that_it_found_and_none_that_began_later() {
    for paused_before in [true, false] {
        let mut bed = Bed::running();
        let machine = bed.machine();
        if paused_before {
            bed.ask(Request::VmPause).unwrap();
        }
        // The reset waits for the end of an epoch's pause.
        machine.quiesce().unwrap();
        let answer = bed.begin(Request::VmReboot);
        if !paused_before {
            std::thread::sleep(Duration::from_millis(50));
            machine.pause_alone().unwrap();
        }
        machine.release().unwrap();
        bed.wait(&answer).unwrap();
        assert_eq!(machine.is_paused(), !paused_before);
    }
}

#[test]
fn nothing_changes_a_vm_while_its_snapshot_is_written() {
    let mut bed = Bed::running();
    bed.ask(Request::VmPause).unwrap();
    bed.controller.snapshots.store(true, std::sync::atomic::Ordering::Release);
    let url = format!("file://{}", bed.folder.path().join("s").display());
    for request in [
        Request::VmResume,
        Request::VmShutdown,
        Request::VmDelete,
        Request::VmBoot,
        Request::VmReboot,
        Request::VmPowerButton,
        Request::VmSnapshot(SnapshotConfig { destination_url: url }),
    ] {
        refused(bed.ask(request), FailureKind::Internal, "snapshot is being written");
    }
    assert!(bed.machine().is_paused());
    bed.ask(Request::VmInfo).unwrap();
    bed.controller.snapshots.store(false, std::sync::atomic::Ordering::Release);
    bed.ask(Request::VmResume).unwrap();
}

/// What a guest asks while its VM winds down is heard if that comes to nothing.
#[test]
fn a_guest_is_heard_once_the_end_of_its_vm_came_to_nothing() {
    for told in [true, false] {
        let Bed { mut controller, notices, folder: _folder } = Bed::running();
        controller.no_shutdown = true;
        controller.winding_down = true;
        let machine = Arc::clone(controller.machine.as_ref().unwrap());
        machine.devices().on_power()(PowerEvent::Off);
        if !told {
            // Heard, and left to a reset that ended while the VM wound down.
            machine.events().recv().unwrap();
        }
        let (_calls, call_queue) = unbounded();
        let sender = controller.notices.clone();
        let worker = std::thread::spawn(move || {
            controller.work(&call_queue, &notices);
            controller.guest_is_down
        });
        std::thread::sleep(Duration::from_millis(100));
        let (reply, answer) = crossbeam_channel::bounded(1);
        let refusal = Failure::new(FailureKind::Conflict, "A switch-over is under way");
        let parting = Parting::Elsewhere(refusal);
        sender.send(Notice::ProtectionEnded(After::Delete(reply), parting)).unwrap();
        answer.recv_timeout(LIMIT).unwrap().unwrap_err();
        std::thread::sleep(Duration::from_millis(300));
        sender.send(Notice::Terminate).unwrap();
        assert!(worker.join().unwrap(), "the guest was not heard (told {told})");
    }
}

/// Stands still as soon as the VM was taken over.
struct Late(Arc<Barrier>);

impl Observer for Late {
    fn event(&self, event: Event) {
        if matches!(event, Event::FailoverFinished { .. }) {
            self.0.wait();
            self.0.wait();
        }
    }
}

#[test]
fn a_vm_is_protected_from_the_moment_of_its_take_over() {
    let barrier = Arc::new(Barrier::new(2));
    let pair = Pair::new(Arc::new(Late(Arc::clone(&barrier))));
    pair.primary.failover(false).unwrap();
    // It shows that it has the VM, and its engine has not ended.
    barrier.wait();
    assert_eq!(pair.backup.info().state, ReplicationState::TakenOver);
    assert!(!pair.backup.is_finished());
    let mut bed = Bed::running();
    bed.controller.protection = Protection::Backup {
        handle: Arc::new(pair.backup),
        replica: None,
        taps: TapDescriptors::default(),
    };
    let nowhere = bed.folder.path().join("nobody");
    let data = replicate(&format!("unix:{}", nowhere.display()));
    let answer = bed.begin(Request::VmReplicate(Box::new(data)));
    assert!(answer.try_recv().is_err(), "it is answered before the engine has ended");
    assert!(matches!(bed.controller.protection, Protection::Connecting { .. }));
    barrier.wait();
    refused(bed.wait(&answer), FailureKind::Internal, "nobody");
}

#[test]
fn a_reboot_that_leaves_nothing_to_run_switches_the_vm_off() {
    let mut bed = Bed::running();
    // The payload is not there: the guest runs on.
    std::fs::remove_file(bed.kernel()).unwrap();
    refused(bed.ask(Request::VmReboot), FailureKind::Internal, "Cannot load the payload");
    assert_eq!(state(&mut bed), "Running");
    // It is none, which is found once memory is gone.
    let head = [b"\x7fELF\x02\x01".as_slice(), &[0; 12], &[62, 0], &[0; 100]].concat();
    std::fs::write(bed.kernel(), head).unwrap();
    refused(bed.ask(Request::VmReboot), FailureKind::Internal, "Cannot load the payload");
    assert_eq!(state(&mut bed), "Created");
    assert!(bed.controller.ending.is_none() && !bed.controller.resetting);
    std::fs::write(bed.kernel(), halting_kernel()).unwrap();
    bed.ask(Request::VmBoot).unwrap();
    assert_eq!(state(&mut bed), "Running");
}

fn state(bed: &mut Bed) -> String {
    let Ok(Reply::Json(info)) = bed.ask(Request::VmInfo) else { panic!("no info") };
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info["state"].as_str().unwrap().to_owned()
}

fn image(folder: &Path) -> DiskConfig {
    let path = folder.join("image");
    std::fs::write(&path, [0; 4096]).unwrap();
    DiskConfig { path: Some(path), ..DiskConfig::default() }
}

/// As what the host still writes for a machine that is let go of.
fn lock(path: &Path) -> std::fs::File {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let whole = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)).unwrap();
    file
}

/// Whoever calls its backup has the old machine until that is over. Its image is free all the same, once the
/// host writes nothing more to it.
#[test]
fn what_is_left_of_a_vm_keeps_its_image_only_for_what_is_under_way() {
    let mut bed = Bed::running();
    bed.ask(Request::VmShutdown).unwrap();
    let disk = image(bed.folder.path());
    let path = disk.path.clone().unwrap();
    bed.ask(Request::VmAddDisk(Box::new(disk))).unwrap();
    bed.ask(Request::VmBoot).unwrap();
    let _held = bed.machine();
    bed.ask(Request::VmShutdown).unwrap();
    let writes = lock(&path);
    refused(bed.ask(Request::VmBoot), FailureKind::Internal, "let go of");
    drop(writes);
    bed.ask(Request::VmBoot).unwrap();
}

/// Its image was raw when the VM was first booted, and whatever the guest wrote to it is that guest's.
#[test]
fn a_guest_may_write_another_format_s_head_to_its_raw_disk() {
    let mut bed = Bed::running();
    bed.ask(Request::VmShutdown).unwrap();
    let disk = image(bed.folder.path());
    let path = disk.path.clone().unwrap();
    bed.ask(Request::VmAddDisk(Box::new(disk))).unwrap();
    bed.ask(Request::VmBoot).unwrap();
    let config = bed.machine().config().clone();
    std::fs::write(&path, [b"QFI\xfb".as_slice(), &[0; 4092]].concat()).unwrap();
    bed.ask(Request::VmShutdown).unwrap();
    bed.ask(Request::VmBoot).unwrap();
    // As a backup that has been told of it, or a restored one.
    bed.ask(Request::VmDelete).unwrap();
    let hypervisor = Arc::clone(&bed.controller.hypervisor);
    let machine = Machine::build(&hypervisor, config, TapDescriptors::default()).unwrap();
    assert_eq!(machine.config().disks.as_ref().unwrap()[0].image_type.as_deref(), Some("Raw"));
}
