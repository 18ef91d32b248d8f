//! A stretch of pages that are handed out once and never given back: for what devices read and
//! write, and for what is too large for a stack. Only the first processor asks.

use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU64, Ordering};

use virtio_drivers::PAGE_SIZE;

static NEXT: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);

/// Fills the pool.
///
/// # Safety
/// The pages are mapped and nobody else's, for good; called once.
pub unsafe fn fill(start: u64, pages: u64) {
    NEXT.store(start, Ordering::Relaxed);
    END.store(start + pages * PAGE_SIZE as u64, Ordering::Relaxed);
}

/// Zeroed pages; None where there are no more.
pub fn pages(count: usize) -> Option<&'static mut [u8]> {
    let size = count.checked_mul(PAGE_SIZE)?;
    let start = NEXT.load(Ordering::Relaxed);
    let next =
        start.checked_add(size as u64).filter(|next| *next <= END.load(Ordering::Relaxed))?;
    NEXT.store(next, Ordering::Relaxed);
    let place = with_exposed_provenance_mut::<u8>(usize::try_from(start).ok()?);
    // SAFETY: whoever filled the pool vouches for the pages; they are handed out only now. Zeroes
    // are valid bytes.
    unsafe {
        place.write_bytes(0, size);
        Some(core::slice::from_raw_parts_mut(place, size))
    }
}

/// `count` values in pages of their own, each as `make` gives it for its place.
pub fn slice<T>(count: usize, mut make: impl FnMut(usize) -> T) -> Option<&'static mut [T]> {
    const { assert!(align_of::<T>() <= PAGE_SIZE) };
    let size = count.checked_mul(size_of::<T>())?;
    let place = pages(size.div_ceil(PAGE_SIZE))?.as_mut_ptr().cast::<T>();
    for index in 0..count {
        // SAFETY: the pages have room for `count` values and are aligned for any of them.
        unsafe { place.add(index).write(make(index)) };
    }
    // SAFETY: all of them have just been written, and nobody else knows of the pages.
    Some(unsafe { core::slice::from_raw_parts_mut(place, count) })
}

/// One value in pages of its own.
pub fn place<T>(value: T) -> Option<&'static mut T> {
    const { assert!(align_of::<T>() <= PAGE_SIZE) };
    let place = pages(size_of::<T>().div_ceil(PAGE_SIZE))?.as_mut_ptr().cast::<T>();
    // SAFETY: the pages have room for the value and are aligned for it, and nobody else knows of
    // them.
    unsafe {
        place.write(value);
        Some(&mut *place)
    }
}
