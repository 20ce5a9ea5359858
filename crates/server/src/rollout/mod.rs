//! Rollout: a new generation of the model beside the one that serves, judged, tried on traffic, and then promoted or
//! rolled back, while clients notice nothing.
//!
//! `policy` decides, as a state machine over values; `driver` carries out, on a thread of its own that owns every
//! generation's engine; `journal` remembers. Invariant: what serves after a restart is what served before it.

mod candidate;
pub mod cli;
mod commands;
mod control;
mod driver;
mod journal;
mod ledger;
mod plan;
mod policy;
mod room;
mod rules;
mod status;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use baton_handoff::Digest;
use tracing::info;

pub use candidate::Serving;
pub use control::{Control, Start};
pub use journal::Journal;
pub use ledger::Promoted;

use crate::{bundled, settings::Settings};

/// What the base model is called in the journal: the path of what lies on disk, else the id it was asked for by. A path that
/// is gone is known if something was promoted in its place.
pub fn base(settings: &Settings, journal: Option<&Journal>) -> String {
    let Some(model) = settings.model.as_deref() else { return bundled::NAME.to_owned() };
    let known = |path: &PathBuf| {
        let promotions = journal.map(|journal| &journal.ledger().promotions);
        promotions.is_some_and(|promotions| promotions.contains_key(&*path.to_string_lossy()))
    };
    let path = on_disk(Path::new(model)).or_else(|| std::path::absolute(model).ok().filter(known));
    path.map_or_else(|| model.to_owned(), |path| path.display().to_string())
}

/// An absolute path of a checkpoint. Of a folder it is the one that links lead to, so that it goes on meaning what was
/// loaded; a GGUF file is known by its name.
fn on_disk(path: &Path) -> Option<PathBuf> {
    if path.is_dir() { path.canonicalize().ok() } else { std::path::absolute(path).ok().filter(|path| path.is_file()) }
}

/// What serves instead of the base model, if the journal says so.
pub fn promoted(journal: &Journal, base: &str) -> Result<Option<Promoted>> {
    let promotions = &journal.ledger().promotions;
    let Some(promoted) = promotions.get(base) else {
        for (other, promoted) in promotions {
            let model = promoted.model.display();
            info!(base = other, %model, "the journal's promotion is of another base model and does not apply to {base}");
        }
        return Ok(None);
    };
    let model = promoted.model.display();
    info!(base, %model, rollout = promoted.rollout, "a rollout has promoted this checkpoint, which serves instead of its base");
    ensure!(
        on_disk(&promoted.model).is_some(),
        "{model}, which rollout {} has promoted, is gone: put it back, or let {base} serve again with \
         `baton rollout reset --state-dir DIR`",
        promoted.rollout
    );
    Ok(Some(promoted.clone()))
}

/// The settings, with a promoted checkpoint in the place of the base.
pub fn instead(settings: &Settings, promoted: &Promoted) -> Settings {
    Settings { model: Some(promoted.model.display().to_string()), ..settings.clone() }
}

/// Whether a promoted checkpoint is still what was promoted.
pub fn unchanged(promoted: &Promoted, generation: &Digest) -> Result<()> {
    ensure!(
        promoted.generation == generation.to_string(),
        "{} has changed since rollout {} promoted it (generation {}, now {generation}): put it back, serve it as it is \
         by naming it, or let its base serve again with `baton rollout reset --state-dir DIR`",
        promoted.model.display(),
        promoted.rollout,
        promoted.generation
    );
    Ok(())
}
