//! A primary's end of the control connection, in the frames that ship.

use replication::testing::Tape;
use replication::wire::{FrameReader, FrameWriter, Message, SessionId};

#[derive(Debug)]
pub(super) struct Control {
    out: Tape,
    writer: FrameWriter<Tape>,
    into: Tape,
    reader: FrameReader<Tape>,
}

impl Control {
    pub(super) fn new(session: SessionId) -> Self {
        let (out, into) = (Tape::default(), Tape::default());
        let writer = FrameWriter::new(out.clone(), session);
        let reader = FrameReader::new(into.clone(), Some(session));
        Self { out, writer, into, reader }
    }

    /// The frame of a message.
    pub(super) fn write(&mut self, message: &Message) -> Vec<u8> {
        message.send(&mut self.writer).expect("a tape takes all");
        self.out.take()
    }

    /// The message of a frame.
    pub(super) fn read(&mut self, frame: &[u8]) -> Result<Message, String> {
        self.into.put(frame);
        let message = Message::receive(&mut self.reader, &mut Vec::new());
        message.map_err(|error| error.to_string())
    }
}
