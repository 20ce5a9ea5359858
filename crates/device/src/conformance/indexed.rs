//! Attention to the positions that an indexer chooses.
//!
//! A choice is right or wrong, and a wrong one shows: inputs come from hashes, so no scores but zeros are as near to each other as
//! sums in another order are, but for what a cache rounds to the other side.

use super::inputs::{Source, activation, uniform};
use super::steps::{LONG, over_steps};
use super::{Case, outputs};
use crate::{DType, HostLatent, HostTensor, Indexer, KvDtype, LatentOps, LayerKv, Result, WeightFormat};

/// The cases of this file: fewer positions than a step, than a block; as many as a block; more than some contexts; more than all.
pub(super) fn cases() -> Vec<Case> {
    let shapes = [(1, 5, 1), (3, 16, 7), (5, 24, 16), (16, 32, 33), (2, 128, 1 << 20)];
    let short = KvDtype::ALL
        .into_iter()
        .flat_map(|kv| shapes.map(|(heads, width, top_k)| Case::Indexed { heads, width, top_k, kv, history: 0 }));
    let long = [(4, 20, 90), (4, 20, 700)];
    let long = long.map(|(heads, width, top_k)| Case::Indexed { heads, width, top_k, kv: KvDtype::F32, history: LONG });
    short.chain(long).collect()
}

/// Runs one of them. The indexer's queries, keys and weights are normed, so that its scores have zeros of all heads among them.
pub(super) fn attention<B: LatentOps>(case: &Case, b: &B, inputs: DType) -> Result<Vec<f32>> {
    let &Case::Indexed { heads: index_heads, width, top_k, kv, history } = case else { unreachable!("{case:?}") };
    let (heads, nope, rope, v, rank, format) = (3, 8, 4, 8, 20, WeightFormat::F32);
    let kv_b = Source::new(format, vec![heads * (nope + v), rank], 1, (rank as f32).sqrt().recip());
    let weight = b.latent_weight(&HostLatent { kv_b: kv_b.tensor(), heads, nope, rope, v, rank, format })?;
    let vector = |seed| {
        let bytes: Vec<u8> = uniform(seed, width, 1.0).iter().flat_map(|x| x.to_le_bytes()).collect();
        b.vector(&HostTensor::new("case", DType::F32, vec![width], &bytes))
    };
    let norm = [vector(2)?, vector(3)?];
    over_steps(b, (LayerKv::Latent { rank, rope, index: Some(width) }, kv), history, |cache, plan, rows, seed| {
        let activation = |cols: usize, n: u64| activation(b, inputs, rows, cols, seed + n);
        let (q, latent, key) = (activation(heads * (nope + rope), 0)?, activation(rank, 1)?, activation(rope, 2)?);
        let (index_q, weights) = (activation(index_heads * width, 3)?, activation(index_heads, 4)?);
        let mut index_k = activation(width, 5)?;
        b.layer_norm_in_place(&mut index_k, norm.each_ref(), 1e-6)?;
        let indexer = Indexer { q: &index_q, k: &index_k, weights: &weights, top_k };
        let mut out = b.tensor(rows, heads * v)?;
        b.indexed_attention(&q, &latent, &key, &indexer, &weight, cache, 1, plan, 0.3, &mut out)?;
        outputs(b, &[&index_k, &out])
    })
}
