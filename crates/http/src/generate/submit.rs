//! Prompts and parameters to engine requests: defaults, and all limits that depend on the model.

use std::sync::Arc;
use std::time::Instant;

use baton_engine::{Adapter, CacheScope, OutputStream, Request, RunSpec, SamplingParams, SubmitError};
use baton_text::{ReasoningMarkers, ReasoningSplitter, ToolSplitter, ToolSyntax};

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::generate::Choices;
use crate::generate::choice::ChoiceText;
use crate::generation::{Generation, InUse};
use crate::metrics::Meter;
use crate::openai::params::Params;
use crate::service::Service;
use crate::shadow::{Encode, Shadow};

/// A request whose prompts are encoded.
pub(crate) struct Job {
    /// At least one; each has `params.n` choices.
    pub prompts: Vec<Vec<u32>>,
    pub params: Params,
    /// Changes the model.
    pub adapter: Option<Adapter>,
    /// Tokens to generate if the request does not say, as far as there is room; `None` for all of the room.
    pub default_max_tokens: Option<u32>,
    /// The field that holds the prompts.
    pub field: &'static str,
    /// How to split the outputs.
    pub reasoning: Option<Reasoning>,
    /// How to find calls of tools in them.
    pub tools: Option<ToolCalls>,
    /// The candidate is to answer the first prompt as well, which this makes for it.
    pub shadow: Option<(Shadow, Encode)>,
    /// When the request arrived.
    pub arrival: Instant,
    pub record: Arc<AccessRecord>,
}

/// How to split an output into reasoning and content.
#[derive(Clone)]
pub(crate) struct Reasoning {
    pub markers: ReasoningMarkers,
    /// The prompt ends inside reasoning.
    pub starts_inside: bool,
}

/// How to find the calls of tools in an output.
#[derive(Clone)]
pub(crate) struct ToolCalls {
    pub syntax: ToolSyntax,
    /// The tools that may be called.
    pub names: Arc<[String]>,
    /// The output ends with its first call.
    pub single: bool,
}

/// What is added to the priority of a request that nobody waits for, so that it comes behind all others.
const BATCH_PRIORITY: i32 = 1 << 20;

/// Starts all choices of all prompts, or none.
pub(crate) fn submit(service: &Service, generation: InUse, job: Job) -> Result<Choices, ApiError> {
    let spec = generation.engine.spec();
    let (mut sampling, stop_token_ids) = resolve(&job.params, &generation)?;
    let cache_scope = cache_scope(&job.params);
    let rooms = job.prompts.iter().map(|prompt| max_tokens(&job, prompt.len(), spec));
    let rooms = rooms.collect::<Result<Vec<_>, _>>()?;
    if let Some(&id) = job.prompts.iter().flatten().find(|&&id| id as usize >= spec.vocab_size) {
        return Err(refusal(&SubmitError::TokenOutOfRange { id, vocab: spec.vocab_size }, job.field));
    }

    let mut streams: Vec<OutputStream> = Vec::new();
    let prompt_tokens: Vec<usize> = job.prompts.iter().map(Vec::len).collect();
    let first_room = rooms[0];
    for (prompt, max_tokens) in job.prompts.into_iter().zip(rooms) {
        let choices = (0..job.params.n).map(|choice| {
            sampling.choice = choice;
            Request {
                stop_token_ids: stop_token_ids.clone(),
                deadline: service.config().queue_timeout,
                adapter: job.adapter.clone(),
                cache_scope: cache_scope.clone(),
                priority: if job.record.of_batch() { BATCH_PRIORITY } else { 0 },
                ..Request::new(prompt.clone(), sampling.clone(), max_tokens)
            }
        });
        // If a later prompt is refused, the streams of the earlier ones are dropped, which aborts them.
        let group = generation.engine.submit_group(choices.collect()).map_err(|error| {
            generation.metrics.rejected(&error);
            if error == SubmitError::EngineDown {
                let stats = &mut generation.stats.lock();
                stats.requests += 1;
                stats.errors += 1;
            }
            refusal(&error, job.field)
        })?;
        streams.extend(group);
    }

    let witness = job.shadow.and_then(|(shadow, encode)| {
        let request = shadow_request(&job.params, SamplingParams { choice: 0, ..sampling }, shadow.candidate())?;
        let deadline = service.config().queue_timeout;
        Some(shadow.start(encode, Request { max_tokens: first_room, deadline, ..request }))
    });
    let text = || {
        let splitter = job.reasoning.clone().map(|r| ReasoningSplitter::new(r.markers, r.starts_inside));
        let skip = job.params.skip_special_tokens;
        let (detokenizer, tools) = match &job.tools {
            None => (generation.text.detokenizer(skip), None),
            Some(ToolCalls { syntax, names, single }) => {
                (generation.text.tool_detokenizer(skip), Some(ToolSplitter::new(*syntax, names.clone(), *single)))
            }
        };
        ChoiceText::new(detokenizer, job.params.stop.clone(), splitter)
            .tools(tools)
            .min_tokens(job.params.min_tokens)
            .include_stop(job.params.include_stop_str_in_output)
            .scored(job.params.logprobs.is_some())
    };
    let choices = streams.into_iter().map(|stream| (stream, text())).collect();
    let n = job.params.n as usize;
    let meter = Meter::new(generation, job.arrival, job.record, &prompt_tokens, n);
    Ok(Choices::new(choices, prompt_tokens.iter().sum(), n, service.kill_switch(), meter, witness))
}

/// What the candidate is asked, but for the prompt: sampled as for the client, ended by its own tokens.
///
/// Its vocabulary may be another, in which ids of the request mean nothing: then it is not asked.
fn shadow_request(params: &Params, sampling: SamplingParams, candidate: &Generation) -> Option<Request> {
    let (own, stop_token_ids) = resolve(params, candidate).ok()?;
    let sampling = SamplingParams { suppressed_until_min: own.suppressed_until_min, ..sampling };
    let cache_scope = cache_scope(params);
    Some(Request { stop_token_ids, cache_scope, ..Request::new(Vec::new(), sampling, 1) })
}

fn cache_scope(params: &Params) -> CacheScope {
    CacheScope(params.cache_salt.clone().unwrap_or_default().into_bytes())
}

/// The request's values, else the checkpoint's, else OpenAI's; and the tokens that end an output.
fn resolve(params: &Params, generation: &Generation) -> Result<(SamplingParams, Vec<u32>), ApiError> {
    let defaults = &generation.card.defaults;
    let vocab = generation.engine.spec().vocab_size;
    let in_vocab = |name: &str, id: u32| match (id as usize) < vocab {
        true => Ok(()),
        false => Err(ApiError::out_of_range(name, format!("token ids below {vocab}"))),
    };
    params.logit_bias.iter().try_for_each(|&(id, _)| in_vocab("logit_bias", id))?;
    params.stop_token_ids.iter().try_for_each(|&id| in_vocab("stop_token_ids", id))?;

    let mut ends = params.stop_token_ids.clone();
    if !params.ignore_eos {
        ends.extend(defaults.eos_token_ids.iter().copied().chain(generation.text.eos_token_id()));
    }
    ends.sort_unstable();
    ends.dedup();

    let sampling = SamplingParams {
        temperature: params.temperature.unwrap_or_else(|| defaults.temperature()),
        top_k: params.top_k.or(defaults.top_k).unwrap_or(0),
        top_p: params.top_p.or(defaults.top_p).unwrap_or(1.0),
        min_p: params.min_p.or(defaults.min_p).unwrap_or(0.0),
        repetition_penalty: params.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        logit_bias: params.logit_bias.clone(),
        suppressed_until_min: if params.min_tokens > 0 { ends.clone() } else { Vec::new() },
        min_tokens: params.min_tokens,
        seed: params.seed.unwrap_or_else(rand::random),
        logprobs: params.logprobs,
        ..SamplingParams::default()
    };
    Ok((sampling, ends))
}

/// How many tokens a prompt of this length may get.
fn max_tokens(job: &Job, prompt: usize, spec: &RunSpec) -> Result<u32, ApiError> {
    let context = spec.max_model_len;
    let room = context.saturating_sub(prompt);
    if room == 0 {
        return Err(ApiError::context_length(job.field, prompt, None, context));
    }
    if let Some(requested) = job.params.max_tokens {
        return match requested as usize <= room {
            true => Ok(requested),
            false => Err(ApiError::context_length(job.field, prompt, Some(requested), context)),
        };
    }
    // The last token is never stored, so one more than the cache holds fits.
    let stored = (spec.num_blocks * spec.block_size + 1).saturating_sub(prompt).max(1);
    let wanted = job.default_max_tokens.map_or(usize::MAX, |tokens| tokens.max(job.params.min_tokens) as usize);
    Ok(wanted.min(room).min(stored) as u32)
}

/// The engine's refusal on the wire.
pub(crate) fn refusal(error: &SubmitError, field: &str) -> ApiError {
    match *error {
        SubmitError::QueueFull { .. } => ApiError::overloaded(),
        SubmitError::PromptEmpty => ApiError::out_of_range(field, "at least one token long"),
        SubmitError::TooLong { prompt, max_tokens, max_model_len } => {
            ApiError::context_length(field, prompt, Some(max_tokens), max_model_len)
        }
        SubmitError::DoesNotFit { needed_blocks, total_blocks } => {
            ApiError::cache_size(field, needed_blocks, total_blocks)
        }
        SubmitError::TokenOutOfRange { vocab, .. } => ApiError::out_of_range(field, format!("token ids below {vocab}")),
        SubmitError::ScoreBeyondPrompt { prompt, .. } => {
            ApiError::out_of_range(field, format!("positions below {prompt} for scores"))
        }
        SubmitError::Draining => ApiError::draining(),
        SubmitError::EngineDown => ApiError::engine_down(),
        SubmitError::MaxTokensZero => ApiError::out_of_range("max_tokens", "at least 1"),
    }
}
