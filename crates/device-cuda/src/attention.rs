//! Attention over keys and values, and what it shares with attention over latents: which kernel attends, into how many
//! splits a context is cut, how they are joined.
//!
//! On tensor cores: activations of 16 bits and heads whose width is a multiple of 16, at most 256. A few tokens of a sequence
//! take their query heads of a key head together, 16 rows in all, so a context is read once for all of them; many are taken
//! 64 at a time. Everything else is done number by number.
//!
//! Levers that are not pulled: warp-group products and bulk copies of compute capability 9.0.

use std::sync::Arc;

use baton_device::{AttentionParams, LayerKv, Result, Rotary, Rows};
use cudarc::driver::sys::CUdevice_attribute;

use crate::backend::CudaBackend;
use crate::cache::{KvCache, Layer, Plane, expect};
use crate::gpu::{Arg, Gpu, Launch};
use crate::heads::Part;
use crate::latent::Absorbed;
use crate::memory::Buffer;
use crate::plan::{AttentionPlan, Pod, Tiles};
use crate::program::{Kernel, Source};
use crate::rows;
use crate::tensor::{DataType, Tensor};

/// Elements by which rows in shared memory are longer than what they hold, as kernels have it.
pub(crate) const PAD: usize = 8;
/// Splits at most, as kernels have it: every thread that joins them reads as many numbers.
const MOST: usize = 64;

/// A reason to split contexts: until there are so many blocks for each multiprocessor, as long as splits have so many
/// positions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reason {
    pub(crate) blocks: usize,
    pub(crate) positions: usize,
}

/// Blocks of a few tokens are short: few of them leave the device idle, and the more there are the more evenly they end.
const FEW_REASONS: [Reason; 2] = [Reason { blocks: 2, positions: 64 }, Reason { blocks: 32, positions: 256 }];
/// Those of many tokens leave much to join.
const WIDE_REASONS: [Reason; 1] = [Reason { blocks: 2, positions: 512 }];

/// How a layer's elements are kept beside activations of a type.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept {
    pub(crate) activations: DataType,
    /// The element's name in kernels.
    pub(crate) element: &'static str,
    /// It is a byte, with a scale.
    pub(crate) bytes: bool,
}

/// What attends to a layer.
pub(crate) enum Attend {
    Full(Full),
    Latent(Absorbed),
}

impl Attend {
    pub(crate) fn new(gpu: &Gpu, kept: &Kept, kv: LayerKv) -> Result<Self> {
        Ok(match kv {
            LayerKv::Full { head_dim, .. } => Self::Full(Full::new(gpu, kept, head_dim)?),
            LayerKv::Latent { rank, rope, index: None } => Self::Latent(Absorbed::new(gpu, kept, rank, rope)?),
            LayerKv::Latent { index: Some(_), .. } => panic!("no indexed attention: the capabilities do not offer it"),
            LayerKv::Windowed { .. } => panic!("no compressed attention: the capabilities do not offer it"),
        })
    }
}

/// Bytes of shared memory that a block can have on the chip.
pub(crate) fn shared_memory(gpu: &Gpu) -> Result<usize> {
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    Ok(gpu.context().attribute(attribute)?.max(0) as usize)
}

/// Attention number by number.
pub(crate) struct RowWise {
    attend: Kernel,
    /// Of a key, in bytes as floats.
    shared: u32,
}

impl RowWise {
    /// For keys and values so wide.
    pub(crate) fn new(gpu: &Gpu, kept: &Kept, key: usize, value: usize) -> Result<Self> {
        let t = kept.activations.name();
        let attend = format!("attend_rows<{t}, {}, {}>", kept.element, value.div_ceil(32));
        Ok(Self { attend: gpu.kernel(Source::Attention, attend)?, shared: (key * size_of::<f32>()) as u32 })
    }

    /// Attends: `inputs` are two `Heads` and three `Plane` as the kernel has them.
    pub(crate) fn attend(&self, pass: &Pass<'_>, inputs: [Arg; 5], scores: &Arg) -> Result<()> {
        let grid = [(pass.tiles.count() * pass.tiles.tokens) as u32, pass.heads as u32];
        pass.split(grid[0] * grid[1], None, |splits, partials| {
            let launch = Launch { grid: [grid[0], grid[1], splits], block: [128, 1, 1], shared: self.shared };
            let rest = [Arg::Ptr(pass.tiles.address), Arg::I32(pass.tiles.tokens as i32), scores.clone(), partials];
            let args: Vec<Arg> =
                inputs.into_iter().chain([Arg::Ptr(pass.blocks)]).chain(rest).chain([Arg::Ptr(pass.out)]).collect();
            pass.gpu.launch(&self.attend, launch, &args)
        })
    }
}

/// The kernel that joins splits of values so wide, where the last block that attends does not.
pub(crate) fn merge(gpu: &Gpu, activations: DataType, width: usize) -> Result<Kernel> {
    gpu.kernel(Source::Attention, format!("merge<{}, {}>", activations.name(), merged(width)))
}

/// The most blocks that attend to parts of a context, were they not split: each has a counter.
pub(crate) fn counters(gpu: &Gpu) -> usize {
    let most = FEW_REASONS.iter().chain(&WIDE_REASONS).map(|reason| reason.blocks).max().unwrap_or(0);
    most * gpu.multiprocessors()
}

/// One list of tiles on its way through attention.
pub(crate) struct Pass<'a> {
    pub(crate) gpu: &'a Arc<Gpu>,
    /// Zeros, as many as [`counters`] says.
    pub(crate) counters: &'a Buffer,
    /// Block numbers of the step.
    pub(crate) blocks: u64,
    pub(crate) tiles: &'a Tiles,
    /// Query heads.
    pub(crate) heads: usize,
    /// Of a value.
    pub(crate) width: usize,
    /// Positions that a token sees.
    pub(crate) window: Option<usize>,
    /// Why the context of a few tokens is split.
    pub(crate) reasons: &'a [Reason],
    /// `[rows, heads * width]`.
    pub(crate) out: u64,
}

impl Pass<'_> {
    /// Runs `attend` with a number of splits and a place for what they leave; `merge` joins them, if `attend` does not. Without
    /// splits it needs `blocks` blocks.
    fn split(&self, blocks: u32, merge: Option<&Kernel>, attend: impl FnOnce(u32, Arg) -> Result<()>) -> Result<()> {
        let reasons = if self.tiles.is_wide() { &WIDE_REASONS } else { self.reasons };
        let visible = self.window.and_then(usize::checked_next_power_of_two).unwrap_or(usize::MAX);
        let longest = visible.min(self.tiles.longest());
        let splits = splits(reasons, blocks as usize, longest, self.gpu.multiprocessors());
        if splits == 1 {
            return attend(1, partials([0; 3]));
        }
        let (tiles, count) = (self.tiles, self.tiles.count() * self.tiles.tokens * self.heads * splits);
        let sums = self.gpu.scratch(count * self.width * size_of::<f32>())?;
        let weights = self.gpu.scratch(count * size_of::<[f32; 2]>())?;
        assert!(blocks as usize * size_of::<u32>() <= self.counters.bytes(), "{blocks} blocks attend to parts");
        let partials = partials([&sums, &weights, self.counters].map(Buffer::address));
        attend(splits as u32, partials.clone())?;
        let Some(merge) = merge else { return Ok(()) };
        let grid = [(tiles.count() * tiles.tokens) as u32, self.heads as u32, 1];
        let block = [(self.width / merged(self.width)).next_multiple_of(32).min(128) as u32, 1, 1];
        let (tokens, splits, width) = (tiles.tokens as i32, splits as i32, self.width as i32);
        let args = [
            Arg::Ptr(tiles.address),
            Arg::I32(tokens),
            partials,
            Arg::I32(splits),
            Arg::I32(width),
            Arg::Ptr(self.out),
        ];
        self.gpu.launch(merge, Launch { grid, block, shared: 0 }, &args)
    }

    /// Attends on tensor cores with `blocks` blocks to a tile: `inputs` are what the kernel takes before the step. What splits
    /// leave lies as the list's tiles do, whatever the kernel has room for.
    pub(crate) fn tiled(
        &self,
        (kernel, merge): (&Kernel, Option<&Kernel>),
        (blocks, threads, shared): (usize, u32, u32),
        inputs: impl IntoIterator<Item = Arg>,
        scores: &Arg,
    ) -> Result<()> {
        let (blocks, tiles) = (blocks as u32, self.tiles.count() as u32);
        self.split(blocks * tiles, merge, |splits, partials| {
            let launch = Launch { grid: [blocks, splits, tiles], block: [threads, 1, 1], shared };
            let tokens = Arg::I32(self.tiles.tokens as i32);
            let step = [Arg::Ptr(self.blocks), Arg::Ptr(self.tiles.address), tokens, scores.clone()];
            let args: Vec<Arg> = inputs.into_iter().chain(step).chain([partials, Arg::Ptr(self.out)]).collect();
            self.gpu.launch(kernel, launch, &args)
        })
    }
}

/// Columns, of so many, that a thread of `merge` takes at a time.
fn merged(width: usize) -> usize {
    if width.is_multiple_of(4) { 4 } else { 1 }
}

/// `Partials` of kernels.
fn partials([sums, weights, counters]: [u64; 3]) -> Arg {
    Pod::default().ptr(sums).ptr(weights).ptr(counters).arg()
}

/// How many splits: a power of two, so that few lengths of a context change it.
fn splits(reasons: &[Reason], blocks: usize, longest: usize, multiprocessors: usize) -> usize {
    let of = |reason: &Reason| (reason.blocks * multiprocessors / blocks.max(1)).min(longest / reason.positions);
    let most = reasons.iter().map(of).max().unwrap_or(1).clamp(1, MOST);
    1 << most.ilog2()
}

/// `Scores` of kernels.
pub(crate) fn scores(params: &AttentionParams) -> Arg {
    let window = params.window.map_or(0, |window| window.min(i32::MAX as usize));
    let pod = Pod::default().int(params.heads).int(params.kv_heads).float(params.scale);
    pod.float(params.softcap.unwrap_or(0.0)).int(window).arg()
}

/// `Heads` of kernels: where the first is, and how many elements rows and heads are apart.
pub(crate) fn heads(address: u64, row: usize, head: usize) -> Arg {
    Pod::default().ptr(address).int(row).int(head).arg()
}

/// An input in the type of activations: where it is, and what keeps it there.
pub(crate) fn in_type(gpu: &Arc<Gpu>, x: &Tensor, dtype: DataType) -> Result<(u64, Option<Buffer>)> {
    if x.dtype() == dtype {
        return Ok((x.address(), None));
    }
    let buffer = gpu.scratch(x.rows() * x.cols() * dtype.bytes())?;
    rows::convert(gpu, x, (buffer.address(), dtype))?;
    Ok((buffer.address(), Some(buffer)))
}

/// Attention over full keys and values.
pub(crate) struct Full {
    /// A few tokens, with fewer and fewer heads; none if the chip has no room for them.
    few: Vec<Tiled>,
    /// Many tokens with two heads, and with one.
    wide: Vec<Tiled>,
    rows: RowWise,
}

/// A kernel on tensor cores.
struct Tiled {
    kernel: Kernel,
    /// What joins its splits, if it does not.
    merge: Option<Kernel>,
    shared: u32,
    /// Query heads of a block.
    heads: usize,
}

/// How a kernel's warps share out a tile, as kernels have it.
#[derive(Debug, Clone, Copy)]
struct Shape {
    name: &'static str,
    /// Rows of queries.
    rows: usize,
    key_warps: usize,
    /// Positions of a tile.
    keys: usize,
    heads: usize,
}

const FEW: [Shape; 3] = [
    Shape { name: "Few<16>", rows: 16, key_warps: 4, keys: 64, heads: 16 },
    Shape { name: "Few<8>", rows: 16, key_warps: 4, keys: 64, heads: 8 },
    Shape { name: "Few<4>", rows: 16, key_warps: 4, keys: 64, heads: 4 },
];
const WIDE: [Shape; 3] = [
    Shape { name: "Wide<2, 64>", rows: 128, key_warps: 1, keys: 64, heads: 2 },
    Shape { name: "Wide<1, 64>", rows: 64, key_warps: 1, keys: 64, heads: 1 },
    Shape { name: "Wide<1, 16>", rows: 64, key_warps: 1, keys: 16, heads: 1 },
];

impl Shape {
    /// Whether the last block that ends joins splits, as the kernel has it.
    fn joins(self) -> bool {
        self.key_warps > 1
    }

    /// Dynamic shared memory of the kernel; it has little else.
    fn shared(self, head_dim: usize, bytes: bool) -> usize {
        let Shape { rows, key_warps, keys, .. } = self;
        let stride = 2 * (head_dim + PAD);
        let stages = if bytes { 4 * keys * (head_dim + 4) + 2 * keys * stride } else { 4 * keys * stride };
        (rows * stride + stages).max(key_warps * rows * head_dim * size_of::<f32>())
    }

    fn fits(self, head_dim: usize, bytes: bool, room: usize) -> bool {
        let more = 2 * self.key_warps * self.rows * size_of::<f32>();
        // Two heads' sums of more columns than these take more registers than a thread has.
        (self.heads != 2 || head_dim <= 128) && self.shared(head_dim, bytes) + more <= room
    }
}

impl Full {
    fn new(gpu: &Gpu, kept: &Kept, head_dim: usize) -> Result<Self> {
        let Kept { activations, element, bytes } = *kept;
        let tensor_cores = activations != DataType::F32 && head_dim.is_multiple_of(16) && head_dim <= 256;
        let room = if tensor_cores { shared_memory(gpu)? } else { 0 };
        let tiled = |shape: Shape| {
            let name = format!("attend<{}, {element}, {head_dim}, {}>", activations.name(), shape.name);
            let shared = shape.shared(head_dim, bytes) as u32;
            let merge = if shape.joins() { None } else { Some(merge(gpu, activations, head_dim)?) };
            Ok(Tiled { kernel: gpu.kernel(Source::Attention, name)?, merge, shared, heads: shape.heads })
        };
        let first = |shapes: &[Shape], heads: usize| {
            let fit = |shape: &&Shape| shape.heads == heads && shape.fits(head_dim, bytes, room);
            shapes.iter().find(fit).copied().map(tiled).transpose()
        };
        let few = FEW.iter().filter(|shape| shape.fits(head_dim, bytes, room)).map(|shape| tiled(*shape));
        let few = few.collect::<Result<_>>()?;
        let wide = first(&WIDE, 2)?.into_iter().chain(first(&WIDE, 1)?).collect();
        Ok(Self { few, wide, rows: RowWise::new(gpu, kept, head_dim, head_dim)? })
    }

    /// The kernel for tiles, where so many query heads share a key head.
    fn kernel(&self, tiles: &Tiles, group: usize) -> Option<&Tiled> {
        let few = self.few.iter().find(|tiled| tiled.heads == few_heads(group)).filter(|_| !tiles.is_wide());
        few.or_else(|| self.wide.iter().find(|tiled| tiled.heads <= group))
    }
}

/// Query heads of a key head that a tile of a few tokens has together, of so many.
fn few_heads(group: usize) -> usize {
    group.next_power_of_two().clamp(4, 16)
}

/// The kernels of this file, for activations of a type.
pub(crate) struct AttentionKernels {
    gpu: Arc<Gpu>,
    activations: DataType,
}

impl AttentionKernels {
    pub(crate) fn new(gpu: &Arc<Gpu>, activations: DataType) -> Result<Self> {
        Ok(Self { gpu: gpu.clone(), activations })
    }

    #[allow(clippy::too_many_arguments)] // as the seam has them
    pub(crate) fn paged(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        rotary: Option<&Rotary<'_, CudaBackend>>,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        params: &AttentionParams,
        out: &mut Tensor,
    ) -> Result<()> {
        let AttentionParams { heads: query_heads, kv_heads, head_dim, window, .. } = *params;
        let Layer { kv, planes: [keys, values], attend: Attend::Full(full) } = cache.layer(layer) else {
            panic!("layer {layer} caches latents")
        };
        assert_eq!(*kv, LayerKv::Full { kv_heads, head_dim }, "shape of layer {layer}");
        expect(q, plan, query_heads * head_dim);
        expect(k, plan, kv_heads * head_dim);
        expect(v, plan, kv_heads * head_dim);
        assert_eq!(out.cols(), q.cols(), "width of attention");
        let out = out.output(plan.rows(), self.activations);
        let gpu = &self.gpu;
        let [q, k, v] = [q, k, v].map(|x| in_type(gpu, x, self.activations));
        let (q, k, v) = (q?, k?, v?);
        let of_keys = Part::new(k.0, kv_heads, head_dim).normed(rotary, 1).rotated(rotary, 1).kept(keys);
        let of_values = Part::new(v.0, kv_heads, head_dim).kept(values);
        let of_queries = Part::new(q.0, query_heads, head_dim).normed(rotary, 0).rotated(rotary, 0);
        let parts = [of_keys, of_values, of_queries];
        // Queries are what they are to be where nothing is done to heads.
        cache.enter(gpu, if rotary.is_some() { &parts } else { &parts[..2] }, plan)?;
        let (scores, group) = (scores(params), query_heads / kv_heads);
        for tiles in plan.tiles(16 / few_heads(group)) {
            let pass = Pass {
                gpu,
                counters: cache.counters(),
                blocks: plan.blocks(),
                tiles,
                heads: query_heads,
                width: head_dim,
                window,
                reasons: &FEW_REASONS,
                out,
            };
            match full.kernel(tiles, group) {
                Some(Tiled { kernel, merge, shared, heads }) => {
                    let blocks = kv_heads * group.div_ceil(*heads);
                    let inputs = [Arg::Ptr(q.0), keys.arg(), values.arg()];
                    pass.tiled((kernel, merge.as_ref()), (blocks, 128, *shared), inputs, &scores)?;
                }
                None => {
                    let q = heads(q.0, query_heads * head_dim, head_dim);
                    let inputs = [q, heads(0, 0, 0), keys.arg(), Plane::none(), values.arg()];
                    full.rows.attend(&pass, inputs, &scores)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_split_until_the_device_is_full_and_no_further_than_is_worth_it() {
        let few = |blocks, longest| splits(&FEW_REASONS, blocks, longest, 132);
        assert_eq!([64, 128, 4096, 1 << 20].map(|longest| few(8, longest)), [1, 2, 32, MOST]);
        assert_eq!([8, 512, 1024, 8192].map(|blocks| few(blocks, 4096)), [32, 8, 4, 1]);
        let wide = |blocks, longest| splits(&WIDE_REASONS, blocks, longest, 132);
        assert_eq!([512, 1024, 1 << 20].map(|longest| wide(16, longest)), [1, 2, 16]);
        assert_eq!(wide(300, 1 << 20), 1);
    }

    #[test]
    fn a_hopper_has_room_for_every_shape_and_smaller_chips_for_one() {
        for bytes in [false, true] {
            for head_dim in [64, 128] {
                assert!(WIDE.iter().chain(&FEW).all(|shape| shape.fits(head_dim, bytes, 227 << 10)));
            }
            assert!(WIDE[1].fits(256, bytes, 227 << 10) && FEW[0].fits(256, bytes, 227 << 10));
            // Compute capability 8.6.
            assert!(WIDE[1..].iter().any(|shape| shape.fits(256, bytes, 99 << 10)));
        }
    }
}
