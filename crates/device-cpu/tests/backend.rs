//! What the backend promises beside numbers: refusals, capabilities, and that nothing stale is read.

use baton_device::conformance::uniform;
use baton_device::{
    AttentionBatch, AttentionParams, Backend, BlockFormat, CompressedOps, DType, DeviceError, Entries, HostLinear,
    HostRope, HostTensor, KvBlocks, KvDtype, KvSpec, LayerKv, PoolKv, Pooling, Purpose, Reads, RopeLayout,
    SequenceSpan, WeightFormat, WindowedParams,
};
use baton_device_cpu::{CpuBackend, CpuOptions, Isa, KvCache};

fn backend(threads: usize) -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads, isa: None }).unwrap()
}

#[test]
fn an_instruction_set_that_the_machine_lacks_is_refused_by_name() {
    let available = Isa::available();
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Neon, Isa::NeonDotprod] {
        match CpuBackend::new(&CpuOptions { threads: 1, isa: Some(isa) }) {
            Ok(backend) => {
                assert!(available.contains(&isa));
                assert_eq!(backend.caps().isa, isa.to_string());
            }
            Err(DeviceError::Unavailable { reason, .. }) => {
                assert!(!available.contains(&isa));
                assert!(reason.contains(&isa.to_string()) && reason.contains("portable"), "{reason}");
            }
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn caps_say_what_was_chosen() {
    let caps = backend(3).caps().clone();
    assert_eq!((caps.device.as_str(), caps.threads, caps.row_invariant), ("cpu", 3, true));
    assert_eq!(caps.isa, Isa::detect().to_string());
    assert!(backend(0).caps().threads >= 1);
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let b = backend(1);
    let spec = KvSpec {
        layers: vec![LayerKv::Full { kv_heads: 8, head_dim: 128 }; 32],
        dtype: KvDtype::F32,
        block_size: b.caps().kv_block_size,
    };
    assert!(matches!(b.kv_cache(&spec, KvBlocks::kept(1 << 44)), Err(DeviceError::OutOfMemory { .. })));
    assert!(matches!(b.tensor(1 << 50, 4096), Err(DeviceError::OutOfMemory { .. })));
}

#[test]
fn a_large_cache_costs_nothing_until_it_is_used() {
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok())
    };
    let Some(before) = resident() else { return };
    let b = backend(1);
    let spec = KvSpec {
        layers: vec![LayerKv::Latent { rank: 512, rope: 64, index: None }; 4],
        dtype: KvDtype::F32,
        block_size: b.caps().kv_block_size,
    };
    let cache = b.kv_cache(&spec, KvBlocks::kept(2000)).unwrap();
    let grown = resident().unwrap().saturating_sub(before);
    assert!(grown < 32 << 10, "{grown} kB of {} taken at once", (2000 * spec.kept_bytes()) >> 10);
    drop(cache);
}

#[test]
fn blocks_are_made_of_whole_ones_or_refused() {
    let data = vec![0; 4 * 33 * 4];
    let weight = HostTensor::new("odd", DType::F32, vec![4, 33], &data);
    let format = WeightFormat::Ggml(BlockFormat::Q8_0);
    let src = HostLinear { weight, bias: None, format, purpose: Purpose::Product };
    let Err(error) = backend(1).linear_weight(&src) else { panic!("accepted") };
    assert!(error.to_string().contains("odd") && error.to_string().contains("multiple of 32"), "{error}");
}

/// Positions that a sequence has not reached may hold what another one left, even infinities.
#[test]
fn what_lies_beyond_a_sequence_is_never_read() {
    let each = Isa::available().into_iter().flat_map(|isa| KvDtype::ALL.map(|dtype| (isa, dtype)));
    for (isa, dtype) in each {
        let b = CpuBackend::new(&CpuOptions { threads: 1, isa: Some(isa) }).unwrap();
        let params = AttentionParams { heads: 2, kv_heads: 1, head_dim: 20, scale: 1.0, window: None, softcap: None };
        let layer = LayerKv::Full { kv_heads: 1, head_dim: 20 };
        let spec = KvSpec { layers: vec![layer], dtype, block_size: b.caps().kv_block_size };
        let mut cache = b.kv_cache(&spec, KvBlocks::kept(2)).unwrap();
        let mut attend = |len: usize, value: f32| {
            let mut out = b.tensor(len, 40).unwrap();
            let [mut q, mut k, mut v] = [40, 20, 20].map(|cols| b.tensor(len, cols).unwrap());
            b.write(&vec![1.0; len * 40], &mut q).unwrap();
            b.write(&vec![value; len * 20], &mut k).unwrap();
            b.write(&vec![value; len * 20], &mut v).unwrap();
            let sequences = [SequenceSpan { start: 0, len, block_table: &[1, 0], passing_table: &[] }];
            let plan = b.plan_attention(&AttentionBatch { sequences: &sequences }).unwrap();
            b.paged_attention(&q, &k, &v, &mut cache, 0, &plan, &params, &mut out).unwrap();
            let mut result = Vec::new();
            b.read(&out, &mut result).unwrap();
            result
        };
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            attend(30, poison);
            for len in [1, 5, 16, 18] {
                let clean = attend(len, 0.5);
                assert!(clean.iter().all(|v| (v - 0.5).abs() < 1e-6), "{isa}, {dtype}, {len} positions: {clean:?}");
                attend(30, poison);
            }
        }
    }
}

/// Nor what it left of pools: running sums, entries, keys of an indexer. And what is cleared is as if nothing had been there.
#[test]
fn pools_know_nothing_of_the_sequence_before() {
    const WIDTH: usize = 20;
    const INDEX: usize = 8;
    for (rate, dtype) in [3, 4, 16, 20].into_iter().flat_map(|rate| KvDtype::ALL.map(|dtype| (rate, dtype))) {
        let b = backend(2);
        let pool = PoolKv { rate, overlaps: true, index: Some(INDEX) };
        let layers = vec![LayerKv::Windowed { width: WIDTH, window: 5, pool: Some(pool) }];
        let spec = KvSpec { layers, dtype, block_size: b.caps().kv_block_size };
        let cache = || b.kv_cache(&spec, KvBlocks { kept: 5, passing: 6 }).unwrap();
        let vector = |len: usize| vec![0.5; len];
        let table = b.rope_table(&HostRope { inv_freq: vec![0.1], scale: 1.0, max_positions: 80 }).unwrap();
        let run = |cache: &mut KvCache, start: usize, len: usize, poison: Option<f32>| {
            let (block_table, passing_table): (&[u32], &[u32]) = (&[1, 0, 4, 2, 3], &[3, 5, 0, 2, 1]);
            let sequences = [SequenceSpan { start, len, block_table, passing_table }];
            let plan = b.plan_attention(&AttentionBatch { sequences: &sequences }).unwrap();
            let input = |cols: usize, seed: u64| {
                let mut x = b.tensor(len, cols).unwrap();
                let data = poison.map_or_else(|| uniform(seed, len * cols, 1.0), |poison| vec![poison; len * cols]);
                b.write(&data, &mut x).unwrap();
                x
            };
            for (width, entries) in [(WIDTH, Entries::Attended), (INDEX, Entries::Index)] {
                let pooling = Pooling {
                    values: &input(2 * width, 1),
                    gates: &input(2 * width, 2),
                    bias: &vector(rate * 2 * width),
                    norm: &vector(width),
                    eps: 1e-6,
                    layout: RopeLayout { heads: 1, head_dim: width, offset: 0, dim: 2, interleaved: true },
                    table: &table,
                };
                b.pool(&pooling, entries, cache, 0, &plan).unwrap();
            }
            let (q, weights, sink) = (input(2 * INDEX, 3), input(2, 4), vector(2));
            let reads = Reads::Chosen { q: &q, weights: &weights, top_k: 3 };
            let params = WindowedParams { window: 5, scale: 1.0, sink: &sink, reads };
            let mut out = b.tensor(len, 2 * WIDTH).unwrap();
            b.windowed_attention(&input(2 * WIDTH, 5), &input(WIDTH, 6), &params, cache, 0, &plan, &mut out).unwrap();
            let mut result = Vec::new();
            b.read(&out, &mut result).unwrap();
            result
        };
        let mut used = cache();
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for len in [1, 5, 16, 18, 70] {
                run(&mut used, 0, 80, Some(poison));
                let clean = run(&mut used, 0, len, None);
                assert!(clean.iter().all(|x| x.is_finite()), "rate {rate}, {dtype}, {len} positions: {clean:?}");
                assert_eq!(clean, run(&mut cache(), 0, len, None), "rate {rate}, {dtype}, {len} positions");
            }
            for start in [1, 17, 64] {
                run(&mut used, 0, 80, Some(poison));
                b.clear_blocks(&mut used, &[0, 1, 2, 3, 4], &[0, 1, 2, 3, 5]).unwrap();
                assert_eq!(
                    run(&mut used, start, 9, None),
                    run(&mut cache(), start, 9, None),
                    "rate {rate}, {dtype}, {start}"
                );
            }
        }
    }
}

#[test]
fn cleared_blocks_hold_zeros() {
    let b = backend(1);
    let layer = LayerKv::Full { kv_heads: 1, head_dim: 16 };
    let spec = KvSpec { layers: vec![layer], dtype: KvDtype::F32, block_size: b.caps().kv_block_size };
    let params = AttentionParams { heads: 1, kv_heads: 1, head_dim: 16, scale: 1.0, window: None, softcap: None };
    let mut cache = b.kv_cache(&spec, KvBlocks::kept(1)).unwrap();
    let one = |start: usize, value: f32, cache: &mut _| {
        let mut x = b.tensor(1, 16).unwrap();
        b.write(&[value; 16], &mut x).unwrap();
        let sequences = [SequenceSpan { start, len: 1, block_table: &[0], passing_table: &[] }];
        let plan = b.plan_attention(&AttentionBatch { sequences: &sequences }).unwrap();
        let mut out = b.tensor(1, 16).unwrap();
        b.paged_attention(&x, &x, &x, cache, 0, &plan, &params, &mut out).unwrap();
        let mut result = Vec::new();
        b.read(&out, &mut result).unwrap();
        result[0]
    };
    assert_eq!(one(0, 8.0, &mut cache), 8.0);
    b.clear_blocks(&mut cache, &[0], &[]).unwrap();
    // Position 0 is zero now: equal scores of zero for it and for a query of zero.
    assert_eq!(one(1, 0.0, &mut cache), 0.0);
}
