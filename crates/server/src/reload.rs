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
use crate::memory;

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
        // The report's are those of all ranks, the options' those of each.
        let kv_cache = KvCacheSize::Bytes(report.kv_bytes / device_options.ranks as u64);
        let options = LoadOptions { kv_cache, ..options };
        Self { device, device_options, files: files.clone(), options, digest: report.digest.clone() }
    }

    /// The longest that a step may wait for the device.
    pub fn device_timeout(&self) -> Option<Duration> {
        self.device_options.timeout
    }

    fn load(&self) -> Result<Loaded> {
        let loaded = self.device.load(self.device_options.clone(), &self.files, &self.options)?;
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
        // What the broken one held is free by now.
        memory::trim();
        let loaded = source.load().map_err(|error| format!("{error:#}"))?;
        exchange(loaded.load_adapter);
        adapters.reload();
        info!(seconds = format!("{:.2}", loaded.report.seconds), "model loaded again");
        Ok(loaded.runner)
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, Ordering};

    use baton_engine::{
        EngineConfig, EngineFailure, EngineHandle, FinishReason, OutputEvent, Request, RunError, RunSpec, Runner,
        SamplingParams,
    };
    use baton_http::{Defaults, ModelCard};
    use baton_model::{StepOutput, StepPlan};
    use tempfile::TempDir;

    use super::*;

    /// A runner that breaks when it is told to.
    struct Breaking {
        runner: Box<dyn Runner>,
        breaks: Arc<AtomicBool>,
    }

    impl Runner for Breaking {
        fn spec(&self) -> &RunSpec {
            self.runner.spec()
        }

        fn begin(&mut self, plan: &StepPlan) -> Result<(), RunError> {
            match self.breaks.load(Ordering::Relaxed) {
                true => Err(RunError::Poisoned("as the test says".into())),
                false => self.runner.begin(plan),
            }
        }

        fn finish(&mut self) -> Result<StepOutput, RunError> {
            self.runner.finish()
        }

        fn clear_blocks(&mut self, kept: &[u32], passing: &[u32]) -> Result<(), RunError> {
            self.runner.clear_blocks(kept, passing)
        }
    }

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/golden").join(name)
    }

    fn card() -> ModelCard {
        ModelCard {
            names: vec!["base".into()],
            created: 0,
            owned_by: "test".into(),
            generation: "0".repeat(64),
            system_fingerprint: "fp".into(),
            defaults: Defaults::default(),
            load_report: Vec::new(),
            embeddings: None,
        }
    }

    /// The engine of a checkpoint in this folder, its first runner's doom, and an adapter.
    fn start(folder: &Path) -> (EngineHandle, Arc<AtomicBool>, Adapter) {
        let (device, files) = (Device::Reference, Files::folder(folder).unwrap());
        let options = LoadOptions {
            max_lora_rank: 16,
            kv_cache: KvCacheSize::AtMost(16 << 20),
            max_model_len: Some(64),
            ..LoadOptions::default()
        };
        let Loaded { runner, load_adapter, report, .. } =
            device.load(DeviceOptions::default(), &files, &options).unwrap();
        let source = Source::new(device, DeviceOptions::default(), &files, options, &report);
        let loader = AdapterLoader::new(load_adapter.expect("it takes adapters"));
        let adapters = Adapters::new(1, {
            let loader = loader.clone();
            move |folder| loader.load(folder)
        });
        let lora = golden("lora/llama-all");
        let adapter = loader.load(&lora).unwrap();
        adapters.add(&card(), "lora", lora, adapter.clone(), false).unwrap();
        let breaks = Arc::new(AtomicBool::new(false));
        let runner = Box::new(Breaking { runner, breaks: breaks.clone() });
        let config = EngineConfig { max_rebuilds: 1, ..EngineConfig::default() };
        let rebuild = rebuild(source, Some(loader), adapters);
        let (handle, _) = baton_engine::spawn_rebuildable(runner, rebuild, config);
        (handle, breaks, adapter)
    }

    fn run(handle: &EngineHandle, adapter: Option<&Adapter>) -> (Vec<u32>, FinishReason) {
        let request = Request::new((1..20).collect(), SamplingParams::greedy(), 20);
        let mut stream = handle.submit(Request { adapter: adapter.cloned(), ..request }).unwrap();
        let mut tokens = Vec::new();
        loop {
            match stream.blocking_next().expect("a stream ends with `Finished`") {
                OutputEvent::Finished { reason, .. } => return (tokens, reason),
                OutputEvent::Token { token, .. } => tokens.push(token),
                OutputEvent::PromptScores(_) => panic!("no scores were asked for"),
            }
        }
    }

    #[test]
    fn a_model_and_its_adapters_compute_the_same_when_they_are_loaded_again() {
        let (handle, breaks, adapter) = start(&golden("llama-rope3"));
        let before = [run(&handle, None), run(&handle, Some(&adapter))];
        assert!(before[0] != before[1], "the adapter changes something");
        breaks.store(true, Ordering::Relaxed);
        let failed = run(&handle, None).1;
        assert!(matches!(failed, FinishReason::Error(EngineFailure::Device(RunError::Poisoned(_)))), "{failed:?}");
        // The clone was taken before.
        assert_eq!([run(&handle, None), run(&handle, Some(&adapter))], before);
        assert_eq!(handle.stats().rebuilds, 1);
    }

    #[test]
    fn a_model_whose_files_have_changed_meanwhile_is_not_loaded_again() {
        let folder = TempDir::new().unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(golden("llama-rope3").join(name), folder.path().join(name)).unwrap();
        }
        let (handle, breaks, _) = start(folder.path());
        // As whoever replaces a file does it: what is mapped stays what it is.
        let mut weights = fs::read(folder.path().join("model.safetensors")).unwrap();
        *weights.last_mut().unwrap() ^= 1;
        fs::write(folder.path().join("new"), weights).unwrap();
        fs::rename(folder.path().join("new"), folder.path().join("model.safetensors")).unwrap();
        breaks.store(true, Ordering::Relaxed);
        run(&handle, None);
        while handle.stats().rebuilding {
            std::thread::yield_now();
        }
        let stats = handle.stats();
        assert!(!stats.alive && stats.failure.is_some() && stats.rebuilds == 0, "{stats:?}");
    }
}
