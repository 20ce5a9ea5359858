//! Steps that begin before the one before them has ended.

use super::{Pool, Sequence};
use baton_model::{Runner, SequenceStep, StepOutput, StepPlan, Tokens};

/// What comes next of a sequence of which so many tokens were begun: more of its prompt, `chunk` tokens at most, or the one that
/// is awaited.
pub fn next(sequence: &Sequence, begun: usize, chunk: usize) -> SequenceStep {
    let left = sequence.prompt_len.saturating_sub(begun);
    if left > 0 {
        return Sequence { num_computed: begun, ..sequence.clone() }.step(left.min(chunk));
    }
    let known = sequence.step(sequence.remaining());
    let mut sample = known.sample.expect("its last token is known");
    sample.position = (begun - sequence.prompt_len + 1) as u32;
    SequenceStep { num_computed: begun, tokens: Tokens::Awaited, sample: Some(sample), ..known }
}

fn keep(sequences: &mut [Sequence], output: StepOutput) {
    for out in output.sequences {
        let sequence = sequences.iter_mut().find(|sequence| sequence.id == out.id).unwrap();
        sequence.output.extend(out.sampled.into_iter().map(Result::unwrap));
    }
}

/// Computes so many tokens of each; of the second, which then leaves, three and another in vain. Prompts are computed in steps of
/// `chunk` tokens, also beside those that have come to their end.
pub fn run_ahead(runner: &mut dyn Runner, sequences: &mut [Sequence], chunk: usize, tokens: usize) {
    let mut pool = Pool::new(runner);
    sequences.iter_mut().for_each(|s| {
        let end = s.tokens.len() + tokens;
        pool.cover(s, end);
    });
    let mut begun = vec![0; sequences.len()];
    for number in 0.. {
        let mut plan = StepPlan { ahead: number > 0, ..StepPlan::default() };
        for (sequence, begun) in sequences.iter().zip(&mut begun) {
            let most = if sequence.id == 1 { tokens.min(4) } else { tokens };
            if *begun < sequence.prompt_len + most - 1 {
                let step = next(sequence, *begun, chunk);
                *begun += step.num_rows();
                plan.sequences.push(step);
            }
        }
        let is_last = plan.sequences.is_empty();
        if !is_last {
            runner.begin(&plan).unwrap();
        }
        if number > 0 {
            let told = runner.finish().unwrap();
            keep(sequences, told);
        }
        if is_last {
            return;
        }
    }
}
