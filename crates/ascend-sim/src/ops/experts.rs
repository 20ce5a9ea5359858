//! Mixture of experts: choosing experts, bringing tokens to them, their products, and adding up.

use super::view::{copy, fix, narrow, shaped, store, store_ints};
use crate::{
    array::{Chip, Fault, Refusal},
    limits::{
        GATE_EXPERTS_MAX, GATE_GROUP_PAD, GATE_SOFTMAX_K_MAX, GROUPED_WIDTH_BELOW, Seen, check, fits, numbers, valid,
    },
    math::{
        matmul::{Order, matmul},
        moe::{Gate, dispatch, group_ends, softmax_top_k},
        moves::row,
    },
    op::{Kernel, Out, Tensor, operator},
    runtime::Runtime,
};

/// Refuses what is no matrix; its two dimensions.
fn matrix(what: &str, x: &Tensor) -> Result<[i64; 2], Refusal> {
    valid(x.rank() == 2, || format!("{what} {:?}: two dimensions", x.dims))?;
    Ok([x.dims[0], x.dims[1]])
}

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

operator! {
    /// Rows repeated once for each chosen expert and sorted by expert, where each went, and how many each expert has.
    MoeInitRoutingV2 = aclnnMoeInitRoutingV2, aclnnMoeInitRoutingV2GetWorkspaceSize (
        x: Tensor,
        expert_idx: Tensor,
        active_num: i64,
        expert_capacity: i64,
        expert_num: i64,
        drop_pad_mode: i64,
        expert_tokens_count_or_cumsum_flag: i64,
        expert_tokens_before_capacity_flag: bool,
        expanded_x_out: Out,
        expanded_row_idx_out: Out,
        expert_tokens_count_or_cumsum_out: Option<Out>,
        expert_tokens_before_capacity_out: Option<Out>,
    )
}

impl Kernel for MoeInitRoutingV2 {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        let tensors: [&dyn Seen; 6] = [
            &self.x,
            &self.expert_idx,
            &self.expanded_x_out,
            &self.expanded_row_idx_out,
            &self.expert_tokens_count_or_cumsum_out,
            &self.expert_tokens_before_capacity_out,
        ];
        check(chip, "MoeInitRoutingV2", &tensors)?;
        let all = self.active_num == 0 && self.expert_capacity == 0 && self.drop_pad_mode == 0;
        let capacity = self.expert_tokens_before_capacity_flag || self.expert_tokens_before_capacity_out.is_some();
        fits(all && !capacity, || "only routing that drops no token is simulated".to_owned())?;
        let ([tokens, width], [rows, k]) = (matrix("x", &self.x)?, matrix("expertIdx", &self.expert_idx)?);
        valid(rows == tokens, || format!("expertIdx of {rows} rows for {tokens} tokens"))?;
        shaped("expandedXOut", &self.expanded_x_out, &[tokens * k, width])?;
        shaped("expandedRowIdxOut", &self.expanded_row_idx_out, &[tokens * k])?;
        match (self.expert_tokens_count_or_cumsum_flag, &self.expert_tokens_count_or_cumsum_out) {
            (0, _) => Ok(()),
            (1 | 2, Some(out)) => shaped("expertTokensCountOrCumsumOut", out, &[self.expert_num]),
            (flag, _) => valid(false, || format!("expertTokensCountOrCumsumFlag {flag}: 0, or 1 or 2 with an output")),
        }
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let experts = rt.load_ints(&self.expert_idx)?;
        let (places, counts) = dispatch(&experts.data, self.expert_num as usize)?;
        for (choice, &place) in places.iter().enumerate() {
            let token = fix(&self.x, 0..1, choice / experts.dims[1]);
            copy(rt, &token, &fix(&self.expanded_x_out, 0..1, place))?;
        }
        store_ints(rt, &self.expanded_row_idx_out, places.into_iter().map(|p| p as i64))?;
        let cumulative = self.expert_tokens_count_or_cumsum_flag == 1;
        match &self.expert_tokens_count_or_cumsum_out {
            Some(out) if self.expert_tokens_count_or_cumsum_flag != 0 => {
                let mut sum = 0;
                let told = counts.into_iter().map(|n| {
                    sum = if cumulative { sum + n as i64 } else { n as i64 };
                    sum
                });
                store_ints(rt, out, told)
            }
            _ => Ok(()),
        }
    }
}

operator! {
    /// For each token, the weighted sum of what its experts gave; with biases of experts, and up to two further tensors.
    MoeFinalizeRoutingV2 = aclnnMoeFinalizeRoutingV2, aclnnMoeFinalizeRoutingV2GetWorkspaceSize (
        expanded_x: Tensor,
        expanded_row_idx: Tensor,
        x1: Option<Tensor>,
        x2: Option<Tensor>,
        bias: Option<Tensor>,
        scales: Option<Tensor>,
        expert_idx: Option<Tensor>,
        drop_pad_mode: i64,
        out: Out,
    )
}

impl Kernel for MoeFinalizeRoutingV2 {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        let tensors: [&dyn Seen; 8] = [
            &self.expanded_x,
            &self.expanded_row_idx,
            &self.x1,
            &self.x2,
            &self.bias,
            &self.scales,
            &self.expert_idx,
            &self.out,
        ];
        check(chip, "MoeFinalizeRoutingV2", &tensors)?;
        let ([choices, width], [tokens, _]) = (matrix("expandedX", &self.expanded_x)?, matrix("out", &self.out)?);
        shaped("out", &self.out, &[tokens, width])?;
        let k = choices / tokens;
        valid(choices == k * tokens, || format!("{choices} rows for {tokens} tokens"))?;
        let (step, modes) = (numbers(chip).finalize_width_step, numbers(chip).finalize_modes);
        fits(width % step == 0, || format!("a width of {width}: a multiple of {step}"))?;
        valid(modes.contains(&self.drop_pad_mode), || format!("dropPadMode {}: one of {modes:?}", self.drop_pad_mode))?;
        shaped("expandedRowIdx", &self.expanded_row_idx, &[choices])?;
        for (what, added) in [("x1", &self.x1), ("x2", &self.x2)] {
            added.as_ref().map_or(Ok(()), |x| shaped(what, x, &[tokens, width]))?;
        }
        valid(self.x2.is_none() || self.x1.is_some(), || "x2 without x1".to_owned())?;
        valid(self.scales.is_some() || k == 1, || format!("no scales for {k} experts of each token"))?;
        for (what, chosen) in [("scales", &self.scales), ("expertIdx", &self.expert_idx)] {
            chosen.as_ref().map_or(Ok(()), |x| shaped(what, x, &[tokens, k]))?;
        }
        let Some(bias) = &self.bias else { return Ok(()) };
        valid(self.expert_idx.is_some(), || "bias without expertIdx".to_owned())?;
        let [experts, _] = matrix("bias", bias)?;
        shaped("bias", bias, &[experts, width])
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let (x, places) = (rt.load(&self.expanded_x)?, rt.load_ints(&self.expanded_row_idx)?.data);
        let load = |x: &Option<Tensor>| x.as_ref().map(|x| rt.load(x)).transpose();
        let (x1, x2, bias, scales) = (load(&self.x1)?, load(&self.x2)?, load(&self.bias)?, load(&self.scales)?);
        let experts = self.expert_idx.as_ref().map(|e| rt.load_ints(e)).transpose()?;
        let (choices, width, tokens) = (x.dims[0], x.dims[1], self.out.dims[0] as usize);
        let k = choices / tokens;
        let mut out = Vec::with_capacity(tokens * width);
        for token in 0..tokens {
            let mut sum = vec![0.0f64; width];
            for added in [&x1, &x2].into_iter().flatten() {
                sum.iter_mut().zip(&added.data[token * width..]).for_each(|(s, &a)| *s += f64::from(a));
            }
            for choice in 0..k {
                // Mode 2 counts the choices of a token together, mode 0 first all first choices.
                let at = if self.drop_pad_mode == 2 { token * k + choice } else { choice * tokens + token };
                let given = row(places[at], choices, "row")? * width;
                let scale = scales.as_ref().map_or(1.0, |s| f64::from(s.data[token * k + choice]));
                let bias = match (&bias, &experts) {
                    (Some(b), Some(e)) => &b.data[row(e.data[token * k + choice], b.dims[0], "expert")? * width..][..width],
                    _ => &[],
                };
                let biases = bias.iter().copied().chain(std::iter::repeat(0.0));
                let terms = x.data[given..given + width].iter().zip(biases);
                sum.iter_mut().zip(terms).for_each(|(s, (&g, b))| *s += scale * f64::from(g + b));
            }
            out.extend(sum.into_iter().map(|s| s as f32));
        }
        store(rt, &self.out, out)
    }
}

operator! {
    /// Groups of rows, each times its own matrix. Rows after the last group are left as they are.
    GroupedMatmulV4 = aclnnGroupedMatmulV4, aclnnGroupedMatmulV4GetWorkspaceSize (
        x: Vec<Tensor>,
        weight: Vec<Tensor>,
        bias: Option<Vec<Tensor>>,
        scale: Option<Vec<Tensor>>,
        offset: Option<Vec<Tensor>>,
        antiquant_scale: Option<Vec<Tensor>>,
        antiquant_offset: Option<Vec<Tensor>>,
        per_token_scale: Option<Vec<Tensor>>,
        group_list: Option<Tensor>,
        activation_input: Option<Vec<Tensor>>,
        activation_quant_scale: Option<Vec<Tensor>>,
        activation_quant_offset: Option<Vec<Tensor>>,
        split_item: i64,
        group_type: i64,
        group_list_type: i64,
        act_type: i64,
        out: Vec<Out>,
        activation_feature_out: Option<Vec<Out>>,
        dyn_quant_scale_out: Option<Vec<Out>>,
    )
}

impl Kernel for GroupedMatmulV4 {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        let one = [self.x.len(), self.weight.len(), self.out.len()] == [1; 3];
        fits(one, || "only one tensor each in x, weight and out is simulated".to_owned())?;
        let bias = self.bias.as_ref().and_then(|b| b.first());
        let (x, weight, out) = (&self.x[0], &self.weight[0], &self.out[0]);
        check(chip, "GroupedMatmulV4", &[x, weight, &bias.cloned(), &self.group_list, out as &dyn Seen])?;
        let others = [
            &self.scale,
            &self.offset,
            &self.antiquant_scale,
            &self.antiquant_offset,
            &self.per_token_scale,
            &self.activation_input,
            &self.activation_quant_scale,
            &self.activation_quant_offset,
        ];
        let plain = others.iter().all(|o| o.is_none())
            && self.activation_feature_out.is_none()
            && self.dyn_quant_scale_out.is_none();
        fits(plain, || "quantised experts are not simulated".to_owned())?;
        valid([2, 3].contains(&self.split_item), || format!("splitItem {} for one output: 2 or 3", self.split_item))?;
        let by_rows = self.group_type == 0 && self.act_type == 0;
        fits(by_rows, || format!("groupType {} and actType {}: 0 is simulated", self.group_type, self.act_type))?;
        valid([0, 1].contains(&self.group_list_type), || format!("groupListType {}: 0 or 1", self.group_list_type))?;
        let [rows, k] = matrix("x", x)?;
        valid(x.strides[1] == 1, || format!("x with strides {:?} is transposed", x.strides))?;
        let w = &weight.dims;
        valid(w.len() == 3 && w[1] == k, || format!("weight {w:?}: [experts, {k}, columns]"))?;
        let widest = k.max(w[2]);
        fits(widest < GROUPED_WIDTH_BELOW, || format!("a width of {widest}: below {GROUPED_WIDTH_BELOW}"))?;
        shaped("out", out, &[rows, w[2]])?;
        bias.map_or(Ok(()), |bias| shaped("bias", bias, &[w[0], w[2]]))?;
        valid(self.group_list.is_some(), || "groupList is needed".to_owned())?;
        self.group_list.as_ref().map_or(Ok(()), |list| shaped("groupList", list, &w[..1]))
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let (x, weight, out) = (rt.load(&self.x[0])?, &self.weight[0], &self.out[0]);
        let list = rt.load_ints(self.group_list.as_ref().expect("checked in phase 1"))?.data;
        let (rows, k) = (x.dims[0], x.dims[1]);
        let bias = self.bias.as_ref().and_then(|b| b.first()).map(|b| rt.load(b)).transpose()?;
        let order = Order::of(rt.perturb, rows);
        let mut start = 0;
        for (e, end) in group_ends(&list, self.group_list_type == 0, rows)?.into_iter().enumerate() {
            if end > start {
                let columns = rt.load(&fix(weight, 0..1, e).transposed())?.data;
                let mut product = matmul(&x.data[start * k..end * k], &columns, k, order);
                if let Some(bias) = &bias {
                    let n = bias.dims[1];
                    let row = &bias.data[e * n..][..n];
                    product.chunks_exact_mut(n).for_each(|p| p.iter_mut().zip(row).for_each(|(p, b)| *p += b));
                }
                store(rt, &narrow(out, 0, start, end - start), product)?;
            }
            start = end;
        }
        Ok(())
    }
}
