//! A chat, in whatever dialect it was asked for: from messages to choices under way.

use std::mem;
use std::sync::Arc;
use std::time::Instant;

use baton_grammar::Thinking;
use baton_text::{ChatInput, TextError, TextModel};
use chrono::NaiveDateTime;

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::generate::{Choices, Encoding, Job, Reasoning, ToolCalls, bad_words, compile, submit};
use crate::generation::{Generation, InUse, Target};
use crate::generations::Pick;
use crate::openai::chat_request::ChatRequest;
use crate::openai::thinking::Effort;
use crate::service::Service;
use crate::shadow::Encode;

/// A chat that the engine has accepted.
pub(crate) struct StartedChat {
    pub choices: Choices,
    pub generation: Arc<Generation>,
    pub target: Target,
}

/// Renders, encodes and submits a chat, or does nothing.
pub(crate) async fn start_chat(
    service: &Service,
    record: Arc<AccessRecord>,
    arrival: Instant,
    mut request: ChatRequest,
) -> Result<StartedChat, ApiError> {
    let Pick { generation, target, shadow } = service.pick(&record, request.model.as_deref())?;
    let calls = ToolCalls::new(&generation.text, &request.tools)?;
    let how = How::new(&request, &generation);
    let chat = input(&mut request);
    let shadow = shadow.map(|shadow| {
        let chat = chat.clone();
        let encode: Encode = Box::new(move |candidate| Ok(encode(candidate, chat, how)?.ids));
        (shadow, encode)
    });
    let (model, words) = (Arc::clone(&generation), mem::take(&mut request.params.bad_words));
    let work = move || Ok((encode(&model, chat, how)?, bad_words(&model.text, &words)?));
    let (prompt, bad_words) = service.text_work(work).await?;

    let markers = generation.text.reasoning_markers();
    let thinking = markers.as_ref().filter(|_| prompt.place != Place::Behind).map(|markers| Thinking {
        open: markers.open_id,
        close: markers.close_id,
        starts_inside: prompt.place == Place::Inside,
        budget: request.thinking_budget.map(|tokens| tokens as usize),
    });
    let grammar = match &calls {
        Some(calls) => calls.grammar(service, &generation, &request, thinking).await?,
        None => compile(service, &generation, &request.params, request.structured, thinking).await?,
    };

    let job = Job {
        prompts: vec![prompt.ids],
        params: request.params,
        echoes: Vec::new(),
        bad_words,
        adapter: target.adapter.clone(),
        default_max_tokens: generation.card.defaults.max_new_tokens,
        field: how.field,
        reasoning: markers.map(|markers| Reasoning { markers, starts_inside: prompt.place == Place::Inside }),
        tools: calls,
        grammar,
        shadow,
        arrival,
        record,
    };
    let model = Arc::clone(&generation);
    let choices = submit(service, generation, job)?;
    Ok(StartedChat { choices, generation: model, target })
}

/// A chat's prompt, made and not answered.
pub(crate) struct RenderedChat {
    pub prompt: ChatPrompt,
    pub generation: InUse,
    pub target: Target,
}

/// Renders and encodes a chat as [`start_chat`] does, and nothing more.
pub(crate) async fn render_chat(
    service: &Service,
    record: &AccessRecord,
    mut request: ChatRequest,
) -> Result<RenderedChat, ApiError> {
    let Pick { generation, target, .. } = service.pick(record, request.model.as_deref())?;
    // What an answer would be refused for is refused here too.
    ToolCalls::new(&generation.text, &request.tools)?;
    let how = How::new(&request, &generation);
    let (chat, model) = (input(&mut request), Arc::clone(&generation));
    let prompt = service.text_work(move || encode(&model, chat, how)).await?;
    record.prompt_tokens(prompt.ids.len());
    Ok(RenderedChat { prompt, generation, target })
}

/// What the template is given, taken out of the request.
fn input(request: &mut ChatRequest) -> ChatInput {
    ChatInput {
        messages: mem::take(&mut request.messages).into(),
        tools: request.tools.for_template(),
        add_generation_prompt: request.add_generation_prompt,
        continue_final_message: request.continue_final_message,
        kwargs: mem::take(&mut request.template_kwargs),
    }
}

/// How a chat becomes its prompt.
#[derive(Clone, Copy)]
struct How {
    /// The field to blame.
    field: &'static str,
    now: NaiveDateTime,
    effort: Option<Effort>,
    encoding: Encoding,
}

impl How {
    fn new(request: &ChatRequest, generation: &Generation) -> Self {
        // No special tokens of the tokenizer: the template has written what belongs there.
        let encoding = Encoding::new(&request.params, false, generation.card.defaults.max_new_tokens);
        Self { field: request.field, now: chrono::Local::now().naive_local(), effort: request.effort, encoding }
    }
}

/// The prompt that a chat becomes.
pub(crate) struct ChatPrompt {
    pub text: String,
    pub ids: Vec<u32>,
    /// Where the output begins.
    pub place: Place,
}

/// Where an output begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Before any reasoning.
    Before,
    /// In reasoning that the prompt has opened.
    Inside,
    /// Behind reasoning that the prompt has closed.
    Behind,
}

fn encode(generation: &Generation, mut chat: ChatInput, how: How) -> Result<ChatPrompt, ApiError> {
    let (text, refuse) = (&generation.text, |error: TextError| ApiError::invalid(how.field, error.to_string()));
    if let Some(effort) = how.effort {
        let word = effort.word(|word| text.chat_template_has(word));
        chat.kwargs.entry("reasoning_effort").or_insert_with(|| word.into());
    }
    let rendered = text.render_chat(&chat, how.now).map_err(refuse)?;
    let (ids, _) = how.encoding.ids(generation, &rendered).map_err(refuse)?;
    let place = match text.reasoning_markers() {
        Some(_) if text.prompt_opens_reasoning(&chat, &rendered) => Place::Inside,
        Some(markers) if rendered.trim_end().ends_with(&markers.close) => Place::Behind,
        _ => Place::Before,
    };
    Ok(ChatPrompt { text: rendered, ids, place })
}
