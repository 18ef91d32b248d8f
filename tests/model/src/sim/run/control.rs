//! The control connection: what hosts say to each other, in the frames that ship.

use replication::testing::Tape;
use replication::wire::{self, FrameReader, FrameWriter, SessionId};

use super::Content;
use crate::host::{Message, Seal};

/// One host's end.
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
    pub(super) fn write(&mut self, message: &wire::Message) -> Vec<u8> {
        message.send(&mut self.writer).expect("a tape takes all");
        self.out.take()
    }

    /// The message of a frame.
    pub(super) fn read(&mut self, frame: &[u8]) -> Result<wire::Message, String> {
        self.into.put(frame);
        let message = wire::Message::receive(&mut self.reader, &mut Vec::new());
        message.map_err(|error| error.to_string())
    }
}

/// What is sent for what an engine says; pages of a copy go by themselves.
pub(super) fn of(message: Message<Content>) -> Option<wire::Message> {
    Some(match message {
        Message::Pages(_) => return None,
        Message::Paired(generation) => wire::Message::Paired(generation),
        Message::Seal(Seal { epoch, generation, handover, content }) => {
            let Content { pages, state } = content;
            let changes = 0;
            wire::Message::Seal(wire::Seal { epoch, generation, handover, pages, changes, state })
        }
        Message::Resync => wire::Message::Resync,
        Message::Stop => wire::Message::Stop,
        Message::Abort => wire::Message::Abort("aborted".to_owned()),
        Message::Refuse => wire::Message::Refuse("refused".to_owned()),
        Message::Ack { epoch, generation } => wire::Message::Ack { epoch, generation },
        Message::ResyncReady => wire::Message::ResyncReady,
        Message::StopDone => wire::Message::StopDone,
        Message::HandedOver { generation, reversed } => {
            wire::Message::HandedOver { generation, reversed }
        }
    })
}

/// What an engine hears of what came; `None` where that is nothing but a sign of life.
pub(super) fn heard(message: wire::Message) -> Result<Option<Message<Content>>, String> {
    Ok(Some(match message {
        wire::Message::Heartbeat => return Ok(None),
        wire::Message::Paired(generation) => Message::Paired(generation),
        wire::Message::Seal(wire::Seal { epoch, generation, handover, pages, state, .. }) => {
            let content = Content { pages, state };
            Message::Seal(Seal { epoch, generation, handover, content })
        }
        wire::Message::Resync => Message::Resync,
        wire::Message::Stop => Message::Stop,
        wire::Message::Abort(_) => Message::Abort,
        wire::Message::Refuse(_) => Message::Refuse,
        wire::Message::Ack { epoch, generation } => Message::Ack { epoch, generation },
        wire::Message::ResyncReady => Message::ResyncReady,
        wire::Message::StopDone => Message::StopDone,
        wire::Message::HandedOver { generation, reversed } => {
            Message::HandedOver { generation, reversed }
        }
        other => return Err(format!("a frame of kind {:?} is out of place", other.kind())),
    }))
}
