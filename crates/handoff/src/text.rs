//! Text parity: the trainer's conversations become the trainer's text, and that text the trainer's ids. Exactly.
//!
//! The two are judged apart, each on the trainer's own input, so that a changed template does not look like a changed
//! tokenizer. Golden texts are shown where they differ: they are the trainer's, and no user's.

use std::fmt;

use baton_text::{ChatInput, TextModel};
use chrono::NaiveDateTime;
use serde::Serialize;
use serde_json::Value;

use crate::words::{count, plain};
use crate::{Case, Chat, CheckName, Report};

/// Characters, or ids, of an excerpt on each side of a difference.
const EXCERPT: usize = 24;
const EXCERPT_IDS: usize = 4;

/// How golden texts are rendered and encoded here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct TextParity {
    /// Conversations rendered.
    pub rendered: usize,
    /// Those that become another text, in order.
    pub template: Vec<TextDifference>,
    /// Texts encoded.
    pub encoded: usize,
    /// Those that become other ids, in order.
    pub tokenizer: Vec<TextDifference>,
}

/// The first difference of a case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TextDifference {
    /// Its name.
    pub case: String,
    /// What is there instead.
    #[serde(flatten)]
    pub found: Mismatch,
}

/// What is there instead of the trainer's text or ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Mismatch {
    /// BOS is there twice, and once for the trainer; or the other way round.
    DoubleBos {
        /// Whether this side has it twice, and not the trainer.
        here: bool,
    },
    /// Something else.
    Differs {
        /// Of the first difference: characters of the text, or ids.
        position: usize,
        /// The trainer's, around there.
        expected: String,
        /// This side's.
        got: String,
    },
    /// There is no result.
    Failed {
        /// Why.
        reason: String,
    },
}

impl fmt::Display for TextDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "case {}: ", plain(&self.case))?;
        match &self.found {
            Mismatch::DoubleBos { here: true } => {
                f.write_str("double BOS: it begins with BOS twice, the trainer's once")
            }
            Mismatch::DoubleBos { here: false } => {
                f.write_str("double BOS: the trainer's begins with BOS twice, here once")
            }
            Mismatch::Differs { position, expected, got } => {
                write!(f, "first difference at {position}: expected {expected}, got {got}")
            }
            Mismatch::Failed { reason } => f.write_str(&plain(reason)),
        }
    }
}

impl TextParity {
    /// Enters both checks.
    pub fn enter(&self, report: &mut Report) {
        let all = [
            (CheckName::Tokenizer, &self.tokenizer, self.encoded, "text"),
            (CheckName::Template, &self.template, self.rendered, "chat"),
        ];
        for (name, differences, of, noun) in all {
            if of == 0 {
                report.skip(name, format!("no case has a {noun}"));
            } else if differences.is_empty() {
                report.check(name, Ok(vec![format!("{} as the trainer's", count(of, noun))]));
            } else {
                let summary = format!("{} of {} differ", differences.len(), count(of, noun));
                let reasons = std::iter::once(summary).chain(differences.iter().map(ToString::to_string));
                report.check(name, Err(reasons.collect()));
            }
        }
    }
}

/// Renders and encodes all cases that have a text. `now`: the time that a template may ask for.
pub fn text_parity(cases: &[Case], text: &TextModel, now: NaiveDateTime) -> TextParity {
    let mut parity = TextParity::default();
    for case in cases {
        let difference = |found| TextDifference { case: case.name.clone(), found };
        let rendered = case.chat.as_ref().map(|chat| text.render_chat(&input(chat), now));
        if let (Some(rendered), Some(expected)) = (&rendered, &case.prompt) {
            parity.rendered += 1;
            let found = match rendered {
                Ok(got) => text_mismatch(expected, got, text),
                Err(error) => Some(Mismatch::Failed { reason: error.to_string() }),
            };
            parity.template.extend(found.map(difference));
        }
        let prompt = match (&case.prompt, &rendered) {
            (Some(prompt), _) => prompt,
            (None, Some(Ok(rendered))) => rendered,
            (None, Some(Err(error))) => {
                parity.rendered += 1;
                parity.template.push(difference(Mismatch::Failed { reason: error.to_string() }));
                continue;
            }
            (None, None) => continue,
        };
        parity.encoded += 1;
        let found = match text.encode(prompt, case.chat.is_none()) {
            Ok(got) => ids_mismatch(&case.prompt_ids, &got),
            Err(error) => Some(Mismatch::Failed { reason: error.to_string() }),
        };
        parity.tokenizer.extend(found.map(difference));
    }
    parity
}

/// A golden conversation as the template takes it: as the trainer gave it, nothing normalised.
fn input(chat: &Chat) -> ChatInput {
    ChatInput {
        messages: Value::Array(chat.messages.clone()),
        tools: (!chat.tools.is_empty()).then(|| Value::Array(chat.tools.clone())),
        add_generation_prompt: chat.add_generation_prompt,
        continue_final_message: false,
        kwargs: chat.template_kwargs.clone(),
    }
}

fn text_mismatch(expected: &str, got: &str, text: &TextModel) -> Option<Mismatch> {
    if expected == got {
        return None;
    }
    // One side has a special token more, which the other begins with too.
    let twice = |long: &str, short: &str| {
        let extra = long.strip_suffix(short).filter(|extra| short.starts_with(extra))?;
        text.token_id(extra).filter(|&id| text.is_special(id))
    };
    let twice = [(true, twice(got, expected)), (false, twice(expected, got))];
    if let Some((here, _)) = twice.into_iter().find(|(_, id)| id.is_some()) {
        return Some(Mismatch::DoubleBos { here });
    }
    let [expected, got]: [Vec<char>; 2] = [expected, got].map(|text| text.chars().collect());
    let position = first_difference(&expected, &got);
    let excerpt = |chars: &[char]| -> String {
        let around = &chars[position.saturating_sub(EXCERPT).min(chars.len())..chars.len().min(position + EXCERPT)];
        format!("\"{}\"", around.iter().collect::<String>().escape_debug())
    };
    Some(Mismatch::Differs { position, expected: excerpt(&expected), got: excerpt(&got) })
}

fn ids_mismatch(expected: &[u32], got: &[u32]) -> Option<Mismatch> {
    if expected == got {
        return None;
    }
    let twice = |long: &[u32], short: &[u32]| long.len() > 1 && long[0] == long[1] && long[1..] == *short;
    if twice(got, expected) || twice(expected, got) {
        return Some(Mismatch::DoubleBos { here: got.len() > expected.len() });
    }
    let position = first_difference(expected, got);
    let excerpt = |ids: &[u32]| -> String {
        let start = position.saturating_sub(EXCERPT_IDS).min(ids.len());
        let end = ids.len().min(position + EXCERPT_IDS);
        let dots = |hidden: bool| if hidden { "…" } else { "" };
        let shown: Vec<String> = ids[start..end].iter().map(u32::to_string).collect();
        format!("[{}{}{}]", dots(start > 0), shown.join(", "), dots(end < ids.len()))
    };
    Some(Mismatch::Differs { position, expected: excerpt(expected), got: excerpt(got) })
}

/// The first index at which two different lists differ, or the shorter ends.
fn first_difference<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
