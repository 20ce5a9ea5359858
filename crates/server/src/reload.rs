//! The same model once more, in the place of one whose device failed.
//!
//! Invariant: what is loaded again computes what it did: it is of the same files, by their digest, with the same options,
//! beside as large a cache, and its adapters are the same.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use baton_engine::Rebuild;
use baton_http::{AdapterRefusal, Adapters};
use baton_model::{Adapter, AdapterError, Files, KvCacheSize, LoadOptions, LoadReport};
use parking_lot::RwLock;
use tracing::info;

use crate::backend::{Device, DeviceOptions, LoadAdapter, Loaded};

/// Where a model was loaded from, and how.
pub struct Source {
    device: Device,
    device_options: DeviceOptions,
    files: Files,
    options: LoadOptions,
    digest: String,
}

impl Source {
    /// The source of what was loaded. What lay in free memory then decides nothing any more.
    pub fn new(
        device: Device,
        device_options: DeviceOptions,
        files: &Files,
        options: LoadOptions,
        report: &LoadReport,
    ) -> Self {
        let options = LoadOptions { kv_cache: KvCacheSize::Bytes(report.kv_bytes), ..options };
        Self { device, device_options, files: files.clone(), options, digest: report.digest.clone() }
    }

    /// The longest that a step may wait for the device.
    pub fn device_timeout(&self) -> Option<Duration> {
        self.device_options.timeout
    }

    fn load(&self) -> Result<Loaded> {
        let loaded = self.device.load(self.device_options, &self.files, &self.options)?;
        let digest = &loaded.report.digest;
        ensure!(
            *digest == self.digest,
            "the model's files have changed: their digest is {digest}, it was {}",
            self.digest
        );
        Ok(loaded)
    }
}

/// What loads adapters for the runner that is there; `None` while there is none. Clones are the same.
#[derive(Clone)]
pub struct AdapterLoader(Arc<RwLock<Option<LoadAdapter>>>);

impl AdapterLoader {
    pub fn new(load: LoadAdapter) -> Self {
        Self(Arc::new(RwLock::new(Some(load))))
    }

    /// Loads the adapter of a folder.
    pub fn load(&self, folder: &Path) -> Result<Adapter, AdapterRefusal> {
        match &*self.0.read() {
            Some(load) => load(folder).map_err(refusal),
            None => Err(AdapterRefusal::Unavailable),
        }
    }

    /// It holds the device, as a runner does. Adapters that are being loaded are waited for.
    fn exchange(&self, load: Option<LoadAdapter>) {
        *self.0.write() = load;
    }
}

fn refusal(error: AdapterError) -> AdapterRefusal {
    let reason = error.to_string();
    match error {
        AdapterError::Missing { .. } => AdapterRefusal::Missing(reason),
        _ => AdapterRefusal::Invalid(reason),
    }
}

/// Loads the model again when its runner has broken, and then its adapters.
pub fn rebuild(source: Source, loader: Option<AdapterLoader>, adapters: Adapters) -> Rebuild {
    Arc::new(move || {
        let exchange = |load| {
            if let Some(loader) = &loader {
                loader.exchange(load);
            }
        };
        exchange(None);
        let loaded = source.load().map_err(|error| format!("{error:#}"))?;
        exchange(loaded.load_adapter);
        adapters.reload();
        info!(seconds = format!("{:.2}", loaded.report.seconds), "model loaded again");
        Ok(loaded.runner)
    })
}
