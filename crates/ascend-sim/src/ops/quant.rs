//! Activations brought to bytes, and bytes times bytes.

use super::view::{shaped, store, store_ints};
use crate::{
    array::{Chip, Fault, Refusal},
    constants::*,
    limits::{Seen, check, fits, numbers, valid},
    math::quant::{int_matmul, quantize_row},
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
}
