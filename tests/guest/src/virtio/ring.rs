//! One queue and its doorbell.

use core::sync::atomic::{Ordering, fence};

use virtio_drivers::Error;
use virtio_drivers::queue::VirtQueue;

use super::Memory;
use crate::pci::{Doorbell, Function};

/// A queue of `SIZE` descriptors, without event indices: a device that is busy says so in a flag,
/// which holds for all that is added meanwhile.
pub struct Ring<const SIZE: usize> {
    queue: VirtQueue<Memory, SIZE>,
    doorbell: Doorbell,
    /// Something was added that the device may not know of.
    is_news: bool,
}

impl<const SIZE: usize> Ring<SIZE> {
    /// Between the choice of features and the end of the initialization.
    pub fn new(function: &mut Function, index: u16) -> Result<Self, Error> {
        let queue = VirtQueue::new(&mut function.transport, index, false, false)?;
        Ok(Self { queue, doorbell: function.doorbell(index), is_news: false })
    }

    /// Hands buffers to the device, first those that it reads; their token. [`Ring::kick`] is to
    /// follow.
    ///
    /// # Safety
    /// The buffers stay where they are and are not touched until [`Ring::take`] has succeeded.
    pub unsafe fn add<'b>(
        &mut self,
        inputs: &[&'b [u8]],
        outputs: &mut [&'b mut [u8]],
    ) -> Result<u16, Error> {
        // SAFETY: the caller vouches for the buffers.
        let token = unsafe { self.queue.add(inputs, outputs) }?;
        self.is_news = true;
        Ok(token)
    }

    /// Tells the device of what was added, unless it is looking anyway.
    pub fn kick(&mut self) {
        if !core::mem::take(&mut self.is_news) {
            return;
        }
        // The device clears its flag and then looks at the ring once more; we have added and now
        // look at the flag (2.7.13.4.1). The processor must not do the second before the first.
        fence(Ordering::SeqCst);
        if self.queue.should_notify() {
            self.doorbell.ring();
        }
    }

    /// The token of what the device has done next.
    pub fn done(&self) -> Option<u16> {
        self.queue.peek_used()
    }

    /// Takes back what [`Ring::done`] named; how many bytes the device wrote.
    ///
    /// # Safety
    /// The buffers are those that were added with this token.
    pub unsafe fn take<'a>(
        &mut self,
        token: u16,
        inputs: &'a [&'a [u8]],
        outputs: &'a mut [&'a mut [u8]],
    ) -> Result<usize, Error> {
        // SAFETY: the caller vouches for the buffers.
        let written = unsafe { self.queue.pop_used(token, inputs, outputs) }?;
        Ok(usize::try_from(written).unwrap_or(usize::MAX))
    }
}
