//! Loading keeps no more of a checkpoint resident than the tensor in hand. Alone in its file: peak
//! memory is the process's.

#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::io::Write;

use baton_device::{DType, Reference};
use baton_model::{Files, LoadOptions, load};
use common::{folder, json, options};
use serde_json::{Map, json};

/// Peak resident memory of this process in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn peak_memory_is_the_weights_and_a_tensor() {
    const HIDDEN: usize = 1024;
    const LAYERS: usize = 12;
    let mut config = json(folder("llama-256").join("config.json"));
    config["hidden_size"] = json!(HIDDEN);
    config["intermediate_size"] = json!(HIDDEN);
    config["num_hidden_layers"] = json!(LAYERS);
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![512, HIDDEN])];
    shapes.push(("model.norm.weight".into(), vec![HIDDEN]));
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape| shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(norm, vec![HIDDEN]);
        }
        for (name, rows) in [("q_proj", HIDDEN), ("k_proj", HIDDEN / 4), ("v_proj", HIDDEN / 4), ("o_proj", HIDDEN)] {
            add(&format!("self_attn.{name}"), vec![rows, HIDDEN]);
        }
        for name in ["gate_proj", "up_proj", "down_proj"] {
            add(&format!("mlp.{name}"), vec![HIDDEN, HIDDEN]);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut end = 0;
    let header: Map<_, _> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let start = end;
            end += shape.iter().product::<usize>() * 4;
            (name, json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]}))
        })
        .collect();
    let header = json!(header).to_string();
    let mut file = fs::File::create(folder.path().join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let chunk = [0u8; 4096];
    for _ in 0..end / chunk.len() {
        file.write_all(&chunk).unwrap();
    }
    file.write_all(&chunk[..end % chunk.len()]).unwrap();
    drop(file);

    let before = peak();
    let options = LoadOptions { max_model_len: Some(16), ..options() };
    let (_runner, report) = load(Reference::new(), &Files::folder(folder.path()).unwrap(), &options).unwrap();
    assert_eq!(report.stored_dtype, DType::F32);
    let grown = peak() - before;
    let (weights, tensor) = (report.weight_bytes, (HIDDEN * HIDDEN * 4) as u64);
    assert!(weights > 250 << 20, "the file is large enough to tell");
    assert!(grown < weights + 4 * tensor + (32 << 20), "{grown} bytes for {weights} of weights");
}
