//! When the calls of an open loop arrive. Pure: a seed gives the same schedule every time.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng};

/// Later than any run lasts.
const LAST_S: f64 = 1e9;

/// Arrival times of `n` calls from the start of the run, `rate` per second on average; all at once if
/// `rate` is infinite. The intervals follow a gamma distribution of shape `burstiness`: 1 is a Poisson
/// process, less comes in bursts, more is more even, infinity is constant. As `vllm bench serve` does,
/// the times are scaled so that the last call arrives at `n / rate`, which keeps seeds comparable.
pub fn arrivals(n: usize, rate: f64, burstiness: f64, seed: u64) -> Vec<Duration> {
    assert!(rate > 0.0 && burstiness > 0.0, "a rate and a burstiness above 0, not {rate} and {burstiness}");
    if rate.is_infinite() {
        return vec![Duration::ZERO; n];
    }
    let mut rng = StdRng::seed_from_u64(seed);
    let mut now = 0.0;
    let mut times: Vec<f64> = Vec::with_capacity(n);
    for _ in 0..n {
        now += interval(&mut rng, burstiness);
        times.push(now);
    }
    let last = n as f64 / rate;
    let scale = if now > 0.0 { last / now } else { 0.0 };
    times.into_iter().map(|t| Duration::from_secs_f64((t * scale).min(LAST_S))).collect()
}

/// A gamma variate of the given shape and mean 1.
fn interval(rng: &mut StdRng, shape: f64) -> f64 {
    if shape.is_infinite() {
        return 1.0;
    }
    if shape == 1.0 {
        return -uniform(rng).ln();
    }
    gamma(rng, shape) / shape
}

/// Marsaglia and Tsang, "A simple method for generating gamma variables", 2000; scale 1.
fn gamma(rng: &mut StdRng, shape: f64) -> f64 {
    if shape < 1.0 {
        let boost = uniform(rng).powf(1.0 / shape);
        return gamma(rng, shape + 1.0) * boost;
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = normal(rng);
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && uniform(rng).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d * v;
        }
    }
}

/// Box and Muller.
fn normal(rng: &mut StdRng) -> f64 {
    (-2.0 * uniform(rng).ln()).sqrt() * (std::f64::consts::TAU * uniform(rng)).cos()
}

/// In (0, 1], so that its logarithm is finite.
fn uniform(rng: &mut StdRng) -> f64 {
    1.0 - rng.random::<f64>()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_schedule_is_ordered_repeatable_and_ends_at_n_over_rate(
            n in 1usize..200,
            rate in 1e-3..1e4f64,
            burstiness in 0.05..50f64,
            seed: u64,
        ) {
            let times = arrivals(n, rate, burstiness, seed);
            prop_assert_eq!(times.len(), n);
            prop_assert!(times.is_sorted());
            let last = times[n - 1].as_secs_f64();
            prop_assert!((last * rate / n as f64 - 1.0).abs() < 1e-3 || last < 1e-6, "{}", last);
            prop_assert_eq!(times, arrivals(n, rate, burstiness, seed));
        }
    }

    /// Mean and variance of the intervals of a long schedule.
    fn moments(burstiness: f64) -> (f64, f64) {
        let times = arrivals(20_000, 1.0, burstiness, 7);
        let gaps: Vec<f64> = times.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        (mean, gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64)
    }

    #[test]
    fn intervals_have_mean_1_over_rate_and_variance_1_over_burstiness() {
        for burstiness in [0.25, 1.0, 4.0, f64::INFINITY] {
            let (mean, variance) = moments(burstiness);
            assert!((mean - 1.0).abs() < 0.01, "{burstiness}: mean {mean}");
            assert!((variance * burstiness - 1.0).abs() < 0.1 || variance < 1e-12, "{burstiness}: variance {variance}");
        }
    }

    #[test]
    fn an_infinite_rate_sends_all_at_once_and_seeds_differ() {
        assert_eq!(arrivals(3, f64::INFINITY, 1.0, 0), [Duration::ZERO; 3]);
        assert_ne!(arrivals(3, 1.0, 1.0, 0), arrivals(3, 1.0, 1.0, 1));
    }
}
