//! Request and reply of `/v1/completions`.

use baton_text::Segment;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::generate::{Output, Score, Tokens};
use crate::json;
use crate::openai::list_params::token_id;
use crate::openai::params::{MAX_TOP_LOGPROBS, Params, refuse_rest};
use crate::openai::shared::{Envelope, Finish, Format, Piece, Reply, Usage, Whole, finite};
use crate::openai::structured::Structured;
use crate::openai::tokens::{PromptParts, TokenStyle};
use crate::sse::Events;

/// Most prompts of one request.
pub(crate) const MAX_PROMPTS: usize = 64;

/// Most choices of one request, over all its prompts.
const MAX_CHOICES: usize = 256;

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
        let mut fields = Fields::new(body).lenient(lenient);
        let model = fields.string("model")?;
        let prompt = fields.take("prompt");
        let prompts = prompts("prompt", fields.required("prompt", prompt)?, MAX_PROMPTS)?;
        let mut params = Params::read(&mut fields, max_n)?;
        params.logprobs = fields.integer("logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|top| top as u32);
        params.echo = fields.bool("echo")?.unwrap_or(false);
        params.best_of = best_of(&mut fields, &params, max_n)?;
        if prompts.len() * params.candidates() as usize > MAX_CHOICES {
            let accepted = format!("so small that all prompts together have at most {MAX_CHOICES} choices");
            return Err(ApiError::out_of_range(if params.best_of.is_some() { "best_of" } else { "n" }, accepted));
        }
        let params = params.checked()?;
        let structured = Structured::read(&mut fields, budget)?;
        let ignored = refuse_rest(fields, lenient)?;
        Ok(Self { model, prompts, params, structured, ignored })
    }
}

fn best_of(fields: &mut Fields, params: &Params, max_n: u32) -> Result<Option<u32>, ApiError> {
    let best_of = fields.integer("best_of", 1..=i64::from(max_n))?.map(|best_of| best_of as u32);
    match best_of {
        Some(best_of) if best_of < params.n => Err(ApiError::invalid("best_of", "best_of must not be below n")),
        Some(best_of) if best_of > params.n && params.stream => {
            Err(ApiError::invalid("best_of", "best_of above n cannot be combined with stream: true"))
        }
        best_of => Ok(best_of),
    }
}

const PROMPT: &str = "a string, an array of strings, an array of token ids, or an array of those";

/// The prompts of a field, at most `most`.
pub(crate) fn prompts(field: &str, value: Value, most: usize) -> Result<Vec<Prompt>, ApiError> {
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(items) => items,
        _ => return Err(ApiError::wrong_type(field, PROMPT)),
    };
    match items.first() {
        None => return Err(ApiError::out_of_range(field, PROMPT.to_owned() + ", none of them empty")),
        Some(Value::Number(_)) => return Ok(vec![ids(field, &items)?]),
        Some(_) => {}
    }
    if items.len() > most {
        return Err(ApiError::out_of_range(field, format!("at most {most} of them")));
    }
    let prompt = |(i, item)| match item {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(items) => ids(&format!("{field}[{i}]"), &items),
        _ => Err(ApiError::wrong_type(&format!("{field}[{i}]"), "a string or an array of token ids")),
    };
    items.into_iter().enumerate().map(prompt).collect()
}

fn ids(path: &str, items: &[Value]) -> Result<Prompt, ApiError> {
    items.iter().map(|id| token_id(path, id)).collect::<Result<_, _>>().map(Prompt::Ids)
}

/// Writes text completions.
pub(crate) struct CompletionFormat {
    pub envelope: Envelope,
    pub style: TokenStyle,
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
    #[serde(flatten)]
    prompt: PromptParts<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

/// Parallel arrays, an entry per token.
#[derive(Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    /// `None` of a token that follows nothing.
    token_logprobs: Vec<Option<f32>>,
    /// The most likely tokens and the chosen one.
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Characters of the output before the token.
    text_offset: Vec<usize>,
}

impl CompletionFormat {
    fn logprobs(&self, scores: &[Score]) -> Logprobs {
        let top = |score: &Score| {
            let chosen = (score.token, score.logprob?);
            let mut map = Map::new();
            for &(token, logprob) in score.top.iter().chain([&chosen]) {
                map.entry(self.style.distinct_text(token)).or_insert_with(|| finite(logprob).into());
            }
            Some(map)
        };
        Logprobs {
            tokens: scores.iter().map(|score| self.style.distinct_text(score.token)).collect(),
            token_logprobs: scores.iter().map(|score| score.logprob.map(finite)).collect(),
            top_logprobs: scores.iter().map(top).collect(),
            text_offset: scores.iter().map(|score| score.text_offset).collect(),
        }
    }
}

const OBJECT: &str = "text_completion";

impl Format for CompletionFormat {
    fn events(&mut self, out: &mut Events, piece: &Piece, usage: &Usage) {
        let (none, nothing) = (Tokens::default(), PromptParts::default());
        let (index, text, tokens, finish_reason, prompt): (_, &str, _, _, _) = match *piece {
            Piece::Open { .. } if !self.several && !self.style.with_ids() => return,
            Piece::Open { index, prompt } => (index, "", &none, None, self.style.opened(prompt)),
            Piece::Text { index, segment: Segment::Reasoning(text) | Segment::Content(text), tokens } => {
                (index, text, tokens, None, nothing)
            }
            Piece::Text { segment: Segment::Call { .. } | Segment::Arguments { .. }, .. } => {
                unreachable!("the text of a completion is not split")
            }
            Piece::Finish { index, reason, tokens, .. } => (index, "", tokens, Some(reason), nothing),
            Piece::End(usage) => return self.envelope.end::<Choice>(out, OBJECT, usage),
            Piece::Error(error) => return out.data(&error.object()),
        };
        let logprobs = (!tokens.scores.is_empty()).then(|| self.logprobs(&tokens.scores));
        let token_ids = self.style.ids(&tokens.ids);
        let choices = [Choice { index, text, logprobs, finish_reason, prompt, token_ids }];
        out.data(&Reply::new(&self.envelope, OBJECT, &choices, self.envelope.usage(usage)));
    }
}

impl Whole for CompletionFormat {
    fn whole(&mut self, outputs: &[Output], usage: &Usage) -> Vec<u8> {
        let choices = outputs.iter().enumerate().map(|(index, output)| Choice {
            index,
            // A completion is not split: all of it is content.
            text: &output.content,
            logprobs: self.logprobs.then(|| self.logprobs(&output.tokens.scores)),
            finish_reason: Some(output.reason),
            prompt: self.style.complete(&output.prompt),
            token_ids: self.style.ids(&output.tokens.ids),
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
        let prompts = |value| prompts("prompt", value, MAX_PROMPTS);
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
