//! What is on this machine: libraries that were initialised, the devices that the runtime sees, their chip.
//!
//! Invariant: libraries are initialised once in a process, and never finalised: the process may hold more than one user of them.

use std::ffi::CStr;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::chip::Chip;
use crate::device::check;
use crate::error::AscendError;
use crate::libraries::{Acl, Search, Unavailable};

/// A device that can be opened.
pub(crate) struct Installation {
    pub(crate) acl: &'static Acl,
    /// The chip's own name.
    pub(crate) soc: String,
    pub(crate) chip: Chip,
}

/// Why a device cannot be opened.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Unusable {
    /// A role has no library.
    Libraries(Unavailable),
    /// The libraries are those to link against.
    Stub,
    /// A call failed.
    Call(AscendError),
    /// There are none, or not as many.
    Devices { count: u32 },
    /// Nothing is known of a chip of this name.
    Chip { soc: String },
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unusable::Libraries(unavailable) => unavailable.fmt(f),
            Unusable::Stub => f.write_str(
                "the libraries found are stubs to link against: the toolkit's devlib folder is on the loader's path",
            ),
            Unusable::Call(error) => error.fmt(f),
            Unusable::Devices { count: 0 } => f.write_str(
                "the runtime sees no device: no driver (a toolkit without one puts a stub in its place), or none that this \
                 process may use",
            ),
            Unusable::Devices { count } => write!(f, "the runtime sees devices 0 to {}", count - 1),
            Unusable::Chip { soc } => {
                write!(f, "the chip calls itself {soc:?}; known are Ascend910B<n> (A2), Ascend910_93<n> (A3) and Ascend310P<n>")
            }
        }
    }
}

/// Finds a device.
pub(crate) fn find(search: &Search, device: u32) -> Result<Installation, Unusable> {
    let acl = libraries(search)?;
    let (count, soc) = devices(acl)?;
    if device >= count {
        return Err(Unusable::Devices { count });
    }
    match Chip::from_soc_name(&soc) {
        Some(chip) => Ok(Installation { acl, soc, chip }),
        None => Err(Unusable::Chip { soc }),
    }
}

/// Opens and initialises the libraries of a search.
pub(crate) fn libraries(search: &Search) -> Result<&'static Acl, Unusable> {
    static OPENED: Mutex<Vec<(Search, &'static Acl)>> = Mutex::new(Vec::new());
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, acl)) = opened.iter().find(|(known, _)| known == search) {
        return Ok(acl);
    }
    let acl = Acl::load(search).map_err(Unusable::Libraries)?;
    // SAFETY: no configuration is a null path.
    let code = unsafe { (acl.runtime.init)(std::ptr::null()) };
    match check(acl, "aclInit", code) {
        Ok(()) | Err(AscendError::Call { code: REPEATED, .. }) => {}
        Err(AscendError::Call { code: STUB, .. }) => return Err(Unusable::Stub),
        Err(error) => return Err(Unusable::Call(error)),
    }
    opened.push((search.clone(), acl));
    Ok(acl)
}

/// Of `aclInit`: somebody in this process did it before.
const REPEATED: i32 = 100002;
/// A library that is only there to link against.
const STUB: i32 = 100039;
/// What the count of devices gives instead of zero when the driver is not there or has none for us.
const NO_DEVICES: [i32; 3] = [107001, 207004, 507899];

/// How many devices there are, and what the first calls itself.
pub(crate) fn devices(acl: &Acl) -> Result<(u32, String), Unusable> {
    let mut count = 0;
    // SAFETY: a valid out pointer.
    let code = unsafe { (acl.runtime.device_count)(&raw mut count) };
    match check(acl, "aclrtGetDeviceCount", code) {
        Err(AscendError::Call { code, .. }) if NO_DEVICES.contains(&code) => return Ok((0, String::new())),
        other => other.map_err(Unusable::Call)?,
    }
    // SAFETY: the library owns the text.
    let soc = unsafe {
        let name = (acl.runtime.soc_name)();
        if name.is_null() { String::new() } else { CStr::from_ptr(name).to_string_lossy().into_owned() }
    };
    Ok((count, soc))
}
