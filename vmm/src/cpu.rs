//! The vCPU threads: they run, they park, and whatever touches a vCPU happens on its own thread.
//!
//! ```text
//!            release                     exit to userspace
//!  PARKED ------------> RUNNING <-----------------------------> serving an exit
//!    ^                     |
//!    +------- kick --------+     kick = stop flag, immediate_exit, signal
//!  jobs (save, load, ...) run here
//! ```
//!
//! Always holds: `park` returns only when every thread is parked and every job is done; no state
//! is read while an I/O exit is half served (the instruction is completed first), nor while any
//! vCPU is still in the guest, where it may send another one an interrupt. Only the
//! controller writes `immediate_exit`, and it clears it only while all threads are parked.
//!
//! An epoch's pause waits for the last vCPU to leave the guest ([`Vcpus::stop_and_save`]): memory is
//! final from there on, and what the pause does with it goes on beside the saves, which only read
//! the vCPUs. [`Vcpus::saved`] waits for them.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once};
use std::thread::JoinHandle;

use crossbeam_channel::Sender;
use devices::acpi::pm::{PowerCallback, PowerEvent};
use hypervisor::{Exit, ImmediateExit, Vcpu, VcpuError, VcpuState};
use thiserror::Error;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::device_manager::Buses;

/// What the guest, or KVM on its behalf, did to the machine as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// ACPI S5, or KVM's shutdown event.
    PowerOff,
    /// A reset register, or a triple fault.
    Reset,
    /// A vCPU cannot go on.
    Failed(String),
    /// A driver did something to its device: the event's name.
    Virtio { id: String, what: &'static str },
}

/// The vCPU threads failed at something.
#[derive(Debug, Error)]
pub enum CpuError {
    #[error("Cannot start the thread of vCPU {id}")]
    Thread { id: usize, source: io::Error },
    #[error("Cannot install the handler of the kick signal")]
    Signal(#[source] vmm_sys_util::errno::Error),
    #[error("Cannot kick vCPU {id}")]
    Kick { id: usize, source: vmm_sys_util::errno::Error },
    #[error("Cannot save the state of vCPU {id}")]
    Save { id: usize, source: VcpuError },
    #[error("vCPU {id} refused its state")]
    State { id: usize, source: VcpuError },
    #[error("The state has {given} vCPUs, the machine {expected}")]
    Count { given: usize, expected: usize },
    #[error("The thread of vCPU {id} has ended")]
    Ended { id: usize },
}

type Task = Box<dyn FnOnce(&mut Vcpu) -> Result<(), VcpuError> + Send>;

/// Work that is done on a vCPU's own thread while it is parked.
struct Job {
    task: Task,
    /// The vCPU has a new state afterwards: one that had given up may run again.
    revives: bool,
}

struct Seat {
    jobs: VecDeque<Job>,
    parked: bool,
    ended: bool,
    failure: Option<VcpuError>,
}

struct Control {
    run: bool,
    exit: bool,
    /// Threads that are in the guest or serve an exit of it.
    running: usize,
    seats: Vec<Seat>,
}

/// What each vCPU saved, in the place of its id.
type Slots = Arc<[Mutex<Option<Result<VcpuState, VcpuError>>>]>;

struct Shared {
    control: Mutex<Control>,
    /// Signalled for the threads: something to do.
    wanted: Condvar,
    /// Signalled for the controller: the last thread left the guest, or the last one has nothing to do.
    done: Condvar,
    /// Read after each exit; set by a kick.
    stop: AtomicBool,
}

struct Thread {
    handle: Option<JoinHandle<()>>,
    immediate_exit: ImmediateExit,
}

/// All vCPUs of a machine. Its methods are called by one controller at a time.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
    /// Where the saves that were begun go to, until they are collected.
    saves: Mutex<Option<Slots>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().expect("a vCPU thread never panics with the lock held")
    }
}

impl Vcpus {
    /// Starts a parked thread for each vCPU.
    pub fn start(
        vcpus: Vec<Vcpu>,
        buses: &Arc<Buses>,
        events: &Sender<MachineEvent>,
        on_power: &PowerCallback,
    ) -> Result<Self, CpuError> {
        install_kick_handler()?;
        let seats = vcpus.iter().map(|_| Seat::new()).collect();
        let shared = Arc::new(Shared {
            control: Mutex::new(Control { run: false, exit: false, running: 0, seats }),
            wanted: Condvar::new(),
            done: Condvar::new(),
            stop: AtomicBool::new(true),
        });
        let mut this =
            Self { shared: Arc::clone(&shared), threads: Vec::new(), saves: Mutex::new(None) };
        for (id, vcpu) in vcpus.into_iter().enumerate() {
            let immediate_exit = vcpu.kick_handle();
            let worker = Worker {
                id,
                vcpu,
                shared: Arc::clone(&shared),
                buses: Arc::clone(buses),
                events: events.clone(),
                on_power: Arc::clone(on_power),
                halted: false,
            };
            let handle = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || worker.work())
                .map_err(|source| CpuError::Thread { id, source })?;
            this.threads.push(Thread { handle: Some(handle), immediate_exit });
        }
        this.settle()?;
        Ok(this)
    }

    #[must_use]
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Lets every vCPU run. Saves that nobody collected are thrown away.
    pub fn release(&self) {
        let uncollected = self.saves().take();
        let mut control = self.shared.lock();
        if uncollected.is_some() {
            // One that has not begun would find the others in the guest, and wait for the next stop.
            control = self.wait_while(control, |control| !control.is_settled());
        }
        for thread in &self.threads {
            thread.immediate_exit.clear();
        }
        self.shared.stop.store(false, Ordering::Release);
        control.run = true;
        drop(control);
        self.shared.wanted.notify_all();
    }

    /// Stops every vCPU and returns when all are parked.
    pub fn park(&self) -> Result<(), CpuError> {
        self.kick()?;
        self.settle()
    }

    /// Stops every vCPU and has each save its state, in parallel, as the first thing when parked.
    pub fn park_and_save(&self) -> Result<Vec<VcpuState>, CpuError> {
        self.stop_and_save()?;
        self.saved()
    }

    /// Stops every vCPU and returns when none is in the guest any more. Each begins to save its
    /// state then, which changes nothing in the guest's memory; [`Vcpus::saved`] has the states.
    pub fn stop_and_save(&self) -> Result<(), CpuError> {
        let slots: Slots = self.threads.iter().map(|_| Mutex::new(None)).collect();
        // In one step with the jobs: a vCPU that is about to run must not save before it does.
        let mut control = self.shared.lock();
        control.run = false;
        control.queue(false, |id| {
            let slots = Arc::clone(&slots);
            Box::new(move |vcpu| {
                // Whoever collects it hears of a failure, and nobody else.
                *slots[id].lock().expect("the slot's only writer") = Some(vcpu.save());
                Ok(())
            })
        });
        drop(control);
        *self.saves() = Some(slots);
        self.kick()?;
        drop(self.wait_while(self.shared.lock(), |control| control.running > 0));
        Ok(())
    }

    /// The states since the last stop. Saves that were begun are waited for; without one, they are
    /// made now.
    pub fn saved(&self) -> Result<Vec<VcpuState>, CpuError> {
        let begun = self.saves().take();
        let Some(slots) = begun else { return self.park_and_save() };
        self.settle()?;
        let mut states = Vec::with_capacity(slots.len());
        for (id, slot) in slots.iter().enumerate() {
            let state = slot.lock().expect("its writer is done").take();
            let state = state.ok_or(CpuError::Ended { id })?;
            states.push(state.map_err(|source| CpuError::Save { id, source })?);
        }
        Ok(states)
    }

    fn saves(&self) -> MutexGuard<'_, Option<Slots>> {
        self.saves.lock().expect("no holder panics")
    }

    fn wait_while<'a>(
        &self,
        control: MutexGuard<'a, Control>,
        busy: impl Fn(&Control) -> bool,
    ) -> MutexGuard<'a, Control> {
        let waited = self.shared.done.wait_while(control, |control| busy(control));
        waited.expect("a vCPU thread never panics with the lock held")
    }

    /// Loads a state into each vCPU, in parallel. Only while parked.
    pub fn load(&self, states: Vec<VcpuState>) -> Result<(), CpuError> {
        if states.len() != self.threads.len() {
            let (given, expected) = (states.len(), self.threads.len());
            return Err(CpuError::Count { given, expected });
        }
        let mut states: Vec<_> = states.into_iter().map(Some).collect();
        self.shared.lock().queue(true, |id| {
            let state = states[id].take();
            Box::new(move |vcpu| state.map_or(Ok(()), |state| vcpu.restore(&state)))
        });
        self.shared.wanted.notify_all();
        self.settle()
    }

    /// Does something with each vCPU on its own thread. Only while parked. `revives`: it gives
    /// them a new state, so one that had given up may run again.
    pub fn each(
        &self,
        revives: bool,
        job: impl Fn(usize, &mut Vcpu) -> Result<(), VcpuError> + Send + Sync + 'static,
    ) -> Result<(), CpuError> {
        let job = Arc::new(job);
        self.shared.lock().queue(revives, |id| {
            let job = Arc::clone(&job);
            Box::new(move |vcpu| job(id, vcpu))
        });
        self.shared.wanted.notify_all();
        self.settle()
    }

    fn kick(&self) -> Result<(), CpuError> {
        self.shared.lock().run = false;
        self.shared.stop.store(true, Ordering::Release);
        // A parked thread may have jobs waiting.
        self.shared.wanted.notify_all();
        for thread in &self.threads {
            thread.immediate_exit.set();
        }
        for (id, thread) in self.threads.iter().enumerate() {
            if let Some(handle) = &thread.handle {
                handle.kill(SIGRTMIN()).map_err(|source| CpuError::Kick { id, source })?;
            }
        }
        Ok(())
    }

    /// Waits until every thread is parked with nothing left to do; reports the first failed job.
    fn settle(&self) -> Result<(), CpuError> {
        let mut control = self.wait_while(self.shared.lock(), |control| !control.is_settled());
        for (id, seat) in control.seats.iter_mut().enumerate() {
            if seat.ended {
                return Err(CpuError::Ended { id });
            }
            if let Some(source) = seat.failure.take() {
                return Err(CpuError::State { id, source });
            }
        }
        Ok(())
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.shared.lock().exit = true;
        if let Err(error) = self.kick() {
            tracing::error!(%error, "a vCPU thread may not end");
        }
        for thread in &mut self.threads {
            if let Some(handle) = thread.handle.take() {
                let _ = handle.join();
            }
        }
    }
}

impl Control {
    fn queue(&mut self, revives: bool, mut task: impl FnMut(usize) -> Task) {
        for (id, seat) in self.seats.iter_mut().enumerate() {
            seat.jobs.push_back(Job { task: task(id), revives });
        }
    }

    fn is_settled(&self) -> bool {
        self.seats.iter().all(Seat::is_settled)
    }
}

impl Seat {
    fn new() -> Self {
        Self { jobs: VecDeque::new(), parked: false, ended: false, failure: None }
    }

    fn is_settled(&self) -> bool {
        self.ended || self.parked && self.jobs.is_empty()
    }
}

struct Worker {
    id: usize,
    vcpu: Vcpu,
    shared: Arc<Shared>,
    buses: Arc<Buses>,
    events: Sender<MachineEvent>,
    on_power: PowerCallback,
    /// After a triple fault or an error a vCPU does not run until it is given a new state.
    halted: bool,
}

impl Worker {
    fn work(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut control = shared.lock();
        loop {
            while control.running == 0
                && let Some(job) = control.seats[self.id].jobs.pop_front()
            {
                // Still counted as busy: `parked` is false until the queue was found empty.
                control.seats[self.id].parked = false;
                drop(control);
                let result = (job.task)(&mut self.vcpu);
                control = shared.lock();
                match result {
                    Ok(()) => self.halted &= !job.revives,
                    Err(error) => control.seats[self.id].failure = Some(error),
                }
            }
            if control.exit {
                control.seats[self.id].ended = true;
                shared.done.notify_all();
                return;
            }
            if control.run && !self.halted {
                control.seats[self.id].parked = false;
                control.running += 1;
                drop(control);
                self.run();
                control = shared.lock();
                control.running -= 1;
                if control.running == 0 {
                    // Jobs wait for the last one, and so does an epoch's pause.
                    shared.wanted.notify_all();
                    shared.done.notify_all();
                }
                continue;
            }
            control.seats[self.id].parked = true;
            // Each wake-up of the controller takes a core from those that still have something to do.
            if control.is_settled() {
                shared.done.notify_all();
            }
            control = shared.wanted.wait(control).expect("a vCPU thread never panics");
        }
    }

    /// Runs the guest until a kick, or until this vCPU cannot go on.
    fn run(&mut self) {
        let mut end = None;
        while end.is_none() && !self.shared.stop.load(Ordering::Acquire) {
            end = match self.vcpu.run() {
                Ok(exit) => serve(&self.buses, exit),
                Err(error) => Some(End::Failed(error.to_string())),
            };
        }
        // Finish an instruction that was only half served. A string instruction may go on with
        // the next element.
        while end.is_none() {
            end = match self.vcpu.complete_io() {
                Ok(Some(exit)) => serve(&self.buses, exit),
                Ok(None) => break,
                Err(error) => Some(End::Failed(error.to_string())),
            };
        }
        if let Some(end) = end {
            self.halted = true;
            if matches!(end, End::TripleFault) {
                let position = self.vcpu.position();
                let loaded = self.vcpu.loaded_position().unwrap_or("nothing");
                tracing::warn!(
                    "vCPU {} had a triple fault, its registers now: {position}; loaded last: \
                     {loaded}",
                    self.id
                );
            }
            self.tell(end);
        }
    }

    /// Before the vCPU parks, so that a capture that finds it dead finds the wish as well: what KVM
    /// leaves of a vCPU after a triple fault (on AMD the state of a reset, and running) must not
    /// run anywhere.
    fn tell(&self, end: End) {
        match end {
            End::TripleFault | End::Reset => (self.on_power)(PowerEvent::Reset),
            End::PowerOff => (self.on_power)(PowerEvent::Off),
            End::Failed(what) => {
                let what = format!("vCPU {} cannot go on: {what}", self.id);
                // A closed channel means that the VMM is on its way out.
                let _ = self.events.send(MachineEvent::Failed(what));
            }
        }
    }
}

/// Why a vCPU does not go on by itself.
enum End {
    /// The guest could not even handle its double fault, which resets a PC.
    TripleFault,
    Reset,
    PowerOff,
    Failed(String),
}

/// Does what the guest wanted of the VMM; `Some` if the vCPU is done for.
fn serve(buses: &Buses, exit: Exit<'_>) -> Option<End> {
    match exit {
        // A string instruction is several accesses to the same port.
        Exit::IoIn { port, size, data } => {
            for element in data.chunks_mut(size.max(1)) {
                buses.port.read(port.into(), element);
            }
        }
        Exit::IoOut { port, size, data } => {
            for element in data.chunks(size.max(1)) {
                buses.port.write(port.into(), element);
            }
        }
        Exit::MmioRead { address, data } => buses.mmio.read(address, data),
        Exit::MmioWrite { address, data } => buses.mmio.write(address, data),
        Exit::Interrupted | Exit::Again | Exit::Hlt => {}
        Exit::Shutdown => return Some(End::TripleFault),
        Exit::SystemReset => return Some(End::Reset),
        Exit::SystemShutdown => return Some(End::PowerOff),
        Exit::InternalError(error) => return Some(End::Failed(error.to_string())),
        exit => return Some(End::Failed(format!("{exit:?}"))),
    }
    None
}

/// The signal only has to end KVM_RUN: its handler does nothing.
fn install_kick_handler() -> Result<(), CpuError> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = register_signal_handler(SIGRTMIN(), nothing));
    result.map_err(CpuError::Signal)
}
