//! One choice's way from tokens to text: detokenizer, stop strings, reasoning, calls of tools.
//!
//! Stop strings are looked for in the whole text that the model generates, reasoning, calls and their markers included,
//! but not before `min_tokens` tokens are out. Calls are looked for in the answer, never in the reasoning. An output
//! finishes for its calls unless the last one was cut off. Pure: no clock, no channel.

use std::collections::VecDeque;

use baton_text::{Detokenizer, ReasoningSplitter, Segment, StopMatcher, StopOutcome, ToolSplitter};

use crate::openai::shared::Finish;

/// The score of a generated token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Score {
    pub token: u32,
    pub logprob: f32,
    /// The most likely ids, best first.
    pub top: Vec<(u32, f32)>,
    /// Characters of the output before the token.
    pub text_offset: usize,
}

/// Text that may be sent, with the scores of the tokens that have been shown completely with it.
#[derive(Debug, PartialEq)]
pub(crate) struct Delta {
    pub segment: Segment,
    pub scores: Vec<Score>,
}

/// A score that waits until the text of its token is sent.
struct Held {
    score: Score,
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
    tools: Option<ToolSplitter>,
    /// The output has ended in the arguments of a call.
    cut_call: bool,
    min_tokens: usize,
    /// Tokens taken, and those of them that were reasoning.
    tokens: usize,
    reasoning_tokens: usize,
    /// Bytes and characters detokenized; bytes that have passed the stop strings.
    bytes: usize,
    chars: usize,
    released: usize,
    /// `None` if no scores are wanted.
    held: Option<VecDeque<Held>>,
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
            splitter,
            tools: None,
            cut_call: false,
            min_tokens: 0,
            tokens: 0,
            reasoning_tokens: 0,
            bytes: 0,
            chars: 0,
            released: 0,
            held: None,
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
        Self { held: scored.then(VecDeque::new), ..self }
    }

    /// Which of the stop strings ended the choice.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// Tokens taken so far, and those of them that were reasoning.
    pub fn tokens(&self) -> (usize, usize) {
        (self.tokens, self.reasoning_tokens)
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
        let text = self.detokenizer.push(token);
        if let Some(held) = &mut self.held {
            let score = Score { token, logprob, top, text_offset: self.chars };
            held.push_back(Held { score, start: self.bytes, end: self.bytes + text.len() });
        }
        let pushed = self.advance(&text);
        // The closing marker counts too: reasoning before it, not after.
        self.reasoning_tokens += usize::from(before || self.in_reasoning());
        pushed
    }

    /// The engine has ended the choice, perhaps with a stop token; true if the last text completed what ends it too.
    pub fn finish(&mut self, stop_token: Option<u32>) -> (Vec<Delta>, bool) {
        let mut text = String::new();
        if let Some(token) = stop_token.filter(|_| self.include_stop) {
            text += &self.detokenizer.push(token);
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

    /// Scores of tokens that showed no text, once the choice is complete.
    pub fn remaining_scores(&mut self) -> Vec<Score> {
        self.held.iter_mut().flat_map(|held| held.drain(..)).map(|held| held.score).collect()
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
        if let Some(held) = &mut self.held {
            held.retain(|held| held.start < cut);
            held.iter_mut().for_each(|held| held.end = held.end.min(cut));
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
        let segments = self.find_calls(segments);
        self.deltas(segments)
    }

    /// What the splitters still hold.
    fn end(&mut self) -> Vec<Delta> {
        let segments = self.splitter.as_mut().map(ReasoningSplitter::flush).unwrap_or_default();
        let mut segments = self.find_calls(segments);
        if let Some(tools) = &mut self.tools {
            self.cut_call = tools.in_arguments();
            segments.extend(tools.flush());
        }
        self.deltas(segments)
    }

    /// The calls in what is the answer.
    fn find_calls(&mut self, segments: Vec<Segment>) -> Vec<Segment> {
        let Some(tools) = &mut self.tools else { return segments };
        let find = |segment| match segment {
            Segment::Content(text) => tools.push(&text),
            other => vec![other],
        };
        segments.into_iter().flat_map(find).collect()
    }

    /// The scores go with the last segment.
    fn deltas(&mut self, segments: Vec<Segment>) -> Vec<Delta> {
        let mut deltas: Vec<_> = segments.into_iter().map(|segment| Delta { segment, scores: Vec::new() }).collect();
        if let (Some(last), Some(held)) = (deltas.last_mut(), &mut self.held) {
            while let Some(shown) = held.pop_front_if(|held| held.end <= self.released) {
                last.scores.push(shown.score);
            }
        }
        deltas
    }
}
