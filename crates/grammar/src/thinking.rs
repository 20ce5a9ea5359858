//! Lets a model think before the grammar begins, for as long as it may.
//!
//! Where thinking begins and ends is decided as the splitter of outputs decides it: by the markers' text. While a model
//! thinks it may choose anything but the end of the output and, so that the close is where the constraint sees it,
//! ordinary tokens that complete the closing marker's text. The closing token is forced when the budget is spent.

use std::fmt;
use std::sync::Arc;

use baton_model::{Constraint, ConstraintError, Grammar, TokenMask};

use crate::Vocabulary;
use crate::constraint::{Compiled, Following};

/// How a model thinks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thinking {
    /// Id of the token that opens thinking.
    pub open: u32,
    /// Id of the token that closes it.
    pub close: u32,
    /// The prompt has opened it. Else the model may, with its first token.
    pub starts_inside: bool,
    /// Most tokens between the two; `None` for no bound.
    pub budget: Option<usize>,
}

/// White space behind the closing token that may precede what the grammar begins with, in tokens; it is dropped from
/// the answer.
const MAX_SPACES: usize = 2;

/// What is known of a vocabulary and its closing marker.
pub(crate) struct Closing {
    open: u32,
    close: u32,
    open_text: Box<[u8]>,
    close_text: Box<[u8]>,
    vocabulary: Vocabulary,
    /// By the length of the closing marker's beginning that the thoughts end with: everything that does not complete it,
    /// and the closing token.
    unclosed: Vec<TokenMask>,
    /// Tokens that are white space.
    spaces: Vec<u32>,
}

impl Closing {
    pub fn new(vocabulary: &Vocabulary, thinking: &Thinking) -> Self {
        let text = |id: u32| vocabulary.texts.get(id as usize).cloned().unwrap_or_default();
        let close_text = text(thinking.close);
        let ids = || (0..).zip(vocabulary.texts.iter());
        let unclosed = (0..close_text.len().max(1)).map(|held| {
            let kept = ids().filter(|(id, text)| {
                *id == thinking.close || !matches!(follow(&close_text, held, text), Followed::Complete)
            });
            TokenMask::only(vocabulary.size(), kept.map(|(id, _)| id))
        });
        let is_space = |text: &[u8]| !text.is_empty() && text.iter().all(u8::is_ascii_whitespace);
        Self {
            open: thinking.open,
            close: thinking.close,
            open_text: text(thinking.open),
            unclosed: unclosed.collect(),
            spaces: ids().filter(|(_, text)| is_space(text)).map(|(id, _)| id).collect(),
            vocabulary: vocabulary.clone(),
            close_text,
        }
    }

    pub fn is_of(&self, thinking: &Thinking) -> bool {
        (self.open, self.close) == (thinking.open, thinking.close)
    }

    fn text(&self, token: u32) -> &[u8] {
        self.vocabulary.texts.get(token as usize).map(|text| &**text).unwrap_or_default()
    }
}

enum Followed {
    /// The marker is complete within the text.
    Complete,
    /// The text ends with so many bytes of the marker's beginning.
    Held(usize),
}

/// Looks for a marker in a text before which `held` bytes of the marker's beginning stand.
fn follow(marker: &[u8], held: usize, text: &[u8]) -> Followed {
    if marker.is_empty() {
        return Followed::Held(0);
    }
    let mut seen = marker[..held].to_vec();
    for &byte in text {
        seen.push(byte);
        while !marker.starts_with(&seen) {
            seen.remove(0);
        }
        if seen.len() == marker.len() {
            return Followed::Complete;
        }
    }
    Followed::Held(seen.len())
}

/// Thinking, then what a grammar says, or anything.
pub(crate) struct Thoughtful {
    answer: Option<Arc<Compiled>>,
    thinking: Thinking,
    closing: Arc<Closing>,
}

impl Thoughtful {
    pub fn new(answer: Option<Arc<Compiled>>, thinking: Thinking, closing: Arc<Closing>) -> Self {
        Self { answer, thinking, closing }
    }
}

impl Grammar for Thoughtful {
    fn begin(&self, ends: &[u32]) -> Box<dyn Constraint> {
        let phase = match self.thinking.starts_inside {
            true => Phase::Inside { spent: 0, held: 0 },
            false => Phase::Start { text: Vec::new() },
        };
        Box::new(Thinker {
            phase,
            answer: self.answer.as_ref().map(|answer| answer.following(ends)),
            budget: self.thinking.budget,
            closing: self.closing.clone(),
            ends: ends.into(),
        })
    }
}

impl fmt::Debug for Thoughtful {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { answer, thinking, closing: _ } = self;
        f.debug_struct("Thoughtful").field("answer", answer).field("thinking", thinking).finish()
    }
}

#[derive(Clone)]
enum Phase {
    /// Nothing but white space and perhaps part of the opening marker so far.
    Start { text: Vec<u8> },
    /// Thinking for so many tokens; the last bytes are so many of the closing marker's beginning.
    Inside { spent: usize, held: usize },
    /// Behind the closing marker, with so many tokens of white space.
    Closed { spaces: usize },
    /// In the answer.
    Answer,
}

#[derive(Clone)]
struct Thinker {
    phase: Phase,
    /// `None` for an answer that may be anything.
    answer: Option<Following>,
    budget: Option<usize>,
    closing: Arc<Closing>,
    ends: Arc<[u32]>,
}

impl Thinker {
    fn mask(&mut self) -> Result<Option<TokenMask>, ConstraintError> {
        match self.phase {
            Phase::Start { .. } => {
                let Some(mut mask) = self.answer_mask()? else { return Ok(None) };
                mask.allow(self.closing.open);
                Ok(Some(mask))
            }
            Phase::Inside { spent, .. } if self.budget.is_some_and(|budget| spent >= budget) => {
                Ok(Some(TokenMask::only(self.closing.vocabulary.size(), [self.closing.close])))
            }
            Phase::Inside { held, .. } if self.answer.is_some() => {
                let mut mask = self.closing.unclosed[held].clone();
                self.ends.iter().filter(|&&end| end != self.closing.close).for_each(|&end| mask.forbid(end));
                Ok(Some(mask))
            }
            Phase::Closed { spaces } if spaces < MAX_SPACES => {
                let Some(mut mask) = self.answer_mask()? else { return Ok(None) };
                self.closing.spaces.iter().filter(|id| !self.ends.contains(id)).for_each(|&id| mask.allow(id));
                Ok(Some(mask))
            }
            Phase::Inside { .. } => Ok(None),
            Phase::Closed { .. } | Phase::Answer => self.answer_mask(),
        }
    }

    fn answer_mask(&mut self) -> Result<Option<TokenMask>, ConstraintError> {
        self.answer.as_mut().map(Following::mask).transpose()
    }

    /// Takes a token in front of the answer; false if it belongs to the answer.
    fn takes(&mut self, token: u32) -> Result<bool, ConstraintError> {
        let closing = self.closing.clone();
        match &mut self.phase {
            Phase::Start { .. } if token == closing.open => self.phase = Phase::Inside { spent: 0, held: 0 },
            Phase::Start { text } if self.answer.is_none() => {
                text.extend_from_slice(closing.text(token));
                let shown = text.trim_ascii_start();
                if shown.starts_with(&closing.open_text) {
                    self.phase = Phase::Inside { spent: 0, held: 0 };
                } else if !closing.open_text.starts_with(shown) {
                    self.phase = Phase::Answer;
                } else if shown.is_empty() {
                    text.clear();
                }
            }
            Phase::Start { .. } => return Ok(false),
            Phase::Inside { .. } if token == closing.close => self.phase = Phase::Closed { spaces: 0 },
            Phase::Inside { spent, held } => match follow(&closing.close_text, *held, closing.text(token)) {
                Followed::Complete => self.phase = Phase::Closed { spaces: 0 },
                Followed::Held(now) => (*spent, *held) = (*spent + 1, now),
            },
            Phase::Closed { spaces } if *spaces < MAX_SPACES && closing.spaces.binary_search(&token).is_ok() => {
                let expected = match &mut self.answer {
                    Some(answer) => answer.mask()?.allows(token),
                    None => false,
                };
                if expected {
                    return Ok(false);
                }
                *spaces += 1;
            }
            Phase::Closed { .. } | Phase::Answer => return Ok(false),
        }
        Ok(true)
    }
}

impl Constraint for Thinker {
    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        if self.takes(token)? {
            return Ok(());
        }
        self.phase = Phase::Answer;
        match &mut self.answer {
            Some(answer) => answer.accept(token),
            None => Ok(()),
        }
    }

    fn masks(&mut self, draft: &[u32]) -> Result<Vec<Option<TokenMask>>, ConstraintError> {
        if let (Phase::Answer, Some(answer)) = (&self.phase, &mut self.answer) {
            return answer.masks(draft);
        }
        let mut masks = vec![self.mask()?];
        let mut ahead: Option<Self> = None;
        for &token in draft {
            let allowed = masks.last().and_then(Option::as_ref).is_none_or(|mask| mask.allows(token));
            if !allowed || self.ends.contains(&token) {
                break;
            }
            let ahead = ahead.get_or_insert_with(|| self.clone());
            let Ok(mask) = ahead.accept(token).and_then(|()| ahead.mask()) else { break };
            masks.push(mask);
        }
        Ok(masks)
    }
}
