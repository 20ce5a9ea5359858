//! GGUF files against what Hugging Face transformers computes from the very weights that the file's blocks
//! stand for, in float64: logits and greedy continuations.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use baton_device::{Backend, LatentOps, MoeOps, Reference, WeightFormat};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_model::{Files, GgufTokenizer, LoadReport, ModelRunner, SamplingParams, load};
use common::{all_logits, generate, options};
use serde_json::Value;

/// On logits, absolute.
const TOLERANCE: f64 = 1e-3;

const CASES: [&str; 3] = ["llama-rope3-Q4_0", "llama-256-Q4_K_M", "qwen2-tied-Q8_0"];

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/golden/gguf")
}

fn open<B: Backend + LatentOps + MoeOps>(backend: B, path: &Path) -> (ModelRunner<B>, LoadReport) {
    load(backend, &Files::at(path).unwrap(), &options()).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn agrees<B: Backend + LatentOps + MoeOps>(backend: B, folder: &Path, case: &str) {
    let (mut runner, report) = open(backend, &folder.join(format!("{case}.gguf")));
    assert!(report.conversions.is_empty(), "{case}: {:?}", report.conversions);
    let golden: Value = serde_json::from_slice(&fs::read(folder.join(format!("{case}.golden.json"))).unwrap()).unwrap();
    let bytes = fs::read(folder.join(format!("{case}.golden.safetensors"))).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let prompts = golden["prompts"].as_array().unwrap();
    assert!(!prompts.is_empty());
    for prompt in prompts {
        let name = prompt["name"].as_str().unwrap();
        let ids = |v: &Value| -> Vec<u32> { serde_json::from_value(v.clone()).unwrap() };
        let (tokens, greedy) = (ids(&prompt["ids"]), ids(&prompt["greedy_ids"]));
        let expected = tensors.tensor(&format!("{name}.last_logits.f64")).unwrap();
        let expected = expected.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b));
        let logits = all_logits(&mut runner, &tokens);
        let last = &logits[logits.len() - expected.len()..];
        let worst = last.iter().zip(expected).map(|(a, e)| (f64::from(*a) - e).abs()).fold(0.0, f64::max);
        assert!(worst <= TOLERANCE, "{case}, {name}: off by {worst}");
        let output = generate(&mut runner, &tokens, SamplingParams::greedy(), greedy.len());
        assert_eq!(output.iter().map(|t| t.token).collect::<Vec<_>>(), greedy, "{case}, {name}");
    }
}

fn cpu() -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap()
}

#[test]
fn every_file_agrees_with_transformers_on_the_reference() {
    CASES.iter().for_each(|case| agrees(Reference::new(), &folder(), case));
}

#[test]
fn every_file_agrees_with_transformers_on_the_cpu() {
    CASES.iter().for_each(|case| agrees(cpu(), &folder(), case));
}

/// `BATON_GGUF_GOLDENS=FOLDER cargo test -p baton-model --test gguf -- --ignored`
#[test]
#[ignore = "needs a folder with all golden files, which are too large to keep here"]
fn all_files_of_a_folder_agree() {
    let folder = PathBuf::from(std::env::var_os("BATON_GGUF_GOLDENS").expect("BATON_GGUF_GOLDENS"));
    let names = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let cases: Vec<String> = names.filter_map(|n| Some(n.strip_suffix(".gguf")?.to_owned())).collect();
    assert!(!cases.is_empty());
    for case in cases {
        agrees(Reference::new(), &folder, &case);
        agrees(cpu(), &folder, &case);
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
    assert_eq!(GgufTokenizer::read(&Files::folder(common::folder("llama-256")).unwrap()).unwrap(), None);
}

#[test]
fn weights_stay_in_the_file_s_own_formats() {
    let path = folder().join("llama-256-Q4_K_M.gguf");
    let (_, report) = open(cpu(), &path);
    let formats: Vec<String> = report.weight_formats.iter().map(ToString::to_string).collect();
    assert_eq!(formats, ["ggml Q4_K", "ggml Q6_K"]);
    assert!(report.weight_formats.iter().all(|f| matches!(f, WeightFormat::Ggml(_))));
    assert!(report.weight_bytes < fs::metadata(path).unwrap().len(), "{} bytes", report.weight_bytes);
    assert_eq!(report.generation_config.eos_token_ids, [510]);
}
