//! What a report must not carry: who runs this machine, what it is called, where its files lie, and how to log in elsewhere.
//!
//! Libraries and drivers write paths and names into their messages, so every text of a report that is not our own is
//! cleaned: of an absolute path its last part stays, and names of this machine and its user, and credentials in a URL, become
//! [`PRIVATE`].

use std::{collections::BTreeSet, env, fs, path::Path};

use serde_json::Value;

/// What stands in a name's place.
const PRIVATE: &str = "[private]";

/// The names that are kept back.
#[derive(Debug)]
pub struct Redactor {
    names: BTreeSet<String>,
}

impl Redactor {
    /// Keeps back the names of this machine, of its user and of the user's folder.
    pub fn here() -> Self {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").ok();
        let variables = ["HOSTNAME", "USER", "LOGNAME", "SUDO_USER"].map(|name| env::var(name).ok());
        let home = env::var("HOME").ok();
        let folder = home.as_deref().and_then(|home| Path::new(home).file_name()?.to_str()).map(str::to_owned);
        Self::new(variables.into_iter().chain([host, folder]).flatten())
    }

    fn new(names: impl IntoIterator<Item = String>) -> Self {
        let names: Vec<String> = names.into_iter().map(|name| name.trim().to_owned()).collect();
        // A host goes by the first part of its name as well.
        let short = names.iter().filter_map(|name| Some(name.split_once('.')?.0.to_owned()));
        let names = names.iter().cloned().chain(short).filter(|name| name.len() > 1);
        Self { names: names.collect() }
    }

    /// Cleans all texts of a value.
    pub fn clean(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.text(text),
            Value::Array(values) => values.iter_mut().for_each(|value| self.clean(value)),
            Value::Object(values) => values.values_mut().for_each(|value| self.clean(value)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// Cleans a text.
    pub fn text(&self, text: &str) -> String {
        let text = without_folders(&without_credentials(text));
        // The longest first: a host's whole name before its first part.
        let mut names: Vec<&String> = self.names.iter().collect();
        names.sort_by_key(|name| std::cmp::Reverse(name.len()));
        names.into_iter().fold(text, |text, name| without(&text, name))
    }
}

/// Of every URL what is not before an @.
fn without_credentials(text: &str) -> String {
    let mut parts = text.split("://");
    let before = parts.next().unwrap_or_default().to_owned();
    parts.fold(before, |clean, part| {
        let host = part.find(|c: char| c == '/' || c.is_whitespace()).unwrap_or(part.len());
        let credentials = part[..host].rfind('@');
        clean + "://" + credentials.map_or("", |_| PRIVATE) + &part[credentials.unwrap_or(0)..]
    })
}

/// Of every absolute path the last part.
fn without_folders(text: &str) -> String {
    let ends = |c: char| c.is_whitespace() || "\"'`:,;()[]{}<>=|".contains(c);
    let word = |word: &str| {
        let end = word.trim_end_matches(ends).len();
        let (path, after) = word.split_at(end);
        match path.strip_prefix('/').or_else(|| path.strip_prefix("~/")) {
            Some(parts) if !parts.is_empty() => {
                let last = parts.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
                format!("…/{last}{after}")
            }
            _ => word.to_owned(),
        }
    };
    text.split_inclusive(ends).map(word).collect()
}

/// Without a name where it is a whole word.
fn without(text: &str, name: &str) -> String {
    let mut result = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(name) {
        let (before, after) = (&rest[..at], &rest[at + name.len()..]);
        let part = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        let inside = part(before.chars().next_back()) || part(after.chars().next());
        result += before;
        result += if inside { name } else { PRIVATE };
        rest = after;
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn paths_lose_their_folders_and_names_go_wherever_they_stand() {
        let redactor = Redactor::new(["alice", "node7.lab.example", " x "].map(str::to_owned));
        for (text, clean) in [
            ("/home/alice/Ascend/lib64/libopapi.so: cannot open", "…/libopapi.so: cannot open"),
            ("open(\"/etc/a b\"), '/opt/x/'", "open(\"…/a b\"), '…/x'"),
            ("error at [/build/x/y.cc:31] by alice.", "error at […/y.cc:31] by [private]."),
            ("PATH=/a/b:/c/d ~/f", "PATH=…/b:…/d …/f"),
            ("alice@node7.lab.example and node7, not alices", "[private]@[private] and [private], not alices"),
            ("relative/alice/file", "relative/[private]/file"),
            ("/home/alice", "…/[private]"),
            ("3 tokens/s, a / b, x", "3 tokens/s, a / b, x"),
            ("https://hub.example/m@2 a@b", "https:…/m@2 a@b"),
            ("at https://me:pass@w@hub/m, ftp://u@h", "at https:…/[private]@hub/m, ftp:…/[private]@h"),
        ] {
            assert_eq!(redactor.text(text), clean);
        }
    }

    #[test]
    fn every_text_of_a_value_is_cleaned_and_nothing_else() {
        let mut value = json!({"a": [{"b": "/x/y"}, 1, null, true], "c": "/x/z"});
        Redactor::new([]).clean(&mut value);
        assert_eq!(value, json!({"a": [{"b": "…/y"}, 1, null, true], "c": "…/z"}));
    }
}
