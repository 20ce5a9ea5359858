//! The list of cases that every backend must pass, judged by [`Reference`](crate::Reference).
//!
//! A case is data (shapes, formats, tolerance), not code: add one to [`cases()`]. Sizes are odd on
//! purpose: tails of vectors, panels and blocks are where kernels break. Inputs come from a counter
//! hash, so a case means the same numbers on every machine. What ranks do together is [`ranks()`].

mod choose;
mod codes;
mod compressed;
mod fused;
mod indexed;
mod inputs;
mod judge;
mod list;
mod moe;
mod name;
mod ranks;
mod steps;
mod tolerance;
mod vectors;

pub use codes::Layout;
pub use compressed::Pooled;
pub use vectors::{MAGIC, Vector, Vectors, VectorsError, name};

use inputs::{Source, activation, on_grid};
pub use inputs::{random_blocks, uniform};
pub use judge::{Judge, Outcome, run};
pub use list::cases;
pub use ranks::ranks;
pub use steps::passing_table;
use steps::{MAX_POSITIONS, Ragged, over_steps};

use crate::{
    Activation, AttentionParams, Backend, BlockFormat, CompressedOps, DType, GroupScore, HostLatent, HostLinear,
    HostRope, KvDtype, LatentOps, LayerKv, Op, Purpose, Requirements, Result, RopeLayout, Rows, TokenIds, WeightFormat,
};

/// What a backend must offer to run the whole list.
pub trait Full: Backend + LatentOps + CompressedOps {}
impl<B: Backend + LatentOps + CompressedOps> Full for B {}

/// One operation at one size.
#[derive(Debug, Clone, PartialEq)]
pub enum Case {
    /// [`Backend::linear`] and [`Backend::embed`].
    Linear {
        /// Rows of the activation.
        rows: usize,
        /// K.
        in_features: usize,
        /// N.
        out_features: usize,
        /// Kept as.
        format: WeightFormat,
        /// With a bias.
        bias: bool,
    },
    /// [`Backend::linear_group`].
    Group {
        /// Rows of the activation.
        rows: usize,
        /// K.
        in_features: usize,
        /// N of each weight, and as what it is kept.
        weights: Vec<(usize, WeightFormat)>,
    },
    /// [`Backend::linear`] and [`Backend::embed`] with blocks made of bf16 at load.
    Made {
        /// Rows of the activation.
        rows: usize,
        /// K.
        in_features: usize,
        /// N.
        out_features: usize,
        /// Kept as.
        block: BlockFormat,
    },
    /// As `Linear`, with codes under scales of any layout.
    Coded {
        /// Rows of the activation.
        rows: usize,
        /// K.
        in_features: usize,
        /// N.
        out_features: usize,
        /// How the codes lie.
        layout: Layout,
        /// With a bias.
        bias: bool,
    },
    /// [`Backend::gated_linear`].
    Gated {
        /// Rows of the activation.
        rows: usize,
        /// K.
        in_features: usize,
        /// N.
        out_features: usize,
        /// As what gate and up are kept.
        formats: [WeightFormat; 2],
        /// Of the gate.
        activation: Activation,
        /// Both with a bias.
        bias: bool,
    },
    /// [`Backend::rms_norm`], in place and with residual.
    Norm {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
        /// Columns per norm; divides `cols`.
        run: usize,
    },
    /// [`Backend::gated_activation`], [`Backend::add`], [`Backend::scale`], [`Backend::softcap`],
    /// [`Backend::gather_rows`] and [`Backend::add_rows`].
    Elementwise {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// [`Backend::choose`], and [`Backend::embed`] of what was chosen.
    Choose {
        /// Width of the logits.
        cols: usize,
        /// Whether many of them are equal.
        ties: bool,
    },
    /// [`Backend::rope`].
    Rope(RopeLayout),
    /// [`Backend::paged_attention`] over several steps of a ragged batch.
    Attention {
        /// Its shape.
        params: AttentionParams,
        /// How keys and values are kept.
        kv: KvDtype,
        /// Positions that the longest sequence has more than usual.
        history: usize,
    },
    /// [`Backend::rotary_attention`] over several steps of a ragged batch.
    Rotary {
        /// Its shape.
        params: AttentionParams,
        /// First rotated column within a head.
        offset: usize,
        /// Rotated columns.
        dim: usize,
        /// Which columns are pairs.
        interleaved: bool,
        /// With norms of queries and keys.
        normed: bool,
        /// How keys and values are kept.
        kv: KvDtype,
    },
    /// [`LatentOps::rotary_latent_attention`] over several steps of a ragged batch, of one shape.
    RotaryLatent {
        /// Which columns are pairs.
        interleaved: bool,
        /// How latents and rotated keys are kept.
        kv: KvDtype,
    },
    /// [`LatentOps::indexed_attention`] over several steps of a ragged batch, behind [`LatentOps::layer_norm_in_place`].
    Indexed {
        /// Heads of the indexer.
        heads: usize,
        /// Width of its heads.
        width: usize,
        /// Positions that are read.
        top_k: usize,
        /// How the cache keeps them.
        kv: KvDtype,
        /// Positions that the last sequence has more than the others.
        history: usize,
    },
    /// [`CompressedOps::pool`] and [`CompressedOps::windowed_attention`] over several steps of a ragged batch.
    Windowed {
        /// Heads.
        heads: usize,
        /// Width of a head, of a vector and of an entry, at least 4.
        width: usize,
        /// Positions that a token sees.
        window: usize,
        /// What it reads beside them.
        pooled: Pooled,
        /// How the cache keeps them.
        kv: KvDtype,
        /// Positions that the last sequence has more than the others.
        history: usize,
    },
    /// [`CompressedOps::grouped_linear`] and [`CompressedOps::clamp`].
    Grouped {
        /// Rows.
        rows: usize,
        /// Weights.
        groups: usize,
        /// K of each.
        in_features: usize,
        /// N of each.
        out_features: usize,
        /// Kept as.
        format: WeightFormat,
    },
    /// The operations of [`CompressedOps`] on residual streams.
    Streams {
        /// Rows.
        rows: usize,
        /// Streams.
        streams: usize,
        /// Width of each.
        hidden: usize,
    },
    /// [`LatentOps::latent_attention`] over several steps of a ragged batch.
    Latent {
        /// Heads.
        heads: usize,
        /// Width without position.
        nope: usize,
        /// Width with position.
        rope: usize,
        /// Value width.
        v: usize,
        /// Latent width.
        rank: usize,
        /// Kept as.
        format: WeightFormat,
        /// How latents and rotated keys are kept.
        kv: KvDtype,
        /// Positions that the longest sequence has more than usual.
        history: usize,
    },
    /// [`crate::MoeOps::fused_moe`].
    Moe {
        /// Rows.
        rows: usize,
        /// Width of the residual stream.
        hidden: usize,
        /// Width of an expert.
        intermediate: usize,
        /// Number of experts.
        experts: usize,
        /// Kept as.
        format: WeightFormat,
        /// Scores of its four groups; `None` for softmax routing without groups.
        groups: Option<GroupScore>,
    },
    /// [`crate::MoeOps::fused_moe`] or [`CompressedOps::fused_moe_by_token`] of experts with a limit.
    BoundedMoe {
        /// Rows.
        rows: usize,
        /// Width of the residual stream.
        hidden: usize,
        /// Width of an expert.
        intermediate: usize,
        /// Number of experts.
        experts: usize,
        /// Kept as.
        format: WeightFormat,
        /// Whether tokens choose, and not scores.
        by_token: bool,
    },
}

impl Case {
    /// What a device must offer for the case; one that does not is refused such models, so it need not pass.
    pub fn needs(&self) -> Requirements {
        let none = Requirements::default();
        match *self {
            Case::Group { ref weights, .. } => {
                Requirements { weight_formats: weights.iter().map(|(_, format)| *format).collect(), ..none }
            }
            Case::Gated { formats, .. } => Requirements { weight_formats: formats.into(), ..none },
            Case::Made { block, .. } => Requirements { weight_formats: [WeightFormat::Ggml(block)].into(), ..none },
            Case::Linear { format, .. } => Requirements { weight_formats: [format].into(), ..none },
            Case::Coded { layout, .. } => {
                Requirements { weight_formats: [WeightFormat::Coded(layout.code)].into(), ..none }
            }
            Case::Norm { .. } | Case::Elementwise { .. } | Case::Rope(_) => none,
            Case::Choose { .. } => Requirements { weight_formats: [WeightFormat::F32].into(), ..none },
            Case::Attention { kv, .. } | Case::Rotary { kv, .. } => {
                Requirements { ops: [Op::PagedAttention].into(), kv_dtypes: [kv].into(), ..none }
            }
            Case::RotaryLatent { kv, .. } => Requirements {
                ops: [Op::LatentAttention].into(),
                weight_formats: [WeightFormat::F32].into(),
                kv_dtypes: [kv].into(),
            },
            Case::Indexed { kv, .. } => Requirements {
                ops: [Op::LatentAttention, Op::IndexedAttention].into(),
                weight_formats: [WeightFormat::F32].into(),
                kv_dtypes: [kv].into(),
            },
            Case::Latent { format, kv, .. } => Requirements {
                ops: [Op::LatentAttention].into(),
                weight_formats: [format].into(),
                kv_dtypes: [kv].into(),
            },
            Case::Windowed { kv, .. } => {
                Requirements { ops: [Op::CompressedAttention].into(), kv_dtypes: [kv].into(), ..none }
            }
            Case::Grouped { format, .. } => {
                Requirements { ops: [Op::CompressedAttention].into(), weight_formats: [format].into(), ..none }
            }
            Case::Streams { .. } => Requirements { ops: [Op::CompressedAttention].into(), ..none },
            Case::BoundedMoe { format, .. } => Requirements {
                ops: [Op::FusedMoe, Op::CompressedAttention].into(),
                weight_formats: [format].into(),
                ..none
            },
            Case::Moe { format, .. } => {
                Requirements { ops: [Op::FusedMoe].into(), weight_formats: [format].into(), ..none }
            }
        }
    }
}

/// The numbers that one backend computes for a case with inputs that `inputs` holds, all outputs one after the other.
pub fn evaluate<B: Full>(case: &Case, b: &B, inputs: DType) -> Result<Vec<f32>> {
    let activation = |rows: usize, cols: usize, seed: u64| activation(b, inputs, rows, cols, seed);
    match *case {
        Case::Group { rows, in_features, ref weights } => {
            let scale = (in_features as f32).sqrt().recip();
            let (mut linears, mut outs) = (Vec::new(), Vec::new());
            for (seed, &(out_features, format)) in (10..).zip(weights) {
                let weight = Source::new(format, vec![out_features, in_features], seed, scale);
                let (weight, purpose) = (weight.tensor(), Purpose::Product);
                linears.push(b.linear_weight(&HostLinear { weight, bias: None, format, purpose })?);
                outs.push(b.tensor(rows, out_features)?);
            }
            let x = on_grid(b, rows, in_features, 3)?;
            b.linear_group(&x, &mut linears.iter().zip(&mut outs).collect::<Vec<_>>())?;
            outputs(b, &outs.iter().collect::<Vec<_>>())
        }
        Case::Gated { .. } => fused::gated(case, b),
        Case::Coded { .. } => codes::coded(case, b, inputs),
        Case::Rotary { .. } => fused::rotary(case, b, inputs),
        Case::RotaryLatent { interleaved, kv } => fused::rotary_latent((interleaved, kv), b, inputs),
        Case::Indexed { .. } => indexed::attention(case, b, inputs),
        Case::Windowed { .. } => compressed::windowed(case, b, inputs),
        Case::Grouped { .. } => compressed::grouped(case, b, inputs),
        Case::Streams { .. } => compressed::streams(case, b, inputs),
        Case::Made { rows, in_features, out_features, block } => {
            let shape = vec![out_features, in_features];
            let weight = Source::new(WeightFormat::BF16, shape, 1, (in_features as f32).sqrt().recip());
            linear(b, (&weight, None, WeightFormat::Ggml(block)), rows, inputs)
        }
        Case::Linear { rows, in_features, out_features, format, bias } => {
            let weight = Source::new(format, vec![out_features, in_features], 1, (in_features as f32).sqrt().recip());
            let bias = bias.then(|| Source::new(WeightFormat::F32, vec![out_features], 2, 1.0));
            linear(b, (&weight, bias.as_ref(), format), rows, inputs)
        }
        Case::Norm { rows, cols, run } => {
            let weight = b.vector(&Source::new(WeightFormat::F32, vec![run], 1, 1.0).tensor())?;
            let mut x = activation(rows, cols, 2)?;
            let mut residual = activation(rows, cols, 3)?;
            let (mut y, mut z) = (b.tensor(rows, cols)?, b.tensor(rows, cols)?);
            b.rms_norm(&x, &weight, 1e-6, &mut y)?;
            b.add_rms_norm(&x, &mut residual, &weight, 1e-5, &mut z)?;
            b.rms_norm_in_place(&mut x, &weight, 1e-6)?;
            outputs(b, &[&x, &y, &z, &residual])
        }
        Case::Elementwise { rows, cols } => {
            let mut gate = activation(rows, cols, 1)?;
            let up = activation(rows, cols, 2)?;
            let (mut silu, mut gelu, mut picked) = (b.tensor(rows, cols)?, b.tensor(rows, cols)?, b.tensor(2, cols)?);
            b.gated_activation(Activation::Silu, &gate, &up, &mut silu)?;
            b.gated_activation(Activation::GeluTanh, &gate, &up, &mut gelu)?;
            b.gather_rows(&silu, &[rows as u32 - 1, 0], &mut picked)?;
            b.add(&mut gate, &up)?;
            let mut capped = activation(rows, cols, 3)?;
            b.scale(&mut capped, 1.7)?;
            let mut scaled = b.tensor(rows, cols)?;
            b.gather_rows(&capped, &(0..rows as u32).collect::<Vec<_>>(), &mut scaled)?;
            b.softcap(&mut capped, 0.9)?;
            let every_other: Vec<u32> = (0..rows as u32).rev().step_by(2).collect();
            let (mut some, mut added) = (b.tensor(rows, cols)?, activation(rows, cols, 4)?);
            b.gather_rows(&up, &every_other, &mut some)?;
            b.add_rows(&some, &every_other, &mut added)?;
            outputs(b, &[&silu, &gelu, &gate, &picked, &scaled, &capped, &added])
        }
        Case::Choose { cols, ties } => choose::evaluate(b, inputs, cols, ties),
        Case::Rope(layout) => {
            let inv_freq = (0..layout.dim / 2).map(|i| 0.7_f32.powi(i as i32)).collect();
            let table = b.rope_table(&HostRope { inv_freq, scale: 1.25, max_positions: MAX_POSITIONS })?;
            let mut result = Vec::new();
            for step in Ragged::new(b.caps().kv_block_size, 0, None).steps() {
                let mut x = activation(step.num_tokens(), layout.heads * layout.head_dim, 1)?;
                b.rope(&mut x, layout, &table, &step.plan(b)?)?;
                result.extend(outputs(b, &[&x])?);
            }
            Ok(result)
        }
        Case::Attention { params, kv, history } => {
            let AttentionParams { heads, kv_heads, head_dim, .. } = params;
            over_steps(b, (LayerKv::Full { kv_heads, head_dim }, kv), history, |cache, plan, rows, seed| {
                let q = activation(rows, heads * head_dim, seed)?;
                let k = activation(rows, kv_heads * head_dim, seed + 1)?;
                let v = activation(rows, kv_heads * head_dim, seed + 2)?;
                let mut out = b.tensor(rows, heads * head_dim)?;
                b.paged_attention(&q, &k, &v, cache, 1, plan, &params, &mut out)?;
                outputs(b, &[&out])
            })
        }
        Case::Latent { heads, nope, rope, v, rank, format, kv, history } => {
            let kv_b = Source::new(format, vec![heads * (nope + v), rank], 1, (rank as f32).sqrt().recip());
            let weight = b.latent_weight(&HostLatent { kv_b: kv_b.tensor(), heads, nope, rope, v, rank, format })?;
            let scale = ((nope + rope) as f32).sqrt().recip();
            over_steps(b, (LayerKv::Latent { rank, rope, index: None }, kv), history, |cache, plan, rows, seed| {
                let q = activation(rows, heads * (nope + rope), seed)?;
                let latent = activation(rows, rank, seed + 1)?;
                let key = activation(rows, rope, seed + 2)?;
                let mut out = b.tensor(rows, heads * v)?;
                b.latent_attention(&q, &latent, &key, &weight, cache, 1, plan, scale, &mut out)?;
                outputs(b, &[&out])
            })
        }
        Case::Moe { .. } | Case::BoundedMoe { .. } => moe::evaluate(case, b, inputs),
    }
}

/// A product with a matrix kept in a format, and some of its rows. Without a bias both are asked of one weight, as of an
/// embedding that is the head too; a layer with a bias has a weight of its own.
fn linear<B: Backend>(
    b: &B,
    (weight, bias, format): (&Source, Option<&Source>, WeightFormat),
    rows: usize,
    inputs: DType,
) -> Result<Vec<f32>> {
    let &[out_features, in_features] = weight.shape.as_slice() else { unreachable!("a matrix") };
    let keep = |purpose| {
        b.linear_weight(&HostLinear { weight: weight.tensor(), bias: bias.map(Source::tensor), format, purpose })
    };
    let table = keep(Purpose::Table)?;
    let layer = bias.is_some().then(|| keep(Purpose::Product)).transpose()?;
    let x = match format {
        WeightFormat::Ggml(_) | WeightFormat::Coded(_) | WeightFormat::BF16 => on_grid(b, rows, in_features, 3)?,
        WeightFormat::F32 | WeightFormat::F16 => activation(b, inputs, rows, in_features, 3)?,
    };
    let mut y = b.tensor(rows, out_features)?;
    b.linear(&x, layer.as_ref().unwrap_or(&table), &mut y)?;
    let ids: Vec<u32> = (0..rows).map(|r| (r * 7 % out_features) as u32).collect();
    let mut embedded = b.tensor(rows, in_features)?;
    b.embed(TokenIds::Known(&ids), &table, &mut embedded)?;
    outputs(b, &[&y, &embedded])
}

fn outputs<B: Backend>(b: &B, tensors: &[&B::Tensor]) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    let mut one = Vec::new();
    for t in tensors {
        b.read(t, &mut one)?;
        assert_eq!(one.len(), t.rows() * t.cols());
        all.append(&mut one);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reference;

    #[test]
    fn the_judge_agrees_with_itself_and_says_something() {
        for case in cases() {
            let outcome = run(&case, &Reference::new()).unwrap();
            assert!(outcome.passed(), "{case:?}");
            assert!(outcome.expected.iter().any(|v| *v != 0.0), "{case:?} computes only zeros");
        }
    }

    #[test]
    fn a_wrong_number_fails_a_case() {
        let mut outcome = run(&cases()[3], &Reference::new()).unwrap();
        outcome.actual[0] += 1e-3;
        assert!(!outcome.passed());
        outcome.actual[0] = f32::NAN;
        assert!(!outcome.passed());
    }
}
