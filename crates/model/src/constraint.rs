//! What an output may be: the seam between whoever knows a grammar and whoever chooses tokens.
//!
//! A [`Grammar`] is what a request asks for; a [`Constraint`] is its state in one sequence, behind the tokens chosen so
//! far. Masks take time that depends on the grammar, so the engine has them computed beside the forward pass of the
//! step that samples with them; a sampler waits for its mask ([`StepMasks`]), nobody else does.

use std::fmt::Debug;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

/// Ids that may be chosen: one bit for each id of the vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u32>,
}

impl TokenMask {
    /// Of `words[i]`, bit `b` allows the id `32 i + b`; ids beyond them are not allowed.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// Allows these ids and no other; `vocab_size` is above all of them.
    pub fn only(vocab_size: usize, ids: impl IntoIterator<Item = u32>) -> Self {
        let mut mask = Self { words: vec![0; vocab_size.div_ceil(32)] };
        ids.into_iter().for_each(|id| mask.allow(id));
        mask
    }

    /// Allows an id as well.
    pub fn allow(&mut self, id: u32) {
        self.words[id as usize / 32] |= 1 << (id % 32);
    }

    /// Allows an id no longer.
    pub fn forbid(&mut self, id: u32) {
        if let Some(word) = self.words.get_mut(id as usize / 32) {
            *word &= !(1 << (id % 32));
        }
    }

    /// Whether an id is allowed.
    pub fn allows(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// All allowed ids, ascending.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        let bits = |(word, mut bits): (u32, u32)| {
            std::iter::from_fn(move || {
                let bit = bits.trailing_zeros();
                bits &= bits.checked_sub(1)?;
                Some(32 * word + bit)
            })
        };
        (0..).zip(self.words.iter().copied()).flat_map(bits)
    }
}

/// A grammar cannot be followed any further, for example because a limit of its parser is reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintError(pub String);

/// What the outputs of a request must be. Shared by its choices.
pub trait Grammar: Debug + Send + Sync {
    /// The state before the first token. `ends`: the tokens that end the output; they are allowed where it may end.
    fn begin(&self, ends: &[u32]) -> Box<dyn Constraint>;
}

/// Two requests ask for the same if they share their grammar.
impl PartialEq for dyn Grammar {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::addr_eq(self, other)
    }
}

/// A grammar's state in one sequence.
pub trait Constraint: Send {
    /// Takes the next token of the output, which its mask allowed.
    ///
    /// # Errors
    /// If the grammar cannot be followed any further.
    fn accept(&mut self, token: u32) -> Result<(), ConstraintError>;

    /// The mask for the next token, then those behind each token of `draft` as far as they are allowed: at least one, at
    /// most one more than drafts. `None` allows everything; a mask allows at least one id. Leaves the state as it is.
    ///
    /// # Errors
    /// As [`accept`](Self::accept).
    fn masks(&mut self, draft: &[u32]) -> Result<Vec<Option<TokenMask>>, ConstraintError>;
}

type Masks = Result<Vec<Option<TokenMask>>, ConstraintError>;

/// The masks of one sequence in one step, being computed elsewhere.
#[derive(Debug, Clone, Default)]
pub struct StepMasks(Arc<(Mutex<Option<Masks>>, Condvar)>);

impl StepMasks {
    /// Hands in what was computed. Whoever takes on the work must, or the step waits for ever.
    pub fn set(&self, masks: Masks) {
        let (slot, ready) = &*self.0;
        *slot.lock() = Some(masks);
        ready.notify_all();
    }

    /// The mask behind the first `drafts` drafts, once it is there; `None` allows everything.
    ///
    /// # Errors
    /// If the grammar cannot be followed any further.
    pub fn wait(&self, drafts: usize) -> Result<Option<TokenMask>, ConstraintError> {
        let (slot, ready) = &*self.0;
        let mut slot = slot.lock();
        while slot.is_none() {
            ready.wait(&mut slot);
        }
        match slot.as_ref().expect("waited for") {
            Ok(masks) => Ok(masks.get(drafts).cloned().flatten()),
            Err(error) => Err(error.clone()),
        }
    }
}

/// Two steps are the same work if they wait for the same masks.
impl PartialEq for StepMasks {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_allows_what_it_was_given() {
        for ids in [vec![], vec![0], vec![31, 32], vec![5, 64, 99]] {
            let mask = TokenMask::only(100, ids.clone());
            assert_eq!(mask.ids().collect::<Vec<_>>(), ids);
            assert!((0..200).all(|id| mask.allows(id) == ids.contains(&id)));
        }
    }
}
