//! What the drivers ask of the machine: memory is mapped to itself and no IOMMU is between it and
//! the devices, so an address is an address.

use core::ptr::{NonNull, with_exposed_provenance_mut};

use virtio_drivers::{BufferDirection, Hal, PhysAddr};

use crate::pool;

pub struct Memory;

// SAFETY: the pool hands pages out once, zeroed and aligned; registers are mapped by pci.rs where
// their BARs say.
unsafe impl Hal for Memory {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        match pool::pages(pages) {
            Some(memory) => {
                let start = memory.as_mut_ptr();
                (start.expose_provenance() as PhysAddr, NonNull::from(memory).cast())
            }
            // Address 0 is how the drivers are told.
            None => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(_address: PhysAddr, _memory: NonNull<u8>, _pages: usize) -> i32 {
        // Devices are used until the guest ends.
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _size: usize) -> NonNull<u8> {
        let address = usize::try_from(address).unwrap_or(0);
        NonNull::new(with_exposed_provenance_mut(address)).expect("a BAR is not at address 0")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr().expose_provenance() as PhysAddr
    }

    unsafe fn unshare(_address: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}
