//! Multi-head latent attention, absorbed: queries are taken into the space of the latents, all heads attend to the same
//! cached rows, and each head takes what it mixed out again.
//!
//! The up-projection is kept in the type of activations, whatever the format of its checkpoint: absorbed queries and mixed
//! latents are rounded to that type anyway. Its key rows are transposed, so that both products sum over what lies together.
//!
//! Rows are taken in parts, so that absorbed queries and mixed latents of a long prompt need not all be there at once.

use std::sync::Arc;

use baton_device::{AttentionParams, DeviceError, HostLatent, HostTensor, LayerKv, Result, Rotary, Rows, WeightFormat};

use crate::attention::{Attend, Kept, PAD, Pass, Reason, RowWise, heads, in_type, merge, scores, shared_memory};
use crate::backend::CudaBackend;
use crate::cache::{KvCache, Layer, expect};
use crate::gpu::{Arg, Gpu, Launch};
use crate::heads::Part;
use crate::memory::Buffer;
use crate::plan::{AttentionPlan, FEW};
use crate::program::{Kernel, Source};
use crate::tensor::{DataType, Tensor};
use crate::weights::float;

/// Rows of a part.
const PART: usize = 1024;
/// Pairs of a token and a head in a block, and positions of a tile, as the kernel has them.
const PAIRS: usize = 64;
const KEYS: usize = 32;
/// Why the context of a few tokens is split. A block has a multiprocessor to itself, and a split of a token leaves a row of
/// sums for each head: with 128 heads as many bytes as some 200 positions of latents, written and read again.
const REASONS: [Reason; 2] = [Reason { blocks: 1, positions: 128 }, Reason { blocks: 4, positions: 2048 }];

/// Attention over latents that are in the cache.
pub(crate) struct Absorbed {
    /// On tensor cores, where shape and chip allow it, what joins its splits, and its shared memory. Many heads' sums of wide latents are
    /// more than its last block should read.
    tiled: Option<([Kernel; 2], u32)>,
    rows: RowWise,
}

impl Absorbed {
    pub(crate) fn new(gpu: &Gpu, kept: &Kept, rank: usize, rope: usize) -> Result<Self> {
        let Kept { activations, element, bytes } = *kept;
        let halves = activations != DataType::F32;
        let shape = [rank, rope].iter().all(|width| width.is_multiple_of(16))
            && (rank <= 128 || rank.is_multiple_of(128) && rank <= 512);
        let shared = shared(rank, rope, bytes);
        let tiled = if halves && shape && shared + STATIC <= shared_memory(gpu)? {
            let name = format!("attend_latents<{}, {element}, {rank}, {rope}>", activations.name());
            Some(([gpu.kernel(Source::Latent, name)?, merge(gpu, activations, rank)?], shared as u32))
        } else {
            None
        };
        Ok(Self { tiled, rows: RowWise::new(gpu, kept, rank + rope, rank)? })
    }
}

/// Dynamic shared memory of the kernel, and what it has beside.
fn shared(rank: usize, rope: usize, bytes: bool) -> usize {
    let stride = 2 * (rank + rope + PAD);
    let stages = if bytes { 2 * KEYS * (rank + rope + 8) + KEYS * stride } else { 2 * KEYS * stride };
    PAIRS * (stride + 2 * (KEYS + PAD)) + stages
}
const STATIC: usize = 5 * PAIRS * size_of::<f32>();

/// The up-projection.
pub struct Latent {
    heads: usize,
    nope: usize,
    rope: usize,
    v: usize,
    rank: usize,
    /// `[heads, rank, nope]`.
    absorb: Buffer,
    /// `[heads, v, rank]`.
    project: Buffer,
}

impl Latent {
    /// Columns of a head's query.
    fn query(&self) -> usize {
        self.nope + self.rope
    }
}

/// The kernels of this file, for activations of a type.
pub(crate) struct LatentKernels {
    gpu: Arc<Gpu>,
    activations: DataType,
    per_head: PerHead,
}

/// Products of each head with a matrix of its own.
struct PerHead {
    /// 16 rows at a time, and 64; none in f32.
    tiled: Option<[Kernel; 2]>,
    rows: Kernel,
}

/// A product of every head: `out[row, head, n] = Σ_k x[row, head, k] · weight[head, n, k]`.
struct Product {
    /// Address, and elements between rows and between heads.
    x: (u64, usize, usize),
    weight: u64,
    out: (u64, usize, usize),
    rows: usize,
    heads: usize,
    columns: usize,
    depth: usize,
}

impl LatentKernels {
    pub(crate) fn new(gpu: &Arc<Gpu>, activations: DataType) -> Result<Self> {
        let t = activations.name();
        let kernel = |name: String| gpu.kernel(Source::Latent, name);
        let tiled = |runs: usize| kernel(format!("per_head<{t}, {runs}>"));
        let halves = activations != DataType::F32;
        let per_head = PerHead {
            tiled: if halves { Some([tiled(1)?, tiled(4)?]) } else { None },
            rows: kernel(format!("per_head_rows<{t}>"))?,
        };
        Ok(Self { gpu: gpu.clone(), activations, per_head })
    }

    /// Load time: checks shape and format, packs, uploads.
    ///
    /// # Errors
    /// Also if an element is beyond the range of the type of activations.
    pub(crate) fn weight(&self, src: &HostLatent<'_>) -> Result<Latent> {
        let &HostLatent { ref kv_b, heads, nope, rope, v, rank, format } = src;
        kv_b.expect_shape(&[heads * (nope + v), rank])?;
        kv_b.expect_keepable(format)?;
        let (mut absorb, mut project) = (Vec::new(), Vec::new());
        for head in 0..heads {
            let matrix = self.encoded(&kv_b.rows(head * (nope + v), nope + v), format)?;
            let (keys, values) = matrix.split_at(nope * rank * self.activations.bytes());
            match self.activations {
                DataType::F32 => transpose::<4>(keys, rank, &mut absorb),
                DataType::F16 | DataType::BF16 => transpose::<2>(keys, rank, &mut absorb),
            }
            project.extend_from_slice(values);
        }
        let load = |bytes: &[u8]| self.gpu.load(bytes, "weights");
        Ok(Latent { heads, nope, rope, v, rank, absorb: load(&absorb)?, project: load(&project)? })
    }

    /// The elements that a tensor has in a format, in the type of activations.
    fn encoded(&self, tensor: &HostTensor<'_>, format: WeightFormat) -> Result<Vec<u8>> {
        let mut values = match format {
            _ if format == tensor.dtype().into() => tensor.to_f32(),
            WeightFormat::Ggml(blocks) => {
                let mut values = vec![0.0; tensor.len()];
                blocks.dequantize(&tensor.to_blocks(&|values| blocks.quantize(values)), &mut values);
                values
            }
            _ => tensor.to_f32(),
        };
        if let Some(float) = float(format) {
            let rounded = float.encode(&values);
            values.clear();
            float.decode(&rounded, &mut values);
        }
        let bytes = self.activations.encode(&values);
        let mut kept = Vec::with_capacity(values.len());
        self.activations.decode(&bytes, &mut kept);
        // A device would go on with infinities, and say nothing.
        match values.iter().zip(&kept).position(|(value, kept)| value.is_finite() && !kept.is_finite()) {
            None => Ok(bytes),
            Some(i) => Err(DeviceError::Format {
                tensor: tensor.name().to_owned(),
                dtype: tensor.dtype(),
                format,
                reason: format!("element {i} is beyond the range of {} activations", self.activations.name()),
            }),
        }
    }

    #[allow(clippy::too_many_arguments)] // as the seam has them
    pub(crate) fn attend(
        &self,
        q: &Tensor,
        latent: &Tensor,
        rope_key: &Tensor,
        rotary: Option<&Rotary<'_, CudaBackend>>,
        weight: &Latent,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        let &Latent { heads: count, rope, v, rank, .. } = weight;
        let Layer { kv, planes: [latents, rotated], attend: Attend::Latent(absorbed) } = cache.layer(layer) else {
            panic!("layer {layer} caches keys and values")
        };
        assert_eq!(*kv, LayerKv::Latent { rank, rope, index: None }, "shape of layer {layer}");
        expect(q, plan, count * weight.query());
        expect(latent, plan, rank);
        expect(rope_key, plan, rope);
        assert_eq!(out.cols(), count * v, "width of latent attention");
        let out = out.output(plan.rows(), self.activations);
        let (gpu, size) = (&self.gpu, self.activations.bytes());
        let [q, latent, rope_key] = [q, latent, rope_key].map(|x| in_type(gpu, x, self.activations));
        let (q, latent, rope_key) = (q?, latent?, rope_key?);
        let of_latents = Part::new(latent.0, 1, rank).normed(rotary, 1).kept(latents);
        let of_keys = Part::new(rope_key.0, 1, rope).rotated(rotary, 1).kept(rotated);
        let of_queries = Part::new(q.0, count, weight.query()).normed(rotary, 0).rotated(rotary, 0);
        let parts = [of_latents, of_keys, of_queries];
        // Queries are what they are to be where nothing is done to heads.
        cache.enter(gpu, if rotary.is_some() { &parts } else { &parts[..2] }, plan)?;

        let params =
            AttentionParams { heads: count, kv_heads: 1, head_dim: rank + rope, scale, window: None, softcap: None };
        let scores = scores(&params);
        // Loads are of 16 bytes.
        let tiled = absorbed.tiled.as_ref().filter(|_| [weight.nope, rope].iter().all(|width| width.is_multiple_of(8)));
        // As many tokens as there is room for beside each other's heads.
        let few = FEW.into_iter().rev().find(|tokens| tokens * count <= PAIRS).unwrap_or(1);
        for tiles in plan.tiles(few).flat_map(|tiles| tiles.parts(PART)) {
            let rows = tiles.rows();
            let room = || gpu.scratch(rows.len() * count * rank * size);
            let (queries, mixed) = (room()?, room()?);
            // Kernels count rows from the beginning of the step.
            let before = (rows.start * count * rank * size) as u64;
            let (first_query, first_mixed) =
                (queries.address().wrapping_sub(before), mixed.address().wrapping_sub(before));
            let at = |address: u64, row: usize| address + (rows.start * row * size) as u64;
            let (query_row, own_row, out_row) = (count * weight.query(), count * rank, count * v);
            let per_head = |x, weight: &Buffer, out, [columns, depth]: [usize; 2]| {
                let (rows, weight) = (rows.len(), weight.address());
                self.per_head.queue(gpu, &Product { x, weight, out, rows, heads: count, columns, depth })
            };
            let own = |buffer: &Buffer| (buffer.address(), own_row, rank);
            let query = (at(q.0, query_row), query_row, weight.query());
            per_head(query, &weight.absorb, own(&queries), [rank, weight.nope])?;

            let rotated_q = heads(q.0 + (weight.nope * size) as u64, query_row, weight.query());
            let pass = Pass {
                gpu,
                counters: cache.counters(),
                blocks: plan.blocks(),
                tiles: &tiles,
                heads: count,
                width: rank,
                window: None,
                reasons: &REASONS,
                out: first_mixed,
            };
            match tiled {
                Some(([kernel, merge], shared)) => {
                    let blocks = (tiles.tokens * count).div_ceil(PAIRS);
                    let inputs = [Arg::Ptr(first_query), rotated_q, latents.arg(), rotated.arg()];
                    pass.tiled((kernel, Some(merge)), (blocks, 256, *shared), inputs, &scores)?;
                }
                None => {
                    let q = heads(first_query, own_row, rank);
                    let inputs = [q, rotated_q, latents.arg(), rotated.arg(), latents.arg()];
                    absorbed.rows.attend(&pass, inputs, &scores)?;
                }
            }
            per_head(own(&mixed), &weight.project, (at(out, out_row), out_row, v), [v, rank])?;
        }
        Ok(())
    }
}

impl PerHead {
    fn queue(&self, gpu: &Gpu, product: &Product) -> Result<()> {
        let Product { x, weight, out, rows, heads: count, columns, depth } = *product;
        let strided = |(address, row, head)| heads(address, row, head);
        let (x_arg, out_arg, weight) = (strided(x), strided(out), Arg::Ptr(weight));
        let int = |n: usize| Arg::I32(n as i32);
        let whole = [depth, x.1, x.2].iter().all(|elements| elements.is_multiple_of(8)) && x.0.is_multiple_of(16);
        match self.tiled.as_ref().filter(|_| whole) {
            Some([few, many]) => {
                let (kernel, tile) = if rows <= 16 { (few, 16) } else { (many, 64) };
                let grid = [columns.div_ceil(64) as u32, count as u32, rows.div_ceil(tile) as u32];
                // Three stages of rows and columns.
                let shared = (3 * (tile + 64) * (64 + PAD) * 2) as u32;
                let args = [x_arg, weight, out_arg, int(rows), int(columns), int(depth)];
                gpu.launch(kernel, Launch { grid, block: [128, 1, 1], shared }, &args)
            }
            None => {
                let grid = [columns.div_ceil(4) as u32, count as u32, rows as u32];
                let args = [x_arg, weight, out_arg, int(columns), int(depth)];
                gpu.launch(&self.rows, Launch { grid, block: [128, 1, 1], shared: 0 }, &args)
            }
        }
    }
}

/// Appends the transpose of a matrix of `columns` columns, whose elements are N bytes.
fn transpose<const N: usize>(matrix: &[u8], columns: usize, out: &mut Vec<u8>) {
    let elements = matrix.as_chunks::<N>().0;
    out.extend((0..columns).flat_map(|column| elements.iter().skip(column).step_by(columns)).flatten());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_is_transposed_element_by_element() {
        let mut out = vec![9];
        transpose::<2>(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 3, &mut out);
        assert_eq!(out, [9, 1, 2, 7, 8, 3, 4, 9, 10, 5, 6, 11, 12]);
    }

    #[test]
    fn latents_of_deepseek_fit_an_ampere_and_a_hopper() {
        for bytes in [false, true] {
            assert!(shared(512, 64, bytes) + STATIC <= 163 << 10);
        }
    }
}
