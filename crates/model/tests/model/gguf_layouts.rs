//! Golden checkpoints of every architecture as GGUF files, laid out as llama.cpp's converter does
//! (`models/golden/make/gguf.py`): the file computes what the checkpoint does, to the last bit.

use crate::common::checkpoint::Copy;
use crate::common::gguf::{GgufFile, layouts};
use crate::common::{all_logits, folder, options, prompts};
use baton_device::{Backend, BlockFormat, CompressedOps, DType, LatentOps, Reference};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_model::{Files, LoadOptions, LoadReport, ModelRunner, load};
use serde_json::Value;

/// On logits, absolute, between blocks and the floats that they stand for.
const TOLERANCE: f32 = 1e-3;

fn cpu() -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap()
}

fn open<B: Backend + LatentOps + CompressedOps>(backend: B, file: &GgufFile) -> (ModelRunner<B>, LoadReport) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    load(backend, &Files::at(path).unwrap(), &options()).unwrap_or_else(|e| panic!("{e}"))
}

/// Logits of a layout's checkpoint itself, its config edited as the layout says.
fn of_checkpoint<B: Backend + LatentOps + CompressedOps>(backend: B, layout: &Value, dtype: DType) -> ModelRunner<B> {
    let (case, edits) = (layout["from"].as_str().unwrap(), layout["config"].as_object().unwrap());
    let options = LoadOptions { dtype: Some(dtype), ..options() };
    let copy = (!edits.is_empty()).then(|| Copy::of(case));
    if let Some(copy) = &copy {
        copy.edit_config(|config| config.extend(edits.clone()));
    }
    let folder = copy.as_ref().map_or_else(|| folder(case), |copy| copy.path().to_owned());
    load(backend, &Files::folder(folder).unwrap(), &options).unwrap().0
}

/// Logits after two prompts, one longer than any window.
fn logits<B: Backend + LatentOps + CompressedOps>(runner: &mut ModelRunner<B>, layout: &Value) -> Vec<f32> {
    let prompts = prompts(layout["from"].as_str().unwrap());
    let of = |name: &str| &prompts.iter().find(|p| p.name == name).unwrap().ids;
    [of("short"), of("mid")].into_iter().flat_map(|ids| all_logits(runner, ids)).collect()
}

fn files_compute_what_their_checkpoints_do<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B) {
    let layouts = layouts();
    assert!(layouts.len() > 10);
    for (name, layout) in &layouts {
        for dtype in [DType::F32, DType::BF16] {
            let stored = if layout["from"] == "qwen2-untied" && dtype == DType::BF16 { DType::F16 } else { dtype };
            // Vectors are f32 in every file, routers in those of llama.cpp.
            let of = |name: &str, shape: &[usize]| {
                if shape.len() == 1 || name.contains("ffn_gate_inp") { DType::F32 } else { stored }
            };
            let (mut runner, report) = open(make(), &GgufFile::of(layout, of));
            assert_eq!(report.conversions, [], "{name}");
            let actual = logits(&mut runner, layout);
            let expected = logits(&mut of_checkpoint(make(), layout, stored), layout);
            let same = actual.iter().zip(&expected).all(|(a, e)| a.to_bits() == e.to_bits());
            assert!(actual.len() == expected.len() && same, "{name} as {stored}");
        }
    }
}

#[test]
fn every_layout_computes_what_its_checkpoint_does_on_the_reference() {
    files_compute_what_their_checkpoints_do(Reference::new);
}

#[test]
fn every_layout_computes_what_its_checkpoint_does_on_the_cpu() {
    files_compute_what_their_checkpoints_do(cpu);
}

fn blocks_compute_what_they_stand_for<B: Backend + LatentOps + CompressedOps>(
    make: impl Fn() -> B,
    judge: impl Fn(&str, &[f32], &[f32]),
) {
    for (name, layout) in &layouts() {
        // As llama.cpp mixes them; what has no whole blocks stays in floats.
        let stored = |name: &str, shape: &[usize]| match shape {
            [_] => DType::F32,
            [.., cols] if cols % 32 != 0 => DType::F16,
            _ if name.contains("ffn_gate_inp") => DType::F32,
            _ if name.contains("ffn_down") || name.starts_with("token_embd") => DType::Ggml(BlockFormat::Q8_0),
            _ => DType::Ggml(BlockFormat::Q4_0),
        };
        let file = GgufFile::of(layout, stored);
        let (mut runner, report) = open(make(), &file);
        assert_eq!(report.conversions, [], "{name}");
        assert!(report.weight_formats.iter().any(|f| f.to_string() == "Q4_0"), "{name}: {report:?}");
        // Each expert's matrices too; what attention absorbs is widened where it is in two tensors.
        let bytes: usize = file.tensors.iter().map(|t| t.data.len()).sum();
        let joined = file.tensors.iter().filter(|t| t.name.contains("_k_b") || t.name.contains("_v_b"));
        let widened = joined.map(|t| t.shape.iter().product::<usize>() * 4 - t.data.len()).sum::<usize>();
        assert!(report.weight_bytes <= (bytes + widened) as u64, "{name}: {} bytes of {bytes}", report.weight_bytes);
        let actual = logits(&mut runner, layout);
        let expected = logits(&mut open(make(), &file.widened()).0, layout);
        judge(name, &actual, &expected);
    }
}

/// Largest and mean difference.
fn differences(actual: &[f32], expected: &[f32]) -> (f32, f32) {
    let all = || actual.iter().zip(expected).map(|(a, e)| (a - e).abs());
    (all().fold(0.0, f32::max), all().sum::<f32>() / actual.len() as f32)
}

#[test]
fn blocks_of_every_layout_compute_what_they_stand_for_on_the_reference() {
    blocks_compute_what_they_stand_for(Reference::new, |name, actual, expected| {
        let (worst, _) = differences(actual, expected);
        assert!(worst <= TOLERANCE, "{name}: off by {worst}");
    });
}

#[test]
fn blocks_of_every_layout_compute_what_they_stand_for_on_the_cpu() {
    blocks_compute_what_they_stand_for(cpu, |name, actual, expected| {
        let mean = expected.iter().sum::<f32>() / expected.len() as f32;
        let std = (expected.iter().map(|e| (e - mean).powi(2)).sum::<f32>() / expected.len() as f32).sqrt();
        // Activations are bytes there, which now and then choose another expert.
        let (_, off) = differences(actual, expected);
        assert!(off <= 0.1 * std, "{name}: off by {off} on average, where they spread by {std}");
    });
}
