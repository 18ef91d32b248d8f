//! Whether a history is that of registers: every operation took effect once, at one moment between
//! its invocation and its return.
//!
//! Linearizability is local: a history is linearizable if that of each key is. And where nothing is
//! under way on a key, whatever came before comes before whatever comes after; so the history of a
//! key is cut there, and the values that the key may have at the cut are handed on. What is left is
//! short. Two judges look at it, and what passes has passed both: [`super::zones`], which says no
//! at once, and stateright's tester, which finds an order. Its search is exponential where there is
//! none, so it is asked where there should be one.
//!
//! A write that was never answered may take effect at any later time: after it there is no cut. A
//! read that was never answered says nothing.

use std::collections::BTreeMap;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use stateright::semantics::register::{Register, RegisterOp, RegisterRet};
use stateright::semantics::{ConsistencyTester, LinearizabilityTester};

use super::figures::micros;
use super::history::{Kind, Operation};
use super::violation::Violation;
use super::zones;

/// The tester recurses once for each operation of a segment.
const STACK_BYTES: usize = 256 << 20;
/// Whoever reads at a cut: no client has this number.
const WITNESS: u32 = u32::MAX;
/// Operations up to a bad segment's end that are shown.
const SHOWN: usize = 16;

/// What was looked through. Its times are microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    pub keys: usize,
    pub segments: usize,
    /// Operations of the longest segment.
    pub longest: usize,
    pub took_us: u64,
}

/// Checks the history of each key. A search that takes longer than `limit` in all is given up.
pub fn check(operations: &[Operation], limit: Duration) -> Result<Extent, Violation> {
    let mut keys: BTreeMap<u32, Vec<Operation>> = BTreeMap::new();
    for operation in operations {
        if operation.returned.is_some() || operation.kind != Kind::Get {
            keys.entry(operation.key).or_default().push(*operation);
        }
    }
    let (sender, receiver) = channel();
    let start = Instant::now();
    let search = move || {
        let mut extent = Extent { keys: keys.len(), ..Extent::default() };
        for (key, operations) in keys {
            // Nobody listens any more if it took too long.
            let _ = sender.send(Progress::Begun(key));
            if let Err(violation) = check_key(key, operations, &mut extent) {
                let _ = sender.send(Progress::Ended(Err(violation)));
                return;
            }
        }
        extent.took_us = micros(start.elapsed());
        let _ = sender.send(Progress::Ended(Ok(extent)));
    };
    std::thread::Builder::new()
        .name("linearizability".into())
        .stack_size(STACK_BYTES)
        .spawn(search)
        .expect("a thread can be started");
    let until = start + limit;
    let mut current = 0;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(left) {
            Ok(Progress::Begun(key)) => current = key,
            Ok(Progress::Ended(result)) => return result,
            Err(RecvTimeoutError::Timeout) => return Err(Violation::Undecided { key: current }),
            Err(RecvTimeoutError::Disconnected) => unreachable!("it says how it ended"),
        }
    }
}

enum Progress {
    Begun(u32),
    Ended(Result<Extent, Violation>),
}

fn check_key(key: u32, operations: Vec<Operation>, extent: &mut Extent) -> Result<(), Violation> {
    let mut values = vec![0];
    let segments = segments(operations);
    for (at, segment) in segments.iter().enumerate() {
        extent.segments += 1;
        extent.longest = extent.longest.max(segment.len());
        values = values_after(&values, segment);
        if values.is_empty() {
            let operations = shown(&segments[..=at].concat());
            return Err(Violation::NotLinearizable { key, operations });
        }
    }
    Ok(())
}

/// Cuts a key's operations where none is under way.
fn segments(mut operations: Vec<Operation>) -> Vec<Vec<Operation>> {
    operations.sort_unstable_by_key(|operation| operation.invoked.sequence);
    let mut segments: Vec<Vec<Operation>> = Vec::new();
    let mut busy_until = 0;
    for operation in operations {
        match segments.last_mut() {
            Some(segment) if operation.invoked.sequence < busy_until => segment.push(operation),
            _ => segments.push(vec![operation]),
        }
        busy_until = busy_until.max(operation.returned_at());
    }
    segments
}

/// The values that a key may have after a segment if it had one of these before.
fn values_after(before: &[u64], segment: &[Operation]) -> Vec<u64> {
    let mut after: Vec<u64> = Vec::new();
    for begin in before {
        for end in candidates(*begin, segment) {
            let is_possible =
                || zones::is_possible(*begin, segment, end) && is_found(*begin, segment, end);
            if !after.contains(&end) && is_possible() {
                after.push(end);
            }
        }
    }
    after
}

/// Values of writes that no other write surely followed, and the first one if there may be none.
fn candidates(begin: u64, segment: &[Operation]) -> Vec<u64> {
    let writes = || {
        segment.iter().filter_map(|operation| match operation.kind {
            Kind::Put(value) => Some((operation, value)),
            Kind::Get => None,
        })
    };
    let last_invoked = writes()
        .filter(|(operation, _)| operation.returned.is_some())
        .map(|(operation, _)| operation.invoked.sequence)
        .max();
    let may_be_last =
        |operation: &Operation| last_invoked.is_none_or(|last| operation.returned_at() > last);
    let mut found: Vec<u64> =
        writes().filter(|(operation, _)| may_be_last(operation)).map(|(_, value)| value).collect();
    if last_invoked.is_none() {
        found.push(begin);
    }
    found
}

/// Searches with stateright: the segment, begun with one value, and then a read of another.
pub(super) fn is_found(begin: u64, segment: &[Operation], end: u64) -> bool {
    let mut events: Vec<(u64, bool, &Operation)> = Vec::new();
    for operation in segment {
        events.push((operation.invoked.sequence, false, operation));
        if let Some(returned) = operation.returned {
            events.push((returned.event.sequence, true, operation));
        }
    }
    events.sort_unstable_by_key(|event| event.0);
    let mut tester = LinearizabilityTester::new(Register(begin));
    for (_, is_return, operation) in events {
        let done = match (is_return, operation.kind) {
            (false, Kind::Put(value)) => {
                tester.on_invoke(operation.client, RegisterOp::Write(value))
            }
            (false, Kind::Get) => tester.on_invoke(operation.client, RegisterOp::Read),
            (true, Kind::Put(_)) => tester.on_return(operation.client, RegisterRet::WriteOk),
            (true, Kind::Get) => {
                let value = operation.returned.map_or(0, |returned| returned.value);
                tester.on_return(operation.client, RegisterRet::ReadOk(value))
            }
        };
        done.expect("a client has one operation at a time");
    }
    tester.on_invoke(WITNESS, RegisterOp::Read).expect("the witness is alone");
    tester.on_return(WITNESS, RegisterRet::ReadOk(end)).expect("the witness has asked");
    tester.is_consistent()
}

/// The last operations up to a bad segment's end, for a person to read.
fn shown(operations: &[Operation]) -> String {
    let left_out = operations.len().saturating_sub(SHOWN);
    let mut lines: Vec<String> =
        operations.iter().skip(left_out).map(ToString::to_string).collect();
    if left_out > 0 {
        lines.insert(0, format!("  ({left_out} before these)"));
    }
    lines.join("\n")
}

#[cfg(test)]
#[path = "linear_tests.rs"]
mod tests;
