//! What KVM does for PCI functions: messages and doorbells.

use std::io;
use std::sync::Arc;

use devices::pci::MessageSink;
use devices::pci::virtio::Doorbells;
use hypervisor::{IoEventAddress, NoDatamatch, Vm, VmError};
use vmm_sys_util::eventfd::EventFd;

/// The VM as functions see it.
pub struct Kvm(pub Arc<Vm>);

impl MessageSink for Kvm {
    fn send(&self, address: u64, data: u32) {
        // KVM_SIGNAL_MSI: the interrupt is in its local APIC when the call returns. What the
        // guest has written into its table may be nonsense, and then nobody gets it.
        if let Err(error) = self.0.signal_message(address, data) {
            tracing::debug!(%error, "an interrupt message was not taken");
        }
    }
}

impl Doorbells for Kvm {
    fn register(&self, event: &EventFd, address: u64) -> io::Result<()> {
        self.0
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io_error)
    }

    fn unregister(&self, event: &EventFd, address: u64) -> io::Result<()> {
        self.0
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io_error)
    }
}

fn io_error(error: VmError) -> io::Error {
    io::Error::other(error)
}
