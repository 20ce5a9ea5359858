//! Products of groups of rows, each with a matrix of its own.

use super::view::{matrix, narrow, shaped, store};
use crate::{
    array::{Chip, Fault, Refusal},
    limits::{GROUPED_WIDTH_BELOW, Seen, check, fits, valid},
    math::{
        matmul::{Order, matmul},
        moe::group_ends,
    },
    op::{Kernel, Out, Tensor, operator},
    runtime::Runtime,
};

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
                let columns = rt.load(&weight.at(e as i64).transposed())?.data;
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

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::ops::bench::{Bench, F16, I32, I64};

    /// One tensor each, and everything optional left out.
    pub fn grouped(x: &Tensor, weight: &Tensor, list: &Tensor, out: &Out, group_list_type: i64) -> GroupedMatmulV4 {
        GroupedMatmulV4 {
            x: vec![x.clone()],
            weight: vec![weight.clone()],
            bias: None,
            scale: None,
            offset: None,
            antiquant_scale: None,
            antiquant_offset: None,
            per_token_scale: None,
            group_list: Some(list.clone()),
            activation_input: None,
            activation_quant_scale: None,
            activation_quant_offset: None,
            split_item: 3,
            group_type: 0,
            group_list_type,
            act_type: 0,
            out: vec![out.clone()],
            activation_feature_out: None,
            dyn_quant_scale_out: None,
        }
    }

    #[test]
    fn rows_after_the_last_group_are_left_and_a_turned_weight_is_taken() {
        let b = Bench::new(Chip::A2);
        let (x, stored) = (
            b.floats(&[3, 2], F16, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            b.floats(&[2, 1, 2], F16, &[1.0, 10.0, 2.0, 20.0]),
        );
        let (list, out) = (b.ints(&[2], I64, &[1, 1]), Out(b.floats(&[3, 1], F16, &[-1.0; 3])));
        b.run(&grouped(&x, &stored.transposed(), &list, &out, 1)).unwrap();
        assert_eq!(b.read(&out), [21.0, 86.0, -1.0]);
        let far = b.ints(&[2], I64, &[1, 3]);
        assert!(matches!(b.run(&grouped(&x, &stored.transposed(), &far, &out, 1)), Err(Fault::OutOfRange(_))));
        let falling = b.ints(&[2], I64, &[2, 1]);
        assert!(matches!(b.run(&grouped(&x, &stored.transposed(), &falling, &out, 0)), Err(Fault::OutOfRange(_))));
    }

    #[test]
    fn a_grouped_product_is_bounded_in_width_and_takes_int64_lists() {
        let b = Bench::new(Chip::A2);
        for (k, n, list, want) in
            [(65_535, 1, I64, 0), (65_536, 1, I64, 561_002), (1, 65_536, I64, 561_002), (4, 4, I32, 161_002)]
        {
            let (x, weight, out) = (b.empty(&[1, k], F16), b.empty(&[1, k, n], F16), b.out(&[1, n], F16));
            let list = b.empty(&[1], list);
            assert_eq!(b.check(&grouped(&x, &weight, &list, &out, 0)), want, "{k} {n}");
        }
        let (x, weight, out) = (b.empty(&[4, 4], F16), b.empty(&[1, 4, 4], F16), b.out(&[4, 4], F16));
        let list = b.empty(&[1], I64);
        assert_eq!(b.check(&grouped(&x.transposed(), &weight, &list, &out, 0)), 161_002);
    }
}
