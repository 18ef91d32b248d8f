//! What any arbiter promises, as in `file_tests.rs`.

use std::sync::Barrier;

use super::*;

#[test]
fn a_swap_needs_the_generation_that_stands() -> Result<()> {
    let cluster = Cluster::start(1)?;
    let arbiter = arbiter(&cluster.arbiter(KEY))?;
    let vm = vm();
    assert_eq!(arbiter.read()?, None);
    let first = solo(1, vm);
    assert_eq!(arbiter.compare_and_swap(Generation(0), &first)?, Outcome::Won);
    let late = solo(1, vm);
    assert_eq!(arbiter.compare_and_swap(Generation(0), &late)?, Outcome::Lost(Some(first)));
    let second = solo(2, vm);
    assert_eq!(arbiter.compare_and_swap(Generation(1), &second)?, Outcome::Won);
    assert_eq!(arbiter.read()?, Some(second));
    // Once more, after an answer that got lost: won, and nothing is written.
    assert_eq!(arbiter.compare_and_swap(Generation(1), &second)?, Outcome::Won);
    assert_eq!(writes(&cluster)?, 2);
    Ok(())
}

#[test]
fn a_record_that_is_gone_or_older_is_no_answer() -> Result<()> {
    let cluster = Cluster::start(1)?;
    let arbiter = arbiter(&cluster.arbiter(KEY))?;
    let vm = vm();
    let ahead = solo(3, vm);
    let vanished = |error| matches!(error, ArbiterError::Vanished(Generation(2)));
    assert!(vanished(arbiter.compare_and_swap(Generation(2), &ahead).unwrap_err()));
    assert_eq!(arbiter.read()?, None);
    let first = solo(1, vm);
    arbiter.compare_and_swap(Generation(0), &first)?;
    assert!(vanished(arbiter.compare_and_swap(Generation(2), &ahead).unwrap_err()));
    assert_eq!(arbiter.read()?, Some(first));
    Ok(())
}

#[test]
fn of_many_at_once_one_wins() -> Result<()> {
    let cluster = Cluster::start(3)?;
    let vm = vm();
    // Each asker begins with another server, as two hosts may.
    let urls: Vec<String> = (0..4)
        .map(|asker| {
            let urls: Vec<_> = (0..3).map(|turn| cluster.url((asker + turn) % 3)).collect();
            format!("etcd:{}/{KEY}", urls.join(","))
        })
        .collect();
    for generation in 0..25 {
        let start = Barrier::new(urls.len());
        let ask = |url: &str| {
            let arbiter = arbiter(url).unwrap();
            let next = solo(generation + 1, vm);
            start.wait();
            (next, arbiter.compare_and_swap(Generation(generation), &next).unwrap())
        };
        let outcomes: Vec<(Record, Outcome)> = std::thread::scope(|scope| {
            let ask = &ask;
            let askers: Vec<_> = urls.iter().map(|url| scope.spawn(move || ask(url))).collect();
            askers.into_iter().map(|asker| asker.join().unwrap()).collect()
        });
        let won = outcomes.iter().filter(|(_, outcome)| *outcome == Outcome::Won);
        let won: Vec<Record> = won.map(|(next, _)| *next).collect();
        let [winner] = won[..] else { panic!("{} winners", won.len()) };
        for (next, outcome) in outcomes {
            assert!(next == winner || outcome == Outcome::Lost(Some(winner)), "{outcome:?}");
        }
        assert_eq!(arbiter(&urls[0])?.read()?, Some(winner));
    }
    Ok(())
}

#[test]
fn damage_is_told_apart_from_absence() -> Result<()> {
    let cluster = Cluster::start(1)?;
    let arbiter = arbiter(&cluster.arbiter(KEY))?;
    let next = solo(2, vm());
    let last = serde_json::to_vec(&solo(u64::MAX, next.vm))?;
    let none = serde_json::to_vec(&solo(0, next.vm))?;
    for damage in [&b""[..], b"{", b"{\"generation\":2}", b"\xff\0", &last, &none] {
        put(&cluster, damage)?;
        let error = arbiter.read().unwrap_err();
        let is_damage = matches!(&error, ArbiterError::Etcd(EtcdError::Damaged { .. }));
        assert!(is_damage && error.to_string().contains("\"vm1\""), "{error}");
        assert!(arbiter.compare_and_swap(Generation(1), &next).is_err());
        assert!(arbiter.compare_and_swap(Generation(0), &solo(1, next.vm)).is_err());
    }
    assert_eq!(writes(&cluster)?, 6);
    Ok(())
}

#[test]
fn each_vm_has_a_key() -> Result<()> {
    let cluster = Cluster::start(1)?;
    let (first, other) = (arbiter(&cluster.arbiter(KEY))?, arbiter(&cluster.arbiter("ha/vm2"))?);
    let (ours, theirs) = (solo(1, vm()), solo(1, vm()));
    assert_eq!(first.compare_and_swap(Generation(0), &ours)?, Outcome::Won);
    assert_eq!(other.compare_and_swap(Generation(0), &theirs)?, Outcome::Won);
    assert_eq!((first.read()?, other.read()?), (Some(ours), Some(theirs)));
    // Not even with the generation that stands.
    let error = first.compare_and_swap(Generation(1), &solo(2, theirs.vm)).unwrap_err();
    assert!(matches!(error, ArbiterError::Etcd(EtcdError::OtherVm { .. })), "{error}");
    assert_eq!(first.read()?, Some(ours));
    Ok(())
}
