//! An opened device, what it says of its ports, and what it reports by itself.

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::abi;
use crate::choose::{Place, Wanted, first_usable};
use crate::devices::{self, Device, Gid, LinkLayer, PortState};
use crate::error::{Error, check, given_back};
use crate::library::Library;

/// An opened device.
pub struct Context {
    library: Arc<Library>,
    raw: NonNull<abi::Context>,
    name: String,
    /// The device has said that it must be opened again.
    has_failed: AtomicBool,
}

// SAFETY: libibverbs may be called from any thread, and from several at once: its objects have their own
// locks. Providers leave them out in thread domains, of which none is made here, and where the operator says
// so in the environment (MLX5_SINGLE_THREADED), who then answers for it.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// What a device can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    pub region_bytes_max: u64,
    /// Requests that wait, for each of a queue pair's queues.
    pub requests_max: u32,
    /// Segments of a request.
    pub segments_max: u32,
    /// Completions that wait in a queue.
    pub completions_max: u32,
    /// READs under way that a queue pair begins, and that it answers.
    pub reads_begun_max: u8,
    pub reads_answered_max: u8,
}

/// A port of an opened device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAttributes {
    pub state: PortState,
    pub link_layer: LinkLayer,
    pub mtu_bytes: u16,
    /// InfiniBand's local address; 0 on Ethernet.
    pub lid: u16,
}

/// What a device reports by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A port came or went, or its addresses changed: see [`Context::port`].
    Port {
        port: u8,
        change: PortChange,
    },
    /// The device is gone or must be opened again.
    DeviceFailed,
    /// A queue pair is in error, by the number that its endpoint has.
    QueuePairFailed {
        number: u32,
    },
    /// The first packet came; the last receive was taken; and what else needs nothing done.
    QueuePair {
        number: u32,
        kind: i32,
    },
    /// A completion queue ran over: nothing more comes from it.
    CompletionQueueFailed,
    Other {
        kind: i32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortChange {
    Active,
    Down,
    /// LID, partition key, subnet manager or GIDs.
    Addresses,
}

impl Library {
    /// Devices of this host, with what their ports say, also those that cannot be used.
    ///
    /// # Errors
    /// If the kernel lists none.
    pub fn devices(self: &Arc<Self>) -> Result<Vec<Device>, Error> {
        let mut devices = self.listed()?;
        for device in devices.iter_mut().filter(|device| device.problem.is_none()) {
            device.problem = self.complete(device).err().map(|error| error.in_words());
        }
        Ok(devices)
    }

    /// Without what is only known of one that is open.
    fn listed(&self) -> Result<Vec<Device>, Error> {
        let mut devices = devices::scan(Path::new(devices::FOLDER))?;
        let names = self.device_names()?;
        for device in devices.iter_mut().filter(|device| !names.contains(&device.name)) {
            device.problem = Some("no provider: install ibverbs-providers".to_owned());
        }
        Ok(devices)
    }

    /// Whether a device is there for whoever would open it, with a port that is up. Asks the kernel, not the device. One
    /// that is being removed is not, though whoever has it open may keep it.
    ///
    /// # Errors
    /// If the kernel lists none.
    pub fn is_up(&self, name: &str) -> Result<bool, Error> {
        let is_up = |device: &Device| {
            device.name == name
                && device.problem.is_none()
                && device.ports.iter().any(|port| port.state == PortState::Active)
        };
        Ok(self.listed()?.iter().any(is_up))
    }

    /// Opens the device that fits best; another that fits only if that one cannot be opened. One that hangs
    /// keeps nobody from another. `before` is taken if that is its device, and it has not failed.
    ///
    /// # Errors
    /// If nothing fits, or what fits cannot be used.
    pub fn open(
        self: &Arc<Self>,
        wanted: &Wanted,
        before: Option<&Arc<Context>>,
    ) -> Result<(Arc<Context>, Place), Error> {
        first_usable(self.listed()?, wanted, |place| {
            let is_same =
                |before: &&Arc<Context>| before.name() == place.device && !before.has_failed();
            let context = match before.filter(is_same) {
                Some(before) => Arc::clone(before),
                None => Context::open(self, &place.device)?,
            };
            context.port(place.port)?;
            Ok(context)
        })
    }

    /// Adds what the kernel tells about an opened device.
    fn complete(self: &Arc<Self>, device: &mut Device) -> Result<(), Error> {
        let context = Context::open(self, &device.name)?;
        for port in &mut device.ports {
            port.mtu_bytes = Some(context.port(port.number)?.mtu_bytes);
        }
        Ok(())
    }
}

impl Context {
    /// Opens a device by its name.
    ///
    /// # Errors
    /// If there is no such device, or it cannot be opened.
    pub fn open(library: &Arc<Library>, name: &str) -> Result<Arc<Self>, Error> {
        let mut opened = None;
        library.with_devices(|present, device| {
            if present == name && opened.is_none() {
                // SAFETY: the device is valid during this call.
                let raw = unsafe { (library.ibv_open_device)(device) };
                opened = Some(NonNull::new(raw).ok_or_else(io::Error::last_os_error));
            }
        })?;
        let raw = opened
            .ok_or_else(|| Error::NoDevice { name: name.to_owned() })?
            .map_err(|source| Error::Open { device: name.to_owned(), source })?;
        let (library, name) = (Arc::clone(library), name.to_owned());
        let this = Self { library, raw, name, has_failed: AtomicBool::new(false) };
        set_nonblocking(this.as_fd()).map_err(|source| this.failed("be watched", source))?;
        Ok(Arc::new(this))
    }

    /// For a test: a device that is no more than the functions of `library`.
    #[cfg(test)]
    pub(crate) fn of(library: Library, raw: NonNull<abi::Context>) -> Arc<Self> {
        let (library, name) = (Arc::new(library), "test0".to_owned());
        Arc::new(Self { library, raw, name, has_failed: AtomicBool::new(false) })
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the device has said that it is gone or must be opened again ([`Event::DeviceFailed`]).
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Acquire)
    }

    pub(crate) fn library(&self) -> &Library {
        &self.library
    }

    pub(crate) fn raw(&self) -> *mut abi::Context {
        self.raw.as_ptr()
    }

    /// The functions that come from the device's provider.
    pub(crate) fn ops(&self) -> &abi::ContextOps {
        // SAFETY: the context is open as long as `self` lives; its functions are set before it is
        // returned and not changed afterwards.
        unsafe { &(*self.raw()).ops }
    }

    pub(crate) fn failed(&self, what: impl Into<String>, source: io::Error) -> Error {
        Error::Device { device: self.name.clone(), what: what.into(), source }
    }

    /// Asks what the device can hold.
    ///
    /// # Errors
    /// If the device does not answer.
    pub fn limits(&self) -> Result<DeviceLimits, Error> {
        // SAFETY: integers and arrays of them may be zero.
        let mut raw: abi::DeviceAttr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, and the library writes one such structure.
        let returned = unsafe { (self.library.ibv_query_device)(self.raw(), &raw mut raw) };
        check(returned).map_err(|source| self.failed("say what it can hold", source))?;
        let count = |value: c_int| u32::try_from(value).unwrap_or(0);
        let reads = |value: c_int| u8::try_from(value.clamp(0, 255)).unwrap_or(0);
        Ok(DeviceLimits {
            region_bytes_max: raw.max_mr_size,
            requests_max: count(raw.max_qp_wr),
            segments_max: count(raw.max_sge),
            completions_max: count(raw.max_cqe),
            reads_begun_max: reads(raw.max_qp_init_rd_atom),
            reads_answered_max: reads(raw.max_qp_rd_atom),
        })
    }

    /// Asks for a port; the first has the number 1.
    ///
    /// # Errors
    /// If there is no such port, or the device does not answer.
    pub fn port(&self, number: u8) -> Result<PortAttributes, Error> {
        let mut raw = abi::PortAttr::default();
        // SAFETY: the context is open; the library writes at most one such structure, of the older
        // and shorter kind.
        let returned = unsafe { (self.library.ibv_query_port)(self.raw(), number, &raw mut raw) };
        check(returned).map_err(|e| self.failed(format!("tell about its port {number}"), e))?;
        Ok(PortAttributes {
            state: match raw.state {
                abi::PORT_DOWN => PortState::Down,
                abi::PORT_INIT => PortState::Init,
                abi::PORT_ARMED => PortState::Armed,
                abi::PORT_ACTIVE => PortState::Active,
                _ => PortState::Other,
            },
            link_layer: match c_int::from(raw.link_layer) {
                abi::LINK_LAYER_INFINIBAND => LinkLayer::InfiniBand,
                abi::LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
                _ => LinkLayer::Other,
            },
            mtu_bytes: mtu_bytes(raw.active_mtu),
            lid: raw.lid,
        })
    }

    /// Asks for an entry of a port's table of GIDs.
    ///
    /// # Errors
    /// If there is no such entry.
    pub fn gid(&self, port: u8, index: u8) -> Result<Gid, Error> {
        let mut raw = abi::Gid::default();
        // SAFETY: the context is open, and the library writes one GID.
        let returned = unsafe {
            (self.library.ibv_query_gid)(self.raw(), port, c_int::from(index), &raw mut raw)
        };
        check(returned)
            .map_err(|e| self.failed(format!("tell the GID {index} of its port {port}"), e))?;
        Ok(Gid(raw.0))
    }

    /// The next thing that the device reports, if there is one. The descriptor ([`AsFd`]) is readable
    /// when there is.
    ///
    /// # Errors
    /// If the descriptor cannot be read.
    pub fn next_event(&self) -> Result<Option<Event>, Error> {
        let mut raw = abi::AsyncEvent { element: std::ptr::null_mut(), event_type: 0 };
        // SAFETY: the context is open, and the library writes one event.
        let returned = unsafe { (self.library.ibv_get_async_event)(self.raw(), &raw mut raw) };
        if returned != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(self.failed("report its events", error)),
            };
        }
        let event = decode(&raw);
        if event == Event::DeviceFailed {
            self.has_failed.store(true, Ordering::Release);
        }
        // SAFETY: the event came from the call above and is acknowledged once. Destroying what it is
        // about waits for this, so the pointer that `decode` followed was valid.
        unsafe { (self.library.ibv_ack_async_event)(&raw mut raw) };
        Ok(Some(event))
    }
}

fn decode(raw: &abi::AsyncEvent) -> Event {
    let kind = raw.event_type;
    let port = |change| {
        // SAFETY: for these events the element is an int; the field is large enough for it.
        let number = unsafe { (&raw const raw.element).cast::<c_int>().read() };
        Event::Port { port: u8::try_from(number).unwrap_or(0), change }
    };
    let queue_pair = || {
        // SAFETY: for these events the element is a queue pair, which is not destroyed before the
        // event is acknowledged.
        unsafe { (*raw.element.cast::<abi::Qp>()).qp_num }
    };
    match kind {
        abi::EVENT_PORT_ACTIVE => port(PortChange::Active),
        abi::EVENT_PORT_ERR => port(PortChange::Down),
        abi::EVENT_LID_CHANGE
        | abi::EVENT_PKEY_CHANGE
        | abi::EVENT_SM_CHANGE
        | abi::EVENT_CLIENT_REREGISTER
        | abi::EVENT_GID_CHANGE => port(PortChange::Addresses),
        abi::EVENT_DEVICE_FATAL => Event::DeviceFailed,
        abi::EVENT_QP_FATAL | abi::EVENT_QP_REQ_ERR | abi::EVENT_QP_ACCESS_ERR => {
            Event::QueuePairFailed { number: queue_pair() }
        }
        abi::EVENT_COMM_EST
        | abi::EVENT_SQ_DRAINED
        | abi::EVENT_PATH_MIG
        | abi::EVENT_PATH_MIG_ERR
        | abi::EVENT_QP_LAST_WQE_REACHED => Event::QueuePair { number: queue_pair(), kind },
        abi::EVENT_CQ_ERR => Event::CompletionQueueFailed,
        _ => Event::Other { kind },
    }
}

/// Bytes of an `enum ibv_mtu`; 256, which each port can, for one that this does not know.
pub(crate) fn mtu_bytes(code: c_int) -> u16 {
    if (abi::MTU_256..=abi::MTU_4096).contains(&code) { 128 << code } else { 256 }
}

/// The `enum ibv_mtu` of so many bytes.
pub(crate) fn mtu_code(bytes: u16) -> Option<c_int> {
    (abi::MTU_256..=abi::MTU_4096).find(|code| mtu_bytes(*code) == bytes)
}

pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<(), io::Error> {
    use std::os::fd::AsRawFd;
    // SAFETY: the call takes a descriptor and integers.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

impl AsFd for Context {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the context's, which closes it when `self` is dropped.
        unsafe { BorrowedFd::borrow_raw((*self.raw()).async_fd) }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Context").field(&self.name).finish()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is open, and everything that was made in it held it, so is gone.
        given_back("an RDMA device", unsafe { (self.library.ibv_close_device)(self.raw()) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_packets_have_codes() {
        let sizes: Vec<u16> = (1..=5).map(mtu_bytes).collect();
        assert_eq!(sizes, [256, 512, 1024, 2048, 4096]);
        assert_eq!((mtu_bytes(0), mtu_bytes(6)), (256, 256));
        assert_eq!(mtu_code(4096), Some(5));
        assert_eq!(mtu_code(1500), None);
    }

    #[test]
    fn an_event_of_a_port_has_its_number() {
        let element = std::ptr::without_provenance_mut(2);
        let raw = abi::AsyncEvent { element, event_type: abi::EVENT_PORT_ERR };
        assert_eq!(decode(&raw), Event::Port { port: 2, change: PortChange::Down });
        let raw = abi::AsyncEvent { element, event_type: 99 };
        assert_eq!(decode(&raw), Event::Other { kind: 99 });
    }
}
