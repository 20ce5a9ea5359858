//! The step behind the one that is under way: planned before anybody knows the tokens that the latter samples, so that the
//! device goes from one to the other without waiting for its host.
//!
//! Invariant: such a plan changes nothing but when things happen. Each of its sequences goes on where the step under way leaves
//! it, as the next plan would have it: by the token which that samples, or by more of its prompt. Those that turn out to have
//! ended are in it in vain. Nobody loses a place in the order, and of the foreground nobody a block.

use std::collections::VecDeque;

use baton_model::StepPlan;

use super::{Scheduler, shares_soon};
use crate::scheduler::queue::Urgency;
use crate::{DraftMethod, RequestId};

impl Scheduler {
    /// Plans the step behind `last`, the only one that is under way; `None` if the end of that must be waited for. It must
    /// be, unless
    ///
    /// 1. `last` is of the foreground. A step of the background, begun ahead, would stand in the way of who comes meanwhile.
    /// 2. Both tell nothing but plain draws: then the tokens are on the device, and nothing else decides what follows.
    /// 3. Some sequences are still running and do not end with `last`, whatever it samples.
    /// 4. Nobody waits who might be admitted behind it, as far as what tenants were served until now tells who is the first.
    /// 5. No drafts would be made for it, nor by it for the one behind: they follow tokens that nobody knows yet.
    /// 6. Blocks are there without taking any from the foreground; of those that pass there are none for more of a prompt
    ///    ([`baton_model::Passing::fewest`]).
    pub fn schedule_ahead(&mut self, last: &StepPlan) -> Option<StepPlan> {
        let first = RequestId(last.sequences.first()?.id);
        if first.is_background() || !last.is_plain_draw() {
            return None;
        }
        // All that run are part of `last`.
        let mut order = self.in_order(false);
        let running = order.len();
        order.retain(|urgency| {
            let sequence = &self.running[&urgency.id()];
            sequence.num_left() > 0 || !sequence.ends_next()
        });
        let makes_room = order.len() < running || !self.in_doubt.is_empty();
        let rows = self.rows_ahead(&order);
        let tells_more = |(urgency, rows): (&Urgency, &usize)| {
            let sequence = &self.running[&urgency.id()];
            sequence.num_left() > 0 && (!sequence.is_plain_draw(*rows) || self.blocks.has_passing())
        };
        if order.is_empty()
            || order.iter().zip(&rows).any(tells_more)
            || self.drafts(rows.iter().sum())
            || self.may_admit(&order, &rows, makes_room)
        {
            return None;
        }
        let missing = |ahead: &Self| {
            let awaited =
                order.iter().map(|urgency| &ahead.running[&urgency.id()]).filter(|other| other.num_left() == 0);
            awaited.map(|sequence| ahead.blocks.missing(sequence, sequence.tokens.len() + 1)).sum::<usize>()
        };
        while self.blocks.available() < missing(self) {
            if !self.preempt_background_for(first) {
                return None;
            }
        }
        let mut plan = StepPlan { ahead: true, ..StepPlan::default() };
        for (urgency, rows) in order.iter().zip(rows) {
            let sequence = self.running.get_mut(&urgency.id()).expect("it is running");
            if sequence.num_left() > 0 {
                self.plan(urgency.id(), rows, &mut plan);
                continue;
            }
            let end = sequence.tokens.len() + 1;
            assert!(self.blocks.grow(sequence, end), "available blocks were counted");
            self.blocks.give_passing(sequence, end);
            plan.sequences.push(sequence.step_awaited());
        }
        self.begun(&plan);
        Some(plan)
    }

    /// How many rows each of these has in a step ahead: one for a token that is awaited, and one at least for more of a prompt.
    fn rows_ahead(&self, order: &VecDeque<Urgency>) -> Vec<usize> {
        let mut left = self.max_num_batched_tokens;
        let rows = order.iter().enumerate().map(|(planned, urgency)| {
            let behind = order.len() - planned - 1;
            let rows = self.running[&urgency.id()].num_left().max(1).min(left - behind);
            left -= rows;
            rows
        });
        rows.collect()
    }

    /// Whether a step of so many tokens has to do with drafts.
    fn drafts(&self, tokens: usize) -> bool {
        let proposes = self.speculation.as_ref().is_some_and(|speculation| speculation.method == DraftMethod::Model);
        proposes || self.rows_for_drafts(tokens) > 0
    }

    /// Whether the first of the foreground that waits might be admitted in its place among those in `order`, which have so many
    /// `rows`, once the step under way has ended; that step `makes_room` if it may give more to it than is there now.
    fn may_admit(&mut self, order: &VecDeque<Urgency>, rows: &[usize], makes_room: bool) -> bool {
        let Some(first) = self.waiting.first().filter(|first| !first.id().is_background()) else { return false };
        let sequence = self.waiting.get(first.rank()).expect("it waits");
        if shares_soon(&self.blocks, self.running.values(), sequence) {
            return false;
        }
        let planned = order.iter().take_while(|other| **other < first).count();
        let left = self.max_num_batched_tokens - rows[..planned].iter().sum::<usize>();
        let behind = order.iter().skip(planned).cloned().collect();
        if makes_room && (left > order.len() - planned || self.gives_way(&first, &self.held(), &behind).is_some()) {
            return true;
        }
        let beginning = self.beginning(&first, order.len());
        self.who_gives_way(&first, (planned, left), &beginning, &behind).is_some()
    }
}
