//! Speculation: where drafts come from and when they pay.
//!
//! A draft never changes an output (see [`baton_model::SequenceStep::sample_along`]), so everything here is about
//! cost. While a step reads all weights for a few rows, one more row is nearly free, and a draft that is accepted
//! saves a share of a step. So two limits: a step is not filled beyond [`SpeculationConfig::disable_by_batch_size`]
//! rows with drafts; and a sequence drafts only as far as its own past drafts say that it pays ([`worth`]).
//!
//! All decisions depend on counts and tokens, none on time: a seed replays a run.

/// How drafts are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DraftMethod {
    /// Prompt lookup: what followed the last tokens where they occurred before, in prompt or output.
    Ngram {
        /// Tokens that must occur again, at least; at least one.
        min: usize,
        /// More are not compared: the longest match up to here is taken, of equals the latest.
        max: usize,
    },
    /// The runner proposes them: the model has a module for it.
    Model,
}

/// Settings of speculation, for all requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpeculationConfig {
    /// Where drafts come from.
    pub method: DraftMethod,
    /// Drafts of a sequence in a step, at most.
    pub num_speculative_tokens: usize,
    /// Rows of a step (tokens and drafts of all sequences) up to which drafts are added. Beyond some number arithmetic
    /// bounds a step, not the reading of weights, and a draft costs as much as a token.
    pub disable_by_batch_size: usize,
}

/// What speculation has brought; the names are those of vLLM's metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpeculationStats {
    /// Counter: times a sequence had drafts in a step.
    pub drafts: u64,
    /// Counter: tokens of these drafts.
    pub draft_tokens: u64,
    /// Counter: how many of them became output.
    pub accepted_tokens: u64,
    /// Counter: the same by place in the draft.
    pub accepted_by_position: Vec<u64>,
}

impl SpeculationStats {
    pub(crate) fn new(config: &SpeculationConfig) -> Self {
        Self { accepted_by_position: vec![0; config.num_speculative_tokens], ..Self::default() }
    }

    pub(crate) fn observe(&mut self, drafted: usize, accepted: usize) {
        self.drafts += 1;
        self.draft_tokens += drafted as u64;
        self.accepted_tokens += accepted as u64;
        self.accepted_by_position[..accepted].iter_mut().for_each(|count| *count += 1);
    }
}

/// Tokens that prompt lookup goes back over, which bounds the time it takes.
const LOOKUP_WINDOW: usize = 16 << 10;

/// The `count` tokens that followed the latest among the longest earlier occurrences of the last `min..=max` tokens;
/// none if there is no such. A match that overlaps the end goes on as what it has just given: a period repeats.
pub(crate) fn lookup(tokens: &[u32], (min, max): (usize, usize), count: usize) -> Vec<u32> {
    let Some(&last) = tokens.last() else { return Vec::new() };
    let mut best = (0, 0);
    // Each end of an earlier occurrence, the latest first.
    for end in (tokens.len().saturating_sub(LOOKUP_WINDOW).max(1)..tokens.len()).rev() {
        if tokens[end - 1] != last {
            continue;
        }
        let pairs = tokens[..end].iter().rev().zip(tokens.iter().rev());
        let matched = pairs.take(max).take_while(|(a, b)| a == b).count();
        if matched > best.0 {
            best = (matched, end);
            if matched == max {
                break;
            }
        }
    }
    let (matched, end) = best;
    if matched < min.max(1) {
        return Vec::new();
    }
    let mut draft: Vec<u32> = Vec::with_capacity(count);
    for i in end..end + count {
        draft.push(tokens.get(i).copied().unwrap_or_else(|| draft[i - tokens.len()]));
    }
    draft
}

/// The time that a row adds to a step, over what a step takes without any: about 0.2 for models of a billion and more
/// parameters in blocks on a CPU, where 8 rows take 2.2 times as long as one.
const ROW_COST: f64 = 0.2;

/// The chance of acceptance from which on a draft pays in a step of `rows` that gives `tokens` without it. A step
/// takes `1 + c·rows`; one more row for `p` more tokens makes tokens faster if `p > tokens · c / (1 + c·rows)`.
pub(crate) fn worth(tokens: usize, rows: usize) -> f64 {
    tokens as f64 * ROW_COST / (1.0 + ROW_COST * rows as f64)
}

/// How far one sequence drafts, from how its drafts fared.
///
/// Each tested place of a draft is a trial: right until the first wrong one, behind which nothing is known. Past
/// trials fade, so the estimate follows the text. Places are drafted while the chance that all up to there are right
/// is worth it. Where not even the first is, a single one is tried now and then, ever more rarely.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Drafting {
    tested: f64,
    accepted: f64,
    /// Samples since the last draft.
    idle: u32,
    /// Of these, how many shall pass before a draft is tried that does not seem worth it.
    wait: u32,
}

impl Drafting {
    /// The weight that past trials keep with each sample.
    const FADE: f64 = 0.9;
    /// Waits double up to this many samples.
    const MAX_WAIT: u32 = 64;

    /// A sequence starts hopeful, with little conviction.
    pub fn new() -> Self {
        Self { tested: 2.0, accepted: 1.6, idle: 0, wait: 1 }
    }

    /// Drafts to have in the next step, of `most`, if they must be right with a chance of `worth`.
    pub fn length(&self, most: usize, worth: f64) -> usize {
        let rate = self.accepted / self.tested;
        let (mut length, mut chance) = (0, rate);
        while length < most && chance >= worth {
            length += 1;
            chance *= rate;
        }
        if length == 0 && self.idle >= self.wait { most.min(1) } else { length }
    }

    /// A token was sampled without drafts. Meanwhile the past means less.
    pub fn without(&mut self) {
        self.idle = self.idle.saturating_add(1);
        self.fade();
    }

    /// Of `drafted` tokens the first `accepted` were right.
    pub fn judged(&mut self, drafted: usize, accepted: usize) {
        self.idle = 0;
        self.wait = if accepted > 0 { 1 } else { (self.wait * 2).min(Self::MAX_WAIT) };
        self.fade();
        self.tested += drafted.min(accepted + 1) as f64;
        self.accepted += accepted as f64;
    }

    fn fade(&mut self) {
        // Not below what keeps the rate a number.
        if self.tested > 1e-3 {
            self.tested *= Self::FADE;
            self.accepted *= Self::FADE;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_longest_match_wins_and_of_equals_the_latest() {
        let tokens = [1, 2, 3, 9, 2, 3, 8, 2, 3, 7, 1, 2, 3];
        assert_eq!(lookup(&tokens, (1, 3), 2), [9, 2]);
        assert_eq!(lookup(&tokens, (1, 2), 2), [7, 1]);
        assert!(lookup(&tokens, (4, 4), 2).is_empty());
        assert!(lookup(&[5, 6], (1, 3), 2).is_empty());
        assert!(lookup(&[], (1, 3), 2).is_empty());
    }

    #[test]
    fn a_period_goes_on_beyond_the_end() {
        assert_eq!(lookup(&[7, 7], (1, 4), 3), [7, 7, 7]);
        assert_eq!(lookup(&[9, 1, 2, 1, 2], (2, 4), 5), [1, 2, 1, 2, 1]);
    }

    proptest! {
        #[test]
        fn a_draft_is_what_followed_an_occurrence_of_the_last_tokens(
            tokens in prop::collection::vec(0..4u32, 0..60), min in 1..4usize, more in 0..3usize, count in 1..5usize
        ) {
            let draft = lookup(&tokens, (min, min + more), count);
            let occurs = |n: usize| {
                (n < tokens.len()).then(|| (n..tokens.len()).any(|end| tokens[end - n..end] == tokens[tokens.len() - n..]))
            };
            prop_assert_eq!(draft.len(), if occurs(min) == Some(true) { count } else { 0 });
            if !draft.is_empty() {
                let all = [&tokens[..], &draft].concat();
                let matched = (min..=min + more).rev().find(|&n| occurs(n) == Some(true)).unwrap();
                let known = tokens.len();
                let source = (matched..known).any(|end| {
                    all[end - matched..end] == all[known - matched..known] && all[end..end + count] == draft
                });
                prop_assert!(source);
            }
        }
    }

    /// Steps with drafts and drafts in all, if each place is right when `right` says so.
    fn run(steps: usize, most: usize, mut right: impl FnMut(usize) -> bool) -> (usize, usize) {
        let (mut drafting, mut with, mut all) = (Drafting::new(), 0, 0);
        for step in 0..steps {
            let length = drafting.length(most, worth(1, 1));
            if length == 0 {
                drafting.without();
                continue;
            }
            (with, all) = (with + 1, all + length);
            let accepted = (0..length).take_while(|_| right(step)).count();
            drafting.judged(length, accepted);
        }
        (with, all)
    }

    #[test]
    fn drafts_that_are_right_grow_to_the_limit_and_wrong_ones_all_but_stop() {
        assert_eq!(run(100, 4, |_| true).0, 100);
        assert!(run(100, 4, |_| true).1 > 380);
        let (with, all) = run(1000, 4, |_| false);
        assert!(with < 30 && all < 40, "{with} steps with {all} drafts");
    }

    #[test]
    fn a_draft_must_be_surer_the_more_rows_a_step_has_unless_these_are_a_prompt() {
        assert!(worth(1, 1) < worth(4, 4) && worth(4, 4) < worth(16, 16) && worth(16, 16) < 1.0);
        assert!(worth(1, 500) < worth(1, 1));
    }

    #[test]
    fn a_text_that_becomes_predictable_is_noticed() {
        let (with, all) = run(1000, 4, |step| step >= 500);
        assert!(with > 400 && all > 1500, "{with} steps with {all} drafts");
    }
}
