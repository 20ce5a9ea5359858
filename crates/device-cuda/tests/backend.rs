//! What a backend is beyond the shared cases: found or refused, its kernels kept on disk, its steps replayed.

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use baton_device::{
    Activation, AttentionBatch, AttentionParams, Backend, DType, DeviceError, Draw, HostLinear, HostRope, HostTensor,
    KvBlocks, KvSpec, LayerKv, Purpose, Result, RopeLayout, SequenceSpan, TokenId, TokenIds, WeightFormat,
    conformance::uniform,
};
use baton_device_cuda::{CudaBackend, CudaOptions, probe};
use common::{Simulator, options};

const HIDDEN: usize = 64;
const HEADS: usize = 4;
const VOCABULARY: usize = 100;
const BLOCK_TABLE: [u32; 4] = [3, 1, 2, 0];

type Chosen = <CudaBackend as Backend>::Chosen;

/// How the token of a step is drawn: every other is the greedy one.
fn draw(start: usize) -> Draw {
    let temperature = (start % 2) as f32 * 0.8;
    Draw { temperature, top_k: 40, uniform: start as f64 * 0.37 % 1.0, ..Draw::LARGEST }
}

/// A decoder of one layer.
struct Decoder<'a> {
    b: &'a CudaBackend,
    embedding: <CudaBackend as Backend>::Linear,
    qkv: [<CudaBackend as Backend>::Linear; 3],
    up: <CudaBackend as Backend>::Linear,
    norm: <CudaBackend as Backend>::Vector,
    rope: <CudaBackend as Backend>::Rope,
    cache: <CudaBackend as Backend>::KvCache,
    x: Vec<<CudaBackend as Backend>::Tensor>,
    logits: <CudaBackend as Backend>::Tensor,
}

impl<'a> Decoder<'a> {
    fn new(b: &'a CudaBackend) -> Result<Self> {
        let weight = |rows: usize, cols: usize, seed: u64| {
            let values = uniform(seed, rows * cols, (cols as f32).sqrt().recip());
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let weight = HostTensor::new("weight", DType::F32, vec![rows, cols], &bytes);
            b.linear_weight(&HostLinear { weight, bias: None, format: WeightFormat::BF16, purpose: Purpose::Product })
        };
        let ones: Vec<u8> = [1.0f32; HIDDEN].iter().flat_map(|v| v.to_le_bytes()).collect();
        let head_dim = HIDDEN / HEADS;
        let inv_freq = (0..head_dim / 2).map(|i| 0.5f32.powi(i as i32)).collect();
        let spec = KvSpec {
            layers: vec![LayerKv::Full { kv_heads: HEADS, head_dim }],
            dtype: baton_device::KvDtype::BF16,
            block_size: b.caps().kv_block_size,
        };
        Ok(Self {
            b,
            embedding: weight(VOCABULARY, HIDDEN, 1)?,
            qkv: [weight(HIDDEN, HIDDEN, 2)?, weight(HIDDEN, HIDDEN, 3)?, weight(HIDDEN, HIDDEN, 4)?],
            up: weight(HIDDEN, HIDDEN, 5)?,
            norm: b.vector(&HostTensor::new("norm", DType::F32, vec![HIDDEN], &ones))?,
            rope: b.rope_table(&HostRope { inv_freq, scale: 1.0, max_positions: 64 })?,
            cache: b.kv_cache(&spec, KvBlocks::kept(BLOCK_TABLE.len()))?,
            x: (0..7).map(|_| b.tensor(16, HIDDEN)).collect::<Result<_>>()?,
            logits: b.tensor(16, VOCABULARY)?,
        })
    }

    /// Tokens at positions `start..`, and the one behind the last of them.
    fn step(&mut self, ids: &[u32], start: usize) -> Result<u32> {
        let chosen = self.begin(TokenIds::Known(ids), ids.len(), start)?;
        self.end(&chosen)
    }

    fn end(&self, chosen: &Chosen) -> Result<u32> {
        let mut tokens = Vec::new();
        self.b.read_chosen(chosen, &mut tokens)?;
        Ok(tokens[0].expect("finite logits"))
    }

    /// A step of `len` tokens that nobody waits for.
    fn begin(&mut self, ids: TokenIds<'_, Chosen>, len: usize, start: usize) -> Result<Chosen> {
        let Self { b, embedding, qkv, up, norm, rope, cache, x, logits } = self;
        let sequences = [SequenceSpan { start, len, block_table: &BLOCK_TABLE, passing_table: &[] }];
        let plan = b.plan_attention(&AttentionBatch { sequences: &sequences })?;
        let [residual, normed, q, k, v, mixed, last] = x.as_mut_slice() else { unreachable!("as made") };
        b.embed(ids, embedding, residual)?;
        b.rms_norm(residual, norm, 1e-6, normed)?;
        let [wq, wk, wv] = &*qkv;
        b.linear_group(normed, &mut [(wq, &mut *q), (wk, &mut *k), (wv, &mut *v)])?;
        let head_dim = HIDDEN / HEADS;
        let layout = RopeLayout { heads: HEADS, head_dim, offset: 0, dim: head_dim, interleaved: false };
        b.rope(q, layout, rope, &plan)?;
        b.rope(k, layout, rope, &plan)?;
        let scale = (head_dim as f32).sqrt().recip();
        let params = AttentionParams { heads: HEADS, kv_heads: HEADS, head_dim, scale, window: None, softcap: None };
        b.paged_attention(q, k, v, cache, 0, &plan, &params, mixed)?;
        b.add_rms_norm(mixed, residual, norm, 1e-6, normed)?;
        b.linear(normed, up, q)?;
        b.gated_activation(Activation::Silu, q, normed, k)?;
        b.add(residual, k)?;
        b.gather_rows(residual, &[len as u32 - 1], last)?;
        b.linear(last, embedding, logits)?;
        b.choose(logits, &[draw(start)])
    }

    fn generate(&mut self, tokens: usize) -> Result<Vec<u32>> {
        let mut ids = vec![self.step(&[5, 17, 42], 0)?];
        for position in 3..tokens {
            ids.push(self.step(&[*ids.last().expect("one")], position)?);
        }
        Ok(ids)
    }
}

#[test]
fn decode_steps_are_one_graph_each_and_allocate_nothing() {
    let Some(simulator) = Simulator::new() else { return };
    let b = simulator.open(DType::BF16);
    let mut decoder = Decoder::new(&b).unwrap();
    let mut last = decoder.generate(9).unwrap().pop().unwrap();
    let (before, calls) = (b.statistics(), simulator.count("calls.cuLaunchKernel"));
    const STEPS: u64 = 20;
    for position in 9..9 + STEPS as usize {
        last = decoder.step(&[last], position).unwrap();
    }
    let after = b.statistics();
    assert_eq!(after.replays - before.replays, STEPS);
    assert_eq!((after.lists, after.captures, after.allocations), (before.lists, before.captures, before.allocations));
    assert_eq!(simulator.count("calls.cuLaunchKernel"), calls);
    // The plan, the token, the row of which logits are wanted, how it is drawn; the token.
    assert_eq!((after.uploads - before.uploads, after.reads - before.reads), (4 * STEPS, STEPS));
    assert_eq!(after.waits - before.waits, STEPS);
    assert!((after.uploaded - before.uploaded) / STEPS < 1024, "{} bytes", after.uploaded - before.uploaded);
    assert_eq!(after.read - before.read, 4 * STEPS);
    eprintln!("{} launches a step, {} graphs", (after.launches - before.launches) / STEPS, after.captures);
}

#[test]
fn a_step_begun_before_the_last_has_ended_is_the_same_graph_and_gives_the_same_tokens() {
    let Some(simulator) = Simulator::new() else { return };
    let b = simulator.open(DType::BF16);
    const TOKENS: usize = 40;
    let expected = Decoder::new(&b).unwrap().generate(TOKENS).unwrap();

    let mut decoder = Decoder::new(&b).unwrap();
    let mut tokens = decoder.generate(9).unwrap();
    let before = b.statistics();
    let mut ahead = decoder.begin(TokenIds::Known(&[tokens[tokens.len() - 1]]), 1, 9).unwrap();
    for position in 10..TOKENS {
        let (begun, launched) = (b.statistics(), simulator.count("calls.cuGraphLaunch"));
        let next = decoder.begin(TokenIds::Chosen { tokens: &ahead, ids: &[TokenId::Chosen(0)] }, 1, position).unwrap();
        assert_eq!(b.statistics().waits, begun.waits, "to begin a step waits for nothing");
        assert_eq!(simulator.count("calls.cuGraphLaunch"), launched + 1);
        let copied = simulator.count("copies.device_to_host");
        tokens.push(decoder.end(&ahead).unwrap());
        assert_eq!(b.statistics().waits, begun.waits + 1);
        assert_eq!(simulator.count("copies.device_to_host"), copied + 1, "the step begun last has not run");
        ahead = next;
    }
    tokens.push(decoder.end(&ahead).unwrap());
    assert_eq!(tokens, expected);
    let after = b.statistics();
    assert_eq!((after.lists, after.captures, after.allocations), (before.lists, before.captures, before.allocations));
    drop((decoder, ahead));
    drop(b);
    simulator.expect_clean();
}

#[test]
fn the_end_of_a_step_that_chooses_nothing_is_waited_for_and_nothing_behind_it() {
    let Some(simulator) = Simulator::new() else { return };
    let b = simulator.open(DType::BF16);
    let mut x = b.tensor(2, 8).unwrap();
    b.write(&[1.0; 16], &mut x).unwrap();
    let mut ends: Vec<_> = (0..2)
        .map(|_| {
            (0..3).for_each(|_| b.scale(&mut x, 2.0).unwrap());
            b.submit().unwrap()
        })
        .collect();
    let run = || simulator.count("kernels.scale<bf16>");
    assert_eq!(run(), 0, "nobody has waited");
    for (end, expected) in ends.drain(..).zip([3, 6]) {
        let mut tokens = vec![Some(1)];
        b.read_chosen(&end, &mut tokens).unwrap();
        assert_eq!((run(), tokens.len()), (expected, 0));
    }
    assert_eq!(b.statistics().read, 0);
}

#[test]
#[should_panic(expected = "only what was chosen last")]
fn tokens_that_others_replaced_are_not_looked_up() {
    let Some(simulator) = Simulator::new() else { panic!("only what was chosen last: skipped") };
    let b = simulator.open(DType::BF16);
    let mut decoder = Decoder::new(&b).unwrap();
    let first = decoder.begin(TokenIds::Known(&[1]), 1, 0).unwrap();
    decoder.begin(TokenIds::Known(&[2]), 1, 1).unwrap();
    let _ = decoder.begin(TokenIds::Chosen { tokens: &first, ids: &[TokenId::Chosen(0)] }, 1, 2);
}

#[test]
fn graphs_change_no_bit_and_neither_does_an_allocation_for_each_buffer() {
    let Some(simulator) = Simulator::new() else { return };
    let tokens = |options: CudaOptions| {
        let b = CudaBackend::new(&options).unwrap();
        let mut decoder = Decoder::new(&b).unwrap();
        let ids = decoder.generate(40).unwrap();
        let mut logits = Vec::new();
        b.read(&decoder.logits, &mut logits).unwrap();
        (ids, logits)
    };
    let plain = tokens(CudaOptions { graphs: false, ..options(DType::BF16) });
    assert!(plain.1.len() == VOCABULARY && plain.1.iter().all(|x| x.is_finite()));
    assert_eq!(tokens(options(DType::BF16)), plain);
    assert_eq!(tokens(CudaOptions { isolated: true, ..options(DType::BF16) }), plain);
    simulator.expect_clean();
}

#[test]
fn kernels_are_compiled_once_and_again_when_a_file_is_damaged() {
    let Some(_simulator) = Simulator::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("kernels");
    // A file that is written anew is another.
    let files = || -> BTreeMap<PathBuf, u64> {
        let b = CudaBackend::new(&CudaOptions { cache: Some(cache.clone()), ..options(DType::BF16) }).unwrap();
        assert_eq!(Decoder::new(&b).unwrap().generate(5).unwrap().len(), 3);
        let files = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap());
        files.map(|file| (file.path(), file.metadata().unwrap().ino())).collect()
    };
    let first = files();
    assert!(!first.is_empty());
    assert_eq!(files(), first);
    let (damaged, _) = first.first_key_value().unwrap();
    let bytes = std::fs::read(damaged).unwrap();
    std::fs::write(damaged, &bytes[..bytes.len() - 1]).unwrap();
    let third = files();
    let changed: Vec<_> = third.iter().filter(|(path, file)| first.get(*path) != Some(file)).collect();
    assert_eq!((third.len(), changed.len(), changed[0].0), (first.len(), 1, damaged));
    assert_eq!(std::fs::read(damaged).unwrap().len(), bytes.len());
}

#[test]
fn a_gpu_is_described_and_one_that_is_too_old_or_absent_refused() {
    let Some(simulator) = Simulator::new() else { return };
    let facts = probe(0);
    assert_eq!((facts.missing.as_slice(), facts.count), ([].as_slice(), 1));
    assert_eq!(facts.details["compute capability"], "9.0");
    assert_eq!(facts.memory.map(|memory| memory.total), Some(2 << 30));
    assert!(facts.chip.is_some_and(|chip| !chip.is_empty()));
    assert!(facts.libraries.iter().all(|library| library.opened.len() == 1), "{:?}", facts.libraries);
    let versions = [("NCCL", "2.27"), ("NVRTC", "13.0"), ("cuBLASLt", "13.0"), ("driver's CUDA", "13.0")];
    assert_eq!(facts.versions, versions.map(|(what, version)| (what.to_owned(), version.to_owned())).into());
    simulator.expect_clean();

    let refused = |device: u32, word: &str| {
        let facts = probe(device);
        assert!(facts.missing.iter().any(|reason| reason.contains(word)), "{:?}", facts.missing);
        match CudaBackend::new(&CudaOptions { device, ..options(DType::BF16) }).map(|_| ()) {
            Err(DeviceError::Unavailable { reason, .. }) => assert!(reason.contains(word), "{reason}"),
            other => panic!("{other:?}"),
        }
    };
    refused(1, "1 devices");
    simulator.control("cc=75");
    refused(0, "7.5");
    simulator.control("devices=0");
    refused(0, "NO_DEVICE");
}
