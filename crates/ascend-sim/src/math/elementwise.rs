//! Functions of single elements, and numbers in a row.

use super::shape::around;

/// The logistic function.
pub fn sigmoid(x: f32) -> f32 {
    (1.0 / (1.0 + f64::from(-x).exp())) as f32
}

/// `x * sigmoid(x)`.
pub fn silu(x: f32) -> f32 {
    (f64::from(x) / (1.0 + f64::from(-x).exp())) as f32
}

/// GELU by its definition, `x * Φ(x)`.
pub fn gelu_erf(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
}

/// GELU by its approximation with tanh.
pub fn gelu_tanh(x: f32) -> f32 {
    let x = f64::from(x);
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    (0.5 * x * (1.0 + inner.tanh())) as f32
}

/// The error function, by the series whose terms are all positive (DLMF 7.6.2).
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-18 * sum.abs() {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
}

/// `silu(first half) * second half` along `dim`, whose length is even.
pub fn swiglu(x: &[f32], dims: &[usize], dim: usize) -> Vec<f32> {
    let (outer, len, inner) = around(dims, dim);
    let half = len / 2 * inner;
    let mut out = Vec::with_capacity(outer * half);
    for row in x.chunks_exact(2 * half) {
        let (gate, up) = row.split_at(half);
        out.extend(gate.iter().zip(up).map(|(&g, &u)| silu(g) * u));
    }
    out
}

/// `start`, `start + step`, ..., `count` of them.
pub fn arange(start: f64, step: f64, count: usize) -> Vec<f64> {
    (0..count).map(|i| start + step * i as f64).collect()
}

/// How many numbers lie in `start..end` at steps of `step`; `None` if the step does not lead there.
pub fn arange_len(start: f64, end: f64, step: f64) -> Option<usize> {
    let steps = (end - start) / step;
    (steps.is_finite() && steps >= 0.0).then(|| steps.ceil() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(got: f32, want: f64) -> bool {
        (f64::from(got) - want).abs() <= 1e-6 * (1.0 + want.abs())
    }

    #[test]
    fn activations_have_their_published_values() {
        // Values of erf and exp to ten digits from tables.
        for (x, erf_form, tanh_form, silu_of) in [
            (0.0, 0.0, 0.0, 0.0),
            (1.0, 0.841_344_746, 0.841_191_991, 0.731_058_579),
            (-1.0, -0.158_655_254, -0.158_808_009, -0.268_941_421),
            (3.0, 2.995_950_306, 2.996_362_607, 2.857_722_380),
            (20.0, 20.0, 20.0, 19.999_999_959),
        ] {
            assert!(near(gelu_erf(x), erf_form), "{x}: {}", gelu_erf(x));
            assert!(near(gelu_tanh(x), tanh_form), "{x}: {}", gelu_tanh(x));
            assert!(near(silu(x), silu_of), "{x}: {}", silu(x));
            assert!(near(sigmoid(x) * x, silu_of), "{x}: {}", sigmoid(x));
        }
    }

    #[test]
    fn swiglu_gates_the_second_half_by_the_first_along_any_dimension() {
        assert_eq!(swiglu(&[1.0, 2.0, 3.0, 4.0], &[1, 4], 1), [silu(1.0) * 3.0, silu(2.0) * 4.0]);
        assert_eq!(swiglu(&[1.0, 2.0, 3.0, 4.0], &[2, 2], 0), [silu(1.0) * 3.0, silu(2.0) * 4.0]);
        assert_eq!(swiglu(&[1.0, 2.0, 3.0, 4.0], &[2, 2], 1), [silu(1.0) * 2.0, silu(3.0) * 4.0]);
    }

    #[test]
    fn a_range_stops_before_its_end() {
        assert_eq!(arange_len(0.0, 5.0, 2.0), Some(3));
        assert_eq!(arange_len(5.0, 0.0, -1.0), Some(5));
        assert_eq!(arange_len(0.0, 5.0, -1.0), None);
        assert_eq!(arange_len(0.0, 5.0, 0.0), None);
        assert_eq!(arange(1.0, 2.0, 3), [1.0, 3.0, 5.0]);
    }
}
