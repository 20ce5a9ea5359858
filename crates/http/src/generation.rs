//! A generation: one loaded model and all that belongs to it. It never changes, but for its adapters and what is
//! known of it.
//!
//! A request takes its generation once ([`crate::generations`]) and holds it, as [`InUse`], to the last byte of its
//! reply: defaults, template, fingerprint, engine, metrics and adapters all come from there. So a generation that
//! serves no more lives on until the last such request has ended.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use baton_engine::{Adapter, EngineHandle};
use baton_grammar::{Compiler, Limits, Token, Vocabulary};
use baton_text::TextModel;
use parking_lot::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::adapters::Adapters;
use crate::admission::{Counter, Ticket};
use crate::error::ApiError;
use crate::handoff::HandoffState;
use crate::metrics::ModelMetrics;
use crate::observed::GenerationStats;
use crate::pooled::DecoderEmbeddings;

/// Hex digits of a digest that labels and logs show.
const LABEL_DIGITS: usize = 12;

/// How a model presents itself.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelCard {
    /// Names under which it is served, at least one; the first is canonical.
    pub names: Vec<String>,
    /// Seconds since 1970.
    pub created: u64,
    /// Who owns it.
    pub owned_by: String,
    /// Digest of all files of the checkpoint: 64 lower-case hex digits.
    pub generation: String,
    /// Changes if and only if the tokens may.
    pub system_fingerprint: String,
    /// The checkpoint's own parameters.
    pub defaults: Defaults,
    /// How the weights were loaded, as JSON.
    pub load_report: Vec<u8>,
    /// The embeddings that it makes besides what it generates, if it makes any.
    pub embeddings: Option<DecoderEmbeddings>,
}

impl ModelCard {
    /// # Panics
    /// If it has no name or no digest.
    pub(crate) fn assert_complete(&self) {
        assert!(!self.names.is_empty(), "a model without a name");
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        assert!(self.generation.len() == 64 && self.generation.bytes().all(hex), "a model without a digest");
    }

    /// The digest's first digits.
    pub(crate) fn label(&self) -> &str {
        &self.generation[..LABEL_DIGITS]
    }

    /// Whether the model goes by this name; it does where none is asked for.
    pub(crate) fn has_name(&self, asked: Option<&str>) -> bool {
        asked.is_none_or(|name| self.names.iter().any(|served| served == name))
    }
}

/// Parameters of `generation_config.json`: they hold where a request says nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Defaults {
    /// False means temperature 0.
    pub do_sample: Option<bool>,
    /// As in the request.
    pub temperature: Option<f32>,
    /// As in the request.
    pub top_p: Option<f32>,
    /// As in the request; 0 for all.
    pub top_k: Option<u32>,
    /// As in the request.
    pub min_p: Option<f32>,
    /// As in the request.
    pub repetition_penalty: Option<f32>,
    /// Tokens of a chat reply, if the request does not say.
    pub max_new_tokens: Option<u32>,
    /// Tokens that end an output, besides the tokenizer's own.
    pub eos_token_ids: Vec<u32>,
}

impl Defaults {
    /// The temperature where a request says none.
    pub(crate) fn temperature(&self) -> f32 {
        if self.do_sample == Some(false) { 0.0 } else { self.temperature.unwrap_or(1.0) }
    }
}

/// A loaded model that is to be served.
pub struct NewGeneration {
    /// Computes.
    pub engine: EngineHandle,
    /// Templates and tokens.
    pub text: Arc<TextModel>,
    /// How it presents itself.
    pub card: ModelCard,
    /// What can be loaded beside it.
    pub adapters: Adapters,
    /// What is known of its hand-off, now and later: a clone sets it.
    pub handoff: HandoffState,
}

/// See the head of the file.
pub(crate) struct Generation {
    pub engine: EngineHandle,
    pub text: Arc<TextModel>,
    pub card: ModelCard,
    pub adapters: Adapters,
    pub handoff: HandoffState,
    pub metrics: ModelMetrics,
    pub stats: Mutex<GenerationStats>,
    compiler: OnceLock<Compiler>,
    in_flight: Counter,
    /// When it took the role that it has, in seconds since 1970.
    since: AtomicU64,
    ended: CancellationToken,
    /// The last field, so that whoever waits for the end finds all the others gone.
    _ends: DropGuard,
}

/// What a request's `model` means.
pub(crate) struct Target {
    /// The name to answer under.
    pub name: String,
    pub system_fingerprint: String,
    pub adapter: Option<Adapter>,
}

impl Generation {
    /// # Panics
    /// If the card has no name or no digest.
    pub fn new(new: NewGeneration) -> Arc<Self> {
        let NewGeneration { engine, text, card, adapters, handoff } = new;
        card.assert_complete();
        let metrics = ModelMetrics::new(&card.names[0], card.label(), engine.spec().max_model_len);
        let ended = CancellationToken::new();
        let _ends = ended.clone().drop_guard();
        let (stats, in_flight, since) = (Mutex::default(), Counter::default(), AtomicU64::new(now()));
        let compiler = OnceLock::new();
        Arc::new(Self {
            engine,
            text,
            card,
            adapters,
            handoff,
            metrics,
            stats,
            compiler,
            in_flight,
            since,
            ended,
            _ends,
        })
    }

    /// The digest's first digits.
    pub fn label(&self) -> &str {
        self.card.label()
    }

    /// Whether the model itself goes by this name; it does where none is asked for.
    pub fn has_name(&self, asked: Option<&str>) -> bool {
        self.card.has_name(asked)
    }

    /// The model or adapter asked for, which must be served, or the model by its canonical name.
    pub fn target(&self, asked: Option<&str>) -> Result<Target, ApiError> {
        let name = asked.unwrap_or(&self.card.names[0]);
        if self.has_name(asked) {
            let system_fingerprint = self.card.system_fingerprint.clone();
            return Ok(Target { name: name.to_owned(), system_fingerprint, adapter: None });
        }
        let found = self.adapters.get(name).ok_or_else(ApiError::model_not_found)?;
        let system_fingerprint = found.fingerprint(&self.card);
        Ok(Target { name: name.to_owned(), system_fingerprint, adapter: Some(found.adapter) })
    }

    /// What compiles grammars for its vocabulary. The first call takes as long as sorting the vocabulary some times.
    pub fn compiler(&self) -> &Compiler {
        let token = |id| match self.text.is_control(id) {
            true => Token::Control(self.text.token_text(id)),
            false => Token::Text(self.text.token_bytes(id)),
        };
        // Ids beyond the logits cannot be chosen.
        let size = self.text.vocab_size().min(self.engine.spec().vocab_size);
        let vocabulary = || Vocabulary::new((0..size as u32).map(token));
        self.compiler.get_or_init(|| Compiler::new(vocabulary(), Limits::default()))
    }

    /// Whether requests would be answered: its hand-off allows it and its engine runs.
    pub fn ready(&self) -> Result<(), ApiError> {
        self.handoff.check()?;
        let stats = self.engine.stats();
        match stats.failure {
            Some(failure) => Err(ApiError::engine_down_by(&failure)),
            None if !stats.alive => Err(ApiError::engine_down()),
            None if stats.rebuilding => Err(ApiError::rebuilding()),
            None => Ok(()),
        }
    }

    /// Requests that hold it.
    pub fn in_flight(&self) -> usize {
        self.in_flight.count()
    }

    /// Seconds since 1970.
    pub fn since(&self) -> u64 {
        self.since.load(Ordering::Relaxed)
    }

    /// It has another role from now on.
    pub fn changes_role(&self) {
        self.since.store(now(), Ordering::Relaxed);
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A generation as one request holds it.
pub(crate) struct InUse {
    generation: Arc<Generation>,
    _ticket: Ticket,
}

impl InUse {
    pub fn new(generation: &Arc<Generation>) -> Self {
        Self { generation: generation.clone(), _ticket: generation.in_flight.ticket() }
    }
}

impl Deref for InUse {
    type Target = Arc<Generation>;

    fn deref(&self) -> &Arc<Generation> {
        &self.generation
    }
}

/// A generation that no request takes any more.
pub struct Retired {
    digest: String,
    engine: EngineHandle,
    ended: CancellationToken,
}

impl Retired {
    pub(crate) fn new(generation: &Generation) -> Self {
        let digest = generation.card.generation.clone();
        Self { digest, engine: generation.engine.clone(), ended: generation.ended.clone() }
    }

    /// Its digest.
    pub fn generation(&self) -> &str {
        &self.digest
    }

    /// Its engine, to be shut down once [`ended`](Self::ended).
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Waits until the last request that began with it has ended, and everything of it but the engine is freed.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }
}
