//! Prompts on their way into the engine, and what is told of them: their text before the output, and how likely each of
//! their tokens was.
//!
//! Encoding is work on text, to be done off the threads that serve.

use baton_engine::{PositionScore, PromptScores};
use baton_text::{TextError, TextModel};

use crate::error::ApiError;
use crate::generate::choice::{Likelihood, Score};
use crate::generation::Generation;
use crate::openai::params::{Params, Truncate};

/// The text of a prompt that comes before the output.
#[derive(Debug)]
pub(crate) struct Echo {
    text: String,
    /// Characters of the text before each token.
    offsets: Vec<usize>,
}

impl Echo {
    /// The text of these ids: `given`, if they were encoded from it.
    pub fn new(text: &TextModel, ids: &[u32], given: Option<String>, skip_special_tokens: bool) -> Self {
        let mut detokenizer = text.detokenizer(skip_special_tokens && given.is_none());
        let (mut decoded, mut offsets) = (String::new(), Vec::with_capacity(ids.len()));
        let mut chars = 0;
        for &id in ids {
            offsets.push(chars);
            let piece = detokenizer.push(id);
            chars += piece.chars().count();
            decoded += &piece;
        }
        decoded += &detokenizer.flush();
        let Some(given) = given else { return Self { text: decoded, offsets } };
        // Special tokens around the text, which nobody wrote, are no part of it.
        let before = decoded.strip_suffix(&given).map_or(0, |before| before.chars().count());
        let end = given.chars().count();
        offsets.iter_mut().for_each(|offset| *offset = offset.saturating_sub(before).min(end));
        Self { text: given, offsets }
    }
}

/// What is told of one prompt.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub ids: Vec<u32>,
    echo: Option<Echo>,
    /// Scores of the echo's tokens, and of this many most likely ones.
    logprobs: Option<u32>,
    /// The engine has been asked for the scores of all positions.
    asked: bool,
    positions: Vec<PositionScore>,
    /// Stop tokens, whose likelihood in the place of the first token of the output is known with the scores.
    ends: Vec<u32>,
}

impl Told {
    /// Nothing is known of the prompt yet. `ends`: the tokens that end its output.
    pub fn new(ids: Vec<u32>, echo: Option<Echo>, params: &Params, ends: &[u32]) -> Self {
        let logprobs = params.logprobs.filter(|_| echo.is_some());
        let asked = logprobs.is_some() || params.prompt_logprobs.is_some();
        Self { ids, echo, logprobs, asked, positions: Vec::new(), ends: ends.to_vec() }
    }

    /// What the engine is asked for, once per prompt.
    pub fn request(&self, params: &Params) -> Option<PromptScores> {
        let top = self.logprobs.max(params.prompt_logprobs);
        let targets = [(self.ids.len().saturating_sub(1), self.ends.clone())].into();
        self.asked.then(|| PromptScores { top: top.unwrap_or(0), targets, hidden: None })
    }

    /// More positions of the prompt, in order.
    pub fn extend(&mut self, positions: Vec<PositionScore>) {
        self.positions.extend(positions);
    }

    /// Whether all is known that was asked for.
    pub fn complete(&self) -> bool {
        !self.asked || self.positions.len() == self.ids.len()
    }

    /// The text before the output and, if they are wanted, the scores of its tokens.
    pub fn echo(&self) -> Option<(&str, Vec<Score>)> {
        let echo = self.echo.as_ref()?;
        let Some(top) = self.logprobs else { return Some((&echo.text, Vec::new())) };
        let score = |(i, (&token, &text_offset))| match self.before(i) {
            None => Score { token, logprob: None, top: Vec::new(), text_offset },
            Some(before) => Score { token, logprob: before.next, top: first(&before.top, top as usize), text_offset },
        };
        Some((&echo.text, self.ids.iter().zip(&echo.offsets).enumerate().map(score).collect()))
    }

    /// What the model expected in the place of a token of the prompt; `None` for the first.
    pub fn before(&self, token: usize) -> Option<&PositionScore> {
        self.positions.get(token.checked_sub(1)?)
    }

    /// How likely this stop token was in the place of the first token of the output, if the prompt's scores come with
    /// those of the output.
    pub fn first_stop(&self, stop_token: u32) -> Option<Likelihood> {
        let behind = self.positions.last()?;
        let nth = self.ends.iter().position(|&end| end == stop_token)?;
        Some((*behind.targets.get(nth)?, first(&behind.top, self.logprobs? as usize)))
    }
}

fn first(top: &[(u32, f32)], count: usize) -> Vec<(u32, f32)> {
    top[..count.min(top.len())].to_vec()
}

/// How the text of a prompt becomes its ids.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Encoding {
    add_special_tokens: bool,
    truncate: Option<Truncate>,
    /// Tokens that a prompt which is cut to the context leaves for the output.
    output: usize,
}

impl Encoding {
    /// As the request wants it, else with these defaults of its endpoint.
    pub fn new(params: &Params, add_special_tokens: bool, max_tokens: Option<u32>) -> Self {
        let output = params.max_tokens.or(max_tokens).unwrap_or(1).max(params.min_tokens).max(1);
        let add_special_tokens = params.add_special_tokens.unwrap_or(add_special_tokens);
        Self { add_special_tokens, truncate: params.truncate, output: output as usize }
    }

    /// The ids of a text; true if its beginning is not among them.
    pub fn ids(&self, generation: &Generation, text: &str) -> Result<(Vec<u32>, bool), TextError> {
        let mut ids = generation.text.encode(text, self.add_special_tokens)?;
        let cut = self.truncate(generation, &mut ids);
        Ok((ids, cut))
    }

    /// Takes off the beginning of a prompt what is not wanted; true if there was any.
    pub fn truncate(&self, generation: &Generation, ids: &mut Vec<u32>) -> bool {
        let keep = match self.truncate {
            None => return false,
            Some(Truncate::To(tokens)) => tokens as usize,
            Some(Truncate::ToContext) => generation.engine.spec().max_model_len.saturating_sub(self.output).max(1),
        };
        let cut = ids.len().saturating_sub(keep);
        ids.drain(..cut);
        cut > 0
    }
}

/// Scores of prompts that one reply tells, at most: some 200 MB of JSON.
const MAX_TOLD: usize = 1 << 21;

/// Refuses to tell too much of prompts: each token, with the most likely ones beside it, in each choice.
pub(crate) fn bound_scores(prompts: &[Vec<u32>], params: &Params) -> Result<(), ApiError> {
    let tokens = prompts.iter().map(Vec::len).sum::<usize>().saturating_mul(params.n as usize);
    let asked = [("logprobs", params.logprobs.filter(|_| params.echo)), ("prompt_logprobs", params.prompt_logprobs)];
    for (field, top) in asked {
        if top.is_some_and(|top| tokens.saturating_mul(top as usize + 1) > MAX_TOLD) {
            let accepted = format!("so small that at most {MAX_TOLD} scores of prompts are told");
            return Err(ApiError::out_of_range(field, accepted));
        }
    }
    Ok(())
}

/// The ways in which words that must not be written are tokens: at the beginning of a text, and behind a space.
pub(crate) fn bad_words(text: &TextModel, words: &[String]) -> Result<Vec<Vec<u32>>, ApiError> {
    let mut encoded = Vec::with_capacity(2 * words.len());
    for word in words {
        let word = word.trim_start();
        for word in [word.to_owned(), format!(" {word}")] {
            let ids = text.encode(&word, false);
            encoded.push(ids.map_err(|_| ApiError::invalid("bad_words", "a word cannot be tokenized"))?);
        }
    }
    encoded.retain(|ids| !ids.is_empty());
    encoded.sort_unstable();
    encoded.dedup();
    Ok(encoded)
}
