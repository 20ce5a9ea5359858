//! Quantised products: activations to bytes, bytes times bytes, and weights kept in few bits.

use super::view::{shaped, store, store_ints};
use crate::{
    array::{Chip, Fault, Refusal},
    constants::*,
    limits::{QUANT_GROUP_STEP, QUANT_MATRIX_MAX, Seen, check, fits, numbers, valid},
    math::{
        matmul::{Order, matmul},
        quant::{Shared, dequantize, int_matmul, quantize_row, unpack_int4},
    },
    op::{Kernel, Out, Tensor, operator},
    runtime::Runtime,
};

operator! {
    /// Rows as signed bytes, each with the scale that gives it back.
    DynamicQuant = aclnnDynamicQuant, aclnnDynamicQuantGetWorkspaceSize
        (x: Tensor, smooth_scales: Option<Tensor>, y_out: Out, scale_out: Out)
}

impl Kernel for DynamicQuant {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "DynamicQuant", &[&self.x, &self.smooth_scales, &self.y_out, &self.scale_out])?;
        let Some((&width, ahead)) = self.x.dims.split_last().filter(|(_, ahead)| !ahead.is_empty()) else {
            return valid(false, || format!("x {:?}: two dimensions or more", self.x.dims));
        };
        let step = numbers(chip).quant_row_step;
        fits(width % step == 0, || format!("a width of {width}: a multiple of {step}"))?;
        self.smooth_scales.as_ref().map_or(Ok(()), |s| shaped("smoothScales", s, &[width]))?;
        shaped("yOut", &self.y_out, &self.x.dims)?;
        shaped("scaleOut", &self.scale_out, ahead)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let mut x = rt.load(&self.x)?.data;
        let width = self.x.dims[self.x.rank() - 1] as usize;
        if let Some(smooth) = &self.smooth_scales {
            let smooth = rt.load(smooth)?.data;
            x.chunks_exact_mut(width).for_each(|row| row.iter_mut().zip(&smooth).for_each(|(x, s)| *x *= s));
        }
        let (bytes, scales): (Vec<_>, Vec<_>) = x.chunks_exact(width).map(quantize_row).unzip();
        store_ints(rt, &self.y_out, bytes.into_iter().flatten())?;
        store(rt, &self.scale_out, scales)
    }
}

operator! {
    /// Bytes times bytes, scaled by column and by row. The transposes are flags, and operands are contiguous.
    QuantMatmulV4 = aclnnQuantMatmulV4, aclnnQuantMatmulV4GetWorkspaceSize (
        x1: Tensor,
        x2: Tensor,
        scale: Tensor,
        offset: Option<Tensor>,
        pertoken_scale: Option<Tensor>,
        bias: Option<Tensor>,
        transpose_x1: bool,
        transpose_x2: bool,
        out: Out,
    )
}

impl QuantMatmulV4 {
    /// `x1 [m, k]`, and the columns of `x2 [n, k]`.
    fn operands(&self) -> (Tensor, Tensor) {
        let turn = |x: &Tensor, turned: bool| if turned { x.transposed() } else { x.clone() };
        (turn(&self.x1, self.transpose_x1), turn(&self.x2, !self.transpose_x2))
    }
}

impl Kernel for QuantMatmulV4 {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        let tensors: [&dyn Seen; 6] = [&self.x1, &self.x2, &self.scale, &self.pertoken_scale, &self.bias, &self.out];
        check(chip, "QuantMatmulV4", &tensors)?;
        fits(self.offset.is_none(), || "an offset goes with an output of bytes, which is not simulated".to_owned())?;
        let matrices = self.x1.rank() == 2 && self.x2.rank() == 2;
        fits(matrices, || format!("{:?} x {:?}: only matrices are simulated", self.x1.dims, self.x2.dims))?;
        let (a, b) = self.operands();
        let (m, k, n) = (a.dims[0], a.dims[1], b.dims[0]);
        valid(k == b.dims[1], || format!("inner dimensions {k} and {} differ", b.dims[1]))?;
        valid([&[n], &[1]].contains(&&[self.scale.numel() as i64]) && self.scale.rank() == 1, || {
            format!("scale {:?}: [{n}] or [1]", self.scale.dims)
        })?;
        self.pertoken_scale.as_ref().map_or(Ok(()), |s| shaped("pertokenScale", s, &[m]))?;
        self.bias.as_ref().map_or(Ok(()), |b| shaped("bias", b, &[n]))?;
        shaped("out", &self.out, &[m, n])
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let (a, b) = self.operands();
        let (a, b, scale) = (rt.load_ints(&a)?, rt.load_ints(&b)?, rt.load(&self.scale)?.data);
        let rows = self.pertoken_scale.as_ref().map(|s| rt.load(s)).transpose()?;
        let bias = self.bias.as_ref().map(|b| rt.load(b)).transpose()?;
        // Bytes are added to the sum of products, floats to the scaled result.
        let exact = self.bias.as_ref().is_some_and(|b| i64::from(b.dtype) == ACL_INT32);
        let n = b.dims[0];
        let scaled = int_matmul(&a.data, &b.data, a.dims[1]).into_iter().enumerate().map(|(i, sum)| {
            let added = bias.as_ref().map_or(0.0, |b| f64::from(b.data[i % n]));
            let (inside, outside) = if exact { (added, 0.0) } else { (0.0, added) };
            let by_column = (sum as f64 + inside) * f64::from(scale[i % n % scale.len()]);
            (by_column * rows.as_ref().map_or(1.0, |r| f64::from(r.data[i / n])) + outside) as f32
        });
        store(rt, &self.out, scaled.collect())
    }
}

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
    use crate::ops::bench::{BF16, Bench, F16, F32, I8, I32, near, numbers};

    #[test]
    fn bytes_times_their_scale_give_the_row_back() {
        let b = Bench::new(Chip::A2);
        let data = numbers(64, 1);
        let (x, y_out, scale_out) = (b.floats(&[2, 32], F16, &data), b.out(&[2, 32], I8), b.out(&[2], F32));
        b.run(&DynamicQuant { x: x.clone(), smooth_scales: None, y_out: y_out.clone(), scale_out: scale_out.clone() })
            .unwrap();
        let (bytes, scales) = (b.read(&y_out), b.read(&scale_out));
        for (i, v) in data.iter().enumerate() {
            assert!((bytes[i] * scales[i / 32] - v).abs() <= scales[i / 32] * 0.5001);
        }
        let twice = b.floats(&[32], F16, &[2.0; 32]);
        let smooth = DynamicQuant { x, smooth_scales: Some(twice), y_out: y_out.clone(), scale_out: scale_out.clone() };
        b.run(&smooth).unwrap();
        assert_eq!(b.read(&y_out), bytes);
        assert!(near(&b.read(&scale_out), &scales.iter().map(|s| s * 2.0).collect::<Vec<_>>(), 1e-6));
        for (chip, width, want) in [(Chip::A2, 33, 0), (Chip::P310, 64, 0), (Chip::P310, 33, 561_002)] {
            let b = Bench::new(chip);
            let (x, y_out, scale_out) = (b.empty(&[2, width], F16), b.out(&[2, width], I8), b.out(&[2], F32));
            assert_eq!(b.check(&DynamicQuant { x, smooth_scales: None, y_out, scale_out }), want, "{chip:?} {width}");
        }
    }

    #[test]
    fn products_of_bytes_are_scaled_by_column_and_by_row() {
        let b = Bench::new(Chip::A2);
        let (x1, x2) = (b.ints(&[2, 3], I8, &[1, 2, 3, -4, 5, 6]), b.ints(&[2, 3], I8, &[1, 0, 2, 0, -1, 1]));
        let (scale, rows) = (b.floats(&[2], F32, &[0.5, 2.0]), b.floats(&[2], F32, &[1.0, 10.0]));
        let (ints, floats) = (b.ints(&[2], I32, &[1, -1]), b.floats(&[2], F32, &[100.0, 0.0]));
        let out = b.out(&[2, 2], BF16);
        let op = |x1: &Tensor, x2: &Tensor, bias: Option<&Tensor>, transpose_x1, transpose_x2| QuantMatmulV4 {
            x1: x1.clone(),
            x2: x2.clone(),
            scale: scale.clone(),
            offset: None,
            pertoken_scale: Some(rows.clone()),
            bias: bias.cloned(),
            transpose_x1,
            transpose_x2,
            out: out.clone(),
        };
        // Sums of products: (7, 1), (8, 1).
        b.run(&op(&x1, &x2, None, false, true)).unwrap();
        assert_eq!(b.read(&out), [3.5, 2.0, 40.0, 20.0]);
        b.run(&op(&x1, &x2, Some(&ints), false, true)).unwrap();
        assert_eq!(b.read(&out), [4.0, 0.0, 45.0, 0.0]);
        b.run(&op(&x1, &x2, Some(&floats), false, true)).unwrap();
        assert_eq!(b.read(&out), [103.5, 2.0, 140.0, 20.0]);
        assert_eq!(b.check(&op(&x1, &x2, None, false, false)), 161_002);
        assert_eq!(b.check(&op(&x1, &x2.transposed(), None, false, false)), 161_002);
        let turned = b.ints(&[3, 2], I8, &[1, -4, 2, 5, 3, 6]);
        b.run(&op(&turned, &x2, None, true, true)).unwrap();
        assert_eq!(b.read(&out), [3.5, 2.0, 40.0, 20.0]);
    }

    /// A product with the weight `[k, n]`, whose scale has these dimensions.
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
        let packed =
            |b: &Bench, values: &[i64], dims: &[i64]| b.ints(dims, I32, &crate::math::quant::pack_int4(values));
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
