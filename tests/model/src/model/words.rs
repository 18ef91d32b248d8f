//! A path in words, for whoever reads a counterexample.

use std::fmt::Write;

use super::world::{Act, At, World};
use crate::arbiter::Fate;

fn host(at: At) -> char {
    if at == 0 { 'A' } else { 'B' }
}

/// What happens, seen from before it does.
#[must_use]
pub fn act(world: &World, act: Act) -> String {
    match act {
        Act::Connect(at) => format!("{} begins to copy", host(at)),
        Act::Deliver(at) => {
            let message = world.link.queues[at].front();
            let message = message.map_or("nothing".to_owned(), |found| format!("{found:?}"));
            format!("{} reads {message}", host(at))
        }
        Act::Pages(at) => format!("{} has the pages of the epoch that is due", host(at)),
        Act::Suspect(at) => format!("{} takes the other for lost", host(at)),
        Act::Copied(at) => format!("{} has copied all", host(at)),
        Act::Seal(at) => format!("{} seals", host(at)),
        Act::TooLarge(at) => format!("{} has an epoch that does not fit", host(at)),
        Act::GiveUp(at) => format!("{} cannot capture its guest", host(at)),
        Act::ImageFails(at) => format!("{} cannot write an image", host(at)),
        Act::Spoils(at) => {
            format!("{} has an image that is not whole, and does not know it", host(at))
        }
        Act::Dooms(at) => format!("{} will not be able to start", host(at)),
        Act::Lacks(at) => format!("{} lacks what the machine would need", host(at)),
        Act::Stop(at) => format!("{} is asked to stop", host(at)),
        Act::Failover(at) => format!("{} is asked to fail over", host(at)),
        Act::Force(at) => format!("{} is forced to take over", host(at)),
        Act::Call(at, fate) => {
            let call = world.calls[at].queue.front().map(|(_, action)| action);
            let how = match fate {
                Fate::Well => "is answered".to_owned(),
                Fate::AnswerLost => "takes effect, its answer is lost".to_owned(),
                Fate::CallLost => "is lost".to_owned(),
                Fate::Late => "is late, and counts as failed".to_owned(),
                Fate::Stale(seen) => format!("sees {seen} records only"),
            };
            format!("{}'s call {call:?} {how}", host(at))
        }
        Act::Answer(at) => {
            let answer = &world.calls[at].answer;
            format!("{} hears from the arbiter: {answer:?}", host(at))
        }
        Act::Timer(at) => format!("{}'s wait is over", host(at)),
        Act::Stray(index) => format!("a late call arrives: {:?}", world.strays[index]),
        Act::Crash(at) => format!("{} is killed", host(at)),
        Act::Reach(at) => format!("{} reaches its old host", host(at)),
        Act::Listen(at) => format!("{} listens for a primary", host(at)),
    }
}

/// How things stand, in a line.
#[must_use]
pub fn stand(world: &World) -> String {
    let mut line = String::new();
    for at in [0, 1] {
        let machine = &world.hosts[at];
        let role = match (machine.primary(), machine.backup()) {
            (Some(primary), _) => format!("primary {:?}", primary.machine.state()),
            (_, Some(backup)) => format!("backup {:?}", backup.machine.state()),
            _ if !machine.alive => "dead".to_owned(),
            _ => "no role".to_owned(),
        };
        let vm = machine.vm.as_ref().map_or("no VM".to_owned(), |vm| {
            let gate = if crate::vm::Vm::is_free(vm) { "free" } else { "held" };
            format!("VM {}.{} {gate}, let out {}", vm.incarnation, vm.open, vm.frames)
        });
        // Writing to a string does not fail.
        let _ = write!(line, "{}: {role}, {vm}; ", host(at));
    }
    let record = world.arbiter.standing().map_or("no record".to_owned(), |record| {
        let (generation, owner) = (record.generation, record.runs_on().0.as_u128());
        let pair = matches!(record.standing, replication::ownership::Standing::Pair { .. });
        let standing = if pair { "PAIR" } else { "SOLO" };
        format!("record {generation} {standing} of process {owner}")
    });
    line + &record
}
