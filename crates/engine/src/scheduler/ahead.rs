//! The step behind the one that is under way: planned before anybody knows the tokens that the latter samples, so that the
//! device goes from one to the other without waiting for its host.
//!
//! Invariant: such a plan changes nothing but when things happen. Each of its sequences goes on by the one token that the
//! step under way samples for it, as the next plan would have it; those that turn out to have ended are in it in vain. Nobody
//! loses a place in the order, and of the foreground nobody a block.

use baton_model::StepPlan;

use super::Scheduler;
use crate::sequence::Sequence;
use crate::{DraftMethod, RequestId};

impl Scheduler {
    /// Plans the step behind `last`, the only one that is under way; `None` if the end of that must be waited for. It must
    /// be, unless
    ///
    /// 1. `last` is of the foreground. A step of the background, begun ahead, would stand in the way of who comes meanwhile.
    /// 2. `last` samples every sequence, by a plain draw: the tokens are on the device, and nothing else decides what follows.
    /// 3. Some of its sequences are still running and do not end with it, whatever it samples.
    /// 4. Nobody waits who might be admitted behind it, as far as what tenants were served until now tells who is the first.
    /// 5. No drafts would be made for it, nor by it for the one behind: they follow tokens that nobody knows yet.
    /// 6. Blocks are there without taking any from the foreground.
    pub fn schedule_ahead(&mut self, last: &StepPlan) -> Option<StepPlan> {
        let first = RequestId(last.sequences.first()?.id);
        if first.is_background() || !last.is_plain_draw() || last.sequences.iter().any(|step| step.sample.is_none()) {
            return None;
        }
        let running = || last.sequences.iter().filter_map(|step| self.running.get(&RequestId(step.id)));
        let (ending, staying): (Vec<&Sequence>, Vec<&Sequence>) = running().partition(|sequence| sequence.ends_next());
        let staying: Vec<RequestId> = staying.into_iter().map(|sequence| sequence.id).collect();
        // Behind a prompt that is computed, and behind who ends or has ended, there is more for those that wait.
        let makes_room =
            !ending.is_empty() || !self.in_doubt.is_empty() || running().any(|sequence| sequence.num_pending() > 1);
        if staying.is_empty() || self.drafts(staying.len()) || self.may_admit(staying.len(), makes_room) {
            return None;
        }
        let missing = |ahead: &Self| {
            let of = |id: &RequestId| ahead.blocks.missing(&ahead.running[id], ahead.running[id].tokens.len() + 1);
            staying.iter().map(of).sum::<usize>()
        };
        while self.blocks.available() < missing(self) {
            if !self.preempt_background_for(first) {
                return None;
            }
        }
        let mut plan = StepPlan::default();
        for id in &staying {
            let sequence = self.running.get_mut(id).expect("it is running");
            let end = sequence.tokens.len() + 1;
            assert!(self.blocks.grow(sequence, end), "available blocks were counted");
            self.blocks.give_passing(sequence, end);
            plan.sequences.push(sequence.step_ahead());
            sequence.num_begun = end;
        }
        Some(plan)
    }

    /// Whether a step of so many tokens has to do with drafts.
    fn drafts(&self, tokens: usize) -> bool {
        let proposes = self.speculation.as_ref().is_some_and(|speculation| speculation.method == DraftMethod::Model);
        proposes || self.rows_for_drafts(tokens) > 0
    }

    /// Whether the first of the foreground that waits might be admitted beside `running` others once the step under way has
    /// ended; that step `makes_room` if it may give more to them than is there now.
    fn may_admit(&mut self, running: usize, makes_room: bool) -> bool {
        let Some(first) = self.waiting.first().filter(|first| !first.id().is_background()) else { return false };
        if makes_room {
            return true;
        }
        let mut behind = self.in_order(false);
        behind.retain(|other| first < *other);
        // As it would be admitted: those before it have a row each.
        let planned = running.saturating_sub(behind.len());
        let left = self.max_num_batched_tokens.saturating_sub(planned);
        let beginning = self.beginning(&first, planned + behind.len());
        self.who_gives_way(&first, (planned, left), &beginning, &behind).is_some()
    }
}
