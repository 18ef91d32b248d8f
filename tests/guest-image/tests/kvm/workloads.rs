//! The guest's workloads on a real `/dev/kvm`.

use crate::machine::{Ended, Machine};

fn run(vcpus: u64, memory_mib: u64, options: &str) -> Machine {
    let mut machine = Machine::start(vcpus, memory_mib, options);
    assert_eq!(machine.wait_for_end(), Ended::PowerOff, "{machine}");
    println!("{}", machine.lines.join("\n"));
    assert_eq!(machine.count(&format!("ready vcpus={vcpus}")), 1, "{machine}");
    machine
}

#[test]
fn count_never_skips() {
    let machine = run(2, 128, "workload=count ticks=5 tick_ms=20");
    let ticks: Vec<&str> = machine
        .lines
        .iter()
        .filter_map(|line| line.strip_prefix("tick "))
        .map(|rest| rest.split(' ').next().unwrap())
        .collect();
    assert_eq!(ticks, ["1", "2", "3", "4", "5"]);
    assert_eq!(machine.lines.last().unwrap(), "stopped ticks=5");
}

#[test]
fn verify_fills_and_confirms_all_memory() {
    for vcpus in [1, 2, 4] {
        let mut machine = Machine::start(vcpus, 256, "workload=verify");
        machine.wait_for("verify filled");
        machine.wait_for("verify ok");
        machine.type_in("q");
        assert_eq!(machine.wait_for_end(), Ended::PowerOff, "{machine}");
        println!("{}", machine.lines.join("\n"));
        assert_eq!(machine.count("VERIFY FAILED"), 0, "{machine}");
        assert!(machine.lines.last().unwrap().starts_with("VERDICT ok pages="), "{machine}");
    }
}

#[test]
fn verify_flat_out() {
    for vcpus in [1, 2, 4] {
        let machine = run(vcpus, 512, "workload=verify ticks=10 verify_rate=0 verify_mib=128");
        let verdict = format!("VERDICT ok pages={}", 128 * 256);
        assert_eq!(machine.lines.last().unwrap(), &verdict, "{machine}");
    }
}

#[test]
fn memory_above_the_hole_is_verified() {
    let machine = run(2, 4096, "workload=verify ticks=3 verify_mib=64");
    assert_eq!(machine.lines.last().unwrap(), "VERDICT ok pages=16384", "{machine}");
}

#[test]
fn dirty_in_every_order() {
    for vcpus in [1, 2, 4] {
        for order in ["seq", "random", "hot"] {
            for rate in [0, 5000] {
                let options = format!(
                    "workload=dirty dirty_pages={rate} dirty_order={order} dirty_mib=64 ticks=5 \
                     tick_ms=30"
                );
                let machine = run(vcpus, 512, &options);
                assert_eq!(machine.count("dirty pages="), 5, "{machine}");
                assert_eq!(machine.lines.last().unwrap(), "stopped ticks=5");
            }
        }
    }
}

#[test]
fn a_set_is_filled_once_and_rewritten_in_rounds() {
    for vcpus in [1, 2, 4] {
        for fill in ["set", "all"] {
            let options = format!(
                "workload=dirty dirty_set=1001 dirty_run=8 dirty_period_ms=10 dirty_bytes=64 \
                 dirty_mib=16 dirty_fill={fill}"
            );
            let filled = if fill == "set" { 1001 } else { 16 * 256 };
            let mut machine = Machine::start(vcpus, 512, &options);
            machine.wait_for(&format!("dirty filled pages={filled}"));
            machine.wait_for("dirty pages=");
            machine.type_in("q");
            assert_eq!(machine.wait_for_end(), Ended::PowerOff, "{machine}");
            assert_eq!(machine.count("dirty filled"), 1, "{machine}");
            assert!(machine.lines.last().unwrap().starts_with("stopped"), "{machine}");
        }
    }
}

#[test]
fn compute_gets_its_sums_right() {
    for vcpus in [1, 2, 4] {
        let machine = run(vcpus, 512, "workload=compute ticks=5");
        assert_eq!(machine.count("compute ops="), 5, "{machine}");
        assert_eq!(machine.lines.last().unwrap(), "VERDICT ok pages=0", "{machine}");
    }
}

#[test]
fn idle_and_waiting_without_halt() {
    let machine = run(4, 128, "workload=idle ticks=3 tick_ms=10");
    assert_eq!(machine.count("idle tick="), 3, "{machine}");
    let machine = run(2, 128, "workload=verify+dirty+compute+count wait=spin ticks=3 verify_mib=8");
    for start in ["tick 3", "verify ok", "dirty pages", "compute ops", "VERDICT ok pages=2048"] {
        assert!(machine.count(start) > 0, "{start}: {machine}");
    }
}

#[test]
fn guest_ends_as_it_is_told() {
    for (end, expected) in [("reset", Ended::Reset), ("triple", Ended::Shutdown)] {
        let mut machine = Machine::start(2, 128, &format!("ticks=1 tick_ms=1 end={end}"));
        assert_eq!(machine.wait_for_end(), expected, "{machine}");
    }
}

#[test]
fn a_command_line_that_says_nothing_sensible_is_refused() {
    let mut machine = Machine::start(1, 128, "workload=count tics=5");
    assert_eq!(machine.wait_for_end(), Ended::PowerOff, "{machine}");
    assert_eq!(machine.lines, ["ERROR Unknown key 'tics'"]);
}

#[test]
fn many_vcpus() {
    let machine = run(33, 256, "workload=verify verify_mib=16 ticks=3");
    assert_eq!(machine.lines.last().unwrap(), "VERDICT ok pages=4096", "{machine}");
}
