//! The device traits: checks shapes, and queues each operation for the owner thread.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use baton_device::{Caps, DType, DeviceError, KvDtype, Op, Result, WeightFormat};

use crate::chip::Chip;
use crate::device::DeviceOptions;
use crate::installation::{self, Installation};
use crate::libraries::Search;
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
        let Installation { acl, soc, chip } = installation::find(&options.search, options.device)
            .map_err(|unusable| unavailable(unusable.to_string()))?;
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
