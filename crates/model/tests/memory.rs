//! Loading keeps no more of a checkpoint resident than the tensors in hand: one, or one expert's three. Alone in
//! its file: peak memory is the process's.

#![cfg(target_os = "linux")]

#[path = "model/common/mod.rs"]
mod common;

use std::fs;
use std::io::Write;

use baton_device::{DType, Reference};
use baton_model::{Files, LoadOptions, load};
use common::{folder, json, options};
use serde_json::{Map, Value, json};

/// A line of this process's status, in bytes.
fn status(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Loads zeros of the shapes; gives the bytes of the weights, and by how much peak memory rose.
fn load_zeros(config: &Value, shapes: &[(String, Vec<usize>)]) -> (u64, u64) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut end = 0;
    let entry = |(name, shape): &(String, Vec<usize>)| {
        let start = end;
        end += shape.iter().product::<usize>() * 4;
        (name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]}))
    };
    let header = json!(shapes.iter().map(entry).collect::<Map<_, _>>()).to_string();
    let mut file = fs::File::create(folder.path().join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let chunk = [0u8; 4096];
    for _ in 0..end / chunk.len() {
        file.write_all(&chunk).unwrap();
    }
    file.write_all(&chunk[..end % chunk.len()]).unwrap();
    drop(file);

    fs::write("/proc/self/clear_refs", "5").unwrap(); // the peak begins anew
    let before = status("VmRSS");
    let options = LoadOptions { max_model_len: Some(16), ..options() };
    let (_runner, report) = load(Reference::new(), &Files::folder(folder.path()).unwrap(), &options).unwrap();
    assert_eq!(report.stored_dtype, DType::F32);
    (report.weight_bytes, status("VmHWM") - before)
}

fn attention(hidden: usize, kv: usize, layer: usize) -> Vec<(String, Vec<usize>)> {
    let name = |name: &str| format!("model.layers.{layer}.{name}.weight");
    let norms = ["input_layernorm", "post_attention_layernorm"].map(|n| (name(n), vec![hidden]));
    let rows = [("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)];
    norms.into_iter().chain(rows.map(|(n, rows)| (name(&format!("self_attn.{n}")), vec![rows, hidden]))).collect()
}

fn dense() -> (Value, Vec<(String, Vec<usize>)>) {
    const HIDDEN: usize = 1024;
    const LAYERS: usize = 12;
    let mut config = json(folder("llama-256").join("config.json"));
    config["hidden_size"] = json!(HIDDEN);
    config["intermediate_size"] = json!(HIDDEN);
    config["num_hidden_layers"] = json!(LAYERS);
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![512, HIDDEN])];
    shapes.push(("model.norm.weight".into(), vec![HIDDEN]));
    for layer in 0..LAYERS {
        shapes.extend(attention(HIDDEN, HIDDEN / 4, layer));
        for name in ["gate_proj", "up_proj", "down_proj"] {
            shapes.push((format!("model.layers.{layer}.mlp.{name}.weight"), vec![HIDDEN, HIDDEN]));
        }
    }
    (config, shapes)
}

/// One layer whose experts are nearly all of the weights.
fn mixture() -> (Value, Vec<(String, Vec<usize>)>) {
    const HIDDEN: usize = 512;
    const EXPERTS: usize = 80;
    let mut config = json(folder("mixtral").join("config.json"));
    config["hidden_size"] = json!(HIDDEN);
    config["intermediate_size"] = json!(HIDDEN);
    config["num_hidden_layers"] = json!(1);
    config["num_local_experts"] = json!(EXPERTS);
    let mut shapes = attention(HIDDEN, HIDDEN / 2, 0);
    shapes.extend(["model.embed_tokens", "lm_head"].map(|n| (format!("{n}.weight"), vec![256, HIDDEN])));
    shapes.push(("model.norm.weight".into(), vec![HIDDEN]));
    shapes.push(("model.layers.0.block_sparse_moe.gate.weight".into(), vec![EXPERTS, HIDDEN]));
    for expert in 0..EXPERTS {
        let name = |w: &str| format!("model.layers.0.block_sparse_moe.experts.{expert}.{w}.weight");
        shapes.extend(["w1", "w2", "w3"].map(|w| (name(w), vec![HIDDEN, HIDDEN])));
    }
    (config, shapes)
}

#[test]
fn peak_memory_is_the_weights_and_the_tensors_in_hand() {
    for (config, shapes) in [mixture(), dense()] {
        let (weights, grown) = load_zeros(&config, &shapes);
        assert!(weights > 240 << 20, "the file is large enough to tell");
        assert!(grown > weights, "{grown} bytes for {weights}: not measured");
        assert!(grown < weights + (48 << 20), "{grown} bytes for {weights} of weights");
    }
}
