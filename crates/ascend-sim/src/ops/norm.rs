//! Normalisations.

use super::view::{axis, shaped, store};
use crate::{
    array::{Chip, Fault, Refusal},
    dtype,
    limits::{check, fits, numbers, valid},
    math::norm::{rms_norm, softmax},
    op::{Kernel, Out, Ref, Tensor, operator},
    runtime::Runtime,
};

/// Refuses a weight that is not the last dimensions of `x`, and a `rstd` of another shape than `x` with these as ones.
fn check_norm(chip: Chip, x: &Tensor, gamma: &Tensor, rstd: &Tensor) -> Result<(), Refusal> {
    let ahead = x.rank().checked_sub(gamma.rank()).filter(|&ahead| gamma.rank() > 0 && x.dims[ahead..] == gamma.dims);
    valid(ahead.is_some(), || format!("gamma {:?} is not the end of x {:?}", gamma.dims, x.dims))?;
    let ahead = ahead.unwrap_or_default();
    shaped("rstdOut", rstd, &[&x.dims[..ahead], &vec![1; gamma.rank()]].concat())?;
    let (bytes, least) = (dtype::bytes(x.dtype, x.dims[x.rank() - 1] as u64) as i64, numbers(chip).rms_row_bytes);
    fits(bytes >= least, || format!("a row of {bytes} bytes, fewer than {least}"))
}

/// Normalises and stores the result and `1 / rms`. `offset` is added to the weight.
fn normalize(
    rt: &mut Runtime,
    x: &[f32],
    (gamma, offset, epsilon): (&Tensor, f32, f64),
    (y, rstd): (&Tensor, &Tensor),
) -> Result<(), Fault> {
    let gamma = rt.load(gamma)?;
    let (normed, scales) = rms_norm(x, &gamma.data, epsilon, offset);
    store(rt, y, normed)?;
    store(rt, rstd, scales)
}

/// A norm of one input, with `$offset` added to its weight.
macro_rules! norm {
    ($op:ident, $execute:ident, $prepare:ident, $offset:expr) => {
        operator! {
            /// y = x / rms(x) * weight.
            $op = $execute, $prepare (x: Tensor, gamma: Tensor, epsilon: f64, y_out: Out, rstd_out: Out)
        }

        impl Kernel for $op {
            fn check(&self, chip: Chip) -> Result<(), Refusal> {
                check(chip, stringify!($op), &[&self.x, &self.gamma, &self.y_out, &self.rstd_out])?;
                shaped("yOut", &self.y_out, &self.x.dims)?;
                check_norm(chip, &self.x, &self.gamma, &self.rstd_out)
            }

            fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
                let x = rt.load(&self.x)?;
                normalize(rt, &x.data, (&self.gamma, $offset, self.epsilon), (&self.y_out, &self.rstd_out))
            }
        }
    };
}

norm!(RmsNorm, aclnnRmsNorm, aclnnRmsNormGetWorkspaceSize, 0.0);
norm!(GemmaRmsNorm, aclnnGemmaRmsNorm, aclnnGemmaRmsNormGetWorkspaceSize, 1.0);

/// Stores the sum of two tensors in `sum` and its norm, taken before the sum is rounded, in `y`.
fn add_and_normalize(
    rt: &mut Runtime,
    (x1, x2, sum): (&Tensor, &Tensor, &Tensor),
    weight: (&Tensor, f64),
    (y, rstd): (&Tensor, &Tensor),
) -> Result<(), Fault> {
    let (mut x, x2) = (rt.load(x1)?.data, rt.load(x2)?.data);
    x.iter_mut().zip(x2).for_each(|(a, b)| *a += b);
    store(rt, sum, x.clone())?;
    normalize(rt, &x, (weight.0, 0.0, weight.1), (y, rstd))
}

operator! {
    /// xOut = x1 + x2, yOut = norm(xOut).
    AddRmsNorm = aclnnAddRmsNorm, aclnnAddRmsNormGetWorkspaceSize
        (x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: f64, y_out: Out, rstd_out: Out, x_out: Out)
}

impl Kernel for AddRmsNorm {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "AddRmsNorm", &[&self.x1, &self.x2, &self.gamma, &self.y_out, &self.rstd_out, &self.x_out])?;
        shaped("x2", &self.x2, &self.x1.dims)?;
        shaped("yOut", &self.y_out, &self.x1.dims)?;
        shaped("xOut", &self.x_out, &self.x1.dims)?;
        check_norm(chip, &self.x1, &self.gamma, &self.rstd_out)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let results = (&*self.y_out, &*self.rstd_out);
        add_and_normalize(rt, (&self.x1, &self.x2, &self.x_out), (&self.gamma, self.epsilon), results)
    }
}

operator! {
    /// x2 = x1 + x2, x1 = norm(x2).
    InplaceAddRmsNorm = aclnnInplaceAddRmsNorm, aclnnInplaceAddRmsNormGetWorkspaceSize
        (x1: Ref, x2: Ref, gamma: Tensor, epsilon: f64, rstd_out: Out)
}

impl Kernel for InplaceAddRmsNorm {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "InplaceAddRmsNorm", &[&self.x1, &self.x2, &self.gamma, &self.rstd_out])?;
        shaped("x2", &self.x2, &self.x1.dims)?;
        check_norm(chip, &self.x1, &self.gamma, &self.rstd_out)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let results = (&*self.x1, &*self.rstd_out);
        add_and_normalize(rt, (&self.x1, &self.x2, &self.x2), (&self.gamma, self.epsilon), results)
    }
}

operator! {
    /// Softmax along `dim`.
    Softmax = aclnnSoftmax, aclnnSoftmaxGetWorkspaceSize (this: Tensor, dim: i64, out: Out)
}

impl Kernel for Softmax {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "Softmax", &[&self.this, &self.out])?;
        axis(&self.this, self.dim)?;
        shaped("out", &self.out, &self.this.dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let x = rt.load(&self.this)?;
        let dim = axis(&self.this, self.dim).expect("checked in phase 1");
        store(rt, &self.out, softmax(&x.data, &x.dims, dim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::bench::{BF16, Bench, F16, F32, inplace, near, numbers};

    #[test]
    fn a_norm_runs_over_the_dimensions_of_its_weight() {
        let b = Bench::new(Chip::A2);
        let data = numbers(12, 1);
        let (x, gamma) = (b.floats(&[2, 2, 3], F32, &data), b.floats(&[3], F32, &[1.0, 2.0, -1.0]));
        let (y_out, rstd_out) = (b.out(&[2, 2, 3], F32), b.out(&[2, 2, 1], F32));
        let norm = RmsNorm { x: x.clone(), gamma: gamma.clone(), epsilon: 1e-6, y_out: y_out.clone(), rstd_out };
        b.run(&norm).unwrap();
        let want: Vec<f32> = data
            .chunks(3)
            .flat_map(|r| {
                let rms = (r.iter().map(|v| v * v).sum::<f32>() / 3.0 + 1e-6).sqrt();
                [r[0] / rms, 2.0 * r[1] / rms, -r[2] / rms]
            })
            .collect();
        assert!(near(&b.read(&y_out), &want, 1e-6));
        let gemma = b.floats(&[3], F32, &[0.0, 1.0, -2.0]);
        let (again, rstd_out) = (b.out(&[2, 2, 3], F32), b.out(&[2, 2, 1], F32));
        b.run(&GemmaRmsNorm { x: x.clone(), gamma: gemma, epsilon: 1e-6, y_out: again.clone(), rstd_out }).unwrap();
        assert_eq!(b.read(&again), b.read(&y_out));
        for dims in [[2, 2, 3], [2, 1, 1]] {
            let rstd_out = b.out(&dims, F32);
            let norm = RmsNorm { x: x.clone(), gamma: gamma.clone(), epsilon: 1e-6, y_out: y_out.clone(), rstd_out };
            assert_eq!(b.check(&norm), 161_002);
        }
    }

    #[test]
    fn a_row_on_310p_has_at_least_32_bytes() {
        for (chip, width, want) in [(Chip::A2, 15, 0), (Chip::P310, 16, 0), (Chip::P310, 15, 561_002)] {
            let b = Bench::new(chip);
            let (x, gamma, y_out) = (b.empty(&[2, width], F16), b.empty(&[width], F16), b.out(&[2, width], F16));
            let rstd_out = b.out(&[2, 1], F32);
            assert_eq!(b.check(&RmsNorm { x, gamma, epsilon: 1e-6, y_out, rstd_out }), want, "{chip:?} {width}");
        }
    }

    #[test]
    fn a_sum_is_kept_beside_its_norm() {
        let b = Bench::new(Chip::A2);
        let (x1, x2) = (b.floats(&[2, 16], BF16, &numbers(32, 1)), b.floats(&[2, 16], BF16, &numbers(32, 2)));
        let gamma = b.floats(&[16], BF16, &numbers(16, 3));
        let [y_out, x_out] = [0; 2].map(|_| b.out(&[2, 16], BF16));
        let rstd_out = b.out(&[2, 1], F32);
        let apart = AddRmsNorm {
            x1: x1.clone(),
            x2: x2.clone(),
            gamma: gamma.clone(),
            epsilon: 1e-5,
            y_out: y_out.clone(),
            rstd_out: rstd_out.clone(),
            x_out: x_out.clone(),
        };
        b.run(&apart).unwrap();
        let sums: Vec<f32> = b.read(&x1).iter().zip(b.read(&x2)).map(|(a, b)| a + b).collect();
        assert!(near(&b.read(&x_out), &sums, 1.0 / 256.0));
        let (whole, scales) = rms_norm(&sums, &b.read(&gamma), 1e-5, 0.0);
        assert!(near(&b.read(&y_out), &whole, 1.0 / 256.0) && near(&b.read(&rstd_out), &scales, 1e-6));
        let inplace = InplaceAddRmsNorm { x1: inplace(&x1), x2: inplace(&x2), gamma, epsilon: 1e-5, rstd_out };
        b.run(&inplace).unwrap();
        assert_eq!((b.read(&x1), b.read(&x2)), (b.read(&y_out), b.read(&x_out)));
    }

    #[test]
    fn softmax_runs_along_its_dimension() {
        let b = Bench::new(Chip::A2);
        let (x, out) = (b.floats(&[2, 2], F32, &[0.0, 1.0, 0.0, 1.0]), b.out(&[2, 2], F32));
        b.run(&Softmax { this: x.clone(), dim: 0, out: out.clone() }).unwrap();
        assert_eq!(b.read(&out), [0.5; 4]);
        assert_eq!(b.check(&Softmax { this: x, dim: 2, out }), 161_002);
    }
}
