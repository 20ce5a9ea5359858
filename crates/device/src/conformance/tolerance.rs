//! How far a device may be from the judge: what rounding explains, and no more.

use super::{Case, Pooled};
use crate::{Caps, DType, KvDtype, WeightFormat};

/// Of sums in f32, in another order than the judge's.
const SUMS: f32 = 2e-5;

/// The largest difference that rounding explains.
pub(super) fn tolerance(case: &Case, caps: &Caps, expected: &[f32]) -> f32 {
    if caps.activations == DType::F32 {
        return match case {
            // The judge does not make activations narrow: what is not on a grid differs by up to half a step of 127
            // (of 256 for bf16) for each of two products.
            Case::Moe { format, .. } | Case::BoundedMoe { format, .. } | Case::Latent { format, .. }
                if caps.narrow_activations.contains(format) =>
            {
                5e-3
            }
            // A key whose last bit is another before it is kept, for it is rotated or normed, may be rounded to the other side.
            Case::Rotary { kv, .. } | Case::RotaryLatent { kv, .. } | Case::Indexed { kv, .. } => SUMS + kept(*kv),
            // So may an entry.
            Case::Windowed { kv, pooled, .. } if pooled.pool().is_some() => SUMS + kept(*kv),
            _ => SUMS,
        };
    }
    // Narrower activations: each rounding on the way to an output is off by at most the unit roundoff of its type, of a
    // number that is no larger than the largest output (inputs are of order one). Sums are f32, so their length adds
    // nothing; of rounded terms they average the errors.
    SUMS + case.roundings() * case.roundoff(caps) * largest(expected)
}

fn largest(numbers: &[f32]) -> f32 {
    numbers.iter().fold(1.0, |max: f32, x| max.max(x.abs()))
}

/// The largest error of a rounding of 1.
fn roundoff(dtype: DType) -> f32 {
    match dtype {
        DType::F32 | DType::Ggml(_) => 0.0,
        DType::F16 => 0.5_f32.powi(11),
        DType::BF16 => 0.5_f32.powi(8),
    }
}

/// The largest error of what a cache keeps of 1.
fn kept(kv: KvDtype) -> f32 {
    match kv {
        KvDtype::F32 => 0.0,
        KvDtype::F16 => roundoff(DType::F16),
        KvDtype::BF16 => roundoff(DType::BF16),
        KvDtype::Int8 => 0.5 / 127.0,
    }
}

impl Case {
    /// Roundings to the type of activations on the way to an output.
    fn roundings(&self) -> f32 {
        match self {
            // Of the weight where the device multiplies in less, of the product, of the bias, of their sum.
            Case::Linear { .. }
            | Case::Coded { .. }
            | Case::Group { .. }
            | Case::Made { .. }
            | Case::Grouped { .. } => 4.0,
            // As above, of both.
            Case::Gated { .. } => 8.0,
            // Of the sum with the residual, of the weight, of the result.
            Case::Norm { .. } => 3.0,
            // Of the activation or the scaled number, of the weight of a sum, of the result.
            Case::Elementwise { .. } => 3.0,
            // Logits are given, and the table is in f32.
            Case::Choose { .. } => 0.0,
            // Of cosine and sine, of both products, of the result.
            Case::Rope(_) => 4.0,
            // Of the scaled query, of the softmax, of the result; once more where products are narrower.
            Case::Attention { .. } => 4.0,
            // Of devices that compute in f32: with less, others would be chosen.
            Case::Indexed { .. } | Case::Windowed { pooled: Pooled::Chosen { .. }, .. } => 0.0,
            // As attention, and of a norm and a rotation.
            Case::Windowed { .. } => 11.0,
            // Of the weights, of what is joined, of what is mixed, and of this once more.
            Case::Streams { .. } => 8.0,
            // As attention, and of the absorbed query and of the mixed latents.
            Case::Latent { .. } => 6.0,
            // As norms, rotation and attention one after the other.
            Case::Rotary { .. } => 11.0,
            Case::RotaryLatent { .. } => 13.0,
            // Of gate, up, activation, their product and down; of an expert's share and the sum.
            Case::Moe { .. } | Case::BoundedMoe { .. } => 8.0,
        }
    }

    /// The largest error of a rounding to the types in which a device with narrow activations computes the case, of 1.
    fn roundoff(&self, caps: &Caps) -> f32 {
        let narrow = |format: &WeightFormat| match format {
            _ if !caps.narrow_activations.contains(format) => 0.0,
            WeightFormat::BF16 => roundoff(DType::BF16).max(roundoff(caps.activations)),
            _ => roundoff(caps.activations),
        };
        match self {
            // A weight that meets activations as they are gives an exact product: router logits depend on it.
            Case::Linear { format, .. } | Case::Grouped { format, .. } => narrow(format),
            Case::Coded { layout, .. } => narrow(&WeightFormat::Coded(layout.code)),
            Case::Made { block, .. } => narrow(&WeightFormat::Ggml(*block)),
            Case::Group { weights, .. } => weights.iter().map(|(_, format)| narrow(format)).fold(0.0, f32::max),
            Case::Latent { format, .. } | Case::Moe { format, .. } | Case::BoundedMoe { format, .. } => {
                narrow(format).max(roundoff(caps.activations))
            }
            Case::Gated { formats, .. } => formats.iter().map(narrow).fold(roundoff(caps.activations), f32::max),
            _ => roundoff(caps.activations),
        }
    }
}
