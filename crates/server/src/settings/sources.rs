//! Where settings come from: default < config file < environment < flag.
//!
//! The file is TOML with the flags' long names as keys; an unknown key is an error. `--print-config` shows each value and where
//! it is from.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context, Result, anyhow};
use clap::{ArgMatches, Args, FromArgMatches, parser::ValueSource};

use super::args::ServeArgs;

type Map = serde_json::Map<String, serde_json::Value>;

/// Where a value is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Default,
    File,
    Environment,
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::Default => "default",
            Origin::File => "file",
            Origin::Environment => "environment",
            Origin::Flag => "flag",
        })
    }
}

/// Origin of every setting that is not a default, by its long name.
pub type Origins = BTreeMap<String, Origin>;

impl ServeArgs {
    /// Flags and environment as parsed, with their origins.
    pub fn from_matches(matches: &ArgMatches) -> Result<(Self, Origins)> {
        let args = Self::from_arg_matches(matches)?;
        let origin = |id: &str| match matches.value_source(id)? {
            ValueSource::CommandLine => Some(Origin::Flag),
            ValueSource::EnvVariable => Some(Origin::Environment),
            _ => None,
        };
        let origins =
            matches.ids().filter_map(|id| Some((id.as_str().replace('_', "-"), origin(id.as_str())?))).collect();
        Ok((args, origins))
    }

    /// Puts flags and environment (already in `self`) over the config file, if one is named.
    pub fn with_file(self, origins: &mut Origins) -> Result<Self> {
        let Some(path) = self.config.clone() else { return Ok(self) };
        let read = || self.over(&std::fs::read_to_string(&path)?, origins);
        read().with_context(|| format!("config file {}", path.display()))
    }

    pub(super) fn over(self, file: &str, origins: &mut Origins) -> Result<Self> {
        let file: ServeArgs = toml::from_str(file).map_err(|error| refusal(file, &error))?;
        let mut merged = file.to_map()?;
        for key in merged.keys() {
            origins.entry(key.clone()).or_insert(Origin::File);
        }
        merged.extend(self.to_map()?);
        let merged: ServeArgs = serde_json::from_value(merged.into())?;
        // Secrets do not survive a map, on purpose; the rest is not for files.
        Ok(Self {
            api_key: self.api_key.or(file.api_key),
            admin_api_key: self.admin_api_key.or(file.admin_api_key),
            config: self.config,
            print_config: self.print_config,
            ..merged
        })
    }

    /// The settings that are given.
    fn to_map(&self) -> Result<Map> {
        let serde_json::Value::Object(map) = serde_json::to_value(self)? else { unreachable!("a struct is an object") };
        Ok(map.into_iter().filter(|(_, v)| !v.is_null()).collect())
    }
}

/// What is wrong with a file, without the value of what may be a key: the parser's own words quote the line.
fn refusal(file: &str, error: &toml::de::Error) -> anyhow::Error {
    let place = error.span().map_or(0, |span| span.start);
    let before = file.get(..place).unwrap_or_default();
    let (number, start) = (before.matches('\n').count() + 1, before.rfind('\n').map_or(0, |end| end + 1));
    let line = file[start..].lines().next().unwrap_or_default();
    let message = error.message();
    let command = ServeArgs::augment_args(clap::Command::new("serve"));
    let is_setting = |name: &&str| command.get_arguments().any(|argument| argument.get_long() == Some(name));
    // What stands before a = need not be a name: a line of a list may be a key, and keys may end in =.
    match line.split_once('=').map(|(name, _)| name.trim()).filter(is_setting) {
        Some(name) if !name.contains("key") => anyhow!("line {number}, {name}: {message}"),
        Some(name) => anyhow!("line {number}, {name}: not a value that is taken there"),
        None if message.starts_with("unknown field") => anyhow!("line {number}: {message}"),
        None => anyhow!("line {number}: not TOML, or not a value that is taken there"),
    }
}
