//! Which ids may be chosen at all, before any of them is weighed.
//!
//! Four rules, the strongest first: the grammar's mask, `allowed_token_ids`, `bad_words`, and end tokens before `min_tokens`.
//! Where a rule would refuse all that those before it left, it is not followed. So there is always something to
//! choose, and whatever is chosen, the grammar allows it.

use crate::{ConstraintError, SampleRequest, SequenceFailure, TokenMask};

/// Ids below `vocab_size` that the request may have next, at least one; `None` if all. Waits for the grammar's mask.
pub(crate) fn choosable(vocab_size: usize, request: &SampleRequest) -> Result<Option<TokenMask>, SequenceFailure> {
    let params = &*request.params;
    let mut mask = match &request.masks {
        Some(masks) => masks.wait()?,
        None => None,
    };
    if let Some(mask) = &mut mask {
        mask.truncate(vocab_size);
        if mask.is_empty() {
            return Err(ConstraintError("it allows no token that the model has".into()).into());
        }
    }
    if let Some(ids) = &params.allowed_token_ids {
        let left = |id: &u32| (*id as usize) < vocab_size && mask.as_ref().is_none_or(|mask| mask.allows(*id));
        let narrowed = TokenMask::only(vocab_size, ids.iter().copied().filter(left));
        if !narrowed.is_empty() {
            mask = Some(narrowed);
        }
    }
    refuse(&mut mask, vocab_size, completions(request));
    if request.position < params.min_tokens {
        refuse(&mut mask, vocab_size, params.suppressed_until_min.iter().copied());
    }
    Ok(mask)
}

/// Whether any of the rules can apply, now or as the request advances.
pub(crate) fn restricts(request: &SampleRequest) -> bool {
    let params = &*request.params;
    request.masks.is_some()
        || params.allowed_token_ids.is_some()
        || !params.bad_words.is_empty()
        || request.position < params.min_tokens
}

/// Takes the ids away, unless nothing would be left.
fn refuse(mask: &mut Option<TokenMask>, vocab_size: usize, ids: impl Iterator<Item = u32>) {
    let mut ids = ids.peekable();
    if ids.peek().is_none() {
        return;
    }
    let mut narrowed = mask.clone().unwrap_or_else(|| TokenMask::all(vocab_size));
    ids.for_each(|id| narrowed.forbid(id));
    if !narrowed.is_empty() {
        *mask = Some(narrowed);
    }
}

/// The ids that would complete a bad word: all but its last are the end of the output.
fn completions(request: &SampleRequest) -> impl Iterator<Item = u32> {
    let output = request.history.get(request.prompt_len..).unwrap_or_default();
    let completion = move |word: &Vec<u32>| {
        let (&last, before) = word.split_last()?;
        output.ends_with(before).then_some(last)
    };
    request.params.bad_words.iter().filter_map(completion)
}
