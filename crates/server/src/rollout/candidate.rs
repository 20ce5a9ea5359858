//! A candidate from its files to an engine that runs, and what its gate says.

use std::path::Path;

use anyhow::{Result, ensure};
use baton_engine::{Engine, EngineHandle};
use baton_handoff::Digest;
use baton_http::{Admission, HandoffState, NewGeneration};
use baton_model::LoadReport;

use super::policy::Verdict;
use super::room::Held;
use crate::handoff::Gate;
use crate::memory;
use crate::serve::{self, Generation};
use crate::settings::Settings;

/// What the gate found. A candidate that fails is not tried, whatever the policy: it has something better beside it.
pub fn verdict(gate: &Gate) -> Verdict {
    let (admitted, summary) = match gate.state().admission() {
        Admission::Off => (true, "nobody asked for proof".to_owned()),
        Admission::Absent => (true, "there is no handoff.json to prove".into()),
        Admission::Passed => (true, "its golden cases are borne out".into()),
        Admission::Failed { reason } => (false, reason),
        Admission::Pending => (false, "it was not judged".into()),
    };
    Verdict { admitted, summary, parity: gate.parity() }
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
        memory::trim();
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

/// Loads a candidate, and gives its gate.
pub fn load(
    settings: &Settings,
    model: &Path,
    names: Vec<String>,
    served: &str,
    free: Option<u64>,
) -> Result<(Candidate, Gate)> {
    let path = model.display().to_string();
    let settings = Settings {
        model: Some(path.clone()),
        // That file tells of the model that the server was started with.
        load_report: None,
        ..settings.clone()
    };
    let differs = |generation: &Digest| {
        ensure!(generation.to_string() != served, "generation {generation} is served already: nothing would change");
        Ok(())
    };
    let model = crate::load::load(&settings, free, &differs)?;
    let Generation { new, engine, report, gate } = serve::prepare(model, &settings, Some(names))?;
    let serving = Serving::new(path, &new, &report, engine);
    let handoff = gate.state();
    Ok((Candidate { serving, new: Some(new), handoff, judged: false }, gate))
}
