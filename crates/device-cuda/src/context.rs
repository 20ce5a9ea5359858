//! A device's primary context, shared by all backends on it.
//!
//! Invariant: once a call has shown that the context is broken, nothing made in it is touched again, not even to free it:
//! the next backend resets the context, and old addresses would then be somebody else's.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use baton_device::{DeviceError, Result};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute, CUresult, CUstream};

use crate::error::{Class, class, describe};

/// A handle of the driver. Handles may be used on any thread; what must not happen at once is kept apart by locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Handle<T>(pub(crate) T);

// SAFETY: as the type says.
unsafe impl<T: Copy> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T: Copy> Sync for Handle<T> {}

/// The primary context of a device.
pub(crate) struct Context {
    /// As an operator names it: `cuda:0`.
    pub(crate) name: String,
    device: CUdevice,
    context: Handle<CUcontext>,
    broken: Arc<OnceLock<Broken>>,
}

/// What was made once: given back when it is dropped, unless it lies in a context that is broken.
pub(crate) struct Owned<T: Copy> {
    handle: Handle<T>,
    context: Option<Arc<Context>>,
    give_back: fn(T),
}

impl<T: Copy> Owned<T> {
    /// `give_back` does that. Whoever drops the result has waited for what uses it.
    pub(crate) fn new(context: &Arc<Context>, handle: T, give_back: fn(T)) -> Self {
        Self { handle: Handle(handle), context: Some(context.clone()), give_back }
    }

    /// As [`Owned::new`], of what lies on the host alone.
    pub(crate) fn on_host(handle: T, give_back: fn(T)) -> Self {
        Self { handle: Handle(handle), context: None, give_back }
    }

    pub(crate) fn get(&self) -> T {
        self.handle.0
    }
}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        if self.context.as_ref().is_none_or(|context| context.enter().is_ok()) {
            (self.give_back)(self.handle.0);
        }
    }
}

/// Why nothing more can be asked.
struct Broken {
    lost: bool,
    reason: String,
}

/// What is known of a device's context.
struct Known {
    context: Weak<Context>,
    /// Outlives it: what sticks to the context is there until somebody resets it.
    broken: Arc<OnceLock<Broken>>,
}

static CONTEXTS: Mutex<BTreeMap<u32, Known>> = Mutex::new(BTreeMap::new());

impl Context {
    /// The context of a device: the one in use unless it is broken, else a new one. The libraries are there.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`]; and [`DeviceError::Lost`] where a broken context stays so: some errors last as long as
    /// the process.
    pub(crate) fn open(ordinal: u32) -> Result<Arc<Self>> {
        let name = format!("cuda:{ordinal}");
        let unavailable = |reason: String| DeviceError::Unavailable { device: name.clone(), reason };
        let check = |call: &str, code| match code {
            CUresult::CUDA_SUCCESS => Ok(()),
            code => Err(unavailable(format!("{call} gave {}", describe(code)))),
        };
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        let broken = contexts.get(&ordinal).is_some_and(|known| known.broken.get().is_some());
        let shared = contexts.get(&ordinal).and_then(|known| known.context.upgrade());
        if let Some(context) = shared.filter(|_| !broken) {
            return Ok(context);
        }
        let (mut device, mut context, mut count) = (0, std::ptr::null_mut(), 0);
        // SAFETY: valid out pointers; what was made in a broken context is touched no more.
        unsafe {
            check("cuInit", sys::cuInit(0))?;
            check("cuDeviceGetCount", sys::cuDeviceGetCount(&raw mut count))?;
            if i64::from(ordinal) >= i64::from(count) {
                return Err(unavailable(format!("the driver shows {count} devices, numbered from 0")));
            }
            check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, ordinal as c_int))?;
            if broken {
                // Everything in it goes, with the error that sticks to it. What these say decides nothing: the next do.
                sys::cuDevicePrimaryCtxRelease_v2(device);
                sys::cuDevicePrimaryCtxReset_v2(device);
            }
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&raw mut context, device))?;
        }
        let state = Arc::new(OnceLock::new());
        let context = Arc::new(Self { name, device, context: Handle(context), broken: state.clone() });
        contexts.insert(ordinal, Known { context: Arc::downgrade(&context), broken: state });
        if broken {
            context.memory().map_err(|error| {
                let reason = format!("its context stays broken in this process: {error}");
                DeviceError::Lost { device: context.name.clone(), reason }
            })?;
        }
        Ok(context)
    }

    /// Makes it this thread's context. An error if it is broken.
    pub(crate) fn enter(&self) -> Result<()> {
        self.whole()?;
        // SAFETY: the context is retained for as long as `self` lives and is whole.
        self.check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context.0) })
    }

    /// An error if it is broken.
    pub(crate) fn whole(&self) -> Result<()> {
        self.broken.get().map_or(Ok(()), |broken| Err(self.end(broken)))
    }

    /// The error of a failed call. One that breaks the context is remembered.
    pub(crate) fn check(&self, op: &'static str, code: CUresult) -> Result<()> {
        if code == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(self.failure(op, code, "")) }
    }

    /// As [`Context::check`], of `detail` within `op`.
    pub(crate) fn failure(&self, op: &'static str, code: CUresult, detail: &str) -> DeviceError {
        let space = if detail.is_empty() { "" } else { ": " };
        let reason = format!("{detail}{space}{}", describe(code));
        match class(code) {
            Class::Memory | Class::Call => DeviceError::Execution { device: self.name.clone(), op, reason },
            Class::Poisoned => {
                self.end(self.broken.get_or_init(|| Broken { lost: false, reason: format!("{op}: {reason}") }))
            }
            Class::Lost => {
                self.end(self.broken.get_or_init(|| Broken { lost: true, reason: format!("{op}: {reason}") }))
            }
        }
    }

    /// The error of another library's failed call, which may have met one of the driver: then that.
    pub(crate) fn foreign(&self, op: &'static str, reason: String, stream: CUstream) -> DeviceError {
        // SAFETY: a stream of this context.
        let code = unsafe { sys::cuStreamQuery(stream) };
        match class(code) {
            Class::Poisoned | Class::Lost => self.failure(op, code, &reason),
            Class::Memory | Class::Call => DeviceError::Execution { device: self.name.clone(), op, reason },
        }
    }

    fn end(&self, broken: &Broken) -> DeviceError {
        let (device, reason) = (self.name.clone(), broken.reason.clone());
        if broken.lost { DeviceError::Lost { device, reason } } else { DeviceError::Poisoned { device, reason } }
    }

    /// A number that the driver tells of the device.
    pub(crate) fn attribute(&self, attribute: CUdevice_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: a valid out pointer.
        let code = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, self.device) };
        self.check("cuDeviceGetAttribute", code)?;
        Ok(value)
    }

    /// Compute capability.
    pub(crate) fn capability(&self) -> Result<(i32, i32)> {
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        Ok((self.attribute(MAJOR)?, self.attribute(MINOR)?))
    }

    /// The chip's name.
    pub(crate) fn chip(&self) -> Result<String> {
        let mut name = [0u8; 256];
        // SAFETY: as many bytes as the array has.
        let code = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, self.device) };
        self.check("cuDeviceGetName", code)?;
        Ok(String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned())
    }

    /// Bytes free and in all.
    pub(crate) fn memory(&self) -> Result<(usize, usize)> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: valid out pointers.
        self.check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free, total))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // A broken one is reset by whoever opens the device next.
        if self.broken.get().is_none() {
            // SAFETY: retained once, and nobody uses it any more.
            unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        }
    }
}
