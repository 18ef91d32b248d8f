//! Calls of which nobody knows whether they took effect.

use std::sync::atomic::{AtomicU32, Ordering};

use super::proxy::{Act, Proxy};
use super::*;

fn is_swap(path: &str) -> bool {
    path == "/v3/kv/txn"
}

/// A judge that does `act` to the first `count` swaps.
fn first_swaps(act: Act, count: u32) -> impl Fn(&str) -> Act + Send + 'static {
    let done = AtomicU32::new(0);
    move |path: &str| {
        if is_swap(path) && done.fetch_add(1, Ordering::Relaxed) < count { act } else { Act::Pass }
    }
}

#[test]
fn a_swap_whose_answer_is_lost_is_won_once() -> Result<()> {
    let cluster = Cluster::start(1)?;
    let proxy = Proxy::start(cluster.client(0).into())?;
    let arbiter = arbiter(&format!("etcd:{}/{KEY}", proxy.url()))?;
    let (vm, mut written) = (vm(), 0);
    for (act, expected) in [(Act::LoseAnswer, 0), (Act::LoseRequest, 1), (Act::LoseAnswer, 2)] {
        proxy.judge(first_swaps(act, 1));
        let next = solo(expected + 1, vm);
        let (verdict, failures) = claim(&arbiter, expected, next);
        assert_eq!(verdict, Verdict::Owned(next.generation), "{act:?}");
        assert_eq!(failures, 1, "the outcome was known: {act:?}");
        written += 1;
        assert_eq!(writes(&cluster)?, written, "{act:?}");
        assert_eq!(arbiter.read()?, Some(next));
    }
    assert_eq!(proxy.lost(), 3);
    Ok(())
}

#[test]
fn a_lost_answer_is_an_error_and_no_second_try() -> Result<()> {
    let cluster = Cluster::start(1)?;
    let proxy = Proxy::start(cluster.client(0).into())?;
    // A second server, which a swap must not be tried at.
    let arbiter = arbiter(&format!("etcd:{},{}/{KEY}", proxy.url(), cluster.url(0)))?;
    proxy.judge(|path| if is_swap(path) { Act::LoseRequest } else { Act::Pass });
    let first = solo(1, vm());
    let error = arbiter.compare_and_swap(Generation(0), &first).unwrap_err();
    let ArbiterError::Etcd(EtcdError::Unknown(server, _)) = &error else { panic!("{error}") };
    assert_eq!(server.to_string(), proxy.url());
    assert_eq!(arbiter.read()?, None);
    // The claim reads, and then swaps by the other server.
    let (verdict, failures) = claim(&arbiter, 0, first);
    assert_eq!((verdict, failures), (Verdict::Owned(Generation(1)), 0));
    Ok(())
}

#[test]
fn a_swap_that_is_repeated_on_the_way_is_won() -> Result<()> {
    let cluster = Cluster::start(1)?;
    let proxy = Proxy::start(cluster.client(0).into())?;
    let arbiter = arbiter(&format!("etcd:{}/{KEY}", proxy.url()))?;
    proxy.judge(|path| if is_swap(path) { Act::Repeat } else { Act::Pass });
    let first = solo(1, vm());
    // The answer that comes says "refused".
    assert_eq!(arbiter.compare_and_swap(Generation(0), &first)?, Outcome::Won);
    assert_eq!(writes(&cluster)?, 1);
    Ok(())
}

#[test]
fn who_was_overtaken_while_the_outcome_was_unknown_has_lost() -> Result<()> {
    let cluster = Cluster::start(1)?;
    let proxy = Proxy::start(cluster.client(0).into())?;
    let (ours, theirs) =
        (arbiter(&format!("etcd:{}/{KEY}", proxy.url()))?, arbiter(&cluster.arbiter(KEY))?);
    let vm = vm();
    proxy.judge(|path| if is_swap(path) { Act::LoseRequest } else { Act::Pass });
    assert!(ours.compare_and_swap(Generation(0), &solo(1, vm)).is_err());
    let winner = solo(1, vm);
    assert_eq!(theirs.compare_and_swap(Generation(0), &winner)?, Outcome::Won);
    assert_eq!(claim(&ours, 0, solo(1, vm)).0, Verdict::Lost(winner));
    Ok(())
}

#[test]
fn a_key_that_is_written_between_read_and_swap_refuses_it() -> Result<()> {
    let cluster = Cluster::start(1)?;
    let proxy = Proxy::start(cluster.client(0).into())?;
    let (ours, theirs) =
        (arbiter(&format!("etcd:{}/{KEY}", proxy.url()))?, arbiter(&cluster.arbiter(KEY))?);
    let vm = vm();
    let winner = solo(1, vm);
    proxy.judge(move |path| {
        if is_swap(path) {
            assert_eq!(theirs.compare_and_swap(Generation(0), &winner).unwrap(), Outcome::Won);
        }
        Act::Pass
    });
    let outcome = ours.compare_and_swap(Generation(0), &solo(1, vm))?;
    assert_eq!(outcome, Outcome::Lost(Some(winner)));
    // The same record by somebody's hand: no verdict, and nothing is written over it.
    let same = serde_json::to_vec(&winner)?;
    let server = cluster.client(0);
    let body = json!({"key": encoded(KEY.as_bytes()), "value": encoded(&same)}).to_string();
    proxy.judge(move |path| {
        if is_swap(path) {
            let put = request(server.into(), "POST", "/v3/kv/put", &[], &body).unwrap();
            assert_eq!(put.0, 200);
        }
        Act::Pass
    });
    let error = ours.compare_and_swap(Generation(1), &solo(2, vm)).unwrap_err();
    assert!(matches!(error, ArbiterError::Etcd(EtcdError::Rewritten(_))), "{error}");
    assert_eq!(ours.read()?, Some(winner));
    Ok(())
}
