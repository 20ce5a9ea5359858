//! JSON as `handoff.json` needs it: no name twice, and bounded before it is built.
//!
//! `serde_json` keeps the last of two equal names, so that two readers of one signed text could see two manifests.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::marker::PhantomData;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Number, Value};

/// Values in a manifest, at most; a number of a case is one, so is a pair. What is built of them stays below some
/// hundred megabytes.
const MAX_VALUES: usize = 1 << 22;
/// Values in one lineage, or in the messages, tools or template variables of one case, at most.
const MAX_FREE_VALUES: usize = 1 << 16;
/// Characters of foreign text in a message.
const MAX_SHOWN: usize = 300;

/// Foreign text for a message: shortened, and without control characters.
pub(crate) fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(MAX_SHOWN).flat_map(escaped).collect();
    if text.chars().nth(MAX_SHOWN).is_some() {
        out.push('…');
    }
    out
}

fn escaped(c: char) -> impl Iterator<Item = char> {
    let escape = c.is_control().then(|| c.escape_default());
    let plain = escape.is_none().then_some(c);
    escape.into_iter().flatten().chain(plain)
}

/// Refuses more values than are ever needed, by counting brackets and commas.
pub(crate) fn bound_values(json: &[u8]) -> Result<(), String> {
    let (mut values, mut in_string, mut bytes) = (0usize, false, json.iter());
    while let Some(&byte) = bytes.next() {
        match byte {
            b'\\' if in_string => _ = bytes.next(),
            b'"' => in_string = !in_string,
            b'[' | b'{' | b',' if !in_string => values += 1,
            _ => {}
        }
    }
    if values > MAX_VALUES { Err(format!("it has more than {MAX_VALUES} values")) } else { Ok(()) }
}

/// A map whose names are distinct.
pub(crate) fn distinct<'de, D, K, V>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: Deserialize<'de> + Ord + Display,
    V: Deserialize<'de>,
{
    struct Distinct<K, V>(PhantomData<(K, V)>);

    impl<'de, K: Deserialize<'de> + Ord + Display, V: Deserialize<'de>> Visitor<'de> for Distinct<K, V> {
        type Value = BTreeMap<K, V>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some(name) = entries.next_key::<K>()? {
                if map.contains_key(&name) {
                    return Err(twice(&name));
                }
                map.insert(name, entries.next_value()?);
            }
            Ok(map)
        }
    }

    deserializer.deserialize_map(Distinct(PhantomData))
}

fn twice<E: serde::de::Error>(name: &impl Display) -> E {
    E::custom(format_args!("the name \"{}\" occurs twice", shown(&name.to_string())))
}

/// Any object.
pub(crate) fn object<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Map<String, Value>, D::Error> {
    match Free(&Cell::new(MAX_FREE_VALUES)).deserialize(deserializer)? {
        Value::Object(map) => Ok(map),
        _ => Err(D::Error::custom("an object is expected here")),
    }
}

/// Any array.
pub(crate) fn array<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Value>, D::Error> {
    match Free(&Cell::new(MAX_FREE_VALUES)).deserialize(deserializer)? {
        Value::Array(items) => Ok(items),
        _ => Err(D::Error::custom("an array is expected here")),
    }
}

/// Any value, as long as the budget lasts. (Nesting is bounded by `serde_json`.)
struct Free<'a>(&'a Cell<usize>);

impl Free<'_> {
    fn pay<E: serde::de::Error>(&self) -> Result<(), E> {
        let rest = self.0.get().checked_sub(1);
        self.0.set(rest.ok_or_else(|| E::custom(format_args!("there are more than {MAX_FREE_VALUES} values")))?);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Free<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.pay()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Free<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(Free(self.0))? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            if map.contains_key(&name) {
                return Err(twice(&name));
            }
            map.insert(name, entries.next_value_seed(Free(self.0))?);
        }
        Ok(Value::Object(map))
    }
}
