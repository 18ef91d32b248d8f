//! Storage that both hosts see, and the `file:` arbiter's client that ships over it.
//!
//! The client makes one call of the storage after the other and waits for each. Here a call is an event of
//! its own, so that those of both hosts come in any order: the client is run from its beginning with the
//! answers that it has so far, until it asks for one that it does not have ([`Client::run`]). It decides by nothing else
//! than answers, so it asks for the same each time.
//!
//! What the storage can do: fail, with or without having done what it was asked; do it long after it said
//! that it failed; write a part of a file and be full; list what was there before; lose names that
//! were not synced, and tell nobody; answer as an empty directory does, for a whole swap. What
//! it cannot: forget what was synced, or give one name to two files.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use replication::ownership::{
    FileArbiter, Folder, HostId, Outcome, Place, Record, Standing, carry_out,
};
use replication::protocol::ownership::{Action, Event};

use uuid::Uuid;

use crate::broken::Broken;

/// A call of the storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Names,
    Read(String),
    Fresh,
    Create(String, Vec<u8>),
    Link(String, String),
    Remove(String),
    Sync,
}

/// What came of it.
#[derive(Clone, Debug)]
pub enum Answer {
    Names(Vec<String>),
    Bytes(Vec<u8>),
    Name(String),
    Done,
    Failed(ErrorKind),
}

/// How a call goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Well,
    /// It fails and changed nothing.
    Fails(ErrorKind),
    /// It fails, and took effect.
    Unheard,
    /// It fails, and takes effect later.
    Late,
    /// A part of a file is written, and then the storage is full.
    Torn,
    /// A listing is of before the last records.
    Stale(usize),
    /// Nothing is mounted there.
    Away,
}

#[derive(Debug, Default)]
struct Answers {
    given: Vec<Answer>,
    taken: usize,
    wants: Option<Op>,
}

/// A client's storage, as far as it has answered.
#[derive(Debug)]
struct Replay(Mutex<Answers>);

impl Replay {
    fn lock(&self) -> MutexGuard<'_, Answers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, op: Op) -> io::Result<Answer> {
        let mut answers = self.lock();
        if answers.wants.is_some() {
            // Whatever follows what it waits for is not so yet.
            return Err(ErrorKind::WouldBlock.into());
        }
        let at = answers.taken;
        answers.taken += 1;
        match answers.given.get(at) {
            Some(Answer::Failed(kind)) => Err((*kind).into()),
            Some(answer) => Ok(answer.clone()),
            None => {
                answers.wants = Some(op);
                Err(ErrorKind::WouldBlock.into())
            }
        }
    }
}

impl<'a> Place for &'a Replay {
    type Folder = &'a Replay;

    /// What it is the first call decides.
    fn open(&self) -> io::Result<&'a Replay> {
        Ok(*self)
    }
}

impl Folder for &Replay {
    fn names(&self) -> io::Result<Vec<String>> {
        match self.ask(Op::Names)? {
            Answer::Names(names) => Ok(names),
            _ => Err(ErrorKind::InvalidData.into()),
        }
    }

    fn read(&self, name: &str, most: u64) -> io::Result<Vec<u8>> {
        match self.ask(Op::Read(name.to_owned()))? {
            Answer::Bytes(mut bytes) => {
                bytes.truncate(usize::try_from(most).unwrap_or(usize::MAX));
                Ok(bytes)
            }
            _ => Err(ErrorKind::InvalidData.into()),
        }
    }

    fn fresh(&self) -> String {
        match self.ask(Op::Fresh) {
            Ok(Answer::Name(name)) => name,
            _ => String::new(),
        }
    }

    fn create(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.ask(Op::Create(name.to_owned(), bytes.to_vec())).map(drop)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.ask(Op::Link(from.to_owned(), to.to_owned())).map(drop)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.ask(Op::Remove(name.to_owned())).map(drop)
    }

    fn sync(&self) -> io::Result<()> {
        self.ask(Op::Sync).map(drop)
    }
}

/// A call of a host's arbiter that is under way.
#[derive(Debug)]
pub struct Client {
    pub host: usize,
    /// Of the engine that called.
    pub life: u64,
    /// Of the process: one that was killed goes on with nothing.
    pub process: u128,
    action: Action,
    answers: Vec<Answer>,
    /// What it asks the storage.
    pub wants: Option<Op>,
    /// Nothing is mounted where it looks.
    pub away: bool,
}

impl Client {
    #[must_use]
    pub fn new(host: usize, life: u64, process: u128, action: Action) -> Self {
        Self { host, life, process, action, answers: vec![], wants: None, away: false }
    }

    /// Whether an empty directory would be taken for a new arbiter's.
    #[must_use]
    pub fn expects_nothing(&self) -> bool {
        match self.action {
            Action::Read { expected } | Action::Swap { expected, .. } => expected.0 == 0,
            Action::Wait { .. } | Action::Decide(_) => true,
        }
    }

    /// Goes on, with an answer if it asked for one: what the engine is told, once that is known.
    pub fn run(&mut self, answer: Option<Answer>, broken: Option<Broken>) -> Option<Event> {
        self.answers.extend(answer);
        let given = std::mem::take(&mut self.answers);
        let replay = Replay(Mutex::new(Answers { given, ..Answers::default() }));
        let result = carry_out(&FileArbiter::over(&replay), &self.action);
        let answers = std::mem::take(&mut *replay.lock());
        (self.answers, self.wants) = (answers.given, answers.wants);
        if self.wants.is_some() {
            return None;
        }
        let unknown = || match (broken, &self.action) {
            (Some(Broken::UnknownWriteIsLost), Action::Swap { next, .. }) => {
                let standing = Standing::Solo { owner: HostId(Uuid::nil()) };
                Event::Swapped(Outcome::Lost(Some(Record { standing, ..*next })))
            }
            _ => Event::Failed,
        };
        Some(result.unwrap_or_else(|_| unknown()))
    }
}

/// A directory.
#[derive(Debug, Default)]
pub struct Storage {
    files: BTreeMap<String, Vec<u8>>,
    /// Records in the order in which they came, and how many of them survive a power cut.
    records: Vec<String>,
    synced: usize,
    names: u64,
}

impl Storage {
    /// The record that stands.
    ///
    /// # Panics
    /// If it is none: whatever has such a name was whole before.
    #[must_use]
    pub fn standing(&self) -> Option<Record> {
        let bytes = self.files.get(self.records.last()?)?;
        Some(serde_json::from_slice(bytes).expect("only whole records are linked"))
    }

    /// Carries out a call; what comes of it, and whether that is to be repeated later.
    pub fn call(&mut self, op: &Op, fate: Fate, broken: Option<Broken>) -> Answer {
        match (fate, op) {
            (_, Op::Fresh) => self.carry_out(op, broken),
            (Fate::Fails(kind), _) => Answer::Failed(kind),
            (Fate::Late, _) => Answer::Failed(ErrorKind::TimedOut),
            (Fate::Unheard, Op::Link(..)) if self.carry_out(op, broken).is_done() => {
                // The request was repeated, and found its own work.
                Answer::Failed(ErrorKind::AlreadyExists)
            }
            (Fate::Unheard, _) => {
                self.carry_out(op, broken);
                Answer::Failed(ErrorKind::TimedOut)
            }
            (Fate::Torn, Op::Create(name, bytes)) => {
                self.files.insert(name.clone(), bytes[..bytes.len() / 2].to_vec());
                Answer::Failed(ErrorKind::StorageFull)
            }
            (Fate::Stale(missing), Op::Names) => {
                let known = self.records.len().saturating_sub(missing);
                Answer::Names(self.records[..known].to_vec())
            }
            (Fate::Away, Op::Names) => Answer::Names(vec![]),
            (Fate::Away, _) => Answer::Failed(ErrorKind::NotFound),
            _ => self.carry_out(op, broken),
        }
    }

    fn carry_out(&mut self, op: &Op, broken: Option<Broken>) -> Answer {
        match op {
            Op::Names => Answer::Names(self.files.keys().cloned().collect()),
            Op::Read(name) => {
                let bytes = self.files.get(name).cloned();
                bytes.map_or(Answer::Failed(ErrorKind::NotFound), Answer::Bytes)
            }
            Op::Fresh => {
                self.names += 1;
                Answer::Name(format!(".{}.new", self.names))
            }
            Op::Create(name, bytes) => {
                self.files.insert(name.clone(), bytes.clone());
                Answer::Done
            }
            Op::Link(from, to) => match self.files.get(from).cloned() {
                Some(bytes) => self.link(to, bytes, broken),
                None => Answer::Failed(ErrorKind::NotFound),
            },
            Op::Remove(name) => {
                self.files.remove(name);
                Answer::Done
            }
            Op::Sync if broken == Some(Broken::WonBeforeItLasts) => Answer::Done,
            Op::Sync => {
                self.synced = self.records.len();
                Answer::Done
            }
        }
    }

    /// What is under way to a file's new name gets there, although the old one may be gone.
    pub fn link(&mut self, to: &str, bytes: Vec<u8>, broken: Option<Broken>) -> Answer {
        let is_new = !self.files.contains_key(to);
        if !is_new && broken != Some(Broken::SwapOverwrites) {
            return Answer::Failed(ErrorKind::AlreadyExists);
        }
        self.files.insert(to.to_owned(), bytes);
        if is_new {
            self.records.push(to.to_owned());
        }
        Answer::Done
    }

    /// A file's bytes.
    #[must_use]
    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        self.files.get(name).cloned()
    }

    /// The power goes: names that were not synced are lost.
    pub fn loses(&mut self) -> usize {
        let lost = self.records.split_off(self.synced.min(self.records.len()));
        lost.iter().for_each(|name| drop(self.files.remove(name)));
        lost.len()
    }
}

impl Answer {
    fn is_done(&self) -> bool {
        matches!(self, Self::Done)
    }
}
