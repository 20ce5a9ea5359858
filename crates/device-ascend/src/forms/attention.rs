//! The forms of attention, full and latent.

use std::fmt;

use baton_device::{AttentionParams, Result as SeamResult};

use super::step::Step;
use super::trial::try_on;
use super::{Candidate, Place, first};
use crate::backend::AscendBackend;
use crate::chip::Chip;
use crate::object::DataType;

/// What the form of full attention depends on.
#[derive(PartialEq)]
pub(crate) struct AttentionShape {
    params: AttentionParams,
    dtype: DataType,
}

impl fmt::Display for AttentionShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AttentionParams { heads, kv_heads, head_dim, window, softcap, .. } = self.params;
        write!(f, "attention of {heads} heads on {kv_heads}, {head_dim} wide, in {}", self.dtype)?;
        window.map_or(Ok(()), |window| write!(f, ", window {window}"))?;
        softcap.map_or(Ok(()), |cap| write!(f, ", scores within {cap}"))
    }
}

/// What the form of latent attention depends on.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct LatentShape {
    pub(crate) heads: usize,
    pub(crate) rank: usize,
    pub(crate) rope: usize,
    pub(crate) dtype: DataType,
}

impl fmt::Display for LatentShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { heads, rank, rope, dtype } = self;
        write!(f, "latent attention of {heads} heads, {rank} and {rope} wide, in {dtype}")
    }
}

/// A form of latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LatentForm {
    /// One operator, which is given so many heads: those that are missing are zero.
    Fused {
        heads: usize,
    },
    Composed,
}

const COMPOSED: &str = "composed of products and Softmax";
const FUSED: &str = "FusedInferAttentionScoreV3";

/// Whether full attention in a layer, on a cache in `dtype`, is fused.
pub(crate) fn attention(
    backend: &AscendBackend,
    params: &AttentionParams,
    dtype: DataType,
    layer: usize,
) -> SeamResult<bool> {
    let candidates = |shape: &AttentionShape| {
        let objection = off(backend).or_else(|| full_refuses(backend.chip, shape));
        vec![
            Candidate { name: FUSED.into(), form: true, objection },
            Candidate { name: COMPOSED.into(), form: false, objection: None },
        ]
    };
    let shape = AttentionShape { params: *params, dtype };
    backend.forms.attention.settle(shape, Place::Layer(layer), candidates, |_| {
        let (mask, params) = (backend.mask()?, *params);
        let outcome = try_on(&backend.owner, move |device| Step::mixed().try_full(device, &params, dtype, &mask))?;
        Ok(outcome.and_then(|verdict| verdict))
    })
}

/// The form of latent attention in a layer.
pub(crate) fn latent(backend: &AscendBackend, shape: LatentShape, layer: usize) -> SeamResult<LatentForm> {
    /// What older releases take at least.
    const OLDER: usize = 32;
    let LatentShape { heads, dtype, .. } = shape;
    let candidates = |shape: &LatentShape| {
        let exact = heads.next_power_of_two();
        let mut padded = vec![exact, exact.max(OLDER)];
        padded.dedup();
        let fused = padded.into_iter().map(|heads| Candidate {
            name: format!("{FUSED} of {heads} heads"),
            form: LatentForm::Fused { heads },
            objection: off(backend).or_else(|| latent_refuses(backend.chip, shape, heads)),
        });
        fused.chain([Candidate { name: COMPOSED.into(), form: LatentForm::Composed, objection: None }]).collect()
    };
    let widths = [shape.rank, shape.rope];
    backend.forms.latent.settle(shape, Place::Layer(layer), candidates, |form| {
        let LatentForm::Fused { heads } = form else { return Ok(Ok(())) };
        let mask = backend.mask()?;
        let outcome = try_on(&backend.owner, move |device| {
            for step in [Step::mixed(), Step::decode()] {
                if let Err(objection) = step.try_latent(device, heads, widths, dtype, &mask)? {
                    return Ok(Err(objection));
                }
            }
            Ok(Ok(()))
        })?;
        Ok(outcome.and_then(|verdict| verdict))
    })
}

fn off(backend: &AscendBackend) -> Option<String> {
    backend.forms.strict.then(|| "fused forms are off".into())
}

/// Why the operator does not take full attention of a shape.
fn full_refuses(chip: Chip, shape: &AttentionShape) -> Option<String> {
    const WIDTH: usize = 256;
    const WIDTH_STEP: usize = 16;
    const HEADS: usize = 256;
    /// Of the keys of a token.
    const ROW: usize = 65_535;
    let AttentionParams { heads, kv_heads, head_dim, softcap, .. } = shape.params;
    let narrow = head_dim.is_multiple_of(WIDTH_STEP) && head_dim <= WIDTH;
    first([
        (chip == Chip::P310, format!("{chip} has none")),
        (shape.dtype == DataType::F32, "it takes f16 and bf16".into()),
        (softcap.is_some(), "it does not bound scores".into()),
        (!narrow, format!("heads are multiples of {WIDTH_STEP} wide, at most {WIDTH}")),
        (heads > HEADS, format!("it takes at most {HEADS} heads")),
        (kv_heads * head_dim > ROW, format!("keys of a token are at most {ROW} wide")),
    ])
}

/// Why the operator does not take latent attention of a shape, with heads made up to `padded`.
fn latent_refuses(chip: Chip, shape: &LatentShape, padded: usize) -> Option<String> {
    const WIDTHS: [usize; 2] = [512, 64];
    const HEADS: usize = 128;
    first([
        (chip == Chip::P310, format!("{chip} has none")),
        (shape.dtype == DataType::F32, "it takes f16 and bf16".into()),
        ([shape.rank, shape.rope] != WIDTHS, format!("it takes widths of {WIDTHS:?} only")),
        (padded > HEADS, format!("it takes at most {HEADS} heads")),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: AttentionParams =
        AttentionParams { heads: 32, kv_heads: 8, head_dim: 128, scale: 0.088, window: None, softcap: None };

    #[test]
    fn limits_exclude_what_the_operator_does_not_take() {
        for (params, dtype, chip, taken) in [
            (LLAMA, DataType::BF16, Chip::A2, true),
            (AttentionParams { window: Some(4096), ..LLAMA }, DataType::F16, Chip::A3, true),
            (LLAMA, DataType::F16, Chip::P310, false),
            (LLAMA, DataType::F32, Chip::A2, false),
            (AttentionParams { softcap: Some(50.0), ..LLAMA }, DataType::BF16, Chip::A2, false),
            (AttentionParams { head_dim: 72, ..LLAMA }, DataType::BF16, Chip::A2, false),
            (AttentionParams { head_dim: 256, ..LLAMA }, DataType::BF16, Chip::A2, true),
            (AttentionParams { head_dim: 272, ..LLAMA }, DataType::BF16, Chip::A2, false),
            (AttentionParams { heads: 512, ..LLAMA }, DataType::BF16, Chip::A2, false),
        ] {
            let shape = AttentionShape { params, dtype };
            assert_eq!(full_refuses(chip, &shape).is_none(), taken, "{shape} on {chip}");
        }
        let deepseek = LatentShape { heads: 128, rank: 512, rope: 64, dtype: DataType::BF16 };
        assert_eq!(latent_refuses(Chip::A2, &deepseek, 128), None);
        for (chip, shape, padded) in [
            (Chip::P310, LatentShape { dtype: DataType::F16, ..deepseek }, 128),
            (Chip::A2, LatentShape { dtype: DataType::F32, ..deepseek }, 128),
            (Chip::A2, LatentShape { rank: 64, rope: 16, ..deepseek }, 128),
            (Chip::A2, LatentShape { heads: 130, ..deepseek }, 256),
        ] {
            assert!(latent_refuses(chip, &shape, padded).is_some(), "{shape} on {chip}");
        }
    }
}
