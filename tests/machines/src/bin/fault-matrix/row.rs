//! A row of the matrix: what is done to a pair, and who must go on.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::arbiter::Kind;
use crate::scene::Scene;
use crate::world::Place;

/// Who goes on, as a row found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A, without a backup.
    A,
    /// B, which took over.
    B,
    /// A, and it is protected by B.
    Pair,
    /// B, and it is protected by A, which handed the VM over.
    Reversed,
    /// A, which had handed the VM over and took it over again.
    Back,
    /// The VM is gone on both sides.
    Nobody,
}

/// What is expected of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    Only(End),
    /// One of the two, whoever asks the arbiter first.
    AOrB,
    /// The pair, or one of the two.
    PairOrOne,
    /// B, or nobody where no epoch had been committed.
    BOrNobody,
}

impl Expect {
    #[must_use]
    pub fn allows(self, end: End) -> bool {
        match self {
            Self::Only(only) => only == end,
            Self::AOrB => matches!(end, End::A | End::B),
            Self::PairOrOne => end != End::Nobody,
            Self::BOrNobody => matches!(end, End::B | End::Nobody),
        }
    }
}

/// What a fault does to the process that gets to its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Does {
    Kill,
    Stop,
    Wait,
}

impl Does {
    /// As the switch takes it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Wait => "wait",
        }
    }
}

/// A point of a side's protocol, and what happens there once it is armed.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub place: Place,
    pub point: &'static str,
    pub action: Does,
}

/// What lasts as long as a row.
pub type Kept = Vec<File>;

/// How a row's pair is started.
#[derive(Clone)]
pub struct Prepared {
    /// Before the clients come; else the row does it.
    pub is_protected: bool,
    pub faults: Vec<Fault>,
    /// Appended to `--replicate`, each with its leading comma.
    pub options: &'static str,
    /// Appended to `--receive-replica`, likewise.
    pub receive: &'static str,
    /// Puts the images where the row wants them.
    pub images: Option<fn(&Path) -> Result<Kept>>,
    /// The VM has no disk, and A is to be its backup after a switch-over.
    pub reverses: bool,
    /// After a switch-over A is called again and copied to: the VM has a disk.
    pub recalls: bool,
    /// Its disk is one image for both hosts.
    pub is_shared: bool,
    /// The hosts show each other certificates.
    pub has_tls: bool,
    /// How long a client waits for an answer.
    pub silence_limit: Duration,
    /// Each side has a wall clock of its own, see [`Scene::turn_clock`].
    pub has_clocks: bool,
    /// Calls of each side can be made to fail, see [`Scene::fail`].
    pub has_failures: bool,
}

impl Default for Prepared {
    fn default() -> Self {
        Self {
            is_protected: true,
            faults: vec![],
            options: "",
            receive: "",
            images: None,
            reverses: false,
            recalls: false,
            is_shared: false,
            has_tls: false,
            silence_limit: Duration::from_secs(30),
            has_clocks: false,
            has_failures: false,
        }
    }
}

/// What a row does to its pair; who goes on.
pub type Act = Box<dyn Fn(&mut Scene) -> Result<End> + Send + Sync>;

pub struct Row {
    pub name: String,
    /// For the table.
    pub what: String,
    pub expect: Expect,
    /// Those with which it makes sense.
    pub arbiters: &'static [Kind],
    /// Of the few that every run of the tests takes.
    pub is_quick: bool,
    /// Clients may be told of an error, or lose their connection: the row says so in `what`.
    pub is_felt: bool,
    pub prepared: Prepared,
    pub act: Act,
}

/// Most rows do not ask how the arbiter is made.
pub const FILE: &[Kind] = &[Kind::File];
/// Those that do, and a few others.
pub const EACH: &[Kind] = &[Kind::File, Kind::Etcd];
pub const ETCD: &[Kind] = &[Kind::Etcd];
pub const ETCD_3: &[Kind] = &[Kind::Etcd3];
pub const NONE: &[Kind] = &[Kind::None];

/// The arbiters of a row that ends a host at a point: each of them where that is asked just there.
#[must_use]
pub fn asking_arbiters(point: &str) -> &'static [Kind] {
    if matches!(point, "swap" | "swapped") { EACH } else { FILE }
}

impl Row {
    pub fn new(
        name: impl Into<String>,
        what: impl Into<String>,
        expect: Expect,
        act: impl Fn(&mut Scene) -> Result<End> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            what: what.into(),
            expect,
            arbiters: FILE,
            is_quick: false,
            is_felt: false,
            prepared: Prepared::default(),
            act: Box::new(act),
        }
    }

    #[must_use]
    pub fn quick(mut self) -> Self {
        self.is_quick = true;
        self
    }

    #[must_use]
    pub fn with(mut self, arbiters: &'static [Kind]) -> Self {
        self.arbiters = arbiters;
        self
    }

    #[must_use]
    pub fn fault(mut self, place: Place, point: &'static str, action: Does) -> Self {
        self.prepared.faults.push(Fault { place, point, action });
        self
    }

    /// A switch-over reverses the pair.
    #[must_use]
    pub fn reverses(mut self) -> Self {
        self.prepared.reverses = true;
        self
    }

    /// After a switch-over the VM is copied back to A.
    #[must_use]
    pub fn recalls(mut self) -> Self {
        self.prepared.recalls = true;
        self
    }

    /// The VM is not protected when the row begins.
    #[must_use]
    pub fn unprotected(mut self) -> Self {
        self.prepared.is_protected = false;
        self
    }

    #[must_use]
    pub fn felt(mut self) -> Self {
        self.is_felt = true;
        self
    }
}
