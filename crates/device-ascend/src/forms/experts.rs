//! The form of a layer of experts.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use baton_device::conformance::uniform;
use baton_device::{GroupScore, Result as SeamResult, Routing, Scoring};

use super::trial::{agree, floats, try_on};
use super::{Candidate, Place, Verdict, first};
use crate::backend::AscendBackend;
use crate::chip::Chip;
use crate::device::{Device, encode};
use crate::error::AscendError;
use crate::object::DataType;
use crate::ops::moe::{ExpertsView, Gating, MoeForm, Products, moe};

/// What a layer's form depends on.
#[derive(PartialEq)]
pub(crate) struct ExpertsShape {
    held: Range<usize>,
    count: usize,
    hidden: usize,
    intermediate: usize,
    dtype: DataType,
    /// Without its bias.
    routing: Routing,
}

impl ExpertsShape {
    fn of(layer: &ExpertsView) -> Self {
        let scoring = match layer.routing.scoring {
            Scoring::Softmax => Scoring::Softmax,
            Scoring::Sigmoid { .. } => Scoring::Sigmoid { correction_bias: Vec::new() },
            Scoring::SqrtSoftplus { .. } => panic!("no compressed attention: the capabilities do not offer it"),
        };
        Self {
            held: layer.held.clone(),
            count: layer.count,
            hidden: layer.hidden(),
            intermediate: layer.intermediate(),
            dtype: layer.dtype(),
            routing: Routing { scoring, ..layer.routing.clone() },
        }
    }
}

impl fmt::Display for ExpertsShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { held, count, hidden, intermediate, dtype, routing } = self;
        let scoring = if routing.scoring == Scoring::Softmax { "softmax" } else { "sigmoid" };
        write!(f, "experts {}-{} of {count}", held.start, held.end - 1)?;
        write!(f, ", {hidden} by {intermediate} in {dtype}, {} chosen by {scoring}", routing.top_k)?;
        if let Some(groups) = routing.groups {
            write!(f, " in {} of {} groups", groups.kept, groups.count)?;
        }
        Ok(())
    }
}

/// Settles the form of a layer.
pub(crate) fn experts(backend: &AscendBackend, layer: &Arc<ExpertsView>) -> SeamResult<MoeForm> {
    let candidates = |_: &ExpertsShape| candidates(backend.chip, backend.forms.strict, layer);
    backend.forms.experts.settle(ExpertsShape::of(layer), Place::NextLayer, candidates, |form| {
        let layer = layer.clone();
        let outcome = try_on(&backend.owner, move |device| trial(device, form, &layer))?;
        Ok(outcome.and_then(|verdict| verdict))
    })
}

/// Forms, the best first.
fn candidates(chip: Chip, strict: bool, layer: &ExpertsView) -> Vec<Candidate<MoeForm>> {
    let routing = &layer.routing;
    let gatings = if routing.scoring == Scoring::Softmax && routing.groups.is_none() {
        vec![
            (Gating::TopKSoftmax, "MoeGatingTopKSoftmaxV2", softmax_gate_refuses(chip, routing)),
            (Gating::Composed, "Softmax and Topk", None),
        ]
    } else {
        vec![(Gating::TopK, "MoeGatingTopK", gate_refuses(chip, routing, layer.count))]
    };
    let on_host = (Gating::Host, "router logits brought to the host in every step", None);
    let products = strict.then(|| "fused forms are off".to_owned()).or_else(|| products_refuse(chip, layer));
    let with_products = gatings.into_iter().chain([on_host]).map(|(gating, name, objection)| Candidate {
        name: format!("{name}, GroupedMatmulV4"),
        form: MoeForm { gating, products: Products::Grouped },
        objection: products.clone().or(objection),
    });
    let composed = Candidate {
        name: "router logits brought to the host in every step, one expert after the other".into(),
        form: MoeForm::COMPOSED,
        objection: None,
    };
    with_products.chain([composed]).collect()
}

/// Why MoeGatingTopKSoftmaxV2 does not choose like this.
fn softmax_gate_refuses(chip: Chip, routing: &Routing) -> Option<String> {
    const MOST: usize = 1024;
    first([
        (chip == Chip::P310, format!("{chip} has none")),
        (routing.top_k > MOST, format!("it chooses at most {MOST}")),
    ])
}

/// Why MoeGatingTopK does not choose like this.
fn gate_refuses(chip: Chip, routing: &Routing, experts: usize) -> Option<String> {
    /// Experts, also counted with each group padded to [`PAD`].
    const MOST: usize = 2048;
    const PAD: usize = 32;
    let (groups, kept, worth) = routing
        .groups
        .map_or((1, 1, 0), |groups| (groups.count, groups.kept, usize::from(groups.score == GroupScore::TwoBest)));
    let size = experts / groups;
    let sigmoid = matches!(routing.scoring, Scoring::Sigmoid { .. });
    first([
        (chip == Chip::P310, format!("{chip} has none")),
        (sigmoid && !routing.norm_topk_prob, "it normalises weights by sigmoid".into()),
        (!sigmoid && routing.norm_topk_prob, "it does not normalise weights by softmax".into()),
        (experts > MOST || size.next_multiple_of(PAD) * groups > MOST, format!("it takes at most {MOST} experts")),
        (size <= worth, format!("its groups have more than {worth} experts")),
        (routing.top_k > kept * size, format!("it chooses at most {} of {kept} groups", kept * size)),
    ])
}

/// Why grouped products, with what brings rows to them and back, do not take these experts.
fn products_refuse(chip: Chip, layer: &ExpertsView) -> Option<String> {
    /// Last dimensions lie below this.
    const WIDTH: usize = 65_536;
    let (hidden, inner, dtype) = (layer.hidden(), layer.intermediate(), layer.dtype());
    let small = chip == Chip::P310;
    first([
        (hidden.max(2 * inner) >= WIDTH, format!("widths lie below {WIDTH}")),
        (small && dtype != DataType::F16, format!("{chip} multiplies groups in f16 only")),
        (small && !(inner * dtype.bytes()).is_multiple_of(64), format!("SwiGlu on {chip} takes multiples of 64 bytes")),
        (
            small && !hidden.is_multiple_of(32),
            format!("MoeFinalizeRoutingV2 on {chip} takes widths of multiples of 32"),
        ),
    ])
}

/// Computes some rows in a form and in the composed one.
fn trial(device: &mut Device, form: MoeForm, layer: &ExpertsView) -> Result<Verdict, AscendError> {
    const ROWS: usize = 5;
    let (hidden, dtype) = (layer.hidden(), layer.dtype());
    let shapes: [(DataType, &[usize]); 3] =
        [(dtype, &[ROWS, hidden]), (DataType::F32, &[ROWS, layer.count]), (dtype, &[ROWS, hidden])];
    device.with_views(shapes, |device, [x, logits, out]| {
        device.upload(&encode(&uniform(1, ROWS * hidden, 1.0), dtype), x.base)?;
        // Where some experts are held elsewhere, every second row prefers those that are here.
        let preferred = |i: usize| {
            let (row, expert) = (i / layer.count, i % layer.count);
            layer.held.len() < layer.count && row % 2 == 1 && layer.held.contains(&expert)
        };
        let mut scores = uniform(2, ROWS * layer.count, 4.0);
        scores.iter_mut().enumerate().filter(|(i, _)| preferred(*i)).for_each(|(_, score)| *score += 4.0);
        device.upload(&encode(&scores, DataType::F32), logits.base)?;
        let mut numbers = |form| {
            moe(device, form, &x, &logits, layer, &out)?;
            floats(device, &out)
        };
        let (numbers_of_form, judge) = (numbers(form)?, numbers(MoeForm::COMPOSED)?);
        assert!(judge.iter().any(|x| *x != 0.0), "a trial of experts of which none is chosen");
        Ok(agree(&numbers_of_form, &judge, dtype))
    })
}

#[cfg(test)]
mod tests {
    use baton_device::Groups;

    use super::*;
    use crate::object::{Address, View};

    fn layer(count: usize, [hidden, inner]: [usize; 2], dtype: DataType, routing: Routing) -> ExpertsView {
        ExpertsView {
            gate_up: View::new(Address(512), dtype, &[count, 2 * inner, hidden]),
            down: View::new(Address(512), dtype, &[count, hidden, inner]),
            held: 0..count,
            count,
            bias: None,
            places: None,
            routing,
        }
    }

    fn softmax(norm_topk_prob: bool) -> Routing {
        Routing {
            top_k: 8,
            scoring: Scoring::Softmax,
            groups: None,
            norm_topk_prob,
            scaling_factor: 1.0,
            by_token: None,
        }
    }

    fn sigmoid(count: usize, groups: Groups) -> Routing {
        let scoring = Scoring::Sigmoid { correction_bias: vec![0.0; count] };
        Routing { top_k: 8, scoring, groups: Some(groups), norm_topk_prob: true, scaling_factor: 2.5, by_token: None }
    }

    /// The first form that no limit excludes.
    fn best(chip: Chip, layer: &ExpertsView) -> MoeForm {
        candidates(chip, false, layer).into_iter().find(|c| c.objection.is_none()).expect("the composed form").form
    }

    #[test]
    fn limits_of_the_chip_and_of_each_operator_exclude_forms() {
        let (bf16, f16, grouped) = (DataType::BF16, DataType::F16, Products::Grouped);
        let deepseek = sigmoid(256, Groups { count: 8, kept: 4, score: GroupScore::TwoBest });
        let form = |gating, products| MoeForm { gating, products };
        for (chip, layer, expected) in [
            (Chip::A2, layer(256, [7168, 2048], bf16, deepseek.clone()), form(Gating::TopK, grouped)),
            (Chip::A3, layer(128, [2048, 768], bf16, softmax(true)), form(Gating::TopKSoftmax, grouped)),
            (Chip::P310, layer(256, [7168, 2048], f16, deepseek.clone()), form(Gating::Host, grouped)),
            (Chip::P310, layer(128, [2048, 768], f16, softmax(true)), form(Gating::Composed, grouped)),
            (Chip::P310, layer(128, [2048, 768], DataType::F32, softmax(true)), MoeForm::COMPOSED),
            (Chip::P310, layer(8, [2050, 768], f16, softmax(true)), MoeForm::COMPOSED),
            (Chip::P310, layer(8, [2048, 760], f16, softmax(true)), MoeForm::COMPOSED),
            (Chip::A2, layer(8, [65_536, 768], bf16, softmax(true)), MoeForm::COMPOSED),
            (
                Chip::A2,
                layer(256, [64, 64], bf16, Routing { norm_topk_prob: false, ..deepseek.clone() }),
                form(Gating::Host, grouped),
            ),
            // Two experts to a group are no more than the two that a group is worth by.
            (
                Chip::A2,
                layer(16, [64, 64], bf16, sigmoid(16, Groups { count: 16, kept: 8, score: GroupScore::TwoBest })),
                form(Gating::Host, grouped),
            ),
        ] {
            assert_eq!(best(chip, &layer), expected, "{chip} {:?}", layer.down.dims);
        }
    }

    #[test]
    fn strict_numbers_take_the_composed_form() {
        let all = candidates(Chip::A2, true, &layer(8, [64, 32], DataType::BF16, softmax(true)));
        let left: Vec<_> = all.iter().filter(|c| c.objection.is_none()).collect();
        assert!(left.len() == 1 && left[0].form == MoeForm::COMPOSED);
    }
}
