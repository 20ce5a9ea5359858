//! The file of `--api-keys-file`: keys by their digests, as TOML.
//!
//! ```toml
//! [[key]]
//! name = "search"
//! sha256 = "5e884898…"             # printf %s "$KEY" | sha256sum
//! scopes = ["inference"]           # inference, admin, metrics
//! expires = 2027-01-01T00:00:00Z   # may be left out, as all that follows
//! weight = 2                       # of the engine, relative to other keys; 1 without
//! max_concurrent_requests = 8
//! requests_per_minute = 600
//! tokens_per_minute = 100000
//! ```
//!
//! Everything is taken or nothing, and what is refused is named by its key's number and the field, never by its value: a
//! key that was written in plain text by mistake does not end up in a log.

use std::time::SystemTime;

use anyhow::{Context, Result, anyhow, bail, ensure};
use baton_http::{KeyLimits, ListedKey, OTHER_KEYS, Scopes};
use chrono::DateTime;
use toml::{Table, Value};

/// Longest name.
const MAX_NAME_BYTES: usize = 64;

/// What a weight is at most: with larger ones others would wait for ever.
const MAX_WEIGHT: u32 = 1000;

/// What a key has; the first three it must.
const FIELDS: [&str; 8] = [
    "name",
    "sha256",
    "scopes",
    "expires",
    "weight",
    "max_concurrent_requests",
    "requests_per_minute",
    "tokens_per_minute",
];

/// The keys of a file.
///
/// # Errors
/// If it is not as the head of this file says, or lists no key, or one twice.
pub fn parse(file: &[u8]) -> Result<Vec<ListedKey>> {
    let text = std::str::from_utf8(file).map_err(|_| anyhow!("the file is not UTF-8"))?;
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        anyhow!("line {} is not TOML", before.matches('\n').count() + 1)
    })?;
    for name in table.keys() {
        ensure!(name == "key", "besides [[key]] nothing is taken");
    }
    let listed = table.get("key").and_then(Value::as_array).filter(|keys| !keys.is_empty());
    let listed = listed.context("no key is listed: each begins with [[key]]; to shut out everybody, let one expire")?;
    let mut keys: Vec<ListedKey> = Vec::with_capacity(listed.len());
    for (number, entry) in (1..).zip(listed) {
        let key = entry.as_table().context("it begins with [[key]]").and_then(key);
        let key = key.with_context(|| format!("key {number}"))?;
        let twice = |other: &ListedKey| other.name == key.name || other.digest == key.digest;
        ensure!(!keys.iter().any(twice), "key {number}: its name or its digest is another's as well");
        keys.push(key);
    }
    Ok(keys)
}

fn key(entry: &Table) -> Result<ListedKey> {
    for field in entry.keys() {
        let known = FIELDS.contains(&field.as_str());
        ensure!(known, "a key has name, sha256 and scopes, perhaps {}, nothing else", FIELDS[3..].join(", "));
    }
    let text = |field: &str| entry.get(field).and_then(Value::as_str);
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.@".contains(&b);
    let fits =
        |name: &&str| (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(plain) && *name != OTHER_KEYS;
    let name = text("name").filter(fits);
    let name = name.with_context(|| {
        format!("name must be 1 to {MAX_NAME_BYTES} letters, digits, - _ . and @, and not {OTHER_KEYS}")
    })?;
    let digest = text("sha256").and_then(|hex| ListedKey::digest_of(hex.strip_prefix("sha256:").unwrap_or(hex)));
    let digest = digest.context("sha256 must be the 64 hexadecimal digits that `printf %s KEY | sha256sum` gives")?;
    let names = entry.get("scopes").and_then(Value::as_array).filter(|names| !names.is_empty());
    let scope = |name: &Value| Scopes::NAMES.iter().find(|(known, _)| name.as_str() == Some(known)).map(|(_, s)| *s);
    let scopes = names.and_then(|names| names.iter().map(scope).collect::<Option<Vec<_>>>());
    let scopes = scopes.context("scopes must be a list of inference, admin and metrics, at least one")?;
    Ok(ListedKey {
        name: name.to_owned(),
        digest,
        scopes: scopes.into_iter().fold(Scopes::default(), Scopes::and),
        expires: entry.get("expires").map(expiry).transpose()?,
        limits: KeyLimits {
            weight: count(entry, "weight", MAX_WEIGHT)?.unwrap_or(1),
            max_concurrent_requests: count(entry, "max_concurrent_requests", u32::MAX)?,
            requests_per_minute: count(entry, "requests_per_minute", u32::MAX)?,
            tokens_per_minute: count(entry, "tokens_per_minute", u32::MAX)?,
        },
    })
}

/// A whole number, if the field is there.
fn count(entry: &Table, field: &str, max: u32) -> Result<Option<u32>> {
    let Some(value) = entry.get(field) else { return Ok(None) };
    let count =
        value.as_integer().and_then(|count| u32::try_from(count).ok()).filter(|count| (1..=max).contains(count));
    Ok(Some(count.with_context(|| format!("{field} must be a whole number from 1 to {max}"))?))
}

/// A moment as TOML writes it, or as a string.
fn expiry(value: &Value) -> Result<SystemTime> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Datetime(time) => time.to_string(),
        _ => bail!("expires must be a moment"),
    };
    let time = DateTime::parse_from_rfc3339(&text);
    time.map(SystemTime::from).map_err(|_| anyhow!("expires must be a moment with its offset: 2027-01-01T00:00:00Z"))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    /// Of `password`, by `sha256sum`.
    const DIGEST: &str = "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8";

    fn entry(more: &str) -> String {
        format!("[[key]]\nname = \"a\"\nsha256 = \"{DIGEST}\"\nscopes = [\"inference\"]\n{more}\n")
    }

    #[test]
    fn keys_are_read_with_scopes_and_expiry_in_either_form() {
        let second = format!(
            "[[key]]\nname = \"b\"\nsha256 = \"sha256:{}\"\nscopes = [\"admin\", \"metrics\"]",
            DIGEST.to_uppercase().replace('5', "6")
        );
        for expires in ["1970-01-01T01:00:10+01:00", "\"1970-01-01T00:00:10Z\""] {
            let keys = parse((entry(&format!("expires = {expires}")) + &second).as_bytes()).unwrap();
            assert_eq!((keys[0].name.as_str(), keys[0].scopes), ("a", Scopes::INFERENCE));
            assert_eq!(keys[0].digest[..3], [0x5e, 0x88, 0x48]);
            assert_eq!(keys[0].expires, Some(UNIX_EPOCH + Duration::from_secs(10)));
            assert_eq!((keys[1].scopes, keys[1].expires), (Scopes::ADMIN.and(Scopes::METRICS), None));
            assert_eq!(keys[1].digest[..3], [0x6e, 0x88, 0x48]);
        }
    }

    #[test]
    fn limits_are_read_and_without_any_there_are_none() {
        let limits = |more: &str| parse(entry(more).as_bytes()).unwrap()[0].limits;
        assert_eq!(limits(""), KeyLimits::default());
        let all = "weight = 3\nmax_concurrent_requests = 8\nrequests_per_minute = 60\ntokens_per_minute = 100_000";
        let expected = KeyLimits {
            weight: 3,
            max_concurrent_requests: Some(8),
            requests_per_minute: Some(60),
            tokens_per_minute: Some(100_000),
        };
        assert_eq!(limits(all), expected);
    }

    #[test]
    fn what_is_no_list_of_keys_is_refused_by_place_and_never_by_value() {
        let replaced = |from: &str, to: &str| entry("").replace(from, to);
        let other = DIGEST.replace('5', "7");
        let cases = [
            (String::new(), "no key is listed"),
            ("key = []".into(), "no key is listed"),
            ("key = \"s3cret\"".into(), "no key is listed"),
            ("key = [\"s3cret\"]".into(), "[[key]]"),
            ("s3cret = 1".into(), "nothing is taken"),
            ("[[key]]\nname = s3cret".into(), "line 2 is not TOML"),
            (entry("key = \"s3cret\""), "key 1: a key has"),
            (replaced(&format!("\"{DIGEST}\""), "\"s3cret\""), "sha256sum"),
            (replaced(DIGEST, &DIGEST[1..]), "64 hexadecimal"),
            // What stands for the sender of no key.
            (replaced(DIGEST, &"0".repeat(64)), "64 hexadecimal"),
            (replaced("name = \"a\"", "name = \"s3cret\\n\""), "name must be"),
            // What those are called who have none.
            (replaced("name = \"a\"", "name = \"other\""), "and not other"),
            (replaced("[\"inference\"]", "[]"), "scopes must be"),
            (replaced("[\"inference\"]", "[\"s3cret\"]"), "scopes must be"),
            (entry("expires = \"s3cret\""), "offset"),
            (entry("expires = 2027-01-01"), "offset"),
            (entry("expires = 12"), "a moment"),
            (entry("weight = 0"), "weight must be a whole number from 1 to 1000"),
            (entry("weight = 1001"), "weight must be"),
            (entry("weight = 1.5"), "weight must be"),
            (entry("max_concurrent_requests = -1"), "max_concurrent_requests must be"),
            (entry("tokens_per_minute = \"s3cret\""), "tokens_per_minute must be"),
            (entry("requests_per_minute = 0"), "requests_per_minute must be"),
            (entry("") + &entry("").replace(DIGEST, &other), "key 2: its name"),
            (entry("") + &replaced("\"a\"", "\"b\""), "key 2: its name"),
        ];
        for (file, reason) in cases {
            let refusal = format!("{:#}", parse(file.as_bytes()).unwrap_err());
            assert!(refusal.contains(reason) && !refusal.contains("s3cret"), "{file}: {refusal}");
        }
        assert!(parse(b"\xff").is_err());
    }
}
