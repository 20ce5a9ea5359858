//! Rotary position embedding.

/// Which elements of a head form the planes that are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// `i` and `i + D/2`.
    Halves,
    /// `2i` and `2i + 1`.
    Neighbours,
}

/// `x * cos + rotate(x) * sin` for one head; all three have its width.
pub fn rotate(x: &[f32], cos: &[f32], sin: &[f32], pairs: Pairs) -> Vec<f32> {
    let half = x.len() / 2;
    (0..x.len())
        .map(|i| {
            let turned = match pairs {
                Pairs::Halves if i < half => -x[i + half],
                Pairs::Halves => x[i - half],
                Pairs::Neighbours if i % 2 == 0 => -x[i + 1],
                Pairs::Neighbours => x[i - 1],
            };
            x[i] * cos[i] + turned * sin[i]
        })
        .collect()
}

/// Neighbouring pairs brought to the halves: `[x0, x2, ..., x1, x3, ...]`.
pub fn neighbours_to_halves(x: &[f32]) -> Vec<f32> {
    x.iter().step_by(2).chain(x.iter().skip(1).step_by(2)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pair_turns_by_its_angle() {
        let (c, s) = ([0.6f32, 1.0], [0.8f32, 0.0]);
        let halves = rotate(&[1.0, 5.0, 2.0, 7.0], &[c[0], c[1], c[0], c[1]], &[s[0], s[1], s[0], s[1]], Pairs::Halves);
        assert_eq!(halves, [0.6 - 1.6, 5.0, 1.2 + 0.8, 7.0]);
        let neighbours =
            rotate(&[1.0, 2.0, 5.0, 7.0], &[c[0], c[0], c[1], c[1]], &[s[0], s[0], s[1], s[1]], Pairs::Neighbours);
        assert_eq!(neighbours, [0.6 - 1.6, 1.2 + 0.8, 5.0, 7.0]);
    }

    #[test]
    fn the_two_ways_of_pairing_differ_by_a_permutation() {
        let x = [1.0, -2.0, 3.0, 4.0, -5.0, 6.0];
        let (cos, sin) = ([0.5, 0.25, -1.0, 0.5, 0.25, -1.0], [0.5, -0.75, 0.1, 0.5, -0.75, 0.1]);
        let spread = |h: [f32; 6]| [h[0], h[0], h[1], h[1], h[2], h[2]];
        let neighbours = rotate(&x, &spread(cos), &spread(sin), Pairs::Neighbours);
        let halves = rotate(&neighbours_to_halves(&x), &cos, &sin, Pairs::Halves);
        assert_eq!(neighbours_to_halves(&neighbours), halves);
    }
}
