//! Prompts and parameters to engine requests: defaults, and all limits that depend on the model.

use std::sync::Arc;
use std::time::Instant;

use baton_engine::{Adapter, CacheScope, EngineHandle, OutputStream, Request, RunSpec, SamplingParams, SubmitError};
use baton_grammar::Grammar;
use baton_text::{ReasoningMarkers, ReasoningSplitter};

use crate::access::AccessRecord;
use crate::error::{ApiError, Refusal};
use crate::generate::choice::ChoiceText;
use crate::generate::prompt::bound_scores;
use crate::generate::{Choices, Echo, Told, ToolCalls};
use crate::generation::{Generation, InUse};
use crate::limits::Ask;
use crate::metrics::Meter;
use crate::openai::params::Params;
use crate::service::Service;
use crate::shadow::{Encode, Shadow};
use crate::summary::Asked;

/// A request whose prompts are encoded.
pub(crate) struct Job {
    /// At least one; each has `params.candidates()` choices.
    pub prompts: Vec<Vec<u32>>,
    pub params: Params,
    /// Of each prompt, if its text comes before the output.
    pub echoes: Vec<Echo>,
    /// `params.bad_words` as ids.
    pub bad_words: Vec<Vec<u32>>,
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
    /// What the outputs must be.
    pub grammar: Option<Arc<dyn Grammar>>,
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

/// Starts all choices of all prompts, or none.
pub(crate) fn submit(service: &Service, generation: InUse, job: Job) -> Result<Choices, ApiError> {
    let spec = generation.engine.spec();
    let (mut sampling, stop_token_ids) = resolve(&job.params, &generation)?;
    let cache_scope = CacheScope {
        tenant: service.tenant(&job.record),
        salt: job.params.cache_salt.clone().unwrap_or_default().into(),
    };
    bound_scores(&job.prompts, &job.params)?;
    let rooms = job.prompts.iter().map(|prompt| max_tokens(&job, prompt.len(), spec));
    let rooms = rooms.collect::<Result<Vec<_>, _>>()?;
    if let Some(&id) = job.prompts.iter().flatten().find(|&&id| id as usize >= spec.vocab_size) {
        return Err(refusal(
            &generation.engine,
            &SubmitError::TokenOutOfRange { id, vocab: spec.vocab_size },
            job.field,
        ));
    }

    let per_prompt = job.params.candidates();
    let choices = rooms.len() * per_prompt as usize;
    let prompts: usize = job.prompts.iter().map(Vec::len).sum();
    let outputs = rooms.iter().map(|&room| room as usize).sum::<usize>() * per_prompt as usize;
    let tokens = prompts + if job.params.max_tokens.is_some() { outputs } else { 0 };
    let taken = service.charge(&job.record, Ask { choices, tokens })?;

    sampling.bad_words = job.bad_words;
    let (share, priority, batch) = (service.share(&job.record), job.params.priority, job.record.of_batch());
    let given = job.record.elapsed();
    let mut streams: Vec<OutputStream> = Vec::new();
    let prompt_tokens: Vec<usize> = job.prompts.iter().map(Vec::len).collect();
    let first_room = rooms[0];
    let (mut echoes, mut told) = (job.echoes.into_iter(), Vec::new());
    for (prompt, max_tokens) in job.prompts.into_iter().zip(rooms) {
        let prompt = Told::new(prompt, echoes.next(), &job.params, &stop_token_ids);
        let choices = (0..per_prompt).map(|choice| {
            sampling.choice = choice;
            Request {
                stop_token_ids: stop_token_ids.clone(),
                deadline: service.config().queue_timeout,
                adapter: job.adapter.clone(),
                cache_scope: cache_scope.clone(),
                time_limit: job.params.deadline.map(|deadline| deadline.saturating_sub(job.arrival.elapsed())),
                prompt_scores: prompt.request(&job.params).filter(|_| choice == 0),
                share,
                priority,
                batch,
                grammar: job.grammar.clone(),
                ..Request::new(prompt.ids.clone(), sampling.clone(), max_tokens)
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
            refusal(&generation.engine, &error, job.field)
        })?;
        streams.extend(group);
        told.push(prompt);
    }

    let asked = Asked {
        n: job.params.n,
        max_tokens: job.params.max_tokens,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
    };
    // A grammar is made for one vocabulary; the candidate's may be another.
    let shadow = job.shadow.filter(|_| job.grammar.is_none());
    let witness = shadow.and_then(|(shadow, encode)| {
        let request = shadow_request(&job.params, SamplingParams { choice: 0, ..sampling }, shadow.candidate())?;
        let deadline = service.config().queue_timeout;
        Some(shadow.start(encode, Request { max_tokens: first_room, deadline, cache_scope, ..request }))
    });
    let text = || {
        let splitter = job.reasoning.clone().map(|r| ReasoningSplitter::new(r.markers, r.starts_inside));
        let skip = job.params.skip_special_tokens;
        let (detokenizer, tools) = match &job.tools {
            None => (generation.text.detokenizer(skip), None),
            Some(calls) => (generation.text.tool_detokenizer(skip), Some(calls.splitter())),
        };
        ChoiceText::new(detokenizer, job.params.stop.clone(), splitter)
            .tools(tools)
            .min_tokens(job.params.min_tokens)
            .include_stop(job.params.include_stop_str_in_output)
            .scored(job.params.logprobs.is_some())
            .with_ids(job.params.return_token_ids)
            .hide_reasoning(job.params.hide_reasoning)
    };
    let choices = streams.into_iter().map(|stream| (stream, text())).collect();
    let (times, owed) = ((job.arrival, given), (job.record, taken));
    let meter = Meter::new(generation, times, owed, &prompt_tokens, per_prompt as usize, asked);
    let choices = Choices::new(choices, told, service.kill_switch(), meter, witness);
    let prompts_only = job.params.max_tokens == Some(0);
    Ok(choices.told(job.params.n as usize).prompts_only(prompts_only))
}

/// What the candidate is asked, but for the prompt: sampled as for the client, ended by its own tokens.
///
/// Its vocabulary may be another, in which ids of the request mean nothing: then it is not asked.
fn shadow_request(params: &Params, sampling: SamplingParams, candidate: &Generation) -> Option<Request> {
    let (own, stop_token_ids) = resolve(params, candidate).ok()?;
    let sampling = SamplingParams { suppressed_until_min: own.suppressed_until_min, ..sampling };
    Some(Request { stop_token_ids, ..Request::new(Vec::new(), sampling, 1) })
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
    params.allowed_token_ids.iter().flatten().try_for_each(|&id| in_vocab("allowed_token_ids", id))?;

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
        allowed_token_ids: params.allowed_token_ids.clone(),
        // The best of several are the likeliest.
        logprobs: params.logprobs.or((params.candidates() > params.n).then_some(0)),
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
        // The engine computes a prompt in order to generate: a token that nobody sees, if none is wanted.
        let requested = requested.max(1);
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
pub(crate) fn refusal(engine: &EngineHandle, error: &SubmitError, field: &str) -> ApiError {
    match *error {
        SubmitError::QueueFull { .. } => ApiError::overloaded(Refusal::QueueFull, engine.room_in(Some(error))),
        SubmitError::QueuedTokens { .. } => ApiError::overloaded(Refusal::QueuedTokens, engine.room_in(Some(error))),
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
