//! Operations that do what others do one after the other: products behind a gate, and heads normed and rotated on their way to
//! attention.

use super::inputs::{Source, activation, on_grid};
use super::steps::{MAX_POSITIONS, over_steps};
use super::{Case, outputs};
use crate::{
    Activation, AttentionParams, Backend, BlockFormat, Code, DType, HostLatent, HostLinear, HostRope, KvDtype,
    LatentOps, LayerKv, Purpose, Result, RopeLayout, Rotary, WeightFormat,
};

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use WeightFormat::{BF16, Coded, F16, F32, Ggml};
    let (q4_0, q4_k, q8_0) = (Ggml(BlockFormat::Q4_0), Ggml(BlockFormat::Q4_K), Ggml(BlockFormat::Q8_0));
    let gated = [
        (1, 7, 5, [BF16; 2]),
        (8, 300, 65, [F16; 2]),
        (5, 33, 17, [F32; 2]),
        (2, 160, 33, [q4_0; 2]),
        (1, 96, 129, [q8_0; 2]),
        (8, 512, 40, [q4_k; 2]),
        (3, 64, 40, [q8_0, q4_0]),
        (19, 96, 17, [BF16; 2]),
        (3, 2056, 33, [BF16; 2]),
        (8, 300, 33, [Coded(Code::E4M3); 2]),
    ];
    let codes = Code::ALL.map(|code| (5, 192, 17, [Coded(code); 2]));
    let blocks = BlockFormat::ALL.map(|block| (3, 2 * block.elements(), 17, [Ggml(block); 2]));
    let gated = codes.into_iter().chain(blocks).chain(gated).enumerate().map(
        |(i, (rows, in_features, out_features, formats))| {
            let activation = if i % 3 == 1 { Activation::GeluTanh } else { Activation::Silu };
            Case::Gated { rows, in_features, out_features, formats, activation, bias: rows % 2 == 1 }
        },
    );
    let rotary = KvDtype::ALL.into_iter().flat_map(|kv| {
        // Heads, their width, and which of its columns are rotated.
        let shapes = [
            (7, 1, 64, 0, 64, true, false),
            (2, 2, 80, 16, 48, false, false),
            (3, 1, 33, 5, 20, true, true),
            (4, 2, 32, 0, 32, false, true),
        ];
        shapes.map(|(heads, kv_heads, head_dim, offset, dim, interleaved, normed)| {
            let scale = (head_dim as f32).sqrt().recip();
            let params = AttentionParams { heads, kv_heads, head_dim, scale, window: None, softcap: None };
            Case::Rotary { params, offset, dim, interleaved, normed, kv }
        })
    });
    let latent =
        KvDtype::ALL.into_iter().flat_map(|kv| [true, false].map(|interleaved| Case::RotaryLatent { interleaved, kv }));
    gated.chain(rotary).chain(latent).collect()
}

/// Runs a [`Case::Gated`].
pub(super) fn gated<B: Backend>(case: &Case, b: &B) -> Result<Vec<f32>> {
    let &Case::Gated { rows, in_features, out_features, formats, activation, bias } = case else {
        unreachable!("{case:?}")
    };
    let weight = |i: usize| {
        let (format, seed) = (formats[i], 10 * i as u64 + 10);
        let weight = Source::new(format, vec![out_features, in_features], seed, (in_features as f32).sqrt().recip());
        let bias = bias.then(|| Source::new(WeightFormat::F32, vec![out_features], seed + 1, 1.0));
        let (bias, purpose) = (bias.as_ref().map(Source::tensor), Purpose::Product);
        b.linear_weight(&HostLinear { weight: weight.tensor(), bias, format, purpose })
    };
    let (gate, up) = (weight(0)?, weight(1)?);
    let x = on_grid(b, rows, in_features, 3)?;
    let room = || b.tensor(rows, out_features);
    let (mut gate_out, mut up_out, mut out) = (room()?, room()?, room()?);
    b.gated_linear(activation, &x, [(&gate, &mut gate_out), (&up, &mut up_out)], &mut out)?;
    outputs(b, &[&out])
}

/// The norm of heads so wide.
fn norm<B: Backend>(b: &B, width: usize, seed: u64) -> Result<B::Vector> {
    b.vector(&Source::new(WeightFormat::F32, vec![width], seed, 1.5).tensor())
}

/// Angles of so many columns.
fn table<B: Backend>(b: &B, dim: usize) -> Result<B::Rope> {
    let inv_freq = (0..dim / 2).map(|i| 0.7_f32.powi(i as i32)).collect();
    b.rope_table(&HostRope { inv_freq, scale: 1.25, max_positions: MAX_POSITIONS })
}

/// Runs a [`Case::Rotary`].
pub(super) fn rotary<B: Backend>(case: &Case, b: &B, inputs: DType) -> Result<Vec<f32>> {
    let &Case::Rotary { params, offset, dim, interleaved, normed, kv } = case else { unreachable!("{case:?}") };
    let AttentionParams { heads, kv_heads, head_dim, .. } = params;
    let (norms, table) = ([norm(b, head_dim, 1)?, norm(b, head_dim, 2)?], table(b, dim)?);
    let rotary = Rotary {
        norms: norms.each_ref().map(|norm| normed.then_some(norm)),
        eps: 1e-5,
        layouts: [heads, kv_heads].map(|heads| RopeLayout { heads, head_dim, offset, dim, interleaved }),
        table: &table,
    };
    over_steps(b, (LayerKv::Full { kv_heads, head_dim }, kv), 0, |cache, plan, rows, seed| {
        let heads_of = |heads: usize, seed: u64| activation(b, inputs, rows, heads * head_dim, seed);
        let (mut q, mut k) = (heads_of(heads, seed)?, heads_of(kv_heads, seed + 1)?);
        let v = heads_of(kv_heads, seed + 2)?;
        let mut out = b.tensor(rows, heads * head_dim)?;
        b.rotary_attention(&mut q, &mut k, &v, &rotary, cache, 1, plan, &params, &mut out)?;
        outputs(b, &[&out])
    })
}

/// Runs a [`Case::RotaryLatent`].
pub(super) fn rotary_latent<B: LatentOps>(
    (interleaved, kv): (bool, KvDtype),
    b: &B,
    inputs: DType,
) -> Result<Vec<f32>> {
    let (heads, nope, rope, v, rank, format) = (6, 32, 16, 32, 64, WeightFormat::F32);
    let kv_b = Source::new(format, vec![heads * (nope + v), rank], 1, (rank as f32).sqrt().recip());
    let weight = b.latent_weight(&HostLatent { kv_b: kv_b.tensor(), heads, nope, rope, v, rank, format })?;
    let (norm, table) = (norm(b, rank, 2)?, table(b, rope)?);
    let layout = RopeLayout { heads, head_dim: nope + rope, offset: nope, dim: rope, interleaved };
    let rotary = Rotary {
        norms: [None, Some(&norm)],
        eps: 1e-6,
        layouts: [layout, RopeLayout { heads: 1, head_dim: rope, offset: 0, ..layout }],
        table: &table,
    };
    let scale = ((nope + rope) as f32).sqrt().recip();
    over_steps(b, (LayerKv::Latent { rank, rope, index: None }, kv), 0, |cache, plan, rows, seed| {
        let mut q = activation(b, inputs, rows, heads * (nope + rope), seed)?;
        let mut latent = activation(b, inputs, rows, rank, seed + 1)?;
        let mut key = activation(b, inputs, rows, rope, seed + 2)?;
        let mut out = b.tensor(rows, heads * v)?;
        b.rotary_latent_attention(&mut q, &mut latent, &mut key, &rotary, &weight, cache, 1, plan, scale, &mut out)?;
        outputs(b, &[&out])
    })
}
