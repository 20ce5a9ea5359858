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
        self.weight.strides[0] == 1 && self.weight.dims[0] != 1
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
