use std::fs;
use std::sync::Barrier;

use uuid::Uuid;

use super::super::folder::Opened;
use super::*;
use crate::ownership::{HostId, Standing, VmId};

fn solo(generation: u64, owner: HostId, vm: VmId) -> Record {
    Record { generation: Generation(generation), vm, standing: Standing::Solo { owner } }
}

fn host() -> HostId {
    HostId(Uuid::new_v4())
}

#[test]
fn a_swap_needs_the_generation_that_stands() {
    let dir = tempfile::tempdir().unwrap();
    let arbiter = FileArbiter::new(dir.path().to_owned());
    let vm = VmId(Uuid::new_v4());
    assert_eq!(arbiter.read().unwrap(), None);
    let first = solo(1, host(), vm);
    assert_eq!(arbiter.compare_and_swap(Generation(0), &first).unwrap(), Outcome::Won);
    let late = solo(1, host(), vm);
    let lost = arbiter.compare_and_swap(Generation(0), &late).unwrap();
    assert_eq!(lost, Outcome::Lost(Some(first)));
    let second = solo(2, host(), vm);
    assert_eq!(arbiter.compare_and_swap(Generation(1), &second).unwrap(), Outcome::Won);
    assert_eq!(arbiter.read().unwrap(), Some(second));
    // Once more, after an answer that got lost.
    assert_eq!(arbiter.compare_and_swap(Generation(1), &second).unwrap(), Outcome::Won);
}

#[test]
fn a_record_that_is_gone_or_older_is_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let arbiter = FileArbiter::new(dir.path().to_owned());
    let vm = VmId(Uuid::new_v4());
    let ahead = solo(3, host(), vm);
    let vanished = |error| matches!(error, ArbiterError::Vanished(Generation(2)));
    assert!(vanished(arbiter.compare_and_swap(Generation(2), &ahead).unwrap_err()));
    arbiter.compare_and_swap(Generation(0), &solo(1, host(), vm)).unwrap();
    assert!(vanished(arbiter.compare_and_swap(Generation(2), &ahead).unwrap_err()));
    assert!(!dir.path().join("gen-3").exists());
}

#[test]
fn the_last_generation_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    let record = serde_json::to_vec(&solo(u64::MAX, host(), VmId(Uuid::new_v4()))).unwrap();
    fs::write(dir.path().join(format!("gen-{}", u64::MAX)), record).unwrap();
    let arbiter = FileArbiter::new(dir.path().to_owned());
    assert!(matches!(arbiter.read(), Err(ArbiterError::Damaged { .. })));
}

#[test]
fn of_many_at_once_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let vm = VmId(Uuid::new_v4());
    for generation in 0..50 {
        let start = Barrier::new(4);
        let won: Vec<Record> = std::thread::scope(|scope| {
            let askers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let arbiter = FileArbiter::new(dir.path().to_owned());
                        let next = solo(generation + 1, host(), vm);
                        start.wait();
                        let outcome = arbiter.compare_and_swap(Generation(generation), &next);
                        (outcome.unwrap() == Outcome::Won).then_some(next)
                    })
                })
                .collect();
            askers.into_iter().filter_map(|asker| asker.join().unwrap()).collect()
        });
        let [winner] = won[..] else { panic!("{} winners", won.len()) };
        let arbiter = FileArbiter::new(dir.path().to_owned());
        assert_eq!(arbiter.read().unwrap(), Some(winner));
    }
}

#[test]
fn damage_is_told_apart_from_absence() {
    let dir = tempfile::tempdir().unwrap();
    let arbiter = FileArbiter::new(dir.path().to_owned());
    for damage in ["", "{", "{\"generation\":2}", "not json at all"] {
        fs::write(dir.path().join("gen-1"), damage).unwrap();
        let error = arbiter.read().unwrap_err();
        assert!(matches!(error, ArbiterError::Damaged { .. }), "{damage}: {error}");
        let next = solo(2, host(), VmId(Uuid::new_v4()));
        assert!(arbiter.compare_and_swap(Generation(1), &next).is_err());
    }
    fs::remove_file(dir.path().join("gen-1")).unwrap();
    fs::write(dir.path().join("gen-x"), "").unwrap();
    assert!(matches!(arbiter.read(), Err(ArbiterError::Damaged { .. })));
    let missing = FileArbiter::new(dir.path().join("none"));
    assert!(matches!(missing.read(), Err(ArbiterError::List(..))));
}

#[test]
fn a_record_with_a_wrong_generation_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    let arbiter = FileArbiter::new(dir.path().to_owned());
    let record = serde_json::to_vec(&solo(7, host(), VmId(Uuid::new_v4()))).unwrap();
    fs::write(dir.path().join("gen-8"), record).unwrap();
    assert!(matches!(arbiter.read(), Err(ArbiterError::Damaged { .. })));
}

/// A call that is about to be made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Read,
    Create,
    Sync,
}

/// Storage to which something happens before a call.
struct Watched<M>(Directory, M);

struct WatchedFolder<M>(Opened, M);

impl<M: Fn(Call, &Opened) -> io::Result<()> + Clone> Place for Watched<M> {
    type Folder = WatchedFolder<M>;

    fn open(&self) -> io::Result<Self::Folder> {
        Ok(WatchedFolder(self.0.open()?, self.1.clone()))
    }
}

impl<M: Fn(Call, &Opened) -> io::Result<()>> Folder for WatchedFolder<M> {
    fn names(&self) -> io::Result<Vec<String>> {
        self.0.names()
    }

    fn read(&self, name: &str, most: u64) -> io::Result<Vec<u8>> {
        (self.1)(Call::Read, &self.0)?;
        self.0.read(name, most)
    }

    fn fresh(&self) -> String {
        self.0.fresh()
    }

    fn create(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        (self.1)(Call::Create, &self.0)?;
        self.0.create(name, bytes)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.link(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }

    fn sync(&self) -> io::Result<()> {
        (self.1)(Call::Sync, &self.0)?;
        self.0.sync()
    }
}

#[test]
fn a_record_that_was_lost_before_it_was_synced_is_not_won() {
    let dir = tempfile::tempdir().unwrap();
    // Storage that goes on anew between a record's name and the sync that would have kept it.
    let forgets = |call, folder: &Opened| match call {
        Call::Sync => folder.remove("gen-1"),
        _ => Ok(()),
    };
    let arbiter = FileArbiter::over(Watched(Directory(dir.path().to_owned()), forgets));
    let first = solo(1, host(), VmId(Uuid::new_v4()));
    let error = arbiter.compare_and_swap(Generation(0), &first).unwrap_err();
    assert!(matches!(error, ArbiterError::Read(..)), "{error}");
    // The next try is as the first.
    let arbiter = FileArbiter::new(dir.path().to_owned());
    assert_eq!(arbiter.compare_and_swap(Generation(0), &first).unwrap(), Outcome::Won);
}

/// A record that is put beside the others, in an empty directory, is one that nobody else sees: its writer would
/// have won against nobody.
#[test]
fn a_swap_does_not_end_elsewhere_than_it_began() {
    let vm = VmId(Uuid::new_v4());
    for moment in [Call::Read, Call::Create, Call::Sync] {
        let dir = tempfile::tempdir().unwrap();
        let [storage, empty, seen] = ["storage", "empty", "seen"].map(|name| dir.path().join(name));
        for made in [&storage, &empty] {
            fs::create_dir(made).unwrap();
        }
        let mounted = |at: &Path| {
            let _ = fs::remove_file(&seen);
            std::os::unix::fs::symlink(at, &seen)
        };
        mounted(&storage).unwrap();
        let arbiter = FileArbiter::new(seen.clone());
        arbiter.compare_and_swap(Generation(0), &solo(1, host(), vm)).unwrap();
        let second = solo(2, host(), vm);
        let moves = |call, _: &Opened| if call == moment { mounted(&empty) } else { Ok(()) };
        let arbiter = FileArbiter::over(Watched(Directory(seen.clone()), moves));
        let won = arbiter.compare_and_swap(Generation(1), &second).unwrap();
        assert_eq!(won, Outcome::Won);
        // Whoever sees the storage sees it.
        assert_eq!(FileArbiter::new(storage.clone()).read().unwrap(), Some(second));
        assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);
    }
}

#[test]
fn a_record_of_another_vm_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let arbiter = FileArbiter::new(dir.path().to_owned());
    let [ours, theirs] = [(); 2].map(|()| VmId(Uuid::new_v4()));
    arbiter.compare_and_swap(Generation(0), &solo(1, host(), theirs)).unwrap();
    arbiter.compare_and_swap(Generation(1), &solo(2, host(), theirs)).unwrap();
    for expected in [0, 1, 2] {
        let next = solo(expected + 1, host(), ours);
        let error = arbiter.compare_and_swap(Generation(expected), &next).unwrap_err();
        assert!(matches!(error, ArbiterError::OtherVm(_)), "{expected}: {error}");
    }
    assert!(!dir.path().join("gen-3").exists());
}
