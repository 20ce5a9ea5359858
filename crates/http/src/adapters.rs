//! The adapters that are served beside a model, by name.
//!
//! A request takes its adapter when it arrives and keeps it; what happens to the name afterwards is nothing to it. An
//! adapter's memory is freed when its name is gone and the last such request has ended.
//!
//! Invariant: what has a name was loaded for the runner that computes, or is superseded by what was.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
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
    /// There is nothing to load it for: the model is being loaded again.
    Unavailable,
}

type Load = dyn Fn(&Path) -> Result<Adapter, AdapterRefusal> + Send + Sync;

/// The adapters of a model. Clones are the same adapters.
#[derive(Clone)]
pub struct Adapters {
    /// `None`: the model takes none.
    source: Option<Source>,
    loaded: Arc<RwLock<Loaded>>,
}

#[derive(Default)]
struct Loaded {
    by_name: BTreeMap<String, ServedAdapter>,
    /// Times the runner was replaced: what began to be loaded before is of no use.
    reloads: u64,
}

#[derive(Clone)]
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
    /// Where it was loaded from.
    path: PathBuf,
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
        Self { source: None, loaded: Arc::default() }
    }

    /// At most `max` at once. `load` reads the adapter of a folder; it is called on a thread that may block.
    pub fn new(max: usize, load: impl Fn(&Path) -> Result<Adapter, AdapterRefusal> + Send + Sync + 'static) -> Self {
        let source = Source { max, load: Arc::new(load), turn: Arc::new(Semaphore::new(1)) };
        Self { source: Some(source), loaded: Arc::default() }
    }

    /// Serves an adapter of this folder beside the model of the card.
    ///
    /// # Errors
    /// With the reason, if the name is taken or cannot be one, or if there are `max` already.
    pub fn add(
        &self,
        card: &ModelCard,
        name: &str,
        path: PathBuf,
        adapter: Adapter,
        in_place: bool,
    ) -> Result<(), String> {
        self.insert(&mut self.loaded.write(), card, name, path, adapter, in_place)
    }

    fn insert(
        &self,
        loaded: &mut Loaded,
        card: &ModelCard,
        name: &str,
        path: PathBuf,
        adapter: Adapter,
        in_place: bool,
    ) -> Result<(), String> {
        self.check(loaded, card, name, in_place)?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        loaded.by_name.insert(name.to_owned(), ServedAdapter { adapter, path, created });
        Ok(())
    }

    /// Loads all of them again, on the caller's thread, for the runner that has taken the place of the one they were
    /// loaded for. What cannot be had again, or has become another adapter, is served no more.
    pub fn reload(&self) {
        let Some(source) = &self.source else { return };
        let before = {
            let mut loaded = self.loaded.write();
            loaded.reloads += 1;
            loaded.by_name.clone()
        };
        for (name, ServedAdapter { adapter: old, path, created }) in before {
            let reason = match (source.load)(&path) {
                Ok(new) if new == old => {
                    old.supersede(Some(new.clone()));
                    self.exchange(&name, &old, Some(ServedAdapter { adapter: new, path, created }));
                    continue;
                }
                Ok(_) => "its files have changed".to_owned(),
                Err(AdapterRefusal::Missing(reason) | AdapterRefusal::Invalid(reason)) => reason,
                Err(AdapterRefusal::Unavailable) => "there is nothing to load it for".to_owned(),
            };
            tracing::error!(name, reason, "an adapter is served no more, because it cannot be loaded again");
            old.supersede(None);
            self.exchange(&name, &old, None);
        }
    }

    /// Gives a name that still stands for `old` to another adapter, or to none.
    fn exchange(&self, name: &str, old: &Adapter, new: Option<ServedAdapter>) {
        let mut loaded = self.loaded.write();
        if loaded.by_name.get(name).is_some_and(|served| served.adapter == *old) {
            match new {
                Some(new) => _ = loaded.by_name.insert(name.to_owned(), new),
                None => _ = loaded.by_name.remove(name),
            }
        }
    }

    fn check(&self, loaded: &Loaded, card: &ModelCard, name: &str, in_place: bool) -> Result<(), String> {
        let max = self.source.as_ref().map_or(0, |source| source.max);
        let printable = |name: &str| (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic());
        if !printable(name) {
            return Err(format!("a name must have 1 to {MAX_NAME} visible ASCII characters"));
        }
        if card.names.iter().any(|served| served == name) {
            return Err("the model itself has this name".into());
        }
        match loaded.by_name.contains_key(name) {
            true if in_place => Ok(()),
            true => Err("an adapter of this name has already been loaded; load_inplace: true replaces it".into()),
            false if loaded.by_name.len() >= max => {
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
        let reloads = {
            let loaded = self.loaded.read();
            self.check(&loaded, card, name, in_place).map_err(refuse)?;
            loaded.reloads
        };
        let (load, folder) = (source.load.clone(), PathBuf::from(path));
        // The work goes on if the client leaves, and so does its turn.
        let loaded = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            (load(&folder), folder)
        });
        let (adapter, folder) = loaded.await.map_err(|_| ApiError::internal())?;
        let adapter = adapter.map_err(|refusal| match refusal {
            AdapterRefusal::Missing(reason) => ApiError::adapter_not_found("lora_path", &reason),
            AdapterRefusal::Invalid(reason) => ApiError::invalid("lora_path", reason),
            AdapterRefusal::Unavailable => ApiError::rebuilding(),
        })?;
        let (rank, mib) = (adapter.rank(), adapter.bytes() >> 20);
        {
            let mut loaded = self.loaded.write();
            if loaded.reloads != reloads {
                return Err(ApiError::rebuilding());
            }
            self.insert(&mut loaded, card, name, folder, adapter, in_place).map_err(refuse)?;
        }
        tracing::info!(name, rank, mib, "adapter loaded");
        Ok(())
    }

    /// Serves an adapter no more.
    pub(crate) fn unload(&self, name: &str) -> Result<(), ApiError> {
        self.source.as_ref().ok_or_else(disabled)?;
        let gone = self.loaded.write().by_name.remove(name);
        gone.ok_or_else(|| ApiError::adapter_not_found("lora_name", "no adapter of this name is loaded"))?;
        tracing::info!(name, "adapter unloaded");
        Ok(())
    }

    /// The adapter of this name.
    pub(crate) fn get(&self, name: &str) -> Option<ServedAdapter> {
        self.loaded.read().by_name.get(name).cloned()
    }

    /// What metrics say of them; `None` of a model that takes none.
    pub(crate) fn gauges(&self, stats: &EngineStats) -> Option<AdapterGauges> {
        let (max, loaded) = (self.source.as_ref()?.max, self.loaded.read());
        let names = |digests: &BTreeSet<[u8; 32]>| {
            let of = loaded.by_name.iter().filter(|(_, served)| digests.contains(served.adapter.digest()));
            of.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(",")
        };
        let (running, waiting) = (names(&stats.running_adapters), names(&stats.waiting_adapters));
        Some(AdapterGauges { max, loaded: loaded.by_name.len(), running, waiting })
    }

    /// All of them, by name.
    pub(crate) fn all(&self) -> Vec<(String, ServedAdapter)> {
        self.loaded.read().by_name.iter().map(|(name, adapter)| (name.clone(), adapter.clone())).collect()
    }
}

fn disabled() -> ApiError {
    ApiError::invalid("lora_name", "this server takes no adapters; start it with --enable-lora")
}
