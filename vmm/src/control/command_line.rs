//! What the command line asks, before any client is heard.
//!
//! Always holds: an order to end is heard meanwhile, and what the guest does; a VM that is to be protected is
//! accepted by its backup, or the process ends and says why.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use api::replication::{ReplicationInfo, ReplicationState};
use crossbeam_channel::{Receiver, after, select};

use super::protection::Protection;
use super::{Answer, Chain, Controller, Error, Notice};
use crate::request::{Call, Failure, FailureKind, Reply, Request};

/// How often somebody who waits is told that he does.
const PROGRESS: Duration = Duration::from_secs(1);

/// What may come about while the command line is carried out.
enum Happened {
    Answer(Answer),
    Something,
    Nothing,
}

/// What a request of the command line is for, the request, and its descriptors.
pub(super) type First = (&'static str, Request, Vec<OwnedFd>);

impl Controller {
    /// Does what the command line asks. An order to end leaves the rest undone.
    pub(super) fn start(
        &mut self,
        requests: Vec<First>,
        calls: &Receiver<Call>,
        notices: &Receiver<Notice>,
    ) -> Result<(), Error> {
        for (what, request, fds) in requests {
            if self.ending.is_some() {
                break;
            }
            let protects = matches!(request, Request::VmReplicate(_));
            let (reply, answer) = crossbeam_channel::bounded(1);
            self.serve(Call { request, fds, reply });
            let mut result = self.await_answer(&answer, notices);
            if protects && result.is_ok() {
                result = self.await_backup(calls, notices);
            }
            if protects && self.guest_is_down {
                // There is nothing to protect, and `--no-shutdown` says to stay.
                continue;
            }
            if let Err(failure) = result {
                self.take_down();
                return Err(Error::Request { what, source: Chain::new(&failure) });
            }
        }
        Ok(())
    }

    /// `Ok` as well if the process is to end.
    fn await_answer(
        &mut self,
        answer: &Receiver<Answer>,
        notices: &Receiver<Notice>,
    ) -> Result<(), Failure> {
        let began = Instant::now();
        while self.ending.is_none() {
            match self.happens(answer, &crossbeam_channel::never(), notices) {
                Happened::Answer(answer) => return answer.map(drop),
                Happened::Nothing => self.tell_wait(began),
                Happened::Something => {}
            }
        }
        Ok(())
    }

    /// Until a backup has accepted the VM: the request is answered before that where it takes long. Clients are served
    /// meanwhile: all that was asked is under way.
    fn await_backup(
        &mut self,
        calls: &Receiver<Call>,
        notices: &Receiver<Notice>,
    ) -> Result<(), Failure> {
        let (began, never) = (Instant::now(), crossbeam_channel::never());
        // Without a protection the guest has ended its VM.
        while let (None, Protection::Primary { handle, .. }) = (&self.ending, &self.protection) {
            let ReplicationInfo { state, last_error, .. } = handle.info();
            match (state, last_error) {
                (ReplicationState::Disconnected, _) => {}
                (ReplicationState::Stopped, error) => {
                    let error = error.unwrap_or_else(|| "The protection was ended".to_owned());
                    return Err(Failure::new(FailureKind::Internal, error));
                }
                _ => break,
            }
            if matches!(self.happens(&never, calls, notices), Happened::Nothing) {
                self.tell_wait(began);
            }
        }
        Ok(())
    }

    fn tell_wait(&self, began: Instant) {
        if !matches!(self.protection, Protection::None) {
            let waited_s = began.elapsed().as_secs();
            tracing::warn!("the backup has not answered for {waited_s} s: it is waited for");
        }
    }

    /// The next thing, or that a while has passed without any.
    fn happens(
        &mut self,
        answer: &Receiver<Answer>,
        calls: &Receiver<Call>,
        notices: &Receiver<Notice>,
    ) -> Happened {
        // Not the machine itself: what is told may let go of it.
        let machine = self.machine.as_ref().filter(|_| self.hears_guest());
        let events = machine.map(|machine| machine.events().clone());
        let events = events.unwrap_or_else(crossbeam_channel::never);
        select! {
            // Whoever drops a request needs nothing more of it.
            recv(answer) -> answer => {
                return Happened::Answer(answer.unwrap_or(Ok(Reply::Empty)));
            }
            recv(calls) -> call => if let Ok(call) = call { self.serve(call) },
            recv(notices) -> notice => if let Ok(notice) = notice { self.notice(notice) },
            recv(events) -> event => if let Ok(event) = event { self.machine_event(event) },
            recv(after(PROGRESS)) -> _ => return Happened::Nothing,
        }
        Happened::Something
    }
}
