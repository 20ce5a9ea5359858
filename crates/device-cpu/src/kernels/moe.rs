//! Mixture of experts: rows are grouped by expert, so that a step reads an expert's weights once.
//!
//! Order: a row's experts are added by ascending number; within an expert, that of the linear kernel.

use std::ops::Range;

use baton_device::{Activation, HostExperts, Result, Routing, Rows, select_experts, weigh_experts};

use crate::isa::Dispatch;
use crate::kernels::linear::{Buffers, Part, Prepared};
use crate::kernels::rows::{AddScaled, Clamp, Gated};
use crate::pool::Pool;
use crate::simd::LANES;
use crate::tensor::{Target, Tensor, View};
use crate::weight::Matrix;

/// Routed experts of one layer.
pub struct Experts {
    /// How many there are.
    count: usize,
    held: Range<usize>,
    /// Those held.
    experts: Vec<Expert>,
    limit: Option<f32>,
    routing: Routing,
}

struct Expert {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Experts {
    pub(crate) fn new(pool: &Pool, src: HostExperts<'_>) -> Result<Self> {
        let HostExperts { count, held, source, formats, limit, routing } = src;
        let mut experts: Vec<Expert> = Vec::with_capacity(held.len());
        for e in held.clone() {
            let [gate, up, down] = source.expert(e)?;
            if let Some(Expert { gate: first, .. }) = experts.first() {
                gate.expect_shape(&[first.out_features, first.in_features])?;
            }
            up.expect_shape(gate.shape())?;
            down.expect_shape(&[gate.shape()[1], gate.shape()[0]])?;
            experts.push(Expert {
                gate: Matrix::from_host(pool, &gate, formats[0])?,
                up: Matrix::from_host(pool, &up, formats[1])?,
                down: Matrix::from_host(pool, &down, formats[2])?,
            });
        }
        Ok(Self { count, held, experts, limit, routing })
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }
}

/// Pairs of a row and an expert, sorted by expert and then by row, and what is computed for each.
/// Grows to the largest step and is then reused.
#[derive(Default)]
pub(crate) struct Scratch {
    /// `(expert, row, weight)`; experts are numbered from the first that is held.
    pairs: Vec<(usize, u32, f32)>,
    /// Row of each pair.
    rows: Vec<u32>,
    /// Expert with pairs, first pair, pairs.
    runs: Vec<(usize, usize, usize)>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    input: Buffers,
    inner: Buffers,
}

/// What chooses and weighs the experts of rows.
pub(crate) struct Router<'a> {
    pub(crate) logits: &'a Tensor,
    /// Tokens, if they choose.
    pub(crate) ids: Option<&'a [u32]>,
}

/// `out = Σ_e weight_e · down_e(silu(gate_e x) ⊙ up_e x)` for every row.
pub(crate) fn fused(
    pool: &Pool,
    isa: Dispatch,
    (x, router): (&Tensor, Router<'_>),
    layer: &Experts,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let Scratch { pairs, rows, runs, gate, up, down, input: input_buffers, inner: inner_buffers } = scratch;
    route(&router, layer, pairs);
    rows.clear();
    rows.extend(pairs.iter().map(|p| p.1));
    runs.clear();
    for run in pairs.chunk_by(|a, b| a.0 == b.0) {
        let first = runs.last().map_or(0, |&(_, first, count)| first + count);
        runs.push((run[0].0, first, run.len()));
    }

    let Some(shape) = layer.experts.first() else { return out.fill(0.0) };
    let (hidden, inner) = (shape.gate.in_features, shape.gate.out_features);
    for (buffer, width) in [(&mut *gate, inner), (&mut *up, inner), (&mut *down, hidden)] {
        buffer.resize(pairs.len() * width, 0.0);
    }
    let work = pairs.len() * hidden * inner;

    let view = View { rows: rows.len(), index: Some(rows), ..x.view() };
    let input = Prepared::new((pool, isa), view, [&shape.gate, &shape.up], input_buffers);
    let (gates, ups) = (Target::new(gate, inner), Target::new(up, inner));
    let chunk = pool.share(shape.gate.panels() * runs.len(), 2 * work).clamp(1, shape.gate.panels());
    let chunks = shape.gate.panels().div_ceil(chunk);
    pool.run(runs.len() * chunks, 2 * work, |task| {
        let (expert, first, count) = runs[task / chunks];
        let Expert { gate, up, .. } = &layer.experts[expert];
        let panel = task % chunks * chunk;
        let panels = panel..gate.panels().min(panel + chunk);
        let cols = panel * LANES..inner.min(panels.end * LANES);
        let part = Part { input, first, weight: gate, bias: None, rows: 0..count, panels };
        // SAFETY: tasks differ in pairs or in columns, here and below; only one part is alive at a time.
        unsafe { part.clone().run(isa, &gates.shifted(first, 0)) };
        // SAFETY: as above.
        unsafe { Part { weight: up, ..part }.run(isa, &ups.shifted(first, 0)) };
        for pair in first..first + count {
            // SAFETY: as above; both were computed by this task.
            let (gate, up) = unsafe { (gates.part(pair, cols.clone()), ups.part(pair, cols.clone())) };
            if let Some(limit) = layer.limit {
                isa.run(Clamp { x: gate, low: f32::NEG_INFINITY, high: limit });
                isa.run(Clamp { x: up, low: -limit, high: limit });
            }
            isa.run(Gated { activation: Activation::Silu, gate, up });
        }
    });

    let view = View { data: &gate[..], rows: pairs.len(), stride: inner, start: 0, width: inner, index: None };
    let input = Prepared::new((pool, isa), view, [&shape.down], inner_buffers);
    let downs = Target::new(down, hidden);
    let chunk = pool.share(shape.down.panels() * runs.len(), work).clamp(1, shape.down.panels());
    let chunks = shape.down.panels().div_ceil(chunk);
    pool.run(runs.len() * chunks, work, |task| {
        let (expert, first, count) = runs[task / chunks];
        let weight = &layer.experts[expert].down;
        let panel = task % chunks * chunk;
        let panels = panel..weight.panels().min(panel + chunk);
        let part = Part { input, first, weight, bias: None, rows: 0..count, panels };
        // SAFETY: tasks differ in pairs or in columns.
        unsafe { part.run(isa, &downs.shifted(first, 0)) };
    });

    out.fill(0.0);
    for (&(_, row, factor), y) in pairs.iter().zip(down.chunks_exact(hidden)) {
        let x = &mut out[row as usize * hidden..][..hidden];
        isa.run(AddScaled { x, y, factor });
    }
}

/// Chooses the experts of every row, of which those held are kept.
fn route(
    Router { logits, ids }: &Router<'_>,
    Experts { held, routing, .. }: &Experts,
    pairs: &mut Vec<(usize, u32, f32)>,
) {
    pairs.clear();
    for (row, logits) in logits.data().chunks_exact(logits.cols()).enumerate() {
        let chosen = match ids {
            Some(ids) => weigh_experts(logits, ids[row], routing),
            None => select_experts(logits, routing),
        };
        let chosen = chosen.into_iter().filter(|(e, _)| held.contains(e));
        pairs.extend(chosen.map(|(e, weight)| (e - held.start, row as u32, weight)));
    }
    pairs.sort_unstable_by_key(|&(expert, row, _)| (expert, row));
}
