//! The forms of attention, full and latent, and the step on which they are tried.

use std::fmt;
use std::sync::Arc;

use baton_device::conformance::uniform;
use baton_device::{AttentionParams, Result as SeamResult};

use super::trial::{agree, floats, try_on};
use super::{Candidate, Place, Verdict, first};
use crate::backend::{AscendBackend, BLOCK};
use crate::chip::Chip;
use crate::device::{Device, encode, rounded};
use crate::error::AscendError;
use crate::object::{DataType, View};
use crate::ops::fused_attention::{Sequences, StepView, attend, attend_latent};

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

/// A step on a small cache, and its judge. Blocks are out of order, unused ones hold numbers too, and keys that a query
/// must not see are those that it would attend to most.
struct Step {
    /// Positions before the step, and its tokens.
    spans: [(usize, usize); 3],
}

/// Blocks of each sequence, and how many there are in all.
const TABLES: [[i32; 2]; 3] = [[3, 0], [0, 2], [1, 0]];
const BLOCKS: usize = 5;
const TABLE_DIMS: &[usize] = &[TABLES.len(), TABLES[0].len()];
/// A window is tried at this length at most, so that contexts are longer.
const WINDOW: usize = 40;
/// The sequence whose context is longer than a block and than a window.
const LONG: usize = 1;

impl Step {
    /// A prompt, a decode step and a chunk behind a prefix.
    fn mixed() -> Self {
        Self { spans: [(0, 5), (130, 1), (17, 3)] }
    }

    fn decode() -> Self {
        Self { spans: [(4, 1), (130, 1), (19, 1)] }
    }

    fn rows(&self) -> usize {
        self.spans.iter().map(|(_, tokens)| tokens).sum()
    }

    /// For each row its sequence and position.
    fn tokens(&self) -> impl Iterator<Item = (usize, usize)> {
        let all = self.spans.iter().enumerate();
        all.flat_map(|(s, &(start, tokens))| (start..start + tokens).map(move |position| (s, position)))
    }

    fn view(&self, tables: &View) -> StepView {
        let ends = self.spans.iter().scan(0, |end, &(_, tokens)| {
            *end += tokens as i64;
            Some(*end)
        });
        let lengths = self.spans.iter().map(|&(start, tokens)| (start + tokens) as i64);
        let sequences = Sequences { query_ends: ends.collect(), lengths: lengths.collect() };
        StepView { sequences: Arc::new(sequences), tables: tables.clone() }
    }

    /// Turns keys at the borders of what is seen towards queries: `[slots, kv_heads * qk]`.
    fn lure(&self, keys: &mut [f32], q: &[f32], shape: &Shape) {
        let Shape { heads, kv_heads, qk, .. } = *shape;
        let rows: Vec<_> = self.tokens().collect();
        let mut turn = |position: usize, row: usize| {
            for kv in 0..kv_heads {
                let query = &q[(row * heads + kv * (heads / kv_heads)) * qk..][..qk];
                let factor = 12.0 / (shape.scale * query.iter().map(|x| x * x).sum::<f32>());
                let key = &mut keys[(slot(rows[row].0, position) * kv_heads + kv) * qk..][..qk];
                key.iter_mut().zip(query).for_each(|(key, query)| *key = query * factor);
            }
        };
        let long = rows.iter().position(|&(s, _)| s == LONG).expect("it has a row");
        if let Some(window) = shape.window {
            let first_seen = rows[long].1 + 1 - window;
            turn(first_seen - 1, long);
            turn(first_seen, long);
        }
        // The last key of a chunk, for its first query.
        let chunk = rows.iter().position(|&(s, _)| s > LONG).expect("it has a row");
        turn(rows[rows.len() - 1].1, chunk);
    }

    /// `[rows, heads, v]`, by the definition.
    fn judge(&self, q: &[f32], keys: &[f32], values: &[f32], shape: &Shape) -> Vec<f32> {
        let Shape { heads, kv_heads, qk, v, scale, window } = *shape;
        let mut out = Vec::new();
        for (row, (s, position)) in self.tokens().enumerate() {
            let seen = window.map_or(0, |window| (position + 1).saturating_sub(window))..=position;
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let query = &q[(row * heads + head) * qk..][..qk];
                let score = |position: usize| {
                    let key = &keys[(slot(s, position) * kv_heads + kv) * qk..][..qk];
                    scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>()
                };
                let scores: Vec<f32> = seen.clone().map(score).collect();
                let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = scores.iter().map(|score| (score - largest).exp()).sum();
                let mut mixed = vec![0.0; v];
                for (position, score) in seen.clone().zip(&scores) {
                    let value = &values[(slot(s, position) * kv_heads + kv) * v..][..v];
                    let weight = (score - largest).exp() / sum;
                    mixed.iter_mut().zip(value).for_each(|(mixed, value)| *mixed += weight * value);
                }
                out.append(&mut mixed);
            }
        }
        out
    }

    fn try_full(
        &self,
        device: &mut Device,
        params: &AttentionParams,
        dtype: DataType,
        mask: &View,
    ) -> Result<Verdict, AscendError> {
        let AttentionParams { heads, kv_heads, head_dim, scale, window, .. } = *params;
        let window = window.map(|window| window.min(WINDOW));
        let shape = Shape { heads, kv_heads, qk: head_dim, v: head_dim, scale, window };
        let (rows, slots) = (self.rows(), BLOCKS * BLOCK);
        let q = rounded(uniform(1, rows * heads * head_dim, 1.0), dtype);
        let mut keys = uniform(2, slots * kv_heads * head_dim, 1.0);
        self.lure(&mut keys, &q, &shape);
        let keys = rounded(keys, dtype);
        let values = rounded(uniform(3, slots * kv_heads * head_dim, 1.0), dtype);
        let judged = self.judge(&q, &keys, &values, &shape);

        let (row, plane): (&[usize], &[usize]) = (&[rows, heads * head_dim], &[slots, kv_heads * head_dim]);
        let shapes = [(dtype, row), (dtype, plane), (dtype, plane), (dtype, row), (DataType::I32, TABLE_DIMS)];
        device.with_views(shapes, |device, [q_view, k_view, v_view, out, tables]| {
            upload(device, [(&q, &q_view), (&keys, &k_view), (&values, &v_view)], &tables)?;
            let params = AttentionParams { window, ..*params };
            attend(device, &q_view, [&k_view, &v_view], &self.view(&tables), mask, &params, &out)?;
            Ok(agree(&floats(device, &out)?, &judged, dtype))
        })
    }

    fn try_latent(
        &self,
        device: &mut Device,
        heads: usize,
        [rank, rope]: [usize; 2],
        dtype: DataType,
        mask: &View,
    ) -> Result<Verdict, AscendError> {
        let (rows, slots, qk) = (self.rows(), BLOCKS * BLOCK, rank + rope);
        let shape = Shape { heads, kv_heads: 1, qk, v: rank, scale: (qk as f32).sqrt().recip(), window: None };
        let q = rounded(uniform(1, rows * heads * qk, 1.0), dtype);
        let mut keys = uniform(2, slots * qk, 1.0);
        self.lure(&mut keys, &q, &shape);
        let keys = rounded(keys, dtype);
        let part = |all: &[f32], start: usize, width: usize| -> Vec<f32> {
            all.chunks_exact(qk).flat_map(|row| &row[start..start + width]).copied().collect()
        };
        let (latents, rope_keys) = (part(&keys, 0, rank), part(&keys, rank, rope));
        let by_row = self.judge(&q, &keys, &latents, &shape);
        let judged: Vec<f32> = (0..heads)
            .flat_map(|head| (0..rows).map(move |row| (row * heads + head) * rank))
            .flat_map(|start| &by_row[start..start + rank])
            .copied()
            .collect();

        let shapes: [(DataType, &[usize]); 6] = [
            (dtype, &[rows, heads, rank]),
            (dtype, &[rows, heads, rope]),
            (dtype, &[slots, rank]),
            (dtype, &[slots, rope]),
            (dtype, &[heads, rows, rank]),
            (DataType::I32, TABLE_DIMS),
        ];
        device.with_views(shapes, |device, [q_latent, q_rope, latent_view, rope_view, out, tables]| {
            let queries = [(&part(&q, 0, rank), &q_latent), (&part(&q, rank, rope), &q_rope)];
            upload(device, queries, &tables)?;
            upload(device, [(&latents, &latent_view), (&rope_keys, &rope_view)], &tables)?;
            let (queries, planes) = ([&q_latent, &q_rope], [&latent_view, &rope_view]);
            attend_latent(device, queries, planes, &self.view(&tables), mask, shape.scale, &out)?;
            Ok(agree(&floats(device, &out)?, &judged, dtype))
        })
    }
}

/// Heads and widths of one attention.
struct Shape {
    heads: usize,
    kv_heads: usize,
    qk: usize,
    v: usize,
    scale: f32,
    window: Option<usize>,
}

fn slot(sequence: usize, position: usize) -> usize {
    TABLES[sequence][position / BLOCK] as usize * BLOCK + position % BLOCK
}

fn upload<const N: usize>(
    device: &mut Device,
    floats: [(&Vec<f32>, &View); N],
    tables: &View,
) -> Result<(), AscendError> {
    device
        .upload(&TABLES.as_flattened().iter().flat_map(|block| block.to_le_bytes()).collect::<Vec<_>>(), tables.base)?;
    floats.into_iter().try_for_each(|(values, view)| device.upload(&encode(values, view.dtype), view.base))
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

    #[test]
    fn a_form_that_sees_a_key_too_many_or_too_few_is_told_from_the_right_one() {
        let (step, kv_heads, qk) = (Step::mixed(), 2, 32);
        let shape = Shape { heads: 4, kv_heads, qk, v: qk, scale: 0.2, window: Some(7) };
        let q = uniform(1, step.rows() * 4 * qk, 1.0);
        let mut keys = uniform(2, BLOCKS * BLOCK * kv_heads * qk, 1.0);
        step.lure(&mut keys, &q, &shape);
        let values = uniform(3, keys.len(), 1.0);
        let right = step.judge(&q, &keys, &values, &shape);
        for window in [None, Some(6), Some(8)] {
            let other = step.judge(&q, &keys, &values, &Shape { window, ..shape });
            assert!(agree(&other, &right, DataType::BF16).is_err(), "{window:?}");
        }
    }
}
