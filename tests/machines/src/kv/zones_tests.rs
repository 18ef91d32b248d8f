//! Against stateright's search, on many small histories.

use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::history::{Event, Returned};
use super::super::linear;
use super::*;

const HISTORIES: u32 = 20_000;
const CLIENTS: u32 = 3;

/// A few operations of a few clients at random times, with random answers that may be wrong.
fn random_history(random: &mut StdRng) -> Vec<Operation> {
    let event = |sequence| Event { sequence, at: Instant::now() };
    let mut operations: Vec<Operation> = Vec::new();
    let mut busy: Vec<Option<usize>> = vec![None; CLIENTS as usize];
    for sequence in 1..random.random_range(4..16) {
        let client = random.random_range(0..CLIENTS);
        let slot = &mut busy[client as usize];
        if let Some(at) = slot.take() {
            let value = match operations[at].kind {
                Kind::Put(value) => value,
                Kind::Get => random.random_range(0..sequence).min(operations.len() as u64),
            };
            operations[at].returned = Some(Returned { event: event(sequence), value });
        } else {
            *slot = Some(operations.len());
            let value = 1 + operations.len() as u64;
            let kind = if random.random_bool(0.5) { Kind::Get } else { Kind::Put(value) };
            let (invoked, id) = (event(sequence), sequence);
            operations.push(Operation { client, id, key: 1, kind, invoked, returned: None });
        }
    }
    operations.retain(|operation| operation.kind != Kind::Get || operation.returned.is_some());
    operations
}

#[test]
fn zones_and_search_agree() {
    let mut random = StdRng::seed_from_u64(5);
    let mut right = 0;
    for number in 0..HISTORIES {
        let operations = random_history(&mut random);
        let end = random.random_range(0..=operations.len() as u64);
        let searched = linear::is_found(0, &operations, end);
        let said = is_possible(0, &operations, end);
        assert_eq!(said, searched, "history {number}, then {end}: {operations:#?}");
        right += u32::from(said);
    }
    // Both kinds came often enough to say something.
    assert!((HISTORIES / 50..HISTORIES / 2).contains(&right), "{right} of them are right");
}
