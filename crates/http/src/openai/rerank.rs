//! Requests and replies of `/v1/rerank`, in the form that Jina and Cohere have, and of `/score`, as vLLM has it.

use rand::random;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::json;
use crate::openai::embedding::{MAX_INPUTS, ReadUsage, Truncation};
use crate::openai::params::refuse_rest;
use crate::openai::shared::seconds_since_1970;

/// Documents to be put into the order in which they answer a query.
#[derive(Debug)]
pub(crate) struct RerankRequest {
    pub model: Option<String>,
    pub query: String,
    pub documents: Vec<String>,
    /// How many of the best are wanted, at least 1; all if it is not said.
    pub top_n: Option<usize>,
    pub return_documents: bool,
    pub truncation: Truncation,
    /// Fields that are without effect only because the server is lenient.
    pub ignored: Vec<String>,
}

impl RerankRequest {
    /// Reads the body.
    pub fn read(body: Map<String, Value>, lenient: bool) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body);
        let model = fields.string("model")?;
        let query = fields.string("query")?;
        let query = fields.required("query", query)?;
        let documents = fields.array("documents")?;
        let documents = fields.required("documents", documents)?;
        let documents = some("documents", documents)?.into_iter().enumerate();
        let documents = documents.map(|(i, document)| text_of(format!("documents[{i}]"), document));
        let documents = documents.collect::<Result<_, _>>()?;
        let top_n = fields.count("top_n", 1)?.map(|n| n as usize);
        let return_documents = fields.bool("return_documents")?.unwrap_or(true);
        let truncation = Truncation::read(&mut fields)?;
        let ignored = refuse_rest(fields, lenient)?;
        Ok(Self { model, query, documents, top_n, return_documents, truncation, ignored })
    }
}

/// Pairs to be scored.
#[derive(Debug)]
pub(crate) struct ScoreRequest {
    pub model: Option<String>,
    /// One for all of the second, or as many.
    pub text_1: Vec<String>,
    pub text_2: Vec<String>,
    pub truncation: Truncation,
    /// Fields that are without effect only because the server is lenient.
    pub ignored: Vec<String>,
}

impl ScoreRequest {
    /// Reads the body.
    pub fn read(body: Map<String, Value>, lenient: bool) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body);
        let model = fields.string("model")?;
        let text_1 = texts(&mut fields, "text_1")?;
        let text_2 = texts(&mut fields, "text_2")?;
        if text_1.len() != 1 && text_1.len() != text_2.len() {
            let message = "text_1 must be one text, or have as many texts as text_2";
            return Err(ApiError::invalid("text_1", message));
        }
        let truncation = Truncation::read(&mut fields)?;
        let ignored = refuse_rest(fields, lenient)?;
        Ok(Self { model, text_1, text_2, truncation, ignored })
    }
}

/// A list that is neither empty nor too long.
fn some(field: &str, items: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    match items.len() {
        1..=MAX_INPUTS => Ok(items),
        _ => Err(ApiError::out_of_range(field, format!("1 to {MAX_INPUTS} texts"))),
    }
}

/// A text, or an object that has one.
fn text_of(path: String, value: Value) -> Result<String, ApiError> {
    let wrong = || ApiError::wrong_type(&path, "a string, or an object with a string as text");
    match value {
        Value::String(text) => Ok(text),
        Value::Object(_) => {
            let mut fields = Fields::of(path.clone(), value)?;
            let text = fields.string("text")?;
            fields.finish()?;
            text.ok_or_else(wrong)
        }
        _ => Err(wrong()),
    }
}

fn texts(fields: &mut Fields, name: &str) -> Result<Vec<String>, ApiError> {
    let value = fields.take(name);
    match fields.required(name, value)? {
        Value::String(text) => Ok(vec![text]),
        Value::Array(items) => {
            let text = |(i, item)| match item {
                Value::String(text) => Ok(text),
                _ => Err(ApiError::wrong_type(&format!("{name}[{i}]"), "a string")),
            };
            some(name, items)?.into_iter().enumerate().map(text).collect()
        }
        _ => Err(ApiError::wrong_type(name, "a string or an array of strings")),
    }
}

/// The reply to a rerank: the best documents first, of equal ones the earlier.
pub(crate) fn rerank_reply(request: &RerankRequest, model: &str, scores: &[f32], usage: ReadUsage) -> Vec<u8> {
    #[derive(Serialize)]
    struct Reply<'a> {
        id: String,
        model: &'a str,
        usage: ReadUsage,
        results: Vec<Ranked<'a>>,
    }
    #[derive(Serialize)]
    struct Ranked<'a> {
        index: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        document: Option<Document<'a>>,
        relevance_score: f32,
    }
    #[derive(Serialize)]
    struct Document<'a> {
        text: &'a str,
    }
    let ranked = |(index, &relevance_score): (usize, &f32)| Ranked {
        index,
        document: request.return_documents.then(|| Document { text: &request.documents[index] }),
        relevance_score,
    };
    let mut results: Vec<_> = scores.iter().enumerate().map(ranked).collect();
    results.sort_by(|a, b| b.relevance_score.total_cmp(&a.relevance_score));
    results.truncate(request.top_n.unwrap_or(usize::MAX));
    json::write(&Reply { id: id("rerank"), model, usage, results })
}

/// The reply to a score.
pub(crate) fn score_reply(model: &str, scores: &[f32], usage: ReadUsage) -> Vec<u8> {
    #[derive(Serialize)]
    struct Reply<'a> {
        id: String,
        object: &'static str,
        created: u64,
        model: &'a str,
        data: Vec<Score>,
        usage: ReadUsage,
    }
    #[derive(Serialize)]
    struct Score {
        index: usize,
        object: &'static str,
        score: f32,
    }
    let data = scores.iter().enumerate().map(|(index, &score)| Score { index, object: "score", score }).collect();
    json::write(&Reply { id: id("score"), object: "list", created: seconds_since_1970(), model, data, usage })
}

fn id(kind: &str) -> String {
    format!("{kind}-{:032x}", random::<u128>())
}
