//! LoRA adapters against peft's own forward, in float64 (see `models/golden/lora`), and what their loader refuses.

use crate::common::{adapted, all_logits_with, exact_cpu, folder, generate_with, json, options, prompts};
use baton_device::{Backend, CompressedOps, LatentOps, Reference};
use baton_model::{Files, LoadOptions, SamplingParams, load};

/// On logits and logprobs, absolute, as for models without adapter.
const TOLERANCE: f64 = 1e-3;

fn close(actual: &[f32], expected: &[f64], what: &str) {
    assert_eq!(actual.len(), expected.len());
    let worst = actual.iter().zip(expected).map(|(a, e)| (f64::from(*a) - e).abs()).fold(0.0, f64::max);
    assert!(worst <= TOLERANCE, "{what}: off by {worst}");
}

fn golden<B: Backend + LatentOps + CompressedOps>(backend: B, case: &str) {
    let base = json(folder("lora").join(case).join("golden.json"))["base"].as_str().unwrap().to_owned();
    let (mut runner, adapters) = adapted(backend, &base, &[case]);
    let adapter = Some(&adapters[0]);
    for prompt in prompts(&format!("lora/{case}")) {
        let logits = all_logits_with(&mut runner, adapter, &prompt.ids);
        let last = &logits[logits.len() - prompt.last_logits.len()..];
        close(last, &prompt.last_logits, &format!("{case}, {}", prompt.name));

        let params = SamplingParams { logprobs: Some(0), ..SamplingParams::greedy() };
        let output = generate_with(&mut runner, adapter, &prompt.ids, params, prompt.greedy_ids.len());
        let ids: Vec<u32> = output.iter().map(|t| t.token).collect();
        assert_eq!(ids, prompt.greedy_ids, "{case}, {}", prompt.name);
        let logprobs: Vec<f32> = output.iter().map(|t| t.logprob).collect();
        close(&logprobs, &prompt.greedy_logprobs, &format!("{case}, logprobs of {}", prompt.name));
    }
}

/// All goldens on one backend, a test per adapter.
macro_rules! goldens {
    ($backend:ident, $make:expr, $($test:ident: $case:literal),* $(,)?) => {
        mod $backend {
            use super::*;
            $(
                #[test]
                fn $test() {
                    golden($make, $case);
                }
            )*
        }
    };
    ($backend:ident, $make:expr) => {
        goldens!(
            $backend, $make,
            every_linear_layer_of_llama: "llama-all",
            rslora_by_a_regular_expression: "llama-rslora",
            the_upper_layer_of_qwen2: "qwen2-upper",
            ranks_and_alphas_by_pattern_on_qwen3: "qwen3-patterns",
            attention_beside_the_experts_of_mixtral: "mixtral-attention",
            the_feed_forward_network_of_gemma2: "gemma2-mlp",
            fused_layers_of_phi3: "phi3-fused",
            latent_attention_and_shared_experts_of_deepseek: "deepseek-v3",
        );
    };
}

goldens!(reference, Reference::new());
goldens!(cpu, exact_cpu());

/// The rows of a GGUF file's q and k lie in another order than those of the checkpoint that adapters are made for.
#[test]
fn an_adapter_does_to_a_gguf_file_what_it_does_to_its_checkpoint() {
    for (file, case) in [("llama-rope3-Q4_0", "llama-all"), ("qwen2-tied-Q8_0", "qwen2-upper")] {
        let files = Files::at(folder("gguf").join(format!("{file}.gguf"))).unwrap();
        let options = LoadOptions { max_lora_rank: 16, ..options() };
        let mut runner = load(Reference::new(), &files, &options).unwrap().0;
        let adapter = runner.adapter_loader().unwrap().load(&folder("lora").join(case)).unwrap();
        let (base, prompts) = (file.rsplit_once('-').unwrap().0, prompts(&format!("lora/{case}")));
        let mut plain = crate::common::runner(Reference::new(), base);
        for prompt in prompts {
            let last = |logits: Vec<f32>| logits[logits.len() - prompt.last_logits.len()..].to_vec();
            let expected: Vec<f32> = prompt.last_logits.iter().map(|l| *l as f32).collect();
            let [quantised, adapted] =
                [None, Some(&adapter)].map(|adapter| last(all_logits_with(&mut runner, adapter, &prompt.ids)));
            let exact = last(all_logits_with(&mut plain, None, &prompt.ids));
            let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f32>();
            let (loss, change) = (distance(&quantised, &exact), distance(&expected, &exact));
            let error = distance(&adapted, &expected);
            // What quantisation loses is all that tells them apart, and little beside what the adapter changes.
            let told = format!("{file}, {}: {error}, {loss}, {change}", prompt.name);
            assert!(error < 1.5 * loss && loss < change / 3.0, "{told}");
        }
    }
}
