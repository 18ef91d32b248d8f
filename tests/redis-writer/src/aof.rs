//! An append-only file of Redis: the commands that wrote, as a client sent them.

use std::collections::HashMap;
use std::io::BufRead;

use anyhow::{Context, Result, bail};

use crate::keys::{self, Losses};
use crate::resp::{self, Reply};

/// Reads the whole log, which holds whole commands only, and looks for the numbers' keys in it.
pub fn verify(log: &mut impl BufRead, numbers: &[u64]) -> Result<()> {
    let mut stored = HashMap::new();
    let mut count = 0_u64;
    while let Some(entry) = resp::read(log).with_context(|| format!("after {count} commands"))? {
        count += 1;
        let Reply::Array(words) = entry else { bail!("Command {count} is no array") };
        match words.as_slice() {
            [Some(verb), Some(_)] if verb == b"SELECT" => {}
            [Some(verb), Some(key), Some(value)] if verb == b"SET" => {
                stored.insert(key.clone(), value.clone());
            }
            _ => bail!("Command {count} is one that nobody gave"),
        }
    }
    let mut losses = Losses::default();
    for &number in numbers {
        losses.compare(number, stored.get(&keys::key(number)).map(Vec::as_slice));
    }
    losses.none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::command;

    fn log(numbers: &[u64]) -> Vec<u8> {
        let mut log = command(&[b"SELECT", b"0"]);
        for &number in numbers {
            log.extend(command(&[b"SET", &keys::key(number), &keys::value(number)]));
        }
        log
    }

    fn verdict(log: &[u8], numbers: &[u64]) -> String {
        verify(&mut &log[..], numbers).map_or_else(|error| format!("{error:#}"), |()| "fine".into())
    }

    #[test]
    fn a_log_with_every_key_and_more_is_fine() {
        assert_eq!(verdict(&log(&[1, 2, 3, 4]), &[1, 2, 3]), "fine");
    }

    #[test]
    fn a_key_that_is_not_there_is_a_loss() {
        let said = verdict(&log(&[1, 3]), &[1, 2, 3, 4]);
        assert_eq!(said, "2 acknowledged keys are lost or wrong: key 2 is missing");
        assert!(verdict(&[], &[1]).contains("key 1 is missing"));
    }

    #[test]
    fn a_value_that_was_never_written_is_a_loss() {
        let wrong = command(&[b"SET", b"key:1", b"other"]);
        assert!(verdict(&wrong, &[1]).contains("key 1 holds 'other'"));
    }

    #[test]
    fn a_torn_or_foreign_log_is_refused() {
        let whole = log(&[1, 2]);
        assert!(verdict(&whole[..whole.len() - 1], &[1]).contains("after 2 commands"));
        let zeroes = [whole.clone(), vec![0; 512]].concat();
        assert!(verdict(&zeroes, &[1]).contains("after 3 commands"));
        let deleted = [whole, command(&[b"DEL", b"key:1"])].concat();
        assert!(verdict(&deleted, &[1]).contains("Command 4 is one that nobody gave"));
    }
}
