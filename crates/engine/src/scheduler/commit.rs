//! What becomes of sequences: the result of a step, and every way in which a request ends.
//!
//! Invariant: a sequence leaves the scheduler through [`finish`](Scheduler::finish) and nowhere else, once, holding nothing.

use std::time::Duration;

use baton_model::{SampledToken, SequenceFailure, SequenceOutput, StepOutput, StepPlan};

use super::{RequestOutput, Scheduler};
use crate::block::Blocks;
use crate::scheduler::OUTPUT_TOKEN;
use crate::sequence::Sequence;
use crate::{EngineFailure, FinishReason, OutputEvent, RequestId};

impl Scheduler {
    /// Takes the result of the earliest step under way, entry by entry. What it gave sequences that have ended since it was
    /// begun is ignored.
    pub fn commit(&mut self, plan: &StepPlan, output: StepOutput, now: Duration) -> Vec<RequestOutput> {
        let mut outputs = Vec::new();
        self.counters.step_tokens.observe(plan.num_tokens());
        self.counters.steps_ahead += u64::from(plan.ahead);
        for (step, result) in plan.sequences.iter().zip(output.sequences) {
            let id = RequestId(step.id);
            let Some(sequence) = self.running.get_mut(&id) else {
                self.end_doubt(id, &result);
                continue;
            };
            debug_assert_eq!(sequence.num_computed, step.num_computed, "steps come one after the other");
            let end = step.num_computed + step.tokens.count();
            self.counters.prompt_tokens_computed +=
                end.min(sequence.prompt_len).saturating_sub(step.num_computed) as u64;
            sequence.num_computed = end;
            let sampled = match result.scores {
                // Whatever was sampled came of the same values.
                Err(failure) => vec![Err(failure)],
                Ok(scores) => {
                    if !scores.is_empty() {
                        let event = OutputEvent::PromptScores(sequence.take_scores(scores));
                        outputs.push(RequestOutput { id, event });
                    }
                    result.sampled
                }
            };
            if !sampled.is_empty() {
                sequence.proposed = result.proposed;
                outputs.extend(self.take_samples(id, &step.draft, sampled, now));
            }
            if let Some(sequence) = self.running.get_mut(&id) {
                self.unclean.extend(self.blocks.pass(sequence));
            }
        }
        outputs
    }

    /// Takes what was sampled for a sequence, token by token: each is judged as if it had come alone, and what was
    /// sampled behind an end is forgotten.
    fn take_samples(
        &mut self,
        id: RequestId,
        draft: &[u32],
        sampled: Vec<Result<SampledToken, SequenceFailure>>,
        now: Duration,
    ) -> Vec<RequestOutput> {
        let mut outputs = Vec::new();
        let mut end = None;
        let sequence = self.running.get_mut(&id).expect("what is planned is running until committed");
        let known = sequence.tokens.len();
        for sampled in sampled {
            let SampledToken { token, logprob, top } = match sampled {
                Ok(sampled) => sampled,
                Err(failure) => {
                    end = Some(FinishReason::Error(failure.into()));
                    break;
                }
            };
            // A sample behind a draft: it was accepted, and is computed.
            sequence.num_computed = sequence.tokens.len();
            self.blocks.publish(sequence);
            sequence.tokens.push(token);
            sequence.first_token_at.get_or_insert(now);
            self.counters.generated_tokens += 1;
            self.waiting.charge(sequence, OUTPUT_TOKEN);

            let stop = sequence.stop_token_ids.contains(&token).then_some(FinishReason::Stop { token });
            if stop.is_none() {
                outputs.push(RequestOutput { id, event: OutputEvent::Token { token, logprob, top } });
            }
            let length = (sequence.num_output() >= sequence.max_tokens).then_some(FinishReason::Length);
            end = stop.or(length);
            if end.is_some() {
                break;
            }
        }
        if draft.is_empty() {
            sequence.drafting.without();
        } else {
            let accepted =
                draft.iter().zip(&sequence.tokens[known..]).take_while(|(draft, token)| draft == token).count();
            sequence.drafting.judged(draft.len(), accepted);
            let stats = self.counters.speculation.as_mut().expect("there are drafts");
            stats.observe(draft.len(), accepted);
        }
        match end {
            None => self.blocks.trim(sequence),
            Some(reason) => outputs.push(self.end_running(id, reason, now)),
        }
        outputs
    }

    /// Ends a sequence by what its step gave.
    fn end_running(&mut self, id: RequestId, reason: FinishReason, now: Duration) -> RequestOutput {
        let mut sequence = self.running.remove(&id).expect("it was part of the step");
        match reason {
            // Also what a step begun ahead writes for it: blocks are cleared behind all that was begun.
            FinishReason::Error(EngineFailure::NonFiniteLogits) => {
                self.unclean.extend(self.blocks.discard(&mut sequence))
            }
            _ => {
                self.keep_in_doubt(&mut sequence);
                self.blocks.release(&mut sequence);
            }
        }
        self.finish(sequence, reason, now)
    }

    /// Takes the blocks of a sequence that ends before its time.
    fn take_unfinished(&mut self, sequence: &mut Sequence) {
        self.keep_in_doubt(sequence);
        self.unclean.extend(self.blocks.release_unfinished(sequence));
    }

    /// Comes before the blocks of a sequence that ends are given back. A step begun ahead may still read and write them: it
    /// does so before any step that somebody else gets them for. But what it writes may turn out to be not finite, so these
    /// blocks are kept back.
    fn keep_in_doubt(&mut self, sequence: &mut Sequence) {
        if sequence.is_under_way() {
            self.in_doubt.insert(sequence.id, self.blocks.detach_begun(sequence));
        }
    }

    /// Takes the blocks back that a step wrote for a sequence which had ended.
    fn end_doubt(&mut self, id: RequestId, result: &SequenceOutput) {
        // None of one that failed: its blocks were discarded.
        let Some(blocks) = self.in_doubt.remove(&id) else { return };
        self.blocks.release_detached(&blocks);
        // In the midst of a prompt nothing vouches for them.
        if !matches!(result.sampled[..], [Ok(_)]) {
            self.unclean.extend(blocks);
        }
    }

    /// Takes all blocks back that are kept for the step under way, which has failed. None is to be trusted.
    fn end_all_doubts(&mut self) {
        for blocks in std::mem::take(&mut self.in_doubt).into_values() {
            self.blocks.release_detached(&blocks);
            self.unclean.extend(blocks);
        }
    }

    /// Ends the requests that should have started, or ended, by now and have not.
    pub fn expire(&mut self, now: Duration) -> Vec<RequestOutput> {
        let running = self.running.extract_if(.., |_, sequence| sequence.overdue(now).is_some());
        let mut overdue: Vec<Sequence> = running.map(|(_, sequence)| sequence).collect();
        overdue.extend(self.waiting.extract(|sequence| sequence.overdue(now).is_some()));
        let end = |mut sequence: Sequence| {
            let failure = sequence.overdue(now).expect("it was looked for");
            self.take_unfinished(&mut sequence);
            self.finish(sequence, FinishReason::Error(failure), now)
        };
        overdue.into_iter().map(end).collect()
    }

    /// Ends a request at the client's wish. `None` if it has ended already.
    pub fn abort(&mut self, id: RequestId, now: Duration) -> Option<RequestOutput> {
        let mut sequence = self.running.remove(&id).or_else(|| self.waiting.remove_id(id))?;
        self.take_unfinished(&mut sequence);
        Some(self.finish(sequence, FinishReason::Aborted, now))
    }

    /// Ends all sequences that hold blocks after steps under way failed as a whole, and forgets all cached blocks:
    /// nobody knows what the step left in the cache. The waiting ones have nothing there and go on.
    pub fn fail_running(&mut self, failure: &EngineFailure, now: Duration) -> Vec<RequestOutput> {
        let mut outputs = Vec::new();
        while let Some((_, mut sequence)) = self.running.pop_first() {
            self.unclean.extend(self.blocks.discard(&mut sequence));
            outputs.push(self.finish(sequence, FinishReason::Error(failure.clone()), now));
        }
        self.end_all_doubts();
        self.unclean.extend(self.blocks.forget_cached());
        self.counters.failed_steps += 1;
        outputs
    }

    /// Another runner has taken the place of one that failed, after [`fail_running`](Self::fail_running): nothing is in
    /// its cache, and adapters are as it has them. Ends the requests whose adapter it does not have.
    pub fn renewed(&mut self, now: Duration) -> Vec<RequestOutput> {
        debug_assert!(self.running.is_empty(), "whoever held blocks has failed");
        self.unclean = Blocks::default();
        let lost = self.waiting.extract(|sequence| !sequence.renew_adapter());
        let end = |sequence| self.finish(sequence, FinishReason::Error(EngineFailure::AdapterLost), now);
        lost.into_iter().map(end).collect()
    }

    /// Ends everything.
    pub fn fail_all(&mut self, failure: &EngineFailure, now: Duration) -> Vec<RequestOutput> {
        let mut all: Vec<Sequence> = std::mem::take(&mut self.running).into_values().collect();
        all.extend(self.waiting.extract(|_| true));
        self.end_all_doubts();
        all.into_iter()
            .map(|mut sequence| {
                self.blocks.release(&mut sequence);
                self.finish(sequence, FinishReason::Error(failure.clone()), now)
            })
            .collect()
    }

    /// The last event of a sequence that is neither running nor waiting any more and holds no block.
    pub(super) fn finish(&mut self, sequence: Sequence, reason: FinishReason, now: Duration) -> RequestOutput {
        debug_assert!(
            sequence.table.blocks().is_empty() && sequence.table.passing().is_empty(),
            "an ended sequence holds no block"
        );
        if sequence.start.is_none() {
            self.leaves_queue(&sequence);
        }
        let finished = &mut self.counters.finished;
        match reason {
            FinishReason::Stop { .. } => finished.stop += 1,
            FinishReason::Length => finished.length += 1,
            FinishReason::Aborted => finished.aborted += 1,
            FinishReason::Error(ref failure) => {
                finished.error += 1;
                finished.non_finite_logits += u64::from(*failure == EngineFailure::NonFiniteLogits);
            }
        }
        let event = OutputEvent::Finished { reason, usage: sequence.usage(), timings: sequence.timings(now) };
        RequestOutput { id: sequence.id, event }
    }
}
