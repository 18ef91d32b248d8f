//! Which pages of a group are cheaper copied during the pause, and which protected.
//!
//! Protecting costs a system call a run and little a page, and a fault of the guest for each page
//! that it writes before a sender took it; copying costs the same for each page. Nothing is assumed
//! of the machine: the costs are measured on memory of the same kind when protection begins, and
//! corrected by what each pause took, and each fault. A page's heat is the chance, in 256ths, that it is written
//! while it is protected, learnt from what became of it before.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use userfault::Userfault;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::{CowError, Page};
use crate::ids::PAGE_SIZE;
use crate::ram::PageBuffer;

/// Times in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Costs {
    /// Of a protecting system call, whatever its length.
    pub(super) call: f64,
    /// Of each page that it protects.
    pub(super) protect: f64,
    /// Of copying a page.
    pub(super) copy: f64,
    /// Of a page's copy where the room for it has to come from the host first.
    pub(super) touch: f64,
    /// Of a write to a protected page, until it goes on.
    pub(super) fault: f64,
    /// The part of that in which the handler serves it. The rest, two wake-ups, nobody sees but the
    /// writer.
    pub(super) serve: f64,
}

/// What a pause copied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copying {
    pub(super) pages: u32,
    /// Those of them for which the room had to come from the host.
    pub(super) touched: u32,
    pub(super) took: Duration,
}

/// Mean of past and present, within bounds: one pause that was interrupted says little.
fn learn(cost: f64, seen: f64) -> f64 {
    INERTIA * cost + (1.0 - INERTIA) * seen.clamp(cost / 4.0, cost * 4.0)
}

fn nanos(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

/// What a heat of all ones stands for.
const HEAT_WHOLE: f64 = 256.0;
/// Share of the past in a corrected cost.
const INERTIA: f64 = 15.0 / 16.0;

/// What becomes of a cost with each pause that says nothing of it.
const FADE: f64 = 0.995;
/// No cost fades below this: nothing is for free on any machine.
const LEAST_NS: f64 = 20.0;

/// After a fault: at once at least every other time, and from then on nearer to always.
pub(super) fn heat_up(heat: &AtomicU8) {
    let old = heat.load(Ordering::Relaxed);
    heat.store(old + (255 - old).div_ceil(2), Ordering::Relaxed);
}

/// After a time under protection without a fault.
pub(super) fn cool(heat: &AtomicU8) {
    let old = heat.load(Ordering::Relaxed);
    if old > 0 {
        heat.store(old - old.div_ceil(4), Ordering::Relaxed);
    }
}

/// After a copy that the heat asked for: nobody knows whether it was needed, so that it is tried
/// without, after some hundred epochs.
pub(super) fn fade(heat: &AtomicU8) {
    let old = heat.load(Ordering::Relaxed);
    heat.store(old.saturating_sub(1), Ordering::Relaxed);
}

impl Costs {
    /// The pages of one group to protect, of those in `free`; pages in between that need not be are
    /// among them where that saves a call. `continues`: the page before the group is protected by
    /// a call that may go on. `room`: pages that can be copied without asking the host.
    ///
    /// The cheapest of all ways, found page by page: the cheapest way to here that ends with a
    /// protected page, and the cheapest that does not.
    pub(super) fn choose(&self, free: u64, heat: &[AtomicU8], continues: bool, room: usize) -> u64 {
        let copy = if room >= 64 { self.copy } else { self.copy + self.touch };
        let (first, end) = (free.trailing_zeros(), 64 - free.leading_zeros());
        let mut open = (if continues { 0.0 } else { self.call }, 0_u64);
        let mut shut = (0.0_f64, 0_u64);
        let first = if continues { 0 } else { first };
        for (at, heat) in (0..end).zip(heat).skip(first as usize) {
            let chance = f64::from(heat.load(Ordering::Relaxed)) / HEAT_WHOLE;
            let bit = 1_u64 << at;
            let begun = (shut.0 + self.call, shut.1);
            let before = if begun.0 < open.0 { begun } else { open };
            let least = if open.0 < shut.0 { open } else { shut };
            let copied = if free & bit == 0 { 0.0 } else { copy };
            open = (before.0 + self.protect + chance * self.fault, before.1 | bit);
            shut = (least.0 + copied, least.1);
        }
        let plan = if open.0 < shut.0 { open.1 } else { shut.1 };
        // What follows the last page that is needed was protected for nothing.
        match plan & free {
            0 => 0,
            needed => plan & (u64::MAX >> needed.leading_zeros()),
        }
    }

    /// Learns from a pause: `calls` that protected `pages`, and copies.
    pub(super) fn correct(&mut self, (calls, pages, took): (u32, u32, Duration), copied: Copying) {
        let copies = copied.pages;
        // What was not tried seems a little cheaper each time, until it is tried again: a cost that
        // was measured while the machine was busy is not believed for ever.
        if calls == 0 && copies > 0 {
            self.call = (self.call * FADE).max(LEAST_NS);
            self.protect = (self.protect * FADE).max(LEAST_NS);
        }
        if copies == 0 && calls > 0 {
            self.copy = (self.copy * FADE).max(LEAST_NS);
        }
        if calls > 0 {
            let expected = self.call * f64::from(calls) + self.protect * f64::from(pages);
            let scale = learn(1.0, nanos(took) / expected);
            self.call *= scale;
            self.protect *= scale;
        }
        let (took, pages) = (nanos(copied.took), f64::from(copies));
        if copied.touched >= 16 {
            let touching = (took - pages * self.copy).max(0.0);
            self.touch = learn(self.touch.max(LEAST_NS), touching / f64::from(copied.touched));
        } else if copied.touched == 0 && copies >= 16 {
            self.copy = learn(self.copy, took / pages);
        }
    }

    /// Learns from `faults` that were served, in `serving` together.
    pub(super) fn correct_faults(&mut self, faults: u32, serving: Duration) {
        if faults > 0 {
            let serve = learn(self.serve, nanos(serving) / f64::from(faults));
            self.fault += serve - self.serve;
            self.serve = serve;
        }
    }

    /// Measures on a small memory of the kind that guests have. Some milliseconds.
    pub(super) fn measure() -> Result<Self, CowError> {
        let memory = scratch_memory().map_err(CowError::Measure)?;
        let userfault = Userfault::new(Arc::clone(&memory)).map_err(CowError::Protect)?;
        let (single, run) = protections(&userfault).map_err(CowError::Protect)?;
        // 63 pages more cost the difference.
        let protect = (run - single).max(1.0) / 63.0;
        // Memory that is there once it is written, as that of a buffer that has to grow.
        let mut fresh = vec![[0; PAGE_SIZE]; SCRATCH_PAGES];
        let touched = copies(&memory, &mut fresh).map_err(CowError::Measure)?;
        let mut room = PageBuffer::touched(SCRATCH_PAGES);
        let pages = &mut room.all_mut()[..SCRATCH_PAGES];
        let copy = copies(&memory, pages).map_err(CowError::Measure)?;
        let (fault, serve) = faults(&memory, &userfault)?;
        let touch = (touched - copy).max(0.0);
        // A fault lasts longer than it is served, whatever the clock says.
        let (serve, call) = (serve.max(LEAST_NS), (single - protect).max(1.0));
        Ok(Self { call, protect, copy, touch, fault: fault.max(serve), serve })
    }
}

/// Pages of the memory that is measured on: more than a processor's second cache holds.
const SCRATCH_PAGES: usize = 1024;
/// Faults that are measured.
const FAULTS: u64 = 32;

type Memory = GuestMemoryMmap<()>;

fn scratch_memory() -> io::Result<Arc<Memory>> {
    let file = File::from(memfd_create(c"cow-costs", MFdFlags::MFD_CLOEXEC)?);
    let bytes = SCRATCH_PAGES * PAGE_SIZE;
    file.set_len(bytes as u64)?;
    let backing = Some(FileOffset::new(file, 0));
    let region = GuestRegionMmap::from_range(GuestAddress(0), bytes, backing);
    let region = region.map_err(io::Error::other)?;
    let memory = Memory::from_regions(vec![region]).map_err(io::Error::other)?;
    for page in 0..SCRATCH_PAGES {
        memory.write_obj(page, at(page as u64)).map_err(io::Error::other)?;
    }
    Ok(Arc::new(memory))
}

fn at(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE_SIZE as u64)
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1e9)
}

/// Times of protecting one page, and a run of 64.
fn protections(userfault: &Userfault) -> Result<(f64, f64), userfault::UserfaultError> {
    let mut times = [vec![], vec![]];
    for start in (0..SCRATCH_PAGES as u64).step_by(64) {
        for (pages, times) in [1, 64].into_iter().zip(&mut times) {
            let began = Instant::now();
            userfault.protect(start, pages)?;
            times.push(began.elapsed());
            userfault.unprotect(start, pages)?;
        }
    }
    let [single, run] = times;
    Ok((median(single), median(run)))
}

/// Time of copying a page into memory as it is.
fn copies(memory: &Memory, into: &mut [Page]) -> io::Result<f64> {
    let mut times = Vec::new();
    for (page, into) in (0..).zip(into.iter_mut()) {
        let began = Instant::now();
        memory.read_slice(into, at(page)).map_err(io::Error::other)?;
        times.push(began.elapsed());
    }
    black_box(into);
    Ok(median(times))
}

/// Time of a write that waits for another thread to end the protection, and how long that serves it.
fn faults(memory: &Arc<Memory>, userfault: &Userfault) -> Result<(f64, f64), CowError> {
    userfault.protect(0, FAULTS).map_err(CowError::Protect)?;
    let writer = Arc::clone(memory);
    let done = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&done);
    let writes = std::thread::Builder::new()
        .name("cow-costs".into())
        .spawn(move || {
            let times = (0..FAULTS).map(|page| {
                let began = Instant::now();
                // A page of the memory that was just made.
                let _ = writer.write_obj(1_u64, at(page));
                began.elapsed()
            });
            let times = times.collect();
            told.store(true, Ordering::Release);
            times
        })
        .map_err(CowError::Thread)?;
    let (mut pages, mut serving) = (Vec::new(), Vec::new());
    let mut served = Ok(());
    while !done.load(Ordering::Acquire) && served.is_ok() {
        served = super::handler::wait(userfault, None, FAULT_WAIT_MS).map(drop);
        served = served.and_then(|()| {
            let began = Instant::now();
            userfault.faults(&mut pages).map_err(CowError::Protect)?;
            for page in &pages {
                userfault.unprotect(*page, 1).map_err(CowError::Protect)?;
                serving.push(began.elapsed());
            }
            Ok(())
        });
    }
    if served.is_err() {
        // The writer must not wait for ever.
        userfault.unprotect(0, FAULTS).map_err(CowError::Protect)?;
    }
    let times = writes.join().map_err(|_| CowError::Measure(io::ErrorKind::Other.into()))?;
    served?;
    Ok((median(times), median(serving)))
}

/// Longest wait for a fault before the end is looked for.
const FAULT_WAIT_MS: u16 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    const COSTS: Costs = Costs {
        call: 1500.0,
        protect: 100.0,
        copy: 800.0,
        touch: 8000.0,
        fault: 30_000.0,
        serve: 5000.0,
    };

    fn copied(pages: u32, touched: u32, ns: u64) -> Copying {
        Copying { pages, touched, took: Duration::from_nanos(ns) }
    }

    fn heat(hot: u64) -> Vec<AtomicU8> {
        (0..64).map(|bit| AtomicU8::new(if hot & (1 << bit) == 0 { 0 } else { 200 })).collect()
    }

    fn choose(free: u64, hot: u64) -> u64 {
        COSTS.choose(free, &heat(hot), false, 64)
    }

    #[test]
    fn single_pages_are_copied_and_runs_protected() {
        assert_eq!(choose(1 << 5, 0), 0);
        assert_eq!(choose(u64::MAX, 0), u64::MAX);
        assert_eq!(choose(0xff00, 0), 0xff00);
        // Three pages: 1800 ns against 2400.
        assert_eq!(choose(0b111 << 61, 0), 0b111 << 61);
        assert_eq!(choose(0, 0), 0);
    }

    #[test]
    fn a_hot_page_is_copied_and_splits_a_run() {
        let free = u64::MAX;
        assert_eq!(choose(free, 1 << 32), free & !(1 << 32));
        assert_eq!(choose(free, u64::MAX), 0);
        assert_eq!(choose(0xff, 0x1), 0xfe);
    }

    #[test]
    fn a_small_gap_is_protected_along_and_a_large_one_is_not() {
        let free = 0xff00_00ff_u64;
        assert_eq!(choose(0xff0_00ff, 0), 0xfff_ffff);
        assert_eq!(choose(free, 0x0000_ff00), free);
        assert_eq!(choose(0xff00_0000_0000_00ff, 0), 0xff00_0000_0000_00ff);
    }

    #[test]
    fn a_run_that_goes_on_costs_no_call() {
        assert_eq!(COSTS.choose(0b1, &heat(0), true, 64), 0b1);
        assert_eq!(COSTS.choose(0b1, &heat(0), false, 64), 0);
        assert_eq!(COSTS.choose(0b1000, &heat(0), true, 64), 0b1111);
        // Rather copied than reached over many others.
        assert_eq!(COSTS.choose(1 << 40, &heat(0), true, 64), 0);
    }

    #[test]
    fn without_room_protection_is_cheaper() {
        assert_eq!(COSTS.choose(0b1, &heat(0), false, 0), 0b1);
        assert_eq!(COSTS.choose(0b1, &heat(1), false, 0), 0);
    }

    #[test]
    fn heat_rises_with_a_fault_and_falls_without() {
        let heat = AtomicU8::new(0);
        heat_up(&heat);
        assert_eq!(heat.load(Ordering::Relaxed), 128);
        (0..20).for_each(|_| heat_up(&heat));
        assert_eq!(heat.load(Ordering::Relaxed), 255);
        (0..40).for_each(|_| cool(&heat));
        assert_eq!(heat.load(Ordering::Relaxed), 0);
        fade(&heat);
        assert_eq!(heat.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn costs_follow_what_is_seen() {
        let mut costs = COSTS;
        let ns = Duration::from_nanos;
        for _ in 0..200 {
            costs.correct((1, 0, ns(3000)), copied(100, 0, 40_000));
        }
        assert!((costs.call - 3000.0).abs() < 30.0, "{costs:?}");
        assert!((costs.copy - 400.0).abs() < 4.0, "{costs:?}");
        let before = costs;
        costs.correct((1, 0, ns(3000)), copied(3, 0, 5));
        assert!((costs.copy - before.copy).abs() < 1.0, "too few to tell");
        for _ in 0..300 {
            costs.correct((0, 0, ns(0)), copied(16, 0, 6400));
        }
        assert!(costs.call < before.call / 3.0, "what is not tried is tried again: {costs:?}");
    }

    #[test]
    fn a_pause_that_had_to_ask_for_room_teaches_what_that_costs() {
        let mut costs = COSTS;
        for _ in 0..200 {
            // 100 copies of 800 ns, and 50 times room for 2000.
            costs.correct((0, 0, Duration::ZERO), copied(100, 50, 180_000));
        }
        assert!((costs.touch - 2000.0).abs() < 20.0, "{costs:?}");
        assert!((costs.copy - 800.0).abs() < 1.0, "that was not the copies' time: {costs:?}");
    }

    #[test]
    fn faults_that_are_served_later_are_avoided() {
        // A page that is written one time in fifty: a run of such is cheaper protected.
        let warm: Vec<AtomicU8> = (0..64).map(|_| AtomicU8::new(5)).collect();
        let mut costs = COSTS;
        assert_eq!(costs.choose(u64::MAX, &warm, false, 64), u64::MAX);
        for _ in 0..200 {
            costs.correct_faults(10, Duration::from_micros(400));
        }
        assert!((costs.fault - 65_000.0).abs() < 100.0, "{costs:?}");
        assert_eq!(costs.choose(u64::MAX, &warm, false, 64), 0);
        for _ in 0..200 {
            costs.correct_faults(10, Duration::from_micros(50));
        }
        assert!((costs.fault - 30_000.0).abs() < 100.0, "{costs:?}");
        costs.correct_faults(0, Duration::ZERO);
        assert_eq!(costs.choose(u64::MAX, &warm, false, 64), u64::MAX);
    }

    #[test]
    fn this_machine_s_costs_can_be_measured() {
        let Costs { call, protect, copy, touch, fault, serve } = Costs::measure().unwrap();
        assert!(serve <= fault, "{serve} of {fault}");
        for cost in [call, protect, copy, serve] {
            assert!(cost > 0.0, "{cost}");
        }
        assert!(touch >= 0.0);
    }
}
