//! The listening side: greets whoever connects, and leaves all decisions to the engine.
//!
//! Each greeting has a thread of its own and a time limit for all of it, so a peer that connects and says
//! nothing, or a byte now and then, holds nobody up; where certificates are asked for, they are shown there,
//! within the same limit. The number of greetings and of arrivals that the engine has not dealt
//! with is bounded, and a stranger's first bytes are read only if they can be a greeting.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::control::Greeted;
use crate::engine::spawn;
use crate::error::{Error, chain};
use crate::log::Log;
use crate::transport::{Listener, Stream, Timed, tls};
use crate::wire::{FrameReader, FrameWriter, Hello, Kind, Message, Offer, SessionId, WireError};

/// Most connections whose greeting is awaited, or that wait for the engine, at once.
const GREETINGS_MAX: usize = 160;
/// How long the rest of a stranger's words is awaited, so that it can hear why it is refused.
const FAREWELL: Duration = Duration::from_secs(1);

/// One of [`GREETINGS_MAX`]; free again when this is dropped.
pub(super) struct Place(Option<Arc<AtomicUsize>>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>) -> Option<Self> {
        let place = Self(Some(Arc::clone(taken)));
        (taken.fetch_add(1, Ordering::AcqRel) < GREETINGS_MAX).then_some(place)
    }

    /// Of an acceptor that never waits.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn unlimited() -> Self {
        Self(None)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(taken) = &self.0 {
            taken.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// What the acceptor tells the engine.
pub(super) enum Arrival {
    Control {
        greeted: Box<Greeted>,
        hello: Hello,
        offer: Box<Offer>,
        peer: String,
    },
    Data {
        reader: FrameReader<Box<dyn Stream>>,
        hello: Hello,
    },
    /// Somebody connected whose greeting makes no sense.
    Stray {
        peer: String,
        error: String,
    },
    /// Nobody can connect any more.
    Broken(String),
}

/// Starts the acceptor. It ends when the listener is woken.
pub(super) fn start(
    mut listener: Listener,
    tls: Option<tls::Server>,
    patience: Duration,
    deliver: impl Fn(Arrival, Place) -> bool + Clone + Send + 'static,
) -> Result<JoinHandle<()>, Error> {
    let greetings = Arc::new(AtomicUsize::new(0));
    let mut log = Log::default();
    spawn("repl-accept", None, move || {
        loop {
            match listener.accept() {
                Ok(Some((incoming, peer))) => {
                    let tls = tls.clone();
                    let name = peer.clone();
                    let greet = move || {
                        let until = Instant::now() + patience;
                        let stream = incoming.admit(tls.as_ref(), patience);
                        let stream = stream.map_err(|error| chain(&error))?;
                        greet(stream, name, until).map_err(|error| chain(&error))
                    };
                    if let Err(what) = greet_aside(greet, peer, &greetings, deliver.clone()) {
                        // Said here: an engine that is too busy for arrivals would only gather these as well.
                        tell(&mut log, &what);
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    deliver(Arrival::Broken(chain(&error)), Place(None));
                    return;
                }
            }
        }
    })
}

/// Greets beside this thread, or says why not.
fn greet_aside(
    greet: impl FnOnce() -> Result<Arrival, String> + Send + 'static,
    peer: String,
    greetings: &Arc<AtomicUsize>,
    deliver: impl Fn(Arrival, Place) -> bool + Send + 'static,
) -> Result<(), String> {
    let place = Place::take(greetings).ok_or("too many wait for their greeting")?;
    let body = move || {
        let arrival = greet().unwrap_or_else(|error| Arrival::Stray { peer, error });
        deliver(arrival, place);
    };
    spawn("repl-hello", None, body).map(drop).map_err(|error| error.chain())
}

/// However many come.
fn tell(log: &mut Log, what: &str) {
    if log.is_news(what, Instant::now()) {
        tracing::warn!("connections are closed: {what}");
    }
}

fn greet(stream: Box<dyn Stream>, peer: String, until: Instant) -> Result<Arrival, WireError> {
    let back = stream.duplicate().map_err(WireError::Io)?;
    let timed = Timed { stream, until, each: Duration::MAX };
    let mut reader = FrameReader::new(timed, None);
    let greeting = receive_greeting(&mut reader);
    let session = reader.session().unwrap_or(SessionId(0));
    let mut writer = FrameWriter::new(back, session);
    match greeting {
        Ok((hello, Some(offer))) => {
            let reader = reader.map(|timed| timed.stream);
            let greeted = Box::new(Greeted { reader, writer });
            Ok(Arrival::Control { greeted, hello, offer: Box::new(offer), peer })
        }
        Ok((hello, None)) => {
            let reader = reader.map(|timed| timed.stream);
            Ok(Arrival::Data { reader, hello })
        }
        Err(error) => {
            let error = patient(error);
            // The stranger may be a peer of another version: it is told, if it listens.
            let _ = Message::Abort(chain(&error)).send(&mut writer);
            writer.get_ref().finish();
            let timed = reader.get_mut();
            timed.until = Instant::now() + FAREWELL;
            drain(timed);
            Err(error)
        }
    }
}

/// Bytes left unread would turn the last words into a reset: reads some of them away.
fn drain(timed: &mut Timed) {
    let mut scratch = [0; 4096];
    for _ in 0..64 {
        match timed.read(&mut scratch) {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
    }
}

/// A greeting that did not come in time reads as an I/O error that a person would not recognise.
fn patient(error: WireError) -> WireError {
    match error {
        WireError::Io(error)
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
        {
            let late = io::Error::new(io::ErrorKind::TimedOut, "no greeting came in time");
            WireError::Io(late)
        }
        other => other,
    }
}

pub(super) fn receive_greeting<R: Read>(
    reader: &mut FrameReader<R>,
) -> Result<(Hello, Option<Offer>), WireError> {
    let mut payload = Vec::new();
    let hello = match Message::receive_only(Kind::Hello, "a greeting", reader, &mut payload)? {
        Message::Hello(hello) => hello,
        other => {
            return Err(WireError::Unexpected { found: other.kind(), expected: "a greeting" });
        }
    };
    if hello.connection != 0 {
        return Ok((hello, None));
    }
    match Message::receive_only(Kind::Offer, "an offer", reader, &mut payload)? {
        Message::Offer(offer) => Ok((hello, Some(offer))),
        other => Err(WireError::Unexpected { found: other.kind(), expected: "an offer" }),
    }
}
