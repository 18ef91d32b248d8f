//! Histories by hand, each written as its events: what is right passes, what is wrong is found.

use super::super::history::{Event, Returned};
use super::*;

const LIMIT: Duration = Duration::from_secs(60);

/// `(client, invoked, returned or 0 for never, kind, value read)` on one key.
type Row = (u32, u64, u64, Kind, u64);

fn history(rows: &[Row]) -> Vec<Operation> {
    let event = |sequence| Event { sequence, at: Instant::now() };
    let operation = |(client, invoked, returned, kind, value): &Row| Operation {
        client: *client,
        id: *invoked,
        key: 7,
        kind: *kind,
        invoked: event(*invoked),
        returned: (*returned != 0).then(|| Returned { event: event(*returned), value: *value }),
    };
    rows.iter().map(operation).collect()
}

fn is_right(rows: &[Row]) -> bool {
    match check(&history(rows), LIMIT) {
        Ok(_) => true,
        Err(Violation::NotLinearizable { key: 7, .. }) => false,
        Err(other) => panic!("{other}"),
    }
}

use Kind::{Get, Put};

#[test]
fn one_after_the_other_is_right() {
    assert!(is_right(&[(0, 1, 2, Get, 0), (0, 3, 4, Put(5), 5), (1, 5, 6, Get, 5)]));
}

#[test]
fn a_lost_write_is_found() {
    assert!(!is_right(&[(0, 1, 2, Put(5), 5), (1, 3, 4, Get, 0)]));
    assert!(!is_right(&[(0, 1, 2, Put(5), 5), (0, 3, 4, Put(6), 6), (1, 5, 6, Get, 5)]));
}

#[test]
fn a_read_that_goes_back_is_found() {
    // Two writes at once may be in either order, and both reads together decide it.
    let writes = [(0, 1, 3, Put(5), 5), (1, 2, 4, Put(6), 6)];
    for (first, second, right) in [(5, 5, true), (6, 6, true), (5, 6, false), (6, 5, false)] {
        let mut rows = writes.to_vec();
        rows.extend([(2, 5, 6, Get, first), (2, 7, 8, Get, second)]);
        assert_eq!(is_right(&rows), right, "{first} then {second}");
    }
    // While they are under way a read may see one, and a later one the other.
    let rows = [(0, 1, 9, Put(5), 5), (1, 2, 10, Put(6), 6), (2, 3, 4, Get, 6), (2, 5, 6, Get, 5)];
    assert!(is_right(&rows));
    let mut rows = rows.to_vec();
    rows.push((2, 7, 8, Get, 6));
    assert!(!is_right(&rows));
}

#[test]
fn a_read_from_the_future_is_found() {
    assert!(!is_right(&[(0, 1, 2, Get, 5), (1, 3, 4, Put(5), 5)]));
    assert!(!is_right(&[(0, 1, 2, Get, 9)]));
}

#[test]
fn a_write_without_an_answer_may_be_done_late_or_never() {
    let unknown = (0, 1, 0, Put(5), 0);
    assert!(is_right(&[unknown, (1, 2, 3, Get, 0), (1, 4, 5, Get, 0)]));
    assert!(is_right(&[unknown, (1, 2, 3, Get, 0), (1, 4, 5, Get, 5)]));
    assert!(!is_right(&[unknown, (1, 2, 3, Get, 5), (1, 4, 5, Get, 0)]));
    assert!(is_right(&[unknown, (1, 2, 3, Put(6), 6), (1, 4, 5, Get, 6)]));
    assert!(is_right(&[(0, 1, 0, Get, 0), (1, 2, 3, Put(6), 6)]));
}

#[test]
fn quiet_moments_are_cuts() {
    let rows = [(0, 1, 3, Put(5), 5), (1, 2, 5, Get, 0), (0, 4, 6, Get, 5), (1, 7, 8, Get, 5)];
    let extent = check(&history(&rows), LIMIT).unwrap();
    assert_eq!((extent.keys, extent.segments, extent.longest), (1, 2, 3));
}

/// Sixteen clients on one key for long: what the search must be fast for.
#[test]
fn a_long_history_is_searched_in_time() {
    let mut rows = Vec::new();
    let mut value = 0;
    for round in 0..300u64 {
        let start = 1 + round * 100;
        rows.push((0, start, start + 60, Put(round + 1), round + 1));
        for client in 1..8 {
            let at = start + u64::from(client) * 5;
            let seen = if client < 4 { value } else { round + 1 };
            rows.push((client, at, at + 40, Get, seen));
        }
        value = round + 1;
    }
    assert!(is_right(&rows));
    let last = rows.len() - 1;
    rows[last].4 = 1;
    assert!(!is_right(&rows));
}

#[test]
fn a_search_without_end_is_given_up() {
    // It is right, 6 before 5; the search begins with 5, and tries the reads of 6 in any order.
    let mut rows = vec![(0, 1, 101, Put(5), 5), (1, 2, 102, Put(6), 6)];
    rows.extend(
        (2..22).map(|client| (client, 1 + u64::from(client), 110 + u64::from(client), Get, 6)),
    );
    rows.push((0, 200, 201, Get, 5));
    let result = check(&history(&rows), Duration::from_millis(200));
    assert!(matches!(result, Err(Violation::Undecided { key: 7 })), "{result:?}");
}

#[test]
fn a_wrong_history_needs_no_search() {
    // As clients leave it that were cut off: writes without an answer, and reads at once.
    let mut rows: Vec<Row> =
        (0..20).map(|n| (n, 1 + u64::from(n), 0, Put(50 + u64::from(n)), 0)).collect();
    rows.extend((20..40).map(|n| (n, 1 + u64::from(n), 100 + u64::from(n), Get, 0)));
    rows.extend([(40, 200, 201, Put(5), 5), (41, 202, 203, Get, 0)]);
    assert!(!is_right(&rows));
}
