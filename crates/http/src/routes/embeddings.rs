//! `POST /v1/embeddings`: by an encoder, or by the hidden states of a model that generates.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use baton_text::{EncoderInput, TextModel};
use http::HeaderValue;
use http::header::CONTENT_TYPE;

use crate::access::AccessRecord;
use crate::encoder::EncoderTask;
use crate::error::ApiError;
use crate::extract;
use crate::generations::Pick;
use crate::openai::completion::Prompt;
use crate::openai::embedding::{EmbeddingRequest, Encoding, ReadUsage, reply};
use crate::pooled::{DecoderEmbeddings, embed, normalize};
use crate::routes::warn;
use crate::scoring::{Cut, unreadable};
use crate::service::Service;

pub(super) async fn create(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = extract::json(request, service.config()).await?;
    let EmbeddingRequest { model, inputs, encoding, dimensions, truncation, ignored } =
        EmbeddingRequest::read(body.object, service.config().lenient)?;
    let several = inputs.len() > 1;
    let field = move |index: usize| if several { format!("input[{index}]") } else { "input".to_owned() };
    let within = |width: usize| match dimensions.unwrap_or(width) {
        dimensions if dimensions <= width => Ok(dimensions),
        _ => Err(ApiError::out_of_range("dimensions", format!("at most {width}"))),
    };
    let usage = |inputs: &[EncoderInput]| ReadUsage::new(inputs.iter().map(|input| input.ids.len()).sum());

    let (name, embeddings, shape, usage) = if let Some(encoder) = service.encoder() {
        if encoder.spec.task != EncoderTask::Embed {
            return Err(encoder.does_not_generate());
        }
        let name = encoder.named(model.as_deref())?.to_owned();
        let shape = Shape { dimensions: within(encoder.spec.width)?, normalized: encoder.spec.normalized, encoding };
        let cut = Cut::new(truncation, encoder.spec.max_model_len)?;
        let inputs = read(&service, &encoder.text, inputs, cut, field).await?;
        let usage = usage(&inputs);
        (name, encoder.compute(&service, &record, inputs, field).await?, shape, usage)
    } else {
        let Pick { generation, target, .. } = service.pick(&record, model.as_deref())?;
        let Some(DecoderEmbeddings { pooling, width }) = generation.card.embeddings else {
            return Err(ApiError::not_for_this_model(
                "the model served here generates texts and embeds none: POST /v1/chat/completions or /v1/completions",
            ));
        };
        let shape = Shape { dimensions: within(width)?, normalized: true, encoding };
        // A token is generated behind each text, and not looked at.
        let cut = Cut::new(truncation, generation.engine.spec().max_model_len - 1)?;
        let inputs = read(&service, &generation.text, inputs, cut, field).await?;
        let usage = usage(&inputs);
        record.prompt_tokens(inputs.iter().map(|input| input.ids.len()).sum());
        let ids = inputs.into_iter().map(|input| input.ids).collect();
        (target.name, embed(&service, &record, (&generation, target.adapter), pooling, ids, field).await?, shape, usage)
    };
    let body = service.text_work(move || Ok(shape.written(&name, embeddings, usage))).await?;
    let json = HeaderValue::from_static("application/json");
    let mut response = ([(CONTENT_TYPE, json)], body).into_response();
    warn(&mut response, &ignored);
    Ok(response)
}

/// The inputs of a request as tokens.
async fn read(
    service: &Service,
    model: &Arc<TextModel>,
    prompts: Vec<Prompt>,
    cut: Cut,
    field: impl Fn(usize) -> String + Send + 'static,
) -> Result<Vec<EncoderInput>, ApiError> {
    let model = Arc::clone(model);
    let inputs = move || {
        let input = |(i, prompt)| input(&model, prompt, cut, || field(i));
        prompts.into_iter().enumerate().map(input).collect()
    };
    service.text_work(inputs).await
}

/// Ids are taken as they are; a text gets the special tokens of its tokenizer.
fn input(model: &TextModel, prompt: Prompt, cut: Cut, field: impl Fn() -> String) -> Result<EncoderInput, ApiError> {
    match prompt {
        Prompt::Ids(ids) => cut.ids(ids, field),
        Prompt::Text(text) => {
            let part = model.part(&text, cut.max_tokens).map_err(|_| unreadable(&field()))?;
            cut.input(model, &part, None, field)
        }
    }
}

/// How embeddings are written.
struct Shape {
    /// Components that are kept.
    dimensions: usize,
    /// Whether they have the length 1.
    normalized: bool,
    encoding: Encoding,
}

impl Shape {
    fn written(self, model: &str, mut embeddings: Vec<Vec<f32>>, usage: ReadUsage) -> Vec<u8> {
        embeddings.iter_mut().for_each(|embedding| self.shorten(embedding));
        reply(model, &embeddings, self.encoding, usage)
    }

    /// Keeps the first components, which of a Matryoshka model are an embedding of their own, with the length that the
    /// model's embeddings have.
    fn shorten(&self, embedding: &mut Vec<f32>) {
        if embedding.len() <= self.dimensions {
            return;
        }
        embedding.truncate(self.dimensions);
        if self.normalized {
            normalize(embedding);
        }
    }
}
