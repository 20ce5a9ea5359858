//! What can be pulled: a model of a hub at a revision, or a directory served over HTTP(S).

use std::{fmt, str::FromStr};

use ureq::http::Uri;

use crate::{HubError, names};

/// A checkpoint that can be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A model of a hub.
    Model {
        /// `name` or `org/name`: letters, digits, `.`, `_` and `-`.
        id: String,
        /// A branch, tag, `refs/pr/N` or commit.
        revision: String,
    },
    /// A directory served over HTTP(S).
    Directory {
        /// Ends in `/`; has neither credentials nor a query.
        url: String,
    },
}

impl Target {
    /// The revision of a model when none is named.
    pub const DEFAULT_REVISION: &str = "main";

    /// The revision's name in the cache.
    pub(crate) fn revision(&self) -> &str {
        match self {
            Target::Model { revision, .. } => revision,
            Target::Directory { .. } => Self::DEFAULT_REVISION,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Model { id, revision } => write!(f, "{id}@{revision}"),
            Target::Directory { url } => f.write_str(url),
        }
    }
}

impl FromStr for Target {
    type Err = HubError;

    /// `ORG/NAME`, `ORG/NAME@REVISION` or `http(s)://HOST/FOLDER/`.
    fn from_str(text: &str) -> Result<Self, HubError> {
        let refused = |reason| HubError::Target { target: text.chars().take(200).collect(), reason };
        if text.starts_with("http://") || text.starts_with("https://") {
            let uri: Uri = text.parse().map_err(|_| refused("it is not a URL"))?;
            // A URL appears in messages, so it must not hold a password.
            if uri.authority().is_none_or(|a| a.as_str().contains('@')) {
                return Err(refused("a URL must not hold credentials"));
            }
            if uri.query().is_some() || text.contains('#') {
                return Err(refused("a URL must not have a query or fragment"));
            }
            let slash = if text.ends_with('/') { "" } else { "/" };
            return Ok(Target::Directory { url: format!("{text}{slash}") });
        }
        let (id, revision) = text.split_once('@').unwrap_or((text, Self::DEFAULT_REVISION));
        check_id(id).map_err(refused)?;
        names::check_revision(revision).map_err(refused)?;
        Ok(Target::Model { id: id.into(), revision: revision.into() })
    }
}

/// The hub's own rules, which make `models--org--name` unambiguous.
fn check_id(id: &str) -> Result<(), &'static str> {
    let parts: Vec<&str> = id.split('/').collect();
    if parts.len() > 2 || id.len() > 96 {
        return Err("an id is NAME or ORG/NAME, of at most 96 characters");
    }
    let plain = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    if !parts.into_iter().all(plain) || id.contains("--") || id.contains("..") {
        return Err("an id has letters, digits and single '.', '_', '-' between them");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_revisions_and_urls_are_told_apart() {
        let model = |id: &str, revision: &str| Target::Model { id: id.into(), revision: revision.into() };
        let directory = |url: &str| Target::Directory { url: url.into() };
        for (text, target) in [
            ("org/name", model("org/name", "main")),
            ("gpt2", model("gpt2", "main")),
            ("org/Name-1.5_b@v1.0", model("org/Name-1.5_b", "v1.0")),
            ("org/name@refs/pr/7", model("org/name", "refs/pr/7")),
            ("http://host:81/a/b", directory("http://host:81/a/b/")),
            ("https://host/", directory("https://host/")),
        ] {
            assert_eq!(text.parse::<Target>().unwrap(), target);
        }
    }

    #[test]
    fn what_could_leave_the_cache_or_leak_is_refused() {
        for text in [
            "",
            "/",
            "/a",
            "a/",
            "a/b/c",
            "../x",
            "a/..",
            "a/b..c",
            "a--b/c",
            "a/.b",
            "-a/b",
            "a b/c",
            "a/b@",
            "a/b@../x",
            "a/b@/x",
            "a/b@x/../y",
            "a/b@x\0",
            "a/b@x\\y",
            "a/b@.",
            "http://user:pw@host/x/",
            "http://host/x?y",
            "http://host/x#y",
            "http://",
            "ftp://host/x",
            "a/é",
        ] {
            assert!(matches!(text.parse::<Target>(), Err(HubError::Target { .. })), "{text:?}");
        }
    }
}
