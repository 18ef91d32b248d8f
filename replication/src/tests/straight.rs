//! A copy straight into the image, as the backup sees it: what the primary says, by frames that keep to the form.

use uuid::Uuid;

use super::pair::Backup;
use super::scripted::{SESSION, Script, next, offer};
use crate::ids::{Generation, PAGE_SIZE};
use crate::wire::{Encoding, Kind, Message, encode_sums};

const G1: Generation = Generation(1);

fn greeted() -> Script {
    Script::greeted(Backup::start(None), offer())
}

/// Checksums of pages whose bytes are all the same, of one group.
fn sums(script: &mut Script, group: u64, pages: u64, fill: u8) {
    let mut payload = vec![];
    let sum = crc32fast::hash(&[fill; PAGE_SIZE]);
    encode_sums(group, pages, (0..pages.count_ones()).map(|_| sum), &mut payload);
    script.data.write(Kind::Sums, &[&payload]).unwrap();
}

fn protected(script: &mut Script) {
    script.end(1);
    script.seal(1, 1, 0);
    script.acked(1);
}

/// The pages of a copy are 0xAB.
fn copied() -> Script {
    let mut script = greeted();
    script.pages(0, 0..64);
    script.forget_pages();
    script
}

#[test]
fn a_host_without_a_device_opens_nothing_and_says_so() {
    let mut script = greeted();
    script.say(&Message::WindowAsk(1));
    let Message::WindowNone { number: 1, reason } = next(&mut script.reader) else { panic!() };
    assert!(reason.contains("by TCP"), "{reason}");
    // The primary may have ended it before it heard that.
    script.say(&Message::WindowEnd(1));
    assert_eq!(next(&mut script.reader), Message::WindowClosed(1));
    script.say(&Message::WindowAsk(2));
    assert!(matches!(next(&mut script.reader), Message::WindowNone { number: 2, .. }));
    script.say(&Message::Paired(G1));
    protected(&mut script);
    script.say(&Message::WindowAsk(3));
    script.aborted("out of turn");
}

#[test]
fn what_is_asked_out_of_turn_ends_the_session() {
    for words in [
        vec![Message::WindowAsk(0)],
        vec![Message::WindowAsk(2)],
        vec![Message::WindowEnd(0)],
        vec![Message::WindowEnd(1)],
        vec![Message::WindowAsk(1), Message::WindowEnd(2)],
        vec![Message::WindowAsk(1), Message::WindowAsk(1)],
        vec![Message::WindowAsk(1), Message::WindowEnd(1), Message::WindowEnd(1)],
    ] {
        let mut script = greeted();
        for (at, word) in words.iter().enumerate() {
            script.say(word);
            if at + 1 < words.len() {
                let answer = next(&mut script.reader);
                assert!(!matches!(answer, Message::Abort(_)), "{words:?}: {answer:?}");
            }
        }
        script.aborted("out of turn");
    }
}

/// Each time may cost this host the registering of all of its image.
#[test]
fn nobody_asks_again_and_again() {
    let mut script = greeted();
    for number in 1..=8 {
        script.say(&Message::WindowAsk(number));
        assert!(matches!(next(&mut script.reader), Message::WindowNone { .. }), "{number}");
    }
    script.say(&Message::WindowAsk(9));
    script.aborted("out of turn");
}

/// What only a backup says.
#[test]
fn a_primary_that_answers_itself_is_no_primary() {
    for word in [
        Message::WindowOpen { number: 1, grants: vec![] },
        Message::WindowNone { number: 1, reason: String::new() },
        Message::WindowClosed(1),
    ] {
        let mut script = greeted();
        script.say(&word);
        script.aborted("arrived where a seal was due");
    }
}

#[test]
fn a_copy_whose_checksums_match_is_one() {
    let mut script = copied();
    sums(&mut script, 0, u64::MAX, 0xAB);
    script.say(&Message::Paired(G1));
    protected(&mut script);
}

#[test]
fn a_page_that_differs_and_does_not_come_again_is_no_copy() {
    let mut script = copied();
    sums(&mut script, 0, 0b111, 0xAB);
    // Nobody wrote those.
    sums(&mut script, 2, 0b101, 0xAB);
    script.say(&Message::Paired(G1));
    script.pages(1, 130..131);
    script.end(1);
    script.seal(1, 1, 1);
    script.aborted("1 pages of the copy are not as the primary has them, the first is 128");
}

/// The guest wrote it while its checksum was made.
#[test]
fn a_page_that_differs_and_comes_again_does_no_harm() {
    let mut script = copied();
    sums(&mut script, 2, 0b101, 0xAB);
    script.pages(0, 128..129);
    script.forget_pages();
    script.say(&Message::Paired(G1));
    script.pages(1, 130..131);
    script.end(1);
    script.seal(1, 1, 1);
    script.acked(1);
}

#[test]
fn checksums_never_follow_a_committed_epoch() {
    let mut script = copied();
    script.say(&Message::Paired(G1));
    protected(&mut script);
    sums(&mut script, 0, 1, 0xAB);
    script.aborted("after a committed epoch");
    // Nor come within one.
    let mut script = copied();
    script.say(&Message::Paired(G1));
    script.pages(1, 3..4);
    sums(&mut script, 0, 1, 0xAB);
    script.aborted("after a committed epoch");
}

/// A copy anew is checked as the first one is.
#[test]
fn a_copy_anew_is_checked_as_well() {
    let mut script = copied();
    sums(&mut script, 0, 1, 0xAB);
    script.say(&Message::Paired(G1));
    protected(&mut script);
    script.say(&Message::Resync);
    assert_eq!(next(&mut script.reader), Message::ResyncReady);
    script.frame(0, &[(0..1, Encoding::Zero)], &[]);
    script.forget_pages();
    sums(&mut script, 0, 1, 0xAB);
    script.say(&Message::Paired(Generation(2)));
    script.end(2);
    script.seal(2, 2, 0);
    script.aborted("not as the primary has them, the first is 0");
}

#[test]
fn checksums_of_another_connection_s_group_are_refused() {
    let backup = Backup::start(None);
    let names = (Uuid::new_v4(), Uuid::new_v4());
    let mut script = Script::one_of(2, 2, backup, SESSION, names, offer());
    sums(&mut script, 1, 1, 0);
    sums(&mut script, 2, 1, 0);
    script.aborted("Pages from 128 on arrived on data connection 2");
}
