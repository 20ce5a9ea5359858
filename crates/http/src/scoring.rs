//! How well pairs of texts go together: by a model that reads a pair at once, or by the cosine of two embeddings.

use std::sync::Arc;

use baton_text::{EncoderInput, TextModel, TextPart};

use crate::access::AccessRecord;
use crate::encoder::{Encoder, EncoderTask};
use crate::error::ApiError;
use crate::openai::embedding::{ReadUsage, Truncation};
use crate::service::Service;

/// Pairs to be scored, with the names of their fields.
pub(crate) struct Pairs {
    /// One for all of the second, or as many.
    pub first: Vec<String>,
    pub second: Vec<String>,
    pub first_field: &'static str,
    pub second_field: &'static str,
    pub truncation: Truncation,
}

/// A score per text of `second`, and the tokens that were read.
pub(crate) async fn scores(
    service: &Service,
    encoder: &Arc<Encoder>,
    record: &AccessRecord,
    pairs: Pairs,
) -> Result<(Vec<f32>, ReadUsage), ApiError> {
    let cut = Cut::new(pairs.truncation, encoder.spec.max_model_len)?;
    let text_model = Arc::clone(&encoder.text);
    let Pairs { first, second, first_field, second_field, .. } = pairs;
    let (firsts, count) = (first.len(), second.len());
    let by_pair = encoder.spec.task == EncoderTask::Score;
    let field = move |index: usize| match index.checked_sub(firsts) {
        _ if by_pair => format!("{second_field}[{index}]"),
        Some(index) => format!("{second_field}[{index}]"),
        None if firsts == 1 => first_field.to_owned(),
        None => format!("{first_field}[{index}]"),
    };
    let inputs = service
        .text_work(move || {
            // Once each, however many pairs a text is part of.
            let parts = |texts: &[String], field: &str| -> Result<Vec<TextPart>, ApiError> {
                texts.iter().map(|text| text_model.part(text, cut.max_tokens).map_err(|_| unreadable(field))).collect()
            };
            let (first, second) = (parts(&first, first_field)?, parts(&second, second_field)?);
            let whole: Vec<(&TextPart, Option<&TextPart>)> = match by_pair {
                true => {
                    second.iter().enumerate().map(|(i, second)| (&first[i.min(firsts - 1)], Some(second))).collect()
                }
                false => first.iter().chain(&second).map(|part| (part, None)).collect(),
            };
            let input = |(i, (first, second)): (usize, (&TextPart, Option<&TextPart>))| {
                cut.input(&text_model, first, second, || field(i))
            };
            whole.into_iter().enumerate().map(input).collect::<Result<Vec<_>, _>>()
        })
        .await?;
    let usage = ReadUsage::new(inputs.iter().map(|input| input.ids.len()).sum());
    let vectors = encoder.compute(service, record, inputs, field).await?;
    let score = |i: usize| match by_pair {
        true => vectors[i][0],
        false => cosine(&vectors[i.min(firsts - 1)], &vectors[firsts + i]),
    };
    Ok(((0..count).map(score).collect(), usage))
}

/// How long an input may become, and what becomes of a longer one.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    /// Tokens that it has at most.
    pub max_tokens: usize,
    /// Whether a longer one is refused.
    refuses: bool,
}

impl Cut {
    /// As the request says, for a context of so many tokens.
    pub fn new(truncation: Truncation, context: usize) -> Result<Self, ApiError> {
        let limit = truncation.limit(context)?;
        Ok(Self { max_tokens: limit.unwrap_or(context), refuses: limit.is_none() })
    }

    /// A text that came as ids.
    pub fn ids(self, mut ids: Vec<u32>, field: impl Fn() -> String) -> Result<EncoderInput, ApiError> {
        if self.refuses && ids.len() > self.max_tokens {
            return Err(ApiError::input_too_long(&field(), ids.len(), self.max_tokens));
        }
        ids.truncate(self.max_tokens);
        Ok(EncoderInput { type_ids: vec![0; ids.len()], ids })
    }

    /// A text or pair, whose parts keep [`max_tokens`](Self::max_tokens); `field` is what it is called in a refusal.
    pub fn input(
        self,
        model: &TextModel,
        first: &TextPart,
        second: Option<&TextPart>,
        field: impl Fn() -> String,
    ) -> Result<EncoderInput, ApiError> {
        let tokens = model.input_len(first, second);
        if self.refuses && tokens > self.max_tokens {
            return Err(ApiError::input_too_long(&field(), tokens, self.max_tokens));
        }
        model.input(first, second, self.max_tokens).map_err(|_| unreadable(&field()))
    }
}

/// A text that the tokenizer does not take.
pub(crate) fn unreadable(field: &str) -> ApiError {
    let message = "this cannot be tokenized; with truncate_prompt_tokens, leave room for special tokens";
    ApiError::invalid(field, message)
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(1e-24)) as f32
}
