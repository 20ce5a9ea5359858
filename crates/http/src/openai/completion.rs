//! Request and reply of `/v1/completions`.

use std::sync::Arc;

use baton_text::Segment;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::generate::{Output, Score};
use crate::generation::Generation;
use crate::json;
use crate::openai::params::{MAX_TOP_LOGPROBS, Params, refuse_rest, token_id};
use crate::openai::shared::{Envelope, Finish, Format, Piece, Reply, Usage, Whole, finite};
use crate::openai::structured::Structured;
use crate::sse::Events;

/// Most prompts of one request.
pub(crate) const MAX_PROMPTS: usize = 64;

/// Tokens generated if the request does not say.
pub(crate) const DEFAULT_MAX_TOKENS: u32 = 16;

/// A completion request within every range that does not depend on the model.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    pub model: Option<String>,
    pub prompts: Vec<Prompt>,
    pub params: Params,
    /// The form that the outputs must have.
    pub structured: Option<Structured>,
    /// Fields that are without effect only because the server is lenient.
    pub ignored: Vec<String>,
}

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// To be encoded.
    Text(String),
    /// Not checked against the vocabulary yet.
    Ids(Vec<u32>),
}

impl CompletionRequest {
    /// Reads the body. `budget`: JSON values that may still be read, for documents inside strings.
    pub fn read(body: Map<String, Value>, max_n: u32, lenient: bool, budget: &mut usize) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body);
        let model = fields.string("model")?;
        let prompt = fields.take("prompt");
        let prompts = prompts(fields.required("prompt", prompt)?)?;
        let mut params = Params::read(&mut fields, max_n)?;
        params.logprobs = fields.integer("logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|top| top as u32);
        let params = params.checked()?;
        let structured = Structured::read(&mut fields, budget)?;
        let ignored = refuse_rest(fields, lenient)?;
        Ok(Self { model, prompts, params, structured, ignored })
    }
}

const PROMPT: &str = "a string, an array of strings, an array of token ids, or an array of those";

fn prompts(value: Value) -> Result<Vec<Prompt>, ApiError> {
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(items) => items,
        _ => return Err(ApiError::wrong_type("prompt", PROMPT)),
    };
    match items.first() {
        None => return Err(ApiError::out_of_range("prompt", PROMPT.to_owned() + ", none of them empty")),
        Some(Value::Number(_)) => return Ok(vec![ids("prompt", &items)?]),
        Some(_) => {}
    }
    if items.len() > MAX_PROMPTS {
        return Err(ApiError::out_of_range("prompt", format!("at most {MAX_PROMPTS} prompts")));
    }
    let prompt = |(i, item)| match item {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(items) => ids(&format!("prompt[{i}]"), &items),
        _ => Err(ApiError::wrong_type(&format!("prompt[{i}]"), "a string or an array of token ids")),
    };
    items.into_iter().enumerate().map(prompt).collect()
}

fn ids(path: &str, items: &[Value]) -> Result<Prompt, ApiError> {
    items.iter().map(|id| token_id(path, id)).collect::<Result<_, _>>().map(Prompt::Ids)
}

/// Writes text completions.
pub(crate) struct CompletionFormat {
    pub envelope: Envelope,
    pub generation: Arc<Generation>,
    /// Whether scores were asked for.
    pub logprobs: bool,
    /// Whether there are several choices, which then all have to be announced in order.
    pub several: bool,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<Logprobs>,
    finish_reason: Option<Finish>,
}

/// Parallel arrays, an entry per token.
#[derive(Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    /// The most likely tokens and the chosen one.
    top_logprobs: Vec<Map<String, Value>>,
    /// Characters of the output before the token.
    text_offset: Vec<usize>,
}

impl CompletionFormat {
    fn token(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.generation.text.token_bytes(id)).into_owned()
    }

    fn logprobs(&self, scores: &[Score]) -> Logprobs {
        let top = |score: &Score| {
            let chosen = (score.token, score.logprob);
            let mut map = Map::new();
            for &(token, logprob) in score.top.iter().chain([&chosen]) {
                map.entry(self.token(token)).or_insert_with(|| finite(logprob).into());
            }
            map
        };
        Logprobs {
            tokens: scores.iter().map(|score| self.token(score.token)).collect(),
            token_logprobs: scores.iter().map(|score| finite(score.logprob)).collect(),
            top_logprobs: scores.iter().map(top).collect(),
            text_offset: scores.iter().map(|score| score.text_offset).collect(),
        }
    }
}

const OBJECT: &str = "text_completion";

impl Format for CompletionFormat {
    fn events(&mut self, out: &mut Events, piece: &Piece) {
        let (index, text, scores, finish_reason): (_, &str, &[Score], _) = match *piece {
            Piece::Open { .. } if !self.several => return,
            Piece::Open { index } => (index, "", &[], None),
            Piece::Text { index, segment: Segment::Reasoning(text) | Segment::Content(text), scores } => {
                (index, text, scores, None)
            }
            Piece::Text { segment: Segment::Call { .. } | Segment::Arguments { .. }, .. } => {
                unreachable!("the text of a completion is not split")
            }
            Piece::Finish { index, reason, scores, .. } => (index, "", scores, Some(reason)),
            Piece::End(usage) => return self.envelope.end::<Choice>(out, OBJECT, usage),
            Piece::Error(error) => return out.data(&error.object()),
        };
        let logprobs = (!scores.is_empty()).then(|| self.logprobs(scores));
        let choice = Choice { index, text, logprobs, finish_reason };
        out.data(&Reply::new(&self.envelope, OBJECT, &[choice], self.envelope.usage(None)));
    }
}

impl Whole for CompletionFormat {
    fn whole(&mut self, outputs: &[Output], usage: &Usage) -> Vec<u8> {
        let choices = outputs.iter().enumerate().map(|(index, output)| Choice {
            index,
            // A completion is not split: all of it is content.
            text: &output.content,
            logprobs: self.logprobs.then(|| self.logprobs(&output.scores)),
            finish_reason: Some(output.reason),
        });
        let choices: Vec<_> = choices.collect();
        json::write(&Reply::new(&self.envelope, OBJECT, &choices, Some(Some(usage))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_four_forms_of_a_prompt() {
        let text = |s: &str| Prompt::Text(s.into());
        assert_eq!(prompts(json!("a")), Ok(vec![text("a")]));
        assert_eq!(prompts(json!(["a", "b"])), Ok(vec![text("a"), text("b")]));
        assert_eq!(prompts(json!([1, 2])), Ok(vec![Prompt::Ids(vec![1, 2])]));
        assert_eq!(prompts(json!([[1], [2, 3]])), Ok(vec![Prompt::Ids(vec![1]), Prompt::Ids(vec![2, 3])]));
        for bad in [json!([]), json!({}), json!([1, "a"]), json!([-1]), json!([[1.5]]), json!([true]), json!(1)] {
            assert!(prompts(bad.clone()).is_err(), "{bad}");
        }
        assert!(prompts(json!(vec!["a"; MAX_PROMPTS + 1])).is_err());
    }
}
