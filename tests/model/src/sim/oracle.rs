//! What must hold of a run: what clients and a reader of the console saw, and memory at each commit.

use std::collections::HashMap;

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
    /// Least and most that the counters may say when the answer to the present request comes.
    least: u64,
}

#[derive(Debug, Default)]
pub struct Oracle {
    pub clients: [Client; CLIENTS],
    /// Memory at each seal, from the last one that was committed on.
    sealed: HashMap<(u16, u16), Snapshot>,
    /// The last line that was read.
    line: u64,
    pub lines: u64,
    pub responses: u64,
    pub commits: u64,
}

impl Oracle {
    /// The client begins its next request.
    pub fn begins(&mut self, client: usize) -> u64 {
        let least = self.answered();
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
                            "client {client} is told a sum of {total}, where {least} were \
                             answered before it asked and {asked} were ever asked"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// A machine was sealed.
    pub fn sealed(&mut self, position: Position, ram: &Ram) {
        self.sealed.insert((position.incarnation, position.at), memory::snapshot(ram));
    }

    /// A backup has applied an epoch that it acknowledged.
    ///
    /// # Errors
    /// Its image is not what was sealed.
    pub fn committed(&mut self, position: Position, ram: &Ram) -> Result<(), String> {
        self.commits += 1;
        self.is_as_sealed(position, ram)?;
        self.sealed.retain(|(incarnation, at), _| {
            *incarnation != position.incarnation || *at >= position.at
        });
        Ok(())
    }

    /// A machine begins with what was sealed there.
    ///
    /// # Errors
    /// Its memory is another one.
    pub fn is_as_sealed(&self, position: Position, ram: &Ram) -> Result<(), String> {
        let Some(sealed) = self.sealed.get(&(position.incarnation, position.at)) else {
            return Err(format!("nothing was sealed at {position:?}"));
        };
        match memory::differs(ram, sealed) {
            None => Ok(()),
            Some(page) => {
                Err(format!("page {page} of the image at {position:?} is not what was sealed"))
            }
        }
    }
}
