//! DeepSeek-V3.2 and V4 as they are released: matrices in blocks of FP8 and experts in fours of bits mean the values of a checkpoint of
//! floats, to the last bit; tables name the experts of each token; and what is wrong with either is refused by name.

use baton_device::{DType, Reference};
use baton_model::{Files, LoadOptions, LoadReport, load};
use serde_json::{Map, Value, json};

use crate::common::checkpoint::{Copy, Tensor, find, probe};
use crate::common::{Rng, all_logits, exact_cpu, options_of};

const CASE: &str = "deepseek-v4-b";
/// Of the golden checkpoint's experts, which do not fill whole groups of 32 columns.
const GOLDEN_WIDTH: usize = 24;
const WIDTH: usize = 32;
const FOURS: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

#[derive(Clone, Copy, PartialEq)]
enum Experts {
    Fours,
    Bytes,
}

/// How files are released.
#[derive(Clone, Copy)]
struct Form {
    experts: Experts,
    /// Scales are exponents, and not f32.
    exponents: bool,
    /// A matrix of those that are in FP8 elsewhere is left in bf16.
    wo_a_is_float: bool,
    /// What the config says beside `quantization_config`.
    expert_dtype: Option<&'static str>,
}

const FLASH: Form = Form { experts: Experts::Fours, exponents: true, wo_a_is_float: false, expert_dtype: None };
const BASE: Form = Form { experts: Experts::Bytes, exponents: false, ..FLASH };

/// e4m3 by its definition (arXiv 2209.05433).
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let value = if exponent == 0 { mantissa * 2f32.powi(-6) } else { (1.0 + mantissa) * 2f32.powi(exponent - 7) };
    if code & 0x80 == 0 { value } else { -value }
}

/// The code of a number of the nearest magnitude below, with its sign in bit `sign`.
fn code(value: f32, magnitudes: &[f32], sign: u8) -> u8 {
    let below = magnitudes.partition_point(|m| *m <= value.abs()) - 1;
    below as u8 | if value < 0.0 { 1 << sign } else { 0 }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    assert_eq!(tensor.dtype, "BF16");
    tensor.data.chunks_exact(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)).collect()
}

/// A tensor in a released form, with what it means as a tensor of f32.
fn quantized(tensor: &Tensor, form: Form) -> (Vec<Tensor>, Tensor) {
    let &[rows, cols] = tensor.shape.as_slice() else { panic!("{} is no matrix", tensor.name) };
    let values = floats(tensor);
    let fours = tensor.name.contains(".experts.") && form.experts == Experts::Fours;
    let block = if fours { [1, 32] } else { [128, 128] };
    let bytes: Vec<f32> = (0..0x7f).map(e4m3).collect();
    let magnitudes = if fours { &FOURS[..] } else { &bytes[..] };
    let grid = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
    let cell = |row: usize, col: usize| row / block[0] * grid[1] + col / block[1];

    let mut largest = vec![0f32; grid[0] * grid[1]];
    values.iter().enumerate().for_each(|(i, v)| {
        let largest = &mut largest[cell(i / cols, i % cols)];
        *largest = largest.max(v.abs());
    });
    let exponents = form.exponents || fours;
    let scale = |largest: &f32| {
        let scale = largest.max(1e-3) / magnitudes.last().unwrap();
        if exponents { 2f32.powi(scale.log2().ceil() as i32) } else { scale }
    };
    let scales: Vec<f32> = largest.iter().map(scale).collect();
    let codes: Vec<u8> = (values.iter().enumerate())
        .map(|(i, v)| code(v / scales[cell(i / cols, i % cols)], magnitudes, if fours { 3 } else { 7 }))
        .collect();
    let meant = codes.iter().enumerate().map(|(i, code)| {
        let number = match fours {
            true if code & 8 == 0 => FOURS[usize::from(*code)],
            true => -FOURS[usize::from(code & 7)],
            false => e4m3(*code),
        };
        number * scales[cell(i / cols, i % cols)]
    });
    let meant = Tensor { dtype: "F32".into(), data: meant.flat_map(f32::to_le_bytes).collect(), ..tensor.clone() };

    let weight = match fours {
        // The first of two in the lower half.
        true => Tensor {
            dtype: "I8".into(),
            shape: vec![rows, cols / 2],
            data: codes.chunks_exact(2).map(|pair| pair[0] | pair[1] << 4).collect(),
            ..tensor.clone()
        },
        false => Tensor { dtype: "F8_E4M3".into(), data: codes, ..tensor.clone() },
    };
    let (dtype, data) = match exponents {
        true => ("F8_E8M0", scales.iter().map(|scale| (scale.to_bits() >> 23) as u8).collect()),
        false => ("F32", scales.iter().flat_map(|scale| scale.to_le_bytes()).collect()),
    };
    let name = tensor.name.replace(".weight", ".scale");
    (vec![weight, Tensor { name, dtype: dtype.into(), shape: grid.to_vec(), data }], meant)
}

/// Whether a released file has it quantised.
fn is_quantized(name: &str, form: Form) -> bool {
    let Some(module) = name.strip_prefix("layers.").and_then(|name| name.strip_suffix(".weight")) else { return false };
    let last = module.rsplit('.').next().unwrap();
    match last {
        "wo_a" => !form.wo_a_is_float,
        "wq_a" | "wq_b" | "wo_b" | "w1" | "w2" | "w3" => true,
        "wkv" => !module.contains("compressor"),
        _ => false,
    }
}

/// The golden checkpoint with experts that fill groups.
fn wide() -> Copy {
    let copy = Copy::of(CASE);
    copy.edit_config(|config| drop(config.insert("moe_intermediate_size".into(), json!(WIDTH))));
    let mut rng = Rng(12);
    copy.edit_weights(|tensors| {
        for tensor in tensors.iter_mut().filter(|t| t.name.contains("experts.")) {
            let width = tensor.shape.iter_mut().find(|side| **side == GOLDEN_WIDTH).unwrap();
            *width = WIDTH;
            let elements = tensor.shape.iter().product::<usize>();
            let value = |_| half::bf16::from_f32((rng.below(2000) as f32 - 1000.0) / 4000.0);
            tensor.data = (0..elements).map(value).flat_map(half::bf16::to_le_bytes).collect();
        }
    });
    copy
}

fn quantization_config() -> Value {
    json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128]})
}

fn state(config: &mut Map<String, Value>, form: Form) {
    config.insert("quantization_config".into(), quantization_config());
    if let Some(experts) = form.expert_dtype {
        config.insert("expert_dtype".into(), json!(experts));
    }
}

/// A released checkpoint, and the one of floats that it means.
fn released(form: Form) -> [Copy; 2] {
    let copies = [wide(), wide()];
    copies[0].edit_config(|config| state(config, form));
    with_quantized(copies, |name| is_quantized(name, form), |tensor| quantized(tensor, form))
}

/// The first of two equal checkpoints with matrices in a released form, the second with what that means.
fn with_quantized(
    [copy, twin]: [Copy; 2],
    is_quantized: impl Fn(&str) -> bool,
    quantize: impl Fn(&Tensor) -> (Vec<Tensor>, Tensor),
) -> [Copy; 2] {
    let mut widened = Vec::new();
    copy.edit_weights(|tensors| {
        let all = std::mem::take(tensors);
        for tensor in all {
            if is_quantized(&tensor.name) {
                let (parts, meant) = quantize(&tensor);
                tensors.extend(parts);
                widened.push(meant);
            } else {
                tensors.push(tensor);
            }
        }
    });
    assert!(widened.len() > 50, "{}", widened.len());
    twin.edit_weights(|tensors| {
        for meant in widened {
            let tensor = find(tensors, &meant.name);
            *tensor = meant;
        }
    });
    [copy, twin]
}

fn report(copy: &Copy, dtype: Option<DType>) -> LoadReport {
    let options = LoadOptions { dtype, ..options_of(CASE) };
    load(Reference::new(), &Files::folder(copy.path()).unwrap(), &options).unwrap().1
}

#[test]
fn released_forms_mean_exactly_the_expected_values() {
    let forms = [
        FLASH,
        Form { expert_dtype: Some("fp4"), ..FLASH },
        Form { wo_a_is_float: true, ..FLASH },
        BASE,
        Form { expert_dtype: Some("fp8"), ..BASE },
        Form { exponents: true, ..BASE },
    ];
    let mut all = Vec::new();
    for (i, form) in forms.into_iter().enumerate() {
        let files = released(form).map(|copy| (Files::folder(copy.path()).unwrap(), copy));
        let options = LoadOptions { dtype: Some(DType::F32), ..options_of(CASE) };
        let [actual, expected] =
            files.each_ref().map(|(files, _)| probe(load(Reference::new(), files, &options).unwrap()));
        let [on_cpu, expected_there] = files
            .each_ref()
            .map(|(files, _)| all_logits(&mut load(exact_cpu(), files, &options).unwrap().0, &[1, 2, 3, 4, 5]));
        assert!(on_cpu == expected_there, "form {i} on the cpu");
        assert!(expected.iter().all(|logit| logit.is_finite()) && expected.iter().any(|logit| logit.abs() > 0.1));
        assert!(actual == expected, "form {i}");
        all.push(actual);
    }
    assert!(all[0] == all[1] && all[3] == all[4]);
    assert!([2, 3, 5].iter().all(|other| all[0] != all[*other]));
}

/// As V3's, with an indexer whose queries and key are in blocks too; its weights of heads stay floats.
#[test]
fn v32_in_blocks_of_fp8_means_exactly_the_expected_values() {
    const CASE: &str = "deepseek-v32";
    let copies = [Copy::of(CASE), Copy::of(CASE)];
    copies[0].edit_config(|config| state(config, BASE));
    let in_blocks = |name: &str| {
        let module = name.strip_prefix("model.layers.").and_then(|name| name.strip_suffix(".weight"));
        let last = module.and_then(|module| module.rsplit('.').next()).unwrap_or_default();
        last != "weights_proj" && (last.ends_with("proj") || ["kv_a_proj_with_mqa", "wq_b", "wk"].contains(&last))
    };
    let [copy, twin] = with_quantized(copies, in_blocks, |tensor| {
        let (mut parts, meant) = quantized(tensor, BASE);
        parts[1].name = tensor.name.clone() + "_scale_inv";
        (parts, meant)
    });
    let options = LoadOptions { dtype: Some(DType::F32), ..options_of(CASE) };
    let prompt: Vec<u32> = (0..40).map(|i| i * 7 % 300).collect();
    let logits = |copy: &Copy| {
        let files = Files::folder(copy.path()).unwrap();
        let on_reference = all_logits(&mut load(Reference::new(), &files, &options).unwrap().0, &prompt);
        (on_reference, all_logits(&mut load(exact_cpu(), &files, &options).unwrap().0, &prompt))
    };
    let (actual, expected) = (logits(&copy), logits(&twin));
    assert!(expected.0.iter().all(|logit| logit.is_finite()) && actual == expected);
    let report = load(Reference::new(), &Files::folder(copy.path()).unwrap(), &options).unwrap().1;
    let of_indexers = report.conversions.iter().filter(|c| c.tensor.contains(".indexer.")).count();
    assert_eq!(of_indexers, 2 * report.conversions.iter().filter(|c| c.tensor.ends_with("q_a_proj.weight")).count());
}

#[test]
fn every_released_matrix_is_in_the_report() {
    let [copy, _] = released(FLASH);
    let exact = report(&copy, Some(DType::F32));
    assert!(exact.conversions.iter().all(|c| c.max_abs_error == 0.0));
    let of = |form: &str| exact.conversions.iter().filter(|c| c.from == form).count();
    // Five matrices of attention in five layers, an indexer's in two; eight experts in each, and a shared one.
    assert_eq!((of("fp8 e4m3, blocks of 128x128"), of("mxfp4, blocks of 32")), (5 * 5 + 2 + 5 * 3, 5 * 8 * 3));
    let json = serde_json::to_value(&exact).unwrap();
    assert_eq!(json["quantization"], json!({"method": "fp8", "activations": "fp8"}));
    // Both fit bf16.
    let kept = report(&copy, None);
    assert!(kept.conversions.iter().all(|c| c.max_abs_error == 0.0 && c.bytes_before < c.bytes_after));
}

#[test]
fn configs_and_types_that_do_not_agree_are_refused() {
    for (form, said, wanted) in [
        (BASE, "fp4", "layers.0.ffn.experts.0.w1.weight has shape [32, 96], the config asks for [32, 48]"),
        (FLASH, "fp8", "layers.0.ffn.experts.0.w1.weight has shape [32, 48], the config asks for [32, 96]"),
        (FLASH, "nvfp4", "expert_dtype is \"nvfp4\"; supported: \"fp4\" or \"fp8\""),
    ] {
        let [copy, _] = released(form);
        copy.edit_config(|config| drop(config.insert("expert_dtype".into(), json!(said))));
        copy.assert_refused(&[wanted]);
        copy.edit_config(|config| {
            config.remove("expert_dtype");
            config["quantization_config"]["expert_dtype"] = json!(said);
        });
        copy.assert_refused(&[wanted]);
    }
    // Experts whose columns are no whole groups.
    let narrow = Copy::of(CASE);
    narrow.edit_config(|config| state(config, Form { expert_dtype: Some("fp4"), ..FLASH }));
    narrow.edit_weights(|tensors| {
        let name = "layers.0.ffn.experts.0.w2.weight";
        let tensor = find(tensors, name);
        (tensor.dtype, tensor.data) = ("I8".into(), vec![0; 96 * 24]);
    });
    narrow.assert_refused(&["layers.0.ffn.experts.0.w2.weight", "its 24 columns are not whole groups of 32"]);
    // Without a word of quantisation such tensors are no weights.
    let [silent, _] = released(FLASH);
    silent.edit_config(|config| drop(config.remove("quantization_config")));
    silent.assert_refused(&["layers.0.attn.wq_a.weight has dtype F8_E4M3"]);
}

#[test]
fn damaged_parts_of_released_matrices_are_named() {
    const Q: &str = "layers.0.attn.wq_a";
    const EXPERT: &str = "layers.2.ffn.experts.5.w2";
    let [copy, _] = released(FLASH);
    let intact = copy.read("model.safetensors");
    let damaged = |name: &str, edit: &dyn Fn(&mut Tensor), wanted: &[&str]| {
        copy.write("model.safetensors", &intact);
        copy.edit_weights(|tensors| edit(find(tensors, name)));
        copy.assert_refused(wanted);
    };
    for module in [Q, EXPERT] {
        let (weight, scale) = (&format!("{module}.weight"), &format!("{module}.scale"));
        damaged(scale, &|t| t.name.push('s'), &[&format!("tensor {scale} is missing")]);
        damaged(scale, &|t| t.data[0] = 255, &[scale, "NaN at element 0"]);
        damaged(scale, &|t| t.data[0] = 254, &[scale, "scale 0 is", "beyond f32"]);
        damaged(scale, &|t| t.shape.push(1), &[scale, "the config asks for"]);
        damaged(scale, &|t| t.dtype = "I8".into(), &[scale, "has dtype I8", "F8_E8M0"]);
        damaged(weight, &|t| t.name.push('s'), &[&format!("tensor {weight} is missing")]);
    }
    damaged(&format!("{Q}.weight"), &|t| t.data[3] = 0x7f, &[Q, "NaN at element 3"]);
    // Fours are for experts.
    damaged(&format!("{Q}.weight"), &|t| t.dtype = "I8".into(), &[Q, "has dtype I8; F8_E4M3"]);
}

const TABLE: &str = "layers.0.ffn.gate.tid2eid";

/// Puts an expert into the table of either case.
fn put(tensors: &mut [Tensor], [token, place]: [usize; 2], expert: i64) {
    let tensor = find(tensors, TABLE);
    let at = token * tensor.shape[1] + place;
    match tensor.dtype.as_str() {
        "I64" => tensor.data[8 * at..][..8].copy_from_slice(&expert.to_le_bytes()),
        _ => tensor.data[4 * at..][..4].copy_from_slice(&(expert as i32).to_le_bytes()),
    }
}

#[test]
fn tables_that_name_no_experts_are_refused() {
    for (case, stored) in [("deepseek-v4", "I64"), ("deepseek-v4-b", "I32")] {
        let copy = Copy::of(case);
        let intact = copy.read("model.safetensors");
        let refused = |edit: &dyn Fn(&mut Vec<Tensor>), wanted: &[&str]| {
            copy.write("model.safetensors", &intact);
            copy.edit_weights(|tensors| {
                assert_eq!(find(tensors, TABLE).dtype, stored);
                edit(tensors);
            });
            copy.assert_refused(wanted);
        };
        refused(&|tensors| put(tensors, [7, 1], 8), &[TABLE, "token 7 has expert 8, there are 8"]);
        refused(&|tensors| put(tensors, [511, 0], -1), &[TABLE, "token 511 has expert -1, there are 8"]);
        let twice = |tensors: &mut Vec<Tensor>| [0, 1].iter().for_each(|place| put(tensors, [9, *place], 3));
        refused(&twice, &[TABLE, "token 9 has expert 3 twice"]);
        let cut = |tensors: &mut Vec<Tensor>| {
            let table = find(tensors, TABLE);
            table.shape[0] -= 1;
            table.data.truncate(table.data.len() / 512 * 511);
        };
        refused(&cut, &[TABLE, "has shape [511, ", "the config asks for [512, "]);
        let floats = |tensors: &mut Vec<Tensor>| {
            let table = find(tensors, TABLE);
            table.dtype = if stored == "I64" { "F64".into() } else { "F32".into() };
        };
        refused(&floats, &[TABLE, "has dtype F", "I64 or I32"]);
        refused(&|tensors| tensors.retain(|t| t.name != TABLE), &[&format!("tensor {TABLE} is missing")]);
        let surplus = |tensors: &mut Vec<Tensor>| find(tensors, TABLE).name = TABLE.replace("layers.0", "layers.4");
        refused(&surplus, &[&format!("tensor {} is not part of this model", TABLE.replace("layers.0", "layers.4"))]);
    }
    // What does not fit is not cut to what does.
    let copy = Copy::of("deepseek-v4");
    copy.edit_weights(|tensors| put(tensors, [0, 0], 1 << 32 | 1));
    copy.assert_refused(&[TABLE, "token 0 has expert 4294967297"]);
}

#[test]
fn a_table_is_the_same_in_either_type_and_part_of_the_digest() {
    let loaded = |edit: &dyn Fn(&mut Vec<Tensor>)| {
        let copy = Copy::of("deepseek-v4");
        copy.edit_weights(|tensors| edit(tensors));
        let loaded = copy.load().unwrap();
        (loaded.1.digest.clone(), probe(loaded))
    };
    let golden = loaded(&|_| ());
    let narrow = loaded(&|tensors| {
        let table = find(tensors, TABLE);
        table.dtype = "I32".into();
        table.data = table.data.chunks_exact(8).flat_map(|expert| expert[..4].to_vec()).collect();
    });
    assert!(golden.0 != narrow.0 && golden.1 == narrow.1);
    // Of a token that is not in the text.
    let other = loaded(&|tensors| (0..3).for_each(|place| put(tensors, [500, place], place as i64)));
    assert!(golden.0 != other.0 && golden.1 == other.1);
}
