//! The README's tables of what is served, written from `models/supported.toml`.

use std::{fmt::Write, fs};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::root;

const BEGIN: &str = "<!-- from models/supported.toml by `cargo xtask readme`: -->\n";
const END: &str = "<!-- end -->\n";

#[derive(Deserialize)]
struct Supported {
    architecture: Vec<Architecture>,
    encoder: Vec<Encoder>,
    gguf: Vec<Architecture>,
    format: Vec<Entry>,
    stored: Vec<Entry>,
    adapter: Vec<Entry>,
    device: Vec<Entry>,
}

#[derive(Deserialize)]
struct Architecture {
    name: String,
    models: String,
    judged: String,
}

#[derive(Deserialize)]
struct Encoder {
    names: Vec<String>,
    models: String,
    judged: String,
}

#[derive(Deserialize)]
struct Entry {
    name: String,
    isa: Option<String>,
    judged: String,
}

/// Writes the tables into the README.
pub fn main() -> Result<()> {
    let readme = root().join("README.md");
    Ok(fs::write(&readme, updated(&fs::read_to_string(&readme)?)?)?)
}

/// The README with its tables as they should be.
fn updated(readme: &str) -> Result<String> {
    let supported = fs::read_to_string(root().join("models/supported.toml"))?;
    let (before, rest) = readme.split_once(BEGIN).context("README.md has no place for the tables")?;
    let (_, after) = rest.split_once(END).context("README.md does not say where the tables end")?;
    Ok(format!("{before}{BEGIN}{}{END}{after}", tables(&toml::from_str(&supported)?)?))
}

fn tables(supported: &Supported) -> Result<String> {
    let mut text = String::from("\n| Architecture | Models | Judged by |\n|---|---|---|\n");
    for a in &supported.architecture {
        writeln!(text, "| `{}` | {} | {} |", a.name, a.models, judged(&a.judged))?;
    }
    text.push_str("\n| Encoder | Models | Judged by |\n|---|---|---|\n");
    for e in &supported.encoder {
        writeln!(text, "| `{}` | {} | {} |", e.names.join("`, `"), e.models, judged(&e.judged))?;
    }
    text.push_str("\n| GGUF architecture | Models | Judged by |\n|---|---|---|\n");
    for a in &supported.gguf {
        writeln!(text, "| `{}` | {} | {} |", a.name, a.models, judged(&a.judged))?;
    }
    text.push_str("\n| Weights kept as | Judged by |\n|---|---|\n");
    for f in &supported.format {
        writeln!(text, "| {} | {} |", f.name, judged(&f.judged))?;
    }
    text.push_str("\n| Quantised checkpoint | Judged by |\n|---|---|\n");
    for s in &supported.stored {
        writeln!(text, "| {} | {} |", s.name, judged(&s.judged))?;
    }
    text.push_str("\n| Adapters | Judged by |\n|---|---|\n");
    for a in &supported.adapter {
        writeln!(text, "| {} | {} |", a.name, judged(&a.judged))?;
    }
    text.push_str("\n| Device | Instructions | Judged by |\n|---|---|---|\n");
    for d in &supported.device {
        writeln!(text, "| `--device {}` | {} | {} |", d.name, d.isa.as_deref().unwrap_or("-"), judged(&d.judged))?;
    }
    text.push('\n');
    Ok(text)
}

fn judged(word: &str) -> &str {
    match word {
        "golden" => "golden outputs of Hugging Face transformers",
        "conformance" => "the reference device, case by case",
        "emulated" => "the reference device, case by case, in an emulator",
        "simulator" => {
            "the reference device, case by case, through a simulator of its libraries; never run on hardware"
        }
        "bits" => "the checkpoint it is made from, to the last bit",
        "library" => "the values that the format's own library gives",
        "peft" => "golden outputs of peft",
        "judge" => "it is the judge",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_says_what_supported_toml_says() {
        let readme = fs::read_to_string(root().join("README.md")).unwrap();
        assert!(updated(&readme).unwrap() == readme, "run `cargo xtask readme`");
    }
}
