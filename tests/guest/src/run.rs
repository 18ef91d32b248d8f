//! The loop that every processor is in, and the end of it.
//!
//! ```text
//! RUN ──(ticks are over, or `q`)──> CHECK ──> CROSS ──> DONE: verdict, power-off
//! ```
//!
//! The first processor sets the phase; it goes on only when every processor has done its part of
//! the last one. CHECK: nobody writes any more, each processor checks its own pages. CROSS: each
//! checks its neighbour's.

use core::sync::atomic::Ordering;

use guest_logic::cmdline::End;
use guest_logic::machine::VCPUS_MAX;
use guest_logic::standstill::Standstill;
use guest_logic::typed::Typed;

use crate::serial::{received, say};
use crate::shared::{self, Shared};
use crate::workload::kv::NotStarted;
use crate::workload::{Compute, Dirty, Kv, Verify};
use crate::world::World;
use crate::{boot, lapic, port};

const RUN: u32 = 0;
const CHECK: u32 = 1;
const CROSS: u32 = 2;
const DONE: u32 = 3;

const MS: u64 = 1_000_000;
/// A processor looks up this often, whatever it waits for.
const NAP_NS: u64 = 20 * MS;
/// The first processor more often, so that it sees when it stood still.
const FIRST_NAP_NS: u64 = MS;
/// Ticks, and at least so much time, after which a processor that does not move is reported.
const SILENT_TICKS_MIN: u64 = 10;
const SILENT_MS: u64 = 5_000;
/// Looks of 1 ms at the end.
const SILENT_LOOKS: u64 = 5_000;

/// One processor's work.
struct Cpu {
    world: &'static World,
    shared: &'static Shared,
    verify: Option<Verify>,
    dirty: Option<Dirty>,
    compute: Option<Compute>,
    /// Of the first processor only.
    kv: Option<Kv>,
    standstill: Standstill,
}

impl Cpu {
    fn new(world: &'static World, index: u32) -> Self {
        let workloads = world.config.workloads;
        Self {
            world,
            shared: shared::of(index),
            verify: workloads.verify.then(|| Verify::new(world, index)),
            dirty: workloads.dirty.then(|| Dirty::new(world, index)),
            compute: workloads.compute.then(|| Compute::new(world, index)),
            kv: (workloads.kv && index == 0).then(|| start_kv(world)),
            standstill: Standstill::new(world.clock.now_ns()),
        }
    }

    /// One bounded piece of each workload; when the next one is due.
    fn step(&mut self) -> u64 {
        let mut due_ns = u64::MAX;
        let clock = &self.world.clock;
        if let Some(verify) = &mut self.verify {
            due_ns = due_ns.min(verify.step(clock.now_ns()));
            self.standstill.worked(clock.now_ns());
        }
        if let Some(dirty) = &mut self.dirty {
            due_ns = due_ns.min(dirty.step(clock.now_ns()));
            self.standstill.worked(clock.now_ns());
        }
        if let Some(compute) = &mut self.compute {
            compute.step();
            due_ns = 0;
            self.standstill.worked(clock.now_ns());
        }
        if let Some(kv) = &mut self.kv {
            due_ns = due_ns.min(kv.step(clock.now_ns()));
            self.standstill.worked(clock.now_ns());
        }
        self.shared.beat();
        due_ns
    }

    fn nap(&mut self, until_ns: u64) {
        let clock = &self.world.clock;
        if until_ns > clock.now_ns() {
            lapic::wait_until(clock, self.world.config.wait, until_ns);
            self.standstill.waited(until_ns, clock.now_ns());
        }
    }

    /// This processor's part of a phase of the end.
    fn finish(&mut self, phase: u32) {
        match &mut self.verify {
            Some(verify) if phase == CHECK => verify.check_own(),
            Some(verify) if phase == CROSS => verify.check_neighbour(),
            _ => {}
        }
        self.shared.beat();
        self.shared.phase.store(phase, Ordering::Release);
    }
}

fn start_kv(world: &'static World) -> Kv {
    Kv::start(world).unwrap_or_else(|NotStarted { what, why }| {
        say!("ERROR the {what} {why}");
        port::power_off();
    })
}

/// Every processor that takes part ends up here.
pub fn run(world: &'static World, index: u32) -> ! {
    let mut cpu = Cpu::new(world, index);
    if index == 0 {
        run_first(&mut cpu);
    }
    let mut done = RUN;
    loop {
        let phase = world.phase.load(Ordering::Acquire);
        let mut due_ns = u64::MAX;
        match phase {
            RUN => due_ns = cpu.step(),
            DONE => boot::park(),
            _ if phase != done => {
                cpu.finish(phase);
                done = phase;
            }
            _ => cpu.shared.beat(),
        }
        let now_ns = world.clock.now_ns();
        cpu.nap(due_ns.min(now_ns + NAP_NS));
    }
}

/// The first processor also reports, listens, and ends it all.
fn run_first(cpu: &mut Cpu) -> ! {
    let world = cpu.world;
    let tick_ns = world.config.tick_ms * MS;
    let mut reporter = Reporter::new(world);
    let mut typed = Typed::new();
    let mut next_ns = world.clock.now_ns() + tick_ns;
    loop {
        let due_ns = cpu.step();
        if cpu.kv.as_ref().is_some_and(|kv| kv.has_stopped()) {
            end(cpu, &reporter);
        }
        let now_ns = world.clock.now_ns();
        if now_ns >= next_ns {
            // Where the machine stood still for long, the ticks missed are not made up for.
            next_ns = (next_ns + tick_ns).max(now_ns);
            reporter.report(cpu);
            if reporter.tick == world.config.ticks || asked_to_end(&mut typed) {
                match &mut cpu.kv {
                    // What it has begun it brings to an end first.
                    Some(kv) => kv.stop(),
                    None => end(cpu, &reporter),
                }
            }
            cpu.standstill.skip(world.clock.now_ns());
        }
        let idle_nap_ns = world.config.nap_ms * MS;
        let nap_ns = if world.config.workloads.is_idle() { idle_nap_ns } else { FIRST_NAP_NS };
        cpu.nap(due_ns.min(next_ns).min(now_ns + nap_ns));
    }
}

fn asked_to_end(typed: &mut Typed) -> bool {
    // A bound, so that a sender who never stops does not stop the ticks.
    (0..64).map_while(|_| received()).any(|byte| typed.byte(byte))
}

/// Prints a tick's lines and notices processors that do not move.
struct Reporter {
    world: &'static World,
    tick: u64,
    last_dirtied: u64,
    last_operations: u64,
    last_ns: u64,
    heartbeats: [u64; VCPUS_MAX as usize],
    still_ticks: [u64; VCPUS_MAX as usize],
    silent: u64,
    filled: bool,
    dirty_filled: bool,
}

impl Reporter {
    fn new(world: &'static World) -> Self {
        Self {
            world,
            tick: 0,
            last_dirtied: 0,
            last_operations: 0,
            last_ns: world.clock.now_ns(),
            heartbeats: [0; VCPUS_MAX as usize],
            still_ticks: [0; VCPUS_MAX as usize],
            silent: 0,
            filled: false,
            dirty_filled: false,
        }
    }

    fn report(&mut self, cpu: &mut Cpu) {
        self.tick += 1;
        let now_ns = self.world.clock.now_ns();
        let elapsed_us = (now_ns.saturating_sub(self.last_ns) / 1000).max(1);
        self.last_ns = now_ns;
        let workloads = self.world.config.workloads;
        let tick = self.tick;
        if workloads.count {
            say!("tick {tick} tsc_ms {}", now_ns / MS);
        }
        if workloads.verify {
            self.report_verify();
        }
        if workloads.dirty {
            self.report_dirty(elapsed_us);
        }
        if workloads.compute {
            self.report_compute();
        }
        if let Some(kv) = &cpu.kv {
            kv.report();
        }
        if workloads.is_idle() {
            say!("idle tick={tick}");
        } else if !workloads.is_only_kv() {
            let standstill = cpu.standstill.report();
            let (max_us, over) = (standstill.max_us, standstill.over_1ms);
            say!("standstill_us max={max_us} count>1ms={over}");
        }
        self.watch();
    }

    fn report_verify(&mut self) {
        let all = shared::first(self.world.participants);
        let filled = shared::sum(all, |shared| &shared.filled);
        if !self.filled && filled == self.world.verify.pages() {
            self.filled = true;
            say!("verify filled pages={filled}");
        }
        let visits = shared::sum(all, |shared| &shared.visits);
        let failures = shared::sum(all, |shared| &shared.failures);
        let least = |counter: fn(&Shared) -> &_| {
            let values = all.iter().map(|shared| {
                core::sync::atomic::AtomicU64::load(counter(shared), Ordering::Acquire)
            });
            values.min().unwrap_or(0)
        };
        let generation_min = least(|shared| &shared.generation_min);
        let passes = least(|shared| &shared.passes);
        let word = if failures == 0 { "ok" } else { "FAILING" };
        say!(
            "verify {word} pages={visits} gen_min={generation_min} passes={passes} \
             failures={failures} tick={}",
            self.tick
        );
    }

    fn report_dirty(&mut self, elapsed_us: u64) {
        let all = shared::first(self.world.participants);
        let filled = shared::sum(all, |shared| &shared.dirty_filled);
        if !self.dirty_filled && Some(filled) == Dirty::to_fill(self.world) {
            self.dirty_filled = true;
            say!("dirty filled pages={filled}");
        }
        let total = shared::sum(all, |shared| &shared.dirtied);
        let pages = total - self.last_dirtied;
        self.last_dirtied = total;
        let rate = pages * 1_000_000 / elapsed_us;
        say!("dirty pages={pages} per_s={rate} total={total} tick={}", self.tick);
    }

    fn report_compute(&mut self) {
        let all = shared::first(self.world.participants);
        let total = shared::sum(all, |shared| &shared.operations);
        let operations = total - self.last_operations;
        self.last_operations = total;
        let failures = shared::sum(all, |shared| &shared.failures);
        let average = total / u64::from(self.world.participants);
        let least = all.iter().map(|shared| shared.operations.load(Ordering::Acquire)).min();
        say!(
            "compute ops={operations} total={total} vcpu_avg={average} vcpu_min={} avx={} \
             failures={failures} tick={}",
            least.unwrap_or(0),
            u8::from(self.world.avx2),
            self.tick
        );
    }

    fn watch(&mut self) {
        let limit = (SILENT_MS / self.world.config.tick_ms).max(SILENT_TICKS_MIN);
        let all = shared::first(self.world.participants);
        for (index, shared) in all.iter().enumerate().skip(1) {
            let heartbeat = shared.heartbeat.load(Ordering::Acquire);
            if heartbeat != self.heartbeats[index] {
                self.heartbeats[index] = heartbeat;
                self.still_ticks[index] = 0;
                continue;
            }
            self.still_ticks[index] += 1;
            if self.still_ticks[index] == limit {
                self.silent += 1;
                say!("ERROR vCPU {index} has not moved for {limit} ticks");
            }
        }
    }
}

/// The first processor's way through the phases.
fn end(cpu: &mut Cpu, reporter: &Reporter) -> ! {
    let world = cpu.world;
    let mut silent = reporter.silent;
    for phase in [CHECK, CROSS] {
        world.phase.store(phase, Ordering::Release);
        cpu.finish(phase);
        silent += await_phase(world, phase);
    }
    world.phase.store(DONE, Ordering::Release);
    let workloads = world.config.workloads;
    let all = shared::first(world.participants);
    let mut failures = silent + shared::sum(all, |shared| &shared.failures);
    let confirmed = shared::sum(all, |shared| &shared.confirmed);
    if confirmed != world.verify.pages() && workloads.verify {
        failures = failures.max(1);
    }
    if !workloads.verify && !workloads.compute {
        say!("stopped ticks={}", reporter.tick);
    } else if failures > 0 {
        say!("VERDICT failed n={failures}");
    } else {
        say!("VERDICT ok pages={confirmed}");
    }
    match world.config.end {
        End::PowerOff => port::power_off(),
        End::Reset => port::reset(),
        End::TripleFault => boot::triple_fault(),
    }
}

/// Waits until every processor has done the phase; how many never did.
fn await_phase(world: &World, phase: u32) -> u64 {
    let mut silent = 0;
    let others = shared::first(world.participants).iter().enumerate().skip(1);
    for (index, shared) in others {
        if shared.phase.load(Ordering::Acquire) + 1 < phase {
            // It did not do the phase before either, and has been counted.
            continue;
        }
        let (mut looks, mut heartbeat) = (0, 0);
        while shared.phase.load(Ordering::Acquire) < phase {
            let now = shared.heartbeat.load(Ordering::Acquire);
            looks = if now == heartbeat { looks + 1 } else { 0 };
            heartbeat = now;
            if looks == SILENT_LOOKS {
                say!("ERROR vCPU {index} did not check its pages");
                silent += 1;
                break;
            }
            let until_ns = world.clock.now_ns() + MS;
            lapic::wait_until(&world.clock, world.config.wait, until_ns);
        }
    }
    silent
}
