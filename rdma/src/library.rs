//! libibverbs, loaded when it is asked for.
//!
//! Enters: nothing. Leaves: its functions, each looked up with the version whose binary interface `abi`
//! declares. Always holds: once loaded it stays, since threads of the C library and of providers may
//! still run in it.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::io;
use std::sync::Arc;

use crate::abi;
use crate::error::Error;

/// Whether this build loads the library where it is asked for.
pub const BUILT_IN: bool = cfg!(feature = "verbs");

const NAME: &CStr = c"libibverbs.so.1";

/// The functions: `name(parameters) -> result, version;`.
macro_rules! functions {
    ($($name:ident($($parameter:ty),*) $(-> $result:ty)?, $version:literal;)*) => {
        /// libibverbs.
        #[derive(Debug)]
        pub struct Library {
            $(pub(crate) $name: unsafe extern "C" fn($($parameter),*) $(-> $result)?,)*
        }

        impl Library {
            fn look_up(handle: *mut c_void) -> Result<Self, Error> {
                Ok(Self {$(
                    $name: {
                        const SYMBOL: &str = concat!(stringify!($name), "\0");
                        const VERSION: &str = concat!($version, "\0");
                        let found = symbol(handle, SYMBOL, VERSION);
                        let missing =
                            Error::Symbol { name: stringify!($name), version: $version };
                        let address = found.ok_or(missing)?;
                        // SAFETY: this name with this version is a function of this type, by
                        // infiniband/verbs.h; what was loaded is never unloaded.
                        unsafe {
                            std::mem::transmute::<
                                *mut c_void,
                                unsafe extern "C" fn($($parameter),*) $(-> $result)?,
                            >(address)
                        }
                    },
                )*})
            }

            /// One whose functions end the process: a test puts its own in place of those that are called.
            #[cfg(test)]
            pub(crate) fn unusable() -> Self {
                unsafe extern "C" fn unusable() {
                    std::process::abort();
                }
                Self {$(
                    // SAFETY: it takes nothing from its caller and does not return.
                    $name: unsafe {
                        std::mem::transmute::<
                            unsafe extern "C" fn(),
                            unsafe extern "C" fn($($parameter),*) $(-> $result)?,
                        >(unusable)
                    },
                )*}
            }
        }
    };
}

functions! {
    ibv_get_device_list(*mut c_int) -> *mut *mut abi::Device, "IBVERBS_1.1";
    ibv_free_device_list(*mut *mut abi::Device), "IBVERBS_1.1";
    ibv_get_device_name(*mut abi::Device) -> *const c_char, "IBVERBS_1.1";
    ibv_open_device(*mut abi::Device) -> *mut abi::Context, "IBVERBS_1.1";
    ibv_close_device(*mut abi::Context) -> c_int, "IBVERBS_1.1";
    ibv_query_device(*mut abi::Context, *mut abi::DeviceAttr) -> c_int, "IBVERBS_1.1";
    ibv_query_port(*mut abi::Context, u8, *mut abi::PortAttr) -> c_int, "IBVERBS_1.1";
    ibv_query_gid(*mut abi::Context, u8, c_int, *mut abi::Gid) -> c_int, "IBVERBS_1.1";
    ibv_get_async_event(*mut abi::Context, *mut abi::AsyncEvent) -> c_int, "IBVERBS_1.1";
    ibv_ack_async_event(*mut abi::AsyncEvent), "IBVERBS_1.1";
    ibv_alloc_pd(*mut abi::Context) -> *mut abi::Pd, "IBVERBS_1.1";
    ibv_dealloc_pd(*mut abi::Pd) -> c_int, "IBVERBS_1.1";
    ibv_reg_mr(*mut abi::Pd, *mut c_void, usize, c_int) -> *mut abi::Mr, "IBVERBS_1.1";
    ibv_dereg_mr(*mut abi::Mr) -> c_int, "IBVERBS_1.1";
    ibv_create_comp_channel(*mut abi::Context) -> *mut abi::CompChannel, "IBVERBS_1.0";
    ibv_destroy_comp_channel(*mut abi::CompChannel) -> c_int, "IBVERBS_1.0";
    ibv_create_cq(
        *mut abi::Context,
        c_int,
        *mut c_void,
        *mut abi::CompChannel,
        c_int
    ) -> *mut abi::Cq, "IBVERBS_1.1";
    ibv_destroy_cq(*mut abi::Cq) -> c_int, "IBVERBS_1.1";
    ibv_get_cq_event(
        *mut abi::CompChannel,
        *mut *mut abi::Cq,
        *mut *mut c_void
    ) -> c_int, "IBVERBS_1.1";
    ibv_ack_cq_events(*mut abi::Cq, c_uint), "IBVERBS_1.1";
    ibv_create_qp(*mut abi::Pd, *mut abi::QpInitAttr) -> *mut abi::Qp, "IBVERBS_1.1";
    ibv_destroy_qp(*mut abi::Qp) -> c_int, "IBVERBS_1.1";
    ibv_modify_qp(*mut abi::Qp, *mut abi::QpAttr, c_int) -> c_int, "IBVERBS_1.1";
    ibv_wc_status_str(c_int) -> *const c_char, "IBVERBS_1.1";
}

impl Library {
    /// Loads libibverbs and finds its functions.
    ///
    /// # Errors
    /// If this build is one without RDMA; if this host has no libibverbs, or one without a function that is
    /// needed.
    pub fn load() -> Result<Arc<Self>, Error> {
        if !BUILT_IN {
            return Err(Error::NotBuilt);
        }
        // SAFETY: loading runs the library's constructors; it is the system's own, and has none that
        // expect anything. The flag keeps it loaded whatever happens to the handle.
        let handle = unsafe {
            libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL | libc::RTLD_NODELETE)
        };
        if handle.is_null() {
            return Err(Error::Load { reason: load_error() });
        }
        Self::look_up(handle).map(Arc::new)
    }

    /// Names of the devices that have a provider here.
    ///
    /// # Errors
    /// If the kernel refuses. A kernel without RDMA has no device, and that is no error.
    pub fn device_names(&self) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        self.with_devices(|name, _| names.push(name.to_owned()))?;
        Ok(names)
    }

    /// Calls `each` with the name of each device and the device, which is valid for the call only.
    pub(crate) fn with_devices(
        &self,
        mut each: impl FnMut(&str, *mut abi::Device),
    ) -> Result<(), Error> {
        let mut count = 0;
        // SAFETY: the library writes one integer, and returns an array of its own or null.
        let list = unsafe { (self.ibv_get_device_list)(&raw mut count) };
        if list.is_null() {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ENOSYS | libc::ENOENT) => Ok(()),
                _ => Err(Error::List(error)),
            };
        }
        for index in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: the array has `count` devices and lives until it is freed below.
            let device = unsafe { *list.add(index) };
            // SAFETY: the device is one of the list, and its name lives as long as it does.
            let name = unsafe { CStr::from_ptr((self.ibv_get_device_name)(device)) };
            each(&name.to_string_lossy(), device);
        }
        // SAFETY: the list came from the call above and is not used from here on; a device that was
        // opened is counted by the library itself.
        unsafe { (self.ibv_free_device_list)(list) };
        Ok(())
    }

    /// The library's words for a completion's status.
    pub(crate) fn status_text(&self, status: c_int) -> &'static str {
        // SAFETY: for any integer the library returns a constant of its own, or null.
        let text = unsafe { (self.ibv_wc_status_str)(status) };
        if text.is_null() {
            return "unknown";
        }
        // SAFETY: the constant ends with a zero byte and stays, as the library does.
        unsafe { CStr::from_ptr(text) }.to_str().unwrap_or("unknown")
    }
}

/// Looks up a function by its name and version, which both end with a zero byte.
fn symbol(handle: *mut c_void, name: &str, version: &str) -> Option<*mut c_void> {
    // A plain look-up would take whatever version is the library's default, also one whose structures
    // are not ours.
    #[cfg(target_env = "gnu")]
    // SAFETY: the handle is of a loaded library; name and version end with a zero byte.
    let address =
        unsafe { libc::dlvsym(handle, name.as_ptr().cast(), version.as_ptr().cast::<c_char>()) };
    #[cfg(not(target_env = "gnu"))]
    let address = {
        let _ = version;
        // SAFETY: the handle is of a loaded library; the name ends with a zero byte.
        unsafe { libc::dlsym(handle, name.as_ptr().cast()) }
    };
    (!address.is_null()).then_some(address)
}

/// What the loader says of the last failure of this thread.
fn load_error() -> String {
    // SAFETY: the call takes nothing; what it returns is this thread's until its next such call.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "no reason given".to_owned();
    }
    // SAFETY: it is not null, so it is a text that ends with a zero byte.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_found_and_has_all_functions() {
        if !BUILT_IN {
            let refused = Library::load().unwrap_err();
            assert!(matches!(refused, Error::NotBuilt), "{refused}");
            return;
        }
        if crate::abi::tests::waived() {
            return;
        }
        let library = Library::load().unwrap();
        assert_eq!(library.status_text(abi::WC_SUCCESS), "success");
        assert_eq!(library.status_text(-1), "unknown");
        library.device_names().unwrap();
    }

    #[test]
    fn a_version_that_is_not_there_is_not_found() {
        if crate::abi::tests::waived() {
            return;
        }
        // SAFETY: as in `load`.
        let handle = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_NODELETE) };
        assert!(symbol(handle, "ibv_reg_mr\0", "IBVERBS_1.1\0").is_some());
        assert!(symbol(handle, "ibv_reg_mr\0", "IBVERBS_9.9\0").is_none());
    }
}
