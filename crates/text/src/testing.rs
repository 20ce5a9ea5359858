//! Helpers of this crate's own tests.

/// Cuts a text at any character boundaries.
pub(crate) fn cut<'a>(text: &'a str, cuts: &[proptest::sample::Index]) -> Vec<&'a str> {
    let mut at: Vec<usize> = text.char_indices().map(|(i, _)| i).collect();
    at.push(text.len());
    let mut bounds: Vec<usize> = cuts.iter().map(|c| *c.get(&at)).chain([0, text.len()]).collect();
    bounds.sort_unstable();
    bounds.windows(2).map(|w| &text[w[0]..w[1]]).collect()
}
