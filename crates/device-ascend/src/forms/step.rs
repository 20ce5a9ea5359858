//! The step on which forms of attention are tried, and its judge.

use baton_device::AttentionParams;
use baton_device::conformance::uniform;

use super::Verdict;
use super::trial::{agree, floats};
use crate::backend::BLOCK;
use crate::device::{Device, encode, rounded};
use crate::error::AscendError;
use crate::object::{DataType, View};
use crate::ops::fused_attention::{Sequences, StepView, attend, attend_latent};

/// A step on a small cache, and its judge. Blocks are out of order, unused ones hold numbers too, and keys that a query
/// must not see are those that it would attend to most.
pub(super) struct Step {
    /// Positions before the step, and its tokens.
    spans: [(usize, usize); 3],
}

/// Blocks of each sequence, and how many there are in all.
const TABLES: [[i32; 2]; 3] = [[3, 0], [0, 2], [1, 0]];
const BLOCKS: usize = 5;
const TABLE_DIMS: &[usize] = &[TABLES.len(), TABLES[0].len()];
/// A window is tried at this length at most, so that contexts are longer.
const WINDOW: usize = 40;
/// The sequence whose context is longer than a block.
const LONG: usize = 1;

impl Step {
    /// A prompt, a decode step and a chunk behind a prefix.
    pub(super) fn mixed() -> Self {
        Self { spans: [(0, 5), (130, 1), (60, 3)] }
    }

    pub(super) fn decode() -> Self {
        Self { spans: [(4, 1), (130, 1), (62, 1)] }
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
        StepView { sequences, tables: tables.clone() }
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

    pub(super) fn try_full(
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

    pub(super) fn try_latent(
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
