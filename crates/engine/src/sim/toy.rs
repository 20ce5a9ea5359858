//! A grammar without a language: what is allowed next is a hash of the output so far. It makes sure that the engine
//! follows it token by token, whatever else the sequence goes through.

use baton_model::{Constraint, ConstraintError, Grammar, TokenMask};

use super::mock_model::mix;

/// See the head of the file.
#[derive(Debug)]
pub(crate) struct ToyGrammar {
    /// Two seeds are two grammars.
    pub seed: u64,
    /// Ids are below it.
    pub vocab_size: u32,
    /// Outputs of so many tokens cannot be followed any further.
    pub fails_after: Option<usize>,
}

#[derive(Clone)]
struct ToyConstraint {
    vocab_size: u32,
    /// Of the tokens so far.
    hash: u64,
    /// How many more tokens it takes.
    left: usize,
    ends: Vec<u32>,
}

impl Grammar for ToyGrammar {
    fn begin(&self, ends: &[u32]) -> Box<dyn Constraint> {
        Box::new(ToyConstraint {
            vocab_size: self.vocab_size,
            hash: mix(self.seed, 0),
            left: self.fails_after.unwrap_or(usize::MAX),
            ends: ends.to_vec(),
        })
    }
}

impl ToyConstraint {
    /// Everything in a third of all states, else about two of three ids and, in half of them, the ends.
    fn mask(&self) -> Result<Option<TokenMask>, ConstraintError> {
        if self.left == 0 {
            return Err(ConstraintError("the toy is broken".into()));
        }
        if self.hash.is_multiple_of(3) {
            return Ok(None);
        }
        let may_end = self.hash.is_multiple_of(2);
        let always = (self.hash % u64::from(self.vocab_size)) as u32;
        let allowed = |id: &u32| match self.ends.contains(id) {
            true => may_end,
            false => *id == always || !mix(self.hash, u64::from(*id)).is_multiple_of(3),
        };
        let mut mask = TokenMask::only(self.vocab_size as usize, (0..self.vocab_size).filter(allowed));
        if mask.ids().next().is_none() {
            mask.allow(always);
        }
        Ok(Some(mask))
    }
}

impl Constraint for ToyConstraint {
    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        assert!(self.mask()?.is_none_or(|mask| mask.allows(token)), "a token that the grammar refuses");
        self.hash = mix(self.hash, u64::from(token));
        self.left -= 1;
        Ok(())
    }

    fn masks(&mut self, draft: &[u32]) -> Result<Vec<Option<TokenMask>>, ConstraintError> {
        let mut masks = vec![self.mask()?];
        let mut behind = self.clone();
        for &token in draft {
            if masks.last().expect("one at least").as_ref().is_some_and(|mask| !mask.allows(token)) {
                break;
            }
            behind.accept(token)?;
            match behind.mask() {
                Ok(mask) => masks.push(mask),
                Err(_) => break,
            }
        }
        Ok(masks)
    }
}
