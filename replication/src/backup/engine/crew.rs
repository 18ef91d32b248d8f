//! Who reads and writes the connections of a session.

use super::{Control, Credit, Error, Message, WireError};
use crate::backup::receive::{DataConnection, Delivery, Shared};
use crate::capture::cow::Share;
use crate::engine::control::{Greeted, Pace, Progress};
use crate::engine::heard::Heard;
use crate::transport::Stream;
use crate::wire::FrameReader;

/// Threads, or whoever has their place in a simulator.
pub(super) enum Crew {
    Threads,
    #[cfg(any(test, feature = "testing"))]
    Simulated(crossbeam_channel::Sender<super::simulated::Hand>),
}

impl Crew {
    /// Has a control connection read and written.
    pub(super) fn control(
        &self,
        greeted: Greeted,
        pace: Pace,
        heard: Heard,
        progress: Progress,
        deliver: impl FnMut(Result<Message, WireError>, Credit) -> bool + Send + 'static,
    ) -> Result<Control, Error> {
        match self {
            Self::Threads => Control::start(greeted, pace, heard, progress, deliver),
            #[cfg(any(test, feature = "testing"))]
            Self::Simulated(hands) => {
                let session = greeted.writer.session();
                let (control, line) = super::simulated::Line::new(greeted, heard, deliver);
                // Whoever simulates takes all of them.
                let _ = hands.send(super::simulated::Hand::Control(session, line));
                Ok(control)
            }
        }
    }

    /// Has a data connection read.
    pub(super) fn data(
        &self,
        share: Share,
        reader: FrameReader<Box<dyn Stream>>,
        shared: Shared,
        deliver: impl FnMut(Delivery) -> bool + Send + 'static,
    ) -> Result<DataConnection, Error> {
        match self {
            Self::Threads => DataConnection::start(share, reader, shared, deliver),
            #[cfg(any(test, feature = "testing"))]
            Self::Simulated(hands) => {
                let session = reader.session().unwrap_or(crate::wire::SessionId(0));
                let (connection, receiving) = DataConnection::around(share, reader, shared)?;
                let (index, takes) = (share.index, Box::new(deliver));
                let receiving = Box::new(receiving);
                let _ = hands.send(super::simulated::Hand::Data(session, index, receiving, takes));
                Ok(connection)
            }
        }
    }
}
