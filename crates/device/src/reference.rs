//! The naive backend: plain loops in f32, one thread, the formula and nothing else. It judges every
//! other backend, so it must stay obvious; it is never made faster.

mod compressed;
mod latent;

use std::collections::BTreeSet;
use std::f32::consts::FRAC_2_PI;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use half::{bf16, f16};

use crate::{
    Activation, AttentionBatch, AttentionParams, Backend, BlockFormat, Caps, Communicator, DType, Draw, Drawer,
    HostExperts, HostLinear, HostRope, HostTensor, KvBlocks, KvDtype, KvSpec, LayerKv, MoeOps, Op, Purpose, Result,
    RopeLayout, Routing, Rows, TokenIds, WeightFormat, World, select_experts,
};

/// The judge.
pub struct Reference {
    caps: Caps,
    communicator: Communicator,
}

impl Reference {
    /// A reference device. Its blocks are small, so that tests cross many block borders.
    pub fn new() -> Self {
        let [alone] = Self::ranks(1, Duration::ZERO).try_into().unwrap_or_else(|_| unreachable!("one rank"));
        alone
    }

    /// As a device that says something else of itself, for tests of what depends on that.
    pub fn saying(mut self, change: impl FnOnce(&mut Caps)) -> Self {
        change(&mut self.caps);
        self
    }

    /// Ranks that compute a model together, none of which waits longer than `timeout` for the others.
    pub fn ranks(size: usize, timeout: Duration) -> Vec<Self> {
        Communicator::new(size, timeout).into_iter().map(Self::with).collect()
    }

    fn with(communicator: Communicator) -> Self {
        use WeightFormat::{BF16, F16, F32, Ggml};
        Self {
            caps: Caps {
                device: "reference".into(),
                isa: "scalar".into(),
                threads: 1,
                kv_block_size: 8,
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
                narrow_activations: BTreeSet::new(),
                row_invariant: true,
                runs_ahead: false,
                replays_steps: false,
            },
            communicator,
        }
    }
}

impl Default for Reference {
    fn default() -> Self {
        Self::new()
    }
}

/// `[rows, cols]`, row-major.
pub struct Tensor {
    data: Vec<f32>,
    cols: usize,
    capacity: usize,
}

impl Tensor {
    fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols..(r + 1) * self.cols]
    }

    fn row_mut(&mut self, r: usize) -> &mut [f32] {
        &mut self.data[r * self.cols..(r + 1) * self.cols]
    }

    fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.capacity, "{rows} rows in a tensor of {}", self.capacity);
        self.data.resize(rows * self.cols, 0.0);
    }
}

impl Rows for Tensor {
    fn rows(&self) -> usize {
        self.data.len() / self.cols
    }

    fn cols(&self) -> usize {
        self.cols
    }
}

/// Weight values after rounding to their format.
pub struct Linear {
    out_features: usize,
    in_features: usize,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    /// Whether rows may be looked up. Nothing here is in the way; elsewhere the weight may lie otherwise.
    table: bool,
}

impl Linear {
    fn new(src: &HostTensor<'_>, bias: Option<&HostTensor<'_>>, format: WeightFormat) -> Result<Self> {
        let &[out_features, in_features] = src.shape() else {
            panic!("{}: a linear weight has two dimensions, not {:?}", src.name(), src.shape())
        };
        src.expect_keepable(format)?;
        if let Some(bias) = bias {
            bias.expect_shape(&[out_features])?;
        }
        let weight = match format {
            WeightFormat::F32 | WeightFormat::Coded(_) => src.to_f32(),
            WeightFormat::F16 => src.to_f32().iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
            WeightFormat::BF16 => src.to_f32().iter().map(|&v| bf16::from_f32(v).to_f32()).collect(),
            WeightFormat::Ggml(blocks) if src.dtype() == DType::Ggml(blocks) => src.to_f32(),
            WeightFormat::Ggml(blocks) => {
                let mut values = vec![0.0; src.len()];
                blocks.dequantize(&src.to_blocks(&|values| blocks.quantize(values)), &mut values);
                values
            }
        };
        Ok(Self { out_features, in_features, weight, bias: bias.map(HostTensor::to_f32), table: false })
    }

    fn row(&self, r: usize) -> &[f32] {
        &self.weight[r * self.in_features..(r + 1) * self.in_features]
    }

    fn apply(&self, x: &[f32], out: &mut [f32]) {
        assert_eq!((x.len(), out.len()), (self.in_features, self.out_features));
        let (fours, rest) = out.as_chunks_mut();
        for (i, four) in fours.iter_mut().enumerate() {
            *four = four_dots(x, std::array::from_fn(|j| self.row(4 * i + j)));
        }
        for (n, out) in (4 * fours.len()..).zip(rest) {
            *out = dot(x, self.row(n));
        }
        for (n, out) in out.iter_mut().enumerate() {
            *out += self.bias.as_ref().map_or(0.0, |b| b[n]);
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Four times [`dot`], side by side: one alone takes as long as its additions, each of which waits for the one before.
fn four_dots(x: &[f32], [a, b, c, d]: [&[f32]; 4]) -> [f32; 4] {
    let mut sums = [0.0; 4];
    for ((((x, a), b), c), d) in x.iter().zip(a).zip(b).zip(c).zip(d) {
        for (sum, w) in sums.iter_mut().zip([a, b, c, d]) {
            *sum += x * w;
        }
    }
    sums
}

impl Activation {
    fn apply(self, x: f32) -> f32 {
        match self {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => 0.5 * x * (1.0 + (FRAC_2_PI.sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        }
    }
}

/// Cosines and sines, `[positions, pairs]`.
pub struct Rope {
    pairs: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    /// Rotates the heads of one row.
    fn rotate(&self, row: &mut [f32], layout: RopeLayout, position: usize) {
        let RopeLayout { heads, head_dim, offset, dim, interleaved } = layout;
        assert_eq!((row.len(), dim), (heads * head_dim, 2 * self.pairs));
        let angles = position * self.pairs;
        for head in row.chunks_exact_mut(head_dim) {
            let part = &mut head[offset..][..dim];
            for i in 0..self.pairs {
                let (cos, sin) = (self.cos[angles + i], self.sin[angles + i]);
                let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + self.pairs) };
                (part[a], part[b]) = (part[a] * cos - part[b] * sin, part[b] * cos + part[a] * sin);
            }
        }
    }
}

/// Per layer planes: of keys and values, of latents, rotated keys and, where there is an indexer, its keys, or what
/// [`compressed::planes`] says.
pub struct KvCache {
    block_size: usize,
    kinds: Vec<LayerKv>,
    layers: Vec<Vec<Plane>>,
}

/// `[blocks * slots, width]`, values after rounding to their dtype.
struct Plane {
    /// Of a block.
    slots: usize,
    width: usize,
    head_dim: usize,
    dtype: KvDtype,
    data: Vec<f32>,
}

impl Plane {
    fn new((blocks, slots): (usize, usize), (heads, head_dim): (usize, usize), dtype: KvDtype) -> Self {
        let width = heads * head_dim;
        Self { slots, width, head_dim, dtype, data: vec![0.0; blocks * slots * width] }
    }

    fn slot(&self, s: usize) -> &[f32] {
        &self.data[s * self.width..(s + 1) * self.width]
    }

    fn put(&mut self, s: usize, x: &[f32]) {
        let slot = &mut self.data[s * self.width..(s + 1) * self.width];
        slot.copy_from_slice(x);
        slot.chunks_exact_mut(self.head_dim).for_each(|head| self.dtype.round(head));
    }
}

/// For every row: its position, and the cache slots of positions `0..=position`.
pub struct AttentionPlan {
    rows: Vec<Vec<usize>>,
    /// The passing table of each row's sequence.
    passing: Vec<Arc<[u32]>>,
}

impl AttentionPlan {
    fn position(&self, row: usize) -> usize {
        self.rows[row].len() - 1
    }

    fn slot(&self, row: usize) -> usize {
        self.rows[row][self.position(row)]
    }
}

/// Experts of a layer, `gate`, `up`, `down` each.
pub struct Experts {
    held: Range<usize>,
    /// Those held.
    experts: Vec<[Linear; 3]>,
    limit: Option<f32>,
    routing: Routing,
}

impl Experts {
    /// `out = Σ_e w_e · expert_e(x)` over what is chosen for each row.
    fn apply(&self, x: &Tensor, chosen: impl Fn(usize) -> Vec<(usize, f32)>, out: &mut Tensor) {
        out.set_rows(x.rows());
        for row in 0..x.rows() {
            out.row_mut(row).fill(0.0);
            for (e, weight) in chosen(row).into_iter().filter(|(e, _)| self.held.contains(e)) {
                let [gate, up, down] = &self.experts[e - self.held.start];
                let mut g = vec![0.0; gate.out_features];
                let mut u = vec![0.0; up.out_features];
                let mut y = vec![0.0; down.out_features];
                gate.apply(x.row(row), &mut g);
                up.apply(x.row(row), &mut u);
                if let Some(limit) = self.limit {
                    g.iter_mut().for_each(|g| *g = g.clamp(f32::NEG_INFINITY, limit));
                    u.iter_mut().for_each(|u| *u = u.clamp(-limit, limit));
                }
                for (g, u) in g.iter_mut().zip(&u) {
                    *g = Activation::Silu.apply(*g) * u;
                }
                down.apply(&g, &mut y);
                for (out, y) in out.row_mut(row).iter_mut().zip(&y) {
                    *out += weight * y;
                }
            }
        }
    }
}

fn norm(run: &mut [f32], weight: &[f32], eps: f32) {
    let mean = dot(run, run) / run.len() as f32;
    let inverse = 1.0 / (mean + eps).sqrt();
    for (v, w) in run.iter_mut().zip(weight) {
        *v = *v * inverse * w;
    }
}

fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for s in scores.iter_mut() {
        *s = (*s - max).exp();
        sum += *s;
    }
    for s in scores {
        *s /= sum;
    }
}

fn write_slots(plane: &mut Plane, x: &Tensor, plan: &AttentionPlan) {
    for row in 0..x.rows() {
        plane.put(plan.slot(row), x.row(row));
    }
}

impl Backend for Reference {
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
        Ok(Tensor { data: Vec::new(), cols, capacity })
    }

    fn vector(&self, src: &HostTensor<'_>) -> Result<Vec<f32>> {
        Ok(src.to_f32())
    }

    fn linear_weight(&self, src: &HostLinear<'_>) -> Result<Linear> {
        let linear = Linear::new(&src.weight, src.bias.as_ref(), src.format)?;
        Ok(Linear { table: src.purpose == Purpose::Table, ..linear })
    }

    fn rope_table(&self, src: &HostRope) -> Result<Rope> {
        let (cos, sin) = src.tables();
        Ok(Rope { pairs: src.inv_freq.len(), cos, sin })
    }

    fn kv_cache(&self, spec: &KvSpec, blocks: KvBlocks) -> Result<KvCache> {
        let KvSpec { layers: kinds, dtype, block_size } = spec.clone();
        let plane = |heads, width| Plane::new((blocks.kept, block_size), (heads, width), dtype);
        let planes = |layer: &LayerKv| match *layer {
            LayerKv::Full { kv_heads, head_dim } => vec![plane(kv_heads, head_dim), plane(kv_heads, head_dim)],
            LayerKv::Latent { rank, rope, index } => {
                [rank, rope].into_iter().chain(index).map(|width| plane(1, width)).collect()
            }
            LayerKv::Windowed { width, pool, .. } => compressed::planes(blocks, block_size, width, pool, dtype),
        };
        let layers = kinds.iter().map(planes).collect();
        Ok(KvCache { block_size, kinds, layers })
    }

    fn plan_attention(&self, batch: &AttentionBatch<'_>) -> Result<AttentionPlan> {
        let size = self.caps.kv_block_size;
        let (mut rows, mut passing) = (Vec::new(), Vec::new());
        for s in batch.sequences {
            let slot = |p: usize| s.block_table[p / size] as usize * size + p % size;
            rows.extend((s.start..s.start + s.len).map(|position| (0..=position).map(slot).collect()));
            passing.resize(rows.len(), s.passing_table.into());
        }
        Ok(AttentionPlan { rows, passing })
    }

    fn embed(&self, ids: TokenIds<'_, Self::Chosen>, table: &Linear, out: &mut Tensor) -> Result<()> {
        assert!(table.table, "rows are looked up in what was prepared as a table");
        let ids = ids.on_host();
        out.set_rows(ids.len());
        for (row, &id) in ids.iter().enumerate() {
            out.row_mut(row).copy_from_slice(table.row(id as usize));
        }
        Ok(())
    }

    fn rms_norm(&self, x: &Tensor, weight: &Vec<f32>, eps: f32, out: &mut Tensor) -> Result<()> {
        out.set_rows(x.rows());
        out.data.copy_from_slice(&x.data);
        self.rms_norm_in_place(out, weight, eps)
    }

    fn rms_norm_in_place(&self, x: &mut Tensor, weight: &Vec<f32>, eps: f32) -> Result<()> {
        assert_eq!(x.cols % weight.len(), 0, "a norm over {} of {} columns", weight.len(), x.cols);
        x.data.chunks_exact_mut(weight.len()).for_each(|run| norm(run, weight, eps));
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
        x.data.iter_mut().for_each(|x| *x *= factor);
        Ok(())
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        x.data.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        Ok(())
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        assert_eq!(x.data.len(), y.data.len());
        for (x, y) in x.data.iter_mut().zip(&y.data) {
            *x += y;
        }
        Ok(())
    }

    fn linear(&self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<()> {
        out.set_rows(x.rows());
        for row in 0..x.rows() {
            weight.apply(x.row(row), out.row_mut(row));
        }
        Ok(())
    }

    fn rope(&self, x: &mut Tensor, layout: RopeLayout, table: &Rope, plan: &AttentionPlan) -> Result<()> {
        (0..x.rows()).for_each(|row| table.rotate(x.row_mut(row), layout, plan.position(row)));
        Ok(())
    }

    fn gated_activation(&self, activation: Activation, gate: &Tensor, up: &Tensor, out: &mut Tensor) -> Result<()> {
        assert_eq!(gate.data.len(), up.data.len());
        out.set_rows(gate.rows());
        for ((out, g), u) in out.data.iter_mut().zip(&gate.data).zip(&up.data) {
            *out = activation.apply(*g) * u;
        }
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
        let AttentionParams { heads, kv_heads, head_dim, scale, softcap, .. } = *params;
        let [keys, values] = &mut cache.layers[layer][..] else { panic!("layer {layer} caches latents") };
        write_slots(keys, k, plan);
        write_slots(values, v, plan);
        out.set_rows(q.rows());
        for row in 0..q.rows() {
            let context = &plan.rows[row][params.first_visible(plan.position(row))..];
            for head in 0..heads {
                let query = &q.row(row)[head * head_dim..][..head_dim];
                let kv = head / (heads / kv_heads) * head_dim;
                let score = |s: usize| scale * dot(query, &keys.slot(s)[kv..][..head_dim]);
                let capped = |score: f32| softcap.map_or(score, |cap| cap * (score / cap).tanh());
                let mut scores: Vec<f32> = context.iter().map(|&s| capped(score(s))).collect();
                softmax(&mut scores);
                let out = &mut out.row_mut(row)[head * head_dim..][..head_dim];
                weighted_sum(&scores, context.iter().map(|&s| &values.slot(s)[kv..][..head_dim]), out);
            }
        }
        Ok(())
    }

    fn all_reduce(&self, x: &mut Tensor) -> Result<()> {
        self.communicator.all_reduce(&self.caps.device, &mut x.data)
    }

    fn leave(&self) {
        self.communicator.leave();
    }

    fn rejoin(&self) -> Result<()> {
        self.communicator.rejoin();
        Ok(())
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        out.set_rows(rows.len());
        for (i, &row) in rows.iter().enumerate() {
            out.row_mut(i).copy_from_slice(x.row(row as usize));
        }
        Ok(())
    }

    fn add_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        assert_eq!((x.rows(), x.cols), (rows.len(), out.cols));
        for (i, &row) in rows.iter().enumerate() {
            for (out, x) in out.row_mut(row as usize).iter_mut().zip(x.row(i)) {
                *out += x;
            }
        }
        Ok(())
    }

    fn clear_blocks(&self, cache: &mut KvCache, kept: &[u32], passing: &[u32]) -> Result<()> {
        for (kind, planes) in cache.kinds.iter().zip(&mut cache.layers) {
            for (i, plane) in planes.iter_mut().enumerate() {
                let passes = matches!(kind, LayerKv::Windowed { .. }) && i.is_multiple_of(2);
                let stride = plane.slots * plane.width;
                for &block in if passes { passing } else { kept } {
                    plane.data[block as usize * stride..][..stride].fill(0.0);
                }
            }
        }
        Ok(())
    }

    fn write(&self, data: &[f32], out: &mut Tensor) -> Result<()> {
        assert_eq!(data.len() % out.cols, 0);
        out.set_rows(data.len() / out.cols);
        out.data.copy_from_slice(data);
        Ok(())
    }

    fn read(&self, x: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(&x.data);
        Ok(())
    }

    fn choose(&self, logits: &Tensor, draws: &[Draw]) -> Result<Vec<Option<u32>>> {
        Ok(Drawer::default().choose(&logits.data, logits.cols, draws))
    }

    fn submit(&self) -> Result<Vec<Option<u32>>> {
        Ok(Vec::new())
    }

    fn read_chosen(&self, chosen: &Vec<Option<u32>>, out: &mut Vec<Option<u32>>) -> Result<()> {
        out.clone_from(chosen);
        Ok(())
    }
}

fn weighted_sum<'a>(weights: &[f32], rows: impl Iterator<Item = &'a [f32]>, out: &mut [f32]) {
    out.fill(0.0);
    for (w, row) in weights.iter().zip(rows) {
        for (out, v) in out.iter_mut().zip(row) {
            *out += w * v;
        }
    }
}

impl MoeOps for Reference {
    type Experts = Experts;

    fn expert_weights(&self, src: HostExperts<'_>) -> Result<Experts> {
        let HostExperts { held, source, formats: [gate, up, down], limit, routing, .. } = src;
        let expert = |e: usize| {
            let [g, u, d] = source.expert(e)?;
            Ok([Linear::new(&g, None, gate)?, Linear::new(&u, None, up)?, Linear::new(&d, None, down)?])
        };
        Ok(Experts { experts: held.clone().map(expert).collect::<Result<_>>()?, held, limit, routing })
    }

    fn fused_moe(&self, x: &Tensor, logits: &Tensor, experts: &Experts, out: &mut Tensor) -> Result<()> {
        experts.apply(x, |row| select_experts(logits.row(row), &experts.routing), out);
        Ok(())
    }
}
