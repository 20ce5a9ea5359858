//! What devices compute that offer [`crate::Op::CompressedAttention`].
//!
//! Of choices what is said of [`super::indexed`] holds. Histories are such that an entry of 128 tokens is completed by a step of
//! one token.

use super::inputs::{Source, activation};
use super::steps::{MAX_POSITIONS, over_steps};
use super::{Case, Full, outputs};
use crate::{
    Backend, DType, Entries, HostLinear, HostRope, KvDtype, LayerKv, Mixing, PoolKv, Pooling, Purpose, Reads, Result,
    RopeLayout, WeightFormat, WindowedParams,
};

/// A history behind which position 639, the last of 5 times 128, has a step of its own.
const LONG: usize = 568;

/// What is read beside the window, as a case says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooled {
    /// Nothing: there is no pool.
    Nothing,
    /// All entries.
    All(PoolKv),
    /// Some of them.
    Chosen {
        /// With the width of the indexer.
        pool: PoolKv,
        /// Heads of the indexer.
        heads: usize,
        /// Entries that it chooses.
        top_k: usize,
    },
}

impl Pooled {
    /// The pool, if there is one.
    pub const fn pool(self) -> Option<PoolKv> {
        match self {
            Pooled::Nothing => None,
            Pooled::All(pool) | Pooled::Chosen { pool, .. } => Some(pool),
        }
    }
}

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use WeightFormat::{BF16, F16, F32};
    let all = |rate, overlaps| Pooled::All(PoolKv { rate, overlaps, index: None });
    let chosen = |rate, overlaps, (heads, index, top_k)| Pooled::Chosen {
        pool: PoolKv { rate, overlaps, index: Some(index) },
        heads,
        top_k,
    };
    let short = [
        (1, 4, 1, Pooled::Nothing),
        (3, 20, 33, Pooled::Nothing),
        (3, 20, 7, all(3, true)),
        (5, 33, 16, all(4, false)),
        (2, 16, 200, all(16, false)),
        (6, 48, 17, chosen(4, true, (3, 12, 5))),
        (3, 30, 9, chosen(3, false, (5, 7, 1))),
        // As many as there ever are.
        (3, 20, 5, chosen(4, true, (8, 16, 32))),
    ];
    let long = [
        (3, 20, 90, Pooled::Nothing),
        (3, 19, 70, all(128, false)),
        (2, 32, 31, all(128, true)),
        (3, 20, 64, all(4, true)),
        (3, 40, 40, all(16, false)),
        (17, 24, 12, chosen(4, true, (9, 21, 64))),
        (3, 20, 128, chosen(3, true, (4, 20, 150))),
    ];
    let windowed = |history| {
        move |((heads, width, window, pooled), kv)| Case::Windowed { heads, width, window, pooled, kv, history }
    };
    let of_each = |case| KvDtype::ALL.map(|kv| (case, kv));
    let short = short.into_iter().flat_map(of_each).map(windowed(0));
    let long = long.into_iter().flat_map(of_each).map(windowed(LONG));
    let grouped = [(1, 1, 7, 5, F32), (3, 2, 33, 17, BF16), (17, 4, 64, 40, F16), (8, 3, 300, 65, BF16)];
    let grouped = grouped.map(|(rows, groups, in_features, out_features, format)| Case::Grouped {
        rows,
        groups,
        in_features,
        out_features,
        format,
    });
    let streams = [(1, 2, 7), (5, 4, 33), (17, 4, 64), (3, 1, 5)];
    let streams = streams.map(|(rows, streams, hidden)| Case::Streams { rows, streams, hidden });
    short.chain(long).chain(grouped).chain(streams).collect()
}

/// A vector of numbers below `scale`.
fn vector<B: Backend>(b: &B, len: usize, seed: u64, scale: f32) -> Result<B::Vector> {
    b.vector(&Source::new(WeightFormat::F32, vec![len], seed, scale).tensor())
}

/// Runs a [`Case::Windowed`].
pub(super) fn windowed<B: Full>(case: &Case, b: &B, inputs: DType) -> Result<Vec<f32>> {
    let &Case::Windowed { heads, width, window, pooled, kv, history } = case else { unreachable!("{case:?}") };
    let pool = pooled.pool();
    let inv_freq = vec![0.9, 0.05];
    let table = b.rope_table(&HostRope { inv_freq, scale: 1.0, max_positions: MAX_POSITIONS + history })?;
    let sink = vector(b, heads, 1, 2.0)?;
    // What entries of a width are made with: bias and norm.
    let parameters = |width: usize, seed: u64| {
        let bias = pool.map_or(1, |pool| pool.rate * pool.series() * width);
        Ok([vector(b, bias, seed, 1.5)?, vector(b, width, seed + 1, 1.5)?])
    };
    let of_attended = parameters(width, 2)?;
    let of_index = pool.and_then(|pool| pool.index).map(|width| parameters(width, 4)).transpose()?;
    over_steps(b, (LayerKv::Windowed { width, window, pool }, kv), history, |cache, plan, rows, seed| {
        let activation = |cols: usize, n: u64| activation(b, inputs, rows, cols, seed + n);
        let mut add = |width: usize, [bias, norm]: &[B::Vector; 2], entries, n: u64| {
            let columns = pool.map_or(1, PoolKv::series) * width;
            let (values, mut gates) = (activation(columns, n)?, activation(columns, n + 1)?);
            b.scale(&mut gates, 2.0)?;
            let layout = RopeLayout { heads: 1, head_dim: width, offset: width - 4, dim: 4, interleaved: true };
            let pooling = Pooling { values: &values, gates: &gates, bias, norm, eps: 1e-6, layout, table: &table };
            b.pool(&pooling, entries, cache, 1, plan)
        };
        if let Some(PoolKv { index, .. }) = pool {
            add(width, &of_attended, Entries::Attended, 0)?;
            if let Some((width, of_index)) = index.zip(of_index.as_ref()) {
                add(width, of_index, Entries::Index, 2)?;
            }
        }
        let (q, kv) = (activation(heads * width, 4)?, activation(width, 5)?);
        let mut out = b.tensor(rows, heads * width)?;
        let of_indexer = match pooled {
            Pooled::Chosen { pool: PoolKv { index: Some(width), .. }, heads, top_k } => {
                Some((activation(heads * width, 6)?, activation(heads, 7)?, top_k))
            }
            _ => None,
        };
        let reads = match &of_indexer {
            &Some((ref q, ref weights, top_k)) => Reads::Chosen { q, weights, top_k },
            None if pool.is_some() => Reads::All,
            None => Reads::Window,
        };
        let params = WindowedParams { window, scale: 0.4, sink: &sink, reads };
        b.windowed_attention(&q, &kv, &params, cache, 1, plan, &mut out)?;
        outputs(b, &[&out])
    })
}

/// Runs a [`Case::Grouped`]; its products are bounded, so that some are and some are not.
pub(super) fn grouped<B: Full>(case: &Case, b: &B, inputs: DType) -> Result<Vec<f32>> {
    let &Case::Grouped { rows, groups, in_features, out_features, format } = case else { unreachable!("{case:?}") };
    let weight = |group: usize| {
        let scale = (in_features as f32).sqrt().recip();
        let weight = Source::new(format, vec![out_features, in_features], 10 + group as u64, scale);
        b.linear_weight(&HostLinear { weight: weight.tensor(), bias: None, format, purpose: Purpose::Product })
    };
    let weights = (0..groups).map(weight).collect::<Result<Vec<_>>>()?;
    // Numbers that a device with narrow activations has as well.
    let inputs = if format == WeightFormat::BF16 { DType::BF16 } else { inputs };
    let x = activation(b, inputs, rows, groups * in_features, 3)?;
    let (mut out, mut bounded) = (b.tensor(rows, groups * out_features)?, b.tensor(rows, groups * out_features)?);
    b.grouped_linear(&x, &weights, &mut out)?;
    b.grouped_linear(&x, &weights, &mut bounded)?;
    b.clamp(&mut bounded, -0.2, 0.3)?;
    outputs(b, &[&out, &bounded])
}

/// Runs a [`Case::Streams`].
pub(super) fn streams<B: Full>(case: &Case, b: &B, inputs: DType) -> Result<Vec<f32>> {
    let &Case::Streams { rows, streams, hidden } = case else { unreachable!("{case:?}") };
    let activation = |cols: usize, seed: u64| activation(b, inputs, rows, cols, seed);
    let columns = (2 + streams) * streams;
    let (base, scale) = (vector(b, columns, 1, 1.0)?, vector(b, 3, 2, 2.0)?);
    let mixing = Mixing { streams, base: &base, scale: &scale, iterations: 3, eps: 1e-3 };
    let (base, scale) = (vector(b, streams, 3, 1.0)?, vector(b, 1, 4, 2.0)?);
    let joining = Mixing { streams, base: &base, scale: &scale, ..mixing };

    let mut filled = b.tensor(rows, streams * hidden)?;
    b.fill_streams(&activation(hidden, 5)?, &mut filled)?;
    let (mut all, mut weights, mut to_join) =
        (activation(streams * hidden, 6)?, activation(columns, 7)?, activation(streams, 8)?);
    b.stream_weights(&mixing, &mut weights)?;
    b.stream_weights(&joining, &mut to_join)?;
    let (mut joined, mut last) = (b.tensor(rows, hidden)?, b.tensor(rows, hidden)?);
    b.join_streams(&all, &weights, &mut joined)?;
    b.mix_streams(&activation(hidden, 9)?, &weights, &mut all)?;
    b.join_streams(&all, &to_join, &mut last)?;
    outputs(b, &[&filled, &weights, &to_join, &joined, &all, &last])
}
