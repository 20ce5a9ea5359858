//! What is rounded on the way to the numbers that are served, beyond what the trainer's golden values were.

use baton_device::{Caps, Code, DType, KvDtype, WeightFormat};
use baton_handoff::{Feature, Manifest, PrecisionClass};
use baton_model::LoadReport;

/// The class, and the formats that make it so in words.
pub fn served(report: &LoadReport, caps: &Caps, manifest: &Manifest) -> (PrecisionClass, String) {
    let mut class = match manifest.computed.dtype.as_str() {
        "float32" => PrecisionClass::Float32,
        _ => PrecisionClass::Half,
    };
    let lossy = report.conversions.iter().filter(|conversion| conversion.max_abs_error > 0.0);
    class = lossy.map(|conversion| of_weights(conversion.to)).fold(class, PrecisionClass::max);
    // Golden values of weights before they were quantised: whatever the device widens them to, they were.
    if manifest.trained.quantization.is_none() {
        class = manifest.requires.iter().map(|feature| of_stored(*feature)).fold(class, PrecisionClass::max);
    }
    for format in &report.weight_formats {
        if caps.narrow_activations.contains(format) {
            class = class.max(of_activations(*format));
        }
        // The golden values know of blocks only if the trainer quantised.
        if manifest.trained.quantization.is_none() && matches!(format, WeightFormat::Ggml(_)) {
            class = class.max(of_weights(*format));
        }
    }
    if caps.activations != DType::F32 {
        class = class.max(PrecisionClass::Half);
    }
    class = class.max(match report.kv_dtype {
        KvDtype::F32 => PrecisionClass::Float32,
        KvDtype::F16 | KvDtype::BF16 => PrecisionClass::Half,
        KvDtype::Int8 => PrecisionClass::Int8,
    });
    let formats: Vec<String> = report.weight_formats.iter().map(ToString::to_string).collect();
    let words =
        format!("weights {}, activations {}, cache {}", formats.join("+"), activations(report, caps), report.kv_dtype);
    (class, words)
}

/// By the form in which a checkpoint has its weights.
fn of_stored(feature: Feature) -> PrecisionClass {
    match feature {
        Feature::Int8 | Feature::Fp8 => PrecisionClass::Int8,
        Feature::Int4 | Feature::Mxfp4 => PrecisionClass::Int4,
        _ => PrecisionClass::Float32,
    }
}

fn of_weights(format: WeightFormat) -> PrecisionClass {
    match format {
        WeightFormat::F32 => PrecisionClass::Float32,
        WeightFormat::F16 | WeightFormat::BF16 => PrecisionClass::Half,
        WeightFormat::Ggml(block) if block.bytes() >= block.elements() => PrecisionClass::Int8,
        WeightFormat::Coded(Code::Int8 | Code::E4M3 | Code::E5M2) => PrecisionClass::Int8,
        WeightFormat::Ggml(_) | WeightFormat::Coded(Code::Int4 | Code::E2M1) => PrecisionClass::Int4,
    }
}

fn of_activations(format: WeightFormat) -> PrecisionClass {
    match format {
        WeightFormat::Ggml(_) => PrecisionClass::Int8,
        _ => PrecisionClass::Half,
    }
}

/// The precision of activations in words, as the device meets the weights that were loaded.
pub fn activations(report: &LoadReport, caps: &Caps) -> String {
    if caps.activations != DType::F32 {
        return caps.activations.to_string();
    }
    let narrow = || report.weight_formats.iter().filter(|format| caps.narrow_activations.contains(format));
    let blocks = narrow().any(|format| matches!(format, WeightFormat::Ggml(_)));
    let words = match (narrow().any(|format| *format == WeightFormat::BF16), blocks) {
        (false, false) => "f32",
        (false, true) => "f32, int8 where they meet blocks",
        (true, false) => "f32, bf16 where they meet bf16",
        (true, true) => "f32, bf16 where they meet bf16, int8 where they meet blocks",
    };
    words.to_owned()
}
