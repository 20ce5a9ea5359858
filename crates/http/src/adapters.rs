//! The adapters that are served beside a model, by name.
//!
//! A request takes its adapter when it arrives and keeps it; what happens to the name afterwards is nothing to it. An
//! adapter's memory is freed when its name is gone and the last such request has ended.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use baton_engine::{Adapter, EngineStats};
use parking_lot::RwLock;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use crate::error::ApiError;
use crate::generation::ModelCard;

/// Longest name, in characters.
const MAX_NAME: usize = 256;

/// Why an adapter was not loaded, for whoever asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdapterRefusal {
    /// There is none where it was looked for.
    Missing(String),
    /// It cannot be served.
    Invalid(String),
}

type Load = dyn Fn(&Path) -> Result<Adapter, AdapterRefusal> + Send + Sync;

/// The adapters of a model.
pub struct Adapters {
    /// `None`: the model takes none.
    source: Option<Source>,
    loaded: RwLock<BTreeMap<String, ServedAdapter>>,
}

struct Source {
    max: usize,
    load: Arc<Load>,
    /// One is loaded at a time, which bounds the memory that loading takes.
    turn: Arc<Semaphore>,
}

/// Adapters as metrics show them.
pub(crate) struct AdapterGauges {
    /// Loaded at once, at most.
    pub max: usize,
    pub loaded: usize,
    /// Names of those whose requests run, with commas between.
    pub running: String,
    /// Names of those whose requests wait.
    pub waiting: String,
}

/// An adapter under its name.
#[derive(Clone)]
pub(crate) struct ServedAdapter {
    pub adapter: Adapter,
    /// Seconds since 1970.
    pub created: u64,
}

impl ServedAdapter {
    /// Changes if and only if the tokens may.
    pub fn fingerprint(&self, card: &ModelCard) -> String {
        let digest = Sha256::new_with_prefix(&card.system_fingerprint).chain_update(self.adapter.digest()).finalize();
        digest[..6].iter().fold("fp_".to_owned(), |text, byte| format!("{text}{byte:02x}"))
    }
}

impl Adapters {
    /// Of a model that takes none.
    pub fn none() -> Self {
        Self { source: None, loaded: RwLock::default() }
    }

    /// At most `max` at once. `load` reads the adapter of a folder; it is called on a thread that may block.
    pub fn new(max: usize, load: impl Fn(&Path) -> Result<Adapter, AdapterRefusal> + Send + Sync + 'static) -> Self {
        let source = Source { max, load: Arc::new(load), turn: Arc::new(Semaphore::new(1)) };
        Self { source: Some(source), loaded: RwLock::default() }
    }

    /// Serves an adapter beside the model of the card.
    ///
    /// # Errors
    /// With the reason, if the name is taken or cannot be one, or if there are `max` already.
    pub fn add(&self, card: &ModelCard, name: &str, adapter: Adapter, in_place: bool) -> Result<(), String> {
        let mut loaded = self.loaded.write();
        self.check(&loaded, card, name, in_place)?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        loaded.insert(name.to_owned(), ServedAdapter { adapter, created });
        Ok(())
    }

    fn check(
        &self,
        loaded: &BTreeMap<String, ServedAdapter>,
        card: &ModelCard,
        name: &str,
        in_place: bool,
    ) -> Result<(), String> {
        let max = self.source.as_ref().map_or(0, |source| source.max);
        let printable = |name: &str| (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic());
        if !printable(name) {
            return Err(format!("a name must have 1 to {MAX_NAME} visible ASCII characters"));
        }
        if card.names.iter().any(|served| served == name) {
            return Err("the model itself has this name".into());
        }
        match loaded.contains_key(name) {
            true if in_place => Ok(()),
            true => Err("an adapter of this name has already been loaded; load_inplace: true replaces it".into()),
            false if loaded.len() >= max => {
                Err(format!("{max} adapters are loaded, as many as --max-loras allows; unload one first"))
            }
            false => Ok(()),
        }
    }

    /// Loads the adapter of a folder and serves it.
    pub(crate) async fn load(
        &self,
        card: &ModelCard,
        name: &str,
        path: String,
        in_place: bool,
    ) -> Result<(), ApiError> {
        let source = self.source.as_ref().ok_or_else(disabled)?;
        let refuse = |reason| ApiError::invalid("lora_name", reason);
        let turn = source.turn.clone().acquire_owned().await.map_err(|_| ApiError::internal())?;
        // Before the work, so that what is refused costs nothing.
        self.check(&self.loaded.read(), card, name, in_place).map_err(refuse)?;
        let load = source.load.clone();
        // The work goes on if the client leaves, and so does its turn.
        let loaded = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            load(Path::new(&path))
        });
        let adapter = loaded.await.map_err(|_| ApiError::internal())?.map_err(|refusal| match refusal {
            AdapterRefusal::Missing(reason) => ApiError::adapter_not_found("lora_path", &reason),
            AdapterRefusal::Invalid(reason) => ApiError::invalid("lora_path", reason),
        })?;
        let (rank, mib) = (adapter.rank(), adapter.bytes() >> 20);
        self.add(card, name, adapter, in_place).map_err(refuse)?;
        tracing::info!(name, rank, mib, "adapter loaded");
        Ok(())
    }

    /// Serves an adapter no more.
    pub(crate) fn unload(&self, name: &str) -> Result<(), ApiError> {
        self.source.as_ref().ok_or_else(disabled)?;
        let gone = self.loaded.write().remove(name);
        gone.ok_or_else(|| ApiError::adapter_not_found("lora_name", "no adapter of this name is loaded"))?;
        tracing::info!(name, "adapter unloaded");
        Ok(())
    }

    /// The adapter of this name.
    pub(crate) fn get(&self, name: &str) -> Option<ServedAdapter> {
        self.loaded.read().get(name).cloned()
    }

    /// What metrics say of them; `None` of a model that takes none.
    pub(crate) fn gauges(&self, stats: &EngineStats) -> Option<AdapterGauges> {
        let (max, loaded) = (self.source.as_ref()?.max, self.loaded.read());
        let names = |digests: &BTreeSet<[u8; 32]>| {
            let of = loaded.iter().filter(|(_, served)| digests.contains(served.adapter.digest()));
            of.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(",")
        };
        let (running, waiting) = (names(&stats.running_adapters), names(&stats.waiting_adapters));
        Some(AdapterGauges { max, loaded: loaded.len(), running, waiting })
    }

    /// All of them, by name.
    pub(crate) fn all(&self) -> Vec<(String, ServedAdapter)> {
        self.loaded.read().iter().map(|(name, adapter)| (name.clone(), adapter.clone())).collect()
    }
}

fn disabled() -> ApiError {
    ApiError::invalid("lora_name", "this server takes no adapters; start it with --enable-lora")
}
