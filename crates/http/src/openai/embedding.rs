//! Request and reply of `/v1/embeddings`, and what all requests that are only read have in common.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::json;
use crate::openai::completion::{Prompt, prompts};
use crate::openai::params::refuse_rest;

/// Most inputs of one request.
pub(crate) const MAX_INPUTS: usize = 2048;

/// A request within every range that does not depend on the model.
#[derive(Debug)]
pub(crate) struct EmbeddingRequest {
    pub model: Option<String>,
    pub inputs: Vec<Prompt>,
    pub encoding: Encoding,
    /// Components to keep, at least 1.
    pub dimensions: Option<usize>,
    pub truncation: Truncation,
    /// Fields that are without effect only because the server is lenient.
    pub ignored: Vec<String>,
}

/// How vectors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As an array of numbers.
    Float,
    /// As base64 of little-endian f32.
    Base64,
}

/// What becomes of an input that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Truncation {
    /// It is refused.
    Never,
    /// It is cut to the context.
    ToContext,
    /// It is cut to so many tokens.
    To(usize),
}

impl Truncation {
    /// Reads `truncate_prompt_tokens`, where -1 stands for the context.
    pub fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let name = "truncate_prompt_tokens";
        match fields.integer(name, -1..=i64::from(u32::MAX))? {
            None => Ok(Self::Never),
            Some(-1) => Ok(Self::ToContext),
            Some(0) => Err(ApiError::out_of_range(name, "-1 or at least 1")),
            Some(tokens) => Ok(Self::To(tokens as usize)),
        }
    }

    /// Tokens that may be left, where something is to be cut.
    pub fn limit(self, context: usize) -> Result<Option<usize>, ApiError> {
        match self {
            Self::Never => Ok(None),
            Self::ToContext => Ok(Some(context)),
            Self::To(tokens) if tokens <= context => Ok(Some(tokens)),
            Self::To(_) => Err(ApiError::out_of_range("truncate_prompt_tokens", format!("at most {context}"))),
        }
    }
}

impl EmbeddingRequest {
    /// Reads the body.
    pub fn read(body: Map<String, Value>, lenient: bool) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body);
        let model = fields.string("model")?;
        let input = fields.take("input");
        let inputs = prompts("input", fields.required("input", input)?, MAX_INPUTS)?;
        let encoding = match fields.string("encoding_format")?.as_deref() {
            None | Some("float") => Encoding::Float,
            Some("base64") => Encoding::Base64,
            Some(_) => return Err(ApiError::out_of_range("encoding_format", "float or base64")),
        };
        let dimensions = fields.count("dimensions", 1)?.map(|n| n as usize);
        let truncation = Truncation::read(&mut fields)?;
        let ignored = refuse_rest(fields, lenient)?;
        Ok(Self { model, inputs, encoding, dimensions, truncation, ignored })
    }
}

/// Tokens of a request that is only read.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct ReadUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

impl ReadUsage {
    /// So many.
    pub fn new(tokens: usize) -> Self {
        Self { prompt_tokens: tokens, total_tokens: tokens }
    }
}

/// The whole reply: an embedding for each input, in their order.
pub(crate) fn reply(model: &str, embeddings: &[Vec<f32>], encoding: Encoding, usage: ReadUsage) -> Vec<u8> {
    #[derive(Serialize)]
    struct Reply<'a> {
        object: &'static str,
        data: Vec<Item<'a>>,
        model: &'a str,
        usage: ReadUsage,
    }
    #[derive(Serialize)]
    struct Item<'a> {
        object: &'static str,
        index: usize,
        embedding: Written<'a>,
    }
    #[derive(Serialize)]
    #[serde(untagged)]
    enum Written<'a> {
        Float(&'a [f32]),
        Base64(String),
    }
    let items = embeddings.iter().enumerate().map(|(index, embedding)| {
        let embedding = match encoding {
            Encoding::Float => Written::Float(embedding),
            Encoding::Base64 => {
                let bytes: Vec<u8> = embedding.iter().flat_map(|x| x.to_le_bytes()).collect();
                Written::Base64(BASE64_STANDARD.encode(bytes))
            }
        };
        Item { object: "embedding", index, embedding }
    });
    let data = items.collect();
    json::write(&Reply { object: "list", data, model, usage })
}
