//! What the ranks of a backend make together, beside what [`Reference`] makes alone.

use std::thread;

use super::inputs::{Source, activation, router_logits};
use super::tolerance::tolerance;
use super::{Case, Full, Outcome, outputs};
use crate::{
    Activation, Caps, DType, HostExperts, HostLinear, Purpose, Reference, Result, Routing, Scoring, WeightFormat,
};

/// What all ranks of a backend make together of a gated network, its width shared out, and of experts, each held by one
/// rank: the numbers of every rank one after the other, beside what the judge makes of the whole.
///
/// # Panics
/// If `backends` are not all the ranks in their order, or a rank panics.
pub fn ranks<B: Full>(backends: &[B], format: WeightFormat) -> Result<Outcome> {
    let caps = backends.first().expect("a rank").caps();
    let inputs = caps.activations;
    assert_eq!(backends.iter().map(|b| b.world().rank).collect::<Vec<_>>(), (0..backends.len()).collect::<Vec<_>>());
    let whole = Parts::new(format).evaluate(&Reference::new(), inputs)?;
    let parts: Result<Vec<Vec<f32>>> = thread::scope(|scope| {
        let threads: Vec<_> = backends
            .iter()
            .map(|b| {
                scope.spawn(|| {
                    let result = Parts::new(format).evaluate(b, inputs);
                    result.inspect_err(|_| b.leave())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank does not panic")).collect()
    });
    let actual = parts?.concat();
    let tolerance = if inputs == DType::F32 { 2e-5 } else { Parts::tolerance(format, caps, &whole, backends.len()) };
    Ok(Outcome { expected: whole.repeat(backends.len()), actual, tolerance })
}

/// A layer that ranks share out.
struct Parts {
    format: WeightFormat,
    /// `[WIDTH, HIDDEN]`, `[WIDTH, HIDDEN]`, `[HIDDEN, WIDTH]`: the network's, then each expert's.
    weights: Vec<[Source; 3]>,
    /// `[HIDDEN]`.
    bias: Source,
}

impl Parts {
    const HIDDEN: usize = 64;
    const WIDTH: usize = 96;
    const EXPERTS: usize = 7;
    const ROWS: usize = 5;

    fn new(format: WeightFormat) -> Self {
        let source =
            |seed: u64, shape: [usize; 2]| Source::new(format, shape.to_vec(), seed, (shape[1] as f32).sqrt().recip());
        let (into, out_of) = ([Self::WIDTH, Self::HIDDEN], [Self::HIDDEN, Self::WIDTH]);
        let weights = |i: usize| {
            let seed = 10 * i as u64 + 10;
            [source(seed, into), source(seed + 1, into), source(seed + 2, out_of)]
        };
        Self {
            format,
            weights: (0..=Self::EXPERTS).map(weights).collect(),
            bias: Source::new(WeightFormat::F32, vec![Self::HIDDEN], 1, 1.0),
        }
    }

    /// As of experts, and each rank's part is rounded once more.
    fn tolerance(format: WeightFormat, caps: &Caps, whole: &[f32], ranks: usize) -> f32 {
        let (hidden, intermediate) = (Self::HIDDEN, Self::WIDTH);
        let case = Case::Moe { rows: Self::ROWS, hidden, intermediate, experts: Self::EXPERTS, format, groups: None };
        tolerance(&case, caps, whole) * (1.0 + ranks as f32 / 8.0)
    }

    fn evaluate<B: Full>(&self, b: &B, inputs: DType) -> Result<Vec<f32>> {
        let (world, format, rows) = (b.world(), self.format, Self::ROWS);
        let [network, experts @ ..] = self.weights.as_slice() else { unreachable!("as made") };
        let share = world.share(Self::WIDTH);
        let into = |source: &Source| {
            let weight = source.tensor().rows(share.start, share.len());
            b.linear_weight(&HostLinear { weight, bias: None, format, purpose: Purpose::Product })
        };
        let columns = network[2].columns(share.clone());
        let bias = (world.rank == 0).then(|| self.bias.tensor());
        let (gate, up) = (into(&network[0])?, into(&network[1])?);
        let purpose = Purpose::Product;
        let down = b.linear_weight(&HostLinear { weight: columns.tensor(), bias, format, purpose })?;
        let expert = |e: usize| experts[e].each_ref().map(Source::tensor);
        let experts = b.expert_weights(HostExperts {
            count: Self::EXPERTS,
            held: world.share(Self::EXPERTS),
            source: &mut (0..Self::EXPERTS).map(expert).collect::<Vec<_>>(),
            formats: [format; 3],
            limit: None,
            routing: Routing {
                top_k: 3,
                scoring: Scoring::Softmax,
                groups: None,
                norm_topk_prob: true,
                scaling_factor: 1.0,
                by_token: None,
            },
        })?;

        let x = activation(b, inputs, rows, Self::HIDDEN, 2)?;
        let logits = router_logits(b, inputs, rows, Self::EXPERTS)?;
        let inner = || b.tensor(rows, share.len());
        let (mut gates, mut ups, mut product) = (inner()?, inner()?, inner()?);
        let (mut sum, mut routed) = (b.tensor(rows, Self::HIDDEN)?, b.tensor(rows, Self::HIDDEN)?);
        b.gated_linear(Activation::Silu, &x, [(&gate, &mut gates), (&up, &mut ups)], &mut product)?;
        b.linear(&product, &down, &mut sum)?;
        b.all_reduce(&mut sum)?;
        b.fused_moe(&x, &logits, &experts, &mut routed)?;
        b.all_reduce(&mut routed)?;
        outputs(b, &[&sum, &routed])
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn ranks_make_what_the_judge_makes_alone_each_the_same_bits() {
        for size in [1, 2, 3, 4] {
            let backends = Reference::ranks(size, Duration::from_secs(60));
            let outcome = ranks(&backends, WeightFormat::F32).unwrap();
            assert!(outcome.passed(), "{size} ranks: {}", outcome.max_error());
            let bits: Vec<u32> = outcome.actual.iter().map(|x| x.to_bits()).collect();
            let mut each = bits.chunks(bits.len() / size);
            assert!(each.all(|rank| rank == &bits[..bits.len() / size]), "{size} ranks");
        }
    }
}
