//! The KVM ioctls that kvm-ioctls does not wrap, or wraps with an allocation in the hot path.
//! Linux: Documentation/virt/kvm/api.rst.

use std::os::fd::AsRawFd;

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_dirty_log, kvm_sregs2, kvm_xsave};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// Bytes that KVM_GET_XSAVE writes, and the least that KVM_SET_XSAVE reads.
pub const XSAVE_SIZE_MIN: usize = size_of::<kvm_xsave>();

fn check(ret: i32) -> Result<(), errno::Error> {
    if ret < 0 { Err(errno::Error::last()) } else { Ok(()) }
}

/// Enters the guest.
pub fn run(vcpu: &impl AsRawFd) -> Result<(), errno::Error> {
    // SAFETY: KVM_RUN takes no argument; what the kernel writes is the shared kvm_run area, of
    // which no Rust reference is alive across a call (see `vcpu::RunArea`).
    check(unsafe { ioctl(vcpu, KVM_RUN()) })
}

/// Reads the dirty bitmap of a slot; `words` has room for the whole slot, which the caller checks.
pub fn get_dirty_log(vm: &impl AsRawFd, slot: u32, words: &mut [u64]) -> Result<(), errno::Error> {
    let mut log = kvm_dirty_log { slot, ..Default::default() };
    log.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
    // SAFETY: the kernel writes one bit a page of the slot, rounded up to a word; the caller has
    // checked that `words` holds as many words as the slot has.
    check(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) })
}

/// Re-arms the pages whose bits are set; `words` covers `pages`, which the caller checks.
pub fn clear_dirty_log(
    vm: &impl AsRawFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    words: &[u64],
) -> Result<(), errno::Error> {
    let mut log = kvm_clear_dirty_log { slot, num_pages: pages, first_page, ..Default::default() };
    log.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
    // SAFETY: the kernel only reads `words`, one bit for each of `pages`, rounded up to a word;
    // the caller has checked the length.
    check(unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut log) })
}

/// Protects the pages again whose ring entries were read; returns how many entries these were.
pub fn reset_dirty_rings(vm: &impl AsRawFd) -> Result<u32, errno::Error> {
    // SAFETY: the ioctl takes no argument; what the kernel writes are flags in rings that this process
    // accesses atomically.
    let ret = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    u32::try_from(ret).map_err(|_| errno::Error::last())
}

/// Runs `work` with all signals of this thread held back.
pub fn without_signals<T>(work: impl FnOnce() -> T) -> T {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the first call fills one set, the second reads that and fills the other; both are valid
    // arguments, for which neither fails.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = work();
    // SAFETY: filled above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    result
}

/// Reads the extended register state; `large` says that KVM knows KVM_GET_XSAVE2.
///
/// # Safety
/// `buffer` is as long as KVM_CAP_XSAVE2 says for this VM, or `XSAVE_SIZE_MIN` without it.
pub unsafe fn get_xsave(
    vcpu: &impl AsRawFd,
    large: bool,
    buffer: &mut [u8],
) -> Result<(), errno::Error> {
    assert!(buffer.len() >= XSAVE_SIZE_MIN, "xsave buffer too short");
    let request = if large { KVM_GET_XSAVE2() } else { KVM_GET_XSAVE() };
    // SAFETY: the caller's promise is that the kernel writes at most `buffer.len()` bytes.
    check(unsafe { ioctl_with_mut_ptr(vcpu, request, buffer.as_mut_ptr()) })
}

/// Loads the extended register state.
///
/// # Safety
/// As for [`get_xsave`].
pub unsafe fn set_xsave(vcpu: &impl AsRawFd, buffer: &[u8]) -> Result<(), errno::Error> {
    assert!(buffer.len() >= XSAVE_SIZE_MIN, "xsave buffer too short");
    // SAFETY: the caller's promise is that the kernel reads at most `buffer.len()` bytes.
    check(unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), buffer.as_ptr()) })
}

/// Special registers with the PAE page directory pointers as the CPU holds them.
pub fn get_sregs2(vcpu: &impl AsRawFd) -> Result<kvm_sregs2, errno::Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel writes one kvm_sregs2.
    check(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// The counterpart of [`get_sregs2`].
pub fn set_sregs2(vcpu: &impl AsRawFd, sregs: &kvm_sregs2) -> Result<(), errno::Error> {
    // SAFETY: the kernel reads one kvm_sregs2.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}
