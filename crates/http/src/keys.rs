//! The keys that are known: whose each is, what it is good for, and until when.
//!
//! Of a key only its SHA-256 digest is kept. A digest that is sent is compared with every known one, in constant time and
//! whatever was found before. Those of the settings stay; those of the list are replaced as a whole while requests come.
//!
//! Where no inference keys were ever given, every client may ask for inference, and where no keys at all, read metrics; a
//! list closes both, also for those whom it does not name. Nobody is an admin without a key.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::error::ApiError;
use crate::limits::KeyLimits;

/// A key as the operator gave it in plain text. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// A key; `None` if it is empty or cannot be sent in a header.
    pub fn new(key: String) -> Option<Self> {
        (!key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic())).then_some(Self(key))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// A key of the list, by its digest.
#[derive(Clone, PartialEq, Eq)]
pub struct ListedKey {
    /// What logs call whoever sends it.
    pub name: String,
    /// SHA-256 of the key.
    pub digest: [u8; 32],
    /// What it is good for.
    pub scopes: Scopes,
    /// From then on it is good for nothing.
    pub expires: Option<SystemTime>,
    /// What its requests may take.
    pub limits: KeyLimits,
}

impl ListedKey {
    /// The digest that 64 hexadecimal digits write; `None` for anything else, and for zeros, which are of no key.
    pub fn digest_of(hex: &str) -> Option<[u8; 32]> {
        bytes_of(hex).filter(|digest| *digest != Owner::ANYONE.0)
    }
}

fn bytes_of(hex: &str) -> Option<[u8; 32]> {
    let digit = |digit: u8| Some(char::from(digit).to_digit(16)? as u8);
    let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
    let bytes: Option<Vec<u8>> = pairs.iter().map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect();
    bytes?.try_into().ok().filter(|_| rest.is_empty())
}

impl fmt::Debug for ListedKey {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { name, digest: _, scopes, expires, limits } = self;
        let mut key = f.debug_struct("ListedKey");
        key.field("name", name).field("scopes", scopes).field("expires", expires).field("limits", limits).finish()
    }
}

/// What a key is good for: a set of the constants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    /// To use the model.
    pub const INFERENCE: Self = Self(1);
    /// To change what is served, or see how.
    pub const ADMIN: Self = Self(2);
    /// To read metrics.
    pub const METRICS: Self = Self(4);

    /// The scopes by the names that operators write.
    pub const NAMES: [(&'static str, Self); 3] =
        [("inference", Self::INFERENCE), ("admin", Self::ADMIN), ("metrics", Self::METRICS)];

    /// Those of either.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether it has one of these.
    pub(crate) const fn has_any(self, of: Self) -> bool {
        self.0 & of.0 != 0
    }
}

/// Whose something is: all who send the same key are one. It goes to disk as a digest, from which no key can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Owner([u8; 32]);

impl Owner {
    /// Those who send no key that is known, where none is asked for.
    pub const ANYONE: Self = Self([0; 32]);

    /// The sender of this key.
    pub fn of_key(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }

    /// The digest of the key, or zeros for anyone.
    pub fn digest(self) -> [u8; 32] {
        self.0
    }

    /// The sender of the key of this SHA-256 digest.
    #[cfg(test)]
    pub const fn of_digest(digest: [u8; 32]) -> Self {
        Self(digest)
    }
}

impl From<Owner> for String {
    fn from(owner: Owner) -> Self {
        owner.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl TryFrom<String> for Owner {
    type Error = &'static str;

    fn try_from(hex: String) -> Result<Self, Self::Error> {
        bytes_of(&hex).map(Self).ok_or("an owner is 64 hexadecimal digits")
    }
}

/// What the sender of a request may do. Set on every request by the layer of `auth`.
#[derive(Debug, Clone)]
pub(crate) struct Granted {
    scopes: Scopes,
    standing: Standing,
    owner: Owner,
    limits: KeyLimits,
}

/// What is known of a key that was sent, whatever it is good for.
#[derive(Debug, Clone)]
enum Standing {
    /// Nothing, or there was none.
    Unknown,
    /// It is one of ours no more.
    Expired,
    /// It is one of ours, of this name.
    Known(Arc<str>),
}

impl Granted {
    /// Whose the request is, and what it asks to be kept.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// What its requests may take.
    pub fn limits(&self) -> KeyLimits {
        self.limits
    }

    /// The name of the key, if it is one of ours.
    pub fn name(&self) -> Option<&Arc<str>> {
        match &self.standing {
            Standing::Known(name) => Some(name),
            Standing::Unknown | Standing::Expired => None,
        }
    }

    /// `Ok` if one of the scopes is granted.
    pub fn require(&self, any: Scopes) -> Result<(), ApiError> {
        match self.standing {
            _ if self.scopes.has_any(any) => Ok(()),
            Standing::Known(_) => Err(ApiError::insufficient_scope()),
            Standing::Expired => Err(ApiError::expired_api_key()),
            Standing::Unknown if any == Scopes::ADMIN => Err(ApiError::admin_key_needed()),
            Standing::Unknown => Err(ApiError::invalid_api_key()),
        }
    }
}

/// See the head of the file.
pub(crate) struct Keys {
    settings: Vec<Key>,
    known: RwLock<Arc<[Key]>>,
    /// What is granted without a key.
    free: Scopes,
}

#[derive(Clone)]
struct Key {
    name: Arc<str>,
    digest: [u8; 32],
    scopes: Scopes,
    expires: Option<SystemTime>,
    limits: KeyLimits,
}

impl From<ListedKey> for Key {
    fn from(ListedKey { name, digest, scopes, expires, limits }: ListedKey) -> Self {
        Self { name: name.into(), digest, scopes, expires, limits }
    }
}

/// In the fold over all keys, beside the scopes: a key of this digest is good, is expired.
const GOOD: u8 = 1 << 6;
const EXPIRED: u8 = 1 << 7;

impl Keys {
    /// Inference and admin keys of the settings, each of which reads metrics too; and a list, if there is to be one.
    pub fn new(inference: &[ApiKey], admin: &[ApiKey], listed: Option<&[ListedKey]>) -> Self {
        let plain = |keys: &[ApiKey], name: &str, scopes: Scopes| -> Vec<Key> {
            let key = |(number, key): (usize, &ApiKey)| Key {
                name: format!("{name}-{number}").into(),
                digest: Owner::of_key(key.0.as_bytes()).0,
                scopes: scopes.and(Scopes::METRICS),
                expires: None,
                limits: KeyLimits::default(),
            };
            (1..).zip(keys).map(key).collect()
        };
        let mut settings = plain(inference, "api-key", Scopes::INFERENCE);
        settings.extend(plain(admin, "admin-api-key", Scopes::ADMIN));
        let free = match listed {
            Some(_) => Scopes::default(),
            None if settings.is_empty() => Scopes::INFERENCE.and(Scopes::METRICS),
            None if inference.is_empty() => Scopes::INFERENCE,
            None => Scopes::default(),
        };
        let keys = Self { known: RwLock::new(settings.clone().into()), settings, free };
        keys.replace_list(listed.unwrap_or_default());
        keys
    }

    /// Knows these from now on, instead of those of the list before.
    pub fn replace_list(&self, listed: &[ListedKey]) {
        let listed = listed.iter().cloned().map(Key::from);
        let known = self.settings.iter().cloned().chain(listed).collect();
        *self.known.write() = known;
    }

    /// Whether the key of this digest is known.
    pub fn knows(&self, owner: Owner) -> bool {
        self.known.read().iter().any(|key| key.digest == owner.0)
    }

    /// What the sender of the key of this digest may do now.
    pub fn grant(&self, sender: Owner) -> Granted {
        let (known, now) = (self.known.read().clone(), SystemTime::now());
        let (mut found, mut place) = (0_u8, u32::MAX);
        for (index, key) in (0..).zip(known.iter()) {
            let expired = key.expires.is_some_and(|expires| expires <= now);
            let worth = if expired { EXPIRED } else { GOOD | key.scopes.0 };
            let is_sent = key.digest.ct_eq(&sender.0);
            found.conditional_assign(&(found | worth), is_sent);
            place.conditional_assign(&index, is_sent);
        }
        let anyones = |standing| (standing, Owner::ANYONE, KeyLimits::default());
        let (standing, owner, limits) = match known.get(place as usize) {
            Some(key) if found & GOOD != 0 => (Standing::Known(key.name.clone()), sender, key.limits),
            Some(_) => anyones(Standing::Expired),
            None => anyones(Standing::Unknown),
        };
        let scopes = Scopes(found & !(GOOD | EXPIRED)).and(self.free);
        Granted { scopes, standing, owner, limits }
    }
}
