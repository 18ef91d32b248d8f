//! Snapshots: a directory with `config.json`, `state.json` and `memory-ranges`.
//!
//! Enters: a machine that a person paused. Leaves: a directory that is whole or not there at all:
//! it is written beside its destination, or in a hidden folder of one that the client made, fsynced
//! and renamed. `memory-ranges` holds guest memory in the order of its addresses, the hole below
//! 4 GiB left out, zero pages as holes of the file.
//! `state.json` carries a CRC-32 over all non-zero pages and their numbers and another over the
//! machine's state, so a damaged file is refused instead of being run. `config.json` carries none:
//! whoever restores elsewhere may name other paths there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::config::VmConfig;
use api::invalid::Invalid;
use hypervisor::Hypervisor;
use nix::unistd::{Whence, lseek};
use replication::ids::{PAGE_SIZE, PageIndex};
use replication::ram::Ram;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::device_manager::taps::TapDescriptors;
use crate::machine::{Machine, MachineError, MachineState};
use crate::memory::Memory;
use crate::progress::Progress;

/// The layout of `state.json` that this build writes and reads.
const STATE_VERSION: u32 = 3;
/// Most bytes of a JSON file of a snapshot.
const JSON_BYTES_MAX: u64 = 64 << 20;
/// Pages that are written with one call.
const BATCH_PAGES: usize = 256;

/// A snapshot could not be written or read.
#[derive(Debug, Error)]
pub enum SnapshotError {
    #[error("'{0}' is not a file:// URL")]
    Url(String),
    #[error("The snapshot directory {} is in use", .0.display())]
    InUse(PathBuf),
    #[error("Cannot write the snapshot file {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("Cannot read the snapshot file {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("The snapshot file {} is not what this version writes", path.display())]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("The snapshot has state version {found}, this build reads {STATE_VERSION}")]
    Version { found: u32 },
    #[error("{} has {found} bytes, the machine's memory {expected}", path.display())]
    MemorySize { path: PathBuf, found: u64, expected: u64 },
    #[error("{} is damaged: CRC-32 {found:#010x} instead of {expected:#010x}", path.display())]
    Damaged { path: PathBuf, found: u32, expected: u32 },
    #[error("The snapshot's configuration is not usable: {0}")]
    Config(String),
    #[error("Cannot use the machine")]
    Machine(#[from] MachineError),
}

#[derive(Serialize)]
struct StateFileRef<'a> {
    version: u32,
    memory_crc32: u32,
    machine_crc32: u32,
    machine: &'a MachineState,
}

#[derive(Deserialize)]
struct StateFile {
    memory_crc32: u32,
    machine_crc32: u32,
    machine: MachineState,
}

/// What files of all versions have.
#[derive(Deserialize)]
struct AnyStateFile {
    version: u32,
}

/// The directory behind a `file://` URL.
pub fn directory(url: &str) -> Result<PathBuf, SnapshotError> {
    match url.strip_prefix("file://") {
        Some(path) if !path.is_empty() => Ok(PathBuf::from(path)),
        _ => Err(SnapshotError::Url(url.to_owned())),
    }
}

/// Writes a paused machine to `url`.
pub fn save(machine: &Machine, url: &str) -> Result<(), SnapshotError> {
    let target = directory(url)?;
    // An empty directory may be given, as clients create it beforehand.
    if fs::read_dir(&target).is_ok_and(|mut entries| entries.next().is_some()) || target.is_file() {
        return Err(SnapshotError::InUse(target));
    }
    let beside = beside(&target);
    // Guest memory is for whoever may read this VMM's files, and for nobody else.
    fs::DirBuilder::new()
        .mode(0o700)
        .create(&beside)
        .map_err(|source| SnapshotError::Write { path: beside.clone(), source })?;
    let result = machine
        .with_state(|state| save_into(&beside, machine, state))
        .map_err(SnapshotError::from)
        .and_then(|saved| saved)
        .and_then(|()| publish(&beside, &target));
    if result.is_err() {
        // What is left of a snapshot that failed has no reader.
        let _ = fs::remove_dir_all(&beside);
    }
    result
}

/// Builds a machine from the snapshot at `url`; it is paused.
pub fn restore(
    hypervisor: &Arc<Hypervisor>,
    url: &str,
    prefault: bool,
    taps: TapDescriptors,
) -> Result<Machine, SnapshotError> {
    let from = directory(url)?;
    let mut config: VmConfig = read_json(&from.join("config.json"))?;
    // People edit it, to name other paths on another host.
    let mut complaints = config.validate();
    complaints.extend(config.unsupported());
    if !complaints.is_empty() {
        let lines: Vec<_> = complaints.iter().map(Invalid::line).collect();
        return Err(SnapshotError::Config(lines.join("; ")));
    }
    let strays: Vec<_> = taps.strays(&config).collect();
    if !strays.is_empty() {
        return Err(SnapshotError::Config(format!(
            "net_fds names no network card of the snapshot: {}",
            strays.join(", ")
        )));
    }
    let state = read_state(from.join("state.json"))?;
    let path = from.join("memory-ranges");
    let read = |source| SnapshotError::Read { path: path.clone(), source };
    let memory = File::open(&path).map_err(read)?;
    let found = memory.metadata().map_err(read)?.len();
    if found != config.memory.size {
        return Err(SnapshotError::MemorySize { path, found, expected: config.memory.size });
    }
    config.memory.prefault |= prefault;
    let machine = Machine::build(hypervisor, config, taps)?;
    let crc32 = read_memory(machine.memory().ram(), &memory).map_err(read)?;
    if crc32 != state.memory_crc32 {
        let expected = state.memory_crc32;
        return Err(SnapshotError::Damaged { path, found: crc32, expected });
    }
    machine.restore(state.machine)?;
    Ok(machine)
}

fn save_into(
    directory: &Path,
    machine: &Machine,
    state: &MachineState,
) -> Result<(), SnapshotError> {
    let path = directory.join("memory-ranges");
    let write = |source| SnapshotError::Write { path: path.clone(), source };
    let file = create(&path).map_err(write)?;
    file.set_len(machine.memory().size()).map_err(write)?;
    let memory_crc32 = write_memory(machine.memory(), &file).map_err(write)?;
    file.sync_all().map_err(write)?;
    write_json(&directory.join("config.json"), machine.config())?;
    let path = directory.join("state.json");
    let machine_crc32 =
        crc32_of(state).map_err(|source| SnapshotError::Parse { path: path.clone(), source })?;
    let state =
        StateFileRef { version: STATE_VERSION, memory_crc32, machine_crc32, machine: state };
    write_json(&path, &state)
}

/// Reads the machine's state: of this version, and as it was written.
fn read_state(path: PathBuf) -> Result<StateFile, SnapshotError> {
    // First of all the version: another one may look quite different.
    let AnyStateFile { version: found } = read_json(&path)?;
    if found != STATE_VERSION {
        return Err(SnapshotError::Version { found });
    }
    let state: StateFile = read_json(&path)?;
    let found = crc32_of(&state.machine)
        .map_err(|source| SnapshotError::Parse { path: path.clone(), source })?;
    let expected = state.machine_crc32;
    if found != expected {
        return Err(SnapshotError::Damaged { path, found, expected });
    }
    Ok(state)
}

/// CRC-32 over what the state says, however the file is laid out.
fn crc32_of(machine: &MachineState) -> serde_json::Result<u32> {
    Ok(crc32fast::hash(&serde_json::to_vec(machine)?))
}

/// Makes the finished directory durable under its final name. A directory that the client made,
/// a mount point maybe, keeps its owner and mode: the files move into it, the one last without
/// which the others are no snapshot.
fn publish(beside: &Path, target: &Path) -> Result<(), SnapshotError> {
    let rename = |from: &Path, to: &Path| {
        fs::rename(from, to).map_err(|source| SnapshotError::Write { path: to.to_owned(), source })
    };
    let sync = |path: &Path| {
        File::open(path)
            .and_then(|directory| directory.sync_all())
            .map_err(|source| SnapshotError::Write { path: path.to_owned(), source })
    };
    sync(beside)?;
    if beside.parent() != Some(target) {
        rename(beside, target)?;
        return sync(parent(target));
    }
    for name in ["memory-ranges", "config.json", "state.json"] {
        rename(&beside.join(name), &target.join(name))?;
    }
    fs::remove_dir(beside)
        .map_err(|source| SnapshotError::Write { path: beside.to_owned(), source })?;
    sync(target)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Where the files are written: within a directory that is there, else beside one that is not.
fn beside(target: &Path) -> PathBuf {
    let unique = uuid::Uuid::new_v4().simple();
    if target.is_dir() {
        return target.join(format!(".partial-{unique}"));
    }
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    parent(target).join(format!(".{name}.partial-{unique}"))
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), SnapshotError> {
    let write = |source| SnapshotError::Write { path: path.to_owned(), source };
    let text = serde_json::to_vec_pretty(value)
        .map_err(|source| SnapshotError::Parse { path: path.to_owned(), source })?;
    let file = create(path).map_err(write)?;
    file.write_all_at(&text, 0).map_err(write)?;
    file.sync_all().map_err(write)
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, SnapshotError> {
    let read = |source| SnapshotError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(read)?;
    if file.metadata().map_err(read)?.len() > JSON_BYTES_MAX {
        return Err(read(io::Error::other(format!("it is larger than {JSON_BYTES_MAX} bytes"))));
    }
    file.take(JSON_BYTES_MAX).read_to_string(&mut text).map_err(read)?;
    serde_json::from_str(&text)
        .map_err(|source| SnapshotError::Parse { path: path.to_owned(), source })
}

/// Writes all non-zero pages at their places and returns the CRC over them.
fn write_memory(memory: &Memory, file: &File) -> io::Result<u32> {
    let ram = memory.ram();
    let mut progress = Progress::new("snapshot: writing memory", ram.pages());
    let mut digest = PageDigest::default();
    let mut batch: Vec<u8> = Vec::with_capacity(BATCH_PAGES * PAGE_SIZE);
    let mut batch_start = 0;
    let mut page = [0; PAGE_SIZE];
    let mut next = 0;
    while let Some(PageIndex(index)) = memory.next_populated(PageIndex(next)) {
        next = index + 1;
        if !ram.read_page(PageIndex(index), &mut page) {
            return Err(io::Error::other(format!("guest page {index} cannot be read")));
        }
        let zero = is_zero(&page);
        let follows = batch_start + batch.len() as u64 == index * PAGE_SIZE as u64;
        if !batch.is_empty() && (zero || !follows || batch.len() == BATCH_PAGES * PAGE_SIZE) {
            file.write_all_at(&batch, batch_start)?;
            batch.clear();
        }
        if !zero {
            if batch.is_empty() {
                batch_start = index * PAGE_SIZE as u64;
            }
            digest.add(index, &page);
            batch.extend_from_slice(&page);
        }
        progress.at(index);
    }
    file.write_all_at(&batch, batch_start)?;
    Ok(digest.finish())
}

/// Reads all pages that the file has and returns the CRC over the non-zero ones.
fn read_memory(ram: &Ram, file: &File) -> io::Result<u32> {
    let mut progress = Progress::new("restore: reading memory", ram.pages());
    let mut digest = PageDigest::default();
    let mut page = [0; PAGE_SIZE];
    let mut index = 0;
    while index < ram.pages() {
        let offset = index * PAGE_SIZE as u64;
        let at = i64::try_from(offset).map_err(io::Error::other)?;
        match lseek(file, at, Whence::SeekData) {
            Ok(data) => index = u64::try_from(data).unwrap_or(0) / PAGE_SIZE as u64,
            // Nothing but a hole to the end.
            Err(nix::errno::Errno::ENXIO) => break,
            // A file system without holes: read everything.
            Err(_) => {}
        }
        file.read_exact_at(&mut page, index * PAGE_SIZE as u64)?;
        if !is_zero(&page) {
            digest.add(index, &page);
            if !ram.write_page(PageIndex(index), &page) {
                return Err(io::Error::other(format!("guest page {index} cannot be written")));
            }
        }
        progress.at(index);
        index += 1;
    }
    Ok(digest.finish())
}

/// CRC-32 over numbers and contents of pages in ascending order.
#[derive(Default)]
struct PageDigest(crc32fast::Hasher);

impl PageDigest {
    fn add(&mut self, index: u64, page: &[u8; PAGE_SIZE]) {
        self.0.update(&index.to_le_bytes());
        self.0.update(page);
    }

    fn finish(self) -> u32 {
        self.0.finalize()
    }
}

fn is_zero(page: &[u8; PAGE_SIZE]) -> bool {
    const ZERO: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    *page == ZERO
}
