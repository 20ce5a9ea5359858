//! Stop strings in a text that arrives in pieces.
//!
//! Invariant: what has been emitted plus what is held is the input so far, and the held part is the longest suffix
//! that could still become a stop string. So no part of a stop string is ever sent, and nothing is held without need.

/// Watches a text for the first stop string to be completed (of two completed by the same character, the longer).
#[derive(Debug, Clone)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    held: String,
    stopped: Option<usize>,
}

/// What [`StopMatcher::push`] lets through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that may be sent now.
    pub text: String,
    /// Set once a stop string is complete: its index in the list given to [`StopMatcher::new`].
    pub stopped: Option<usize>,
}

/// A Knuth-Morris-Pratt matcher over bytes. A match begins at a character's first byte since the pattern does.
#[derive(Debug, Clone)]
struct Pattern {
    index: usize,
    bytes: Vec<u8>,
    /// `fallback[n]`: length of the longest proper prefix that is also a suffix of the first `n` bytes.
    fallback: Vec<usize>,
    matched: usize,
}

impl Pattern {
    fn new(index: usize, stop: String) -> Self {
        let bytes = stop.into_bytes();
        let mut fallback = vec![0; bytes.len() + 1];
        for n in 1..bytes.len() {
            let mut k = fallback[n];
            while k > 0 && bytes[k] != bytes[n] {
                k = fallback[k];
            }
            fallback[n + 1] = if bytes[k] == bytes[n] { k + 1 } else { 0 };
        }
        Self { index, bytes, fallback, matched: 0 }
    }

    /// Takes one byte; true when the pattern is complete.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

impl StopMatcher {
    /// A matcher for these stop strings; empty ones are ignored.
    pub fn new(stops: Vec<String>) -> Self {
        let patterns = stops.into_iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        let patterns = patterns.map(|(index, stop)| Pattern::new(index, stop)).collect();
        Self { patterns, held: String::new(), stopped: None }
    }

    /// Takes the next piece of text. Once stopped, everything further is swallowed.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.stopped.is_some() {
            return StopOutcome { text: String::new(), stopped: self.stopped };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (i, &byte) in text.as_bytes().iter().enumerate() {
            let mut longest: Option<(usize, usize)> = None;
            for pattern in &mut self.patterns {
                if pattern.step(byte) && longest.is_none_or(|(len, _)| pattern.bytes.len() > len) {
                    longest = Some((pattern.bytes.len(), pattern.index));
                }
            }
            if let Some((len, index)) = longest {
                self.stopped = Some(index);
                self.held.truncate(before + i + 1 - len);
                return StopOutcome { text: std::mem::take(&mut self.held), stopped: self.stopped };
            }
        }
        let keep = self.patterns.iter().map(|p| p.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        StopOutcome { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// The text has ended: what was held back is ordinary text after all.
    pub fn flush(&mut self) -> String {
        for pattern in &mut self.patterns {
            pattern.matched = 0;
        }
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect());
        let mut out = String::new();
        for piece in pieces {
            let outcome = matcher.push(piece);
            out.push_str(&outcome.text);
            if outcome.stopped.is_some() {
                assert_eq!(matcher.flush(), "", "nothing may follow a stop");
                return (out, outcome.stopped);
            }
        }
        out.push_str(&matcher.flush());
        (out, None)
    }

    /// The obvious version: after every character, does the text end in a stop string?
    fn judge(stops: &[&str], text: &str) -> (String, Option<usize>) {
        for (at, c) in text.char_indices() {
            let seen = &text[..at + c.len_utf8()];
            let hits = stops.iter().enumerate().filter(|(_, s)| !s.is_empty() && seen.ends_with(**s));
            // `max_by_key` takes the last of equals: reversed, the first in the list.
            if let Some((index, stop)) = hits.rev().max_by_key(|(_, s)| s.len()) {
                return (seen[..seen.len() - stop.len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn a_stop_string_cut_across_pieces_never_leaks() {
        assert_eq!(run(&["\n\nUser:"], &["Hi", "\n", "\nUs", "er", ": x"]), ("Hi".into(), Some(0)));
        assert_eq!(run(&["\n\nUser:"], &["Hi\n", "\n\nUser:"]), ("Hi\n".into(), Some(0)));
        assert_eq!(run(&["\n\nUser:"], &["Hi\n", "\nUs"]), ("Hi\n\nUs".into(), None));
        assert_eq!(run(&["", "é!"], &["caf", "é", "é", "!"]), ("café".into(), Some(1)));
    }

    #[test]
    fn text_that_cannot_become_a_stop_string_is_sent_at_once() {
        let mut matcher = StopMatcher::new(vec!["abab!".into()]);
        assert_eq!(matcher.push("xabab").text, "x");
        assert_eq!(matcher.push("a").text, "ab");
        assert_eq!(matcher.push("c").text, "abac");
    }

    proptest! {
        #[test]
        fn any_chunking_gives_what_the_naive_matcher_gives(
            text in "[abé]{0,24}",
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces = crate::testing::cut(&text, &cuts);
            prop_assert_eq!(run(&stops, &pieces), judge(&stops, &text));
        }
    }
}
