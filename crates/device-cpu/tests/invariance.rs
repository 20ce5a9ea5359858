//! A row's bits depend on its own inputs alone: not on the other rows of the step, not on how a
//! sequence is cut into steps, not on the number of threads. For every instruction set of this
//! machine and every weight format.

use std::rc::Rc;

use baton_device::conformance::{passing_table, random_blocks, uniform};
use baton_device::{
    Activation, AttentionBatch, AttentionParams, Backend, BlockFormat, CompressedOps, DType, Entries, GroupScore,
    Groups, HostExperts, HostLatent, HostLinear, HostRope, HostTensor, Indexer, KvBlocks, KvDtype, KvSpec, LatentOps,
    LayerKv, Mixing, MoeOps, PASSED, PoolKv, Pooling, Purpose, Reads, RopeLayout, Routing, Scoring, SequenceSpan,
    TokenIds, WeightFormat, WindowedParams,
};
use baton_device_cpu::{CpuBackend, CpuOptions, Isa, KvCache, Tensor};
use proptest::prelude::*;

const BLOCKS: WeightFormat = WeightFormat::Ggml(BlockFormat::Q8_0);
const FORMATS: [WeightFormat; 4] = [WeightFormat::F32, WeightFormat::F16, WeightFormat::BF16, BLOCKS];

fn all_formats() -> Vec<WeightFormat> {
    FORMATS[..3].iter().copied().chain(BlockFormat::ALL.map(WeightFormat::Ggml)).collect()
}

/// One backend for each instruction set and each of 1, 2 and 3 threads.
fn backends() -> Vec<Vec<CpuBackend>> {
    let backend = |isa, threads| CpuBackend::new(&CpuOptions { threads, isa: Some(isa) }).unwrap();
    Isa::available().into_iter().map(|isa| [1, 2, 3].map(|threads| backend(isa, threads)).into()).collect()
}

/// Those of each instruction set, with each way to keep a cache.
fn backends_and_dtypes() -> Vec<(Rc<Vec<CpuBackend>>, KvDtype)> {
    let with_each = |same_isa| {
        let same_isa = Rc::new(same_isa);
        KvDtype::ALL.map(|dtype| (Rc::clone(&same_isa), dtype))
    };
    backends().into_iter().flat_map(with_each).collect()
}

/// A stored f32 tensor.
struct Stored(Vec<usize>, Vec<u8>);

impl Stored {
    fn new(seed: u64, shape: &[usize]) -> Self {
        let values = uniform(seed, shape.iter().product(), 0.3);
        Self(shape.to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    fn tensor(&self) -> HostTensor<'_> {
        HostTensor::new("test", DType::F32, self.0.clone(), &self.1)
    }
}

fn tensor(b: &CpuBackend, rows: usize, cols: usize, data: &[f32]) -> Tensor {
    let mut t = b.tensor(rows, cols).unwrap();
    b.write(data, &mut t).unwrap();
    t
}

fn bits(b: &CpuBackend, t: &Tensor) -> Vec<u32> {
    let mut out = Vec::new();
    b.read(t, &mut out).unwrap();
    out.into_iter().map(f32::to_bits).collect()
}

/// Checks that `op`, applied to all rows at once on any number of threads, gives each row the bits
/// that it has alone. `op` takes one slice of rows per input.
fn rows_alone_equal_rows_together(
    same_isa: &[CpuBackend],
    rows: usize,
    inputs: &[(usize, Vec<f32>)],
    op: impl Fn(&CpuBackend, &[Tensor], usize) -> Tensor,
) -> Result<(), TestCaseError> {
    let run = |b: &CpuBackend, from: usize, count: usize| {
        let part =
            |(cols, data): &(usize, Vec<f32>)| tensor(b, count, *cols, &data[from * cols..(from + count) * cols]);
        bits(b, &op(b, &inputs.iter().map(part).collect::<Vec<_>>(), count))
    };
    let alone: Vec<u32> = (0..rows).flat_map(|r| run(&same_isa[0], r, 1)).collect();
    for b in same_isa {
        prop_assert!(run(b, 0, rows) == alone, "{} with {} threads", b.caps().isa, b.caps().threads);
    }
    Ok(())
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn a_linear_row_does_not_depend_on_its_batch(
        rows in 1..80usize, blocks in 1..9usize, cut in 0..32usize, out_features in 1..200usize, bias: bool, seed in 0..1000u64,
    ) {
        for same_isa in backends() {
            for format in FORMATS {
                let in_features = if format == BLOCKS { 32 * blocks } else { 32 * blocks - cut };
                let weight = Stored::new(seed, &[out_features, in_features]);
                let bias_values = Stored::new(seed + 1, &[out_features]);
                let (weight, bias) = (weight.tensor(), bias.then(|| bias_values.tensor()));
                let src = HostLinear { weight, bias, format, purpose: Purpose::Product };
                let inputs = [(in_features, uniform(seed + 2, rows * in_features, 1.0))];
                rows_alone_equal_rows_together(&same_isa, rows, &inputs, |b, x, rows| {
                    let mut out = b.tensor(rows, out_features).unwrap();
                    b.linear(&x[0], &b.linear_weight(&src).unwrap(), &mut out).unwrap();
                    out
                })?;
            }
        }
    }

    #[test]
    fn a_row_times_a_file_s_blocks_does_not_depend_on_its_batch(
        rows in 1..40usize, blocks in 1..4usize, out_features in 1..70usize, seed in 0..1000u64,
        format in prop::sample::select(BlockFormat::ALL.to_vec()),
    ) {
        let in_features = blocks * format.elements();
        let data = random_blocks(format, seed, out_features * in_features, 0.3);
        let weight = HostTensor::new("test", DType::Ggml(format), vec![out_features, in_features], &data);
        let src = HostLinear { weight, bias: None, format: WeightFormat::Ggml(format), purpose: Purpose::Product };
        let inputs = [(in_features, uniform(seed + 2, rows * in_features, 1.0))];
        for same_isa in backends() {
            rows_alone_equal_rows_together(&same_isa, rows, &inputs, |b, x, rows| {
                let mut out = b.tensor(rows, out_features).unwrap();
                b.linear(&x[0], &b.linear_weight(&src).unwrap(), &mut out).unwrap();
                out
            })?;
        }
    }

    #[test]
    fn a_group_has_the_bits_that_its_members_have_alone(
        rows in 1..70usize, blocks in 1..3usize, seed in 0..1000u64,
        members in prop::collection::vec((prop::sample::select(all_formats()), 1..150usize), 1..5),
    ) {
        let in_features = 256 * blocks;
        let x = uniform(seed, rows * in_features, 1.0);
        for b in backends().iter().flatten() {
            let x = tensor(b, rows, in_features, &x);
            let (mut linears, mut alone, mut together) = (Vec::new(), Vec::new(), Vec::new());
            for &(format, out_features) in &members {
                let (stored, data);
                let weight = match format {
                    WeightFormat::Ggml(block) => {
                        data = random_blocks(block, seed, out_features * in_features, 0.3);
                        HostTensor::new("test", DType::Ggml(block), vec![out_features, in_features], &data)
                    }
                    _ => {
                        stored = Stored::new(seed, &[out_features, in_features]);
                        stored.tensor()
                    }
                };
                let linear = b.linear_weight(&HostLinear { weight, bias: None, format, purpose: Purpose::Product }).unwrap();
                let mut out = b.tensor(rows, out_features).unwrap();
                b.linear(&x, &linear, &mut out).unwrap();
                alone.push(bits(b, &out));
                linears.push(linear);
                together.push(b.tensor(rows, out_features).unwrap());
            }
            b.linear_group(&x, &mut linears.iter().zip(&mut together).collect::<Vec<_>>()).unwrap();
            for (alone, together) in alone.iter().zip(&together) {
                prop_assert!(*alone == bits(b, together), "{} with {} threads", b.caps().isa, b.caps().threads);
            }
        }
    }

    #[test]
    fn an_expert_row_does_not_depend_on_its_batch(
        rows in 1..40usize, hidden in 1..4usize, inner in 1..4usize, top_k in 1..4usize, seed in 0..1000u64,
        limit in prop::option::of(0.05..0.5f32), by_token: bool,
    ) {
        const EXPERTS: usize = 8;
        const VOCAB: usize = 5;
        let (hidden, inner) = (32 * hidden, 32 * inner);
        let stored = |from: u64, shape: [usize; 2]| -> Vec<Stored> {
            (0..EXPERTS as u64).map(|e| Stored::new(seed + from + e, &shape)).collect()
        };
        let (gate, up) = (stored(0, [inner, hidden]), stored(10, [inner, hidden]));
        let down = stored(20, [hidden, inner]);
        let correction_bias = uniform(seed, EXPERTS, 0.1);
        let routing = Routing {
            top_k,
            scoring: match seed % 3 {
                0 => Scoring::Sigmoid { correction_bias },
                1 => Scoring::SqrtSoftplus { correction_bias },
                _ => Scoring::Softmax,
            },
            groups: Some(Groups { count: 4, kept: 2, score: GroupScore::TwoBest }),
            norm_topk_prob: true,
            scaling_factor: 1.5,
            by_token: by_token.then(|| (0..VOCAB * top_k).map(|i| (i * 3 % EXPERTS) as u32).collect()),
        };
        let id = |x: &f32| (x.abs() * 1e6) as u32 % VOCAB as u32;
        let inputs = [
            (hidden, uniform(seed + 30, rows * hidden, 1.0)),
            (EXPERTS, uniform(seed + 31, rows * EXPERTS, 1.0)),
        ];
        for same_isa in backends() {
            for format in FORMATS {
                let expert = |e: usize| [&gate[e], &up[e], &down[e]].map(Stored::tensor);
                let weights = |b: &CpuBackend| {
                    let source = &mut (0..EXPERTS).map(expert).collect::<Vec<_>>();
                    let routing = routing.clone();
                    let (count, held, formats) = (EXPERTS, 0..EXPERTS, [format; 3]);
                    b.expert_weights(HostExperts { count, held, source, formats, limit, routing }).unwrap()
                };
                rows_alone_equal_rows_together(&same_isa, rows, &inputs, |b, x, rows| {
                    let mut out = b.tensor(rows, hidden).unwrap();
                    if by_token {
                        let mut values = Vec::new();
                        b.read(&x[0], &mut values).unwrap();
                        let ids: Vec<u32> = values.iter().step_by(hidden).map(id).collect();
                        b.fused_moe_by_token(&x[0], &x[1], TokenIds::Known(&ids), &weights(b), &mut out).unwrap();
                    } else {
                        b.fused_moe(&x[0], &x[1], &weights(b), &mut out).unwrap();
                    }
                    out
                })?;
            }
        }
    }

    #[test]
    fn operations_on_rows_do_not_depend_on_the_batch(
        rows in 1..200usize, runs in 1..5usize, run in 1..300usize, seed in 0..1000u64,
    ) {
        let cols = runs * run;
        let weight = Stored::new(seed, &[run]);
        let inputs = [0, 1].map(|i| (cols, uniform(seed + i, rows * cols, 4.0)));
        for same_isa in backends() {
            for activation in [Activation::Silu, Activation::GeluTanh] {
                rows_alone_equal_rows_together(&same_isa, rows, &inputs, |b, x, rows| {
                    let mut gated = b.tensor(rows, cols).unwrap();
                    let mut out = b.tensor(rows, cols).unwrap();
                    b.gated_activation(activation, &x[0], &x[1], &mut gated).unwrap();
                    b.scale(&mut gated, 1.3).unwrap();
                    b.softcap(&mut gated, 5.0).unwrap();
                    b.add_rms_norm(&x[1], &mut gated, &b.vector(&weight.tensor()).unwrap(), 1e-5, &mut out).unwrap();
                    b.add(&mut out, &gated).unwrap();
                    out
                })?;
            }
        }
    }

    #[test]
    fn streams_do_not_depend_on_the_batch(
        rows in 1..100usize, streams in 1..6usize, hidden in 1..100usize, seed in 0..1000u64,
    ) {
        let columns = (2 + streams) * streams;
        let [base, scale] = [columns, 3].map(|len| Stored::new(seed, &[len]));
        let inputs = [hidden, streams * hidden, columns];
        let inputs = inputs.map(|cols| (cols, uniform(seed + cols as u64, rows * cols, 2.0)));
        for same_isa in backends() {
            rows_alone_equal_rows_together(&same_isa, rows, &inputs, |b, x, rows| {
                let copy = |x: &Tensor, cols: usize| {
                    let mut copy = b.tensor(rows, cols).unwrap();
                    b.gather_rows(x, &(0..rows as u32).collect::<Vec<_>>(), &mut copy).unwrap();
                    copy
                };
                let (mut all, mut weights) = (copy(&x[1], streams * hidden), copy(&x[2], columns));
                let [base, scale] = [&base, &scale].map(|stored| b.vector(&stored.tensor()).unwrap());
                let mixing = Mixing { streams, base: &base, scale: &scale, iterations: 20, eps: 1e-6 };
                b.stream_weights(&mixing, &mut weights).unwrap();
                b.mix_streams(&x[0], &weights, &mut all).unwrap();
                let mut out = b.tensor(rows, hidden).unwrap();
                b.join_streams(&all, &weights, &mut out).unwrap();
                b.fill_streams(&out, &mut all).unwrap();
                b.clamp(&mut all, -0.7, 0.9).unwrap();
                all
            })?;
        }
    }

    #[test]
    fn a_row_of_groups_does_not_depend_on_its_batch(
        rows in 1..50usize, groups in 1..5usize, inputs in 1..4usize, outputs in 1..70usize, seed in 0..1000u64,
    ) {
        let inputs = 32 * inputs;
        let weights: Vec<_> = (0..groups).map(|g| Stored::new(seed + g as u64, &[outputs, inputs])).collect();
        let x = [(groups * inputs, uniform(seed + 9, rows * groups * inputs, 1.0))];
        for same_isa in backends() {
            for format in FORMATS {
                rows_alone_equal_rows_together(&same_isa, rows, &x, |b, x, rows| {
                    let weight = |stored: &Stored| {
                        let (weight, purpose) = (stored.tensor(), Purpose::Product);
                        b.linear_weight(&HostLinear { weight, bias: None, format, purpose }).unwrap()
                    };
                    let mut out = b.tensor(rows, groups * outputs).unwrap();
                    let weights: Vec<_> = weights.iter().map(weight).collect();
                    b.grouped_linear(&x[0], &weights, &mut out).unwrap();
                    out
                })?;
            }
        }
    }

    #[test]
    fn attention_to_pools_does_not_depend_on_batch_chunks_or_threads(
        lens in prop::collection::vec(1..120usize, 1..4),
        cuts in prop::collection::vec(1..20usize, 1..8),
        (heads, width, window) in (1..7usize, 4..50usize, 1..90usize),
        (rate, overlaps) in (prop::sample::select(vec![1, 3, 4, 16, 20, 100]), any::<bool>()),
        index in prop::option::of((1..6usize, 4..30usize, 1..20usize)),
        seed in 0..1000u64,
    ) {
        let pools = Pools { heads, width, window, pool: PoolKv { rate, overlaps, index: index.map(|index| index.1) }, index };
        for (same_isa, dtype) in backends_and_dtypes() {
            pools.check(&same_isa, dtype, (&lens, &cuts), seed)?;
        }
    }

    #[test]
    fn attention_does_not_depend_on_batch_chunks_or_threads(
        lens in prop::collection::vec(1..120usize, 1..4),
        cuts in prop::collection::vec(1..20usize, 1..8),
        (kv_heads, group, head_dim) in (1..3usize, 1..8usize, 1..40usize),
        window in prop::option::of(1..90usize),
        softcap in prop::option::of(0.2..50.0f32),
        seed in 0..1000u64,
    ) {
        let heads = kv_heads * group;
        let params = AttentionParams { heads, kv_heads, head_dim, scale: 0.4, window, softcap };
        let widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
        let layer = LayerKv::Full { kv_heads, head_dim };
        for (same_isa, dtype) in backends_and_dtypes() {
            let steps = Steps { lens: lens.clone(), cuts: cuts.clone(), seed, layer, dtype };
            steps.check(&same_isa, &widths, heads * head_dim, |b, x, cache, plan, out| {
                b.paged_attention(&x[0], &x[1], &x[2], cache, 0, plan, &params, out).unwrap();
            })?;
        }
    }

    #[test]
    fn latent_attention_does_not_depend_on_batch_chunks_or_threads(
        lens in prop::collection::vec(1..70usize, 1..4),
        cuts in prop::collection::vec(1..20usize, 1..8),
        (heads, nope, half_rope, v, rank) in (1..4usize, 1..40usize, 1..10usize, 1..40usize, 1..3usize),
        seed in 0..1000u64,
    ) {
        let (rope, rank) = (2 * half_rope, 32 * rank);
        let kv_b = Stored::new(seed, &[heads * (nope + v), rank]);
        let widths = [heads * (nope + rope), rank, rope];
        let layer = LayerKv::Latent { rank, rope, index: None };
        let layout = RopeLayout { heads, head_dim: nope + rope, offset: nope, dim: rope, interleaved: seed % 2 == 0 };
        let angles = HostRope { inv_freq: uniform(seed, half_rope, 1.0), scale: 1.0, max_positions: 80 };
        for (same_isa, dtype) in backends_and_dtypes() {
            let steps = Steps { lens: lens.clone(), cuts: cuts.clone(), seed, layer, dtype };
            for format in FORMATS {
                let src = HostLatent { kv_b: kv_b.tensor(), heads, nope, rope, v, rank, format };
                steps.check(&same_isa, &widths, heads * v, |b, x, cache, plan, out| {
                    let weight = b.latent_weight(&src).unwrap();
                    b.rope(&mut x[0], layout, &b.rope_table(&angles).unwrap(), plan).unwrap();
                    b.latent_attention(&x[0], &x[1], &x[2], &weight, cache, 0, plan, 0.3, out).unwrap();
                })?;
            }
        }
    }
}

/// Also where contexts are so long that threads share one, for scores and for what is read.
#[test]
fn attention_to_chosen_positions_does_not_depend_on_batch_chunks_or_threads() {
    let (heads, nope, rope, v, rank) = (3, 8, 4, 8, 32);
    let (index_heads, width) = (5, 12);
    let kv_b = Stored::new(1, &[heads * (nope + v), rank]);
    let src = HostLatent { kv_b: kv_b.tensor(), heads, nope, rope, v, rank, format: WeightFormat::F32 };
    let widths = [heads * (nope + rope), rank, rope, index_heads * width, width, index_heads];
    let layer = LayerKv::Latent { rank, rope, index: Some(width) };
    for (same_isa, dtype) in backends_and_dtypes() {
        let cases = [
            (vec![70, 1, 33], vec![9, 1, 40], vec![1, 7, 16, 40]),
            (vec![1300, 40, 600], vec![511, 13, 1, 90, 2, 700], vec![64, 600]),
        ];
        for (lens, cuts, top_ks) in cases {
            for top_k in top_ks {
                let steps = Steps { lens: lens.clone(), cuts: cuts.clone(), seed: 7, layer, dtype };
                let attended = steps.check(&same_isa, &widths, heads * v, |b, x, cache, plan, out| {
                    let weight = b.latent_weight(&src).unwrap();
                    let [q, latent, key, index_q, index_k, weights] = x;
                    let indexer = Indexer { q: index_q, k: index_k, weights, top_k };
                    b.indexed_attention(q, latent, key, &indexer, &weight, cache, 0, plan, 0.3, out).unwrap();
                });
                attended.unwrap();
            }
        }
    }
}

/// Also where contexts are so long that threads share one.
#[test]
fn attention_to_long_pools_does_not_depend_on_batch_chunks_or_threads() {
    let (lens, cuts) = ([1300, 40, 600], [511, 13, 1, 90, 2, 700]);
    let cases = [
        (600, PoolKv { rate: 128, overlaps: false, index: None }, None),
        (90, PoolKv { rate: 2, overlaps: true, index: None }, None),
        (40, PoolKv { rate: 4, overlaps: true, index: Some(12) }, Some((5, 12, 64))),
        (40, PoolKv { rate: 1, overlaps: true, index: Some(20) }, Some((3, 20, 700))),
    ];
    for (same_isa, dtype) in backends_and_dtypes() {
        for (window, pool, index) in cases {
            let pools = Pools { heads: 3, width: 20, window, pool, index };
            pools.check(&same_isa, dtype, (&lens, &cuts), 8).unwrap();
        }
    }
}

/// A layer of windowed attention to a pool.
struct Pools {
    heads: usize,
    width: usize,
    window: usize,
    pool: PoolKv,
    /// Heads of an indexer, their width, and entries that it chooses.
    index: Option<(usize, usize, usize)>,
}

impl Pools {
    fn check(
        &self,
        same_isa: &[CpuBackend],
        dtype: KvDtype,
        (lens, cuts): (&[usize], &[usize]),
        seed: u64,
    ) -> Result<(), TestCaseError> {
        let &Pools { heads, width, pool, index, .. } = self;
        let (index_heads, index_width, _) = index.unwrap_or((1, 1, 1));
        let [columns, index_columns] = [width, index_width].map(|width| pool.series() * width);
        let of_indexer = [index_columns, index_columns, index_heads * index_width, index_heads];
        let widths = [vec![heads * width, width, columns, columns], of_indexer.to_vec()].concat();
        let widths: [usize; 8] = widths.try_into().unwrap();
        let layer = LayerKv::Windowed { width, window: self.window, pool: Some(pool) };
        let steps = Steps { lens: lens.to_vec(), cuts: cuts.to_vec(), seed, layer, dtype };
        steps.check(same_isa, &widths, heads * width, |b, x, cache, plan, out| self.attend(b, x, cache, plan, out))
    }

    fn attend(
        &self,
        b: &CpuBackend,
        [q, kv, values, gates, index_values, index_gates, index_q, weights]: &mut [Tensor; 8],
        cache: &mut KvCache,
        plan: &<CpuBackend as Backend>::AttentionPlan,
        out: &mut Tensor,
    ) {
        let vector = |seed: u64, len: usize| b.vector(&Stored::new(seed, &[len]).tensor()).unwrap();
        let angles = HostRope { inv_freq: uniform(3, 2, 1.0), scale: 1.0, max_positions: 1300 };
        let table = b.rope_table(&angles).unwrap();
        let mut add = |values: &Tensor, gates: &mut Tensor, width: usize, entries| {
            b.scale(gates, 4.0).unwrap();
            let (bias, norm) = (vector(4, self.pool.rate * self.pool.series() * width), vector(5, width));
            let layout = RopeLayout { heads: 1, head_dim: width, offset: width - 4, dim: 4, interleaved: true };
            let pooling = Pooling { values, gates, bias: &bias, norm: &norm, eps: 1e-6, layout, table: &table };
            b.pool(&pooling, entries, cache, 0, plan).unwrap();
        };
        add(values, gates, self.width, Entries::Attended);
        let reads = match self.index {
            Some((_, width, top_k)) => {
                add(index_values, index_gates, width, Entries::Index);
                Reads::Chosen { q: index_q, weights, top_k }
            }
            None => Reads::All,
        };
        let sink = vector(6, self.heads);
        let params = WindowedParams { window: self.window, scale: 0.3, sink: &sink, reads };
        b.windowed_attention(q, kv, &params, cache, 0, plan, out).unwrap();
    }
}

/// What lies behind a full block depends on it alone: another sequence may go on from it.
#[test]
fn sequences_that_share_full_blocks_pool_and_attend_as_if_they_had_their_own() {
    let b = CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap();
    let size = b.caps().kv_block_size;
    for (rate, overlaps, index) in [(4, true, Some(8)), (3, true, None), (128, false, None), (20, true, Some(8))] {
        let index = index.map(|width| (2, width, 5));
        let pool = PoolKv { rate, overlaps, index: index.map(|index| index.1) };
        let pools = Pools { heads: 2, width: 20, window: 30, pool, index };
        let len = 300_usize;
        let columns = pool.series() * 20;
        let index_columns = pool.series() * 8;
        let widths = [40, 20, columns, columns, index_columns, index_columns, 16, 2];
        let layers = vec![LayerKv::Windowed { width: 20, window: 30, pool: Some(pool) }];
        let spec = KvSpec { layers, dtype: KvDtype::BF16, block_size: size };
        let blocks = len.div_ceil(size);
        let mut cache = b.kv_cache(&spec, KvBlocks { kept: 2 * blocks, passing: 2 * blocks }).unwrap();
        let mut run = |start: usize, table: &[u32]| {
            // All that is shared passes but for the window.
            let gone = start.saturating_sub(29) / size;
            let of = |(i, block): (usize, &u32)| if i < gone { PASSED } else { 2 * blocks as u32 - 1 - block };
            let passing: Vec<u32> = table.iter().enumerate().map(of).collect();
            let batch = [SequenceSpan { start, len: len - start, block_table: table, passing_table: &passing }];
            let plan = b.plan_attention(&AttentionBatch { sequences: &batch }).unwrap();
            let mut x = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| {
                let data = uniform(i as u64, len * widths[i], 1.0);
                tensor(&b, len - start, widths[i], &data[start * widths[i]..])
            });
            let mut out = b.tensor(len, 40).unwrap();
            pools.attend(&b, &mut x, &mut cache, &plan, &mut out);
            bits(&b, &out)
        };
        let first: Vec<u32> = (0..blocks as u32).rev().collect();
        let whole = run(0, &first);
        for shared in [1, 2, 8, 9, blocks - 1] {
            let own = (blocks..2 * blocks).map(|block| block as u32);
            let table: Vec<u32> = first[..shared].iter().copied().chain(own).collect();
            assert_eq!(run(shared * size, &table), whole[shared * size * 40..], "rate {rate}, {shared} blocks shared");
        }
    }
}

/// What a row reads decides its bits, not how it came to be read.
#[test]
fn all_positions_chosen_are_all_positions_to_the_last_bit() {
    let b = CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap();
    let (heads, nope, rope, v, rank, width, len) = (2, 8, 4, 8, 32, 16, 700);
    let kv_b = Stored::new(1, &[heads * (nope + v), rank]);
    let src = HostLatent { kv_b: kv_b.tensor(), heads, nope, rope, v, rank, format: WeightFormat::F32 };
    let weight = b.latent_weight(&src).unwrap();
    let table: Vec<u32> = (0..len as u32).collect();
    let batch = [SequenceSpan { start: 0, len, block_table: &table, passing_table: &[] }];
    let plan = b.plan_attention(&AttentionBatch { sequences: &batch }).unwrap();
    let input = |seed: u64, width: usize| tensor(&b, len, width, &uniform(seed, len * width, 1.0));
    let (q, latent, key) = (input(1, heads * (nope + rope)), input(2, rank), input(3, rope));
    let (index_q, index_k, weights) = (input(4, 2 * width), input(5, width), input(6, 2));
    let cache = |layer| {
        let spec = KvSpec { layers: vec![layer], dtype: KvDtype::F32, block_size: b.caps().kv_block_size };
        b.kv_cache(&spec, KvBlocks::kept(len)).unwrap()
    };
    let mut dense = b.tensor(len, heads * v).unwrap();
    let mut cache_of_all = cache(LayerKv::Latent { rank, rope, index: None });
    b.latent_attention(&q, &latent, &key, &weight, &mut cache_of_all, 0, &plan, 0.3, &mut dense).unwrap();
    let last = |x: &Tensor| bits(&b, x)[(len - 1) * heads * v..].to_vec();
    for top_k in [len - 1, len] {
        let indexer = Indexer { q: &index_q, k: &index_k, weights: &weights, top_k };
        let (mut cache, mut out) =
            (cache(LayerKv::Latent { rank, rope, index: Some(width) }), b.tensor(len, heads * v).unwrap());
        b.indexed_attention(&q, &latent, &key, &indexer, &weight, &mut cache, 0, &plan, 0.3, &mut out).unwrap();
        assert_eq!(bits(&b, &out)[..(len - 1) * heads * v], bits(&b, &dense)[..(len - 1) * heads * v]);
        assert_eq!(last(&out) == last(&dense), top_k == len, "{top_k} of {len} positions");
    }
}

/// Contexts so long that threads share one, cut so that steps end on all sides of where it is shared.
#[test]
fn attention_to_long_contexts_does_not_depend_on_batch_chunks_or_threads() {
    let (lens, cuts) = (vec![1300, 40, 600], vec![511, 13, 1, 90, 2, 700]);
    for (same_isa, dtype) in backends_and_dtypes() {
        let (lens, cuts) = (lens.clone(), cuts.clone());
        for window in [None, Some(530)] {
            let params = AttentionParams { heads: 3, kv_heads: 1, head_dim: 16, scale: 0.4, window, softcap: None };
            let layer = LayerKv::Full { kv_heads: 1, head_dim: 16 };
            let steps = Steps { lens: lens.clone(), cuts: cuts.clone(), seed: 5, layer, dtype };
            let attended = steps.check(&same_isa, &[48, 16, 16], 48, |b, x, cache, plan, out| {
                b.paged_attention(&x[0], &x[1], &x[2], cache, 0, plan, &params, out).unwrap();
            });
            attended.unwrap();
        }
        let kv_b = Stored::new(1, &[2 * (8 + 8), 32]);
        let src =
            HostLatent { kv_b: kv_b.tensor(), heads: 2, nope: 8, rope: 4, v: 8, rank: 32, format: WeightFormat::F32 };
        let steps = Steps { lens, cuts, seed: 6, layer: LayerKv::Latent { rank: 32, rope: 4, index: None }, dtype };
        let attended = steps.check(&same_isa, &[2 * 12, 32, 4], 2 * 8, |b, x, cache, plan, out| {
            let weight = b.latent_weight(&src).unwrap();
            b.latent_attention(&x[0], &x[1], &x[2], &weight, cache, 0, plan, 0.3, out).unwrap();
        });
        attended.unwrap();
    }
}

/// Some sequences and a way to cut them into steps.
struct Steps {
    lens: Vec<usize>,
    /// Tokens that a step gives a sequence, taken in turn.
    cuts: Vec<usize>,
    seed: u64,
    layer: LayerKv,
    dtype: KvDtype,
}

impl Steps {
    /// Checks that batched sequences in chunks give, on any number of threads, the bits that each
    /// gives alone and whole.
    fn check<const N: usize>(
        &self,
        same_isa: &[CpuBackend],
        widths: &[usize; N],
        out_width: usize,
        attend: impl Fn(&CpuBackend, &mut [Tensor; N], &mut KvCache, &<CpuBackend as Backend>::AttentionPlan, &mut Tensor),
    ) -> Result<(), TestCaseError> {
        let run = |b: &CpuBackend, cache: &mut KvCache, spans: &[(usize, usize, usize)]| {
            let tables: Vec<Vec<u32>> = (0..self.lens.len()).map(|s| self.table(s)).collect();
            let passing: Vec<Vec<u32>> = spans.iter().map(|&(s, start, len)| self.passing(s, start, len)).collect();
            let spans: Vec<_> = spans
                .iter()
                .zip(&passing)
                .map(|(&(s, start, len), passing_table)| {
                    (s, SequenceSpan { start, len, block_table: &tables[s], passing_table })
                })
                .collect();
            let sequences: Vec<_> = spans.iter().map(|s| s.1).collect();
            let batch = AttentionBatch { sequences: &sequences };
            let rows = batch.num_tokens();
            let mut inputs = std::array::from_fn(|i| {
                let row = |s: usize, p: usize| uniform(self.seed + (s * 1000 + p * 3 + i) as u64, widths[i], 1.0);
                let data: Vec<f32> = spans
                    .iter()
                    .flat_map(|&(s, span)| (span.start..span.start + span.len).flat_map(move |p| row(s, p)))
                    .collect();
                tensor(b, rows, widths[i], &data)
            });
            let mut out = b.tensor(rows, out_width).unwrap();
            attend(b, &mut inputs, cache, &b.plan_attention(&batch).unwrap(), &mut out);
            bits(b, &out)
        };
        let cache = |b: &CpuBackend| {
            let spec = KvSpec { layers: vec![self.layer], dtype: self.dtype, block_size: b.caps().kv_block_size };
            let kept = self.lens.len() * self.blocks_per_sequence();
            b.kv_cache(&spec, KvBlocks { kept, passing: kept }).unwrap()
        };

        let first = &same_isa[0];
        let whole = |(s, &len): (usize, &usize)| run(first, &mut cache(first), &[(s, 0, len)]);
        let whole: Vec<Vec<u32>> = self.lens.iter().enumerate().map(whole).collect();
        for b in same_isa {
            let mut cache = cache(b);
            let mut done = vec![0; self.lens.len()];
            let mut cuts = self.cuts.iter().cycle();
            let mut chunked = vec![Vec::new(); self.lens.len()];
            while done != self.lens {
                let mut spans = Vec::new();
                for (s, &len) in self.lens.iter().enumerate().filter(|&(s, &len)| done[s] < len) {
                    spans.push((s, done[s], (*cuts.next().unwrap()).min(len - done[s])));
                }
                let mut bits = run(b, &mut cache, &spans).into_iter();
                for (s, _, len) in spans {
                    chunked[s].extend(bits.by_ref().take(len * out_width));
                    done[s] += len;
                }
            }
            prop_assert!(chunked == whole, "{} with {} threads", b.caps().isa, b.caps().threads);
        }
        Ok(())
    }

    /// Blocks of a sequence, scattered.
    fn table(&self, sequence: usize) -> Vec<u32> {
        (0..self.blocks_per_sequence()).map(|i| (i * self.lens.len() + sequence) as u32).rev().collect()
    }

    /// Passing blocks of a step of a sequence, which in a cut one are no more than its longest step may need.
    fn passing(&self, sequence: usize, start: usize, len: usize) -> Vec<u32> {
        let Some(reach) = self.layer.reach() else { return Vec::new() };
        let mut slots = self.table(sequence);
        if len < self.lens[sequence] {
            slots.truncate((reach + self.cuts.iter().max().expect("a cut")) / 16 + 2);
        }
        passing_table(&slots, (start, start + len), reach, 16)
    }

    /// Of 16 positions, the smallest that a backend has.
    fn blocks_per_sequence(&self) -> usize {
        self.lens.iter().max().expect("a sequence").div_ceil(16)
    }
}
