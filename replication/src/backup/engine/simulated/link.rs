//! A primary's connections, read as soon as something has arrived, as threads of their own do.

use std::sync::atomic::AtomicU64;

use crossbeam_channel::Receiver;

use super::chain;
use crate::backup::accept::{Arrival, receive_greeting};
use crate::backup::receive::{Delivery, ReceiveError, Receiving};
use crate::engine::control::{Control, Credit, Greeted, hear, listening};
use crate::engine::heard::{Heard, Listening};
use crate::testing::Tape;
use crate::transport::Stream;
use crate::wire::{FrameReader, FrameWriter, Message, SessionId, WireError};

/// Whoever connects.
const PEER: &str = "10.0.0.1:40000";

type Hears = Box<dyn FnMut(Result<Message, WireError>, Credit) -> bool + Send>;
pub(super) type Takes = Box<dyn FnMut(Delivery) -> bool + Send>;

/// A connection of a session that the engine would have a thread read.
pub(in crate::backup::engine) enum Hand {
    Control(SessionId, Line),
    Data(SessionId, usize, Box<Receiving>, Takes),
}

/// A control connection that the engine has accepted.
pub(in crate::backup::engine) struct Line {
    reader: FrameReader<Listening<Box<dyn Stream>>>,
    writer: FrameWriter<Box<dyn Stream>>,
    said: Receiver<Message>,
    deliver: Hears,
}

impl Line {
    pub(in crate::backup::engine) fn new(
        greeted: Greeted,
        heard: Heard,
        deliver: impl FnMut(Result<Message, WireError>, Credit) -> bool + Send + 'static,
    ) -> (Control, Self) {
        let Greeted { reader, writer } = greeted;
        let closer = writer.get_ref().duplicate().expect("a tape has as many handles as one likes");
        let (control, said) = Control::simulated(closer);
        let (reader, deliver) = (listening(reader, heard), Box::new(deliver));
        (control, Self { reader, writer, said, deliver })
    }
}

/// All connections of a session, or of a call that may become one.
pub(super) struct Link {
    pub(super) session: SessionId,
    into: Tape,
    out: Tape,
    /// Of the control connection, until it has greeted.
    greeting: Option<FrameReader<Box<dyn Stream>>>,
    line: Option<Line>,
    has_ended: bool,
    data: Vec<Connection>,
}

struct Connection {
    into: Tape,
    stage: Stage,
}

enum Stage {
    /// It has not greeted.
    New(FrameReader<Box<dyn Stream>>),
    /// The engine has not taken it.
    Greeted,
    Read(Box<Receiving>, Takes),
    Ended,
}

fn open(tape: &Tape) -> FrameReader<Box<dyn Stream>> {
    FrameReader::new(Box::new(tape.clone()), None)
}

impl Link {
    pub(super) fn new(session: SessionId, connections: usize) -> Self {
        let connect = |_| {
            let into = Tape::default();
            let stage = Stage::New(open(&into));
            Connection { into, stage }
        };
        let (into, out) = (Tape::default(), Tape::default());
        let greeting = Some(open(&into));
        let data = (0..connections).map(connect).collect();
        Self { session, into, out, greeting, line: None, has_ended: false, data }
    }

    /// Bytes of the control connection; who called, once that is known.
    pub(super) fn hears(&mut self, bytes: &[u8]) -> Option<Arrival> {
        self.into.put(bytes);
        self.reads_control()
    }

    /// The control connection ended: heard after what came before.
    pub(super) fn ends(&mut self) {
        self.has_ended = true;
        // Whoever has not greeted is known no better for that.
        let _ = self.reads_control();
    }

    /// Who did not greet, and has had the time for it.
    pub(super) fn is_late(&self) -> Option<Arrival> {
        let stray = || Arrival::Stray {
            peer: PEER.to_owned(),
            error: "no greeting came in time".to_owned(),
        };
        self.greeting.is_some().then(stray)
    }

    fn reads_control(&mut self) -> Option<Arrival> {
        // A greeting, and the offer that follows it.
        if self.into.has_frames(2)
            && let Some(reader) = self.greeting.take()
        {
            return Some(greet(reader, self.out.clone()));
        }
        let line = self.line.as_mut()?;
        while self.into.has_frame() {
            let word = hear(&mut line.reader, &mut Vec::new(), &AtomicU64::default());
            let Some(word) = word else { continue };
            let is_over = word.is_err();
            (line.deliver)(word, Credit::unlimited());
            if is_over {
                return None;
            }
        }
        if std::mem::take(&mut self.has_ended) {
            (line.deliver)(Err(WireError::Closed), Credit::unlimited());
        }
        None
    }

    /// The engine has accepted the caller.
    pub(super) fn is_accepted(&mut self, line: Line) {
        self.line = Some(line);
        // It has greeted.
        let _ = self.reads_control();
    }

    /// Bytes of a data connection; who it is, once that is known.
    pub(super) fn takes(
        &mut self,
        index: usize,
        bytes: &[u8],
        scratch: &mut [u8],
    ) -> Option<Arrival> {
        let of = self.data.get_mut(index)?;
        of.into.put(bytes);
        of.reads(scratch)
    }

    /// The engine has taken a data connection.
    pub(super) fn is_taken(
        &mut self,
        index: usize,
        receiving: Box<Receiving>,
        takes: Takes,
        scratch: &mut [u8],
    ) {
        if let Some(of) = self.data.get_mut(index) {
            of.stage = Stage::Read(receiving, takes);
            // It has greeted.
            let _ = of.reads(scratch);
        }
    }

    /// A data connection ended.
    pub(super) fn ends_data(&mut self, index: usize) {
        let Some(of) = self.data.get_mut(index) else { return };
        if let Stage::Read(_, deliver) = &mut of.stage {
            deliver(Err(ReceiveError::Wire(WireError::Closed)));
            of.stage = Stage::Ended;
        }
    }

    /// What the engine has said since.
    pub(super) fn said(&self) -> impl Iterator<Item = Message> {
        self.line.iter().flat_map(|line| line.said.try_iter())
    }

    /// The frame of what is said.
    pub(super) fn writes(&mut self, message: &Message) -> Vec<u8> {
        let Some(line) = &mut self.line else { return vec![] };
        message.send(&mut line.writer).expect("a tape takes all");
        self.out.take()
    }

    /// The frame with which the caller was refused.
    pub(super) fn refused(&self) -> Option<Vec<u8>> {
        let frame = self.line.is_none().then(|| self.out.take())?;
        Some(frame).filter(|frame| !frame.is_empty())
    }

    pub(super) fn is_accepted_by_now(&self) -> bool {
        self.line.is_some()
    }

    /// Whether this side's end was closed, at once or behind a last word.
    pub(super) fn is_closed(&self) -> bool {
        self.out.is_closed() || self.out.is_finished()
    }

    pub(super) fn is_cut(&self) -> bool {
        self.out.is_closed()
    }
}

impl Connection {
    fn reads(&mut self, scratch: &mut [u8]) -> Option<Arrival> {
        let Self { into, stage } = self;
        match stage {
            Stage::New(_) if into.has_frame() => {
                let Stage::New(reader) = std::mem::replace(stage, Stage::Greeted) else {
                    return None;
                };
                return Some(greet(reader, Tape::default()));
            }
            Stage::Read(receiving, deliver) => {
                // One that the engine has closed is nobody's to read: the memory is another's by now.
                let mut goes_on = !into.is_closed();
                while goes_on && into.has_frame() {
                    goes_on = receiving.step(scratch, &mut *deliver);
                }
                if !goes_on {
                    *stage = Stage::Ended;
                }
            }
            Stage::New(_) | Stage::Greeted | Stage::Ended => {}
        }
        None
    }
}

/// What the acceptor makes of a connection whose greeting is here.
fn greet(mut reader: FrameReader<Box<dyn Stream>>, out: Tape) -> Arrival {
    let peer = PEER.to_owned();
    let greeting = receive_greeting(&mut reader);
    let session = reader.session().unwrap_or(SessionId(0));
    match greeting {
        Ok((hello, Some(offer))) => {
            let writer = FrameWriter::new(Box::new(out) as Box<dyn Stream>, session);
            let greeted = Box::new(Greeted { reader, writer });
            Arrival::Control { greeted, hello, offer: Box::new(offer), peer }
        }
        Ok((hello, None)) => Arrival::Data { reader, hello },
        Err(error) => Arrival::Stray { peer, error: chain(&error) },
    }
}
