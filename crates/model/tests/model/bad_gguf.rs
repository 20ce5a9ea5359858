//! GGUF files that are damaged or hostile: refused with the reason, never a panic, a hang, or memory beyond
//! what the file has.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use crate::common::gguf::{GgufFile, GgufTensor, layouts, u32_value};
use crate::common::{Rng, options};
use baton_device::{DType, Reference};
use baton_model::{Files, GgufTokenizer, LoadError, LoadOptions, load};
use tempfile::TempDir;

fn golden(name: &str) -> Vec<u8> {
    fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/golden/gguf").join(name)).unwrap()
}

/// Loads bytes as a file; the message if they are refused.
fn outcome(folder: &TempDir, bytes: &[u8]) -> Result<(), String> {
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    let files = Files::at(path).unwrap();
    let read = GgufTokenizer::read(&files);
    let options = LoadOptions { max_model_len: Some(32), max_step_tokens: 8, max_step_sequences: 1, ..options() };
    let loaded = load(Reference::new(), &files, &options).map(|_| ());
    read.and(Ok(())).and(loaded).map_err(|e: LoadError| e.to_string())
}

#[track_caller]
fn assert_refused(bytes: &[u8], wanted: &str) {
    let message = outcome(&tempfile::tempdir().unwrap(), bytes).expect_err("it was loaded");
    assert!(message.contains(wanted), "{wanted:?} not in: {message}");
}

/// A file written value by value.
#[derive(Clone)]
struct Writer {
    version: u32,
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, u64)>,
    data: usize,
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

fn value(kind: u32, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes(), bytes].concat()
}

impl Writer {
    /// The smallest file that is a model: one layer of zeros.
    fn model() -> Self {
        let number = |v: u32| value(4, &v.to_le_bytes());
        let mut keys: Vec<(String, Vec<u8>)> = vec![("general.architecture".into(), value(8, &text("llama")))];
        let sizes = BTreeMap::from([
            ("context_length", 512),
            ("embedding_length", 32),
            ("block_count", 1),
            ("feed_forward_length", 64),
            ("attention.head_count", 2),
        ]);
        keys.extend(sizes.into_iter().map(|(k, v)| (format!("llama.{k}"), number(v))));
        keys.push(("llama.attention.layer_norm_rms_epsilon".into(), value(6, &1e-5f32.to_le_bytes())));
        let mut tensors = Vec::new();
        let mut data = 0;
        let mut add = |name: &str, dims: &[u64], kind: u32| {
            tensors.push((name.to_owned(), dims.to_vec(), kind, data));
            let elements: u64 = dims.iter().product();
            data += if kind == 0 { elements * 4 } else { elements / 32 * 34 }.next_multiple_of(32);
        };
        add("token_embd.weight", &[32, 10], 8);
        add("output_norm.weight", &[32], 0);
        for (name, dims) in [
            ("attn_q", [32, 32]),
            ("attn_k", [32, 32]),
            ("attn_v", [32, 32]),
            ("attn_output", [32, 32]),
            ("ffn_gate", [32, 64]),
            ("ffn_up", [32, 64]),
            ("ffn_down", [64, 32]),
        ] {
            add(&format!("blk.0.{name}.weight"), &dims, 8);
        }
        add("blk.0.attn_norm.weight", &[32], 0);
        add("blk.0.ffn_norm.weight", &[32], 0);
        Self { version: 3, keys, tensors, data: data as usize }
    }

    fn header(&self) -> Vec<u8> {
        let mut out = [b"GGUF".as_slice(), &self.version.to_le_bytes()].concat();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            out.extend(text(key));
            out.extend(value);
        }
        for (name, dims, kind, offset) in &self.tensors {
            out.extend(text(name));
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(32) + self.data, 0);
        out
    }

    fn edited(mut self, edit: impl FnOnce(&mut Self)) -> Vec<u8> {
        edit(&mut self);
        self.bytes()
    }

    fn key(&mut self, key: &str, value: Vec<u8>) {
        self.keys.retain(|k| k.0 != key);
        self.keys.push((key.into(), value));
    }
}

#[test]
fn the_smallest_model_is_loaded_in_both_versions() {
    let folder = tempfile::tempdir().unwrap();
    for version in [2, 3] {
        outcome(&folder, &Writer::model().edited(|w| w.version = version)).unwrap();
    }
}

#[test]
fn every_flaw_has_its_own_message() {
    let edited = |edit: fn(&mut Writer)| Writer::model().edited(edit);
    assert_refused(b"", "empty");
    assert_refused(b"GGUX\x03\0\0\0", "does not begin with GGUF");
    assert_refused(&edited(|w| w.version = 1), "version 1; 2 and 3 are read");
    assert_refused(&edited(|w| w.version = 3u32.swap_bytes()), "big-endian");
    assert_refused(&edited(|w| w.keys.push(w.keys[1].clone())), "occurs twice");
    assert_refused(&edited(|w| w.tensors.push(w.tensors[1].clone())), "the name output_norm.weight occurs twice");
    assert_refused(&edited(|w| w.tensors[0].2 = 77), "tensor token_embd.weight: unknown type 77");
    assert_refused(&edited(|w| w.tensors[0].2 = 16), "type IQ2_XXS is not supported; F32, F16, Q4_0");
    assert_refused(&edited(|w| w.tensors[2].3 = w.tensors[3].3), "overlaps");
    assert_refused(&edited(|w| w.tensors[2].3 += 1), "not a multiple of 32");
    assert_refused(&edited(|w| w.tensors[2].3 = u64::MAX - 31), "beyond the file");
    assert_refused(&edited(|w| w.tensors[0].1 = vec![32, u64::MAX / 8]), "too large");
    assert_refused(&edited(|w| w.tensors[0].1 = vec![32, 0]), "no elements");
    assert_refused(&edited(|w| w.tensors[0].1 = vec![33, 10]), "not whole blocks of Q8_0");
    assert_refused(&edited(|w| w.tensors[0].1 = vec![32; 5]), "5 dimensions");
    assert_refused(&edited(|w| w.data -= 32), "beyond the file: it is truncated");
    assert_refused(&edited(|w| w.tensors[1].0 = "norm".into()), "tensor norm is not part of this model");
    assert_refused(&edited(|w| _ = w.tensors.remove(2)), "self_attn.q_proj.weight is missing");
    assert_refused(&edited(|w| w.key("general.architecture", value(8, &text("bert")))), "supported: llama, qwen2");
    assert_refused(&edited(|w| w.key("general.alignment", value(4, &48u32.to_le_bytes()))), "alignment");
    assert_refused(&edited(|w| w.key("llama.block_count", value(8, &text("1")))), "llama.block_count is \"1\"");
    assert_refused(
        &edited(|w| w.key("llama.expert_count", value(4, &8u32.to_le_bytes()))),
        "expert_used_count is missing",
    );
    assert_refused(&edited(|w| w.keys.retain(|k| k.0 != "llama.context_length")), "llama.context_length is missing");
    assert_refused(&edited(|w| w.key("x", value(13, &[]))), "key x: unknown value type 13");
    assert_refused(&edited(|w| w.key("x", value(7, &[2]))), "neither 0 nor 1");
    assert_refused(&edited(|w| w.key("x", value(8, &[2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]))), "not UTF-8");
    assert_refused(&edited(|w| w.key("tokenizer.ggml.eos_token_id", value(8, &text("2")))), "not a token id");
    let list = |kind: u32, len: u64| value(9, &[&kind.to_le_bytes()[..], &len.to_le_bytes()].concat());
    for kind in [0, 5, 8, 10] {
        for len in [u64::MAX, u64::MAX / 8, 1 << 40] {
            assert_refused(&Writer::model().edited(|w| w.key("x", list(kind, len))), "truncated");
        }
    }
    assert_refused(&Writer::model().edited(|w| w.key("x", list(9, 1))), "array of type 9");
    let mut huge = Writer::model().bytes();
    huge[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_refused(&huge, "tensors");
    let mut nan = Writer::model().bytes();
    let at = nan.len() - 4;
    nan[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    assert_refused(&nan, "finite");
    let mut nan = Writer::model().bytes();
    let at = nan.len() - Writer::model().data;
    nan[at + 34..at + 36].copy_from_slice(&[0, 0x7c]);
    assert_refused(&nan, "tensor model.embed_tokens.weight holds");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = Writer::model().bytes();
    let header = Writer::model().header().len();
    for len in (1..header).chain((header..whole.len()).step_by(97)) {
        assert!(outcome(&folder, &whole[..len]).is_err(), "{len} bytes");
    }
    let whole = golden("llama-rope3-Q4_0.gguf");
    let mut len = 1;
    while len < whole.len() {
        assert!(outcome(&folder, &whole[..len]).is_err(), "{len} bytes");
        len += 1 + len / 12;
    }
}

#[test]
fn flipped_bits_of_a_header_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let header = Writer::model().header().len();
    let whole = Writer::model().bytes();
    let mut refused = 0;
    for at in 0..header {
        for bit in [0, 3, 7] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            refused += usize::from(outcome(&folder, &bytes).is_err());
        }
    }
    assert!(refused > header, "most flips make a difference");
    let golden = golden("qwen2-tied-Q8_0.gguf");
    let mut rng = Rng(7);
    for _ in 0..60 {
        let mut bytes = golden.clone();
        for _ in 0..1 + rng.below(4) {
            let at = rng.below(20_000);
            bytes[at] = rng.next() as u8;
        }
        _ = outcome(&folder, &bytes); // either is right, as long as it returns
    }
}

#[test]
fn a_split_model_is_loaded_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let name = |i: u32| folder.path().join(format!("m-{i:05}-of-00002.gguf"));
    let numbered = |w: &mut Writer, no: u16| {
        w.key("split.no", value(2, &no.to_le_bytes()));
        w.key("split.count", value(2, &2u16.to_le_bytes()));
    };
    let (mut first, mut second) = (Writer::model(), Writer::model());
    numbered(&mut first, 0);
    numbered(&mut second, 1);
    second.tensors = first.tensors.split_off(4);
    second.keys.retain(|k| k.0.starts_with("split."));
    let load = |i: u32| load(Reference::new(), &Files::at(name(i)).unwrap(), &options()).map(|_| ());
    fs::write(name(1), first.bytes()).unwrap();
    assert!(load(1).unwrap_err().to_string().contains("m-00002-of-00002.gguf is missing"));
    fs::write(name(2), second.bytes()).unwrap();
    load(1).unwrap();
    assert!(load(2).unwrap_err().to_string().contains("name the first"));
    second.tensors.push(first.tensors[0].clone());
    second.tensors.last_mut().unwrap().3 = second.data as u64;
    second.data += 352;
    fs::write(name(2), second.bytes()).unwrap();
    assert!(load(1).unwrap_err().to_string().contains("token_embd.weight is in another part too"));
    numbered(&mut second, 7);
    fs::write(name(2), second.bytes()).unwrap();
    assert!(load(1).unwrap_err().to_string().contains("part 1 of a split model"));
}

/// A golden checkpoint as a file.
fn layout(name: &str) -> GgufFile {
    GgufFile::of(&layouts()[name], |_, _| DType::F32)
}

fn list_value(values: &[u32]) -> (u32, Vec<u8>) {
    let header = [&4u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
    (9, [header, values.iter().flat_map(|v| v.to_le_bytes()).collect()].concat())
}

#[test]
fn every_flaw_of_experts_and_latents_has_its_own_message() {
    let v3 = layout("deepseek-v3");
    let edited = |edit: &dyn Fn(&mut GgufFile)| {
        let mut file = v3.clone();
        edit(&mut file);
        file.bytes()
    };
    let with = |key: &str, value: u32| edited(&|f| f.set(&format!("deepseek2.{key}"), u32_value(value)));
    let without = |key: &str| edited(&|f| _ = f.keys.remove(&format!("deepseek2.{key}")).unwrap());
    assert_refused(&with("expert_count", 12), "blk.1.ffn_down_exps.weight has shape [16, 96, 24], not [12,");
    assert_refused(&with("expert_count", 20), "not [20,");
    assert_refused(
        &with("expert_count", u32::MAX),
        "deepseek2.expert_count is 4294967295, not an integer from 1 to 4096",
    );
    assert_refused(&with("expert_count", 0), "deepseek2.expert_count is 0");
    assert_refused(&without("expert_count"), "deepseek2.expert_count is missing");
    assert_refused(&without("expert_used_count"), "deepseek2.expert_used_count is missing");
    assert_refused(&with("expert_used_count", 9), "exceeds the 8 experts that can be chosen");
    assert_refused(&with("expert_group_count", 5), "16 experts cannot be split into 5 groups");
    assert_refused(&with("expert_gating_func", 3), "expert_gating_func is 3; supported: 1 (softmax), 2 (sigmoid)");
    assert_refused(&with("expert_gating_func", 1), "expert_weights_norm is true; with softmax only false");
    assert_refused(&with("leading_dense_block_count", 4), "deepseek2.leading_dense_block_count is 4");
    assert_refused(&with("leading_dense_block_count", 2), "mlp.experts.0.down_proj.weight is not part of this model");
    assert_refused(&without("attention.kv_lora_rank"), "deepseek2.attention.kv_lora_rank is missing");
    assert_refused(&with("rope.dimension_count", 48), "attention.key_length, attention.value_length and rope.dim");
    assert_refused(&without("rope.dimension_count"), "attention.key_length, attention.value_length and rope.dim");
    assert_refused(&with("attention.value_length_mla", 33), "blk.0.attn_v_b.weight has shape [4, 32, 32]");
    assert_refused(&with("nextn_predict_layers", 1), "deepseek2.nextn_predict_layers is 1; supported: 0");
    assert_refused(&with("rope.scaling.attn_factor", 2), "rope.scaling.attn_factor is 2; supported: 1");
    assert_refused(&without("rope.scaling.factor"), "deepseek2.rope.scaling.factor is missing");
    let tensors = |edit: &dyn Fn(&mut Vec<GgufTensor>)| edited(&|f| edit(&mut f.tensors));
    let named = |name: &'static str| move |t: &GgufTensor| t.name == name;
    assert_refused(
        &tensors(&|t| t.retain(|t| t.name != "blk.2.attn_v_b.weight")),
        "layers.2.self_attn.kv_b_proj.weight is missing",
    );
    assert_refused(
        &tensors(&|t| t.retain(|t| t.name != "blk.1.exp_probs_b.bias")),
        "e_score_correction_bias is missing",
    );
    assert_refused(
        &edited(&|f| f.tensor("blk.1.attn_k_b.weight").shape = vec![2, 64, 32]),
        "blk.1.attn_k_b.weight has",
    );
    assert_refused(&edited(&|f| f.tensor("blk.1.attn_k_b.weight").shape = vec![128, 32]), "blk.1.attn_k_b.weight has");
    assert_refused(
        &edited(&|f| f.tensor("blk.2.ffn_up_exps.weight").shape = vec![16 * 24, 96]),
        "blk.2.ffn_up_exps.weight has shape [384, 96], not [16, rows, columns]",
    );
    let twice = |t: &mut Vec<GgufTensor>| {
        let shared = t.iter().find(|t| named("blk.1.ffn_up_shexp.weight")(t)).unwrap().clone();
        t.push(GgufTensor { name: "blk.1.ffn_up.7.weight".into(), ..shared });
    };
    assert_refused(&tensors(&twice), "tensor blk.1.ffn_up.7.weight is there in two forms");
    let mut nan = v3.clone();
    let stack = nan.tensor("blk.2.ffn_down_exps.weight");
    let at = stack.data.len() - 4;
    stack.data[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    assert_refused(&nan.bytes(), "layers.2.mlp.experts.15.down_proj.weight holds NaN at element 2303");
}

#[test]
fn what_a_file_asks_for_beyond_what_is_built_is_refused_by_its_own_name() {
    for (name, key, value, wanted) in [
        ("gemma2", "attention.sliding_window_pattern", 3, "gemma2.attention.sliding_window_pattern is 3; supported: 2"),
        ("qwen3", "attention.sliding_window", 64, "qwen3.attention.sliding_window is 64, but nothing says which"),
        ("qwen3", "rope.scaling.yarn_log_multiplier", 1, "yarn_log_multiplier is 1; supported with deepseek2 alone"),
        ("qwen3", "rope.dimension_count", 16, "qwen3.rope.dimension_count is 16; only the width of a head"),
        ("qwen3", "expert_count", 4, "qwen3.expert_count is 4; Qwen3ForCausalLM is dense"),
        ("llama-256", "logit_scale", 2, "llama.logit_scale is 2; supported: 0"),
        ("phi3", "rope.dimension_count", 18, "phi3.rope.dimension_count is 18"),
        ("mixtral", "expert_used_count", 6, "llama.expert_used_count 6 exceeds the 5 experts"),
    ] {
        let mut file = layout(name);
        let prefix = layouts()[name]["keys"]["general.architecture"][1].as_str().unwrap().to_owned();
        file.set(&format!("{prefix}.{key}"), u32_value(value));
        assert_refused(&file.bytes(), wanted);
    }
    let mut long = layout("phi3");
    long.tensors.push(GgufTensor {
        name: "rope_factors_long.weight".into(),
        shape: vec![12],
        dtype: DType::F32,
        data: vec![0; 48],
    });
    assert_refused(&long.bytes(), "rope_factors_long.weight is there: longrope is not supported");
    let mut scaled = layout("qwen3");
    scaled.set("qwen3.rope.scaling.type", (8, text("longrope")));
    scaled.set("qwen3.rope.scaling.factor", u32_value(2));
    assert_refused(&scaled.bytes(), "qwen3.rope.scaling.type is \"longrope\"");
}

#[test]
fn a_list_by_layer_is_read_if_all_layers_have_one_value() {
    let folder = tempfile::tempdir().unwrap();
    let mut file = layout("qwen3");
    file.set("qwen3.attention.head_count_kv", list_value(&[2, 2, 2]));
    outcome(&folder, &file.bytes()).unwrap();
    for list in [&[2, 4, 2][..], &[]] {
        file.set("qwen3.attention.head_count_kv", list_value(list));
        assert_refused(&file.bytes(), "qwen3.attention.head_count_kv is \"a list of");
    }
}

#[test]
fn flipped_bytes_of_a_mixture_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = Rng(11);
    for name in ["deepseek-v3", "mixtral"] {
        let file = layout(name);
        let whole = file.bytes();
        let header = whole.len() - file.tensors.iter().map(|t| t.data.len().next_multiple_of(32)).sum::<usize>();
        for _ in 0..60 {
            let mut bytes = whole.clone();
            for _ in 0..1 + rng.below(3) {
                bytes[rng.below(header)] = rng.next() as u8;
            }
            _ = outcome(&folder, &bytes); // either is right, as long as it returns
        }
    }
}
