//! Latent attention, to all positions or to those that an indexer chooses.

use super::{AttentionPlan, KvCache, Linear, Plane, Reference, Tensor, dot, softmax, weighted_sum, write_slots};
use crate::{HostLatent, Indexer, LatentOps, Result, Rows};

/// Per head: key rows `[nope, rank]` and value rows `[v, rank]`.
pub struct Latent {
    shape: (usize, usize, usize),
    heads: Vec<[Linear; 2]>,
}

impl LatentOps for Reference {
    type Latent = Latent;

    fn latent_weight(&self, src: &HostLatent<'_>) -> Result<Latent> {
        let HostLatent { kv_b, heads, nope, rope, v, rank, format } = src;
        kv_b.expect_shape(&[heads * (nope + v), *rank])?;
        let head = |h: usize| {
            let start = h * (nope + v);
            let key = Linear::new(&kv_b.rows(start, *nope), None, *format)?;
            Ok([key, Linear::new(&kv_b.rows(start + nope, *v), None, *format)?])
        };
        Ok(Latent { shape: (*nope, *rope, *v), heads: (0..*heads).map(head).collect::<Result<_>>()? })
    }

    fn latent_attention(
        &self,
        q: &Tensor,
        latent: &Tensor,
        rope_key: &Tensor,
        weight: &Latent,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        let [latents, rope_keys] = &mut cache.layers[layer][..] else { panic!("layer {layer} caches latents alone") };
        write_slots(latents, latent, plan);
        write_slots(rope_keys, rope_key, plan);
        attend(q, weight, [latents, rope_keys], &plan.rows, scale, out);
        Ok(())
    }

    fn layer_norm_in_place(&self, x: &mut Tensor, [weight, bias]: [&Vec<f32>; 2], eps: f32) -> Result<()> {
        for row in x.data.chunks_exact_mut(weight.len()) {
            let mean = row.iter().sum::<f32>() / row.len() as f32;
            row.iter_mut().for_each(|x| *x -= mean);
            let inverse = 1.0 / (dot(row, row) / row.len() as f32 + eps).sqrt();
            for (x, (weight, bias)) in row.iter_mut().zip(weight.iter().zip(bias)) {
                *x = *x * inverse * weight + bias;
            }
        }
        Ok(())
    }

    fn indexed_attention(
        &self,
        q: &Tensor,
        latent: &Tensor,
        rope_key: &Tensor,
        indexer: &Indexer<'_, Self>,
        weight: &Latent,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        let [latents, rope_keys, index_keys] = &mut cache.layers[layer][..] else {
            panic!("layer {layer} has no indexer")
        };
        write_slots(latents, latent, plan);
        write_slots(rope_keys, rope_key, plan);
        write_slots(index_keys, indexer.k, plan);
        let of_row = |row: usize| {
            let queries = (indexer.q.row(row), indexer.weights.row(row));
            chosen(queries, indexer.top_k, index_keys, &plan.rows[row])
        };
        let chosen = (0..plan.rows.len()).map(of_row).collect::<Vec<_>>();
        attend(q, weight, [latents, rope_keys], &chosen, scale, out);
        Ok(())
    }
}

/// Of a row's slots, in the order of their positions, those that an indexer chooses by its queries and weights.
pub(super) fn chosen((q, weights): (&[f32], &[f32]), top_k: usize, keys: &Plane, context: &[usize]) -> Vec<usize> {
    let score = |&slot: &usize| -> f32 {
        let heads = q.chunks_exact(q.len() / weights.len()).zip(weights);
        let sum: f32 = heads.map(|(q, weight)| weight * dot(q, keys.slot(slot)).max(0.0)).sum();
        sum + 0.0 // no zero is below another
    };
    let scores: Vec<f32> = context.iter().map(score).collect();
    let mut positions: Vec<usize> = (0..context.len()).collect();
    // Stable: of equals the earlier goes first.
    positions.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    positions.truncate(top_k);
    positions.sort_unstable();
    positions.into_iter().map(|position| context[position]).collect()
}

/// Every row and head over the latents and rotated keys in its slots.
fn attend(
    q: &Tensor,
    weight: &Latent,
    [latents, rope_keys]: [&Plane; 2],
    contexts: &[Vec<usize>],
    scale: f32,
    out: &mut Tensor,
) {
    let (nope, rope, v) = weight.shape;
    out.set_rows(q.rows());
    for (row, context) in contexts.iter().enumerate() {
        for (head, [keys, values]) in weight.heads.iter().enumerate() {
            let query = &q.row(row)[head * (nope + rope)..][..nope + rope];
            let mut absorbed = vec![0.0; latents.width];
            weighted_sum(&query[..nope], (0..nope).map(|i| keys.row(i)), &mut absorbed);
            let score = |s: usize| dot(&absorbed, latents.slot(s)) + dot(&query[nope..], rope_keys.slot(s));
            let mut scores: Vec<f32> = context.iter().map(|&s| scale * score(s)).collect();
            softmax(&mut scores);
            let mut mixed = vec![0.0; latents.width];
            weighted_sum(&scores, context.iter().map(|&s| latents.slot(s)), &mut mixed);
            values.apply(&mixed, &mut out.row_mut(row)[head * v..][..v]);
        }
    }
}
