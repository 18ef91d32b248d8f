//! Servers that die, hang, come back, or belong to somebody else.

use std::time::{Duration, Instant};

use super::*;
use crate::ownership::etcd::http::CALL_LIMIT;

/// Longer than three servers may take that do not answer; a read without end fails the test.
const BOUND: Duration = Duration::from_secs(30);

#[test]
fn a_member_less_is_no_matter() -> Result<()> {
    for of_leader in [false, true] {
        let mut cluster = Cluster::start(3)?;
        let arbiter = arbiter(&cluster.arbiter(KEY))?;
        let vm = vm();
        assert_eq!(claim(&arbiter, 0, solo(1, vm)).0, Verdict::Owned(Generation(1)));
        let leader = cluster.leader()?;
        let victim = if of_leader { leader } else { (leader + 1) % 3 };
        // The server that is asked first, whoever leads.
        arbiter.client.begin_with(victim);
        cluster.kill(victim)?;
        let second = solo(2, vm);
        assert_eq!(claim(&arbiter, 1, second).0, Verdict::Owned(Generation(2)));
        cluster.restart(victim)?;
        cluster.wait_serving()?;
        // Alone, it says what the others agreed upon.
        let alone = super::arbiter(&format!("etcd:{}/{KEY}", cluster.url(victim)))?;
        assert_eq!(alone.read()?, Some(second));
    }
    Ok(())
}

/// A follower, so that no election is waited for.
#[test]
fn a_server_that_hangs_is_not_waited_for() -> Result<()> {
    let mut cluster = Cluster::start(3)?;
    let arbiter = arbiter(&cluster.arbiter(KEY))?;
    let follower = (cluster.leader()? + 1) % 3;
    arbiter.client.begin_with(follower);
    cluster.freeze(follower)?;
    let asked = Instant::now();
    let first = solo(1, vm());
    assert_eq!(claim(&arbiter, 0, first), (Verdict::Owned(Generation(1)), 0));
    // Long before its own call ends.
    assert!(asked.elapsed() < CALL_LIMIT, "{:?}", asked.elapsed());
    cluster.thaw(follower)?;
    cluster.wait_serving()?;
    arbiter.client.begin_with(follower);
    assert_eq!(arbiter.read()?, Some(first));
    Ok(())
}

#[test]
fn a_leader_that_hangs_costs_an_election() -> Result<()> {
    let mut cluster = Cluster::start(3)?;
    let arbiter = arbiter(&cluster.arbiter(KEY))?;
    let leader = cluster.leader()?;
    arbiter.client.begin_with(leader);
    cluster.freeze(leader)?;
    let asked = Instant::now();
    let first = solo(1, vm());
    assert_eq!(claim(&arbiter, 0, first).0, Verdict::Owned(Generation(1)));
    assert!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
    cluster.thaw(leader)?;
    cluster.wait_serving()?;
    arbiter.client.begin_with(leader);
    assert_eq!(arbiter.read()?, Some(first));
    Ok(())
}

#[test]
fn without_a_majority_nothing_is_decided() -> Result<()> {
    let mut cluster = Cluster::start(3)?;
    let arbiter = arbiter(&cluster.arbiter(KEY))?;
    let vm = vm();
    let first = solo(1, vm);
    arbiter.compare_and_swap(Generation(0), &first)?;
    cluster.kill(0)?;
    cluster.kill(1)?;
    let asked = Instant::now();
    let error = arbiter.read().unwrap_err();
    assert!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
    let ArbiterError::Etcd(EtcdError::NoAnswer(failures)) = &error else { panic!("{error}") };
    assert_eq!(failures.len(), 3);
    for member in 0..3 {
        assert!(error.to_string().contains(&cluster.url(member)), "{error}");
    }
    assert!(arbiter.compare_and_swap(Generation(1), &solo(2, vm)).is_err());
    cluster.restart(0)?;
    cluster.restart(1)?;
    cluster.wait_serving()?;
    // Nothing that failed took place behind our back, and what was agreed upon is there.
    assert_eq!(arbiter.read()?, Some(first));
    assert_eq!(claim(&arbiter, 1, solo(2, vm)).0, Verdict::Owned(Generation(2)));
    Ok(())
}

#[test]
fn servers_of_another_cluster_are_not_asked() -> Result<()> {
    let (mut ours, theirs) = (Cluster::start(1)?, Cluster::start(1)?);
    let arbiter = arbiter(&format!("etcd:{},{}/{KEY}", ours.url(0), theirs.url(0)))?;
    let vm = vm();
    assert_eq!(arbiter.compare_and_swap(Generation(0), &solo(1, vm))?, Outcome::Won);
    ours.kill(0)?;
    // It would say that there is no record.
    let error = arbiter.read().unwrap_err().to_string();
    assert!(error.contains("belongs to cluster"), "{error}");
    assert!(arbiter.compare_and_swap(Generation(1), &solo(2, vm)).is_err());
    let alone = super::arbiter(&theirs.arbiter(KEY))?;
    assert_eq!(alone.read()?, None);
    ours.restart(0)?;
    ours.wait_serving()?;
    assert_eq!(claim(&arbiter, 1, solo(2, vm)).0, Verdict::Owned(Generation(2)));
    Ok(())
}

#[test]
fn a_cluster_that_lost_its_history_is_not_asked() -> Result<()> {
    let mut cluster = Cluster::start(1)?;
    let arbiter = arbiter(&cluster.arbiter(KEY))?;
    let vm = vm();
    // As many changes as the cluster will have once it was made anew, and more.
    for generation in 0..4 {
        let next = solo(generation + 1, vm);
        assert_eq!(arbiter.compare_and_swap(Generation(generation), &next)?, Outcome::Won);
    }
    cluster.kill(0)?;
    std::fs::remove_dir_all(cluster.folder().join("m0"))?;
    cluster.restart(0)?;
    cluster.wait_serving()?;
    // It has the same name, since it was made with the same words.
    let error = arbiter.read().unwrap_err().to_string();
    assert!(error.contains("the cluster was at 5 before"), "{error}");
    assert!(arbiter.compare_and_swap(Generation(4), &solo(5, vm)).is_err());
    assert_eq!(super::arbiter(&cluster.arbiter(KEY))?.read()?, None);
    Ok(())
}
