//! Embeddings by a model that generates: the hidden states of a text's tokens become one vector.

use std::collections::VecDeque;

use baton_engine::SamplingParams;
use baton_engine::{
    Adapter, CacheScope, EngineHandle, FinishReason, HiddenStates, OutputEvent, OutputStream, PromptScores, Request,
};
use tokio_util::sync::CancellationToken;

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::generate::{engine_failure, refusal};
use crate::generation::Generation;
use crate::limits::Ask;
use crate::service::Service;

/// Texts of one request that the engine has at once: it batches them, and others have their turn.
const AT_ONCE: usize = 32;

/// How a model that generates makes an embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecoderPooling {
    /// The last token's hidden state, behind the last norm.
    Last,
    /// The mean of all tokens' hidden states, behind the last norm.
    Mean,
}

/// The embeddings of a model that generates; their length is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderEmbeddings {
    /// How they are made.
    pub pooling: DecoderPooling,
    /// Their components.
    pub width: usize,
}

/// An embedding of each input, in their order. `field` is what an input is called in a refusal.
pub(crate) async fn embed(
    service: &Service,
    record: &AccessRecord,
    (generation, adapter): (&Generation, Option<Adapter>),
    pooling: DecoderPooling,
    inputs: Vec<Vec<u32>>,
    field: impl Fn(usize) -> String,
) -> Result<Vec<Vec<f32>>, ApiError> {
    let hidden = match pooling {
        DecoderPooling::Last => HiddenStates::Last,
        DecoderPooling::Mean => HiddenStates::All,
    };
    let request = |prompt| Request {
        deadline: service.config().queue_timeout,
        share: service.share(record),
        batch: record.of_batch(),
        adapter: adapter.clone(),
        cache_scope: CacheScope { tenant: service.tenant(record), ..CacheScope::default() },
        prompt_scores: Some(PromptScores { hidden: Some(hidden), ..PromptScores::default() }),
        ..Request::new(prompt, SamplingParams::greedy(), 1)
    };
    let tokens = inputs.iter().map(Vec::len).sum();
    let mut taken = service.charge(record, Ask { choices: 1, tokens })?;
    let (mut submitted, given) = (0, record.elapsed());
    let (mut inputs, mut streams) = (inputs.into_iter().enumerate(), VecDeque::new());
    let (mut embeddings, kill_switch) = (Vec::new(), service.kill_switch());
    loop {
        while streams.len() < AT_ONCE
            && let Some((index, input)) = inputs.next()
        {
            // Streams of a request that is refused are dropped, which aborts them.
            let len = input.len();
            let stream = generation.engine.submit(request(input));
            streams.push_back(stream.map_err(|error| refusal(&generation.engine, &error, &field(index)))?);
            submitted += len;
            taken.used(submitted);
        }
        let Some(stream) = streams.pop_front() else { return Ok(embeddings) };
        if embeddings.is_empty() {
            record.submitted(given, None);
        }
        embeddings.push(pooled(stream, &generation.engine, &kill_switch).await?);
    }
}

/// The mean of the hidden states that are told, scaled to the length 1.
async fn pooled(
    mut stream: OutputStream,
    engine: &EngineHandle,
    kill_switch: &CancellationToken,
) -> Result<Vec<f32>, ApiError> {
    let (mut sums, mut count) = (Vec::<f64>::new(), 0_usize);
    loop {
        let event = tokio::select! {
            event = stream.next() => event.ok_or_else(ApiError::engine_down)?,
            () = kill_switch.cancelled() => return Err(ApiError::draining()),
        };
        match event {
            OutputEvent::PromptScores(scores) => {
                for score in scores {
                    sums.resize(score.hidden.len(), 0.0);
                    sums.iter_mut().zip(&score.hidden).for_each(|(sum, x)| *sum += f64::from(*x));
                    count += 1;
                }
            }
            OutputEvent::Token { .. } => {}
            OutputEvent::Finished { reason: FinishReason::Error(failure), .. } => {
                return Err(engine_failure(&failure, || engine.room_in(None)));
            }
            OutputEvent::Finished { reason: FinishReason::Aborted, .. } => {
                return Err(ApiError::draining());
            }
            OutputEvent::Finished { .. } => break,
        }
    }
    let mut mean = sums.iter().map(|sum| (sum / count.max(1) as f64) as f32).collect::<Vec<_>>();
    normalize(&mut mean);
    Ok(mean)
}

/// Scales a vector to the length 1, unless it is zero.
pub(crate) fn normalize(vector: &mut [f32]) {
    let length = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt().max(1e-12);
    vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
}
