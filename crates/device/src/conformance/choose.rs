//! The choice of tokens: what is drawn, and that the next step finds it. A device may sum in another way than the judge, so draws are
//! such that their token has room on both sides.

use super::inputs::{Source, round, uniform};
use crate::{Backend, DType, Draw, Drawer, HostLinear, Purpose, Result, TokenId, TokenIds, WeightFormat};

/// How a row's token is drawn, and in which part of all.
const DRAWS: [Draw; 16] = {
    const PLAIN: Draw = Draw { temperature: 1.0, ..Draw::LARGEST };
    [
        Draw::LARGEST,
        Draw { uniform: 0.0, ..PLAIN },
        Draw { uniform: 0.37, ..PLAIN },
        Draw { uniform: 1.0 - f64::EPSILON, ..PLAIN },
        Draw { temperature: 100.0, uniform: 0.5, ..PLAIN },
        Draw { temperature: 0.01, uniform: 0.5, ..PLAIN },
        Draw { top_k: 1, uniform: 0.5, ..PLAIN },
        Draw { top_k: 5, uniform: 0.9, ..PLAIN },
        Draw { top_k: 300, uniform: 0.1, temperature: 3.0, ..PLAIN },
        Draw { top_p: 1e-6, uniform: 0.8, ..PLAIN },
        Draw { top_p: 0.5, uniform: 0.7, ..PLAIN },
        Draw { top_p: 0.9, uniform: 0.99, temperature: 0.7, ..PLAIN },
        Draw { min_p: 1.0, uniform: 0.6, ..PLAIN },
        Draw { min_p: 0.3, uniform: 0.2, ..PLAIN },
        Draw { temperature: 2.0, top_k: 50, top_p: 0.8, min_p: 0.05, uniform: 0.95 },
        // Its row is not finite.
        PLAIN,
    ]
};

/// Width of the rows that are looked up by what was chosen.
const WIDTH: usize = 8;

/// A row of logits for each draw; only the last has none. Of few numbers if they are to be equal often.
fn logits(inputs: DType, cols: usize, ties: bool) -> Vec<f32> {
    let mut logits = uniform(1, DRAWS.len() * cols, 8.0);
    if ties {
        logits.iter_mut().for_each(|l| *l = l.round() / 4.0);
    }
    round(&mut logits, inputs);
    let last = logits.len() - 1 - cols / 2;
    logits[last] = f32::NAN;
    logits
}

/// The draw, of a token in whose middle its number lies: the one that it would give, or the next that is about as likely as any.
fn clear(drawer: &mut Drawer, row: &[f32], draw: Draw) -> Draw {
    let row: Vec<f64> = row.iter().map(|l| f64::from(*l)).collect();
    let candidates = drawer.candidates(&row, &draw).to_vec();
    let total: f64 = candidates.iter().map(|c| c.1).sum();
    let most = candidates.iter().map(|c| c.1).fold(0.0, f64::max);
    let mut before = 0.0;
    let mut likely = Vec::new();
    for (_, weight) in &candidates {
        let middle = (before + weight / 2.0) / total;
        before += weight;
        if *weight >= most / 2.0 {
            likely.push((middle, before / total));
        }
    }
    let wanted = likely.iter().find(|(_, end)| *end > draw.uniform).or(likely.first());
    Draw { uniform: wanted.map_or(draw.uniform, |(middle, _)| *middle), ..draw }
}

/// The tokens of all rows, -1 for none, and what a table has for those there are, in another order, behind a known one.
pub(super) fn evaluate<B: Backend>(b: &B, inputs: DType, cols: usize, ties: bool) -> Result<Vec<f32>> {
    let values = logits(inputs, cols, ties);
    let mut logits = b.tensor(DRAWS.len(), cols)?;
    b.write(&values, &mut logits)?;
    let mut drawer = Drawer::default();
    let rows = values.chunks_exact(cols).zip(DRAWS);
    let draws: Vec<Draw> = rows.map(|(row, draw)| clear(&mut drawer, row, draw)).collect();
    let tokens = b.choose(&logits, &draws)?;

    let table = Source::new(WeightFormat::F32, vec![cols, WIDTH], 2, 1.0);
    let (weight, format, purpose) = (table.tensor(), WeightFormat::F32, Purpose::Table);
    let table = b.linear_weight(&HostLinear { weight, bias: None, format, purpose })?;
    let rows = (0..DRAWS.len() as u32 - 1).rev().map(TokenId::Chosen);
    let ids: Vec<TokenId> = std::iter::once(TokenId::Known(0)).chain(rows).collect();
    let mut embedded = b.tensor(ids.len(), WIDTH)?;
    b.embed(TokenIds::Chosen { tokens: &tokens, ids: &ids }, &table, &mut embedded)?;

    let (mut chosen, mut values) = (Vec::new(), Vec::new());
    b.read_chosen(&tokens, &mut chosen)?;
    b.read(&embedded, &mut values)?;
    Ok(chosen.iter().map(|token| token.map_or(-1.0, |token| token as f32)).chain(values).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reference;

    #[test]
    fn draws_of_all_kinds_give_many_tokens_and_only_the_row_that_is_not_finite_has_none() {
        for ties in [false, true] {
            let outputs = evaluate(&Reference::new(), DType::BF16, 1000, ties).unwrap();
            let mut tokens = outputs[..DRAWS.len()].to_vec();
            assert_eq!(tokens.pop(), Some(-1.0));
            tokens.sort_by(f32::total_cmp);
            tokens.dedup();
            assert!(tokens[0] >= 0.0 && tokens.len() > 12, "{tokens:?}");
        }
    }
}
