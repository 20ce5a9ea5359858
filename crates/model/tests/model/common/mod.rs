//! What the tests share: the golden checkpoints, and a driver that does an engine's bookkeeping in the
//! plainest way.

#![allow(dead_code)] // each test file uses its part

pub mod ahead;
pub mod checkpoint;
pub mod gguf;

use std::path::PathBuf;
use std::sync::Arc;

use baton_device::{Backend, CompressedOps, DType, LatentOps, WeightFormat};
use baton_device_cpu::{CpuBackend, CpuOptions, Isa};
use baton_model::{
    Adapter, Files, KvCacheSize, LoadOptions, ModelRunner, PASSED, Passing, Runner, SampleRequest, SampledToken,
    SamplingParams, Score, ScoreRequest, SequenceStep, StepPlan, Tokens, load,
};
use safetensors::SafeTensors;
use serde_json::Value;

pub const CASES: [&str; 22] = [
    "llama-rope3",
    "llama-256",
    "llama-bias",
    "mistral-window",
    "mixtral",
    "qwen2-tied",
    "qwen2-untied",
    "qwen2-window",
    "qwen3",
    "qwen3-moe",
    "qwen3-moe-sparse",
    "phi3",
    "gemma2",
    "gemma3",
    "deepseek-v2",
    "deepseek-v2-bias",
    "deepseek-v2-lite",
    "deepseek-v3",
    "deepseek-v32",
    "deepseek-v32-b",
    "deepseek-v4",
    "deepseek-v4-b",
];

/// Tiny Llamas in each quantised layout that is read (`models/golden/quantized`).
pub const QUANTIZED: [&str; 21] = [
    "packed-int4-groups",
    "packed-int4-shuffled",
    "packed-int4-channel",
    "packed-int8-groups",
    "packed-int8-channel",
    "packed-int8-channel-zeros",
    "gptq-int4-groups",
    "gptq-int4-shuffled",
    "gptq-int4-channel",
    "gptq-int8-groups",
    "gptq-int8-channel",
    "gptq-int8-channel-zeros",
    "gptq-v2-int4-groups",
    "awq-int4-groups",
    "int-int8-channel",
    "int-int8-channel-zeros",
    "fp8-tensor",
    "fp8-e5m2",
    "float-fp8-tensor",
    "float-fp8-channel",
    "mxfp4",
];

pub fn folder(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/golden").join(case)
}

pub fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

/// Drafts of a sequence in a step, at most: with all of them, the rows of logits are more than are read at once.
pub const MAX_DRAFT: usize = 4;

/// [`options`] for a checkpoint: DeepSeek-V4 takes no drafts, and its goldens are longer, for contexts close many entries.
pub fn options_of(case: &str) -> LoadOptions {
    match case.starts_with("deepseek-v4") {
        true => LoadOptions { max_draft_tokens: 0, max_model_len: Some(440), max_step_tokens: 440, ..options() },
        false => options(),
    }
}

pub fn options() -> LoadOptions {
    LoadOptions {
        max_model_len: Some(400),
        max_step_tokens: 400,
        max_step_sequences: 8,
        max_draft_tokens: MAX_DRAFT,
        kv_cache: KvCacheSize::AtMost(1 << 30),
        ..LoadOptions::default()
    }
}

/// The CPU with its best instruction set of those that round no activation for bf16 weights. Goldens are computed without
/// rounding: so must be what is judged by them to the last digits.
pub fn exact_cpu() -> CpuBackend {
    let cpu = |isa| CpuBackend::new(&CpuOptions { threads: 2, isa: Some(isa) }).unwrap();
    let exact = |cpu: &CpuBackend| !cpu.caps().narrow_activations.contains(&WeightFormat::BF16);
    Isa::available().into_iter().rev().map(cpu).find(exact).unwrap()
}

pub fn runner<B: Backend + LatentOps + CompressedOps>(backend: B, case: &str) -> ModelRunner<B> {
    let files = Files::folder(folder(case)).unwrap();
    // Goldens of quantised weights are computed from their exact values, which f32 holds.
    let quantized = !json(folder(case).join("config.json"))["quantization_config"].is_null();
    let options = LoadOptions { dtype: quantized.then_some(DType::F32), ..options_of(case) };
    load(backend, &files, &options).unwrap_or_else(|e| panic!("{case}: {e}")).0
}

/// A runner of a golden checkpoint, and adapters of `models/golden/lora` loaded for it.
pub fn adapted<B: Backend + LatentOps + CompressedOps>(
    backend: B,
    case: &str,
    adapters: &[&str],
) -> (ModelRunner<B>, Vec<Adapter>) {
    let options = LoadOptions { max_lora_rank: 16, ..options_of(case) };
    let runner = load(backend, &Files::folder(folder(case)).unwrap(), &options).unwrap().0;
    let loader = runner.adapter_loader().unwrap();
    let load = |name: &&str| loader.load(&folder("lora").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let adapters = adapters.iter().map(load).collect();
    (runner, adapters)
}

/// A prompt with what transformers computed from it.
pub struct Prompt {
    pub name: String,
    pub ids: Vec<u32>,
    pub greedy_ids: Vec<u32>,
    pub greedy_logprobs: Vec<f64>,
    /// Logits after the last token.
    pub last_logits: Vec<f64>,
    /// Only on `short`.
    pub short: Option<Short>,
}

pub struct Short {
    pub all_logits: Vec<f32>,
    /// Per position the likeliest 20, best first.
    pub top20: Vec<Vec<(u32, f64)>>,
    /// Of each prompt token from the second on.
    pub prompt_logprobs: Vec<f64>,
}

pub fn prompts(case: &str) -> Vec<Prompt> {
    let golden = json(folder(case).join("golden.json"));
    let bytes = std::fs::read(folder(case).join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |v: &Value| -> Vec<u32> { serde_json::from_value(v.clone()).unwrap() };
    let floats = |v: &Value| -> Vec<f64> { serde_json::from_value(v.clone()).unwrap() };
    let read = |prompt: &Value| {
        let name = prompt["name"].as_str().unwrap().to_owned();
        let last = tensors.tensor(&format!("{name}.last_logits.f64")).unwrap();
        let short = prompt.get("top20_logprobs").map(|top| {
            let all = tensors.tensor("short.all_logits.f32").unwrap();
            Short {
                all_logits: all.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
                top20: serde_json::from_value(top.clone()).unwrap(),
                prompt_logprobs: floats(&prompt["prompt_logprobs"]),
            }
        });
        Prompt {
            ids: ids(&prompt["ids"]),
            greedy_ids: ids(&prompt["greedy_ids"]),
            greedy_logprobs: floats(&prompt["greedy_logprobs"]),
            last_logits: last.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
            name,
            short,
        }
    };
    golden["prompts"].as_array().unwrap().iter().map(read).collect()
}

/// A sequence as an engine would keep it.
#[derive(Clone)]
pub struct Sequence {
    pub id: u64,
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    pub num_computed: usize,
    pub table: Vec<u32>,
    pub passing: Vec<u32>,
    pub params: Arc<SamplingParams>,
    pub adapter: Option<Adapter>,
    pub output: Vec<SampledToken>,
    /// What is asked of each position of the prompt.
    pub score: Option<fn(&Self, usize) -> ScoreRequest>,
    /// What was told, from the first position on.
    pub scores: Vec<Score>,
}

impl Sequence {
    pub fn new(id: u64, prompt: &[u32], params: SamplingParams) -> Self {
        Self {
            id,
            tokens: prompt.to_vec(),
            prompt_len: prompt.len(),
            num_computed: 0,
            table: Vec::new(),
            passing: Vec::new(),
            params: Arc::new(params),
            adapter: None,
            output: Vec::new(),
            score: None,
            scores: Vec::new(),
        }
    }

    /// Asks for the next token, another that depends on the position, and the likeliest three.
    pub fn scored(self) -> Self {
        let request = |sequence: &Self, position: usize| {
            let next = sequence.tokens[..sequence.prompt_len].get(position + 1).copied();
            let ids = next.into_iter().chain([position as u32 % 200]).collect();
            ScoreRequest { row: position - sequence.num_computed, ids, top: 3, hidden: true }
        };
        Self { score: Some(request), ..self }
    }

    pub fn adapted(self, adapter: Option<&Adapter>) -> Self {
        Self { adapter: adapter.cloned(), ..self }
    }

    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    /// The next `count` tokens, sampling if they are the last known ones.
    pub fn step(&self, count: usize) -> SequenceStep {
        let end = self.num_computed + count;
        let sample = (end == self.tokens.len()).then(|| SampleRequest {
            params: self.params.clone(),
            position: (self.tokens.len() - self.prompt_len) as u32,
            history: if self.params.needs_history() { self.tokens.clone() } else { Vec::new() },
            prompt_len: self.prompt_len,
            masks: None,
        });
        SequenceStep {
            id: self.id,
            num_computed: self.num_computed,
            tokens: Tokens::Known(self.tokens[self.num_computed..end].to_vec()),
            draft: Vec::new(),
            block_table: self.table.clone(),
            passing_table: self.passing.clone(),
            adapter: self.adapter.clone(),
            sample,
            propose: 0,
            scores: self.score.map_or(Vec::new(), |score| {
                let positions = self.num_computed.max(self.scores.len())..end.min(self.prompt_len);
                positions.map(|position| score(self, position)).collect()
            }),
        }
    }
}

/// Hands out blocks in a scattered order, so that no test passes because blocks happen to be adjacent. Passing blocks are taken
/// back as soon as they can be, and handed out again first.
pub struct Pool {
    free: Vec<u32>,
    passing: Option<(Passing, Vec<u32>)>,
    block_size: usize,
}

impl Pool {
    pub fn new(runner: &dyn Runner) -> Self {
        let spec = runner.spec();
        let scattered = |count: usize| {
            let count = count as u32;
            let stride = (1..count).rev().find(|s| gcd(*s, count) == 1 && *s < count * 2 / 3).unwrap_or(1);
            (0..count).map(|i| (u64::from(i) * u64::from(stride) % u64::from(count)) as u32).collect()
        };
        let passing = spec.passing.map(|passing| (passing, scattered(passing.num_blocks)));
        Self { free: scattered(spec.num_blocks), passing, block_size: spec.block_size }
    }

    /// Gives a sequence blocks for its first `tokens` tokens, of which a step computes those that are not computed.
    pub fn cover(&mut self, sequence: &mut Sequence, tokens: usize) {
        while sequence.table.len() * self.block_size < tokens {
            sequence.table.push(self.free.pop().expect("the pool is large enough"));
        }
        let Some((Passing { reach, .. }, free)) = &mut self.passing else { return };
        let gone = sequence.num_computed.saturating_sub(*reach) / self.block_size;
        let passed = sequence.passing.iter_mut().take(gone).filter(|block| **block != PASSED);
        free.extend(passed.map(|block| std::mem::replace(block, PASSED)));
        while sequence.passing.len() * self.block_size < tokens {
            sequence.passing.push(free.pop().expect("the pool is large enough"));
        }
    }

    /// As above, for all its tokens.
    pub fn cover_all(&mut self, sequence: &mut Sequence) {
        let tokens = sequence.tokens.len();
        self.cover(sequence, tokens);
    }

    /// Takes a sequence's blocks back; they are handed out again first.
    pub fn release(&mut self, sequence: &mut Sequence) {
        self.free.append(&mut sequence.table);
        if let Some((_, free)) = &mut self.passing {
            free.extend(sequence.passing.drain(..).filter(|block| *block != PASSED));
        }
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// One step: `counts[i]` tokens of sequence i (0 leaves it out).
pub fn step(runner: &mut dyn Runner, pool: &mut Pool, sequences: &mut [Sequence], counts: &[usize]) {
    let drafts = vec![Vec::new(); sequences.len()];
    step_with_drafts(runner, pool, sequences, counts, &drafts);
}

/// As above, with drafts for those that sample.
pub fn step_with_drafts(
    runner: &mut dyn Runner,
    pool: &mut Pool,
    sequences: &mut [Sequence],
    counts: &[usize],
    drafts: &[Vec<u32>],
) {
    let mut plan = StepPlan::default();
    for ((sequence, &count), draft) in
        sequences.iter_mut().zip(counts).zip(drafts).filter(|((_, count), _)| **count > 0)
    {
        let end = sequence.num_computed + count + draft.len();
        pool.cover(sequence, end);
        plan.sequences.push(SequenceStep { draft: draft.clone(), ..sequence.step(count) });
    }
    let output = runner.step(&plan).unwrap();
    assert_eq!(output.sequences.len(), plan.sequences.len());
    let stepped = sequences.iter_mut().zip(counts).filter(|(_, count)| **count > 0);
    for ((sequence, count), out) in stepped.zip(output.sequences) {
        assert_eq!(out.id, sequence.id);
        sequence.num_computed += count;
        assert_eq!(out.sampled.is_empty(), sequence.num_computed < sequence.tokens.len());
        sequence.scores.extend(out.scores.unwrap());
        for sampled in out.sampled {
            let sampled = sampled.unwrap();
            // Behind the first, what was sampled before was a draft, which is computed.
            sequence.num_computed = sequence.tokens.len();
            sequence.tokens.push(sampled.token);
            sequence.output.push(sampled);
        }
    }
}

/// Runs one sequence alone, its prompt in one step.
pub fn generate(runner: &mut dyn Runner, prompt: &[u32], params: SamplingParams, count: usize) -> Vec<SampledToken> {
    generate_with(runner, None, prompt, params, count)
}

/// As above, with an adapter.
pub fn generate_with(
    runner: &mut dyn Runner,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    params: SamplingParams,
    count: usize,
) -> Vec<SampledToken> {
    alone(runner, Sequence::new(1, prompt, params).adapted(adapter), count).output
}

/// Runs a sequence alone until `count` tokens are out, its prompt in one step.
pub fn alone(runner: &mut dyn Runner, sequence: Sequence, count: usize) -> Sequence {
    let mut pool = Pool::new(runner);
    let mut sequences = [sequence];
    while sequences[0].output.len() < count {
        let remaining = sequences[0].remaining();
        step(runner, &mut pool, &mut sequences, &[remaining]);
    }
    let [sequence] = sequences;
    sequence
}

/// The logits of all tokens of a prompt, computed in one step.
/// How far the last logits of any prompt of a copy are from the golden ones of the case.
pub fn off_by(case: &str, copy: &checkpoint::Copy) -> f64 {
    let (mut runner, _) = copy.load().unwrap();
    let worst = prompts(case).into_iter().map(|prompt| {
        let logits = all_logits(&mut runner, &prompt.ids);
        let last = &logits[logits.len() - prompt.last_logits.len()..];
        assert!(last.iter().all(|logit| logit.is_finite()), "{case}");
        last.iter().zip(&prompt.last_logits).map(|(a, e)| (f64::from(*a) - e).abs()).fold(0.0, f64::max)
    });
    worst.fold(0.0, f64::max)
}

pub fn all_logits<B: Backend + LatentOps + CompressedOps>(runner: &mut ModelRunner<B>, prompt: &[u32]) -> Vec<f32> {
    all_logits_with(runner, None, prompt)
}

/// As above, with an adapter.
pub fn all_logits_with<B: Backend + LatentOps + CompressedOps>(
    runner: &mut ModelRunner<B>,
    adapter: Option<&Adapter>,
    prompt: &[u32],
) -> Vec<f32> {
    let mut sequence = Sequence::new(1, prompt, SamplingParams::greedy()).adapted(adapter);
    Pool::new(runner).cover(&mut sequence, prompt.len());
    runner.logits(&StepPlan::new(vec![sequence.step(prompt.len())])).unwrap()
}

/// A small generator for tests (splitmix64), so that a failing seed can be run again.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `n - 1`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}
