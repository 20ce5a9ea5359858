//! The composed operations on a simulated chip, beyond the numbers of the conformance list: what steady decode costs, that
//! scratch memory is bounded, and that nothing of a failed sequence reaches another.

mod common;

use baton_device::conformance::uniform;
use baton_device::{
    AttentionBatch, AttentionParams, Backend, DType, DeviceError, Draw, HostLatent, HostLinear, HostTensor, KvBlocks,
    KvDtype, KvSpec, LatentOps, LayerKv, Purpose, Reference, Rows, SequenceSpan, WeightFormat,
};
use common::{A2, Simulator};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;
const FULL: LayerKv = LayerKv::Full { kv_heads: KV_HEADS, head_dim: HEAD_DIM };

fn params(window: Option<usize>, softcap: Option<f32>) -> AttentionParams {
    AttentionParams { heads: HEADS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, scale: 0.3, window, softcap }
}

fn tensor<B: Backend>(b: &B, values: &[f32], cols: usize) -> B::Tensor {
    let mut tensor = b.tensor(values.len() / cols, cols).unwrap();
    b.write(values, &mut tensor).unwrap();
    tensor
}

fn read<B: Backend>(b: &B, x: &B::Tensor) -> Vec<f32> {
    let mut values = Vec::new();
    b.read(x, &mut values).unwrap();
    assert_eq!(values.len(), x.rows() * x.cols());
    values
}

fn cache<B: Backend>(b: &B, layer: LayerKv, dtype: KvDtype, tokens: usize) -> B::KvCache {
    let block_size = b.caps().kv_block_size;
    b.kv_cache(&KvSpec { layers: vec![layer], dtype, block_size }, KvBlocks::kept(tokens.div_ceil(block_size))).unwrap()
}

/// Sequences `(start, len)` one behind the other in the cache, with room for `tokens` each.
fn tables<B: Backend>(b: &B, count: usize, tokens: usize) -> Vec<Vec<u32>> {
    let blocks = tokens.div_ceil(b.caps().kv_block_size) as u32;
    (0..count as u32).map(|s| (s * blocks..(s + 1) * blocks).rev().collect()).collect()
}

fn plan<B: Backend>(b: &B, spans: &[(usize, usize)], tables: &[Vec<u32>]) -> B::AttentionPlan {
    let sequences: Vec<_> = spans
        .iter()
        .zip(tables)
        .map(|(&(start, len), block_table)| SequenceSpan { start, len, block_table, passing_table: &[] })
        .collect();
    b.plan_attention(&AttentionBatch { sequences: &sequences }).unwrap()
}

/// One step of attention with random inputs.
fn attend<B: Backend>(
    b: &B,
    cache: &mut B::KvCache,
    plan: &B::AttentionPlan,
    rows: usize,
    params: &AttentionParams,
) -> B::Tensor {
    let random = |seed, heads: usize| tensor(b, &uniform(seed, rows * heads * HEAD_DIM, 1.0), heads * HEAD_DIM);
    let (q, k, v) = (random(1, HEADS), random(2, KV_HEADS), random(3, KV_HEADS));
    let mut out = b.tensor(rows, HEADS * HEAD_DIM).unwrap();
    b.paged_attention(&q, &k, &v, cache, 0, plan, params, &mut out).unwrap();
    out
}

/// Launches, copies within the device among them, of a layer behind the first in a step of decode: those of two layers less
/// those of one, in a step of a kind that was met before. No memory is taken for it from the device.
fn launches_of_a_layer<B: Backend>(
    simulator: &Simulator,
    b: &B,
    batch: usize,
    mut layer: impl FnMut(&B::AttentionPlan),
) -> u64 {
    let (tables, mut probe) = (tables(b, batch, 256), b.tensor(1, 1).unwrap());
    let mut step = |position: usize, layers: usize| {
        let spans: Vec<_> = (0..batch).map(|s| (position + s % 2, 1)).collect();
        simulator.reset();
        let plan = plan(b, &spans, &tables);
        (0..layers).for_each(|_| layer(&plan));
        // Whoever reads waits for all that was queued.
        b.write(&[0.0], &mut probe).unwrap();
        read(b, &probe);
        let report = simulator.report();
        let launches: u64 = report["launches"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
        (launches + report["copies"]["device_to_device"]["count"].as_u64().unwrap_or(0), report)
    };
    step(130, 1);
    let (one, _) = step(131, 1);
    let (two, report) = step(132, 2);
    assert_eq!(report["mallocs"], 0, "memory is reused");
    // The numbers of the plan, and what is written here.
    assert_eq!(report["copies"]["host_to_device"]["count"], 2, "{}", report["copies"]);
    two - one
}

#[test]
fn composed_attention_takes_as_many_launches_whatever_the_batch() {
    // At least one, of the fused operator that judges itself by this. Here: two of cache writes; the query laid out in f32 and
    // scaled; keys and values picked and laid out (4); scores, mask, softmax, sum (4); the result laid out.
    let simulator = Simulator::new();
    let b = &simulator.open(A2, DType::BF16);
    for batch in [1, 5, 16] {
        let mut cache = cache(b, FULL, KvDtype::BF16, batch * 256);
        for (softcap, launches) in [(None, 13), (Some(2.0), 16)] {
            let params = params(Some(140), softcap);
            let random =
                |seed, heads: usize| tensor(b, &uniform(seed, batch * heads * HEAD_DIM, 1.0), heads * HEAD_DIM);
            let (q, k, v) = (random(1, HEADS), random(2, KV_HEADS), random(3, KV_HEADS));
            let mut out = b.tensor(batch, HEADS * HEAD_DIM).unwrap();
            let count = launches_of_a_layer(&simulator, b, batch, |plan| {
                b.paged_attention(&q, &k, &v, &mut cache, 0, plan, &params, &mut out).unwrap();
            });
            assert_eq!(count, launches, "{batch} sequences, {softcap:?}");
        }
    }
    simulator.expect_no_violation();
}

#[test]
fn composed_latent_attention_takes_as_many_launches_whatever_the_batch() {
    // At least four: absorption, the fused operator, the values' product, its layout. Here: two of cache writes; absorption of
    // the query, laid out before (2); latents and rotated queries laid out and scaled (3); context picked and laid out (4);
    // scores, mask, softmax, sum (4); mixed latents laid out, values' product, result laid out (3).
    let simulator = Simulator::new();
    let b = &simulator.open(A2, DType::BF16);
    let (heads, nope, rope, v, rank) = (6, 32, 16, 32, 64);
    let bytes: Vec<u8> = uniform(4, heads * (nope + v) * rank, 0.1)
        .iter()
        .flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())
        .collect();
    let kv_b = HostTensor::new("kv_b", DType::BF16, vec![heads * (nope + v), rank], &bytes);
    let weight = b.latent_weight(&HostLatent { kv_b, heads, nope, rope, v, rank, format: WeightFormat::BF16 }).unwrap();
    for batch in [1, 5, 16] {
        let mut cache = cache(b, LayerKv::Latent { rank, rope, index: None }, KvDtype::BF16, batch * 256);
        let random = |seed, cols: usize| tensor(b, &uniform(seed, batch * cols, 1.0), cols);
        let (q, latent, key) = (random(1, heads * (nope + rope)), random(2, rank), random(3, rope));
        let mut out = b.tensor(batch, heads * v).unwrap();
        let count = launches_of_a_layer(&simulator, b, batch, |plan| {
            b.latent_attention(&q, &latent, &key, &weight, &mut cache, 0, plan, 0.1, &mut out).unwrap();
        });
        assert_eq!(count, 18, "{batch} sequences");
    }
    simulator.expect_no_violation();
}

#[test]
fn steps_beyond_the_scratch_memory_are_computed_in_pieces_with_the_same_numbers() {
    let simulator = Simulator::new();
    let b = &simulator.open(A2, DType::F32);
    // More context than is gathered at a time, and more rows than are scored at a time.
    for (spans, tokens) in [([(40_000, 1), (40_001, 1), (3, 1)], 40_100), ([(0, 1200), (5, 1), (900, 300)], 1300)] {
        let rows = spans.iter().map(|(_, len)| len).sum();
        let all: [Vec<f32>; 2] = [
            {
                let mut cache = cache(b, FULL, KvDtype::F32, 3 * (tokens + 128));
                let plan = plan(b, &spans, &tables(b, 3, tokens));
                read(b, &attend(b, &mut cache, &plan, rows, &params(Some(1000), None)))
            },
            {
                let judge = &Reference::new();
                let mut cache = cache(judge, FULL, KvDtype::F32, 3 * (tokens + 128));
                let plan = plan(judge, &spans, &tables(judge, 3, tokens));
                read(judge, &attend(judge, &mut cache, &plan, rows, &params(Some(1000), None)))
            },
        ];
        let error = all[0].iter().zip(&all[1]).map(|(a, e)| (a - e).abs()).fold(0.0, f32::max);
        assert!(error <= 2e-5, "{spans:?}: {error}");
    }
    simulator.expect_no_violation();
}

#[test]
fn what_a_failing_sequence_writes_reaches_no_other_and_is_gone_when_its_blocks_are_cleared() {
    let simulator = Simulator::new();
    let b = &simulator.open(A2, DType::F32);
    let tables = tables(b, 2, 256);
    let width = KV_HEADS * HEAD_DIM;
    let step = |cache: &mut _, bad: bool| {
        let plan = plan(b, &[(3, 1), (200, 1)], &tables);
        let q = tensor(b, &uniform(1, 2 * HEADS * HEAD_DIM, 1.0), HEADS * HEAD_DIM);
        let mut values = uniform(2, 2 * width, 1.0);
        if bad {
            values[..width].fill(f32::NAN);
        }
        let kv = tensor(b, &values, width);
        let mut out = b.tensor(2, HEADS * HEAD_DIM).unwrap();
        b.paged_attention(&q, &kv, &kv, cache, 0, &plan, &params(None, None), &mut out).unwrap();
        let mut values = read(b, &out);
        (values.split_off(HEADS * HEAD_DIM), values)
    };
    let sound = step(&mut cache(b, FULL, KvDtype::F32, 512), false);
    let mut cache = cache(b, FULL, KvDtype::F32, 512);
    let (other, failed) = step(&mut cache, true);
    assert_eq!(other, sound.0);
    assert!(failed.iter().all(|x| x.is_nan()));
    b.clear_blocks(&mut cache, &tables[0], &[]).unwrap();
    // Others' keys and values as before, and the sequence's as in a cache that nobody used.
    assert_eq!(step(&mut cache, false), sound);
    simulator.expect_no_violation();
}

#[test]
fn the_largest_column_of_a_row_is_chosen_on_the_device_unless_the_row_is_not_finite() {
    let simulator = Simulator::new();
    for dtype in [DType::F32, DType::BF16] {
        let b = &simulator.open(A2, dtype);
        const COLS: usize = 1001;
        let mut values = uniform(1, 5 * COLS, 1.0);
        let largest = [0, COLS - 1, 17];
        for (row, &column) in largest.iter().enumerate() {
            values[row * COLS + column] = 2.0;
        }
        values[3 * COLS + 5] = f32::NAN;
        values[4 * COLS + 1000] = f32::NEG_INFINITY;
        let x = tensor(b, &values, COLS);
        simulator.reset();
        let mut chosen = Vec::new();
        b.read_chosen(&b.choose(&x, &[Draw::LARGEST; 5]).unwrap(), &mut chosen).unwrap();
        let expected: Vec<_> = largest.map(|column| Some(column as u32)).into_iter().chain([None, None]).collect();
        assert_eq!(chosen, expected, "{dtype}");
        let copies = simulator.report()["copies"]["device_to_host"].clone();
        assert_eq!((&copies["count"], &copies["bytes"]), (&1.into(), &(5 * 8).into()), "{dtype}: {copies}");
    }
    simulator.expect_no_violation();
}

#[test]
fn the_end_of_a_step_that_chooses_nothing_is_waited_for() {
    let simulator = Simulator::new();
    let b = &simulator.open(A2, DType::BF16);
    let mut x = tensor(b, &[1.0, 2.0], 2);
    let waited = || simulator.report()["calls"]["aclrtSynchronizeStreamWithTimeout"].as_u64().unwrap_or(0);
    let before = waited();
    b.scale(&mut x, 2.0).unwrap();
    let end = b.submit().unwrap();
    assert_eq!(waited(), before, "nobody has waited");
    let mut chosen = vec![None];
    b.read_chosen(&end, &mut chosen).unwrap();
    assert_eq!((waited() - before, chosen), (1, vec![]));
    simulator.expect_no_violation();
}

#[test]
fn no_rows_are_no_work() {
    let simulator = Simulator::new();
    let b = &simulator.open(A2, DType::BF16);
    let x = tensor(b, &[1.0, 2.0], 2);
    let mut none = b.tensor(4, 2).unwrap();
    b.gather_rows(&x, &[], &mut none).unwrap();
    b.scale(&mut none, 2.0).unwrap();
    assert!(read(b, &none).is_empty());
    let mut chosen = vec![None];
    b.read_chosen(&b.choose(&none, &[]).unwrap(), &mut chosen).unwrap();
    assert_eq!(chosen, []);
    simulator.expect_no_violation();
}

#[test]
fn a_weight_beyond_the_range_of_f16_is_refused_by_name() {
    let simulator = Simulator::new();
    let b = &simulator.open(A2, DType::F16);
    let bytes: Vec<u8> = [1.0_f32, 70_000.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let weight = HostTensor::new("loud", DType::F32, vec![1, 2], &bytes);
    match b.linear_weight(&HostLinear { weight, bias: None, format: WeightFormat::F16, purpose: Purpose::Product }) {
        Err(DeviceError::Format { tensor, reason, .. }) => {
            assert_eq!(tensor, "loud");
            assert!(reason.contains("range of f16") && reason.contains("bf16"), "{reason}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted"),
    }
}
