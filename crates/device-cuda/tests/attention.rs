//! Attention on a simulated GPU beyond the shared list: widths of real models, chips with less shared memory, what steps have
//! in common, and what they must not have.

mod common;

use baton_device::conformance::{self, Case, uniform};
use baton_device::{
    AttentionBatch, AttentionParams, Backend, DType, HostLatent, HostLinear, HostRope, HostTensor, KvBlocks, KvDtype,
    KvSpec, LatentOps, LayerKv, Purpose, RopeLayout, Rotary, Rows, SequenceSpan, WeightFormat,
};
use baton_device_cuda::{CudaBackend, Statistics};
use common::Simulator;
use half::bf16;

const BLOCK: usize = 16;

fn full(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionParams {
    let scale = (head_dim as f32).sqrt().recip();
    AttentionParams { heads, kv_heads, head_dim, scale, window: None, softcap: None }
}

/// Widths of models that are served, with few heads.
fn cases(kv: KvDtype) -> Vec<Case> {
    let attention = |params, history| Case::Attention { params, kv, history };
    vec![
        attention(full(8, 2, 128), 150),
        attention(AttentionParams { window: Some(100), softcap: Some(1.5), ..full(7, 1, 128) }, 60),
        attention(AttentionParams { window: Some(40), softcap: Some(50.0), ..full(2, 1, 256) }, 0),
        attention(full(2, 2, 192), 0),
        attention(full(20, 1, 64), 0),
        Case::Latent { heads: 16, nope: 32, rope: 64, v: 32, rank: 512, format: WeightFormat::BF16, kv, history: 100 },
        Case::Latent { heads: 5, nope: 24, rope: 16, v: 40, rank: 128, format: WeightFormat::F16, kv, history: 0 },
    ]
}

fn judge(backend: &CudaBackend, cases: &[Case]) {
    for case in cases {
        let outcome = conformance::run(case, backend).unwrap_or_else(|error| panic!("{case:?}: {error}"));
        assert!(outcome.passed(), "{case:?}: error {} over {}", outcome.max_error(), outcome.tolerance);
    }
}

/// Names of the kernels that were asked for.
fn kernels(backend: &CudaBackend) -> Vec<String> {
    backend.kernels().into_iter().map(|(_, name)| name).collect()
}

#[test]
fn widths_of_real_models_agree_on_tensor_cores() {
    let Some(simulator) = Simulator::new() else { return };
    let backend = simulator.open(DType::BF16);
    judge(&backend, &cases(KvDtype::BF16));
    let kernels = kernels(&backend);
    for part in [
        "128, Few<4>",
        "128, Few<8>",
        "64, Few<16>",
        "128, Wide<2, 64>",
        "256, Wide<1, 64>",
        "192, Wide<1, 64>",
        "512, 64>",
    ] {
        assert!(kernels.iter().any(|name| name.contains(part)), "{part} of {kernels:?}");
    }
    drop(backend);
    // Kernels of this size take seconds to compile: of the other types only those of the commonest width.
    judge(&simulator.open(DType::F16), &cases(KvDtype::Int8)[..1]);
    simulator.expect_clean();
}

#[test]
fn a_chip_with_less_shared_memory_takes_smaller_tiles() {
    let Some(simulator) = Simulator::new() else { return };
    simulator.control("cc=80");
    let backend = simulator.open(DType::BF16);
    judge(&backend, &cases(KvDtype::BF16)[2..3]);
    let kernels = kernels(&backend);
    assert!(kernels.iter().any(|name| name.contains("256, Wide<1, 16>")), "{kernels:?}");
}

#[test]
fn few_tokens_in_a_kernel_for_many_have_splits_of_their_own() {
    let Some(simulator) = Simulator::new() else { return };
    simulator.control("cc=86");
    let backend = simulator.open(DType::BF16);
    judge(&backend, &[Case::Attention { params: full(2, 1, 256), kv: KvDtype::BF16, history: 300 }]);
    let kernels = kernels(&backend);
    assert!(!kernels.iter().any(|name| name.contains("Few")), "the chip has no room for these: {kernels:?}");
    assert!(kernels.iter().any(|name| name.contains("256, Wide<1, 16>")), "{kernels:?}");
}

/// A cache of two layers and a step's tensors.
struct Steps<'a> {
    backend: &'a CudaBackend,
    params: AttentionParams,
    cache: <CudaBackend as Backend>::KvCache,
}

impl<'a> Steps<'a> {
    fn new(backend: &'a CudaBackend, params: AttentionParams, dtype: KvDtype) -> Self {
        let AttentionParams { kv_heads, head_dim, .. } = params;
        let layers = vec![LayerKv::Full { kv_heads, head_dim }; 2];
        let cache = backend.kv_cache(&KvSpec { layers, dtype, block_size: BLOCK }, KvBlocks::kept(64)).unwrap();
        Self { backend, params, cache }
    }

    fn plan(&self, spans: &[SequenceSpan<'_>]) -> <CudaBackend as Backend>::AttentionPlan {
        self.backend.plan_attention(&AttentionBatch { sequences: spans }).unwrap()
    }

    fn tensor(&self, heads: usize, values: &[f32]) -> <CudaBackend as Backend>::Tensor {
        let cols = heads * self.params.head_dim;
        let mut tensor = self.backend.tensor(values.len() / cols, cols).unwrap();
        self.backend.write(values, &mut tensor).unwrap();
        tensor
    }

    /// Queries, keys and values of some rows.
    fn inputs(&self, rows: usize, seed: u64) -> [Vec<f32>; 3] {
        let AttentionParams { heads, kv_heads, head_dim, .. } = self.params;
        let values = |seed, heads| uniform(seed, rows * heads * head_dim, 1.0);
        [values(seed, heads), values(seed + 1, kv_heads), values(seed + 2, kv_heads)]
    }

    /// What comes out of both layers, one behind the other.
    fn attend(&mut self, plan: &<CudaBackend as Backend>::AttentionPlan, inputs: &[Vec<f32>; 3]) -> Vec<f32> {
        let AttentionParams { heads, kv_heads, .. } = self.params;
        let [q, k, v] = inputs;
        let (q, k, v) = (self.tensor(heads, q), self.tensor(kv_heads, k), self.tensor(kv_heads, v));
        let outs = [0, 1].map(|layer| {
            let mut out = self.backend.tensor(q.rows(), q.cols()).unwrap();
            self.backend.paged_attention(&q, &k, &v, &mut self.cache, layer, plan, &self.params, &mut out).unwrap();
            out
        });
        let (mut all, mut one) = (Vec::new(), Vec::new());
        for out in &outs {
            self.backend.read(out, &mut one).unwrap();
            all.append(&mut one);
        }
        all
    }
}

/// What a backend did between two times.
fn since(backend: &CudaBackend, before: &Statistics) -> [u64; 4] {
    let now = backend.statistics();
    [
        now.lists - before.lists,
        now.captures - before.captures,
        now.replays - before.replays,
        now.allocations - before.allocations,
    ]
}

#[test]
fn decode_of_growing_contexts_is_one_graph_until_the_longest_doubles() {
    let Some(simulator) = Simulator::new() else { return };
    let backend = simulator.open(DType::BF16);
    let params = full(4, 2, 32);
    let layers = vec![LayerKv::Full { kv_heads: 2, head_dim: 32 }; 3];
    let spec = KvSpec { layers, dtype: KvDtype::BF16, block_size: BLOCK };
    let mut cache = backend.kv_cache(&spec, KvBlocks::kept(64)).unwrap();
    let tables: [Vec<u32>; 3] = [(0..20).collect(), (20..40).collect(), (40..60).collect()];
    let tensor = |heads: usize| {
        let mut tensor = backend.tensor(3, heads * 32).unwrap();
        backend.write(&uniform(heads as u64, 3 * heads * 32, 1.0), &mut tensor).unwrap();
        tensor
    };
    let (q, k, v) = (tensor(4), tensor(2), tensor(2));
    let (mut out, mut values) = (backend.tensor(3, 4 * 32).unwrap(), Vec::new());
    let mut step = |length: usize| {
        let span = |(table, start): (&'_ Vec<u32>, usize)| (table.clone(), start);
        let spans = [(&tables[0], length - 1), (&tables[1], length / 2), (&tables[2], 3)].map(span);
        let spans = spans.each_ref().map(|(table, start)| SequenceSpan {
            start: *start,
            len: 1,
            block_table: table,
            passing_table: &[],
        });
        let plan = backend.plan_attention(&AttentionBatch { sequences: &spans }).unwrap();
        for layer in 0..3 {
            backend.paged_attention(&q, &k, &v, &mut cache, layer, &plan, &params, &mut out).unwrap();
        }
        backend.read(&out, &mut values).unwrap();
    };
    // The first list has the cache's zeroing in it, and needs scratch for the first time.
    step(300);
    for (shorter, longest) in [(64, 128), (128, 256)] {
        let before = backend.statistics();
        (shorter + 1..=longest).for_each(&mut step);
        let steps = (longest - shorter) as u64;
        assert_eq!(since(&backend, &before), [1, 1, steps - 1, 0], "lists, captures, replays, allocations");
    }
}

#[test]
fn plans_that_are_alive_together_do_not_overwrite_each_other() {
    let Some(simulator) = Simulator::new() else { return };
    let backend = simulator.open(DType::BF16);
    let mut steps = Steps::new(&backend, full(2, 1, 16), KvDtype::BF16);
    let (table, other) = ([1, 2, 3], [4, 5, 6]);
    let first = [SequenceSpan { start: 0, len: 20, block_table: &table, passing_table: &[] }];
    let second = [SequenceSpan { start: 0, len: 9, block_table: &other, passing_table: &[] }];
    let inputs = [steps.inputs(20, 1), steps.inputs(9, 4)];
    let alone = [(&first, &inputs[0]), (&second, &inputs[1])].map(|(spans, inputs)| {
        let plan = steps.plan(spans);
        steps.attend(&plan, inputs)
    });
    let plans = [steps.plan(&first), steps.plan(&second)];
    let together = [0, 1].map(|i| steps.attend(&plans[i], &inputs[i]));
    assert_eq!(alone, together);
}

/// Rows of a step that are the first sequence's, and the others'.
const BROKEN_ROWS: usize = 12;

#[test]
fn what_is_not_finite_reaches_no_other_sequence_and_nobody_who_gets_its_blocks() {
    let Some(simulator) = Simulator::new() else { return };
    let kept = [
        (DType::BF16, KvDtype::BF16),
        (DType::F16, KvDtype::Int8),
        (DType::F32, KvDtype::F32),
        (DType::F32, KvDtype::Int8),
    ];
    for (activations, dtype) in kept {
        let backend = simulator.open(activations);
        let mut steps = Steps::new(&backend, full(3, 1, 16), dtype);
        let tables = [[7, 8, 9], [10, 11, 12], [13, 14, 15]];
        let span = |table: usize, len| SequenceSpan { start: 0, len, block_table: &tables[table], passing_table: &[] };
        let spans = [span(0, BROKEN_ROWS), span(1, 40), span(2, 1)];
        let sound = steps.inputs(BROKEN_ROWS + 41, 1);
        let mut broken = sound.clone();
        for (input, heads) in broken.iter_mut().zip([3, 1, 1]) {
            input[..BROKEN_ROWS * heads * 16].fill(f32::NAN);
        }
        let plan = steps.plan(&spans);
        let (expected, actual) = (steps.attend(&plan, &sound), steps.attend(&plan, &broken));
        let row = 3 * 16;
        for (expected, actual) in expected.chunks(expected.len() / 2).zip(actual.chunks(actual.len() / 2)) {
            assert!(actual[..BROKEN_ROWS * row].iter().all(|x| x.is_nan()), "{activations} {dtype}");
            assert_eq!(actual[BROKEN_ROWS * row..], expected[BROKEN_ROWS * row..], "{activations} {dtype}");
        }
        // Another one gets the blocks: what it has not written itself it does not see.
        let inputs = steps.inputs(5, 9);
        for len in [1, 5] {
            let inputs = inputs.each_ref().map(|input| input[..input.len() / 5 * len].to_vec());
            let elsewhere = steps.plan(&[span(2, len)]);
            let plan = steps.plan(&[span(0, len)]);
            assert_eq!(steps.attend(&plan, &inputs), steps.attend(&elsewhere, &inputs), "{activations} {dtype}");
        }
        let cleared = tables[0];
        backend.clear_blocks(&mut steps.cache, &cleared, &[]).unwrap();
        let plan = steps.plan(&[SequenceSpan { start: 30, len: 1, block_table: &tables[0], passing_table: &[] }]);
        let inputs = steps.inputs(1, 12);
        assert!(steps.attend(&plan, &inputs).iter().all(|x| x.is_finite()), "{activations} {dtype}");
    }
}

#[test]
fn bytes_of_the_cache_are_the_seams_also_between_two_of_them() {
    const WIDTH: usize = 128;
    let Some(simulator) = Simulator::new() else { return };
    let backend = simulator.open(DType::F32);
    let mut steps = Steps::new(&backend, full(1, 1, WIDTH), KvDtype::Int8);
    // Alone a position has all weight, so that what comes out is what was kept of its values.
    for (block, largest) in [(1, 0.7f32), (2, 1.3), (3, 11.9), (4, 1e-3)] {
        let table = [block];
        let [q, k, mut v] = steps.inputs(1, u64::from(block));
        let step = largest / 127.0;
        v[0] = largest;
        for (i, v) in v.iter_mut().enumerate().skip(1) {
            // Halves, or next to them.
            let half = (i as f32 - 0.5) * step;
            *v = f32::from_bits(half.to_bits() + (i as u32 * 7) % 5 - 2);
        }
        let plan = steps.plan(&[SequenceSpan { start: 0, len: 1, block_table: &table, passing_table: &[] }]);
        let actual = steps.attend(&plan, &[q, k, v.clone()]);
        KvDtype::Int8.round(&mut v);
        assert_eq!(actual, [v.clone(), v].concat(), "{largest}");
    }
}

#[test]
fn inputs_that_are_exact_sums_are_rounded_to_activations_first() {
    let Some(simulator) = Simulator::new() else { return };
    let backend = simulator.open(DType::BF16);
    let mut steps = Steps::new(&backend, full(1, 1, 16), KvDtype::BF16);
    // Times a number of bf16 it takes more digits than bf16 has.
    const FACTOR: f32 = 1.0 + 1.0 / 256.0;
    let inputs =
        steps.inputs(9, 1).map(|input| input.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect::<Vec<_>>());
    let rounded = inputs.each_ref().map(|input| input.iter().map(|x| x * FACTOR).collect::<Vec<_>>());
    let diagonal: Vec<u8> = (0..256).flat_map(|i| (f32::from(i % 17 == 0) * FACTOR).to_le_bytes()).collect();
    let weight = HostTensor::new("diagonal", DType::F32, vec![16, 16], &diagonal);
    let diagonal = backend
        .linear_weight(&HostLinear { weight, bias: None, format: WeightFormat::F32, purpose: Purpose::Product })
        .unwrap();
    let table = backend.rope_table(&HostRope { inv_freq: vec![0.7; 8], scale: 1.0, max_positions: 16 }).unwrap();
    let layout = RopeLayout { heads: 1, head_dim: 16, offset: 0, dim: 16, interleaved: false };
    let rotary = Rotary { norms: [None; 2], eps: 0.0, layouts: [layout; 2], table: &table };
    // Blocks in which nothing was written before.
    let mut attended = |[mut q, mut k, v]: [<CudaBackend as Backend>::Tensor; 3], blocks: [[u32; 2]; 2]| {
        let (mut out, mut values) = (backend.tensor(9, 16).unwrap(), [Vec::new(), Vec::new()]);
        let plans = blocks
            .map(|table| steps.plan(&[SequenceSpan { start: 0, len: 9, block_table: &table, passing_table: &[] }]));
        let Steps { cache, params, .. } = &mut steps;
        backend.paged_attention(&q, &k, &v, cache, 0, &plans[0], params, &mut out).unwrap();
        backend.read(&out, &mut values[0]).unwrap();
        backend.rotary_attention(&mut q, &mut k, &v, &rotary, cache, 0, &plans[1], params, &mut out).unwrap();
        backend.read(&out, &mut values[1]).unwrap();
        values
    };
    let tensor = |input: &Vec<f32>| {
        let mut tensor = backend.tensor(9, 16).unwrap();
        backend.write(input, &mut tensor).unwrap();
        tensor
    };
    let expected = attended(rounded.each_ref().map(tensor), [[3, 4], [7, 8]]);
    let exact = inputs.each_ref().map(|input| {
        let mut out = backend.tensor(9, 16).unwrap();
        backend.linear(&tensor(input), &diagonal, &mut out).unwrap();
        out
    });
    assert_eq!(attended(exact, [[5, 6], [9, 10]]), expected);
    assert_ne!(expected[0], expected[1]);
}

#[test]
fn an_up_projection_beyond_the_range_of_activations_is_refused() {
    let Some(simulator) = Simulator::new() else { return };
    let large: Vec<u8> = (0..32).flat_map(|i| bf16::from_f32(if i == 9 { 1e6 } else { 1.0 }).to_le_bytes()).collect();
    let kv_b = HostTensor::new("kv_b", DType::BF16, vec![4, 8], &large);
    let format = WeightFormat::BF16;
    let weight = HostLatent { kv_b, heads: 1, nope: 2, rope: 2, v: 2, rank: 8, format };
    let error = simulator.open(DType::F16).latent_weight(&weight).err().unwrap().to_string();
    assert!(error.contains("kv_b") && error.contains("element 9"), "{error}");
    assert!(simulator.open(DType::BF16).latent_weight(&weight).is_ok());
}
