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

    /// Allows all ids below `vocab_size`.
    pub(crate) fn all(vocab_size: usize) -> Self {
        let mut mask = Self { words: vec![u32::MAX; vocab_size.div_ceil(32)] };
        mask.truncate(vocab_size);
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

    /// Allows no id from `vocab_size` on any more.
    pub(crate) fn truncate(&mut self, vocab_size: usize) {
        self.words.truncate(vocab_size.div_ceil(32));
        if let Some(last) = self.words.get_mut(vocab_size / 32) {
            *last &= (1 << (vocab_size % 32)) - 1;
        }
    }

    /// Whether no id is allowed.
    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// As given to [`from_words`](Self::from_words).
    pub(crate) fn words(&self) -> &[u32] {
        &self.words
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

    /// The mask for the next token, then those behind each token of `draft` as far as these are allowed and can be
    /// followed: at least one, at most one more than drafts. `None` allows everything; a mask allows at least one id.
    /// Leaves the state as it is.
    ///
    /// # Errors
    /// As [`accept`](Self::accept), but never because of a draft: no output depends on those.
    fn masks(&mut self, draft: &[u32]) -> Result<Vec<Option<TokenMask>>, ConstraintError>;
}

type Masks = Result<Vec<Option<TokenMask>>, ConstraintError>;

/// The masks of one sequence in one step, being computed elsewhere, as seen from behind some of the step's drafts:
/// none at first. Clones wait for the same masks.
#[derive(Debug, Clone, Default)]
pub struct StepMasks {
    slot: Arc<(Mutex<Option<Masks>>, Condvar)>,
    /// Drafts that were accepted so far.
    drafts: usize,
}

impl StepMasks {
    /// Hands in what was computed. Whoever takes on the work must, or the step waits for ever.
    pub fn set(&self, masks: Masks) {
        let (slot, ready) = &*self.slot;
        *slot.lock() = Some(masks);
        ready.notify_all();
    }

    /// The next draft was accepted: from now on [`wait`](Self::wait) is for the mask behind it.
    pub fn advance(&mut self) {
        self.drafts += 1;
    }

    /// Whether there is a mask here, once it can be told. Without one the step ends here, and the next goes on.
    pub(crate) fn reach(&self) -> bool {
        self.read(|masks| masks.as_ref().map_or(true, |masks| self.drafts < masks.len()))
    }

    /// The mask for the next token, once it is there; `None` allows everything.
    ///
    /// # Errors
    /// If the grammar cannot be followed any further.
    pub fn wait(&self) -> Result<Option<TokenMask>, ConstraintError> {
        self.read(|masks| match masks {
            Ok(masks) => Ok(masks.get(self.drafts).cloned().flatten()),
            Err(error) => Err(error.clone()),
        })
    }

    fn read<T>(&self, read: impl FnOnce(&Masks) -> T) -> T {
        let (slot, ready) = &*self.slot;
        let mut slot = slot.lock();
        ready.wait_while(&mut slot, |slot| slot.is_none());
        read(slot.as_ref().expect("waited for"))
    }
}

/// Two steps are the same work if they wait for the same masks.
impl PartialEq for StepMasks {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.slot, &other.slot) && self.drafts == other.drafts
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

    #[test]
    fn a_mask_ends_at_its_vocabulary_wherever_that_is() {
        for vocab_size in [1, 31, 32, 33, 64, 100] {
            let mut mask = TokenMask::all(vocab_size);
            assert_eq!(mask.ids().collect::<Vec<_>>(), (0..vocab_size as u32).collect::<Vec<_>>());
            (0..200).for_each(|id| mask.forbid(id));
            assert!(mask.is_empty());
            let mut wide = TokenMask::from_words(vec![u32::MAX; 9]);
            wide.truncate(vocab_size);
            assert_eq!(wide, TokenMask::all(vocab_size));
        }
        let mut narrow = TokenMask::only(32, [3]);
        narrow.truncate(500);
        assert_eq!(narrow.ids().collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn a_step_gets_the_mask_behind_the_drafts_that_were_accepted() {
        let masks = StepMasks::default();
        let mut behind = masks.clone();
        behind.advance();
        assert_ne!(masks, behind);
        let waiting = std::thread::spawn({
            let masks = masks.clone();
            move || masks.wait()
        });
        let [first, second] = [[1], [2]].map(|ids| Some(TokenMask::only(5, ids)));
        masks.set(Ok(vec![first.clone(), second.clone()]));
        assert_eq!((waiting.join().unwrap(), behind.wait()), (Ok(first), Ok(second)));
        assert!(masks.reach() && behind.reach());
        behind.advance();
        assert!(!behind.reach());
        masks.set(Err(ConstraintError("no more".into())));
        assert_eq!(masks.wait(), Err(ConstraintError("no more".into())));
        assert!(masks.reach(), "to be told of the failure");
    }
}
