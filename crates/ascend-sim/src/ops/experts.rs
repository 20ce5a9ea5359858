//! Mixture of experts: bringing tokens to their experts, and adding up what these give.

use super::view::{copy, matrix, shaped, store, store_ints};
use crate::{
    array::{Chip, Fault, Refusal},
    limits::{Seen, check, fits, numbers, valid},
    math::{moe::dispatch, moves::row},
    op::{Kernel, Out, Tensor, operator},
    runtime::Runtime,
};

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
            let token = self.x.at((choice / experts.dims[1]) as i64);
            copy(rt, &token, &self.expanded_x_out.at(place as i64))?;
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
                    (Some(b), Some(e)) => {
                        &b.data[row(e.data[token * k + choice], b.dims[0], "expert")? * width..][..width]
                    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        bench::{BF16, Bench, F16, I32, I64, near, numbers},
        grouped::tests::grouped,
    };

    fn routed(b: &Bench, x: &Tensor, experts: &[i64], flag: i64) -> MoeInitRoutingV2 {
        let (tokens, width) = (x.dims[0], x.dims[1]);
        MoeInitRoutingV2 {
            x: x.clone(),
            expert_idx: b.ints(&[tokens, experts.len() as i64 / tokens], I32, experts),
            active_num: 0,
            expert_capacity: 0,
            expert_num: 3,
            drop_pad_mode: 0,
            expert_tokens_count_or_cumsum_flag: flag,
            expert_tokens_before_capacity_flag: false,
            expanded_x_out: b.out(&[experts.len() as i64, width], BF16),
            expanded_row_idx_out: b.out(&[experts.len() as i64], I32),
            expert_tokens_count_or_cumsum_out: Some(b.out(&[3], I32)),
            expert_tokens_before_capacity_out: None,
        }
    }

    #[test]
    fn tokens_meet_their_experts_and_come_back_weighed() {
        let b = Bench::new(Chip::A2);
        let x = b.floats(&[2, 32], BF16, &numbers(64, 1));
        let chosen = [2, 0, 0, 1];
        for (flag, told) in [(1, [2, 3, 4]), (2, [2, 1, 1])] {
            let route = routed(&b, &x, &chosen, flag);
            b.run(&route).unwrap();
            let counts = route.expert_tokens_count_or_cumsum_out.as_ref().unwrap();
            assert_eq!(b.read_ints(counts), told);
            assert_eq!(b.read_ints(&route.expanded_row_idx_out), [3, 0, 1, 2]);

            // Expert e multiplies by e + 1.
            let weight = b.empty(&[3, 32, 32], BF16);
            let scaled: Vec<f32> =
                (0..3 * 1024).map(|i| if i % 1024 / 32 == i % 32 { (i / 1024 + 1) as f32 } else { 0.0 }).collect();
            b.fill(&weight, &scaled);
            let (list, out) = (b.ints(&[3], I64, &told), b.out(&[4, 32], BF16));
            b.run(&grouped(&route.expanded_x_out, &weight, &list, &out, flag - 1)).unwrap();
            let scales = b.floats(&[2, 2], BF16, &[0.5, 0.5, 1.0, 2.0]);
            let result = b.out(&[2, 32], BF16);
            let finalize = |mode, idx: &Tensor| MoeFinalizeRoutingV2 {
                expanded_x: out.0.clone(),
                expanded_row_idx: idx.clone(),
                x1: Some(x.clone()),
                x2: None,
                bias: None,
                scales: Some(scales.clone()),
                expert_idx: Some(route.expert_idx.clone()),
                drop_pad_mode: mode,
                out: result.clone(),
            };
            let data = b.read(&x);
            let want: Vec<f32> = data
                .iter()
                .enumerate()
                .map(|(i, v)| v + if i < 32 { (1.5 + 0.5) * v } else { (1.0 + 2.0 * 2.0) * v })
                .collect();
            b.run(&finalize(2, &route.expanded_row_idx_out)).unwrap();
            assert!(near(&b.read(&result), &want, 0.01));
            // The older order lists all first choices, then all second ones.
            let columns = b.ints(&[4], I32, &[3, 1, 0, 2]);
            b.run(&finalize(0, &columns)).unwrap();
            assert!(near(&b.read(&result), &want, 0.01));
            let far = b.ints(&[4], I32, &[3, 0, 1, 4]);
            assert!(matches!(b.run(&finalize(2, &far)), Err(Fault::OutOfRange(_))));
            assert_eq!(b.check(&finalize(1, &far)), 161_002);
        }
        let bad = routed(&b, &x, &[0, 1, 2, 3], 2);
        assert!(matches!(b.run(&bad), Err(Fault::OutOfRange(_))));
    }

    #[test]
    fn adding_up_on_310p_needs_whole_32s_and_mode_2() {
        for (chip, width, mode, want) in
            [(Chip::A2, 33, 0, 0), (Chip::P310, 32, 2, 0), (Chip::P310, 33, 2, 561_002), (Chip::P310, 32, 0, 161_002)]
        {
            let b = Bench::new(chip);
            let op = MoeFinalizeRoutingV2 {
                expanded_x: b.empty(&[4, width], F16),
                expanded_row_idx: b.empty(&[4], I32),
                x1: None,
                x2: None,
                bias: None,
                scales: Some(b.empty(&[2, 2], F16)),
                expert_idx: None,
                drop_pad_mode: mode,
                out: b.out(&[2, width], F16),
            };
            assert_eq!(b.check(&op), want, "{chip:?} {width} {mode}");
        }
    }
}
