//! Every architecture against what Hugging Face transformers computes from the same checkpoint, in
//! float64 (see the goldens in `models/golden`): logits, greedy continuations, logprobs.

use crate::common::{CASES, Sequence, all_logits, alone, exact_cpu, folder, generate, options, prompts, runner};
use baton_device::{Backend, CompressedOps, DType, LatentOps, Reference};
use baton_device_ascend::{AscendBackend, AscendOptions};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_device_cuda::CudaBackend;
use baton_model::{Files, SamplingParams, ScoreRequest, Tensors, load};

/// On logits and logprobs, absolute: transformers' own float32 stays within 2e-4.
const TOLERANCE: f64 = 1e-3;

fn last_logits_agree<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, case: &str) {
    let mut runner = runner(make(), case);
    for prompt in prompts(case) {
        let logits = all_logits(&mut runner, &prompt.ids);
        let last = &logits[logits.len() - prompt.last_logits.len()..];
        close(last, &prompt.last_logits, &format!("{case}, {}", prompt.name));
        if let Some(short) = &prompt.short {
            let expected: Vec<f64> = short.all_logits.iter().map(|l| f64::from(*l)).collect();
            close(&logits, &expected, &format!("{case}, all of short"));
        }
    }
}

fn close(actual: &[f32], expected: &[f64], what: &str) {
    within(TOLERANCE, actual, expected, what);
}

fn within(tolerance: f64, actual: &[f32], expected: &[f64], what: &str) {
    assert_eq!(actual.len(), expected.len());
    let worst = actual.iter().zip(expected).map(|(a, e)| (f64::from(*a) - e).abs()).fold(0.0, f64::max);
    assert!(worst <= tolerance, "{what}: off by {worst}");
}

/// The first tokens of each continuation, as many as are asked for.
fn greedy_continuations_are_equal<B: Backend + LatentOps + CompressedOps>(
    make: impl Fn() -> B,
    case: &str,
    tokens: usize,
) {
    let mut runner = runner(make(), case);
    for mut prompt in prompts(case) {
        prompt.greedy_ids.truncate(tokens);
        prompt.greedy_logprobs.truncate(tokens);
        let params = SamplingParams { logprobs: Some(0), ..SamplingParams::greedy() };
        let output = generate(&mut runner, &prompt.ids, params, prompt.greedy_ids.len());
        let ids: Vec<u32> = output.iter().map(|t| t.token).collect();
        assert_eq!(ids, prompt.greedy_ids, "{case}, {}", prompt.name);
        let logprobs: Vec<f32> = output.iter().map(|t| t.logprob).collect();
        close(&logprobs, &prompt.greedy_logprobs, &format!("{case}, logprobs of {}", prompt.name));
    }
}

/// Samples after every prefix of `short`, with 20 logprobs.
fn prompt_logprobs_agree<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, case: &str) {
    let mut runner = runner(make(), case);
    let prompt = prompts(case).into_iter().find(|p| p.short.is_some()).unwrap();
    let short = prompt.short.as_ref().unwrap();
    let vocab = prompt.last_logits.len() as u32;
    for (i, expected) in short.top20.iter().enumerate() {
        let params = SamplingParams { logprobs: Some(vocab), ..SamplingParams::greedy() };
        let [output] = generate(&mut runner, &prompt.ids[..=i], params, 1).try_into().unwrap();
        assert_eq!(output.top.len(), vocab as usize);
        for ((id, logprob), (top_id, top_logprob)) in expected.iter().zip(&output.top) {
            assert!((logprob - f64::from(*top_logprob)).abs() <= TOLERANCE, "{case}, position {i}: {id}, {top_id}");
        }
        assert_eq!(output.top[0], (output.token, output.logprob));
        if let Some(expected) = short.prompt_logprobs.get(i) {
            let (_, logprob) = output.top.iter().find(|(id, _)| *id == prompt.ids[i + 1]).unwrap();
            assert!((expected - f64::from(*logprob)).abs() <= TOLERANCE, "{case}, position {i}");
        }
    }
}

/// One pass over `short` that scores each of its positions.
fn prompt_scores_agree<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, case: &str) {
    let mut runner = runner(make(), case);
    let prompt = prompts(case).into_iter().find(|p| p.short.is_some()).unwrap();
    let short = prompt.short.as_ref().unwrap();
    let request = |sequence: &Sequence, position: usize| {
        let next = sequence.tokens.get(position + 1).copied();
        ScoreRequest { row: position, ids: next.into_iter().collect(), top: 20, hidden: false }
    };
    let sequence = Sequence { score: Some(request), ..Sequence::new(1, &prompt.ids, SamplingParams::greedy()) };
    let scores = alone(&mut runner, sequence, 1).scores;
    assert_eq!((scores.len(), scores.last().unwrap().logprobs.len()), (prompt.ids.len(), 0));
    let logprobs: Vec<f32> = scores.iter().flat_map(|score| &score.logprobs).copied().collect();
    close(&logprobs, &short.prompt_logprobs, &format!("{case}, scores of short"));
    for (i, (score, expected)) in scores.iter().zip(&short.top20).enumerate() {
        let logprobs = |ids: &[(u32, f64)]| ids.iter().map(|(_, logprob)| *logprob).collect::<Vec<_>>();
        let top: Vec<f32> = score.top.iter().map(|(_, logprob)| *logprob).collect();
        close(&top, &logprobs(expected), &format!("{case}, the likeliest at {i}"));
    }
}

/// Hidden states are what the head multiplies: their products with it are the logits of the golden values.
fn hidden_states_agree<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, case: &str, head: &str) {
    let mut runner = runner(make(), case);
    let prompt = prompts(case).into_iter().find(|p| p.short.is_some()).unwrap();
    let request = |_: &Sequence, row: usize| ScoreRequest { row, hidden: true, ..ScoreRequest::default() };
    let sequence = Sequence { score: Some(request), ..Sequence::new(1, &prompt.ids, SamplingParams::greedy()) };
    let scores = alone(&mut runner, sequence, 1).scores;
    assert_eq!(scores.len(), prompt.ids.len());
    assert!(scores.iter().all(|score| score.logprobs.is_empty() && score.top.is_empty()));
    let tensors = Tensors::open(&Files::folder(folder(case)).unwrap()).unwrap();
    let bytes = tensors.read(head).unwrap().unwrap();
    let head: Vec<f32> =
        bytes.chunks_exact(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)).collect();
    let logits = all_logits(&mut runner, &prompt.ids);
    let vocab = logits.len() / prompt.ids.len();
    for (score, expected) in scores.iter().zip(logits.chunks_exact(vocab)) {
        let product = |row: &[f32]| row.iter().zip(&score.hidden).map(|(a, b)| a * b).sum::<f32>();
        let products: Vec<f32> = head.chunks_exact(score.hidden.len()).map(product).collect();
        let expected: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
        close(&products, &expected, case);
    }
}

#[test]
fn hidden_states_are_what_the_head_multiplies() {
    for (case, head) in [("qwen2-tied", "model.embed_tokens.weight"), ("deepseek-v3", "lm_head.weight")] {
        hidden_states_agree(Reference::new, case, head);
        hidden_states_agree(exact_cpu, case, head);
    }
}

/// The bundled model: trained, so its answers have wide margins.
fn bundled_model_answers_as_transformers_does<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B) {
    let mut runner = runner(make(), "../abacus");
    let golden = crate::common::json(folder("../abacus").join("golden.json"));
    let ids = |v: &serde_json::Value| -> Vec<u32> { serde_json::from_value(v.clone()).unwrap() };
    let chats = golden["chats"].as_array().unwrap();
    for chat in chats {
        let expected = ids(&chat["output_ids"]);
        let output = generate(&mut runner, &ids(&chat["prompt_ids"]), SamplingParams::greedy(), expected.len());
        assert_eq!(output.iter().map(|t| t.token).collect::<Vec<_>>(), expected, "{}", chat["messages"]);
    }
    assert!(!chats.is_empty());
}

/// All goldens on one backend, a test per checkpoint; each may have an attribute.
macro_rules! goldens {
    (#[$attribute:meta] $backend:ident, $make:expr, $($test:ident: $case:literal),* $(,)?) => {
        mod $backend {
            use super::*;
            $(
                #[test]
                #[$attribute]
                fn $test() {
                    last_logits_agree($make, $case);
                    greedy_continuations_are_equal($make, $case, usize::MAX);
                    prompt_logprobs_agree($make, $case);
                    prompt_scores_agree($make, $case);
                }
            )*

            #[test]
            #[$attribute]
            fn bundled_model() {
                bundled_model_answers_as_transformers_does($make);
            }
        }
    };
    ($backend:ident, $make:expr) => {
        goldens!(#[cfg(test)] $backend, $make);
    };
    (#[$attribute:meta] $backend:ident, $make:expr) => {
        goldens!(
            #[$attribute] $backend, $make,
            llama_with_llama3_rope: "llama-rope3",
            llama_with_tied_embeddings: "llama-256",
            llama_with_biases: "llama-bias",
            qwen2_with_tied_embeddings_and_an_unused_window: "qwen2-tied",
            qwen2_in_float16: "qwen2-untied",
            qwen2_with_a_window_in_its_upper_layers: "qwen2-window",
            qwen3: "qwen3",
            qwen3_moe: "qwen3-moe",
            qwen3_moe_with_dense_layers_and_plain_weights: "qwen3-moe-sparse",
            mistral_with_a_window_in_three_shards: "mistral-window",
            mixtral_with_a_window: "mixtral",
            phi3_with_a_window: "phi3",
            gemma2: "gemma2",
            gemma3_with_scaled_rope: "gemma3",
            deepseek_v2_with_groups: "deepseek-v2",
            deepseek_v2_with_biases: "deepseek-v2-bias",
            deepseek_v2_lite_with_yarn: "deepseek-v2-lite",
            deepseek_v3_with_yarn: "deepseek-v3",
            deepseek_v3_in_blocks_of_fp8: "deepseek-v3-fp8",
        );
    };
}

/// Products in bf16, where a machine has them, round activations as training on GPUs does. Not for experts: those of a random
/// model differ entirely, and a rounding may choose others.
fn dense_checkpoints_as_they_are_stored_stay_near<B: Backend + LatentOps + CompressedOps>(
    tolerance: f64,
    make: impl Fn() -> B,
) {
    let has_experts = |case: &str| ["mixtral", "qwen3-moe", "deepseek"].iter().any(|name| case.starts_with(name));
    for case in CASES.into_iter().filter(|case| !has_experts(case)) {
        let files = Files::folder(folder(case)).unwrap();
        let mut runner = load(make(), &files, &options()).unwrap().0;
        for prompt in prompts(case) {
            let logits = all_logits(&mut runner, &prompt.ids);
            let last = &logits[logits.len() - prompt.last_logits.len()..];
            within(tolerance, last, &prompt.last_logits, &format!("{case}, {}", prompt.name));
        }
    }
}

#[test]
fn dense_checkpoints_as_they_are_stored_stay_near_on_the_cpu() {
    dense_checkpoints_as_they_are_stored_stay_near(0.15, cpu);
}

/// There every activation is rounded to the type, not only those that meet weights: a dozen roundings a layer, each off by up to
/// 2^-8 of numbers from which logits of up to 12 are made. Of two to four layers they add up like a random walk, to 0.05 in the mean
/// and some times that for the worst of all logits.
#[test]
fn dense_checkpoints_stay_near_on_a_simulated_ascend_in_bf16() {
    dense_checkpoints_as_they_are_stored_stay_near(0.5, || ascend(DType::BF16));
}

#[test]
fn dense_checkpoints_stay_near_on_a_simulated_gpu_in_bf16() {
    if !cuda_sim::can_compile() {
        return;
    }
    dense_checkpoints_as_they_are_stored_stay_near(0.5, || gpu(DType::BF16));
}

goldens!(reference, Reference::new);
goldens!(cpu, exact_cpu);
goldens!(ascend_in_f32, || ascend(DType::F32));
goldens!(
    #[ignore = "minutes in the emulator: cargo xtask long gpu"]
    gpu_in_f32,
    || gpu(DType::F32)
);

/// Devices that let an indexer choose, and that pool.
mod indexed_and_compressed {
    use super::*;

    fn agrees<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B + Copy) {
        for case in ["deepseek-v32", "deepseek-v32-b", "deepseek-v4", "deepseek-v4-b"] {
            last_logits_agree(make, case);
            greedy_continuations_are_equal(make, case, usize::MAX);
            prompt_logprobs_agree(make, case);
            prompt_scores_agree(make, case);
        }
    }

    #[test]
    fn on_the_reference() {
        agrees(Reference::new);
    }

    #[test]
    fn on_the_cpu() {
        agrees(exact_cpu);
    }
}

/// One checkpoint of each family: dense, windows and caps, experts, latents.
#[test]
fn a_checkpoint_of_each_family_answers_on_a_simulated_gpu_as_transformers_does() {
    if !cuda_sim::can_compile() {
        return;
    }
    for case in ["llama-rope3", "gemma2", "qwen3-moe", "deepseek-v3"] {
        last_logits_agree(|| gpu(DType::F32), case);
        greedy_continuations_are_equal(|| gpu(DType::F32), case, 12);
    }
}

fn ascend(activations: DType) -> AscendBackend {
    AscendBackend::new(&AscendOptions { fused: true, ..crate::ascend_sim::options(activations) }).unwrap()
}

fn gpu(activations: DType) -> CudaBackend {
    CudaBackend::new(&crate::cuda::options(activations)).unwrap()
}

fn cpu() -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap()
}
