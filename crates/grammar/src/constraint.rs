//! A compiled grammar, and its state in one sequence.

use std::fmt;
use std::sync::Arc;

use baton_model::{Constraint, ConstraintError, Grammar, TokenMask};
use llguidance::Matcher;
use llguidance::api::StopReason;

use crate::GrammarError;

/// A grammar before the first token. Immutable: each sequence has a copy, the lexer's tables included, so that no
/// sequence waits for another and none can exhaust another's limits.
pub(crate) struct Compiled {
    matcher: Matcher,
    /// Number of ids. The trie has one more, which stands for the end of the output.
    size: usize,
}

impl Compiled {
    /// Refuses what cannot begin.
    pub fn new(mut matcher: Matcher, size: usize, refuse: impl FnOnce() -> GrammarError) -> Result<Self, GrammarError> {
        // The first mask; what it learns about the lexer is kept for all sequences.
        if !matcher.is_stopped() && matcher.compute_mask().is_err() {
            return Err(match matcher.stop_reason() {
                StopReason::NoExtension | StopReason::NoExtensionBias => GrammarError::Unsatisfiable,
                _ => refuse(),
            });
        }
        Ok(Self { matcher, size })
    }

    /// The state before the first token.
    pub fn following(&self, ends: &[u32]) -> Following {
        Following { matcher: self.matcher.deep_clone(), size: self.size, ends: ends.into(), ended: false }
    }
}

impl Grammar for Compiled {
    fn begin(&self, ends: &[u32]) -> Box<dyn Constraint> {
        Box::new(self.following(ends))
    }
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").field("size", &self.size).finish_non_exhaustive()
    }
}

/// See the head of the file.
#[derive(Clone)]
pub(crate) struct Following {
    matcher: Matcher,
    size: usize,
    ends: Arc<[u32]>,
    /// A token of `ends` has been taken.
    ended: bool,
}

impl Following {
    /// Tokens that the grammar allows next. One of `ends` is allowed only where the output may end, even if it has a text
    /// that would fit here; but where no other is left, it is allowed, for then the client wants to stop just there.
    pub fn mask(&mut self) -> Result<TokenMask, ConstraintError> {
        let width = self.ends.iter().map(|&end| end as usize + 1).max().unwrap_or(0).max(self.size);
        if self.ended || self.matcher.is_stopped() {
            return match self.ended || self.matcher.stop_reason().is_ok() {
                true => self.only_ends(width),
                false => Err(self.failure()),
            };
        }
        let set = self.matcher.compute_mask().map_err(|_| self.failure())?;
        let may_end = set.is_allowed(self.size as u32);
        let mut words = set.as_slice().to_vec();
        words.resize(width.div_ceil(32), 0);
        // The id that stands for the end, which no model has.
        if let Some(word) = words.get_mut(self.size / 32) {
            *word &= !(1 << (self.size % 32));
        }
        let as_text: Vec<u32> = self.ends.iter().copied().filter(|&end| set.is_allowed(end)).collect();
        for &end in &*self.ends {
            let bit = 1 << (end % 32);
            match may_end {
                true => words[end as usize / 32] |= bit,
                false => words[end as usize / 32] &= !bit,
            }
        }
        if words.iter().any(|&word| word != 0) {
            return Ok(TokenMask::from_words(words));
        }
        match as_text.is_empty() {
            true => Err(ConstraintError("no token can go on here, and none can end the output".into())),
            false => Ok(TokenMask::only(width, as_text)),
        }
    }

    fn only_ends(&self, width: usize) -> Result<TokenMask, ConstraintError> {
        match self.ends.is_empty() {
            true => Err(ConstraintError("the output is complete, and no token can end it".into())),
            false => Ok(TokenMask::only(width, self.ends.iter().copied())),
        }
    }

    /// In our words: the library's repeat the client's.
    fn failure(&self) -> ConstraintError {
        ConstraintError(match self.matcher.stop_reason() {
            StopReason::LexerTooComplex | StopReason::ParserTooComplex => {
                "a limit of the grammar's parser is reached".into()
            }
            _ => "the grammar cannot be followed any further".into(),
        })
    }
}

impl Constraint for Following {
    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        if self.ends.contains(&token) {
            self.ended = true;
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|_| self.failure())
    }

    fn masks(&mut self, draft: &[u32]) -> Result<Vec<Option<TokenMask>>, ConstraintError> {
        let mut masks = vec![Some(self.mask()?)];
        let mut ahead: Option<Self> = None;
        for &token in draft {
            let allowed = masks.last().and_then(Option::as_ref).is_some_and(|mask| mask.allows(token));
            if !allowed || self.ends.contains(&token) {
                break;
            }
            let ahead = ahead.get_or_insert_with(|| self.clone());
            // What cannot be followed behind a draft is no failure before it has become output.
            let Ok(mask) = ahead.accept(token).and_then(|()| ahead.mask()) else { break };
            masks.push(Some(mask));
        }
        Ok(masks)
    }
}

/// Allows everything.
#[derive(Debug)]
pub(crate) struct Unbounded;

impl Grammar for Unbounded {
    fn begin(&self, _ends: &[u32]) -> Box<dyn Constraint> {
        Box::new(Self)
    }
}

impl Constraint for Unbounded {
    fn accept(&mut self, _token: u32) -> Result<(), ConstraintError> {
        Ok(())
    }

    fn masks(&mut self, draft: &[u32]) -> Result<Vec<Option<TokenMask>>, ConstraintError> {
        Ok(vec![None; draft.len() + 1])
    }
}
