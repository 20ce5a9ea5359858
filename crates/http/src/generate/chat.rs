//! A chat, in whatever dialect it was asked for: from messages to choices under way.

use std::sync::Arc;
use std::time::Instant;

use baton_text::{ChatInput, TextError};
use chrono::NaiveDateTime;

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::generate::{Choices, Encoding, Job, Reasoning, bad_words, submit};
use crate::generation::{Generation, Target};
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
    let chat = ChatInput {
        messages: request.messages.into(),
        tools: None,
        add_generation_prompt: request.add_generation_prompt,
        continue_final_message: request.continue_final_message,
        kwargs: request.template_kwargs,
    };
    let default_max_tokens = generation.card.defaults.max_new_tokens;
    let how = How {
        field: request.field,
        now: chrono::Local::now().naive_local(),
        effort: request.effort,
        // The template has written what belongs there.
        encoding: Encoding::new(&request.params, false, default_max_tokens),
    };
    let shadow = shadow.map(|shadow| {
        let chat = chat.clone();
        let encode: Encode = Box::new(move |candidate| Ok(encode(candidate, chat, how)?.0));
        (shadow, encode)
    });
    let (model, words) = (Arc::clone(&generation), std::mem::take(&mut request.params.bad_words));
    let work = move || Ok((encode(&model, chat, how)?, bad_words(&model.text, &words)?));
    let ((prompt, starts_inside), bad_words) = service.text_work(work).await?;

    let job = Job {
        prompts: vec![prompt],
        params: request.params,
        echoes: Vec::new(),
        bad_words,
        adapter: target.adapter.clone(),
        default_max_tokens,
        field: how.field,
        reasoning: generation.text.reasoning_markers().map(|markers| Reasoning { markers, starts_inside }),
        shadow,
        arrival,
        record,
    };
    let model = Arc::clone(&generation);
    let choices = submit(service, generation, job)?;
    Ok(StartedChat { choices, generation: model, target })
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

/// The prompt's ids, and whether it ends inside reasoning.
fn encode(generation: &Generation, mut chat: ChatInput, how: How) -> Result<(Vec<u32>, bool), ApiError> {
    let (text, refuse) = (&generation.text, |error: TextError| ApiError::invalid(how.field, error.to_string()));
    if let Some(effort) = how.effort {
        let word = effort.word(|word| text.chat_template_has(word));
        chat.kwargs.entry("reasoning_effort").or_insert_with(|| word.into());
    }
    let rendered = text.render_chat(&chat, how.now).map_err(refuse)?;
    let (prompt, _) = how.encoding.ids(generation, &rendered).map_err(refuse)?;
    Ok((prompt, text.prompt_opens_reasoning(&chat, &rendered)))
}
