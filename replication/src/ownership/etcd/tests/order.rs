//! Who is asked when, and what is made of it, by a script in place of servers and clocks.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::*;

/// What the client does, and what it is told: an error, or an answer at a revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Asks(usize),
    Hears(usize, Said),
    /// After so many milliseconds.
    Silence(u64),
    Nobody,
    Posts(usize, Said),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Failure,
    /// No such key; of the cluster of this id.
    Nothing(u64, i64),
    Done(i64),
}

struct Script {
    servers: Vec<api::endpoint::EtcdServer>,
    steps: Mutex<VecDeque<Step>>,
}

impl Script {
    fn next(&self) -> Step {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        steps.pop_front().expect("nothing more was expected")
    }
}

impl Said {
    fn body(self) -> Result<Vec<u8>, CallError> {
        let header = |cluster: u64, revision: i64| {
            format!(r#""header":{{"cluster_id":"{cluster}","revision":"{revision}"}}"#)
        };
        match self {
            Self::Failure => Err(std::io::Error::from(ErrorKind::ConnectionRefused).into()),
            Self::Nothing(cluster, revision) => {
                Ok(format!("{{{}}}", header(cluster, revision)).into())
            }
            Self::Done(revision) => {
                Ok(format!(r#"{{{},"succeeded":true}}"#, header(7, revision)).into())
            }
        }
    }
}

impl Gateway for Script {
    fn servers(&self) -> &[api::endpoint::EtcdServer] {
        &self.servers
    }

    fn begin(&self) -> Result<Box<dyn Round + '_>, FileError> {
        Ok(Box::new(self))
    }
}

impl Round for &Script {
    fn ask(&self, server: usize, path: &str, body: &str) {
        assert_eq!((path, body), ("/v3/kv/range", r#"{"key":"dm0x"}"#));
        assert_eq!(self.next(), Step::Asks(server));
    }

    fn hear(&self, within: Option<Duration>) -> Heard {
        match self.next() {
            Step::Hears(server, said) => Heard::Answer(server, said.body()),
            Step::Silence(ms) => {
                assert_eq!(within, Some(Duration::from_millis(ms)));
                Heard::Silence
            }
            Step::Nobody => {
                assert_eq!(within, None, "somebody was not asked");
                Heard::Nobody
            }
            step => panic!("it waits for an answer instead: {step:?}"),
        }
    }

    fn post(&self, server: usize, path: &str, _: &str) -> Result<Vec<u8>, CallError> {
        assert_eq!(path, "/v3/kv/txn");
        match self.next() {
            Step::Posts(at, said) if at == server => said.body(),
            step => panic!("it posts to {server} instead: {step:?}"),
        }
    }
}

/// An arbiter at three servers that has answers of cluster 7 up to revision 5, from `last`.
fn scripted(last: usize, steps: &[Step]) -> Result<EtcdArbiter<Script>> {
    let url = format!("etcd:http://a,http://b,http://c/{KEY}");
    let api::endpoint::ArbiterUrl::Etcd(cluster) = url.parse()? else { anyhow::bail!("{url}") };
    let steps = Mutex::new(steps.iter().copied().collect());
    let script = Script { servers: cluster.servers, steps };
    let learnt = Learnt { last, place: Some(Place { cluster: 7, revision: 5 }) };
    Ok(EtcdArbiter::over(KEY, script, learnt))
}

impl EtcdArbiter<Script> {
    fn is_over(&self) -> bool {
        self.client.gateway.steps.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

#[test]
fn the_first_usable_answer_counts_and_its_server_is_asked_first_from_then_on() -> Result<()> {
    use Step::{Asks, Hears, Silence};
    let arbiter = scripted(
        1,
        &[
            Asks(1),
            Silence(50),
            Asks(2),
            // Refused, of another cluster, of an earlier time: the next at once.
            Hears(2, Said::Failure),
            Asks(0),
            Hears(0, Said::Nothing(8, 9)),
            Hears(1, Said::Nothing(7, 5)),
            Asks(1),
            Hears(1, Said::Nothing(7, 4)),
            Asks(2),
            Hears(2, Said::Nothing(7, 6)),
        ],
    )?;
    assert_eq!(arbiter.read()?, None);
    assert_eq!(arbiter.learnt().last, 1);
    assert_eq!(arbiter.read()?, None);
    let place = Some(Place { cluster: 7, revision: 6 });
    assert_eq!(arbiter.learnt(), Learnt { last: 2, place });
    assert!(arbiter.is_over());
    Ok(())
}

#[test]
fn each_server_is_asked_once_and_all_are_waited_for() -> Result<()> {
    use Step::{Asks, Hears, Nobody, Silence};
    let arbiter = scripted(
        0,
        &[
            Asks(0),
            Silence(50),
            Asks(1),
            Silence(50),
            Asks(2),
            Silence(50),
            Hears(1, Said::Failure),
            Hears(0, Said::Nothing(8, 5)),
            Hears(2, Said::Failure),
            Nobody,
        ],
    )?;
    let error = arbiter.read().unwrap_err();
    let ArbiterError::Etcd(EtcdError::NoAnswer(failures)) = &error else { panic!("{error}") };
    let of: Vec<&str> = failures.iter().map(|(server, _)| server.host.as_str()).collect();
    assert_eq!(of, ["b", "a", "c"]);
    assert!(arbiter.is_over());
    Ok(())
}

#[test]
fn a_transaction_goes_once_to_the_server_that_answered() -> Result<()> {
    use Step::{Asks, Hears, Posts};
    let next = solo(1, vm());
    for said in [Said::Failure, Said::Done(4)] {
        let arbiter = scripted(
            1,
            &[
                Asks(1),
                Hears(1, Said::Failure),
                Asks(2),
                Hears(2, Said::Nothing(7, 6)),
                Posts(2, said),
            ],
        )?;
        let error = arbiter.compare_and_swap(Generation(0), &next).unwrap_err();
        let ArbiterError::Etcd(EtcdError::Unknown(server, _)) = &error else { panic!("{error}") };
        assert_eq!(server.host, "c");
        // That one may hang.
        let place = Some(Place { cluster: 7, revision: 6 });
        assert_eq!(arbiter.learnt(), Learnt { last: 0, place });
        assert!(arbiter.is_over());
    }
    let arbiter = scripted(1, &[Asks(1), Hears(1, Said::Nothing(7, 6)), Posts(1, Said::Done(7))])?;
    assert_eq!(arbiter.compare_and_swap(Generation(0), &next)?, Outcome::Won);
    assert!(arbiter.is_over());
    Ok(())
}
