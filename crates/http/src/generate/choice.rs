//! One choice's way from tokens to text: detokenizer, stop strings, reasoning, calls of tools.
//!
//! Stop strings are looked for in the whole text that the model generates, reasoning, calls and their markers included,
//! but not before `min_tokens` tokens are out. Calls are looked for in the answer, never in the reasoning. An output
//! finishes for its calls unless the last one was cut off. Pure: no clock, no channel.

use std::collections::VecDeque;

use baton_text::{Detokenizer, ReasoningSplitter, Segment, StopMatcher, StopOutcome, ToolSplitter};

use crate::openai::shared::Finish;

/// The score of a token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Score {
    pub token: u32,
    /// `None` of the first token of a prompt, which follows nothing.
    pub logprob: Option<f32>,
    /// The most likely ids, best first.
    pub top: Vec<(u32, f32)>,
    /// Characters of the output before the token.
    pub text_offset: usize,
}

/// Text that may be sent, with the scores and ids of the tokens that have been shown completely with it.
#[derive(Debug, PartialEq)]
pub(crate) struct Delta {
    pub segment: Segment,
    pub tokens: Tokens,
}

/// Tokens of a choice, as far as they were asked for.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Tokens {
    /// Of each token that is shown.
    pub scores: Vec<Score>,
    /// All that were generated, a stop token and those of a stop string included.
    pub ids: Vec<u32>,
}

/// A token's log-probability, and the most likely ids with theirs, best first.
pub(crate) type Likelihood = (f32, Vec<(u32, f32)>);

/// A token that waits until its text is sent.
struct Held {
    token: u32,
    /// `None` if it is not wanted, or nothing of the token is shown.
    score: Option<Score>,
    /// The token's bytes in the output.
    start: usize,
    end: usize,
}

/// The text of one choice.
pub(crate) struct ChoiceText {
    detokenizer: Detokenizer,
    stops: Vec<String>,
    matcher: StopMatcher,
    /// Which stop string was found.
    matched: Option<usize>,
    include_stop: bool,
    splitter: Option<ReasoningSplitter>,
    hide_reasoning: bool,
    /// Where the answer begins in the output, in bytes, once that is known.
    answer_start: Option<usize>,
    tools: Option<ToolSplitter>,
    /// The output has ended in the arguments of a call.
    cut_call: bool,
    min_tokens: usize,
    /// Tokens taken, and those of them that were reasoning.
    tokens: usize,
    reasoning_tokens: usize,
    /// Of all tokens taken.
    sum_logprobs: f64,
    /// Bytes and characters detokenized; bytes that have passed the stop strings.
    bytes: usize,
    chars: usize,
    released: usize,
    /// Whether scores, and whether ids are wanted.
    scored: bool,
    with_ids: bool,
    held: VecDeque<Held>,
}

impl ChoiceText {
    /// The text of a choice that has no token yet.
    pub fn new(detokenizer: Detokenizer, stops: Vec<String>, splitter: Option<ReasoningSplitter>) -> Self {
        Self {
            detokenizer,
            matcher: StopMatcher::new(stops.clone()),
            stops,
            matched: None,
            include_stop: false,
            answer_start: splitter.is_none().then_some(0),
            splitter,
            hide_reasoning: false,
            tools: None,
            cut_call: false,
            min_tokens: 0,
            tokens: 0,
            reasoning_tokens: 0,
            sum_logprobs: 0.0,
            bytes: 0,
            chars: 0,
            released: 0,
            scored: false,
            with_ids: false,
            held: VecDeque::new(),
        }
    }

    /// Finds calls of tools.
    pub fn tools(self, tools: Option<ToolSplitter>) -> Self {
        Self { tools, ..self }
    }

    /// Looks for no stop string among so many first tokens.
    pub fn min_tokens(self, min_tokens: u32) -> Self {
        Self { min_tokens: min_tokens as usize, ..self }
    }

    /// Leaves the stop string, or the text of the stop token, in the output.
    pub fn include_stop(self, include_stop: bool) -> Self {
        Self { include_stop, ..self }
    }

    /// Collects scores.
    pub fn scored(self, scored: bool) -> Self {
        Self { scored, ..self }
    }

    /// Collects ids.
    pub fn with_ids(self, with_ids: bool) -> Self {
        Self { with_ids, ..self }
    }

    /// Gives nothing of what is reasoning, but for its number of tokens.
    pub fn hide_reasoning(self, hide_reasoning: bool) -> Self {
        Self { hide_reasoning, ..self }
    }

    /// The prompt, whose tokens these are, comes before the output.
    pub fn echo(&mut self, text: &str, scores: Vec<Score>) -> Delta {
        self.chars += text.chars().count();
        Delta { segment: Segment::Content(text.to_owned()), tokens: Tokens { scores, ids: Vec::new() } }
    }

    /// Which of the stop strings ended the choice.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// Tokens taken so far, and those of them that were reasoning.
    pub fn tokens(&self) -> (usize, usize) {
        (self.tokens, self.reasoning_tokens)
    }

    /// Of the tokens taken; 0 if there are none.
    pub fn mean_logprob(&self) -> f64 {
        self.sum_logprobs / self.tokens.max(1) as f64
    }

    /// Why the choice is complete, given how it ended.
    pub fn reason(&self, ended: Finish) -> Finish {
        let calls = self.tools.as_ref().is_some_and(|tools| tools.calls() > 0);
        if ended == Finish::Stop && calls && !self.cut_call { Finish::ToolCalls } else { ended }
    }

    /// Takes a token; true if a stop string or the only call is complete and the choice with it.
    pub fn push(&mut self, token: u32, logprob: f32, top: Vec<(u32, f32)>) -> (Vec<Delta>, bool) {
        let before = self.in_reasoning();
        self.tokens += 1;
        self.sum_logprobs += f64::from(logprob);
        let text = self.detokenizer.push(token);
        self.hold(token, Some((logprob, top)), &text);
        let pushed = self.advance(&text);
        // The closing marker counts too: reasoning before it, not after.
        self.reasoning_tokens += usize::from(before || self.in_reasoning());
        pushed
    }

    /// The engine has ended the choice, perhaps with a stop token, whose score may be known; true if the last text
    /// completed what ends it too.
    pub fn finish(&mut self, stop_token: Option<(u32, Option<Likelihood>)>) -> (Vec<Delta>, bool) {
        let mut text = String::new();
        if let Some((token, score)) = stop_token {
            if self.include_stop {
                text += &self.detokenizer.push(token);
            }
            self.hold(token, score, &text);
        }
        text += &self.detokenizer.flush();
        let (mut deltas, stopped) = self.advance(&text);
        if !stopped {
            let rest = self.matcher.flush();
            deltas.extend(self.release(&rest));
            deltas.extend(self.end());
        }
        (deltas, stopped)
    }

    /// Tokens that showed no text, once the choice is complete.
    pub fn remaining_tokens(&mut self) -> Tokens {
        if !self.in_reasoning() {
            self.answer_start.get_or_insert(self.released);
        }
        self.take_tokens(usize::MAX)
    }

    fn hold(&mut self, token: u32, score: Option<Likelihood>, text: &str) {
        if self.scored || self.with_ids {
            let score = score.filter(|_| self.scored).map(|(logprob, top)| Score {
                token,
                logprob: Some(logprob),
                top,
                text_offset: self.chars,
            });
            self.held.push_back(Held { token, score, start: self.bytes, end: self.bytes + text.len() });
        }
    }

    fn in_reasoning(&self) -> bool {
        self.splitter.as_ref().is_some_and(ReasoningSplitter::in_reasoning)
    }

    fn advance(&mut self, text: &str) -> (Vec<Delta>, bool) {
        self.bytes += text.len();
        self.chars += text.chars().count();
        if self.tokens <= self.min_tokens {
            return (self.release(text), self.is_over());
        }
        let StopOutcome { mut text, stopped } = self.matcher.push(text);
        let Some(index) = stopped else { return (self.release(&text), self.is_over()) };
        self.matched = Some(index);
        if self.include_stop {
            text.push_str(&self.stops[index]);
        }
        // Of the tokens around the cut, those remain that show some text before it.
        let cut = self.released + text.len();
        for held in &mut self.held {
            held.score.take_if(|_| held.start >= cut);
            held.end = held.end.min(cut);
        }
        let mut deltas = self.release(&text);
        deltas.extend(self.end());
        (deltas, true)
    }

    fn is_over(&self) -> bool {
        self.tools.as_ref().is_some_and(ToolSplitter::is_over)
    }

    /// Text that has passed the stop strings.
    fn release(&mut self, text: &str) -> Vec<Delta> {
        self.released += text.len();
        let segments = match &mut self.splitter {
            Some(splitter) => splitter.push(text),
            None if text.is_empty() => Vec::new(),
            None => vec![Segment::Content(text.to_owned())],
        };
        let segments = self.attribute(segments);
        self.deltas(segments)
    }

    /// What the splitters still hold.
    fn end(&mut self) -> Vec<Delta> {
        let segments = self.splitter.as_mut().map(ReasoningSplitter::flush).unwrap_or_default();
        let mut segments = self.attribute(segments);
        if let Some(tools) = &mut self.tools {
            self.cut_call = tools.in_arguments();
            segments.extend(tools.flush());
        }
        self.deltas(segments)
    }

    /// The answer, with the calls in it, and the reasoning before it unless that is hidden.
    fn attribute(&mut self, mut segments: Vec<Segment>) -> Vec<Segment> {
        if let Some(Segment::Content(text)) = segments.last() {
            // It is all of the answer up to here, if it is its beginning.
            self.answer_start.get_or_insert(self.released - text.len());
        }
        if self.hide_reasoning {
            segments.retain(|segment| !matches!(segment, Segment::Reasoning(_)));
        }
        let Some(tools) = &mut self.tools else { return segments };
        let find = |segment| match segment {
            Segment::Content(text) => tools.push(&text),
            other => vec![other],
        };
        segments.into_iter().flat_map(find).collect()
    }

    /// The tokens go with the last segment.
    fn deltas(&mut self, segments: Vec<Segment>) -> Vec<Delta> {
        let delta = |segment| Delta { segment, tokens: Tokens::default() };
        let mut deltas: Vec<_> = segments.into_iter().map(delta).collect();
        if let Some(last) = deltas.last_mut() {
            last.tokens = self.take_tokens(self.released);
        }
        deltas
    }

    /// Tokens whose text ends no later than `end`, but for hidden ones.
    fn take_tokens(&mut self, end: usize) -> Tokens {
        let mut tokens = Tokens::default();
        while let Some(Held { token, score, start, .. }) = self.held.pop_front_if(|held| held.end <= end) {
            if self.hide_reasoning && self.answer_start.is_none_or(|answer| start < answer) {
                continue;
            }
            tokens.scores.extend(score);
            if self.with_ids {
                tokens.ids.push(token);
            }
        }
        tokens
    }
}
