//! The `etcd:` arbiter's client that ships, over a simulated cluster.
//!
//! The client asks several servers at a time, and waits for whichever answers first, or for a while. Here each
//! of these is an event of its own: the client is run from its beginning, as it was then, with what it has
//! heard so far, until it waits for something that it has not ([`Client::run`]); what it asks on its way there
//! and has not asked before is sent.

use std::io::ErrorKind;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::endpoint::EtcdServer;
use replication::ownership::etcd::{CallError, FileError, Gateway, Heard, Learnt, Place, Round};
use replication::ownership::{EtcdArbiter, HostId, Outcome, Record, Standing, carry_out};
use replication::protocol::ownership::{Action, Event};
use uuid::Uuid;

use super::cluster::{KEY, MEMBERS, Reply, Request};
use crate::broken::Broken;

/// What a client hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// Of the server at this place, to a read.
    Answer(usize, Reply),
    Silence,
    Nobody,
    /// To what it posted.
    Posted(Reply),
}

/// What a client waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// For so long, or until all have answered.
    Answer(Option<Duration>),
    Posted,
}

#[derive(Debug, Default)]
struct Heards {
    heard: Vec<Said>,
    taken: usize,
    asks: Vec<Request>,
    post: Option<Request>,
    waits: Option<Wait>,
}

/// A client's servers, as far as they have answered.
#[derive(Debug)]
struct Replay {
    servers: Vec<EtcdServer>,
    heards: Mutex<Heards>,
}

impl Replay {
    fn lock(&self) -> MutexGuard<'_, Heards> {
        self.heards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What comes next; from the first thing on that is not here yet, nothing.
    fn next(&self, wait: Wait, post: Option<Request>) -> Option<Said> {
        let mut heards = self.lock();
        if heards.waits.is_some() {
            return None;
        }
        let said = heards.heard.get(heards.taken).cloned();
        heards.taken += 1;
        if said.is_none() {
            (heards.waits, heards.post) = (Some(wait), post);
        }
        said
    }
}

impl Gateway for &Replay {
    fn servers(&self) -> &[EtcdServer] {
        &self.servers
    }

    fn begin(&self) -> Result<Box<dyn Round + '_>, FileError> {
        Ok(Box::new(*self))
    }
}

impl Round for &Replay {
    fn ask(&self, server: usize, path: &str, body: &str) {
        let mut heards = self.lock();
        if heards.waits.is_none() {
            heards.asks.push(Request { server, path: path.to_owned(), body: body.to_owned() });
        }
    }

    fn hear(&self, within: Option<Duration>) -> Heard {
        match self.next(Wait::Answer(within), None) {
            Some(Said::Answer(server, reply)) => Heard::Answer(server, result(reply)),
            Some(Said::Silence) => Heard::Silence,
            Some(Said::Nobody | Said::Posted(_)) | None => Heard::Nobody,
        }
    }

    fn post(&self, server: usize, path: &str, body: &str) -> Result<Vec<u8>, CallError> {
        let request = Request { server, path: path.to_owned(), body: body.to_owned() };
        match self.next(Wait::Posted, Some(request)) {
            Some(Said::Posted(reply)) => result(reply),
            _ => result(Reply::Lost(ErrorKind::WouldBlock)),
        }
    }
}

fn result(reply: Reply) -> Result<Vec<u8>, CallError> {
    match reply {
        Reply::Body(text) => Ok(text),
        Reply::Status(status, reason) => {
            Err(CallError::Status { status, reason: reason.to_owned() })
        }
        Reply::Lost(kind) => Err(std::io::Error::from(kind).into()),
    }
}

/// What a client does next.
#[derive(Debug)]
pub enum Next {
    /// It sends these, and waits.
    Waits { asks: Vec<Request>, post: Option<Request>, wait: Wait },
    /// What the engine is told.
    Ends(Event),
}

/// An operation of a host's arbiter that is under way.
#[derive(Debug)]
pub struct Client {
    pub host: usize,
    /// Of the engine that called: another one has another arbiter.
    pub life: u64,
    /// Of the process: one that was killed goes on with nothing.
    pub process: u128,
    action: Action,
    /// What the one before had left.
    began: Learnt,
    /// What this one leaves.
    pub learnt: Learnt,
    heard: Vec<Said>,
    asked: usize,
    /// What it asked and was not answered so far.
    pub under_way: usize,
    pub waits: Option<Wait>,
}

impl Client {
    #[must_use]
    pub fn new(host: usize, life: u64, process: u128, action: Action, began: Learnt) -> Self {
        let (heard, asked, under_way, waits) = (vec![], 0, 0, None);
        Self { host, life, process, action, began, learnt: began, heard, asked, under_way, waits }
    }

    /// How much it has heard: a wait is over when that has grown.
    #[must_use]
    pub fn heard(&self) -> usize {
        self.heard.len()
    }

    /// What it knows of the cluster: an answer from before is none to it.
    #[must_use]
    pub fn knows(&self) -> Option<Place> {
        self.began.place.or(self.learnt.place)
    }

    /// Goes on, with what it waited for.
    pub fn run(&mut self, said: Option<Said>, broken: Option<Broken>) -> Next {
        self.heard.extend(said);
        let heard = std::mem::take(&mut self.heard);
        let replay = Replay {
            servers: servers(),
            heards: Mutex::new(Heards { heard, ..Heards::default() }),
        };
        let forgets = broken == Some(Broken::AnotherHistoryCounts);
        let began = if forgets { Learnt { place: None, ..self.began } } else { self.began };
        let arbiter = EtcdArbiter::over(KEY, &replay, began);
        let result = carry_out(&arbiter, &self.action);
        self.learnt = arbiter.learnt();
        drop(arbiter);
        let mut heards = std::mem::take(&mut *replay.lock());
        (self.heard, self.waits) = (heards.heard, heards.waits);
        let Some(wait) = self.waits else {
            let event = result.unwrap_or(Event::Failed);
            return Next::Ends(self.believes(event, broken));
        };
        let asks = heards.asks.split_off(self.asked);
        self.asked += asks.len();
        self.under_way += asks.len();
        Next::Waits { asks, post: heards.post, wait }
    }

    /// What a client would make of it that takes a refusal for one, whatever stands.
    fn believes(&self, event: Event, broken: Option<Broken>) -> Event {
        match (broken, &self.action, self.heard.last()) {
            (
                Some(Broken::OwnRefusalIsLost),
                Action::Swap { next, .. },
                Some(Said::Posted(Reply::Body(text))),
            ) if event == Event::Swapped(Outcome::Won) && !has_succeeded(text) => {
                let standing = Standing::Solo { owner: HostId(Uuid::nil()) };
                Event::Swapped(Outcome::Lost(Some(Record { standing, ..*next })))
            }
            _ => event,
        }
    }
}

fn has_succeeded(text: &[u8]) -> bool {
    let answer: Result<serde_json::Value, _> = serde_json::from_slice(text);
    answer.is_ok_and(|answer| answer["succeeded"] == true)
}

fn servers() -> Vec<EtcdServer> {
    let server = |member| EtcdServer { tls: false, host: format!("m{member}"), port: 2379 };
    (0..MEMBERS).map(server).collect()
}

#[cfg(test)]
mod tests {
    use replication::VmId;
    use replication::ids::Generation;

    use super::super::cluster::Cluster;
    use super::*;

    fn swap() -> Action {
        let standing = Standing::Solo { owner: HostId(Uuid::from_u128(5)) };
        let next = Record { generation: Generation(1), vm: VmId(Uuid::from_u128(1)), standing };
        Action::Swap { expected: Generation(0), next }
    }

    fn waits(next: Next) -> (Vec<Request>, Option<Request>, Wait) {
        match next {
            Next::Waits { asks, post, wait } => (asks, post, wait),
            Next::Ends(event) => panic!("{event:?}"),
        }
    }

    /// A swap at a cluster whose first member is silent: the event, and what is left.
    fn swapped(began: Learnt, is_repeated: bool, broken: Option<Broken>) -> (Event, Learnt) {
        let mut cluster = Cluster::default();
        let mut client = Client::new(0, 0, 1, swap(), began);
        let (asks, post, wait) = waits(client.run(None, broken));
        assert_eq!((asks.len(), asks[0].server, post), (1, began.last, None));
        assert!(matches!(wait, Wait::Answer(Some(_))));
        let (asks, _, _) = waits(client.run(Some(Said::Silence), broken));
        let server = (began.last + 1) % MEMBERS;
        assert_eq!((asks.len(), asks[0].server, client.under_way), (1, server, 2));
        let said = Said::Answer(server, cluster.serves(&asks[0], true));
        let (asks, post, wait) = waits(client.run(Some(said), broken));
        assert_eq!((asks.len(), wait), (0, Wait::Posted), "what was sent is not sent again");
        let post = post.unwrap();
        assert_eq!(post.server, server);
        let mut reply = cluster.serves(&post, true);
        if is_repeated {
            reply = cluster.serves(&post, true);
        }
        match client.run(Some(Said::Posted(reply)), broken) {
            Next::Ends(event) => (event, client.learnt),
            next => panic!("{next:?}"),
        }
    }

    #[test]
    fn an_operation_goes_on_from_what_the_one_before_left() {
        let (event, left) = swapped(Learnt::default(), false, None);
        assert_eq!(event, Event::Swapped(Outcome::Won));
        assert_eq!(left.last, 1);
        assert_eq!(left.place.map(|place| place.revision), Some(2));
        let later = Learnt { place: left.place.map(|at| Place { revision: 9, ..at }), ..left };
        let mut client = Client::new(0, 0, 1, Action::Read { expected: Generation(0) }, later);
        let (asks, _, _) = waits(client.run(None, None));
        assert_eq!(asks[0].server, 1);
        let old = Cluster::default().serves(&asks[0], true);
        let (asks, _, _) = waits(client.run(Some(Said::Answer(1, old)), None));
        assert_eq!(asks[0].server, 2, "an earlier time is no answer");
    }

    #[test]
    fn a_repeated_swap_is_won_but_where_that_rule_is_broken() {
        let won = Event::Swapped(Outcome::Won);
        assert_eq!(swapped(Learnt::default(), true, None).0, won);
        let broken = Some(Broken::OwnRefusalIsLost);
        assert_eq!(swapped(Learnt::default(), false, broken).0, won);
        let lost = swapped(Learnt::default(), true, broken).0;
        assert!(matches!(lost, Event::Swapped(Outcome::Lost(Some(_)))), "{lost:?}");
    }
}
