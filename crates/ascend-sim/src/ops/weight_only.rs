//! Products whose weight is kept in few bits.

use super::view::{shaped, store};
use crate::{
    array::{Chip, Fault, Refusal},
    constants::*,
    limits::{QUANT_GROUP_STEP, QUANT_MATRIX_MAX, Seen, check, fits, numbers, valid},
    math::{
        matmul::{Order, matmul},
        quant::{Shared, dequantize, unpack_int4},
    },
    op::{Kernel, Out, Tensor, operator},
    runtime::Runtime,
};

operator! {
    /// A product whose weight is kept as integers with scales: `(w + offset) * scale`.
    WeightQuantBatchMatmulV2 = aclnnWeightQuantBatchMatmulV2, aclnnWeightQuantBatchMatmulV2GetWorkspaceSize (
        x: Tensor,
        weight: Tensor,
        antiquant_scale: Tensor,
        antiquant_offset: Option<Tensor>,
        quant_scale: Option<Tensor>,
        quant_offset: Option<Tensor>,
        bias: Option<Tensor>,
        antiquant_group_size: i32,
        y: Out,
    )
}

impl WeightQuantBatchMatmulV2 {
    /// Whether each element of the weight holds eight values.
    fn packed(&self) -> bool {
        i64::from(self.weight.dtype) == ACL_INT32
    }

    /// Whether the weight is stored by columns, its view turned.
    fn turned(&self) -> bool {
        !self.weight.is_contiguous()
    }

    /// Rows and columns of the weight.
    fn sizes(&self) -> [i64; 2] {
        let [k, n] = [self.weight.dims[0], self.weight.dims[1]];
        match (self.packed(), self.turned()) {
            (false, _) => [k, n],
            (true, true) => [k * 8, n],
            (true, false) => [k, n * 8],
        }
    }

    fn shared(&self, chip: Chip) -> Result<Shared, Refusal> {
        let ([k, n], scale, group) = (self.sizes(), &self.antiquant_scale.dims, i64::from(self.antiquant_group_size));
        if group != 0 {
            fits(numbers(chip).quant_groups, || "groups are not taken on this chip".to_owned())?;
            let step = QUANT_GROUP_STEP;
            let size = group % step == 0 && (step..k).contains(&group);
            valid(size, || format!("antiquantGroupSize {group}: 0, or a multiple of {step} below {k}"))?;
            shaped("antiquantScale", &self.antiquant_scale, &[(k + group - 1) / group, n])?;
            return Ok(Shared::Group(group as usize));
        }
        let accepted: [&[i64]; 2] = if chip == Chip::P310 { [&[n], &[n, 1]] } else { [&[n], &[1, n]] };
        if accepted.contains(&&scale[..]) {
            return Ok(Shared::Channel);
        }
        let one = scale[..] == [1] && numbers(chip).quant_groups;
        valid(one, || format!("antiquantScale {scale:?} for {n} columns"))?;
        Ok(Shared::Tensor)
    }
}

impl Kernel for WeightQuantBatchMatmulV2 {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        let tensors: [&dyn Seen; 6] =
            [&self.x, &self.weight, &self.antiquant_scale, &self.antiquant_offset, &self.bias, &self.y];
        check(chip, "WeightQuantBatchMatmulV2", &tensors)?;
        let plain = self.quant_scale.is_none() && self.quant_offset.is_none();
        fits(plain, || "an output of bytes is not simulated".to_owned())?;
        let matrices = self.x.rank() == 2 && self.weight.rank() == 2;
        valid(matrices, || format!("{:?} x {:?}: two matrices", self.x.dims, self.weight.dims))?;
        let whole = self.weight.is_contiguous() || self.weight.transposed().is_contiguous();
        valid(whole, || format!("weight with strides {:?}: contiguous, or turned", self.weight.strides))?;
        let ([k, n], m) = (self.sizes(), self.x.dims[0]);
        fits(k.max(n) <= QUANT_MATRIX_MAX, || format!("a weight [{k}, {n}]: at most {QUANT_MATRIX_MAX} each"))?;
        let inner = if self.turned() { k } else { n };
        let narrow = i64::from(self.weight.dtype) == ACL_INT4;
        valid(!narrow || inner % 2 == 0, || format!("four-bit rows of {inner}: an even number"))?;
        shaped("x", &self.x, &[m, k])?;
        self.shared(chip)?;
        let offset = self.antiquant_offset.as_ref();
        offset.map_or(Ok(()), |o| shaped("antiquantOffset", o, &self.antiquant_scale.dims))?;
        self.bias.as_ref().map_or(Ok(()), |b| valid(b.numel() as i64 == n, || format!("bias {:?} for {n}", b.dims)))?;
        shaped("y", &self.y, &[m, n])
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let [k, n] = self.sizes().map(|s| s as usize);
        let columns = match (self.packed(), self.turned()) {
            (false, _) => rt.load_ints(&self.weight.transposed())?.data,
            (true, true) => unpack_int4(&rt.load_ints(&self.weight.transposed())?.data),
            (true, false) => {
                let rows = unpack_int4(&rt.load_ints(&self.weight)?.data);
                (0..n).flat_map(|j| (0..k).map(|i| rows[i * n + j]).collect::<Vec<_>>()).collect()
            }
        };
        let scale = rt.load(&self.antiquant_scale)?.data;
        let offset = self.antiquant_offset.as_ref().map(|o| rt.load(o)).transpose()?;
        let shared = self.shared(rt.chip).expect("checked in phase 1");
        let weight = dequantize(&columns, k, &scale, offset.as_ref().map(|o| &o.data[..]), shared);
        let x = rt.load(&self.x)?;
        let mut y = matmul(&x.data, &weight, k, Order::of(rt.perturb, x.dims[0]));
        if let Some(bias) = &self.bias {
            let bias = rt.load(bias)?.data;
            y.chunks_exact_mut(n).for_each(|row| row.iter_mut().zip(&bias).for_each(|(y, b)| *y += b));
        }
        store(rt, &self.y, y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        math::quant::pack_int4,
        ops::bench::{BF16, Bench, F16, F32, I8, I32, near, numbers},
    };

    /// A product with the weight `[k, n]`.
    fn weighed(b: &Bench, x: &Tensor, weight: &Tensor, scale: &Tensor, n: i64) -> WeightQuantBatchMatmulV2 {
        WeightQuantBatchMatmulV2 {
            x: x.clone(),
            weight: weight.clone(),
            antiquant_scale: scale.clone(),
            antiquant_offset: None,
            quant_scale: None,
            quant_offset: None,
            bias: None,
            antiquant_group_size: 0,
            y: b.out(&[x.dims[0], n], i64::from(x.dtype)),
        }
    }

    #[test]
    fn a_weight_in_few_bits_gives_the_product_of_what_it_stands_for() {
        let b = Bench::new(Chip::A2);
        let (m, k, n) = (2, 64, 8);
        let x = b.floats(&[m, k], F16, &numbers((m * k) as usize, 1));
        let values: Vec<i64> = (0..k * n).map(|i| (i * 7 + i / 13) % 16 - 8).collect();
        let by_columns: Vec<i64> =
            (0..n).flat_map(|j| (0..k).map(move |i| i * n + j)).map(|i| values[i as usize]).collect();
        let packed = |b: &Bench, values: &[i64], dims: &[i64]| b.ints(dims, I32, &pack_int4(values));
        let weights = [
            b.ints(&[k, n], I8, &values),
            b.ints(&[n, k], I8, &by_columns).transposed(),
            b.ints(&[k, n], ACL_INT4, &values),
            b.ints(&[n, k], ACL_INT4, &by_columns).transposed(),
            packed(&b, &values, &[k, n / 8]),
            packed(&b, &by_columns, &[n, k / 8]).transposed(),
        ];
        let a = b.read(&x);
        for (dims, group) in [(vec![1], 0), (vec![n], 0), (vec![1, n], 0), (vec![2, n], 32)] {
            let count = dims.iter().product::<i64>() as usize;
            let scales: Vec<f32> = (0..count).map(|i| 0.125 * (i % 5 + 1) as f32).collect();
            let offsets: Vec<f32> = (0..count).map(|i| (i % 3) as f32 - 1.0).collect();
            let (scale, offset) = (b.floats(&dims, F16, &scales), b.floats(&dims, F16, &offsets));
            let bias = b.floats(&[n], F16, &[1.0; 8]);
            let at = |i: usize, j: usize| {
                if count == 1 {
                    0
                } else if group == 0 {
                    j
                } else {
                    i / 32 * n as usize + j
                }
            };
            let want: Vec<f32> = (0..m as usize)
                .flat_map(|r| (0..n as usize).map(move |j| (r, j)))
                .map(|(r, j)| {
                    let term =
                        |i: usize| a[r * 64 + i] * (values[i * 8 + j] as f32 + offsets[at(i, j)]) * scales[at(i, j)];
                    1.0 + (0..64).map(term).sum::<f32>()
                })
                .collect();
            for weight in &weights {
                let op = weighed(&b, &x, weight, &scale, n);
                let (antiquant_offset, bias) = (Some(offset.clone()), Some(bias.clone()));
                let op = WeightQuantBatchMatmulV2 { antiquant_group_size: group, antiquant_offset, bias, ..op };
                b.run(&op).unwrap();
                assert!(near(&b.read(&op.y), &want, 2e-3), "{dims:?} {} {:?}", weight.dtype, weight.strides);
            }
        }
    }

    #[test]
    fn a_weight_in_few_bits_is_bounded_by_the_chip() {
        // Dtypes of x and the weight, its shape, its scale's, the group, the code.
        for (chip, x, w, [k, n], scale, group, want) in [
            (Chip::A2, F16, I8, [64, 8], vec![8], 0, 0),
            (Chip::A2, F16, I8, [65_535, 2], vec![2], 0, 0),
            (Chip::A2, F16, I8, [65_536, 2], vec![2], 0, 561_002),
            (Chip::A2, F16, I8, [2, 65_536], vec![65_536], 0, 561_002),
            (Chip::A2, F32, I8, [64, 8], vec![8], 0, 161_002),
            (Chip::A2, F16, I8, [64, 8], vec![4], 0, 161_002),
            (Chip::A2, F16, I8, [64, 8], vec![8, 1], 0, 161_002),
            (Chip::A2, F16, I8, [64, 8], vec![2, 8], 32, 0),
            (Chip::A2, F16, I8, [64, 8], vec![2, 8], 48, 161_002),
            (Chip::A2, F16, I8, [64, 8], vec![1, 8], 64, 161_002),
            (Chip::A2, F16, I8, [65, 8], vec![2, 8], 64, 0),
            (Chip::A2, F16, ACL_INT4, [64, 8], vec![8], 0, 0),
            (Chip::A2, F16, ACL_INT4, [64, 7], vec![7], 0, 161_002),
            (Chip::P310, F16, I8, [64, 8], vec![8], 0, 0),
            (Chip::P310, F16, I8, [64, 8], vec![8, 1], 0, 0),
            (Chip::P310, F16, I8, [64, 8], vec![1], 0, 161_002),
            (Chip::P310, F16, I8, [64, 8], vec![2, 8], 32, 561_002),
            (Chip::P310, F16, ACL_INT4, [64, 8], vec![8], 0, 161_002),
        ] {
            let b = Bench::new(chip);
            let (x, weight, scale) = (b.empty(&[1, k], x), b.empty(&[k, n], w), b.empty(&scale, x));
            let op = weighed(&b, &x, &weight, &scale, n);
            let op = WeightQuantBatchMatmulV2 { antiquant_group_size: group, ..op };
            assert_eq!(b.check(&op), want, "{chip:?} [{k}, {n}] {:?} {group}", scale.dims);
        }
    }

    #[test]
    fn a_bias_is_f32_beside_bf16_and_f16_beside_f16() {
        let b = Bench::new(Chip::A2);
        for (dtype, bias, want) in [(F16, F16, 0), (F16, F32, 161_002), (BF16, F32, 0), (BF16, BF16, 161_002)] {
            let (x, weight, scale) = (b.empty(&[1, 64], dtype), b.empty(&[64, 8], I8), b.empty(&[8], dtype));
            let bias = Some(b.empty(&[8], bias));
            let op = WeightQuantBatchMatmulV2 { bias, ..weighed(&b, &x, &weight, &scale, 8) };
            assert_eq!(b.check(&op), want);
        }
    }
}
