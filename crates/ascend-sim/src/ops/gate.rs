//! Mixture of experts: which experts a token goes to, and how much each weighs.

use super::view::{matrix, shaped, store, store_ints};
use crate::{
    array::{Chip, Fault, Refusal},
    limits::{GATE_EXPERTS_MAX, GATE_GROUP_PAD, GATE_SOFTMAX_K_MAX, Seen, check, fits, valid},
    math::moe::{Gate, softmax_top_k},
    op::{Kernel, Out, Tensor, operator},
    runtime::Runtime,
};

operator! {
    /// Experts by softmax or sigmoid scores, perhaps from the best groups only.
    MoeGatingTopK = aclnnMoeGatingTopK, aclnnMoeGatingTopKGetWorkspaceSize (
        x: Tensor,
        bias: Option<Tensor>,
        k: i64,
        k_group: i64,
        group_count: i64,
        group_select_mode: i64,
        renorm: i64,
        norm_type: i64,
        out_flag: bool,
        routed_scaling_factor: f64,
        eps: f64,
        y_out: Out,
        expert_idx_out: Out,
        out_out: Out,
    )
}

impl Kernel for MoeGatingTopK {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "MoeGatingTopK", &[&self.x, &self.bias, &self.y_out, &self.expert_idx_out, &self.out_out])?;
        let [tokens, experts] = matrix("x", &self.x)?;
        if let Some(bias) = &self.bias {
            shaped("bias", bias, &[experts])?;
        }
        let modes = [self.group_select_mode, self.norm_type];
        valid(modes.iter().all(|m| [0, 1].contains(m)), || format!("groupSelectMode and normType {modes:?}: 0 or 1"))?;
        valid(self.renorm == 0, || format!("renorm {}: 0", self.renorm))?;
        let (k, kept, groups) = (self.k, self.k_group, self.group_count);
        fits(experts <= GATE_EXPERTS_MAX, || format!("{experts} experts: at most {GATE_EXPERTS_MAX}"))?;
        valid(groups > 0 && experts % groups == 0, || format!("{experts} experts in {groups} groups"))?;
        let size = experts / groups;
        fits(size > self.group_select_mode, || format!("groups of {size} with groupSelectMode {}", modes[0]))?;
        let padded = (size + GATE_GROUP_PAD - 1) / GATE_GROUP_PAD * GATE_GROUP_PAD * groups;
        fits(padded <= GATE_EXPERTS_MAX, || format!("{groups} padded groups of {size} make {padded} experts"))?;
        valid((1..=groups).contains(&kept), || format!("kGroup {kept} of {groups}"))?;
        valid((1..=kept * size).contains(&k), || format!("k {k} of {kept} groups of {size}"))?;
        shaped("yOut", &self.y_out, &[tokens, k])?;
        shaped("expertIdxOut", &self.expert_idx_out, &[tokens, k])?;
        shaped("outOut", &self.out_out, &[tokens, experts])
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let gate = Gate {
            k: self.k as usize,
            groups: self.group_count as usize,
            kept_groups: self.k_group as usize,
            two_best: self.group_select_mode == 1,
            sigmoid: self.norm_type == 1,
            scale: self.routed_scaling_factor,
            epsilon: self.eps,
        };
        let x = rt.load(&self.x)?;
        let bias = self.bias.as_ref().map(|bias| rt.load(bias)).transpose()?;
        let (mut weights, mut experts, mut scores) = (Vec::new(), Vec::new(), Vec::new());
        for logits in x.data.chunks_exact(x.dims[1]) {
            let (chosen, weighed, all) = gate.choose(logits, bias.as_ref().map(|b| &b.data[..]));
            experts.extend(chosen.into_iter().map(|e| e as i64));
            weights.extend(weighed);
            scores.extend(all);
        }
        store(rt, &self.y_out, weights)?;
        store_ints(rt, &self.expert_idx_out, experts)?;
        if self.out_flag { store(rt, &self.out_out, scores) } else { Ok(()) }
    }
}

operator! {
    /// Experts by softmax scores: the softmax over all (`renorm` 0) or over the chosen (1).
    MoeGatingTopKSoftmaxV2 = aclnnMoeGatingTopKSoftmaxV2, aclnnMoeGatingTopKSoftmaxV2GetWorkspaceSize (
        x: Tensor,
        finished: Option<Tensor>,
        k: i64,
        renorm: i64,
        output_softmax_result_flag: bool,
        y_out: Out,
        expert_idx_out: Out,
        softmax_result_out: Option<Out>,
    )
}

impl Kernel for MoeGatingTopKSoftmaxV2 {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        let tensors: [&dyn Seen; 5] =
            [&self.x, &self.finished, &self.y_out, &self.expert_idx_out, &self.softmax_result_out];
        check(chip, "MoeGatingTopKSoftmaxV2", &tensors)?;
        let [tokens, experts] = matrix("x", &self.x)?;
        let plain = self.finished.is_none() && !self.output_softmax_result_flag && self.softmax_result_out.is_none();
        fits(plain, || "finished tokens and the softmax's own result are not simulated".to_owned())?;
        valid([0, 1].contains(&self.renorm), || format!("renorm {}: 0 or 1", self.renorm))?;
        valid((1..=experts).contains(&self.k), || format!("k {} of {experts} experts", self.k))?;
        fits(self.k <= GATE_SOFTMAX_K_MAX, || format!("k {}: at most {GATE_SOFTMAX_K_MAX}", self.k))?;
        shaped("yOut", &self.y_out, &[tokens, self.k])?;
        shaped("expertIdxOut", &self.expert_idx_out, &[tokens, self.k])
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let x = rt.load(&self.x)?;
        let rows = x.data.chunks_exact(x.dims[1]);
        let (experts, weights): (Vec<_>, Vec<_>) =
            rows.map(|logits| softmax_top_k(logits, self.k as usize, self.renorm == 1)).unzip();
        store(rt, &self.y_out, weights.concat())?;
        store_ints(rt, &self.expert_idx_out, experts.into_iter().flatten().map(|e| e as i64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::bench::{Bench, F16, F32, I32, near, numbers};

    fn gate(b: &Bench, tokens: i64, experts: i64, k: i64) -> MoeGatingTopK {
        MoeGatingTopK {
            x: b.floats(&[tokens, experts], F32, &numbers((tokens * experts) as usize, 1)),
            bias: None,
            k,
            k_group: 1,
            group_count: 1,
            group_select_mode: 0,
            renorm: 0,
            norm_type: 1,
            out_flag: true,
            routed_scaling_factor: 2.0,
            eps: 1e-20,
            y_out: b.out(&[tokens, k], F32),
            expert_idx_out: b.out(&[tokens, k], I32),
            out_out: b.out(&[tokens, experts], F32),
        }
    }

    #[test]
    fn the_best_experts_are_chosen_and_their_weights_sum_to_the_factor() {
        let b = Bench::new(Chip::A2);
        let op = gate(&b, 3, 8, 2);
        b.run(&op).unwrap();
        let (weights, experts, scores) = (b.read(&op.y_out), b.read_ints(&op.expert_idx_out), b.read(&op.out_out));
        for t in 0..3 {
            assert!((weights[t * 2] + weights[t * 2 + 1] - 2.0).abs() < 1e-5);
            let best = scores[t * 8..][..8].iter().copied().fold(f32::MIN, f32::max);
            assert_eq!(scores[t * 8 + experts[t * 2] as usize], best);
        }
    }

    #[test]
    fn a_gate_is_bounded_in_experts_groups_and_choices() {
        let b = Bench::new(Chip::A2);
        // Experts, groups, kept groups, whether a group is worth its two best, k.
        for (experts, groups, kept, two, k, want) in [
            (8, 4, 2, 1, 2, 0),
            (2048, 1, 1, 0, 8, 0),
            (2049, 1, 1, 0, 8, 561_002),
            (8, 3, 1, 0, 2, 161_002),
            (8, 8, 2, 1, 2, 561_002),
            (8, 8, 2, 0, 2, 0),
            (256, 64, 2, 0, 2, 0),
            (256, 65, 2, 0, 2, 161_002),
            (260, 65, 2, 0, 2, 561_002),
            (8, 4, 2, 1, 4, 0),
            (8, 4, 2, 1, 5, 161_002),
            (8, 4, 5, 1, 2, 161_002),
        ] {
            let op =
                MoeGatingTopK { group_count: groups, k_group: kept, group_select_mode: two, ..gate(&b, 1, experts, k) };
            assert_eq!(b.check(&op), want, "{experts} {groups} {kept} {two} {k}");
        }
        let op = gate(&b, 1, 8, 2);
        assert_eq!(Bench::new(Chip::P310).check(&op), 561_003);
        let narrow = b.empty(&[8], F16);
        assert_eq!(b.check(&MoeGatingTopK { bias: Some(narrow), ..op }), 161_002);
    }

    #[test]
    fn softmax_gates_weigh_before_or_after_the_choice() {
        let b = Bench::new(Chip::A2);
        let x = b.floats(&[1, 4], F32, &[0.0, 2.0f32.ln(), 0.0, 4.0f32.ln()]);
        for (renorm, want) in [(0, [0.5, 0.25]), (1, [2.0 / 3.0, 1.0 / 3.0])] {
            let op = |k, y_out: &Out, expert_idx_out: &Out| MoeGatingTopKSoftmaxV2 {
                x: x.clone(),
                finished: None,
                k,
                renorm,
                output_softmax_result_flag: false,
                y_out: y_out.clone(),
                expert_idx_out: expert_idx_out.clone(),
                softmax_result_out: None,
            };
            let (y, idx) = (b.out(&[1, 2], F32), b.out(&[1, 2], I32));
            b.run(&op(2, &y, &idx)).unwrap();
            assert!(near(&b.read(&y), &want, 1e-6));
            assert_eq!(b.read_ints(&idx), [3, 1]);
            assert_eq!(b.check(&op(5, &y, &idx)), 161_002);
        }
    }

    #[test]
    fn a_softmax_gate_chooses_at_most_1024() {
        let b = Bench::new(Chip::A2);
        for (k, want) in [(1024, 0), (1025, 561_002)] {
            let op = MoeGatingTopKSoftmaxV2 {
                x: b.empty(&[1, 2000], F32),
                finished: None,
                k,
                renorm: 0,
                output_softmax_result_flag: false,
                y_out: b.out(&[1, k], F32),
                expert_idx_out: b.out(&[1, k], I32),
                softmax_result_out: None,
            };
            assert_eq!(b.check(&op), want, "{k}");
        }
    }
}
