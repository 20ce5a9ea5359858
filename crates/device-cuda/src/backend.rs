//! The device traits. What an operation does is in the file of its kind; here it is only found.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use baton_device::{
    Activation, AttentionBatch, AttentionParams, Backend, Caps, CompressedOps, DType, DeviceError, DeviceMemory, Draw,
    HostExperts, HostLatent, HostLinear, HostRope, HostTensor, KvBlocks, KvSpec, LatentOps, Limits, MoeOps, Op, Result,
    RopeLayout, Rotary, Rows, StepMemory, TokenIds, World,
};

use crate::attention::AttentionKernels;
use crate::cache::{self, KvCache};
use crate::choose::{Chooser, Chosen};
use crate::gpu::{Gpu, GpuOptions};
use crate::heads::{self, Rope};
use crate::latent::{Latent, LatentKernels};
use crate::libraries;
use crate::limits;
use crate::linear::{self, Linear, LinearKernels};
use crate::moe::{Experts, MoeKernels};
use crate::plan::{AttentionPlan, Planner};
use crate::program::Source;
use crate::ranks::{self, Place};
use crate::rows::RowKernels;
use crate::statistics::Statistics;
use crate::tensor::{DataType, Tensor, Vector};

/// How a GPU is opened.
#[derive(Debug, Clone)]
pub struct CudaOptions {
    /// Number among the devices that the driver shows.
    pub device: u32,
    /// Element type of activations; that of the checkpoint is natural. f32 computes everything in f32, for comparisons.
    pub activations: DType,
    /// Where compiled kernels are kept, a folder that its owner alone can write to; in memory if `None`.
    pub cache: Option<PathBuf>,
    /// Replay steps that come again as graphs.
    pub graphs: bool,
    /// Make every buffer an allocation of its own, so that the checks of driver and tools see what reaches beyond one.
    pub isolated: bool,
}

impl Default for CudaOptions {
    /// The first GPU in bf16, kernels compiled once in a process, steps replayed.
    fn default() -> Self {
        Self { device: 0, activations: DType::BF16, cache: None, graphs: true, isolated: false }
    }
}

/// An NVIDIA GPU.
pub struct CudaBackend {
    caps: Caps,
    activations: DataType,
    rows: RowKernels,
    chooser: Chooser,
    linear: LinearKernels,
    attention: AttentionKernels,
    latent: LatentKernels,
    moe: MoeKernels,
    planner: Planner,
    place: Place,
    gpu: Arc<Gpu>,
}

impl CudaBackend {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] with what is missing: libraries, driver, device, or a chip that is new enough.
    pub fn new(options: &CudaOptions) -> Result<Self> {
        let CudaOptions { device, activations, ref cache, graphs, isolated } = *options;
        let name = format!("cuda:{device}");
        libraries::ready(&name)?;
        let Some(dtype) = DataType::of(activations) else {
            let reason = format!("activations are floats, not {activations}");
            return Err(DeviceError::Unavailable { device: name, reason });
        };
        let gpu = Gpu::open(&GpuOptions { device, cache: cache.clone(), graphs, isolated })?;
        let (major, minor) = gpu.capability();
        let caps = Caps {
            device: name,
            isa: format!("sm_{major}{minor}"),
            threads: 1,
            kv_block_size: cache::BLOCK,
            kv_dtypes: cache::kv_dtypes(dtype),
            weight_formats: linear::weight_formats(),
            activations,
            ops: BTreeSet::from([Op::PagedAttention, Op::LatentAttention, Op::FusedMoe]),
            narrow_activations: linear::narrow(dtype),
            row_invariant: false,
            runs_ahead: true,
            replays_steps: graphs,
        };
        Ok(Self {
            caps,
            activations: dtype,
            rows: RowKernels::new(&gpu, dtype)?,
            chooser: Chooser::new(&gpu, dtype)?,
            linear: LinearKernels::new(&gpu, dtype)?,
            attention: AttentionKernels::new(&gpu, dtype)?,
            latent: LatentKernels::new(&gpu, dtype)?,
            moe: MoeKernels::new(&gpu, dtype)?,
            planner: Planner::new(&gpu)?,
            place: Place::alone(),
            gpu,
        })
    }

    /// Opens several GPUs as the ranks of one model, in this order; `options.device` is none of them.
    ///
    /// # Errors
    /// As [`CudaBackend::new`], and [`DeviceError::Execution`] if they cannot be joined.
    pub fn ranks(options: &CudaOptions, devices: &[u32]) -> Result<Vec<Self>> {
        let open = |&device| Self::new(&CudaOptions { device, ..options.clone() });
        let mut backends: Vec<_> = devices.iter().map(open).collect::<Result<_>>()?;
        let gpus: Vec<_> = backends.iter().map(|backend| backend.gpu.clone()).collect();
        let places = ranks::join(&gpus, devices)?;
        backends.iter_mut().zip(places).for_each(|(backend, place)| backend.place = place);
        Ok(backends)
    }

    /// Measures what the device does at most, in the type of activations: bytes copied within its memory, each counted as it
    /// is read and as it is written, and multiply-adds of a large product.
    ///
    /// # Errors
    /// No memory for that, and what fails on the device.
    pub fn limits(&self) -> Result<Limits> {
        let mul_adds = limits::multiplied(&self.gpu, self.activations)?;
        let mul_adds = [(self.caps.activations.to_string(), mul_adds)].into();
        Ok(Limits { bytes: limits::copied(&self.gpu)?, access: "copy", mul_adds })
    }

    /// What was done so far.
    pub fn statistics(&self) -> Statistics {
        self.gpu.statistics()
    }

    /// The kernels that were asked for so far, by name expression.
    pub fn kernels(&self) -> Vec<(Source, String)> {
        self.gpu.kernels()
    }
}

impl Backend for CudaBackend {
    type Tensor = Tensor;
    type Vector = Vector;
    type Linear = Linear;
    type Rope = Rope;
    type KvCache = KvCache;
    type AttentionPlan = AttentionPlan;
    type Chosen = Chosen;

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn world(&self) -> World {
        self.place.world
    }

    fn memory(&self) -> Result<Option<DeviceMemory>> {
        self.gpu.memory().map(Some)
    }

    fn rehearse(&self, steps: impl FnOnce() -> Result<()>) -> Result<StepMemory> {
        self.gpu.rehearse(steps)
    }

    fn tensor(&self, capacity: usize, cols: usize) -> Result<Tensor> {
        Tensor::new(&self.gpu, capacity, cols, self.activations)
    }

    fn vector(&self, src: &HostTensor<'_>) -> Result<Vector> {
        Vector::new(&self.gpu, src)
    }

    fn linear_weight(&self, src: &HostLinear<'_>) -> Result<Linear> {
        self.linear.weight(src)
    }

    fn rope_table(&self, src: &HostRope) -> Result<Rope> {
        Rope::new(&self.gpu, src)
    }

    fn kv_cache(&self, spec: &KvSpec, blocks: KvBlocks) -> Result<KvCache> {
        let cache = KvCache::new(&self.gpu, self.activations, spec, blocks.kept)?;
        // Made when all weights are there, so that the kernels that these need are known: no step waits for a compiler.
        self.gpu.compile()?;
        Ok(cache)
    }

    fn plan_attention(&self, batch: &AttentionBatch<'_>) -> Result<AttentionPlan> {
        self.planner.plan(batch)
    }

    fn embed(&self, ids: TokenIds<'_, Chosen>, table: &Linear, out: &mut Tensor) -> Result<()> {
        self.linear.embed(&self.chooser.ids(ids), self.chooser.tokens()?, table, out)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Vector, eps: f32, out: &mut Tensor) -> Result<()> {
        self.rows.rms_norm(x, weight, eps, out)
    }

    fn rms_norm_in_place(&self, x: &mut Tensor, weight: &Vector, eps: f32) -> Result<()> {
        self.rows.rms_norm_in_place(x, weight, eps)
    }

    fn add_rms_norm(
        &self,
        x: &Tensor,
        residual: &mut Tensor,
        weight: &Vector,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        self.rows.add_rms_norm(x, residual, weight, eps, out)
    }

    fn scale(&self, x: &mut Tensor, factor: f32) -> Result<()> {
        self.rows.scale(x, factor)
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        self.rows.softcap(x, cap)
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        self.rows.add(x, y)
    }

    fn linear(&self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<()> {
        self.linear.group(x, &mut [(weight, out)])
    }

    fn linear_group(&self, x: &Tensor, group: &mut [(&Linear, &mut Tensor)]) -> Result<()> {
        self.linear.group(x, group)
    }

    fn rope(&self, x: &mut Tensor, layout: RopeLayout, table: &Rope, plan: &AttentionPlan) -> Result<()> {
        heads::rotate(&self.gpu, x, layout, table, plan)
    }

    fn gated_activation(&self, activation: Activation, gate: &Tensor, up: &Tensor, out: &mut Tensor) -> Result<()> {
        self.rows.gated_activation(activation, gate, up, out)
    }

    fn gated_linear(
        &self,
        activation: Activation,
        x: &Tensor,
        [(gate, gate_out), (up, up_out)]: [(&Linear, &mut Tensor); 2],
        out: &mut Tensor,
    ) -> Result<()> {
        if self.linear.gated(activation, x, [gate, up], out)? {
            return Ok(());
        }
        self.linear.group(x, &mut [(gate, &mut *gate_out), (up, &mut *up_out)])?;
        self.rows.gated_activation(activation, gate_out, up_out, out)
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
        self.attention.paged(q, k, v, None, cache, layer, plan, params, out)
    }

    fn rotary_attention(
        &self,
        q: &mut Tensor,
        k: &mut Tensor,
        v: &Tensor,
        rotary: &Rotary<'_, Self>,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        params: &AttentionParams,
        out: &mut Tensor,
    ) -> Result<()> {
        self.attention.paged(q, k, v, Some(rotary), cache, layer, plan, params, out)
    }

    fn all_reduce(&self, x: &mut Tensor) -> Result<()> {
        self.place.all_reduce(&self.gpu, x)
    }

    fn leave(&self) {
        self.place.leave();
    }

    fn rejoin(&self) -> Result<()> {
        self.place.rejoin(self.gpu.name())
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        self.rows.gather_rows(x, rows, out)
    }

    fn add_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        self.rows.add_rows(x, rows, out)
    }

    fn clear_blocks(&self, cache: &mut KvCache, blocks: &[u32], _: &[u32]) -> Result<()> {
        cache.clear(&self.gpu, blocks)
    }

    fn write(&self, data: &[f32], out: &mut Tensor) -> Result<()> {
        assert!(data.len().is_multiple_of(out.cols()), "{} numbers in rows of {}", data.len(), out.cols());
        let address = out.output(data.len() / out.cols(), self.activations);
        self.gpu.upload_to(address, &self.activations.encode(data))
    }

    fn read(&self, x: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        if x.rows() > 0 {
            let mut bytes = vec![0; x.bytes()];
            self.gpu.read(x.address(), &mut bytes)?;
            self.place.whole(self.gpu.name())?;
            x.dtype().decode(&bytes, out);
        }
        Ok(())
    }

    fn choose(&self, logits: &Tensor, draws: &[Draw]) -> Result<Chosen> {
        self.chooser.choose(Some(logits), logits.cols(), draws, None)
    }

    fn choose_for_all(&self, logits: Option<&Tensor>, cols: usize, draws: &[Draw]) -> Result<Chosen> {
        self.chooser.choose(logits, cols, draws, Some(&self.place))
    }

    fn submit(&self) -> Result<Chosen> {
        self.chooser.choose_nothing()
    }

    fn read_chosen(&self, chosen: &Chosen, out: &mut Vec<Option<u32>>) -> Result<()> {
        self.chooser.read(chosen, out)?;
        self.place.whole(self.gpu.name())
    }
}

impl LatentOps for CudaBackend {
    type Latent = Latent;

    fn latent_weight(&self, src: &HostLatent<'_>) -> Result<Latent> {
        self.latent.weight(src)
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
        self.latent.attend(q, latent, rope_key, None, weight, cache, layer, plan, scale, out)
    }

    fn rotary_latent_attention(
        &self,
        q: &mut Tensor,
        latent: &mut Tensor,
        rope_key: &mut Tensor,
        rotary: &Rotary<'_, Self>,
        weight: &Latent,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        self.latent.attend(q, latent, rope_key, Some(rotary), weight, cache, layer, plan, scale, out)
    }
}

impl MoeOps for CudaBackend {
    type Experts = Experts;

    fn expert_weights(&self, src: HostExperts<'_>) -> Result<Experts> {
        self.moe.experts(src)
    }

    fn fused_moe(&self, x: &Tensor, logits: &Tensor, experts: &Experts, out: &mut Tensor) -> Result<()> {
        self.moe.fused(x, logits, experts, out)
    }
}

/// Not offered.
impl CompressedOps for CudaBackend {}
