//! Speed of the kernels on this machine: `cargo run --release -p baton-device-cpu --example kernels`,
//! with `linear`, `linear ISA`, `attention`, `attention DTYPE`, `indexed`, `compressed` or `step` behind it for a part of it.
//!
//! Prints the minimum of several runs: other work on the machine only ever adds time. One thread is timed by its
//! own processor time, which other work hardly touches.

#![allow(clippy::print_stdout)] // a report for the terminal

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use baton_device::WeightFormat::Ggml;
use baton_device::conformance::{random_blocks, uniform};
use baton_device::{
    Activation, AttentionBatch, AttentionParams, Backend, BlockFormat, CompressedOps, DType, DeviceError, Entries,
    GroupScore, Groups, HostExperts, HostLatent, HostLinear, HostRope, HostTensor, Indexer, KvBlocks, KvDtype, KvSpec,
    LatentOps, LayerKv, MoeOps, PoolKv, Pooling, Purpose, Reads, Result, RopeLayout, Routing, Scoring, SequenceSpan,
    WeightFormat, WindowedParams,
};
use baton_device_cpu::{CpuBackend, CpuOptions, Experts, Isa, Latent, Linear, Tensor};

fn main() -> Result<()> {
    let part = std::env::args().nth(1);
    let wanted = |name: &str| part.as_deref().is_none_or(|part| part == name);
    if wanted("linear") {
        linears(std::env::args().nth(2).as_deref())?;
    }
    if wanted("attention") {
        attentions(std::env::args().nth(2).as_deref())?;
    }
    if wanted("indexed") {
        indexed()?;
    }
    if wanted("compressed") {
        compressed()?;
    }
    if wanted("step") {
        steps()?;
    }
    Ok(())
}

fn linears(only: Option<&str>) -> Result<()> {
    for isa in Isa::available().into_iter().rev() {
        if only.is_some_and(|only| only != isa.to_string()) {
            continue;
        }
        println!("{isa}, 1 thread: linear 1536 -> 8960, and 1536 -> 16, where little but quantising is left");
        let b = CpuBackend::new(&CpuOptions { threads: 1, isa: Some(isa) })?;
        for format in
            [WeightFormat::F32, WeightFormat::F16, WeightFormat::BF16].into_iter().chain(BlockFormat::ALL.map(Ggml))
        {
            linear(&b, 1536, 8960, format)?;
        }
        for format in [WeightFormat::BF16, Ggml(BlockFormat::Q8_0)] {
            linear(&b, 1536, 16, format)?;
        }
    }
    Ok(())
}

/// Layers whose caches are walked in turn, so that they come from memory as in a model.
const LAYERS: usize = 28;

fn attentions(only: Option<&str>) -> Result<()> {
    let b = CpuBackend::new(&CpuOptions { threads: 1, isa: None })?;
    for dtype in KvDtype::ALL.into_iter().filter(|dtype| only.is_none_or(|only| only == dtype.to_string())) {
        for (heads, kv_heads, head_dim) in [(12, 2, 128), (14, 2, 64), (32, 32, 128)] {
            let layer = LayerKv::Full { kv_heads, head_dim };
            println!("{}, 1 thread: {heads} heads on {kv_heads} of {head_dim}, cache in {dtype}", b.caps().isa);
            for steps in [(1, 0, 512), (1, 999, 1), (16, 999, 1), (1, 996, 4), (1, 8191, 1)] {
                attention(&b, (layer, dtype), heads, steps)?;
            }
        }
        for (heads, rank) in [(16, 512), (6, 64)] {
            println!("{}, 1 thread: {heads} heads on latents of {rank}, cache in {dtype}", b.caps().isa);
            for steps in [(1, 0, 512), (1, 999, 1), (16, 999, 1)] {
                attention(&b, (LayerKv::Latent { rank, rope: 64.min(rank / 4), index: None }, dtype), heads, steps)?;
            }
        }
    }
    Ok(())
}

/// DeepSeek-V3.2's widths: a token behind longer and longer contexts, with and without its indexer.
fn indexed() -> Result<()> {
    const TOP_K: usize = 2048;
    let b = CpuBackend::new(&CpuOptions { threads: 1, isa: None })?;
    let (heads, rank, rope, index) = (128, 512, 64, 128);
    let [all, chosen] = [None, Some(index)].map(|index| LayerKv::Latent { rank, rope, index });
    for dtype in [KvDtype::F32, KvDtype::BF16] {
        println!("{}, 1 thread: {heads} heads on latents of {rank}, cache in {dtype}; all, then {TOP_K}", b.caps().isa);
        for context in (11..=16).map(|log| 1 << log) {
            attention(&b, (all, dtype), heads, (1, context - 1, 1))?;
            attention(&b, (chosen, dtype), heads, (1, context - 1, 1))?;
        }
    }
    Ok(())
}

/// DeepSeek-V4's widths: tokens behind longer and longer contexts, with pools of 4 and of 128, beside latents.
fn compressed() -> Result<()> {
    let b = CpuBackend::new(&CpuOptions { threads: 1, isa: None })?;
    let (heads, width, dtype) = (64, 512, KvDtype::BF16);
    let windowed = |pool| LayerKv::Windowed { width, window: 128, pool };
    let pool = |rate, overlaps, index| windowed(Some(PoolKv { rate, overlaps, index }));
    let layers = [
        ("a window", windowed(None)),
        ("512 of entries of 4", pool(4, true, Some(128))),
        ("entries of 128", pool(128, false, None)),
        ("latents", LayerKv::Latent { rank: width, rope: 64, index: None }),
    ];
    for (name, layer) in layers {
        println!("{}, 1 thread: {heads} heads on {name}, cache in {dtype}", b.caps().isa);
        for context in [1 << 10, 1 << 13, 1 << 16] {
            attention(&b, (layer, dtype), heads, (1, context - 1, 1))?;
        }
        attention(&b, (layer, dtype), heads, (1, 1 << 13, 64))?;
    }
    Ok(())
}

/// Time of a layer in a step that gives each of some sequences `len` tokens from position `start` on.
fn attention(
    b: &CpuBackend,
    (layer, dtype): (LayerKv, KvDtype),
    heads: usize,
    (sequences, start, len): (usize, usize, usize),
) -> Result<()> {
    let blocks = (start + len).div_ceil(b.caps().kv_block_size);
    let table = |s: usize| (0..blocks).map(|i| (s * blocks + i) as u32).collect();
    let tables: Vec<Vec<u32>> = (0..sequences).map(table).collect();
    let spans = tables.iter().map(|table| SequenceSpan { start, len, block_table: table, passing_table: table });
    let spans: Vec<_> = spans.collect();
    let plan = b.plan_attention(&AttentionBatch { sequences: &spans })?;
    let spec = KvSpec { layers: vec![layer; LAYERS], dtype, block_size: b.caps().kv_block_size };
    let mut cache = b.kv_cache(&spec, KvBlocks { kept: sequences * blocks, passing: sequences * blocks })?;
    b.clear_blocks(&mut cache, &tables.concat(), &tables.concat())?; // takes its pages
    let (rows, context) = (sequences * len, sequences * (start + len));
    let pairs = sequences * (len * start + len * (len + 1) / 2);
    let (seconds, flops) = match layer {
        LayerKv::Full { kv_heads, head_dim } => {
            let [q, k, v] = [heads, kv_heads, kv_heads].map(|heads| activation(b, rows, heads * head_dim));
            let (q, k, v, mut out) = (q?, k?, v?, b.tensor(rows, heads * head_dim)?);
            let scale = (head_dim as f32).sqrt().recip();
            let params = AttentionParams { heads, kv_heads, head_dim, scale, window: None, softcap: None };
            let each = |layer| b.paged_attention(&q, &k, &v, &mut cache, layer, &plan, &params, &mut out);
            (of_a_layer(each)?, 4 * pairs * heads * head_dim)
        }
        LayerKv::Latent { rank, rope, index } => {
            let (nope, v) = (128.min(rank), 128.min(rank));
            let [q, latent, key] = [heads * (nope + rope), rank, rope].map(|cols| activation(b, rows, cols));
            let (q, latent, key, mut out) = (q?, latent?, key?, b.tensor(rows, heads * v)?);
            let data = stored(&[heads * (nope + v), rank]);
            let kv_b = HostTensor::new("bench", DType::F32, vec![heads * (nope + v), rank], &data);
            let weight =
                b.latent_weight(&HostLatent { kv_b, heads, nope, rope, v, rank, format: WeightFormat::BF16 })?;
            let up = rows * rank * (nope + v);
            if let Some(index) = index {
                const HEADS: usize = 64;
                let [index_q, index_k, weights] = [HEADS * index, index, HEADS].map(|cols| activation(b, rows, cols));
                let (index_q, index_k, weights) = (index_q?, index_k?, weights?);
                let indexer = Indexer { q: &index_q, k: &index_k, weights: &weights, top_k: 2048 };
                let each = |layer| {
                    b.indexed_attention(&q, &latent, &key, &indexer, &weight, &mut cache, layer, &plan, 0.1, &mut out)
                };
                let (read, scored) = (pairs.min(rows * 2048), if pairs > rows * 2048 { pairs } else { 0 });
                (of_a_layer(each)?, 2 * (heads * (read * (2 * rank + rope) + up) + scored * HEADS * index))
            } else {
                let each =
                    |layer| b.latent_attention(&q, &latent, &key, &weight, &mut cache, layer, &plan, 0.1, &mut out);
                (of_a_layer(each)?, 2 * heads * (pairs * (2 * rank + rope) + up))
            }
        }
        LayerKv::Windowed { width, window, pool } => {
            const INDEX_HEADS: usize = 64;
            const TOP_K: usize = 512;
            let vector = |len: usize| b.vector(&HostTensor::new("bench", DType::F32, vec![len], &stored(&[len])));
            let rope = HostRope { inv_freq: vec![0.1; 32], scale: 1.0, max_positions: start + len };
            let (table, sink) = (b.rope_table(&rope)?, vector(heads)?);
            let (q, kv, mut out) =
                (activation(b, rows, heads * width)?, activation(b, rows, width)?, b.tensor(rows, heads * width)?);
            let index = pool.and_then(|pool| pool.index);
            let indexer = (activation(b, rows, INDEX_HEADS * index.unwrap_or(1))?, activation(b, rows, INDEX_HEADS)?);
            let of_pool = |width: usize| {
                let PoolKv { rate, .. } = pool.expect("entries have a pool");
                let columns = pool.map_or(0, PoolKv::series) * width;
                let rows = (activation(b, rows, columns)?, activation(b, rows, columns)?);
                Ok::<_, DeviceError>((rows, vector(rate * columns)?, vector(width)?))
            };
            let kinds = [pool.map(|_| (width, Entries::Attended)), index.map(|width| (width, Entries::Index))];
            let pools = kinds.into_iter().flatten().map(|(width, entries)| Ok((width, entries, of_pool(width)?)));
            let pools = pools.collect::<Result<Vec<_>>>()?;
            let each = |layer| {
                for (width, entries, ((values, gates), bias, norm)) in &pools {
                    let layout =
                        RopeLayout { heads: 1, head_dim: *width, offset: width - 64, dim: 64, interleaved: true };
                    let pooling = Pooling { values, gates, bias, norm, eps: 1e-6, layout, table: &table };
                    b.pool(&pooling, *entries, &mut cache, layer, &plan)?;
                }
                let reads = match (pool, index) {
                    (None, _) => Reads::Window,
                    (_, None) => Reads::All,
                    _ => Reads::Chosen { q: &indexer.0, weights: &indexer.1, top_k: TOP_K },
                };
                let params = WindowedParams { window, scale: 0.1, sink: &sink, reads };
                b.windowed_attention(&q, &kv, &params, &mut cache, layer, &plan, &mut out)
            };
            let of_row = |position: usize| {
                let seen = pool.map_or(0, |pool| pool.visible(position));
                let scored = index.filter(|_| seen > TOP_K).map_or(0, |width| seen * INDEX_HEADS * width);
                let read = window.min(position + 1) + if index.is_some() { seen.min(TOP_K) } else { seen };
                2 * scored + 4 * read * heads * width
            };
            (of_a_layer(each)?, sequences * (start..start + len).map(of_row).sum::<usize>())
        }
    };
    println!(
        "  {sequences:3} x {len:<4} at {start:<5} {:9.1} us {:7.1} GFLOP/s {:7.1} GB/s",
        1e6 * seconds,
        flops as f64 / seconds / 1e9,
        (context / spec.block_size * spec.layers[0].kept_bytes(dtype, spec.block_size)) as f64 / seconds / 1e9
    );
    Ok(())
}

/// Seconds of processor time that a layer takes of the time of all.
fn of_a_layer(mut each: impl FnMut(usize) -> Result<()>) -> Result<f64> {
    Ok(shortest(|| (0..LAYERS).try_for_each(&mut each), processor_time)?.as_secs_f64() / LAYERS as f64)
}

fn steps() -> Result<()> {
    for threads in [1, 2] {
        let b = CpuBackend::new(&CpuOptions { threads, isa: None })?;
        println!("{}, {threads} threads: a decoding step of an abacus-sized model, context 64", b.caps().isa);
        let model = SmallModel::new(&b)?;
        let alone = model.step(&b, 1, 64)?;
        for rows in [1, 4, 8, 16, 32] {
            let time = model.step(&b, rows, 64)?;
            let gain = rows as f64 * alone.as_secs_f64() / time.as_secs_f64();
            println!("  {rows:3} sequences {:8.1} us, throughput x{gain:.2}", 1e6 * time.as_secs_f64());
        }
    }
    Ok(())
}

/// The shortest of enough runs to fill half a second.
fn shortest(mut f: impl FnMut() -> Result<()>, now: impl Fn() -> Duration) -> Result<Duration> {
    let (start, mut best) = (Instant::now(), Duration::MAX);
    while start.elapsed() < Duration::from_millis(500) {
        let run = now();
        f()?;
        best = best.min(now() - run);
    }
    Ok(best)
}

/// Time that this thread has spent computing.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn linear(b: &CpuBackend, in_features: usize, out_features: usize, format: WeightFormat) -> Result<()> {
    let weight = linear_weight(b, in_features, out_features, format)?;
    let bytes = format.bytes(in_features * out_features) as f64;
    for rows in [1, 2, 4, 8, 16, 64] {
        let x = activation(b, rows, in_features)?;
        let mut y = b.tensor(rows, out_features)?;
        let seconds = shortest(|| b.linear(&x, &weight, &mut y), processor_time)?.as_secs_f64();
        let flops = (2 * rows * in_features * out_features) as f64;
        println!(
            "  {format:5} m={rows:<4} {:9.1} us {:7.1} GB/s {:7.1} GFLOP/s",
            1e6 * seconds,
            bytes / seconds / 1e9,
            flops / seconds / 1e9
        );
    }
    Ok(())
}

fn stored(shape: &[usize]) -> Vec<u8> {
    let scale = (shape[shape.len() - 1] as f32).sqrt().recip();
    uniform(1, shape.iter().product(), scale).iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn linear_weight(b: &CpuBackend, in_features: usize, out_features: usize, format: WeightFormat) -> Result<Linear> {
    let (dtype, data) = match format {
        Ggml(block) => (DType::Ggml(block), random_blocks(block, 1, in_features * out_features, 0.03)),
        _ => (DType::F32, stored(&[out_features, in_features])),
    };
    let weight = HostTensor::new("bench", dtype, vec![out_features, in_features], &data);
    b.linear_weight(&HostLinear { weight, bias: None, format, purpose: Purpose::Product })
}

fn activation(b: &CpuBackend, rows: usize, cols: usize) -> Result<Tensor> {
    let mut t = b.tensor(rows, cols)?;
    b.write(&uniform(2, rows * cols, 1.0), &mut t)?;
    Ok(t)
}

/// The linear, attention and expert operations of a model of the bundled one's shape.
struct SmallModel {
    layers: Vec<SmallLayer>,
    head: Linear,
}

struct SmallLayer {
    q_a: Linear,
    q_b: Linear,
    kv_a: Linear,
    latent: Latent,
    o: Linear,
    router: Linear,
    shared: [Linear; 3],
    experts: Experts,
}

const HIDDEN: usize = 192;
const HEADS: usize = 6;
const NOPE: usize = 32;
const ROPE: usize = 16;
const V: usize = 32;
const RANK: usize = 64;
const INNER: usize = 64;
const EXPERTS: usize = 8;
const VOCAB: usize = 1024;

impl SmallModel {
    fn new(b: &CpuBackend) -> Result<Self> {
        Ok(Self {
            layers: (0..5).map(|_| SmallLayer::new(b)).collect::<Result<_>>()?,
            head: linear_weight(b, HIDDEN, VOCAB, WeightFormat::BF16)?,
        })
    }

    /// Time of a step that gives each of `rows` sequences its last token of `context`.
    fn step(&self, b: &CpuBackend, rows: usize, context: usize) -> Result<Duration> {
        let blocks = context.div_ceil(b.caps().kv_block_size);
        let tables: Vec<Vec<u32>> = (0..rows).map(|r| (0..blocks).map(|i| (r * blocks + i) as u32).collect()).collect();
        let span = |table| SequenceSpan { start: context - 1, len: 1, block_table: table, passing_table: &[] };
        let sequences: Vec<_> = tables.iter().map(|t| span(t.as_slice())).collect();
        let spec = KvSpec {
            layers: vec![LayerKv::Latent { rank: RANK, rope: ROPE, index: None }; self.layers.len()],
            dtype: KvDtype::F32,
            block_size: b.caps().kv_block_size,
        };
        let mut cache = b.kv_cache(&spec, KvBlocks::kept(rows * blocks))?;

        let mut x = activation(b, rows, HIDDEN)?;
        let norm = b.vector(&HostTensor::new("norm", DType::F32, vec![HIDDEN], &stored(&[HIDDEN])))?;
        let widths = [HIDDEN, 96, HEADS * (NOPE + ROPE), HEADS * V, EXPERTS, INNER, INNER, INNER, HIDDEN, VOCAB];
        let [mut normed, mut q_a, mut q, mut mixed, mut logits, mut gate, mut up, mut gated, mut y, mut scores] =
            widths.map(|cols| b.tensor(rows, cols).expect("a small tensor"));
        let (mut kv, latent, rope) =
            (b.tensor(rows, RANK + ROPE)?, activation(b, rows, RANK)?, activation(b, rows, ROPE)?);
        let start = Instant::now();
        shortest(
            || {
                let plan = b.plan_attention(&AttentionBatch { sequences: &sequences })?;
                b.rms_norm(&x, &norm, 1e-6, &mut normed)?;
                for (i, layer) in self.layers.iter().enumerate() {
                    b.linear(&normed, &layer.q_a, &mut q_a)?;
                    b.linear(&q_a, &layer.q_b, &mut q)?;
                    b.linear(&normed, &layer.kv_a, &mut kv)?;
                    b.latent_attention(&q, &latent, &rope, &layer.latent, &mut cache, i, &plan, 0.15, &mut mixed)?;
                    b.linear(&mixed, &layer.o, &mut y)?;
                    b.add_rms_norm(&y, &mut x, &norm, 1e-6, &mut normed)?;
                    b.linear(&normed, &layer.router, &mut logits)?;
                    b.fused_moe(&normed, &logits, &layer.experts, &mut y)?;
                    b.add(&mut x, &y)?;
                    b.linear(&normed, &layer.shared[0], &mut gate)?;
                    b.linear(&normed, &layer.shared[1], &mut up)?;
                    b.gated_activation(Activation::Silu, &gate, &up, &mut gated)?;
                    b.linear(&gated, &layer.shared[2], &mut y)?;
                    b.add_rms_norm(&y, &mut x, &norm, 1e-6, &mut normed)?;
                }
                b.linear(&normed, &self.head, &mut scores)
            },
            || start.elapsed(),
        )
    }
}

impl SmallLayer {
    fn new(b: &CpuBackend) -> Result<Self> {
        let format = WeightFormat::BF16;
        let linear = |in_features, out_features| linear_weight(b, in_features, out_features, format);
        let kv_b = stored(&[HEADS * (NOPE + V), RANK]);
        let (inner, outer) = (stored(&[INNER, HIDDEN]), stored(&[HIDDEN, INNER]));
        let expert = |shape: [usize; 2], data| HostTensor::new("bench", DType::F32, shape.to_vec(), data);
        let gate = expert([INNER, HIDDEN], &inner);
        let mut experts = vec![[gate.clone(), gate, expert([HIDDEN, INNER], &outer)]; EXPERTS];
        Ok(Self {
            q_a: linear(HIDDEN, 96)?,
            q_b: linear(96, HEADS * (NOPE + ROPE))?,
            kv_a: linear(HIDDEN, RANK + ROPE)?,
            latent: b.latent_weight(&HostLatent {
                kv_b: HostTensor::new("bench", DType::F32, vec![HEADS * (NOPE + V), RANK], &kv_b),
                heads: HEADS,
                nope: NOPE,
                rope: ROPE,
                v: V,
                rank: RANK,
                format,
            })?,
            o: linear(HEADS * V, HIDDEN)?,
            router: linear(HIDDEN, EXPERTS)?,
            shared: [linear(HIDDEN, INNER)?, linear(HIDDEN, INNER)?, linear(INNER, HIDDEN)?],
            experts: b.expert_weights(HostExperts {
                count: EXPERTS,
                held: 0..EXPERTS,
                source: &mut experts,
                formats: [format; 3],
                limit: None,
                routing: Routing {
                    top_k: 2,
                    scoring: Scoring::Sigmoid { correction_bias: vec![0.0; EXPERTS] },
                    groups: Some(Groups { count: 4, kept: 2, score: GroupScore::TwoBest }),
                    norm_topk_prob: true,
                    scaling_factor: 1.5,
                    by_token: None,
                },
            })?,
        })
    }
}
