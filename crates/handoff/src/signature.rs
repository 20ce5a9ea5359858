//! Who signed a manifest: minisign signatures over the bytes of `handoff.json`, and the keys that are trusted.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use minisign_verify::{Error, PublicKey, Signature};

use crate::strict::shown;

/// Longest list of keys that is read, in bytes.
const MAX_KEYS_TEXT: usize = 64 << 10;
/// What begins the comment line of a key file.
const COMMENT: &str = "untrusted comment:";

/// A key's name: 16 upper-case hex digits, as minisign prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(u64);

impl KeyId {
    /// From the base64 line of a key or signature: two bytes of algorithm, eight of the id.
    fn of_line(line: &str) -> Option<Self> {
        let bytes = STANDARD.decode(line).ok()?;
        Some(Self(u64::from_le_bytes(bytes.get(2..10)?.try_into().ok()?)))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016X}", self.0)
    }
}

/// Text that is no list of public keys.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// More than is ever needed.
    #[error("the trusted keys take {bytes} bytes; at most {MAX_KEYS_TEXT} are read")]
    TooLarge {
        /// The length.
        bytes: usize,
    },
    /// A line that is no key.
    #[error("line {line} of the trusted keys is neither a minisign public key nor a comment: {reason}")]
    Malformed {
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing but comments.
    #[error("there is no key in the trusted keys; a minisign public key file, or its second line, is read")]
    None,
}

/// The keys whose signatures are accepted.
#[derive(Debug, Clone, Default)]
pub struct TrustedKeys(Vec<(KeyId, PublicKey)>);

/// What became of a manifest's signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignatureStatus {
    /// There is none.
    Unsigned,
    /// There is one, and no key was given.
    NotChecked {
        /// The key that made it, as it claims.
        key: KeyId,
    },
    /// By a trusted key.
    Good {
        /// The key.
        key: KeyId,
        /// What was signed beside the manifest, escaped.
        trusted_comment: String,
    },
    /// By a key that is not trusted.
    UnknownKey {
        /// The key, as it claims.
        key: KeyId,
    },
    /// By a trusted key as it claims, and not true of this manifest.
    Bad {
        /// The key.
        key: KeyId,
    },
    /// No minisign signature.
    Malformed {
        /// What is wrong with it.
        reason: String,
    },
}

impl SignatureStatus {
    /// Whether a manifest may be believed: by nothing less than a good signature where keys are trusted.
    pub fn accepted(&self, keys: &TrustedKeys) -> bool {
        keys.is_empty() || matches!(self, Self::Good { .. })
    }
}

impl fmt::Display for SignatureStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsigned => f.write_str("unsigned"),
            Self::NotChecked { key } => write!(f, "signed by key {key}, not checked: no trusted keys were given"),
            Self::Good { key, trusted_comment } => write!(f, "signed by trusted key {key} ({trusted_comment})"),
            Self::UnknownKey { key } => write!(f, "signed by key {key}, which is not among the trusted keys"),
            Self::Bad { key } => write!(f, "the signature by key {key} is not true of this manifest"),
            Self::Malformed { reason } => write!(f, "the signature cannot be read: {reason}"),
        }
    }
}

impl TrustedKeys {
    /// Reads minisign public key files, one after another, or their base64 lines alone. Empty lines and comments
    /// (`untrusted comment:`, `#`) are passed over.
    ///
    /// # Errors
    /// A line that is no key, and text without any.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        if text.len() > MAX_KEYS_TEXT {
            return Err(KeyError::TooLarge { bytes: text.len() });
        }
        let mut keys = Vec::new();
        for (number, line) in text.lines().map(str::trim).enumerate() {
            if line.is_empty() || line.starts_with(COMMENT) || line.starts_with('#') {
                continue;
            }
            let malformed = |reason: &str| KeyError::Malformed { line: number + 1, reason: reason.into() };
            let key = PublicKey::from_base64(line).map_err(|error| malformed(&error.to_string()))?;
            keys.push((KeyId::of_line(line).ok_or_else(|| malformed("it is no base64"))?, key));
        }
        if keys.is_empty() { Err(KeyError::None) } else { Ok(Self(keys)) }
    }

    /// Adds all keys of another list.
    pub fn extend(&mut self, others: Self) {
        self.0.extend(others.0);
    }

    /// Whether no key is trusted, so that signatures are not checked.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their ids.
    pub fn ids(&self) -> impl Iterator<Item = KeyId> + '_ {
        self.0.iter().map(|(id, _)| *id)
    }

    /// Checks the signature of a manifest's bytes. Prehashed and legacy signatures are read.
    pub fn check(&self, manifest: &[u8], signature: Option<&[u8]>) -> SignatureStatus {
        let Some(bytes) = signature else { return SignatureStatus::Unsigned };
        let malformed = |reason: &str| SignatureStatus::Malformed { reason: reason.into() };
        let Ok(text) = std::str::from_utf8(bytes) else { return malformed("it is not text") };
        let signature = match Signature::decode(text) {
            Ok(signature) => signature,
            Err(error) => return malformed(&error.to_string()),
        };
        let Some(key) = text.lines().nth(1).and_then(KeyId::of_line) else { return malformed("it names no key") };
        if self.is_empty() {
            return SignatureStatus::NotChecked { key };
        }
        // Ids are not unique by construction, so every key has its say.
        let verdicts: Vec<_> = self.0.iter().map(|(_, trusted)| trusted.verify(manifest, &signature, true)).collect();
        if verdicts.iter().any(Result::is_ok) {
            return SignatureStatus::Good { key, trusted_comment: shown(signature.trusted_comment()) };
        }
        let unknown = verdicts.iter().all(|verdict| matches!(verdict, Err(Error::UnexpectedKeyId)));
        if unknown { SignatureStatus::UnknownKey { key } } else { SignatureStatus::Bad { key } }
    }
}
