//! Quantised checkpoints mean exactly the values that the libraries of their layouts gave for them (see
//! `models/golden/make/libraries.py`), their conversions are recorded, and what is wrong with them is
//! refused by name.

use std::collections::BTreeSet;
use std::fs;

use crate::common::checkpoint::{Copy, Tensor, find, probe, read_tensors};
use crate::common::{QUANTIZED, all_logits, folder, options};
use baton_device::{BlockFormat, Code, DType, Reference, WeightFormat};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_model::{Files, LoadOptions, LoadReport, load};
use half::{bf16, f16};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// And DeepSeek's blocks of FP8.
fn cases() -> impl Iterator<Item = &'static str> {
    QUANTIZED.into_iter().chain(["deepseek-v3-fp8"])
}

fn quantized(case: &str) -> Copy {
    Copy::of(&if case.starts_with("deepseek") { case.to_owned() } else { format!("quantized/{case}") })
}

fn exact() -> LoadOptions {
    LoadOptions { dtype: Some(DType::F32), ..options() }
}

fn report(copy: &Copy, options: &LoadOptions) -> LoadReport {
    load(Reference::new(), &Files::folder(copy.path()).unwrap(), options).unwrap().1
}

/// What a case's matrices mean, in float32.
fn values(case: &str) -> Vec<Tensor> {
    let name = fs::read_to_string(folder("quantized").join(case).join("values")).unwrap();
    read_tensors(&fs::read(folder("quantized/values").join(format!("{}.safetensors", name.trim()))).unwrap())
}

/// The same model with its matrices as floats.
fn widened(case: &str) -> Copy {
    let copy = quantized(case);
    copy.edit_config(|config| assert!(config.remove("quantization_config").is_some()));
    let values = values(case);
    copy.edit_weights(|tensors| {
        tensors.retain(|t| !t.name.contains("_proj."));
        tensors.extend(values);
    });
    copy
}

#[test]
fn every_layout_means_exactly_the_expected_values() {
    let cpu = || CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap();
    for case in QUANTIZED {
        let (copy, twin) = (quantized(case), widened(case));
        let both = [&copy, &twin].map(|c| Files::folder(c.path()).unwrap());
        let [actual, expected] = both.each_ref().map(|f| probe(load(Reference::new(), f, &exact()).unwrap()));
        assert!(expected.iter().any(|l| l.abs() > 0.1) && actual == expected, "{case}");
        let [actual, expected] =
            both.each_ref().map(|f| all_logits(&mut load(cpu(), f, &exact()).unwrap().0, &[1, 2, 3, 4, 5]));
        assert!(actual == expected, "{case} on the cpu");
    }
}

#[test]
fn the_values_are_those_that_the_libraries_gave() {
    let judges = crate::common::json(folder("quantized/judges.json"));
    for case in QUANTIZED {
        let mut values = values(case);
        assert_eq!(values.len(), 7, "{case}");
        values.sort_by(|a, b| a.name.cmp(&b.name));
        let digest = values.iter().fold(Sha256::new(), |digest, t| digest.chain_update(&t.data)).finalize();
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(judges[case]["sha256"], digest, "{case}: {}", judges[case]["library"]);
    }
}

/// Whole checkpoints, config included, as transformers reads them. With float16 scales a library rounds its values
/// to float16, and so do we when asked.
#[test]
fn the_logits_are_those_that_transformers_computes_through_the_libraries() {
    let judges = crate::common::json(folder("quantized/judges.json"));
    let mut judged = 0;
    for case in QUANTIZED {
        let Some(expected) = judges[case]["logits"].as_array() else { continue };
        let files = Files::folder(folder("quantized").join(case)).unwrap();
        let dtype = if judges[case]["computes"] == "float16" { DType::F16 } else { DType::F32 };
        let options = LoadOptions { dtype: Some(dtype), ..options() };
        let actual = probe(load(Reference::new(), &files, &options).unwrap());
        let last = &actual[actual.len() - expected.len()..];
        let off = last.iter().zip(expected).map(|(a, e)| (a - e.as_f64().unwrap() as f32).abs()).fold(0.0, f32::max);
        assert!(off <= 1e-4, "{case}: off by {off}");
        judged += 1;
    }
    assert_eq!(judged, QUANTIZED.len() - 3); // transformers cannot load a shuffled packed one, nor FP8 by tensor
}

#[test]
fn every_folder_of_the_goldens_is_read() {
    let entries = fs::read_dir(folder("quantized")).unwrap().map(|e| e.unwrap());
    let mut found: Vec<String> = entries
        .filter(|e| e.path().join("config.json").exists())
        .map(|e| e.file_name().into_string().unwrap())
        .collect();
    found.sort();
    let mut cases = QUANTIZED.to_vec();
    cases.sort();
    assert_eq!(found, cases);
}

#[test]
fn every_quantised_matrix_is_in_the_report() {
    for case in cases() {
        let copy = quantized(case);
        let in_f32 = report(&copy, &exact());
        assert!(in_f32.conversions.iter().all(|c| c.max_abs_error == 0.0 && c.mean_abs_error == 0.0), "{case}");
        let kept = report(&copy, &LoadOptions { dtype: None, ..exact() });
        assert_eq!(kept.conversions.len(), in_f32.conversions.len());
        for c in &kept.conversions {
            assert_eq!(c.to, WeightFormat::BF16, "{case}");
            assert!(c.mean_abs_error <= c.max_abs_error, "{case}: {c:?}");
            assert!(c.bytes_before < c.bytes_after, "{case}: {c:?}");
        }
        // MXFP4 fits bf16. So do FP8 codes times a short scale, of which deepseek-v3-fp8 has some, not all.
        assert_eq!(kept.conversions.iter().any(|c| c.max_abs_error > 0.0), case != "mxfp4", "{case}");
        assert!(case.starts_with("deepseek") || kept.conversions.len() == 7, "{case}");
    }
    let eight = report(
        &quantized("gptq-int4-shuffled"),
        &LoadOptions { dtype: None, quantization: Some(BlockFormat::Q8_0.into()), ..exact() },
    );
    assert_eq!(eight.conversions.iter().filter(|c| c.from.starts_with("gptq int4")).count(), 7);
    assert!(eight.conversions.iter().all(|c| c.to == WeightFormat::Ggml(BlockFormat::Q8_0) && c.max_abs_error > 0.0));
}

/// Experts of a projection are kept alike, and whoever asks how hears the same.
#[test]
fn experts_of_which_one_is_stored_otherwise_are_reported_as_they_are_kept() {
    let loaded = |copy: &Copy| {
        let keeps_codes =
            Reference::new().saying(|caps| caps.weight_formats.extend(Code::ALL.map(WeightFormat::Coded)));
        load(keeps_codes, &Files::folder(copy.path()).unwrap(), &options()).unwrap().1
    };
    // So many tokens meet every expert.
    let read = |report: &LoadReport| report.step_cost.bytes(1_000_000, 1);
    let [floats, codes] = [Copy::of("qwen3-moe"), Copy::of("deepseek-v3-fp8")];
    let alike = [&floats, &codes].map(loaded);
    floats.edit_weights(|tensors| {
        let one = find(tensors, "model.layers.0.mlp.experts.3.gate_proj.weight");
        let values = one.data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32());
        (one.dtype, one.data) = ("F16".into(), values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect());
    });
    codes.edit_config(|config| config["quantization_config"]["modules_to_not_convert"] = json!(["experts.3"]));
    codes.edit_weights(|tensors| {
        let is_part = |t: &Tensor| t.name.contains(".experts.3.") && t.name.ends_with("_scale_inv");
        tensors.retain(|t| !is_part(t));
        for t in tensors.iter_mut().filter(|t| t.name.contains(".experts.3.")) {
            (t.dtype, t.data) = ("BF16".into(), vec![0; 2 * t.data.len()]);
        }
    });
    let mixed = [&floats, &codes].map(loaded);
    for (mixed, alike) in mixed.iter().zip(&alike) {
        assert!(mixed.weight_bytes > alike.weight_bytes);
        assert_eq!(read(mixed) - read(alike), (mixed.weight_bytes - alike.weight_bytes) as f64);
    }
    // f32, which holds both, and nothing in f16. Routers are in f32 in any case.
    assert_eq!(mixed[0].weight_formats, [WeightFormat::F32, WeightFormat::BF16].into());
    let of_experts = mixed[1].conversions.iter().filter(|c| c.tensor.contains(".experts."));
    let kept: BTreeSet<_> = of_experts.map(|c| c.to).collect();
    assert_eq!(kept, [WeightFormat::BF16].into());
}

#[test]
fn the_report_is_json() {
    let json = serde_json::to_value(report(&quantized("int-int8-channel"), &exact())).unwrap();
    assert_eq!(json["quantization"], json!({"method": "compressed-tensors", "activations": "int8"}));
    assert_eq!(json["architecture"], "LlamaForCausalLM");
    let q = json["conversions"].as_array().unwrap().iter().find(|c| c["tensor"].as_str().unwrap().contains("q_proj"));
    let q = q.unwrap();
    assert_eq!((&q["from"], &q["to"]), (&json!("int8, per channel"), &json!("f32")));
    assert_eq!((&q["bytes_before"], &q["bytes_after"]), (&json!(64 * 64 + 64 * 2), &json!(64 * 64 * 4)));
}

/// The first layer's query projection.
const Q: &str = "model.layers.0.self_attn.q_proj";

#[test]
fn a_missing_part_is_named() {
    for (case, part) in [
        ("packed-int4-groups", "weight_zero_point"),
        ("packed-int4-groups", "weight_shape"),
        ("packed-int4-shuffled", "weight_g_idx"),
        ("gptq-int4-groups", "qzeros"),
        ("gptq-int4-shuffled", "g_idx"),
        ("awq-int4-groups", "scales"),
        ("fp8-tensor", "weight_scale"),
        ("deepseek-v3-fp8", "weight_scale_inv"),
        ("mxfp4", "weight_packed"),
    ] {
        let copy = quantized(case);
        let name = match case {
            "deepseek-v3-fp8" => format!("model.layers.1.self_attn.q_a_proj.{part}"),
            _ => format!("{Q}.{part}"),
        };
        copy.edit_weights(|tensors| tensors.retain(|t| t.name != name));
        copy.assert_refused(&[&format!("tensor {name} is missing")]);
    }
}

#[test]
fn a_part_of_another_shape_or_type_is_named() {
    for (case, part, shape) in [
        ("packed-int4-groups", "weight_packed", vec![8, 64]),
        ("gptq-int4-groups", "qweight", vec![64, 8]),
        ("awq-int4-groups", "qweight", vec![8, 64]),
        ("gptq-int4-groups", "scales", vec![64, 2]),
        ("int-int8-channel", "weight_scale", vec![1, 64]),
        ("mxfp4", "weight_scale", vec![128]),
    ] {
        let copy = quantized(case);
        let name = format!("{Q}.{part}");
        copy.edit_weights(|tensors| find(tensors, &name).shape = shape.clone());
        copy.assert_refused(&[&name, &format!("has shape {shape:?}, the config asks for")]);
    }
    let copy = quantized("fp8-tensor");
    copy.edit_weights(|tensors| find(tensors, &format!("{Q}.weight")).dtype = "F8_E5M2".into());
    copy.assert_refused(&["has dtype F8_E5M2", "F8_E4M3"]);
}

#[test]
fn values_that_mean_nothing_are_refused() {
    let nan16 = 0x7e00u16.to_le_bytes().to_vec();
    let minus_one = (-1i32).to_le_bytes().to_vec();
    for (case, part, bytes, wanted) in [
        ("packed-int4-groups", "weight_scale", nan16.clone(), "NaN"),
        ("gptq-int4-groups", "scales", nan16.clone(), "NaN"),
        ("awq-int4-groups", "scales", nan16, "NaN"),
        ("fp8-tensor", "weight_scale", f32::INFINITY.to_le_bytes().to_vec(), "inf"),
        ("fp8-tensor", "weight", vec![0, 0x7f], "NaN at element 1"),
        ("fp8-e5m2", "weight", vec![0xfc], "-inf at element 0"),
        ("mxfp4", "weight_scale", vec![255], "NaN"),
        ("mxfp4", "weight_scale", vec![254], "beyond f32"),
        ("gptq-int4-shuffled", "g_idx", 2i32.to_le_bytes().to_vec(), "column 0 belongs to group 2, there are 2"),
        ("packed-int4-shuffled", "weight_g_idx", minus_one, "column 0 belongs to group -1, there are 2"),
        ("packed-int4-groups", "weight_shape", vec![63], "states [63, 64], the config asks for [64, 64]"),
    ] {
        let copy = quantized(case);
        let name = format!("{Q}.{part}");
        copy.edit_weights(|tensors| find(tensors, &name).data[..bytes.len()].copy_from_slice(&bytes));
        copy.assert_refused(&[&name, wanted]);
    }
}

#[test]
fn configs_that_cannot_be_read_are_refused() {
    let set = |pointer: &'static str, value: Value| (pointer, value);
    let group = "/config_groups/group_0/weights";
    for (case, (pointer, value), wanted) in [
        ("gptq-int4-groups", set("/bits", json!(3)), "bits is 3; supported: 4 or 8"),
        ("awq-int4-groups", set("/bits", json!(8)), "bits is 8; supported: 4"),
        (
            "packed-int4-groups",
            (group, json!({"num_bits": 5, "strategy": "channel"})),
            "num_bits is 5; supported: 4 or 8",
        ),
        ("gptq-int4-groups", set("/group_size", json!(48)), "64 columns are not whole groups of 48"),
        ("awq-int4-groups", set("/group_size", json!(48)), "64 columns are not whole groups of 48"),
        ("gptq-int4-groups", set("/group_size", json!(0)), "group_size is 0"),
        ("gptq-int4-groups", set("/quant_method", json!("hqq")), "\"hqq\" is not supported; supported: fp8"),
        ("awq-int4-groups", set("/version", json!("gemv")), "version is \"gemv\""),
        ("fp8-tensor", set("/fmt", json!("e3m4")), "fmt is \"e3m4\""),
        ("packed-int4-groups", set("/format", json!("marlin-24")), "\"marlin-24\" is not supported"),
        ("packed-int4-groups", set("/ignore", json!(["re:(a|b)"])), "not supported"),
        ("deepseek-v3-fp8", set("/weight_block_size", json!([128])), "not a pair"),
        // A head that is not ignored must be there quantised, and a projection that is must not.
        ("packed-int4-groups", set("/ignore", json!([])), "tensor lm_head.weight_packed is missing"),
        ("packed-int4-groups", set("/ignore", json!(["lm_head", "re:.*q_proj$"])), "q_proj.weight is missing"),
    ] {
        let copy = quantized(case);
        copy.edit_config(|config| {
            let own = &mut config["quantization_config"];
            match own.pointer_mut(pointer) {
                Some(old) => *old = value,
                None => own[&pointer[1..]] = value,
            }
        });
        copy.assert_refused(&[wanted]);
    }
}
