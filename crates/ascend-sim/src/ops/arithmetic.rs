//! Arithmetic on elements: with a second tensor or a scalar, and activations.

use super::view::{axis, broadcasts, expanded, shaped, store, store_ints};
use crate::{
    array::{Chip, Fault, Refusal},
    dtype::is_float,
    limits::{check, fits, numbers, valid},
    math::elementwise::{gelu_erf, gelu_tanh, silu, swiglu},
    meta::Scalar,
    op::{Kernel, Out, Ref, Tensor, operator},
    runtime::Runtime,
};

/// `out = f(a, b)`, both repeated to the shape of `out`; integers are computed with exactly.
fn combine(
    rt: &mut Runtime,
    (a, b, out): (&Tensor, &Tensor, &Tensor),
    floats: impl Fn(f32, f32) -> f32,
    ints: impl Fn(i64, i64) -> i64,
) -> Result<(), Fault> {
    let (a, b) = (expanded(a, &out.dims), expanded(b, &out.dims));
    if is_float(out.dtype) {
        let (a, b) = (rt.load(&a)?.data, rt.load(&b)?.data);
        return store(rt, out, a.iter().zip(&b).map(|(&a, &b)| floats(a, b)).collect());
    }
    let (a, b) = (rt.load_ints(&a)?.data, rt.load_ints(&b)?.data);
    store_ints(rt, out, a.iter().zip(&b).map(|(&a, &b)| ints(a, b)))
}

/// An operator `out = $compute(self, other)` with `alpha`, and the one that writes over its first operand.
macro_rules! with_alpha {
    ($op:ident, $execute:ident, $prepare:ident, $inplace:ident, $inplace_execute:ident, $inplace_prepare:ident, $sign:tt) => {
        operator! {
            /// out = self ± alpha * other.
            $op = $execute, $prepare (this: Tensor, other: Tensor, alpha: Scalar, out: Out)
        }

        impl Kernel for $op {
            fn check(&self, chip: Chip) -> Result<(), Refusal> {
                check(chip, stringify!($op), &[&self.this, &self.other, &self.out])?;
                broadcasts("self", &self.this, &self.out.dims)?;
                broadcasts("other", &self.other, &self.out.dims)
            }

            fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
                let (float, int) = (self.alpha.to_f64() as f32, self.alpha.to_i64());
                combine(rt, (&self.this, &self.other, &self.out), |a, b| a $sign float * b, |a, b| a $sign int * b)
            }
        }

        operator! {
            /// self = self ± alpha * other.
            $inplace = $inplace_execute, $inplace_prepare (this: Ref, other: Tensor, alpha: Scalar)
        }

        impl Kernel for $inplace {
            fn check(&self, chip: Chip) -> Result<(), Refusal> {
                check(chip, stringify!($inplace), &[&self.this, &self.other])?;
                broadcasts("other", &self.other, &self.this.dims)
            }

            fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
                let (float, int) = (self.alpha.to_f64() as f32, self.alpha.to_i64());
                combine(rt, (&self.this, &self.other, &self.this), |a, b| a $sign float * b, |a, b| a $sign int * b)
            }
        }
    };
}

with_alpha!(Add, aclnnAdd, aclnnAddGetWorkspaceSize, InplaceAdd, aclnnInplaceAdd, aclnnInplaceAddGetWorkspaceSize, +);
with_alpha!(Sub, aclnnSub, aclnnSubGetWorkspaceSize, InplaceSub, aclnnInplaceSub, aclnnInplaceSubGetWorkspaceSize, -);

operator! {
    /// out = self * other.
    Mul = aclnnMul, aclnnMulGetWorkspaceSize (this: Tensor, other: Tensor, out: Out)
}

impl Kernel for Mul {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "Mul", &[&self.this, &self.other, &self.out])?;
        broadcasts("self", &self.this, &self.out.dims)?;
        broadcasts("other", &self.other, &self.out.dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        combine(rt, (&self.this, &self.other, &self.out), |a, b| a * b, |a, b| a * b)
    }
}

operator! {
    /// self = self * other.
    InplaceMul = aclnnInplaceMul, aclnnInplaceMulGetWorkspaceSize (this: Ref, other: Tensor)
}

impl Kernel for InplaceMul {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "InplaceMul", &[&self.this, &self.other])?;
        broadcasts("other", &self.other, &self.this.dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        combine(rt, (&self.this, &self.other, &self.this), |a, b| a * b, |a, b| a * b)
    }
}

operator! {
    /// out = self * other, a scalar.
    Muls = aclnnMuls, aclnnMulsGetWorkspaceSize (this: Tensor, other: Scalar, out: Out)
}

impl Kernel for Muls {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "Muls", &[&self.this, &self.out])?;
        shaped("out", &self.out, &self.this.dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        scale(rt, &self.this, self.other, &self.out)
    }
}

operator! {
    /// self = self * other, a scalar.
    InplaceMuls = aclnnInplaceMuls, aclnnInplaceMulsGetWorkspaceSize (this: Ref, other: Scalar)
}

impl Kernel for InplaceMuls {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "InplaceMuls", &[&self.this])
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        scale(rt, &self.this, self.other, &self.this)
    }
}

fn scale(rt: &mut Runtime, x: &Tensor, factor: Scalar, out: &Tensor) -> Result<(), Fault> {
    let (float, int) = (factor.to_f64() as f32, factor.to_i64());
    combine(rt, (x, x, out), |a, _| a * float, |a, _| a * int)
}

/// An operator that applies a function to each element.
macro_rules! activation {
    ($op:ident, $execute:ident, $prepare:ident, $function:expr) => {
        operator! {
            /// The function of each element.
            $op = $execute, $prepare (this: Tensor, out: Out)
        }

        impl Kernel for $op {
            fn check(&self, chip: Chip) -> Result<(), Refusal> {
                check(chip, stringify!($op), &[&self.this, &self.out])?;
                shaped("out", &self.out, &self.this.dims)
            }

            fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
                let x = rt.load(&self.this)?;
                store(rt, &self.out, x.data.into_iter().map($function).collect())
            }
        }
    };
}

activation!(Silu, aclnnSilu, aclnnSiluGetWorkspaceSize, silu);
activation!(Tanh, aclnnTanh, aclnnTanhGetWorkspaceSize, f32::tanh);
activation!(IsFinite, aclnnIsFinite, aclnnIsFiniteGetWorkspaceSize, |x: f32| f32::from(x.is_finite()));

operator! {
    /// GELU: by its definition if `approximate` is 0, by tanh if it is 1.
    GeluV2 = aclnnGeluV2, aclnnGeluV2GetWorkspaceSize (x: Tensor, approximate: i64, y: Out)
}

impl Kernel for GeluV2 {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "GeluV2", &[&self.x, &self.y])?;
        valid([0, 1].contains(&self.approximate), || format!("approximate is 0 or 1, not {}", self.approximate))?;
        shaped("y", &self.y, &self.x.dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let x = rt.load(&self.x)?;
        let gelu = if self.approximate == 1 { gelu_tanh } else { gelu_erf };
        store(rt, &self.y, x.data.into_iter().map(gelu).collect())
    }
}

operator! {
    /// silu of the first half times the second half, along `dim`.
    SwiGlu = aclnnSwiGlu, aclnnSwiGluGetWorkspaceSize (x: Tensor, dim: i64, out: Out)
}

impl Kernel for SwiGlu {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "SwiGlu", &[&self.x, &self.out])?;
        let dim = axis(&self.x, self.dim)?;
        let mut halved = self.x.dims.clone();
        valid(halved[dim] % 2 == 0, || format!("the length {} is not even", halved[dim]))?;
        halved[dim] /= 2;
        shaped("out", &self.out, &halved)?;
        let step = numbers(chip).swiglu_bytes;
        let bytes = crate::dtype::bytes(self.x.dtype, *halved.last().expect("it has the dimension dim") as u64) as i64;
        fits(bytes % step == 0, || format!("a row of {bytes} bytes is no multiple of {step}"))
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let x = rt.load(&self.x)?;
        let dim = axis(&self.x, self.dim).expect("checked in phase 1");
        store(rt, &self.out, swiglu(&x.data, &x.dims, dim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::bench::{BF16, BOOL, Bench, F16, F32, I64, inplace, turned};

    #[test]
    fn operands_broadcast_and_alpha_scales_the_second() {
        let b = Bench::new(Chip::A2);
        for dtype in [F32, F16, BF16] {
            let (x, y) = (b.floats(&[2, 2], dtype, &[1.0, 2.0, 3.0, 4.0]), b.floats(&[2], dtype, &[10.0, 20.0]));
            let (alpha, out) = (Scalar::from_f64(0.5), b.out(&[2, 2], dtype));
            b.run(&Add { this: x.clone(), other: y.clone(), alpha, out: out.clone() }).unwrap();
            assert_eq!(b.read(&out), [6.0, 12.0, 8.0, 14.0]);
            b.run(&Sub { this: turned(&x), other: y.clone(), alpha, out: out.clone() }).unwrap();
            assert_eq!(b.read(&out), [-4.0, -7.0, -3.0, -6.0]);
            b.run(&Mul { this: x.clone(), other: y.clone(), out: out.clone() }).unwrap();
            assert_eq!(b.read(&out), [10.0, 40.0, 30.0, 80.0]);
            b.run(&InplaceAdd { this: inplace(&x), other: y.clone(), alpha }).unwrap();
            b.run(&InplaceMul { this: inplace(&x), other: y }).unwrap();
            b.run(&InplaceMuls { this: inplace(&x), other: alpha }).unwrap();
            assert_eq!(b.read(&x), [30.0, 120.0, 40.0, 140.0]);
        }
    }

    #[test]
    fn integers_are_computed_with_exactly() {
        let b = Bench::new(Chip::A2);
        let large = (1 << 60) + 1;
        let (x, out) = (b.ints(&[2], I64, &[large, -3]), b.out(&[2], I64));
        b.run(&Add { this: x.clone(), other: x.clone(), alpha: Scalar::from_f64(1.0), out: out.clone() }).unwrap();
        assert_eq!(b.read_ints(&out), [2 * large, -6]);
    }

    #[test]
    fn what_does_not_broadcast_is_refused() {
        let b = Bench::new(Chip::A2);
        let (x, y) = (b.empty(&[2, 3], F32), b.empty(&[2], F32));
        for (dims, want) in [([2, 3], 161_002), ([3, 3], 161_002)] {
            let (alpha, out) = (Scalar::from_f64(1.0), b.out(&dims, F32));
            assert_eq!(b.check(&Add { this: x.clone(), other: y.clone(), alpha, out }), want);
        }
        let narrow = b.out(&[3], F32);
        assert_eq!(b.check(&Mul { this: x.clone(), other: x, out: narrow }), 161_002);
    }

    #[test]
    fn a_result_is_rounded_once_to_the_dtype_of_its_output() {
        let b = Bench::new(Chip::A2);
        let (x, out) = (b.floats(&[1], F16, &[1.0]), b.out(&[1], F16));
        // 1 + 2^-11 + 2^-12 rounds up to 1 + 2^-10; rounded in two steps it would be 1.
        let y = b.floats(&[1], F16, &[2f32.powi(-11)]);
        b.run(&Add { this: x, other: y, alpha: Scalar::from_f64(1.5), out: out.clone() }).unwrap();
        assert_eq!(b.read(&out), [1.0 + 2f32.powi(-10)]);
    }

    #[test]
    fn activations_keep_the_shape() {
        let b = Bench::new(Chip::A2);
        let x = b.floats(&[2, 2], F32, &[0.0, 1.0, f32::INFINITY, f32::NAN]);
        let (finite, wrong) = (b.out(&[2, 2], BOOL), b.out(&[4], BOOL));
        b.run(&IsFinite { this: x.clone(), out: finite.clone() }).unwrap();
        assert_eq!(b.read_ints(&finite), [1, 1, 0, 0]);
        assert_eq!(b.check(&IsFinite { this: x.clone(), out: wrong }), 161_002);
        let out = b.out(&[2, 2], F32);
        b.run(&Tanh { this: x.clone(), out: out.clone() }).unwrap();
        assert_eq!(b.read(&out)[..3], [0.0, 1f32.tanh(), 1.0]);
        b.run(&GeluV2 { x: x.clone(), approximate: 0, y: out.clone() }).unwrap();
        assert_eq!(b.read(&out)[..2], [0.0, gelu_erf(1.0)]);
        b.run(&GeluV2 { x: x.clone(), approximate: 1, y: out.clone() }).unwrap();
        assert_eq!(b.read(&out)[..2], [0.0, gelu_tanh(1.0)]);
        assert_eq!(b.check(&GeluV2 { x, approximate: 2, y: out }), 161_002);
    }

    #[test]
    fn swiglu_halves_a_contiguous_row() {
        let b = Bench::new(Chip::A2);
        let (x, out) = (b.floats(&[1, 4], F32, &[1.0, 2.0, 3.0, 4.0]), b.out(&[1, 2], F32));
        b.run(&SwiGlu { x, dim: -1, out: out.clone() }).unwrap();
        assert_eq!(b.read(&out), [silu(1.0) * 3.0, silu(2.0) * 4.0]);
        for (chip, length, want) in [
            (Chip::A2, 6, 0),
            (Chip::A2, 5, 161_002),
            (Chip::P310, 64, 0),
            (Chip::P310, 32, 561_002),
            (Chip::P310, 96, 561_002),
        ] {
            let b = Bench::new(chip);
            let (x, out) = (b.empty(&[2, length], F16), b.out(&[2, length / 2], F16));
            assert_eq!(b.check(&SwiGlu { x, dim: 1, out }), want, "{chip:?} {length}");
        }
    }
}
