//! A key-value server on threads of this process, right or broken in one way.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use guest_logic::kv::{FRAME_BYTES, Operation, Record, Request, SECTOR_BYTES, Status};

/// One of so many operations is done wrong by a server that is broken.
const EVERY: u64 = 97;
/// The log that is damaged has more records than that.
const DAMAGED: usize = 11;
/// Sectors of the image behind the log.
const SPARE: usize = 8;

/// How it is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Says "written" and forgets the write.
    ForgetsWrites,
    /// Answers a read with what the key had before the last write.
    ReadsStale,
    /// Answers a request with another one's id.
    SwapsAnswers,
    /// Answers twice.
    AnswersTwice,
    ClosesConnections,
    /// Does not answer.
    Falls,
    RefusesWrites,
    /// Says "written" without a record in the log.
    SkipsRecords,
    /// One sector of the log is zero.
    LosesSector,
    /// The second half of one sector's record is zero.
    TearsSector,
    /// The first and the last record changed places, their numbers too.
    ReordersLog,
}

impl Fault {
    /// Whether operations are done wrong; of the others the log is damaged at the end.
    pub fn is_in_answers(self) -> bool {
        !matches!(self, Self::None | Self::LosesSector | Self::TearsSector | Self::ReordersLog)
    }

    /// Whether an operation of this kind can be done wrong in this way.
    fn concerns(self, operation: Operation) -> bool {
        match self {
            Self::ForgetsWrites | Self::SkipsRecords | Self::RefusesWrites => {
                operation == Operation::Put
            }
            Self::ReadsStale => operation == Operation::Get,
            _ => self.is_in_answers(),
        }
    }
}

#[derive(Default)]
struct State {
    /// The value of each key, and the one before.
    values: HashMap<u32, (u64, u64)>,
    log: Vec<Record>,
    operations: u64,
    /// What was done wrong so far.
    faults: u64,
}

/// A server that runs until the process ends.
pub struct Server {
    pub address: SocketAddr,
    fault: Fault,
    state: Arc<Mutex<State>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    pub fn start(fault: Fault) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                // A client that has gone ends its thread.
                std::thread::spawn(move || serve(stream, fault, &state).is_ok());
            }
        });
        Ok(Self { address, fault, state })
    }

    /// How many operations were done wrong.
    pub fn faults(&self) -> u64 {
        lock(&self.state).faults
    }

    /// The disk's image as it would be after the guest's end.
    pub fn write_image(&self, path: &Path) -> Result<()> {
        let mut log = lock(&self.state).log.clone();
        if self.fault == Fault::ReordersLog {
            let last = log.len() - 1;
            log.swap(0, last);
            (log[0].number, log[last].number) = (0, last as u64);
        }
        let mut image: Vec<u8> = log.iter().flat_map(|record| record.encode()).collect();
        image.resize(image.len() + SPARE * SECTOR_BYTES, 0);
        let damaged = DAMAGED * SECTOR_BYTES..(DAMAGED + 1) * SECTOR_BYTES;
        match self.fault {
            Fault::LosesSector => image[damaged].fill(0),
            Fault::TearsSector => image[damaged][32..].fill(0),
            _ => {}
        }
        std::fs::write(path, image)?;
        Ok(())
    }
}

fn serve(mut stream: TcpStream, fault: Fault, state: &Mutex<State>) -> Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let mut frame = [0; FRAME_BYTES];
        stream.read_exact(&mut frame)?;
        let request = Request::decode(&frame)?;
        let mut state = lock(state);
        state.operations += 1;
        let is_turn = state.operations.is_multiple_of(EVERY) && fault.concerns(request.operation);
        state.faults += u64::from(is_turn);
        let mut response = match request.operation {
            Operation::Put => request.response(Status::Ok, request.value),
            _ => request.response(Status::Ok, read(&state, request.key, fault, is_turn)),
        };
        if request.operation == Operation::Put {
            write(&mut state, request, fault, is_turn);
        }
        drop(state);
        match fault {
            Fault::SwapsAnswers if is_turn => response.id ^= 1,
            Fault::RefusesWrites if is_turn => response.status = Status::NotLogged,
            Fault::AnswersTwice if is_turn => stream.write_all(&response.encode())?,
            Fault::ClosesConnections if is_turn => return Ok(()),
            Fault::Falls if is_turn => continue,
            _ => {}
        }
        stream.write_all(&response.encode())?;
    }
}

fn read(state: &State, key: u32, fault: Fault, is_turn: bool) -> u64 {
    let (value, before) = state.values.get(&key).copied().unwrap_or_default();
    if fault == Fault::ReadsStale && is_turn { before } else { value }
}

fn write(state: &mut State, request: Request, fault: Fault, is_turn: bool) {
    let Request { key, value, id, .. } = request;
    if !(fault == Fault::SkipsRecords && is_turn) {
        let number = state.log.len() as u64;
        state.log.push(Record { number, key, value, id });
    }
    if !(fault == Fault::ForgetsWrites && is_turn) {
        let entry = state.values.entry(key).or_default();
        *entry = (value, entry.0);
    }
}
