//! Elements moved, converted, or made from scalars.

use super::view::{axis, broadcasts, copy, expanded, narrow, permuted, shaped, store, store_ints};
use crate::{
    array::{Chip, Fault, Refusal},
    dtype::is_float,
    limits::{Seen, check, valid},
    math::elementwise::{arange, arange_len},
    meta::Scalar,
    op::{Kernel, Out, Ref, Tensor, operator},
    runtime::Runtime,
};

operator! {
    /// out = self in another dtype.
    Cast = aclnnCast, aclnnCastGetWorkspaceSize (this: Tensor, dtype: i32, out: Out)
}

impl Kernel for Cast {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "Cast", &[&self.this, &self.out])?;
        let (asked, held) = (self.dtype, self.out.dtype);
        valid(asked == held, || format!("aclDataType {asked} is asked for, and the output holds {held}"))?;
        shaped("out", &self.out, &self.this.dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        copy(rt, &self.this, &self.out)
    }
}

operator! {
    /// self = src, repeated and converted.
    InplaceCopy = aclnnInplaceCopy, aclnnInplaceCopyGetWorkspaceSize (this: Ref, src: Tensor)
}

impl Kernel for InplaceCopy {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "InplaceCopy", &[&self.this, &self.src])?;
        broadcasts("src", &self.src, &self.this.dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        copy(rt, &expanded(&self.src, &self.this.dims), &self.this)
    }
}

operator! {
    /// The tensors one after another along `dim`.
    Cat = aclnnCat, aclnnCatGetWorkspaceSize (tensors: Vec<Tensor>, dim: i64, out: Out)
}

impl Kernel for Cat {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        valid(!self.tensors.is_empty(), || "there is no tensor in the list".to_owned())?;
        let dim = axis(&self.out, self.dim)?;
        for tensor in &self.tensors {
            check(chip, "Cat", &[tensor, &self.out as &dyn Seen])?;
            let mut want = self.out.dims.clone();
            want[dim] = tensor.dims.get(dim).copied().unwrap_or_default();
            shaped("a tensor of the list", tensor, &want)?;
        }
        let length: i64 = self.tensors.iter().map(|t| t.dims[dim]).sum();
        let room = self.out.dims[dim];
        valid(length == room, || format!("the tensors have {length} along dim {dim}, the output {room}"))
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let dim = axis(&self.out, self.dim).expect("checked in phase 1");
        let mut start = 0;
        for tensor in &self.tensors {
            let len = tensor.dims[dim] as usize;
            copy(rt, tensor, &narrow(&self.out, dim, start, len))?;
            start += len;
        }
        Ok(())
    }
}

operator! {
    /// The dimensions of self in the order `dims`.
    Permute = aclnnPermute, aclnnPermuteGetWorkspaceSize (this: Tensor, dims: Vec<i64>, out: Out)
}

impl Permute {
    fn order(&self) -> Result<Vec<usize>, Refusal> {
        let order: Vec<usize> = self.dims.iter().map(|&d| axis(&self.this, d)).collect::<Result<_, _>>()?;
        let whole = (0..self.this.rank()).all(|d| order.contains(&d)) && order.len() == self.this.rank();
        valid(whole, || format!("{:?} is no order of {} dimensions", self.dims, self.this.rank()))?;
        Ok(order)
    }
}

impl Kernel for Permute {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "Permute", &[&self.this, &self.out])?;
        shaped("out", &self.out, &permuted(&self.this, &self.order()?).dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        copy(rt, &permuted(&self.this, &self.order().expect("checked in phase 1")), &self.out)
    }
}

/// Writes a scalar to every element of which `chosen` says so.
fn fill(rt: &mut Runtime, to: &Tensor, value: Scalar, chosen: impl Fn(usize) -> bool) -> Result<(), Fault> {
    if is_float(to.dtype) {
        let (mut array, value) = (rt.load(to)?, value.to_f64() as f32);
        array.data.iter_mut().enumerate().filter(|(i, _)| chosen(*i)).for_each(|(_, x)| *x = value);
        return rt.store(to, &array);
    }
    let (mut ints, value) = (rt.load_ints(to)?, value.to_i64());
    ints.data.iter_mut().enumerate().filter(|(i, _)| chosen(*i)).for_each(|(_, x)| *x = value);
    rt.store_ints(to, &ints)
}

operator! {
    /// self = value everywhere.
    InplaceFillScalar = aclnnInplaceFillScalar, aclnnInplaceFillScalarGetWorkspaceSize (this: Ref, value: Scalar)
}

impl Kernel for InplaceFillScalar {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "InplaceFillScalar", &[&self.this])
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        fill(rt, &self.this, self.value, |_| true)
    }
}

operator! {
    /// self = 0 everywhere.
    InplaceZero = aclnnInplaceZero, aclnnInplaceZeroGetWorkspaceSize (this: Ref)
}

impl Kernel for InplaceZero {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "InplaceZero", &[&self.this])
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        store_ints(rt, &self.this, vec![0; self.this.numel()])
    }
}

operator! {
    /// self = value where mask is true.
    InplaceMaskedFillScalar = aclnnInplaceMaskedFillScalar, aclnnInplaceMaskedFillScalarGetWorkspaceSize
        (this: Ref, mask: Tensor, value: Scalar)
}

impl Kernel for InplaceMaskedFillScalar {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "InplaceMaskedFillScalar", &[&self.this, &self.mask])?;
        broadcasts("mask", &self.mask, &self.this.dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let mask = rt.load_ints(&expanded(&self.mask, &self.this.dims))?;
        fill(rt, &self.this, self.value, |i| mask.data[i] != 0)
    }
}

operator! {
    /// out = start, start + step, ... before end.
    Arange = aclnnArange, aclnnArangeGetWorkspaceSize (start: Scalar, end: Scalar, step: Scalar, out: Out)
}

impl Kernel for Arange {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "Arange", &[&self.out])?;
        let len = arange_len(self.start.to_f64(), self.end.to_f64(), self.step.to_f64());
        valid(len.is_some(), || format!("no steps of {:?} lead from {:?} to {:?}", self.step, self.start, self.end))?;
        shaped("out", &self.out, &[len.unwrap_or_default() as i64])
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let values = arange(self.start.to_f64(), self.step.to_f64(), self.out.numel());
        match is_float(self.out.dtype) {
            true => store(rt, &self.out, values.into_iter().map(|v| v as f32).collect()),
            false => store_ints(rt, &self.out, values.into_iter().map(|v| v as i64)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::bench::{BF16, BOOL, Bench, F16, F32, I32, I64, inplace, numbers, turned};

    #[test]
    fn a_cast_rounds_floats_to_even_and_cuts_fractions_off_integers() {
        let b = Bench::new(Chip::A2);
        let x = b.floats(&[4], F32, &[1.0 + 2f32.powi(-8), -2.7, 0.5, 3e38]);
        let cases: [(i64, &[f32]); 4] = [
            (BF16, &[1.0, -2.703_125, 0.5, 3.004_055_3e38]),
            (F16, &[1.003_906_3, -2.699_218_8, 0.5, f32::INFINITY]),
            (I32, &[1.0, -2.0, 0.0, i32::MAX as f32]),
            (BOOL, &[1.0, 1.0, 1.0, 1.0]),
        ];
        for (dtype, want) in cases {
            let out = b.out(&[4], dtype);
            b.run(&Cast { this: x.clone(), dtype: dtype as i32, out: out.clone() }).unwrap();
            let got = b.read(&out);
            assert!(got.iter().zip(want).all(|(a, w)| a == w || (a - w).abs() < 1e-3 * w.abs()), "{dtype} {got:?}");
            assert_eq!(b.check(&Cast { this: x.clone(), dtype: I64 as i32, out }), 161_002);
        }
    }

    #[test]
    fn a_copy_takes_any_view_to_any_view() {
        let b = Bench::new(Chip::A2);
        let (x, target) = (b.floats(&[2, 3], F32, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), b.floats(&[3, 4], F16, &[0.0; 12]));
        b.run(&InplaceCopy { this: inplace(&narrow(&target, 1, 1, 2)), src: turned(&x) }).unwrap();
        assert_eq!(b.read(&target), [0.0, 1.0, 4.0, 0.0, 0.0, 2.0, 5.0, 0.0, 0.0, 3.0, 6.0, 0.0]);
        let row = b.floats(&[4], F32, &[9.0, 8.0, 7.0, 6.0]);
        b.run(&InplaceCopy { this: inplace(&target), src: row }).unwrap();
        assert_eq!(b.read(&target)[4..8], [9.0, 8.0, 7.0, 6.0]);
        assert_eq!(b.check(&InplaceCopy { this: inplace(&target), src: x }), 161_002);
    }

    #[test]
    fn parts_follow_one_another_and_fill_the_output() {
        let b = Bench::new(Chip::A2);
        let (x, y) = (b.ints(&[2, 1], I64, &[1, 2]), b.ints(&[2, 2], I64, &[3, 4, 5, 6]));
        let (out, short) = (b.out(&[2, 3], I64), b.out(&[2, 2], I64));
        b.run(&Cat { tensors: vec![x.clone(), y.clone()], dim: -1, out: out.clone() }).unwrap();
        assert_eq!(b.read_ints(&out), [1, 3, 4, 2, 5, 6]);
        assert_eq!(b.check(&Cat { tensors: vec![x.clone(), y.clone()], dim: 1, out: short }), 161_002);
        assert_eq!(b.check(&Cat { tensors: vec![x, y], dim: 0, out }), 161_002);
    }

    #[test]
    fn permuting_twice_with_inverse_orders_changes_nothing() {
        let b = Bench::new(Chip::A2);
        let x = b.floats(&[2, 3, 4], F32, &numbers(24, 1));
        let (there, back) = (b.out(&[4, 2, 3], F32), b.out(&[2, 3, 4], F32));
        b.run(&Permute { this: x.clone(), dims: vec![2, 0, 1], out: there.clone() }).unwrap();
        assert_eq!(b.read(&there)[1], b.read(&x)[4]);
        b.run(&Permute { this: there.0, dims: vec![1, 2, 0], out: back.clone() }).unwrap();
        assert_eq!(b.read(&back), b.read(&x));
        for dims in [vec![0, 1], vec![0, 0, 1], vec![0, 1, 3]] {
            assert_eq!(b.check(&Permute { this: x.clone(), dims, out: back.clone() }), 161_002);
        }
    }

    #[test]
    fn scalars_fill_all_or_what_a_mask_names() {
        let b = Bench::new(Chip::A2);
        let (x, mask) = (b.empty(&[2, 3], F16), b.ints(&[3], BOOL, &[0, 1, 0]));
        b.run(&InplaceZero { this: inplace(&x) }).unwrap();
        assert_eq!(b.read(&x), [0.0; 6]);
        b.run(&InplaceMaskedFillScalar { this: inplace(&x), mask, value: Scalar::from_f64(-1e4) }).unwrap();
        assert_eq!(b.read(&x), [0.0, -1e4, 0.0, 0.0, -1e4, 0.0]);
        b.run(&InplaceFillScalar { this: inplace(&x), value: Scalar::from_f64(2.0) }).unwrap();
        assert_eq!(b.read(&x), [2.0; 6]);
    }

    #[test]
    fn a_range_must_fill_its_output() {
        let b = Bench::new(Chip::A2);
        let [start, end, step] = [1.0, 6.0, 2.0].map(Scalar::from_f64);
        let (out, long) = (b.out(&[3], I64), b.out(&[4], I64));
        b.run(&Arange { start, end, step, out: out.clone() }).unwrap();
        assert_eq!(b.read_ints(&out), [1, 3, 5]);
        assert_eq!(b.check(&Arange { start, end, step, out: long }), 161_002);
        assert_eq!(b.check(&Arange { start: end, end: start, step, out }), 161_002);
    }
}
