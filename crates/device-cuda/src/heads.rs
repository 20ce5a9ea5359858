//! Heads on their way to attention: queries, keys and values of a step, or latents and rotated keys, normed, rotated and kept,
//! all in one launch.
//!
//! Invariant: a number is f32 from where it is read to where it is written, and rounded once.

use std::sync::Arc;

use baton_device::{HostRope, Result, RopeLayout, Rotary};

use crate::backend::CudaBackend;
use crate::cache::{Plane, expect};
use crate::gpu::{Arg, Gpu, Launch};
use crate::memory::Buffer;
use crate::plan::{AttentionPlan, Pod};
use crate::program::{Kernel, Source};
use crate::tensor::{DataType, Tensor, Vector};

/// Parts of a launch, as the kernel has them.
const PARTS: usize = 3;
/// Warps of a block, at most, and bytes of shared memory that its heads take before it has fewer.
const WARPS: usize = 4;
const ROOM: usize = 32 << 10;

/// Rotary tables.
pub struct Rope {
    /// `[positions, pairs]` of cosine and sine.
    table: Buffer,
    pairs: usize,
}

impl Rope {
    pub(crate) fn new(gpu: &Arc<Gpu>, src: &HostRope) -> Result<Self> {
        let (cos, sin) = src.tables();
        let pairs: Vec<f32> = cos.into_iter().zip(sin).flat_map(|(cos, sin)| [cos, sin]).collect();
        let table = gpu.load(&DataType::F32.encode(&pairs), "rotary tables")?;
        Ok(Self { table, pairs: src.inv_freq.len() })
    }
}

/// Heads of every row that are treated alike.
pub(crate) struct Part<'a> {
    /// Of the first; rows lie one behind the other.
    address: u64,
    heads: usize,
    width: usize,
    norm: Option<(&'a Vector, f32)>,
    rotation: Option<(&'a Rope, RopeLayout)>,
    kept: Option<&'a Plane>,
}

impl<'a> Part<'a> {
    /// Heads that nothing is done to.
    pub(crate) fn new(address: u64, heads: usize, width: usize) -> Self {
        Self { address, heads, width, norm: None, rotation: None, kept: None }
    }

    /// Normed as the first or the second of `rotary`.
    pub(crate) fn normed(self, rotary: Option<&Rotary<'a, CudaBackend>>, which: usize) -> Self {
        Self { norm: rotary.and_then(|rotary| Some((rotary.norms[which]?, rotary.eps))), ..self }
    }

    /// Rotated as the first or the second of `rotary`.
    pub(crate) fn rotated(self, rotary: Option<&Rotary<'a, CudaBackend>>, which: usize) -> Self {
        Self { rotation: rotary.map(|rotary| (rotary.table, rotary.layouts[which])), ..self }
    }

    /// Kept in a plane of the cache; others stay where they are.
    pub(crate) fn kept(self, plane: &'a Plane) -> Self {
        Self { kept: Some(plane), ..self }
    }

    /// `Part` of the kernel.
    fn encode(&self) -> Pod {
        let Self { address, heads, width, norm, rotation, kept } = *self;
        if let Some((norm, _)) = norm {
            assert_eq!(norm.len(), width, "a norm over each head");
        }
        let (first, pairs, interleaved) = rotation.map_or((0, 0, false), |(table, layout)| {
            assert_eq!((layout.heads, layout.head_dim), (heads, width), "heads that are rotated");
            assert_eq!(layout.dim, 2 * table.pairs, "rotated columns");
            (layout.offset, table.pairs, layout.interleaved)
        });
        let (norm, eps) = norm.map_or((0, 0.0), |(norm, eps)| (norm.address(), eps));
        let [plane, scales] = kept.map_or([0, 0], Plane::addresses);
        let pod = Pod::default().ptr(address).int(heads * width).int(width).ptr(norm).ptr(plane).ptr(scales);
        pod.int(heads).int(width).int(first).int(pairs).int(usize::from(interleaved)).float(eps)
    }
}

/// `enter` for activations, and elements of a cache, of these names.
pub(crate) fn kernel(gpu: &Gpu, activations: DataType, element: &str) -> Result<Kernel> {
    gpu.kernel(Source::Heads, format!("enter<{}, {element}>", activations.name()))
}

/// Queues parts of a step. They have one rotary table.
pub(crate) fn enter(gpu: &Gpu, kernel: &Kernel, parts: &[Part<'_>], plan: &AttentionPlan) -> Result<()> {
    assert!(parts.len() <= PARTS, "{} parts", parts.len());
    let table = parts.iter().find_map(|part| part.rotation).map_or(0, |(table, _)| table.table.address());
    let heads: usize = parts.iter().map(|part| part.heads).sum();
    let widest = parts.iter().map(|part| part.width).max().unwrap_or(0).next_multiple_of(4);
    let bytes = widest * size_of::<f32>();
    let warps = heads.clamp(1, (ROOM / bytes).clamp(1, WARPS));
    let launch = Launch {
        grid: [plan.rows() as u32, heads.div_ceil(warps) as u32, 1],
        block: [32 * warps as u32, 1, 1],
        shared: (warps * bytes) as u32,
    };
    let none = Part::new(0, 0, 0);
    let all = parts.iter().chain(std::iter::repeat(&none)).take(PARTS);
    let parts = all.fold(Pod::default(), |pods, part| pods.join(part.encode()));
    let step = [table, plan.positions(), plan.slots()].map(Arg::Ptr);
    gpu.launch(kernel, launch, &[&[parts.arg()][..], &step, &[Arg::I32(widest as i32)]].concat())
}

/// Rotates a tensor by the positions of the plan, one for each row.
pub(crate) fn rotate(gpu: &Gpu, x: &Tensor, layout: RopeLayout, table: &Rope, plan: &AttentionPlan) -> Result<()> {
    expect(x, plan, layout.heads * layout.head_dim);
    let part = Part { rotation: Some((table, layout)), ..Part::new(x.address(), layout.heads, layout.head_dim) };
    enter(gpu, &kernel(gpu, x.dtype(), x.dtype().name())?, &[part], plan)
}
