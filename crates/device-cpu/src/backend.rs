//! The device traits on top of the kernels: checks shapes, shares rows among the threads.

mod compressed;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_device::{
    Activation, AttentionBatch, AttentionParams, Backend, BlockFormat, Caps, Communicator, DType, DeviceError, Draw,
    Drawer, HostExperts, HostLatent, HostLinear, HostRope, HostTensor, Indexer, KvBlocks, KvDtype, KvSpec, LatentOps,
    MoeOps, Op, Result, RopeLayout, Rows, TokenIds, WeightFormat, World,
};

use crate::cache::{AttentionPlan, BLOCK, KvCache, Layer, rope_start};
use crate::isa::{Dispatch, Isa};
use crate::kernels::attention;
use crate::kernels::chosen::{Choice, Chosen, Keys};
use crate::kernels::latent::{self, Latent};
use crate::kernels::linear::{Buffers, Prepared, Product, multiply};
use crate::kernels::moe::{self, Experts};
use crate::kernels::rope::{Rope, Rotate};
use crate::kernels::rows::{Add, Gated, LayerNorm, RmsNorm, Scale, Softcap};
use crate::memory::DEVICE;
use crate::pool::Pool;
use crate::tensor::{Target, Tensor};
use crate::weight::Linear;

/// How a CPU backend is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that share the work, the caller included; 0 for as many as the machine offers.
    pub threads: usize,
    /// Instruction set; the best found if `None`.
    pub isa: Option<Isa>,
}

/// The CPU.
pub struct CpuBackend {
    caps: Caps,
    isa: Dispatch,
    pool: Pool,
    scratch: Mutex<Scratch>,
    communicator: Communicator,
}

#[derive(Default)]
struct Scratch {
    input: Buffers,
    moe: moe::Scratch,
    drawer: Drawer,
}

impl CpuBackend {
    /// Starts the workers.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] if the machine lacks the instruction set or refuses a thread.
    pub fn new(options: &CpuOptions) -> Result<Self> {
        let [alone] = Communicator::new(1, Duration::ZERO).try_into().unwrap_or_else(|_| unreachable!("one rank"));
        Self::with(options, alone)
    }

    /// Ranks that compute a model together and share out the threads, one each at least; none waits longer than `timeout`
    /// for the others. They gain nothing over one backend, whose threads share the work already: they are there to be tried.
    ///
    /// # Errors
    /// As for [`CpuBackend::new`].
    pub fn ranks(options: &CpuOptions, size: usize, timeout: Duration) -> Result<Vec<Self>> {
        let threads = (threads(options) / size.max(1)).max(1);
        let rank = |communicator| Self::with(&CpuOptions { threads, ..*options }, communicator);
        Communicator::new(size, timeout).into_iter().map(rank).collect()
    }

    fn with(options: &CpuOptions, communicator: Communicator) -> Result<Self> {
        use WeightFormat::{BF16, F16, F32, Ggml};
        let unavailable = |reason| DeviceError::Unavailable { device: DEVICE.to_owned(), reason };
        let wanted = options.isa.unwrap_or_else(Isa::detect);
        let isa = wanted.dispatch().ok_or_else(|| {
            let available: Vec<_> = Isa::available().iter().map(ToString::to_string).collect();
            unavailable(format!("this machine has no {wanted}; it has {}", available.join(", ")))
        })?;
        let threads = threads(options);
        let pool =
            Pool::new(threads).map_err(|e| unavailable(format!("{threads} threads could not be started: {e}")))?;
        let caps = Caps {
            device: DEVICE.to_owned(),
            isa: wanted.to_string(),
            threads,
            kv_block_size: BLOCK,
            kv_dtypes: KvDtype::ALL.into(),
            weight_formats: [F32, F16, BF16].into_iter().chain(BlockFormat::ALL.map(Ggml)).collect(),
            activations: DType::F32,
            ops: BTreeSet::from([
                Op::PagedAttention,
                Op::LatentAttention,
                Op::IndexedAttention,
                Op::CompressedAttention,
                Op::FusedMoe,
            ]),
            narrow_activations: BlockFormat::ALL.map(Ggml).into_iter().chain(isa.has_pairs().then_some(BF16)).collect(),
            row_invariant: true,
            // It is its own host.
            runs_ahead: false,
            replays_steps: false,
        };
        Ok(Self { caps, isa, pool, scratch: Mutex::default(), communicator })
    }

    pub(crate) fn isa(&self) -> Dispatch {
        self.isa
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Contents are overwritten by every user, so poison means nothing.
    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `f` with ranges that cover `0..rows`; `work` is that of one row, in multiply-adds.
    fn share_rows(&self, rows: usize, work: usize, f: impl Fn(Range<usize>) + Sync) {
        let chunk = self.pool.share(rows, rows * work);
        self.pool.run(rows.div_ceil(chunk), rows * work, |task| {
            f(task * chunk..rows.min((task + 1) * chunk));
        });
    }

    /// Calls `f` with a row's number and contents, for every row of `x`.
    fn each_row(&self, x: &mut Tensor, work_per_column: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        let (rows, cols) = (x.rows(), x.cols());
        let target = Target::new(x.data_mut(), cols);
        self.share_rows(rows, cols * work_per_column, |rows| {
            for row in rows {
                // SAFETY: ranges do not overlap.
                f(row, unsafe { target.part(row, 0..cols) });
            }
        });
    }
}

fn threads(options: &CpuOptions) -> usize {
    match options.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

/// Rough multiply-adds per column of the operations on rows.
mod work {
    pub(super) const ADD: usize = 1;
    pub(super) const NORM: usize = 4;
    pub(super) const ROPE: usize = 8;
    /// Of a function with an exponential in it.
    pub(super) const EXP: usize = 16;
}

fn same_shape(a: &Tensor, b: &Tensor) {
    assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()), "shapes of two activations");
}

fn columns(x: &Tensor, cols: usize) {
    assert_eq!(x.cols(), cols, "columns of an activation");
}

impl Backend for CpuBackend {
    type Tensor = Tensor;
    type Vector = Vec<f32>;
    type Linear = Linear;
    type Rope = Rope;
    type KvCache = KvCache;
    type AttentionPlan = AttentionPlan;
    type Chosen = Vec<Option<u32>>;

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn world(&self) -> World {
        self.communicator.world()
    }

    fn tensor(&self, capacity: usize, cols: usize) -> Result<Tensor> {
        Tensor::new(capacity, cols)
    }

    fn vector(&self, src: &HostTensor<'_>) -> Result<Vec<f32>> {
        Ok(src.to_f32())
    }

    fn linear_weight(&self, src: &HostLinear<'_>) -> Result<Linear> {
        Linear::new(&self.pool, src)
    }

    fn rope_table(&self, src: &HostRope) -> Result<Rope> {
        Ok(Rope::new(src))
    }

    fn kv_cache(&self, spec: &KvSpec, blocks: KvBlocks) -> Result<KvCache> {
        KvCache::new(spec, blocks)
    }

    fn plan_attention(&self, batch: &AttentionBatch<'_>) -> Result<AttentionPlan> {
        Ok(AttentionPlan::new(batch))
    }

    fn embed(&self, ids: TokenIds<'_, Self::Chosen>, table: &Linear, out: &mut Tensor) -> Result<()> {
        let ids = ids.on_host();
        columns(out, table.weight.in_features);
        out.set_rows(ids.len());
        self.each_row(out, work::ADD, |row, out| table.weight.read_row(ids[row] as usize, out));
        Ok(())
    }

    fn rms_norm(&self, x: &Tensor, weight: &Vec<f32>, eps: f32, out: &mut Tensor) -> Result<()> {
        columns(out, x.cols());
        assert_eq!(x.cols() % weight.len(), 0, "a norm over {} of {} columns", weight.len(), x.cols());
        out.set_rows(x.rows());
        self.each_row(out, work::NORM, |row, out| {
            out.copy_from_slice(x.row(row));
            self.isa.run(RmsNorm { x: out, weight, eps });
        });
        Ok(())
    }

    fn rms_norm_in_place(&self, x: &mut Tensor, weight: &Vec<f32>, eps: f32) -> Result<()> {
        assert_eq!(x.cols() % weight.len(), 0, "a norm over {} of {} columns", weight.len(), x.cols());
        self.each_row(x, work::NORM, |_, x| self.isa.run(RmsNorm { x, weight, eps }));
        Ok(())
    }

    fn add_rms_norm(
        &self,
        x: &Tensor,
        residual: &mut Tensor,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        self.add(residual, x)?;
        self.rms_norm(residual, weight, eps, out)
    }

    fn scale(&self, x: &mut Tensor, factor: f32) -> Result<()> {
        self.each_row(x, work::ADD, |_, x| self.isa.run(Scale { x, factor }));
        Ok(())
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        self.each_row(x, work::EXP, |_, x| self.isa.run(Softcap { x, cap }));
        Ok(())
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        same_shape(x, y);
        self.each_row(x, work::ADD, |row, x| self.isa.run(Add { x, y: y.row(row) }));
        Ok(())
    }

    fn linear(&self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<()> {
        self.linear_group(x, &mut [(weight, out)])
    }

    fn linear_group(&self, x: &Tensor, group: &mut [(&Linear, &mut Tensor)]) -> Result<()> {
        let products: Vec<_> = group.iter_mut().map(|(linear, out)| Product::new(linear, x.rows(), out)).collect();
        let mut scratch = self.scratch();
        let weights = products.iter().map(|product| product.weight);
        let input = Prepared::new((&self.pool, self.isa), x.view(), weights, &mut scratch.input);
        multiply(&self.pool, self.isa, (input, x.rows()), &products);
        Ok(())
    }

    fn rope(&self, x: &mut Tensor, layout: RopeLayout, table: &Rope, plan: &AttentionPlan) -> Result<()> {
        columns(x, layout.heads * layout.head_dim);
        assert_eq!((layout.dim, x.rows()), (2 * table.pairs, plan.rows()), "rotated columns and rows");
        self.each_row(x, work::ROPE, |r, row| {
            self.isa.run(Rotate { row, layout, table, position: plan.position(r) });
        });
        Ok(())
    }

    fn gated_activation(&self, activation: Activation, gate: &Tensor, up: &Tensor, out: &mut Tensor) -> Result<()> {
        same_shape(gate, up);
        columns(out, gate.cols());
        out.set_rows(gate.rows());
        self.each_row(out, work::EXP, |row, out| {
            out.copy_from_slice(gate.row(row));
            self.isa.run(Gated { activation, gate: out, up: up.row(row) });
        });
        Ok(())
    }

    fn paged_attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        params: &AttentionParams,
        out: &mut Tensor,
    ) -> Result<()> {
        let Layer::Full { keys, values } = &mut cache.layers[layer] else { panic!("layer {layer} caches latents") };
        columns(q, params.heads * params.head_dim);
        same_shape(k, v);
        columns(k, params.kv_heads * params.head_dim);
        columns(out, q.cols());
        assert_eq!((q.rows(), k.rows()), (plan.rows(), plan.rows()), "rows of the step");
        for row in 0..plan.rows() {
            keys.put(plan.slot(row), 0, 0, k.row(row));
            values.put(plan.slot(row), 0, 0, v.row(row));
        }
        out.set_rows(q.rows());
        let target = Target::new(out.data_mut(), q.cols());
        attention::attend(&self.pool, self.isa, q, (keys, values), plan, params, &target);
        Ok(())
    }

    fn all_reduce(&self, x: &mut Tensor) -> Result<()> {
        self.communicator.all_reduce(DEVICE, x.data_mut())
    }

    fn leave(&self) {
        self.communicator.leave();
    }

    fn rejoin(&self) -> Result<()> {
        self.communicator.rejoin();
        Ok(())
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        columns(out, x.cols());
        out.set_rows(rows.len());
        for (out, &row) in out.data_mut().chunks_exact_mut(x.cols()).zip(rows) {
            out.copy_from_slice(x.row(row as usize));
        }
        Ok(())
    }

    fn add_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        columns(x, out.cols());
        assert_eq!(x.rows(), rows.len(), "a place for each row");
        let cols = out.cols();
        for (i, &row) in rows.iter().enumerate() {
            let out = &mut out.data_mut()[row as usize * cols..][..cols];
            self.isa.run(Add { x: out, y: x.row(i) });
        }
        Ok(())
    }

    fn clear_blocks(&self, cache: &mut KvCache, kept: &[u32], passing: &[u32]) -> Result<()> {
        kept.iter().for_each(|&block| cache.clear_kept(block as usize));
        passing.iter().for_each(|&block| cache.clear_passing(block as usize));
        Ok(())
    }

    fn write(&self, data: &[f32], out: &mut Tensor) -> Result<()> {
        assert_eq!(data.len() % out.cols(), 0, "whole rows");
        out.set_rows(data.len() / out.cols());
        out.data_mut().copy_from_slice(data);
        Ok(())
    }

    fn read(&self, x: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(x.data());
        Ok(())
    }

    fn choose(&self, logits: &Tensor, draws: &[Draw]) -> Result<Vec<Option<u32>>> {
        Ok(self.scratch().drawer.choose(logits.data(), logits.cols(), draws))
    }

    fn submit(&self) -> Result<Vec<Option<u32>>> {
        Ok(Vec::new())
    }

    fn read_chosen(&self, chosen: &Vec<Option<u32>>, out: &mut Vec<Option<u32>>) -> Result<()> {
        out.clone_from(chosen);
        Ok(())
    }
}

impl LatentOps for CpuBackend {
    type Latent = Latent;

    fn latent_weight(&self, src: &HostLatent<'_>) -> Result<Latent> {
        Latent::new(&self.pool, src)
    }

    fn latent_attention(
        &self,
        q: &Tensor,
        latent: &Tensor,
        rope_key: &Tensor,
        weight: &Latent,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        self.latents(q, latent, rope_key, None, weight, (cache, layer), plan, scale, out)
    }

    fn layer_norm_in_place(&self, x: &mut Tensor, [weight, bias]: [&Vec<f32>; 2], eps: f32) -> Result<()> {
        columns(x, weight.len());
        self.each_row(x, work::NORM, |_, x| self.isa.run(LayerNorm { x, weight, bias, eps }));
        Ok(())
    }

    fn indexed_attention(
        &self,
        q: &Tensor,
        latent: &Tensor,
        rope_key: &Tensor,
        indexer: &Indexer<'_, Self>,
        weight: &Latent,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        self.latents(q, latent, rope_key, Some(indexer), weight, (cache, layer), plan, scale, out)
    }
}

impl CpuBackend {
    /// Attention to latents, all of them or those that an indexer chooses.
    #[allow(clippy::too_many_arguments)] // as in the seam
    fn latents(
        &self,
        q: &Tensor,
        latent: &Tensor,
        rope_key: &Tensor,
        indexer: Option<&Indexer<'_, Self>>,
        weight: &Latent,
        (cache, layer): (&mut KvCache, usize),
        plan: &AttentionPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        let Layer::Latent { rows: plane, index } = &mut cache.layers[layer] else {
            panic!("layer {layer} caches keys and values")
        };
        columns(q, weight.heads() * (weight.nope + weight.rope));
        columns(latent, weight.rank);
        columns(rope_key, weight.rope);
        columns(out, weight.heads() * weight.v);
        for rows in [q.rows(), latent.rows(), rope_key.rows()] {
            assert_eq!(rows, plan.rows(), "rows of the step");
        }
        for row in 0..plan.rows() {
            plane.put(plan.slot(row), 0, 0, latent.row(row));
            plane.put(plan.slot(row), 1, rope_start(weight.rank), rope_key.row(row));
        }
        let chosen = indexer.map(|indexer| {
            let keys = index.as_mut().unwrap_or_else(|| panic!("layer {layer} has no indexer"));
            columns(indexer.q, indexer.weights.cols() * indexer.k.cols());
            for row in 0..plan.rows() {
                keys.put(plan.slot(row), 0, 0, indexer.k.row(row));
            }
            let Indexer { q, weights, top_k, .. } = *indexer;
            let choice = Choice { q, weights, top_k, keys: Keys::Positions(keys) };
            Chosen::new((&self.pool, self.isa), &choice, plan)
        });
        out.set_rows(q.rows());
        let target = Target::new(out.data_mut(), weight.heads() * weight.v);
        latent::attend(&self.pool, self.isa, q, weight, plane, plan, chosen.as_ref(), scale, &target);
        Ok(())
    }
}

impl MoeOps for CpuBackend {
    type Experts = Experts;

    fn expert_weights(&self, src: HostExperts<'_>) -> Result<Experts> {
        Experts::new(&self.pool, src)
    }

    fn fused_moe(&self, x: &Tensor, logits: &Tensor, experts: &Experts, out: &mut Tensor) -> Result<()> {
        self.experts(x, moe::Router { logits, ids: None }, experts, out)
    }
}

impl CpuBackend {
    /// Experts, chosen by scores or by tokens.
    fn experts(&self, x: &Tensor, router: moe::Router<'_>, experts: &Experts, out: &mut Tensor) -> Result<()> {
        columns(out, x.cols());
        columns(router.logits, experts.count());
        out.set_rows(x.rows());
        assert_eq!(router.logits.rows(), x.rows(), "rows of the step");
        let mut scratch = self.scratch();
        moe::fused(&self.pool, self.isa, (x, router), experts, &mut scratch.moe, out.data_mut());
        Ok(())
    }
}
