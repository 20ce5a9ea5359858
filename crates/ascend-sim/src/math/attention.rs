//! Attention of one sequence's new tokens over its keys and values.

use std::ops::Range;

use super::matmul::{Order, dot};

/// Heads and widths of one attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads; a multiple of `kv`.
    pub q: usize,
    /// Key and value heads; query head h reads `h / (q / kv)`.
    pub kv: usize,
    /// Width of queries and keys.
    pub qk: usize,
    /// Width of values.
    pub v: usize,
}

/// Which keys a query sees. The last query is aligned with the last key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// All of them.
    All,
    /// Its own position and those before it.
    Causal,
    /// From `before` positions before its own to `after` positions after it. UNCONFIRMED that `before` does not count the
    /// position itself.
    Band {
        /// Positions seen before the query's own.
        before: i64,
        /// Positions seen after it.
        after: i64,
    },
}

impl Mask {
    /// The keys that query `i` of `queries` sees among `keys`.
    fn visible(self, i: usize, queries: usize, keys: usize) -> Range<usize> {
        let own = (keys + i) as i64 - queries as i64;
        let clamp = |x: i64| x.clamp(0, keys as i64) as usize;
        match self {
            Mask::All => 0..keys,
            Mask::Causal => 0..clamp(own + 1),
            Mask::Band { before, after } => {
                clamp(own.saturating_sub(before))..clamp(own.saturating_add(after).saturating_add(1))
            }
        }
    }
}

/// `softmax(q k^T * scale) v` where the mask lets it: q `[S, q, qk]`, k `[L, kv, qk]`, v `[L, kv, v]`; gives
/// `[S, q, v]`, and the logarithm of each softmax's denominator `[S, q]`.
///
/// A query that sees nothing gets zeros and minus infinity (UNCONFIRMED).
pub fn attend(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    heads: Heads,
    scale: f64,
    mask: Mask,
    order: Order,
) -> (Vec<f32>, Vec<f32>) {
    let (queries, keys) = (q.len() / (heads.q * heads.qk), k.len() / (heads.kv * heads.qk));
    let group = heads.q / heads.kv;
    let mut out = vec![0.0; queries * heads.q * heads.v];
    let mut lse = Vec::with_capacity(queries * heads.q);
    let rows = q.chunks_exact(heads.qk).zip(out.chunks_exact_mut(heads.v)).enumerate();
    for (n, (query, out)) in rows {
        let (i, head) = (n / heads.q, n % heads.q / group);
        let seen = mask.visible(i, queries, keys);
        if seen.is_empty() {
            lse.push(f32::NEG_INFINITY);
            continue;
        }
        let key = |j: usize| &k[(j * heads.kv + head) * heads.qk..][..heads.qk];
        let scores: Vec<f32> = seen.clone().map(|j| (f64::from(dot(query, key(j), order)) * scale) as f32).collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
        for (j, weight) in order.rotate(seen.zip(weights)) {
            let value = &v[(j * heads.kv + head) * heads.v..][..heads.v];
            out.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
        }
        out.iter_mut().for_each(|o| *o = (f64::from(*o) / sum) as f32);
        lse.push((f64::from(max) + sum.ln()) as f32);
    }
    (out, lse)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { q: 4, kv: 2, qk: 3, v: 2 };

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 31 + seed * 17) % 23) as f32 / 6.0 - 2.0).collect()
    }

    /// The definition, in f64, with the mask as a predicate.
    fn plainly(q: &[f32], k: &[f32], v: &[f32], sees: impl Fn(usize, usize) -> bool) -> Vec<f32> {
        let (s, l) = (q.len() / 12, k.len() / 6);
        let mut out = Vec::new();
        for (i, h) in (0..s).flat_map(|i| (0..4).map(move |h| (i, h))) {
            let weight = |j: usize| {
                let score: f64 = (0..3).map(|d| f64::from(q[(i * 4 + h) * 3 + d] * k[(j * 2 + h / 2) * 3 + d])).sum();
                if sees(i, j) { (score * 0.5).exp() } else { 0.0 }
            };
            let sum: f64 = (0..l).map(weight).sum();
            for d in 0..2 {
                let dot: f64 = (0..l).map(|j| weight(j) * f64::from(v[(j * 2 + h / 2) * 2 + d])).sum();
                out.push((dot / sum) as f32);
            }
        }
        out
    }

    #[test]
    fn every_mask_gives_the_softmax_over_what_it_shows() {
        for (s, l) in [(1, 1), (1, 7), (3, 3), (4, 9)] {
            let (q, k, v) = (numbers(s * 12, 1), numbers(l * 6, 2), numbers(l * 4, 3));
            let own = |i: usize| (l - s + i) as i64;
            let cases = [
                (Mask::All, i64::MIN, i64::MAX),
                (Mask::Causal, i64::MIN, 0),
                (Mask::Band { before: 2, after: 0 }, -2, 0),
                (Mask::Band { before: i64::MAX, after: 1 }, i64::MIN, 1),
            ];
            for (mask, first, last) in cases {
                let want = plainly(&q, &k, &v, |i, j| (first..=last).contains(&(j as i64 - own(i))));
                for order in [Order::default(), Order::of(true, 3)] {
                    let (got, _) = attend(&q, &k, &v, HEADS, 0.5, mask, order);
                    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5), "{s} {l} {mask:?}");
                }
            }
        }
    }

    #[test]
    fn two_halves_of_the_keys_merge_by_their_denominators() {
        let (q, k, v) = (numbers(12, 4), numbers(8 * 6, 5), numbers(8 * 4, 6));
        let part = |r: Range<usize>| {
            let (k, v) = (&k[r.start * 6..r.end * 6], &v[r.start * 4..r.end * 4]);
            attend(&q, k, v, HEADS, 0.5, Mask::All, Order::default())
        };
        let ((whole, lse), (a, lse_a), (b, lse_b)) = (part(0..8), part(0..3), part(3..8));
        for (n, want) in whole.iter().enumerate() {
            let (wa, wb) = ((lse_a[n / 2] - lse[n / 2]).exp(), (lse_b[n / 2] - lse[n / 2]).exp());
            assert!((a[n] * wa + b[n] * wb - want).abs() < 1e-5);
        }
    }

    #[test]
    fn a_query_that_sees_nothing_gets_zeros() {
        let (out, lse) =
            attend(&numbers(24, 1), &numbers(6, 2), &numbers(4, 3), HEADS, 1.0, Mask::Causal, Order::default());
        assert!(out[..8].iter().all(|&o| o == 0.0) && out[8..].iter().any(|&o| o != 0.0));
        assert!(lse[..4].iter().all(|&l| l == f32::NEG_INFINITY) && lse[4..].iter().all(|l| l.is_finite()));
    }
}
