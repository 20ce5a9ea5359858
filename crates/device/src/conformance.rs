//! The list of cases that every backend must pass, judged by [`Reference`](crate::Reference).
//!
//! A case is data (shapes, formats, tolerance), not code: add one to [`cases`]. Sizes are odd on
//! purpose: tails of vectors, panels and blocks are where kernels break. Inputs come from a counter
//! hash, so a case means the same numbers on every machine. What ranks do together is [`ranks()`].

mod choose;
mod codes;
mod compressed;
mod fused;
mod indexed;
mod inputs;
mod judge;
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
pub use ranks::ranks;
pub use steps::passing_table;
use steps::{LONG, MAX_POSITIONS, Ragged, over_steps};

use crate::{
    Activation, AttentionParams, Backend, BlockFormat, Code, CompressedOps, DType, GroupScore, HostLatent, HostLinear,
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

/// All cases.
pub fn cases() -> Vec<Case> {
    use WeightFormat::{BF16, F16, F32};
    let mut cases = Vec::new();
    for format in [F32, F16, BF16] {
        for (rows, in_features, out_features) in [
            (1, 1, 1),
            (1, 7, 5),
            (3, 33, 17),
            (2, 64, 16),
            (12, 40, 24),
            (5, 127, 31),
            (17, 192, 65),
            (1, 300, 129),
            (33, 96, 40),
        ] {
            cases.push(Case::Linear { rows, in_features, out_features, format, bias: rows % 2 == 1 });
        }
    }
    let block = WeightFormat::Ggml;
    cases.push(Case::Group { rows: 3, in_features: 33, weights: vec![(17, F32), (5, BF16), (40, F16)] });
    let mixed = vec![(65, block(BlockFormat::Q4_K)), (1, BF16), (16, block(BlockFormat::Q8_0)), (33, F32)];
    cases.push(Case::Group { rows: 1, in_features: 256, weights: mixed.clone() });
    cases.push(Case::Group { rows: 19, in_features: 512, weights: mixed });
    cases.extend(fused::cases());
    cases.extend(indexed::cases());
    cases.extend(compressed::cases());
    cases.extend(moe::bounded_cases());
    cases.extend(codes::cases());
    for block in BlockFormat::ALL {
        let (format, k) = (WeightFormat::Ggml(block), block.elements());
        // Devices take few rows, and more, in tiles of other sizes.
        for (rows, blocks, out_features) in
            [(1, 1, 1), (2, 5, 33), (3, 3, 17), (7, 4, 16), (12, 1, 24), (27, 1, 9), (37, 2, 65)]
        {
            cases.push(Case::Linear { rows, in_features: k * blocks, out_features, format, bias: rows % 2 == 1 });
        }
        for rows in [1, 27, 5] {
            cases.push(Case::Moe { rows, hidden: k, intermediate: k, experts: 4, format, groups: None });
        }
    }
    for block in BlockFormat::ALL.into_iter().filter(|block| block.can_be_made()) {
        for (rows, blocks, out_features) in [(1, 1, 1), (3, 2, 17), (17, 3, 65)] {
            cases.push(Case::Made { rows, in_features: block.elements() * blocks, out_features, block });
        }
    }
    cases.push(Case::Latent {
        heads: 2,
        nope: 7,
        rope: 6,
        v: 5,
        rank: 64,
        format: WeightFormat::Ggml(BlockFormat::Q4_0),
        kv: KvDtype::F32,
        history: 0,
    });
    for (rows, cols, run) in [(1, 1, 1), (3, 37, 37), (5, 96, 32), (2, 128, 16), (17, 192, 192)] {
        cases.push(Case::Norm { rows, cols, run });
    }
    for (rows, cols) in [(1, 1), (3, 7), (5, 33), (17, 64)] {
        cases.push(Case::Elementwise { rows, cols });
    }
    for (cols, ties) in [(1, false), (7, false), (255, true), (1000, false), (1000, true), (129_283, false)] {
        cases.push(Case::Choose { cols, ties });
    }
    for interleaved in [false, true] {
        cases.push(Case::Rope(RopeLayout { heads: 3, head_dim: 10, offset: 0, dim: 10, interleaved }));
        cases.push(Case::Rope(RopeLayout { heads: 5, head_dim: 48, offset: 32, dim: 16, interleaved }));
        cases.push(Case::Rope(RopeLayout { heads: 1, head_dim: 64, offset: 0, dim: 64, interleaved }));
    }
    for (heads, kv_heads, head_dim) in [(1, 1, 5), (4, 2, 32), (6, 2, 33), (7, 1, 64), (8, 8, 16), (12, 2, 80)] {
        let scale = (head_dim as f32).sqrt().recip();
        let full = AttentionParams { heads, kv_heads, head_dim, scale, window: None, softcap: None };
        for kv in KvDtype::ALL {
            cases.push(Case::Attention { params: full, kv, history: 0 });
            // Windows of one token, within a block, across blocks, and longer than any context.
            for (window, softcap) in [(1, None), (7, Some(0.3)), (31, None), (65, Some(2.0)), (1000, Some(50.0))] {
                let params = AttentionParams { window: Some(window), softcap, ..full };
                cases.push(Case::Attention { params, kv, history: 0 });
            }
        }
    }
    cases.extend(KvDtype::ALL.into_iter().flat_map(real_widths));
    for (kv, window) in KvDtype::ALL.into_iter().flat_map(|kv| [None, Some(90)].map(|window| (kv, window))) {
        let params = AttentionParams { heads: 3, kv_heads: 1, head_dim: 16, scale: 0.25, window, softcap: None };
        cases.push(Case::Attention { params, kv, history: LONG });
    }
    cases.push(Case::Latent {
        heads: 3,
        nope: 8,
        rope: 4,
        v: 8,
        rank: 16,
        format: F32,
        kv: KvDtype::F16,
        history: LONG,
    });
    for (format, kv) in [F32, BF16, F16].into_iter().flat_map(|format| KvDtype::ALL.map(|kv| (format, kv))) {
        cases.push(Case::Latent { heads: 3, nope: 7, rope: 6, v: 5, rank: 19, format, kv, history: 0 });
        cases.push(Case::Latent { heads: 6, nope: 32, rope: 16, v: 32, rank: 64, format, kv, history: 0 });
    }
    for format in [F32, BF16, F16] {
        let groups = Some(GroupScore::TwoBest);
        cases.push(Case::Moe { rows: 1, hidden: 64, intermediate: 32, experts: 8, format, groups });
        cases.push(Case::Moe { rows: 19, hidden: 96, intermediate: 64, experts: 16, format, groups });
    }
    for groups in [None, Some(GroupScore::Best), Some(GroupScore::TwoBest)] {
        cases.push(Case::Moe { rows: 5, hidden: 37, intermediate: 23, experts: 8, format: BF16, groups });
    }
    cases.push(Case::Moe { rows: 6, hidden: 33, intermediate: 17, experts: 9, format: F32, groups: None });
    // All rows have few experts to choose from, or one row has many numbers that do not fill a vector.
    for (rows, hidden, intermediate) in [(40, 32, 24), (110, 24, 32), (1, 37, 23)] {
        for format in [F32, BF16, F16] {
            cases.push(Case::Moe { rows, hidden, intermediate, experts: 4, format, groups: None });
        }
    }
    for code in Code::ALL {
        for (rows, hidden, intermediate, experts) in [(1, 64, 128, 8), (45, 72, 64, 4), (19, 136, 200, 8)] {
            let format = WeightFormat::Coded(code);
            cases.push(Case::Moe { rows, hidden, intermediate, experts, format, groups: None });
        }
    }
    cases
}

/// Attention in the widths of models that are served, with few heads: devices have ways of their own for these.
fn real_widths(kv: KvDtype) -> Vec<Case> {
    let full = |heads: usize, kv_heads: usize, head_dim: usize| {
        let scale = (head_dim as f32).sqrt().recip();
        AttentionParams { heads, kv_heads, head_dim, scale, window: None, softcap: None }
    };
    let attention = [
        full(4, 1, 64),
        full(12, 1, 64),
        full(4, 1, 128),
        AttentionParams { window: Some(40), softcap: Some(1.5), ..full(7, 1, 128) },
        full(16, 1, 128),
        full(2, 2, 192),
        AttentionParams { window: Some(40), softcap: Some(50.0), ..full(2, 1, 256) },
    ];
    let attention = attention.map(|params| Case::Attention { params, kv, history: 0 });
    let latent = [(2, 24, 64, 40, 512, WeightFormat::BF16), (3, 24, 16, 40, 128, WeightFormat::F16)];
    let latent = latent.map(|(heads, nope, rope, v, rank, format)| Case::Latent {
        heads,
        nope,
        rope,
        v,
        rank,
        format,
        kv,
        history: 0,
    });
    attention.into_iter().chain(latent).collect()
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
