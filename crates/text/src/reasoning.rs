//! Separates a model's reasoning from its answer by the text markers around the reasoning.
//!
//! Invariant: the splitter's state is a function of the characters seen, never of how they were cut into pieces; each
//! character is sent once, except the markers and the white space that touches them.

/// The pair of tokens between which a model thinks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReasoningMarkers {
    /// Text of the token that opens reasoning, `<think>`.
    pub open: String,
    /// Text of the token that ends it, `</think>`.
    pub close: String,
    /// Id of the opening token.
    pub open_id: u32,
    /// Id of the closing token.
    pub close_id: u32,
}

/// A piece of output, attributed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Part of the model's reasoning.
    Reasoning(String),
    /// Part of its answer.
    Content(String),
    /// Begins the next call of a tool.
    Call {
        /// The call's number in the output, from 0.
        index: usize,
        /// The tool's name, whole.
        name: String,
    },
    /// Part of the arguments of a call that has begun.
    Arguments {
        /// As the call's.
        index: usize,
        /// Part of their JSON text.
        text: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Only white space and perhaps part of an opening marker so far. `inside`: the prompt has opened reasoning.
    Start { inside: bool },
    /// Behind the opening marker, before the first visible character.
    Opened,
    /// In the reasoning.
    Inside,
    /// Behind the closing marker, before the first visible character.
    Closed,
    /// In the answer: nothing is looked for any more.
    Content,
}

/// Splits an output into reasoning, which comes first if at all, and content.
///
/// Only an output that begins with the opening marker (white space aside), or whose prompt has opened reasoning, has
/// any; a marker further on in the answer is ordinary text.
#[derive(Debug, Clone)]
pub struct ReasoningSplitter {
    markers: ReasoningMarkers,
    state: State,
    /// White space that is dropped if a marker follows.
    space: String,
    /// A proper prefix of the marker that is looked for.
    partial: String,
}

impl ReasoningSplitter {
    /// A splitter for one output. `starts_inside`: the prompt ends inside an open reasoning block.
    pub fn new(markers: ReasoningMarkers, starts_inside: bool) -> Self {
        let state = State::Start { inside: starts_inside };
        Self { markers, state, space: String::new(), partial: String::new() }
    }

    /// Takes the next piece of text and gives what is settled: at most one segment of each kind, reasoning first.
    pub fn push(&mut self, text: &str) -> Vec<Segment> {
        let (mut reasoning, mut content) = (String::new(), String::new());
        let mut chars = text.chars();
        while self.state != State::Content {
            match chars.next() {
                Some(c) => self.step(c, &mut reasoning, &mut content),
                None => break,
            }
        }
        content.push_str(chars.as_str());
        segments(reasoning, content)
    }

    /// The output has ended: what was held back belongs to where it stands.
    pub fn flush(&mut self) -> Vec<Segment> {
        let held = std::mem::take(&mut self.space) + &std::mem::take(&mut self.partial);
        match self.state {
            State::Start { inside: false } | State::Closed | State::Content => segments(String::new(), held),
            // White space right behind the marker is dropped even if no more follows.
            State::Start { inside: true } | State::Opened => segments(held.trim_start().to_owned(), String::new()),
            State::Inside => segments(held, String::new()),
        }
    }

    /// Whether text that follows now would be reasoning.
    pub fn in_reasoning(&self) -> bool {
        matches!(self.state, State::Start { inside: true } | State::Opened | State::Inside)
    }

    fn step(&mut self, c: char, reasoning: &mut String, content: &mut String) {
        match self.state {
            State::Start { inside } => {
                if self.partial.is_empty() && c.is_whitespace() {
                    self.space.push(c);
                    return;
                }
                self.partial.push(c);
                if self.partial == self.markers.open {
                    self.forget_held();
                    self.state = State::Opened;
                } else if !self.markers.open.starts_with(&self.partial) {
                    // No opening marker: what was held is the beginning of the text.
                    let partial = std::mem::take(&mut self.partial);
                    if inside {
                        self.space.clear();
                        self.state = State::Opened;
                        for c in partial.chars() {
                            self.step(c, reasoning, content);
                        }
                    } else {
                        content.push_str(&std::mem::take(&mut self.space));
                        content.push_str(&partial);
                        self.state = State::Content;
                    }
                }
            }
            State::Opened | State::Inside => {
                self.partial.push(c);
                while !self.markers.close.starts_with(&self.partial) {
                    let first = self.partial.remove(0);
                    if !first.is_whitespace() {
                        reasoning.push_str(&std::mem::take(&mut self.space));
                        reasoning.push(first);
                        self.state = State::Inside;
                    } else if self.state == State::Inside {
                        self.space.push(first);
                    }
                }
                if self.partial == self.markers.close {
                    self.forget_held();
                    self.state = State::Closed;
                }
            }
            State::Closed if c.is_whitespace() => {}
            State::Closed | State::Content => {
                content.push(c);
                self.state = State::Content;
            }
        }
    }

    fn forget_held(&mut self) {
        self.space.clear();
        self.partial.clear();
    }
}

fn segments(reasoning: String, content: String) -> Vec<Segment> {
    let reasoning = (!reasoning.is_empty()).then_some(Segment::Reasoning(reasoning));
    reasoning.into_iter().chain((!content.is_empty()).then_some(Segment::Content(content))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn markers() -> ReasoningMarkers {
        ReasoningMarkers { open: "<think>".into(), close: "</think>".into(), open_id: 5, close_id: 6 }
    }

    /// Joined (reasoning, content), with the order checked.
    fn run(starts_inside: bool, pieces: &[&str]) -> (String, String) {
        let mut splitter = ReasoningSplitter::new(markers(), starts_inside);
        let (mut reasoning, mut content) = (String::new(), String::new());
        let mut all: Vec<Segment> = pieces.iter().flat_map(|p| splitter.push(p)).collect();
        all.extend(splitter.flush());
        for segment in all {
            match segment {
                Segment::Reasoning(text) => {
                    assert!(content.is_empty(), "reasoning after content");
                    reasoning.push_str(&text);
                }
                Segment::Content(text) => content.push_str(&text),
                Segment::Call { .. } | Segment::Arguments { .. } => panic!("no tool is known here"),
            }
        }
        (reasoning, content)
    }

    /// The rules again, over the whole text.
    fn judge(starts_inside: bool, text: &str) -> (String, String) {
        let trimmed = text.trim_start();
        let body = match trimmed.strip_prefix("<think>") {
            Some(body) => body,
            None if starts_inside => trimmed,
            None => return (String::new(), text.to_owned()),
        };
        match body.split_once("</think>") {
            Some((reasoning, content)) => (reasoning.trim().to_owned(), content.trim_start().to_owned()),
            None => (body.trim_start().to_owned(), String::new()),
        }
    }

    #[test]
    fn reasoning_is_what_stands_between_the_markers() {
        let cases = [
            (false, "<think>\nwhy\n</think>\n\n4", "why", "4"),
            (false, "\n <think>why</think>4", "why", "4"),
            (true, "why\n</think>\n\n4", "why", "4"),
            (true, "<think>\nwhy</think>4", "why", "4"),
            (false, "no markers", "", "no markers"),
            (false, "  <thin air", "", "  <thin air"),
            (false, "a <think>b</think> c", "", "a <think>b</think> c"),
            (false, "<think>a</think>b <think>c</think>", "a", "b <think>c</think>"),
            (false, "<think>cut off", "cut off", ""),
            (true, "cut <", "cut <", ""),
            (false, "<think>\n\n</think>\n\nanswer", "", "answer"),
            (false, "<think>a</</think>b", "a</", "b"),
            (true, "</think>b", "", "b"),
        ];
        for (inside, text, reasoning, content) in cases {
            assert_eq!(run(inside, &[text]), (reasoning.into(), content.into()), "{text:?}");
        }
    }

    #[test]
    fn in_reasoning_follows_the_markers() {
        let mut splitter = ReasoningSplitter::new(markers(), false);
        assert!(!splitter.in_reasoning());
        splitter.push("<think>a");
        assert!(splitter.in_reasoning());
        splitter.push("</think>");
        assert!(!splitter.in_reasoning());
        assert!(ReasoningSplitter::new(markers(), true).in_reasoning());
    }

    proptest! {
        #[test]
        fn any_chunking_gives_what_the_whole_text_gives(
            parts in prop::collection::vec(prop::sample::select(vec![
                "<think>", "</think>", "<", "</", "think>", "\n", " ", "a", "é", "<th", "</thin",
            ]), 0..14),
            inside in any::<bool>(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let text = parts.concat();
            let (reasoning, content) = run(inside, &crate::testing::cut(&text, &cuts));
            prop_assert!(!reasoning.contains("</think>"));
            prop_assert_eq!((reasoning, content), judge(inside, &text));
        }
    }
}
