//! Normalisations over rows: the root mean square, and softmax.

use super::shape::around;

/// `x / rms(x) * (offset + gamma)` for each row of `gamma.len()` elements; with it, each row's `1 / rms`.
///
/// `offset` is 0, or 1 for the form whose weights are kept as their distance from one.
pub fn rms_norm(x: &[f32], gamma: &[f32], epsilon: f64, offset: f32) -> (Vec<f32>, Vec<f32>) {
    let mut y = Vec::with_capacity(x.len());
    let mut rstd = Vec::with_capacity(x.len() / gamma.len());
    for row in x.chunks_exact(gamma.len()) {
        let squares: f64 = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        let scale = 1.0 / (squares / row.len() as f64 + epsilon).sqrt();
        y.extend(row.iter().zip(gamma).map(|(&v, &g)| (f64::from(v) * scale * f64::from(g + offset)) as f32));
        rstd.push(scale as f32);
    }
    (y, rstd)
}

/// Softmax along `dim`.
pub fn softmax(x: &[f32], dims: &[usize], dim: usize) -> Vec<f32> {
    let (outer, len, inner) = around(dims, dim);
    let mut out = vec![0.0; x.len()];
    for (o, i) in (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i))) {
        let at = |n: usize| (o * len + n) * inner + i;
        let max = (0..len).map(|n| x[at(n)]).fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = (0..len).map(|n| f64::from((x[at(n)] - max).exp())).sum();
        (0..len).for_each(|n| out[at(n)] = (f64::from((x[at(n)] - max).exp()) / sum) as f32);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normalised_row_has_unit_mean_square_before_its_weight() {
        let x = [3.0, -4.0, 0.0, 5.0, 1.0, 1.0, 1.0, 1.0];
        let (y, rstd) = rms_norm(&x, &[1.0; 4], 0.0, 0.0);
        for (row, scale) in y.chunks_exact(4).zip(&rstd) {
            assert!((row.iter().map(|v| v * v).sum::<f32>() / 4.0 - 1.0).abs() < 1e-6);
            assert!(*scale > 0.0);
        }
        assert!((rstd[0] - (4.0f32 / 50.0).sqrt()).abs() < 1e-7);
        assert_eq!(rstd[1], 1.0);
    }

    #[test]
    fn epsilon_is_added_to_the_mean_square_and_the_offset_to_the_weight() {
        let (y, rstd) = rms_norm(&[0.0, 0.0], &[1.0, 1.0], 0.25, 0.0);
        assert_eq!((y, rstd), (vec![0.0, 0.0], vec![2.0]));
        assert_eq!(rms_norm(&[1.0, 1.0], &[2.0, -1.0], 0.0, 1.0).0, [3.0, 0.0]);
    }

    #[test]
    fn softmax_sums_to_one_and_keeps_ratios_however_large_the_logits() {
        let y = softmax(&[1000.0, 1000.0 + 2.0f32.ln(), -1000.0], &[3], 0);
        assert!((y.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((y[1] / y[0] - 2.0).abs() < 1e-3 && y[2] == 0.0);
        let columns = softmax(&[0.0, 5.0, 0.0, 5.0], &[2, 2], 0);
        assert_eq!(columns, [0.5; 4]);
    }
}
