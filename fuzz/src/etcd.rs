//! Answers of etcd's JSON gateway, or of whoever answers instead.
//!
//! Beside "no panic": an answer names the key that was asked and a revision that a swap can compare;
//! a record that is taken can be replaced, and is read again as it is written.

use replication::ids::Generation;
use replication::ownership::etcd::fuzzing::{
    ANSWER_BYTES_MAX, Entry, SwapOutcome, range, record, refusal, swap, token,
};

use crate::reach::reached;

/// The key that seeds are about.
pub const KEY: &[u8] = b"vm1";

/// What a good answer gets to.
pub const PLACES: &[&str] = &[
    "etcd: no key",
    "etcd: an entry",
    "etcd: a record",
    "etcd: a swap done",
    "etcd: a swap refused",
    "etcd: a token",
];

/// The first byte says what was asked.
pub fn run(bytes: &[u8]) {
    let Some((which, text)) = bytes.split_first() else { return };
    if text.len() as u64 > ANSWER_BYTES_MAX {
        return;
    }
    match which % 5 {
        0 => match range(text, KEY) {
            Ok(found) => entry(found.entry.as_ref()),
            Err(error) => assert!(!error.to_string().is_empty()),
        },
        1 => match swap(text, KEY).map(|swapped| swapped.outcome) {
            Ok(SwapOutcome::Done) => reached("etcd: a swap done"),
            Ok(SwapOutcome::Refused(standing)) => {
                reached("etcd: a swap refused");
                entry(standing.as_ref());
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        },
        2 => {
            if let Ok(token) = token(text) {
                assert!(token.bytes().all(|byte| byte.is_ascii_graphic()));
                reached("etcd: a token");
            }
        }
        3 => value(text),
        _ => {
            let line = refusal(text);
            assert!(!line.is_empty() && !line.contains(char::is_control));
        }
    }
}

fn entry(entry: Option<&Entry>) {
    let Some(entry) = entry else { return reached("etcd: no key") };
    assert!(entry.revision > 0);
    reached("etcd: an entry");
    value(&entry.value);
}

fn value(bytes: &[u8]) {
    let Ok(standing) = record(bytes) else { return };
    assert!(standing.generation > Generation(0));
    assert!(standing.generation.next() > standing.generation);
    let again = serde_json::to_vec(&standing).expect("a record is JSON");
    assert_eq!(record(&again), Ok(standing));
    reached("etcd: a record");
}
