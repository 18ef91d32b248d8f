//! KVM behind a small, safe surface: the machine, its vCPUs, interrupts, clock, dirty log, and
//! all of their state. x86_64 only.
//!
//! | Module | What is there |
//! |---|---|
//! | [`system`] | `/dev/kvm` and what it can do |
//! | [`vm`] | memory slots, interrupt controllers, event descriptors, the VM's own state |
//! | [`dirty`] | which pages the guest wrote: KVM's bitmap, or its rings |
//! | [`irq`] | interrupt routes and messages |
//! | [`vcpu`] | a vCPU: running, kicking, completing an I/O instruction |
//! | [`exit`] | why a vCPU came back from the guest |
//! | [`cpuid`] | what a vCPU says about itself |
//! | [`boot`] | register and table contents at entry to a kernel |
//! | [`state`] | the saved form of vCPU and VM, and its checks |
//!
//! Order at restore, since KVM's registers depend on each other: memory, CPUID
//! ([`Vcpu::configure_cpuid`]), then [`Vm::restore_state`] (clock and interrupt controllers),
//! then [`Vcpu::restore`] of each vCPU.

pub mod boot;
pub mod cpuid;
pub mod dirty;
pub mod exit;
pub mod irq;
mod mapping;
mod msr;
mod persist;
pub mod state;
mod sys;
pub mod system;
pub mod vcpu;
pub mod vm;

pub use cpuid::Topology;
pub use dirty::{DirtyLog, Tracking, Written};
pub use exit::{Exit, InternalError};
pub use irq::Route;
pub use kvm_bindings::CpuId;
pub use kvm_ioctls::{IoEventAddress, NoDatamatch};
pub use state::{StateError, VcpuState, VmState};
pub use system::{Capabilities, Hypervisor, OpenError};
pub use vcpu::{ImmediateExit, Vcpu, VcpuError};
pub use vm::{Vm, VmError};
