//! A candidate from its files to an engine that runs, and the gate that judges it.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use baton_device::Caps;
use baton_engine::{Engine, EngineHandle};
use baton_http::{HandoffState, ModelCard, NewGeneration};
use baton_model::{Files, LoadReport};
use baton_text::TextModel;

use super::policy::Verdict;
use super::room::Held;
use crate::serve::{self, Generation};
use crate::settings::Settings;

/// A candidate that is loaded and computes, as the gate sees it. It is not served yet.
#[expect(dead_code, reason = "the only gate yet admits everything")]
pub struct Subject {
    pub files: Files,
    pub engine: EngineHandle,
    pub text: Arc<TextModel>,
    pub card: ModelCard,
    pub report: LoadReport,
    pub caps: Caps,
    /// Where to leave admission, report and parity, for the time that it is served.
    pub handoff: HandoffState,
}

/// Decides whether a candidate may be served.
pub trait Gate: Send + Sync {
    /// Judges it, on a thread that may block. An error is a refusal with its reason. When the engine is shut down
    /// meanwhile, the rollout has been called off, and this should return.
    fn judge(&self, subject: &Subject) -> Result<Verdict>;
}

/// Admits everything.
pub struct NoGate;

impl Gate for NoGate {
    fn judge(&self, _: &Subject) -> Result<Verdict> {
        Ok(Verdict { admitted: true, summary: "nobody asked for a hand-off".into(), parity: None })
    }
}

/// A generation whose engine runs.
pub struct Serving {
    /// Where its checkpoint lies, or how it was asked for.
    pub model: String,
    pub generation: String,
    pub names: Vec<String>,
    pub held: Held,
    pub handle: EngineHandle,
    pub engine: Engine,
}

impl Serving {
    /// What there is to know of a generation before a service has it.
    pub fn new(model: String, new: &NewGeneration, report: &LoadReport, engine: Engine) -> Self {
        Self {
            model,
            generation: new.card.generation.clone(),
            names: new.card.names.clone(),
            held: Held { weights: report.weight_bytes, cache: report.kv_bytes },
            handle: new.engine.clone(),
            engine,
        }
    }

    /// Ends the engine, and waits until it has.
    pub fn end(self) {
        self.handle.shutdown();
        self.engine.join();
    }
}

/// The generation that is tried.
pub struct Candidate {
    pub serving: Serving,
    /// Until the service has it.
    pub new: Option<NewGeneration>,
    pub handoff: HandoffState,
    /// The gate has it.
    pub judged: bool,
}

/// Loads a candidate, and gives what its gate needs.
pub fn load(
    settings: &Settings,
    model: &Path,
    names: Vec<String>,
    served: &str,
    free: Option<u64>,
) -> Result<(Candidate, Subject)> {
    let path = model.display().to_string();
    let settings = Settings {
        model: Some(path.clone()),
        // That file tells of the model that the server was started with.
        load_report: None,
        ..settings.clone()
    };
    let differs = |generation: &str| {
        ensure!(generation != served, "generation {generation} is served already: nothing would change");
        Ok(())
    };
    let model = crate::load::load(&settings, free, &differs)?;
    let generation = serve::prepare(model, &settings, Some(names))?;
    let Generation { new, engine, files, report, caps } = generation;
    let handoff = new.handoff.clone();
    let subject = Subject {
        files,
        engine: new.engine.clone(),
        text: new.text.clone(),
        card: new.card.clone(),
        caps,
        handoff: handoff.clone(),
        report,
    };
    let serving = Serving::new(path, &new, &subject.report, engine);
    Ok((Candidate { serving, new: Some(new), handoff, judged: false }, subject))
}
