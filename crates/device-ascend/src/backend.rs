//! The device traits: checks shapes, and queues each operation for the owner thread.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_device::{Caps, DType, DeviceError, KvDtype, Op, Result, WeightFormat};

use crate::chip::Chip;
use crate::device::{DeviceOptions, check};
use crate::error::AscendError;
use crate::libraries::{Acl, Search};
use crate::object::DataType;
use crate::owner::Owner;

/// How a device is opened.
#[derive(Debug, Clone)]
pub struct AscendOptions {
    /// Number among the devices that the runtime sees.
    pub device: u32,
    /// Where the libraries are.
    pub search: Search,
    /// Element type of activations; that of the checkpoint is natural. f32 computes everything in f32, for comparisons.
    pub activations: DType,
    /// The longest wait for the device.
    pub timeout: Duration,
    /// Wait behind every operator, so that an error names its cause.
    pub blocking: bool,
}

/// An Ascend device.
pub struct AscendBackend {
    pub(crate) caps: Caps,
    pub(crate) chip: Chip,
    pub(crate) activations: DataType,
    pub(crate) owner: Arc<Owner>,
}

/// Tokens of a cache block: what fused attention takes everywhere.
pub(crate) const BLOCK: usize = 128;

impl AscendBackend {
    /// Opens a device.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] with what is missing: libraries, driver, device, or a chip that is known.
    pub fn new(options: &AscendOptions) -> Result<Self> {
        let name = format!("ascend:{}", options.device);
        let unavailable = |reason: String| DeviceError::Unavailable { device: name.clone(), reason };
        let acl = open_libraries(&options.search).map_err(&unavailable)?;
        let (count, soc) = devices(acl).map_err(|error| unavailable(error.to_string()))?;
        if options.device >= count {
            return Err(unavailable(format!(
                "the runtime sees {count} devices{}",
                if count == 0 {
                    ": no driver (a toolkit without one puts a stub in its place), or none that this process may use"
                } else {
                    ""
                }
            )));
        }
        let Some(chip) = Chip::from_soc_name(&soc) else {
            return Err(unavailable(format!("the chip calls itself {soc:?}; known are 910B (A2), 910C (A3) and 310P")));
        };
        let activations = match options.activations {
            DType::BF16 if !chip.has_bf16() => {
                return Err(unavailable(format!("{chip} has no bf16 in any operator: ask for float16")));
            }
            DType::BF16 => DataType::BF16,
            DType::F16 => DataType::F16,
            DType::F32 => DataType::F32,
            DType::Ggml(format) => return Err(unavailable(format!("activations are floats, not {format}"))),
        };
        let device = DeviceOptions { id: options.device as i32, timeout: options.timeout, blocking: options.blocking };
        let owner = Owner::start(acl, name.clone(), device, chip)?;
        let mut weight_formats = BTreeSet::from([WeightFormat::F32, WeightFormat::F16]);
        weight_formats.extend(chip.has_bf16().then_some(WeightFormat::BF16));
        let narrow = weight_formats.iter().copied().filter(|format| *format != WeightFormat::F32);
        let caps = Caps {
            device: name,
            isa: soc,
            threads: 1,
            kv_block_size: BLOCK,
            kv_dtypes: match activations {
                DataType::F32 => [KvDtype::F32, KvDtype::F16, KvDtype::BF16].into(),
                DataType::F16 => [KvDtype::F16].into(),
                _ => [KvDtype::BF16].into(),
            },
            activations: options.activations,
            ops: BTreeSet::from([Op::PagedAttention, Op::LatentAttention, Op::FusedMoe]),
            narrow_activations: narrow.collect(),
            weight_formats,
            row_invariant: false,
        };
        Ok(Self { caps, chip, activations, owner: Arc::new(owner) })
    }
}

/// Opens and initialises the libraries of a search, once in a process.
fn open_libraries(search: &Search) -> std::result::Result<&'static Acl, String> {
    static OPENED: Mutex<Vec<(Search, &'static Acl)>> = Mutex::new(Vec::new());
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, acl)) = opened.iter().find(|(known, _)| known == search) {
        return Ok(acl);
    }
    let acl = Acl::load(search).map_err(|unavailable| unavailable.to_string())?;
    // SAFETY: no configuration is a null path.
    let code = unsafe { (acl.runtime.init)(std::ptr::null()) };
    match check(acl, "aclInit", code) {
        Ok(()) | Err(AscendError::Call { code: REPEATED, .. }) => {}
        Err(AscendError::Call { code: STUB, .. }) => {
            return Err(
                "the libraries found are stubs for linking: the toolkit's devlib folder is on the loader's path".into(),
            );
        }
        Err(error) => return Err(error.to_string()),
    }
    opened.push((search.clone(), acl));
    Ok(acl)
}

/// Of `aclInit`: somebody in this process did it before.
const REPEATED: i32 = 100002;
/// A library that is only there to link against.
const STUB: i32 = 100039;

/// How many devices there are, and what the first calls itself.
fn devices(acl: &Acl) -> std::result::Result<(u32, String), AscendError> {
    let mut count = 0;
    // SAFETY: a valid out pointer.
    let code = unsafe { (acl.runtime.device_count)(&raw mut count) };
    match check(acl, "aclrtGetDeviceCount", code) {
        // What a driver that is not there says instead of zero.
        Err(AscendError::Call { code: 107001 | 207004 | 507899, .. }) => return Ok((0, String::new())),
        other => other?,
    }
    // SAFETY: the library owns the text.
    let soc = unsafe {
        let name = (acl.runtime.soc_name)();
        if name.is_null() { String::new() } else { CStr::from_ptr(name).to_string_lossy().into_owned() }
    };
    Ok((count, soc))
}
