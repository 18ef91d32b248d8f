//! The network between the hosts and their arbiter.

use anyhow::{Result, ensure};
use api::response::VmState;

use crate::row::{EACH, ETCD, ETCD_3, End, Expect, Row};
use crate::scene::{Scene, TIMEOUT};
use crate::world::Place::{self, A, B};

pub fn rows() -> Vec<Row> {
    let mut rows = between_the_hosts();
    rows.extend(with_the_arbiter());
    rows.extend(of_etcd());
    rows
}

fn between_the_hosts() -> Vec<Row> {
    vec![
        Row::new("cut", "A and B are cut apart, and healed later", Expect::AOrB, |scene| {
            scene.blow();
            scene.world.cut(A, B)?;
            one_wins(scene)
        })
        .with(EACH)
        .quick(),
        Row::new("cut-a-to-b", "Nothing of A reaches B; healed later", Expect::AOrB, |scene| {
            scene.blow();
            scene.world.cut_one_way(A, B)?;
            one_wins(scene)
        }),
        Row::new("cut-b-to-a", "Nothing of B reaches A; healed later", Expect::AOrB, |scene| {
            scene.blow();
            scene.world.cut_one_way(B, A)?;
            one_wins(scene)
        }),
        Row::new(
            "cut-short",
            "A and B are cut apart for a quarter of the time-out",
            Expect::Only(End::Pair),
            |scene| {
                scene.blow();
                scene.world.cut(A, B)?;
                std::thread::sleep(TIMEOUT / 4);
                scene.world.heal()?;
                scene.wait_settled()
            },
        ),
        Row::new(
            "cut-flapping",
            "A and B are cut apart and healed, ten times within two time-outs",
            Expect::PairOrOne,
            |scene| {
                scene.blow();
                for _ in 0..10 {
                    scene.world.cut(A, B)?;
                    std::thread::sleep(TIMEOUT / 10);
                    scene.world.heal()?;
                    std::thread::sleep(TIMEOUT / 10);
                }
                scene.wait_settled()
            },
        ),
        lossy(2, Expect::Only(End::Pair)),
        lossy(20, Expect::PairOrOne),
        slow("20mbit", "200ms", Expect::Only(End::Pair)),
        slow("1mbit", "50ms", Expect::PairOrOne),
    ]
}

pub(super) fn one_wins(scene: &mut Scene) -> Result<End> {
    let winner = scene.wait_winner()?;
    scene.wait_served()?;
    scene.world.heal()?;
    if winner == A {
        scene.wait_b_without_primary()?;
        return Ok(End::A);
    }
    Ok(End::B)
}

fn lossy(percent: u32, expect: Expect) -> Row {
    let what = format!("{percent} % of the packets between A and B are lost for two time-outs");
    Row::new(format!("loss-{percent}"), what, expect, move |scene| {
        scene.blow();
        scene.world.lose(percent)?;
        std::thread::sleep(2 * TIMEOUT);
        scene.world.heal()?;
        scene.wait_settled()
    })
}

fn slow(rate: &'static str, latency: &'static str, expect: Expect) -> Row {
    let what = format!(
        "The link between A and B takes {rate}/s for two time-outs, and queues for {latency}"
    );
    Row::new(format!("link-{rate}"), what, expect, move |scene| {
        scene.blow();
        scene.world.throttle(rate, latency)?;
        std::thread::sleep(2 * TIMEOUT);
        scene.world.hurry()?;
        scene.wait_settled()
    })
}

/// The engine of a VM that was ended while nobody could say whose it was lives on, and hears in the end.
fn late_verdict() -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.arbiter.cut(&scene.world, A)?;
        scene.world.cut(A, B)?;
        scene.wait_b_took_over()?;
        scene.wait_holds(A)?;
        let answer = scene.a.put("vm.delete", None)?;
        ensure!(answer.body.contains("its backup may run it"), "it says {}", answer.body);
        let config = serde_json::json!({
            "payload": {"kernel": guest_image::PATH, "cmdline": "workload=verify"},
            "memory": {"size": 32 << 20},
            "serial": {"mode": "Null"},
            "console": {"mode": "Off"},
        });
        scene.a.put_ok("vm.create", Some(&config.to_string()))?;
        scene.a.put_ok("vm.boot", None)?;
        heal(scene, A)?;
        scene.wait_event(A, &["replication-lost"])?;
        // What the verdict does is done once this is answered.
        let state = scene.a.vm_state()?;
        ensure!(state == VmState::Running, "the next VM of A is {state:?}");
        scene.a.kill()?;
        Ok(End::B)
    };
    let what = "A is cut off from both, and B has the VM; vm.delete on A answers that B may run it, and A runs \
                another VM: the verdict on the first is none on that";
    Row::new("isolate-a-next-vm", what, Expect::Only(End::B), act)
}

fn with_the_arbiter() -> Vec<Row> {
    let rows = vec![
        late_verdict(),
        Row::new(
            "isolate-a",
            "A is cut from B and the arbiter, and healed once B has the VM",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                scene.arbiter.cut(&scene.world, A)?;
                scene.world.cut(A, B)?;
                scene.wait_b_took_over()?;
                scene.wait_served()?;
                scene.wait_holds(A)?;
                heal(scene, A)?;
                Ok(End::B)
            },
        )
        .quick(),
        Row::new(
            "isolate-b",
            "B is cut from A and the arbiter, and healed once A goes on alone",
            Expect::Only(End::A),
            |scene| {
                scene.blow();
                scene.arbiter.cut(&scene.world, B)?;
                scene.world.cut(A, B)?;
                scene.wait_a_alone()?;
                scene.wait_served()?;
                scene.wait_holds(B)?;
                heal(scene, B)?;
                scene.wait_b_without_primary()?;
                Ok(End::A)
            },
        ),
        Row::new(
            "cut-all",
            "A, B and the arbiter are cut from each other: both hold; then the arbiter is back",
            Expect::AOrB,
            |scene| {
                scene.blow();
                scene.arbiter.cut(&scene.world, A)?;
                scene.arbiter.cut(&scene.world, B)?;
                scene.world.cut(A, B)?;
                scene.wait_holds(A)?;
                scene.wait_holds(B)?;
                scene.is_held()?;
                scene.arbiter.heal(&scene.world, A)?;
                scene.arbiter.heal(&scene.world, B)?;
                one_wins(scene)
            },
        )
        .quick(),
        Row::new(
            "arbiter-away",
            "Neither reaches the arbiter while the pair is well",
            Expect::Only(End::Pair),
            |scene| {
                scene.blow();
                scene.arbiter.cut(&scene.world, A)?;
                scene.arbiter.cut(&scene.world, B)?;
                let end = scene.wait_settled()?;
                scene.arbiter.heal(&scene.world, A)?;
                scene.arbiter.heal(&scene.world, B)?;
                Ok(end)
            },
        ),
        Row::new(
            "arbiter-away-kill-a",
            "B does not reach the arbiter, A is killed: B holds; then the arbiter is back",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                scene.arbiter.cut(&scene.world, B)?;
                scene.a.kill()?;
                scene.wait_holds(B)?;
                scene.is_held()?;
                scene.arbiter.heal(&scene.world, B)?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        ),
        Row::new(
            "arbiter-away-kill-b",
            "A does not reach the arbiter, B is killed: A holds; then the arbiter is back",
            Expect::Only(End::A),
            |scene| {
                scene.blow();
                scene.arbiter.cut(&scene.world, A)?;
                scene.b.kill()?;
                scene.wait_holds(A)?;
                scene.is_held()?;
                scene.arbiter.heal(&scene.world, A)?;
                scene.wait_a_alone()?;
                Ok(End::A)
            },
        ),
    ];
    rows.into_iter().map(|row| row.with(EACH)).collect()
}

fn of_etcd() -> Vec<Row> {
    vec![
        Row::new(
            "etcd-restart",
            "The only server of etcd is killed and started again, while the pair is well; then A is killed",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                let member = scene.arbiter.kill_leader(&scene.world)?;
                let end = scene.wait_settled()?;
                ensure!(end == End::Pair, "{end:?} goes on without its arbiter");
                scene.arbiter.restart(&scene.world, member)?;
                scene.a.kill()?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        )
        .with(ETCD),
        Row::new(
            "etcd-killed-kill-a",
            "The only server of etcd and A are killed: B holds; then the server is started again",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                let member = scene.arbiter.kill_leader(&scene.world)?;
                scene.a.kill()?;
                scene.wait_holds(B)?;
                scene.is_held()?;
                scene.arbiter.restart(&scene.world, member)?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        )
        .with(ETCD),
        Row::new(
            "etcd-leader-kill-a",
            "The member of etcd that leads is killed, and A",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                scene.arbiter.kill_leader(&scene.world)?;
                scene.a.kill()?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        )
        .with(ETCD_3),
        Row::new(
            "etcd-leader-cut",
            "The member of etcd that leads is killed, and A and B are cut apart",
            Expect::AOrB,
            |scene| {
                scene.blow();
                scene.world.cut(A, B)?;
                scene.arbiter.kill_leader(&scene.world)?;
                one_wins(scene)
            },
        )
        .with(ETCD_3),
        Row::new(
            "etcd-minority-kill-a",
            "Two of three members of etcd are killed, and A: B holds; then one is started again",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                let member = scene.arbiter.kill_leader(&scene.world)?;
                scene.arbiter.kill_leader(&scene.world)?;
                scene.a.kill()?;
                scene.wait_holds(B)?;
                scene.is_held()?;
                scene.arbiter.restart(&scene.world, member)?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        )
        .with(ETCD_3),
    ]
}

fn heal(scene: &mut Scene, place: Place) -> Result<()> {
    scene.arbiter.heal(&scene.world, place)?;
    scene.world.heal()
}
