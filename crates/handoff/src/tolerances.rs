//! How far a device may be from golden values of float32 arithmetic where the trainer does not say.
//!
//! An honest change of precision must stay inside, and a fault must not. The limits stand between what was measured of
//! both: rounding to bf16, f16, 8 bits and blocks of 4 bits on trained and on random dense models, against tensors
//! exchanged, transposed or scaled, and wrong constants in the config. In the coarse classes rounding moves unlikely
//! tokens by several nats, so likely tokens, the mean and the divergence tell there, and the maximum only of gross faults. Mixtures of
//! experts with random weights are chaotic and need tolerances of their own.

use crate::{Manifest, PrecisionClass, Tolerances};

/// The most that is demanded of the trainer's margin: no honest change of precision was seen to lose a best token that
/// is ahead by this (55 times as likely as the next), however far it moved unlikely ones.
const SURE: f64 = 4.0;

impl Tolerances {
    /// Baton's own for a class.
    pub const fn default_for(class: PrecisionClass) -> Self {
        let [max, mean, p99, kl, top1_agreement, perplexity_ratio] = match class {
            PrecisionClass::Float32 => [1e-3, 1e-4, 5e-4, 1e-5, 1.0, 1.0005],
            PrecisionClass::Half => [6.0, 0.1, 0.4, 3e-3, 1.0, 1.02],
            PrecisionClass::Int8 => [7.0, 0.15, 0.45, 6e-3, 1.0, 1.03],
            PrecisionClass::Int4 => [10.0, 1.0, 4.0, 0.35, 0.9, 1.3],
        };
        Self {
            max_abs_logprob_diff: max,
            mean_abs_logprob_diff: mean,
            p99_abs_logprob_diff: p99,
            kl,
            top1_agreement,
            perplexity_ratio,
        }
    }

    /// Where the trainer's best token is ahead by more than this, a device within the tolerances chooses it too: both
    /// log-probabilities may have moved by the most allowed, towards each other. At most 4 nats: the maximum of a
    /// coarse class is that of unlikely tokens, and would leave no position to look at.
    pub const fn top1_margin(&self) -> f64 {
        (2.0 * self.max_abs_logprob_diff).min(SURE)
    }
}

/// Those that hold for a class: the bundle's own, or else Baton's.
pub fn tolerances_for(manifest: &Manifest, class: PrecisionClass) -> Tolerances {
    manifest.tolerances.get(&class).copied().unwrap_or(Tolerances::default_for(class))
}
