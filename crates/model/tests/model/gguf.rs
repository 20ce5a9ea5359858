//! GGUF files against what Hugging Face transformers computes from the very weights that the file's blocks
//! stand for, in float64: logits and greedy continuations.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{all_logits, generate, options};
use baton_device::{Backend, CompressedOps, DType, LatentOps, Reference, WeightFormat};
use baton_device_ascend::AscendBackend;
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_model::{Files, GgufTokenizer, LoadOptions, LoadReport, ModelRunner, SamplingParams, load};
use serde_json::Value;

/// On logits, absolute, where blocks are widened.
const TOLERANCE: f64 = 1e-3;
/// On the root mean square of differences, in standard deviations of the logits, where activations are bytes too: with weights of 8 bits, and of 4.
const QUANTISED: [f32; 2] = [0.03, 0.15];

/// The same where every activation is bf16.
const ROUNDED: f32 = 0.05;

const CASES: [&str; 3] = ["llama-rope3-Q4_0", "llama-256-Q4_K_M", "qwen2-tied-Q8_0"];

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/golden/gguf")
}

fn open<B: Backend + LatentOps + CompressedOps>(
    backend: B,
    path: &Path,
    dtype: Option<DType>,
) -> (ModelRunner<B>, LoadReport) {
    load(backend, &Files::at(path).unwrap(), &LoadOptions { dtype, ..options() })
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

struct Golden {
    name: String,
    tokens: Vec<u32>,
    greedy: Vec<u32>,
    /// Logits behind the prompt.
    last: Vec<f64>,
}

fn goldens(folder: &Path, case: &str) -> Vec<Golden> {
    let golden: Value = serde_json::from_slice(&fs::read(folder.join(format!("{case}.golden.json"))).unwrap()).unwrap();
    let bytes = fs::read(folder.join(format!("{case}.golden.safetensors"))).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let prompts = golden["prompts"].as_array().unwrap().iter();
    let prompt = |prompt: &Value| {
        let name = prompt["name"].as_str().unwrap();
        let ids = |v: &Value| -> Vec<u32> { serde_json::from_value(v.clone()).unwrap() };
        let last = tensors.tensor(&format!("{name}.last_logits.f64")).unwrap();
        let last = last.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
        let (tokens, greedy) = (ids(&prompt["ids"]), ids(&prompt["greedy_ids"]));
        Golden { name: format!("{case}, {name}"), tokens, greedy, last }
    };
    prompts.map(prompt).collect()
}

fn agrees<B: Backend + LatentOps + CompressedOps>(backend: B, folder: &Path, case: &str, dtype: Option<DType>) {
    let (mut runner, report) = open(backend, &folder.join(format!("{case}.gguf")), dtype);
    assert_eq!(report.conversions, [], "{case}");
    for Golden { name, tokens, greedy, last: expected } in goldens(folder, case) {
        let logits = all_logits(&mut runner, &tokens);
        let last = &logits[logits.len() - expected.len()..];
        let worst = last.iter().zip(expected).map(|(a, e)| (f64::from(*a) - e).abs()).fold(0.0, f64::max);
        assert!(worst <= TOLERANCE, "{name}: off by {worst}");
        let output = generate(&mut runner, &tokens, SamplingParams::greedy(), greedy.len());
        assert_eq!(output.iter().map(|t| t.token).collect::<Vec<_>>(), greedy, "{name}");
    }
}

/// Fed the golden continuation, a device in the formats that it takes the file's for stays near the reference and chooses the
/// golden token wherever it is ahead by more than 1.
fn stays_near<B: Backend + LatentOps + CompressedOps>(
    backend: B,
    folder: &Path,
    case: &str,
    tolerance: f32,
) -> LoadReport {
    let path = folder.join(format!("{case}.gguf"));
    let ((mut judge, _), (mut runner, report)) = (open(Reference::new(), &path, None), open(backend, &path, None));
    let mut clear = 0;
    for Golden { name, tokens, greedy, last } in goldens(folder, case) {
        let all = [tokens.as_slice(), &greedy].concat();
        let (expected, actual) = (all_logits(&mut judge, &all), all_logits(&mut runner, &all));
        let squares = expected.iter().zip(&actual).map(|(e, a)| (e - a).powi(2)).sum::<f32>();
        let off = (squares / expected.len() as f32).sqrt() / deviation(&expected);
        assert!(off <= tolerance, "{name}: off by {off}");
        let rows = expected.chunks(last.len()).zip(actual.chunks(last.len())).skip(tokens.len() - 1);
        for ((expected, actual), &token) in rows.zip(&greedy) {
            let ahead = |e: &f32| expected[token as usize] - e;
            if expected.iter().filter(|e| ahead(e) < 1.0).count() == 1 {
                clear += 1;
                assert!(actual.iter().all(|a| *a <= actual[token as usize]), "{name}: not {token}");
            }
        }
    }
    assert!(clear > 10, "{case}: {clear} clear choices");
    report
}

/// The CPU keeps the file's own blocks.
fn agrees_in_bytes(folder: &Path, case: &str) {
    let report = stays_near(cpu(), folder, case, QUANTISED[usize::from(!case.ends_with("Q8_0"))]);
    assert_eq!(report.conversions, [], "{case}");
}

fn deviation(values: &[f32]) -> f32 {
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt()
}

fn cpu() -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap()
}

#[test]
fn every_file_agrees_with_transformers_on_the_reference() {
    CASES.iter().for_each(|case| agrees(Reference::new(), &folder(), case, None));
}

#[test]
fn every_file_agrees_with_transformers_on_the_cpu_when_widened() {
    CASES.iter().for_each(|case| agrees(cpu(), &folder(), case, Some(DType::F32)));
}

#[test]
fn every_file_stays_near_transformers_on_the_cpu() {
    CASES.iter().for_each(|case| agrees_in_bytes(&folder(), case));
}

#[test]
fn a_device_widens_the_blocks_that_it_does_not_keep_and_says_so() {
    let ascend = |activations| AscendBackend::new(&crate::ascend_sim::options(activations)).unwrap();
    for case in CASES {
        agrees(ascend(DType::F32), &folder(), case, None);
        let report = stays_near(ascend(DType::BF16), &folder(), case, ROUNDED);
        // Of Q4_K_M blocks it keeps none.
        assert_eq!(report.conversions.is_empty(), !case.ends_with("Q4_K_M"), "{case}");
        assert!(report.conversions.iter().all(|c| c.to == WeightFormat::BF16), "{case}");
    }
}

/// `BATON_GGUF_GOLDENS=FOLDER cargo test -p baton-model --test model gguf:: -- --ignored`
#[test]
#[ignore = "needs a folder with all golden files, which are too large to keep here"]
fn all_files_of_a_folder_agree() {
    let folder = PathBuf::from(std::env::var_os("BATON_GGUF_GOLDENS").expect("BATON_GGUF_GOLDENS"));
    let names = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let cases: Vec<String> = names.filter_map(|n| Some(n.strip_suffix(".gguf")?.to_owned())).collect();
    assert!(!cases.is_empty());
    for case in cases {
        agrees(Reference::new(), &folder, &case, None);
        agrees(cpu(), &folder, &case, Some(DType::F32));
        agrees_in_bytes(&folder, &case);
    }
}

#[test]
fn the_vocabulary_is_that_of_the_tokenizer_json_it_was_made_from() {
    for (case, original) in [("llama-rope3-Q4_0", "llama3"), ("qwen2-tied-Q8_0", "chatml")] {
        let files = Files::at(folder().join(format!("{case}.gguf"))).unwrap();
        let read = GgufTokenizer::read(&files).unwrap().unwrap();
        let path = folder().join("../tokenizers").join(original).join("tokenizer.json");
        let json: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let added = json["added_tokens"].as_array().unwrap();
        let of_model = json["model"]["vocab"].as_object().unwrap().iter().map(|(t, id)| (t.as_str(), id));
        let all = of_model.chain(added.iter().map(|a| (a["content"].as_str().unwrap(), &a["id"])));
        let mut tokens = 0;
        for (token, id) in all {
            assert_eq!(read.tokens[id.as_u64().unwrap() as usize], token, "{case}");
            tokens += 1;
        }
        // Rows of the embedding beyond the tokenizer are listed as unused.
        assert!(tokens > 500 && read.token_types.len() == read.tokens.len());
        assert!(read.token_types[tokens..].iter().all(|t| *t == 5), "{case}");
        for token in added {
            let kind = if token["special"] == true { 3 } else { 4 };
            assert_eq!(read.token_types[token["id"].as_u64().unwrap() as usize], kind, "{case}: {token}");
        }
        let merges = json["model"]["merges"].as_array().unwrap().iter();
        let merges = merges.map(|m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()));
        assert!(merges.eq(read.merges.iter().cloned()), "{case}");
        assert!(read.chat_template.is_some() && read.eos.is_some() && read.pre.is_some(), "{case}");
        assert_eq!(read.add_bos, Some(original == "llama3"));
    }
    assert_eq!(GgufTokenizer::read(&Files::folder(crate::common::folder("llama-256")).unwrap()).unwrap(), None);
}

#[test]
fn weights_stay_in_the_file_s_own_formats() {
    let path = folder().join("llama-256-Q4_K_M.gguf");
    let (_, report) = open(cpu(), &path, None);
    let formats: Vec<String> = report.weight_formats.iter().map(ToString::to_string).collect();
    assert_eq!(formats, ["Q4_K", "Q6_K"]);
    assert!(report.weight_formats.iter().all(|f| matches!(f, WeightFormat::Ggml(_))));
    assert!(report.weight_bytes < fs::metadata(path).unwrap().len(), "{} bytes", report.weight_bytes);
    assert_eq!(report.generation_config.eos_token_ids, [510]);
}
