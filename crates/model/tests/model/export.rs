//! A saved quantised checkpoint gives the logits of quantising at load, to the last bit, and is there whole or not at all.

use std::cell::Cell;
use std::fs;
use std::path::Path;

use crate::common::checkpoint::{Copy, find, read_tensors};
use crate::common::{all_logits, folder, options};
use baton_device::{BlockFormat, DType, Reference};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_model::{ExportError, Files, LoadOptions, LoadReport, Quantization, load, quantize};
use serde_json::json;

const FORMATS: [Quantization; 4] = [
    Quantization::Blocks(BlockFormat::Q8_0),
    Quantization::Blocks(BlockFormat::Q4_0),
    Quantization::Blocks(BlockFormat::Q4_K),
    Quantization::Int8,
];

/// Architectures and stored forms whose rows the formats divide.
const CASES: [&str; 11] = [
    "llama-256",
    "llama-bias",
    "qwen2-tied",
    "qwen2-untied",
    "phi3",
    "gemma2",
    "gemma3",
    "qwen3-moe",
    "qwen3-moe-sparse",
    "deepseek-v2-lite",
    "deepseek-v3-fp8",
];

const PROMPT: [u32; 6] = [1, 2, 3, 50, 4, 5];

fn saved(case: &str, format: impl Into<Quantization>, out: &Path) -> Result<usize, ExportError> {
    Ok(quantize(&Files::folder(folder(case)).unwrap(), format.into(), out, &|_, _| {}, |_| Ok(()))?.len())
}

/// Logits on both backends, and the report.
fn served(path: &Path, quantization: Option<Quantization>) -> ([Vec<f32>; 2], LoadReport) {
    let (files, options) = (Files::folder(path).unwrap(), LoadOptions { quantization, ..options() });
    let (mut runner, report) = load(Reference::new(), &files, &options).unwrap();
    let cpu = CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap();
    let logits = [all_logits(&mut runner, &PROMPT), all_logits(&mut load(cpu, &files, &options).unwrap().0, &PROMPT)];
    (logits, report)
}

#[test]
fn a_saved_checkpoint_gives_the_bits_of_quantising_at_load() {
    for case in CASES {
        for format in FORMATS {
            let temp = tempfile::tempdir().unwrap();
            let out = temp.path().join("saved");
            let converted = saved(case, format, &out).unwrap_or_else(|e| panic!("{case} {format:?}: {e}"));
            let (at_load, made) = served(&folder(case), Some(format));
            let (from_saved, kept) = served(&out, None);
            assert!(at_load[0].iter().any(|l| l.abs() > 0.01), "{case}");
            assert!(at_load == from_saved, "{case} {format:?}");
            assert_eq!(made.weight_formats, kept.weight_formats, "{case} {format:?}");
            assert_eq!((converted, kept.conversions.len()), (made.conversions.len(), 0), "{case} {format:?}");
            assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1, "nothing but the folder is left");
        }
    }
}

#[test]
fn a_matrix_whose_rows_q4_k_does_not_divide_is_q8_0_and_reported_so() {
    let (_, report) = served(&folder("qwen2-tied"), Some(BlockFormat::Q4_K.into()));
    let to = |name: &str| report.conversions.iter().find(|c| c.tensor.ends_with(name)).unwrap().to.to_string();
    assert_eq!([to("0.mlp.down_proj.weight"), to("0.mlp.up_proj.weight")], ["Q4_K", "Q8_0"]);
}

#[test]
fn int8_blocks_have_one_scale_along_a_row_whatever_they_were() {
    let temp = tempfile::tempdir().unwrap();
    let (first, second) = (temp.path().join("q8"), temp.path().join("int8"));
    saved("qwen2-tied", BlockFormat::Q8_0, &first).unwrap();
    let converted =
        quantize(&Files::folder(&first).unwrap(), Quantization::Int8, &second, &|_, _| {}, |_| Ok(())).unwrap();
    let tensors = read_tensors(&fs::read(second.join("model.safetensors")).unwrap());
    let linear: Vec<_> = tensors.iter().filter(|t| t.dtype == "U8").collect();
    assert!(linear.len() == converted.len() && converted.iter().all(|c| c.max_abs_error > 0.0));
    for tensor in linear {
        for row in tensor.data.chunks(tensor.shape[1]) {
            let mut scales = row.chunks(BlockFormat::Q8_0.bytes()).map(|block| [block[0], block[1]]);
            let first = scales.next().unwrap();
            assert!(scales.all(|scale| scale == first), "{}", tensor.name);
        }
    }
}

#[test]
fn what_is_no_linear_layer_and_what_stands_beside_the_weights_is_kept() {
    let copy = Copy::of("qwen2-tied");
    copy.write("tokenizer.json", b"{\"any\": 1}");
    copy.write("model.py", b"import os");
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("saved");
    let steps = Cell::new((0, 0));
    let progress = |done, total| steps.set((done, total));
    quantize(&Files::folder(copy.path()).unwrap(), BlockFormat::Q8_0.into(), &out, &progress, |_| Ok(())).unwrap();
    let saved = read_tensors(&fs::read(out.join("model.safetensors")).unwrap());
    let original = read_tensors(&copy.read("model.safetensors"));
    assert_eq!(saved.len(), original.len());
    let bytes: usize = saved.iter().map(|t| t.data.len()).sum();
    assert_eq!(steps.get(), (bytes as u64, bytes as u64));
    for tensor in original {
        let kept = saved.iter().find(|t| t.name == tensor.name).unwrap();
        let is_linear = tensor.name.ends_with("_proj.weight");
        assert_eq!(is_linear, kept.dtype == "U8", "{}", tensor.name);
        assert!(is_linear || kept.data == tensor.data && kept.dtype == tensor.dtype, "{}", tensor.name);
    }
    assert_eq!(fs::read(out.join("tokenizer.json")).unwrap(), b"{\"any\": 1}");
    assert_eq!(fs::read(out.join("generation_config.json")).unwrap(), copy.read("generation_config.json"));
    assert!(!out.join("model.py").exists());
}

#[test]
fn a_saved_checkpoint_can_be_widened_and_quantised_again() {
    let temp = tempfile::tempdir().unwrap();
    let (first, second) = (temp.path().join("q8"), temp.path().join("q4"));
    saved("llama-256", BlockFormat::Q8_0, &first).unwrap();
    quantize(&Files::folder(&first).unwrap(), BlockFormat::Q4_0.into(), &second, &|_, _| {}, |_| Ok(())).unwrap();
    assert!(served(&first, Some(BlockFormat::Q4_0.into())).0 == served(&second, None).0);
    let wide = LoadOptions { dtype: Some(DType::F32), ..options() };
    assert!(load(Reference::new(), &Files::folder(&first).unwrap(), &wide).is_ok());
}

#[test]
fn what_cannot_be_saved_leaves_nothing_behind() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("saved");
    // 24 columns, which no format divides.
    let error = saved("deepseek-v3", BlockFormat::Q8_0, &out).unwrap_err().to_string();
    assert!(error.contains("cannot be kept as Q8_0"), "{error}");
    let error =
        quantize(&Files::Gguf("any.gguf".into()), BlockFormat::Q8_0.into(), &out, &|_, _| {}, |_| Ok(())).unwrap_err();
    assert!(matches!(error, ExportError::Gguf));
    // Experts by token, which are no floats.
    let error = saved("deepseek-v4", BlockFormat::Q8_0, &out).unwrap_err();
    assert!(matches!(error, ExportError::Table { architecture: "DeepseekV4ForCausalLM" }), "{error}");
    // Found only when the tensor is converted.
    let copy = Copy::of("llama-256");
    copy.edit_weights(|tensors| {
        let weight = find(tensors, "model.layers.0.mlp.up_proj.weight");
        weight.data[10..12].copy_from_slice(&[0x7f, 0x7f]);
    });
    let files = Files::folder(copy.path()).unwrap();
    let error = quantize(&files, BlockFormat::Q4_K.into(), &out, &|_, _| {}, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("which Q4_K cannot hold"), "{error}");
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    fs::write(&out, "mine").unwrap();
    assert!(matches!(saved("llama-256", BlockFormat::Q8_0, &out), Err(ExportError::Exists { .. })));
    assert_eq!(fs::read(&out).unwrap(), b"mine");
}

#[test]
fn a_damaged_saved_checkpoint_is_refused_by_name() {
    let save = || {
        let temp = tempfile::tempdir().unwrap();
        saved("llama-256", BlockFormat::Q4_K, &temp.path().join("saved")).unwrap();
        let copy = Copy::of("llama-256");
        for name in ["config.json", "model.safetensors"] {
            copy.write(name, &fs::read(temp.path().join("saved").join(name)).unwrap());
        }
        copy
    };
    const NAME: &str = "model.layers.0.mlp.up_proj.weight";
    let copy = save();
    copy.edit_weights(|tensors| find(tensors, NAME).data[144..146].copy_from_slice(&[0, 0x7c]));
    copy.assert_refused(&[NAME, "at element 256"]);
    let copy = save();
    copy.edit_config(|c| c["quantization_config"]["format"] = json!("Q8_0"));
    copy.assert_refused(&[NAME, "has shape"]);
    let copy = save();
    copy.edit_config(|c| c["quantization_config"]["format"] = json!("Q9"));
    copy.assert_refused(&["quantization_config.format", "Q4_K"]);
    let copy = save();
    copy.edit_config(|c| drop(c["quantization_config"].as_object_mut().unwrap().remove("fallback")));
    copy.assert_refused(&["quantization_config.fallback is missing"]);
}
