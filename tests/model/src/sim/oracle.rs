//! What must hold of a run: what clients and a reader of the console saw, and memory at each commit.

use std::collections::HashMap;

use replication::ids::EpochId;
use replication::ram::Ram;

use super::machine::{CLIENTS, Output};
use super::memory::{self, Snapshot};
use crate::guest::Position;

/// A client: one request at a time, sent again until it is answered.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// The request that is out.
    pub request: u64,
    /// The last that was answered.
    pub answered: u64,
    /// Least that the counters may sum up to in the answer to the present request.
    least: u64,
}

#[derive(Debug, Default)]
pub struct Oracle {
    pub clients: [Client; CLIENTS],
    /// Memory at each seal, and of which epoch it was, from the last one that was committed on.
    sealed: HashMap<(u16, u16), (EpochId, Snapshot)>,
    /// The largest sum that anybody was told yet.
    told: u64,
    /// The last line that was read.
    line: u64,
    pub lines: u64,
    pub responses: u64,
    pub commits: u64,
}

impl Oracle {
    /// The client begins its next request. In real time it comes after all that anybody was told so
    /// far, so its answer counts that, and itself. A sum that was told may have in it what is not
    /// answered yet: who heard it has heard of that, too.
    pub fn begins(&mut self, client: usize) -> u64 {
        let least = self.answered().max(self.told) + 1;
        let of = &mut self.clients[client];
        of.request = of.answered + 1;
        of.least = least;
        of.request
    }

    fn answered(&self) -> u64 {
        self.clients.iter().map(|client| client.answered).sum()
    }

    fn asked(&self) -> u64 {
        self.clients.iter().map(|client| client.request).sum()
    }

    /// Something reached the world.
    ///
    /// # Errors
    /// What it contradicts.
    pub fn left(&mut self, output: Output) -> Result<(), String> {
        match output {
            Output::Line(line) => {
                if line > self.line + 1 {
                    let last = self.line;
                    return Err(format!("the console says line {line} after line {last}"));
                }
                self.line = self.line.max(line);
                self.lines += 1;
            }
            Output::Response { client, request, total } => {
                self.responses += 1;
                self.told = self.told.max(total);
                let asked = self.asked();
                let of = &mut self.clients[client];
                if request > of.request {
                    return Err(format!("client {client} is answered {request}, not asked"));
                }
                if request == of.request && of.answered < request {
                    let least = of.least;
                    of.answered = request;
                    if total < least || total > asked {
                        return Err(format!(
                            "client {client} is told a sum of {total}, where {least} is the least \
                             after what was told before it asked, and {asked} were ever asked"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// A machine was sealed.
    pub fn sealed(&mut self, position: Position, epoch: EpochId, ram: &Ram) {
        self.sealed.insert((position.incarnation, position.at), (epoch, memory::snapshot(ram)));
    }

    /// A backup has applied an epoch that it acknowledged: its image, or as that was before the next.
    ///
    /// # Errors
    /// It is not what was sealed.
    pub fn committed(
        &mut self,
        position: Position,
        passed: Option<&Snapshot>,
        ram: &Ram,
    ) -> Result<(), String> {
        self.commits += 1;
        match passed {
            Some(passed) => self.is(position, |sealed| memory::differ(passed, sealed))?,
            None => self.is(position, |sealed| memory::differs(ram, sealed))?,
        };
        self.sealed.retain(|(incarnation, at), _| {
            *incarnation != position.incarnation || *at >= position.at
        });
        Ok(())
    }

    /// A machine begins with what was sealed there: of which epoch that is.
    ///
    /// # Errors
    /// Its memory is another one.
    pub fn started(&self, position: Position, ram: &Ram) -> Result<EpochId, String> {
        self.is(position, |sealed| memory::differs(ram, sealed))
    }

    fn is(
        &self,
        position: Position,
        differs: impl FnOnce(&Snapshot) -> Option<usize>,
    ) -> Result<EpochId, String> {
        let Some((epoch, sealed)) = self.sealed.get(&(position.incarnation, position.at)) else {
            return Err(format!("nothing was sealed at {position:?}"));
        };
        match differs(sealed) {
            None => Ok(*epoch),
            Some(page) => {
                Err(format!("page {page} of the image at {position:?} is not what was sealed"))
            }
        }
    }
}
