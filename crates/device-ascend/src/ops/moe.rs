//! Mixture of experts on the device: routing, dispatch, the experts' products, and their sum.
//!
//! Invariants: the choice of experts is that of [`baton_device::select_experts`], weights are f32 until rows are added up. Rows
//! are sorted by expert; experts that are held elsewhere come last, and their rows add nothing.

use std::ops::Range;

use baton_device::{GroupScore, Routing, Scoring, select_experts};

use super::each_expert;
use super::rows::scale;
use crate::device::{Device, decode, encode};
use crate::error::AscendError;
use crate::object::{Address, DataType, View};

type Result<T> = std::result::Result<T, AscendError>;

/// Added to the sum that weights are divided by.
const EPSILON: f64 = 1e-20;

/// A layer's experts, for work that is queued.
#[derive(Clone)]
pub(crate) struct ExpertsView {
    /// `[held, 2 * intermediate, hidden]`: gate rows, then up rows.
    pub(crate) gate_up: View,
    /// `[held, hidden, intermediate]`.
    pub(crate) down: View,
    /// Those that are here, of all.
    pub(crate) held: Range<usize>,
    pub(crate) count: usize,
    pub(crate) routing: Routing,
    /// `[count]` f32: the routing's correction bias.
    pub(crate) bias: Option<View>,
    /// `[count]` i32: where each expert stands when those held come first; `None` where that is its own number.
    pub(crate) places: Option<View>,
}

impl ExpertsView {
    pub(crate) fn dtype(&self) -> DataType {
        self.down.dtype
    }

    pub(crate) fn hidden(&self) -> usize {
        self.down.dims[1] as usize
    }

    pub(crate) fn intermediate(&self) -> usize {
        self.down.dims[2] as usize
    }
}

/// How experts are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gating {
    /// MoeGatingTopK: sigmoid or softmax scores, groups, a bias.
    TopK,
    /// MoeGatingTopKSoftmaxV2: softmax scores, no groups.
    TopKSoftmax,
    /// The same of Softmax and Topk.
    Composed,
    /// On the host: the router's logits are brought there in every step.
    Host,
}

/// How the experts' products are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Products {
    /// All experts in one operator.
    Grouped,
    /// One expert after the other; takes the choice from the host.
    EachExpert,
}

/// The form of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MoeForm {
    pub(crate) gating: Gating,
    pub(crate) products: Products,
}

impl MoeForm {
    /// What works wherever products do.
    pub(crate) const COMPOSED: Self = Self { gating: Gating::Host, products: Products::EachExpert };
}

/// Choices that are computed together: bounds scratch memory.
const CHOICES: usize = 8192;

/// See [`MoeOps::fused_moe`](baton_device::MoeOps::fused_moe); `out` is in the experts' type.
pub(crate) fn moe(
    device: &mut Device,
    form: MoeForm,
    x: &View,
    logits: &View,
    experts: &ExpertsView,
    out: &View,
) -> Result<()> {
    let (rows, most) = (x.dims[0] as usize, (CHOICES / experts.routing.top_k).max(1));
    for start in (0..rows).step_by(most) {
        let part = |view: &View| view.narrow(0, start, most.min(rows - start));
        let out = part(out);
        device.with_type(&part(x), experts.dtype(), |device, x| {
            device.with_type(&part(logits), DataType::F32, |device, logits| match form.products {
                Products::Grouped => grouped(device, form.gating, x, logits, experts, &out),
                Products::EachExpert => each_expert::run(device, x, logits, experts, &out),
            })
        })?;
    }
    Ok(())
}

/// Intermediate results of [`grouped`], for `rows` tokens of `k` experts each.
struct Parts {
    /// `[rows, k]` f32.
    weights: View,
    /// `[rows, k]` in the experts' type.
    narrow_weights: View,
    /// `[rows, k]` i32.
    chosen: View,
    /// The same with held experts first.
    placed: View,
    /// `[rows * k, hidden]`.
    expanded: View,
    /// `[rows * k]` i32.
    row_index: View,
    /// `[count]`: where each expert's rows end.
    ends: View,
    ends_wide: View,
    /// `[rows * k, 2 * intermediate]`.
    gate_up: View,
    /// `[rows * k, intermediate]`.
    product: View,
    /// `[rows * k, hidden]`.
    down: View,
}

fn grouped(
    device: &mut Device,
    gating: Gating,
    x: &View,
    logits: &View,
    experts: &ExpertsView,
    out: &View,
) -> Result<()> {
    let (rows, k, dtype) = (x.dims[0] as usize, experts.routing.top_k, experts.dtype());
    let (all, hidden, inner) = (rows * k, experts.hidden(), experts.intermediate());
    let (choices, count): (&[usize], &[usize]) = (&[rows, k], &[experts.count]);
    let shapes: [(DataType, &[usize]); 11] = [
        (DataType::F32, choices),
        (dtype, choices),
        (DataType::I32, choices),
        (DataType::I32, choices),
        (dtype, &[all, hidden]),
        (DataType::I32, &[all]),
        (DataType::I32, count),
        (DataType::I64, count),
        (dtype, &[all, 2 * inner]),
        (dtype, &[all, inner]),
        (dtype, &[all, hidden]),
    ];
    device.with_views(shapes, |device, views| {
        let [weights, narrow_weights, chosen, placed, expanded, row_index, ends, ends_wide, gate_up, product, down] =
            views;
        let parts = &Parts {
            weights,
            narrow_weights,
            chosen,
            placed,
            expanded,
            row_index,
            ends,
            ends_wide,
            gate_up,
            product,
            down,
        };
        route(device, gating, logits, experts, &parts.weights, &parts.chosen)?;
        let chosen = match &experts.places {
            None => &parts.chosen,
            Some(places) => {
                let all = parts.chosen.numel();
                let (places, index) = (device.tensor(places), device.tensor(&parts.chosen.reshape(&[all])));
                device.index_select(&places, 0, &index, &device.tensor(&parts.placed.reshape(&[all])))?;
                &parts.placed
            }
        };
        dispatch(device, x, chosen, experts, parts)?;

        let held = parts.ends_wide.narrow(0, 0, experts.held.len());
        grouped_matmul(device, &parts.expanded, &experts.gate_up, &held, &parts.gate_up)?;
        let (gate_up, product) = (device.tensor(&parts.gate_up), device.tensor(&parts.product));
        device.swi_glu(&gate_up, 1, &product)?;
        if experts.held.len() < experts.count {
            // The product leaves the rows of experts that are not here as they are.
            device.clear(parts.down.base, parts.down.numel() * parts.down.dtype.bytes())?;
        }
        grouped_matmul(device, &parts.product, &experts.down, &held, &parts.down)?;

        let weights = if experts.dtype() == DataType::F32 {
            &parts.weights
        } else {
            device.convert(&parts.weights, &parts.narrow_weights)?;
            &parts.narrow_weights
        };
        let (down, row_index) = (device.tensor(&parts.down), device.tensor(&parts.row_index));
        let (weights, chosen, out) = (device.tensor(weights), device.tensor(chosen), device.tensor(out));
        // Mode 2 is the order of rows that dispatch gives.
        device.moe_finalize_routing(&down, &row_index, None, None, None, Some(&weights), Some(&chosen), 2, &out)
    })
}

/// Copies rows to where their experts' groups are, and tells where these end, as the products ask for it.
fn dispatch(device: &mut Device, x: &View, chosen: &View, experts: &ExpertsView, parts: &Parts) -> Result<()> {
    let (x, chosen) = (device.tensor(x), device.tensor(chosen));
    let (expanded, row_index) = (device.tensor(&parts.expanded), device.tensor(&parts.row_index));
    let ends = device.tensor(&parts.ends);
    // 1: running sums, not counts.
    device.moe_init_routing(
        &x,
        &chosen,
        0,
        0,
        experts.count as i64,
        0,
        1,
        false,
        &expanded,
        &row_index,
        Some(&ends),
        None,
    )?;
    device.convert(&parts.ends, &parts.ends_wide)
}

/// `out = x · W_eᵀ` for each group of rows, which end at `ends`.
fn grouped_matmul(device: &mut Device, x: &View, weight: &View, ends: &View, out: &View) -> Result<()> {
    let (x, weight, out) = (device.list(&[x]), device.list(&[&weight.swap(1, 2)]), device.list(&[out]));
    let ends = device.tensor(ends);
    // Split 2: one output for all groups. Group type 0: groups are of rows. List type 0: running sums.
    device.grouped_matmul(
        &x,
        &weight,
        None,
        None,
        None,
        None,
        None,
        None,
        Some(&ends),
        None,
        None,
        None,
        2,
        0,
        0,
        0,
        &out,
        None,
        None,
    )
}

/// Weights and experts of every row, both `[rows, k]`, from f32 logits.
fn route(
    device: &mut Device,
    gating: Gating,
    logits: &View,
    experts: &ExpertsView,
    weights: &View,
    chosen: &View,
) -> Result<()> {
    let routing = &experts.routing;
    let k = routing.top_k as i64;
    match gating {
        Gating::TopK => {
            let (count, kept, by_two) = match routing.groups {
                Some(groups) => (groups.count, groups.kept, groups.score == GroupScore::TwoBest),
                None => (1, 1, false),
            };
            let sigmoid = matches!(routing.scoring, Scoring::Sigmoid { .. });
            let all = [logits.dims[0] as usize, experts.count];
            device.with_views([(DataType::F32, &all)], |device, [scores]| {
                let bias = experts.bias.as_ref().map(|bias| device.tensor(bias));
                let (x, scores) = (device.tensor(logits), device.tensor(&scores));
                let (weights, chosen) = (device.tensor(weights), device.tensor(chosen));
                // That the sum of sigmoid scores runs over the chosen, not over all: UNCONFIRMED.
                device.moe_gating_top_k(
                    &x,
                    bias.as_ref(),
                    k,
                    kept as i64,
                    count as i64,
                    i64::from(by_two),
                    0,
                    i64::from(sigmoid),
                    false,
                    f64::from(routing.scaling_factor),
                    EPSILON,
                    &weights,
                    &chosen,
                    &scores,
                )
            })
        }
        Gating::TopKSoftmax => {
            {
                let (x, weights, chosen) = (device.tensor(logits), device.tensor(weights), device.tensor(chosen));
                let renorm = i64::from(routing.norm_topk_prob);
                device.moe_gating_top_k_softmax(&x, None, k, renorm, false, &weights, &chosen, None)?;
            }
            scale_weights(device, routing, weights)
        }
        Gating::Composed => {
            composed_softmax(device, logits, routing, weights, chosen)?;
            scale_weights(device, routing, weights)
        }
        Gating::Host => {
            let (rows, count) = (logits.dims[0] as usize, experts.count);
            let choices = host_choices(device, logits, rows, count, routing)?;
            let (ids, values): (Vec<_>, Vec<_>) = choices.into_iter().flatten().unzip();
            let ids: Vec<u8> = ids.into_iter().flat_map(|e| (e as i32).to_le_bytes()).collect();
            device.upload(&ids, chosen.base)?;
            device.upload(&encode(&values, DataType::F32), weights.base)
        }
    }
}

fn scale_weights(device: &mut Device, routing: &Routing, weights: &View) -> Result<()> {
    if routing.scaling_factor == 1.0 { Ok(()) } else { scale(device, weights, routing.scaling_factor) }
}

/// Softmax and choice in this order, or in the other where weights are normalised: shares of the chosen are their softmax.
fn composed_softmax(
    device: &mut Device,
    logits: &View,
    routing: &Routing,
    weights: &View,
    chosen: &View,
) -> Result<()> {
    let dims = [logits.dims[0] as usize, logits.dims[1] as usize];
    let best = [dims[0], routing.top_k];
    let shapes: [(DataType, &[usize]); 3] = [(DataType::F32, &dims), (DataType::F32, &best), (DataType::I64, &best)];
    device.with_views(shapes, |device, [scores, best, index]| {
        let k = routing.top_k as i64;
        {
            let (x, weights) = (device.tensor(logits), device.tensor(weights));
            let (scores, best, index) = (device.tensor(&scores), device.tensor(&best), device.tensor(&index));
            if routing.norm_topk_prob {
                device.topk(&x, k, 1, true, true, &best, &index)?;
                device.softmax(&best, 1, &weights)?;
            } else {
                device.softmax(&x, 1, &scores)?;
                device.topk(&scores, k, 1, true, true, &weights, &index)?;
            }
        }
        device.convert(&index, chosen)
    })
}

/// The choice of every row, by ascending expert.
pub(super) fn host_choices(
    device: &mut Device,
    logits: &View,
    rows: usize,
    count: usize,
    routing: &Routing,
) -> Result<Vec<Vec<(usize, f32)>>> {
    assert!(logits.is_contiguous(), "rows of a tensor");
    let from = Address(logits.base.0 + logits.offset as usize * DataType::F32.bytes());
    let mut values = Vec::new();
    decode(&device.download(from, rows * count * DataType::F32.bytes())?, &mut values);
    Ok(values.chunks_exact(count).map(|row| select_experts(row, routing)).collect())
}
