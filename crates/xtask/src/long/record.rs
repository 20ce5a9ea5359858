//! What a check leaves: its figures, what it was held against, and what all of it was taken on. As JSON, and to read.

use std::{fmt::Write as _, fs};

use anyhow::{Result, ensure};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Setting, say};

/// A check under way.
pub struct Record {
    name: &'static str,
    figures: Map<String, Value>,
    held: Vec<(String, bool)>,
}

impl Record {
    /// Of the check of this name.
    pub fn new(name: &'static str) -> Self {
        Self { name, figures: Map::new(), held: Vec::new() }
    }

    /// Keeps a figure.
    pub fn figure(&mut self, name: &str, value: impl Serialize) -> Result<()> {
        let value = serde_json::to_value(value)?;
        say(&format!("{name}: {value}"));
        self.figures.insert(name.into(), value);
        Ok(())
    }

    /// Keeps whether something held, in words with its figures.
    pub fn must(&mut self, what: String, holds: bool) {
        say(&format!("{} {what}", if holds { "held:" } else { "BROKEN:" }));
        self.held.push((what, holds));
    }

    /// Writes `record.json` and `record.md`.
    ///
    /// # Errors
    /// If something did not hold, all of which is named.
    pub fn finish(self, setting: &Setting) -> Result<()> {
        let folder = setting.folder;
        let held: Vec<Value> = self.held.iter().map(|(what, holds)| json!({"what": what, "holds": holds})).collect();
        let whole = json!({
            "check": self.name,
            "commit": crate::git(&["describe", "--always", "--dirty", "--abbrev=12"]),
            "date": chrono::Utc::now().format("%F %H:%M").to_string(),
            "machine": baton_loadgen::processor(),
            "server": setting.binary.map_or_else(|| "release build".into(), |binary| binary.display().to_string()),
            "figures": self.figures,
            "held": held,
        });
        fs::write(folder.join("record.json"), serde_json::to_string_pretty(&whole)? + "\n")?;
        let mut page = format!("# {}\n\n", self.name);
        for name in ["commit", "date", "machine", "server"] {
            let _ = writeln!(page, "- {name}: {}", whole[name].as_str().unwrap_or_default());
        }
        page += "\n| figure | |\n|---|---|\n";
        for (name, value) in &self.figures {
            let _ = writeln!(page, "| {} | {value} |", name.replace('_', " "));
        }
        page += "\n| held | |\n|---|---|\n";
        for (what, holds) in &self.held {
            let _ = writeln!(page, "| {what} | {} |", if *holds { "yes" } else { "**no**" });
        }
        fs::write(folder.join("record.md"), page)?;
        let broken: Vec<&str> = self.held.iter().filter(|(_, holds)| !holds).map(|(what, _)| what.as_str()).collect();
        ensure!(broken.is_empty(), "{}", broken.join("; "));
        Ok(())
    }
}
