//! How far a device may be from golden values of float32 arithmetic where the trainer does not say.
//!
//! An honest change of precision must stay inside, and a fault must not: rounding moves many log-probabilities a little,
//! most of all those of unlikely tokens, a fault moves the likely ones.

use crate::{Manifest, PrecisionClass, Tolerances};

impl Tolerances {
    /// Baton's own for a class.
    pub const fn default_for(class: PrecisionClass) -> Self {
        let [max_abs_logprob_diff, mean_abs_logprob_diff, kl, top1_agreement, perplexity_ratio] = match class {
            PrecisionClass::Float32 => [2e-3, 1e-4, 1e-6, 1.0, 1.0005],
            PrecisionClass::Half => [0.6, 0.05, 5e-3, 1.0, 1.01],
            PrecisionClass::Int8 => [1.2, 0.1, 2e-2, 0.99, 1.03],
            PrecisionClass::Int4 => [4.0, 0.6, 0.3, 0.9, 1.3],
        };
        Self { max_abs_logprob_diff, mean_abs_logprob_diff, kl, top1_agreement, perplexity_ratio }
    }

    /// Where the trainer's best token is ahead by more than this, a device within the tolerances chooses it too: both
    /// log-probabilities may have moved by the most allowed, towards each other.
    pub fn top1_margin(&self) -> f64 {
        2.0 * self.max_abs_logprob_diff
    }
}

/// Those that hold for a class: the bundle's own, or else Baton's.
pub fn tolerances_for(manifest: &Manifest, class: PrecisionClass) -> Tolerances {
    manifest.tolerances.get(&class).copied().unwrap_or(Tolerances::default_for(class))
}
