//! `model.safetensors.index.json`: which shard holds which tensor. The shards' own headers are the
//! truth; an index that says anything else is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use super::header::distinct_keys;
use super::{Checkpoint, CheckpointError, FileError, Files, INDEX, read_header};

pub(super) const MAX_BYTES: u64 = 64 << 20;
const MAX_SHARDS: usize = 4096;

#[derive(Deserialize)]
struct Index {
    #[serde(rename = "metadata")]
    _metadata: Option<IgnoredAny>,
    weight_map: WeightMap,
}

struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut shards = BTreeMap::new();
                distinct_keys(&mut map, |map, name| {
                    shards.insert(name, map.next_value()?);
                    Ok(())
                })?;
                Ok(WeightMap(shards))
            }
        }
        deserializer.deserialize_map(Names)
    }
}

/// Opens every shard that the index names and compares it with the index.
pub(super) fn open_shards(files: &Files, json: &[u8]) -> Result<Checkpoint, CheckpointError> {
    let damaged = |reason| CheckpointError::Damaged { file: INDEX.into(), reason };
    let Index { weight_map: WeightMap(shard_of), .. } =
        serde_json::from_slice(json).map_err(|e| damaged(format!("it is not a valid index: {e}")))?;
    let shards: BTreeSet<&String> = shard_of.values().collect();
    if shards.len() > MAX_SHARDS {
        return Err(damaged(format!("it names {} shards; at most {MAX_SHARDS} are read", shards.len())));
    }
    let disagree = |reason| CheckpointError::Index { reason };
    let open = |shard: &String| files.open(shard)?.ok_or_else(|| FileError::Missing { name: shard.clone() });
    let opened = shards.iter().map(|shard| open(shard)).collect::<Result<_, _>>()?;
    let mut checkpoint = Checkpoint::new(opened, BTreeMap::new());
    for (number, shard) in shards.into_iter().enumerate() {
        for entry in read_header(&checkpoint.files[number])? {
            match shard_of.get(&entry.name) {
                Some(named) if named == shard => {}
                Some(named) => {
                    return Err(disagree(format!("tensor {} is in {shard}, not in {named}", entry.name)));
                }
                None => return Err(disagree(format!("tensor {} of {shard} is not in the index", entry.name))),
            }
            checkpoint.tensors.insert(entry.name.clone(), (number, entry));
        }
    }
    match shard_of.iter().find(|(name, _)| !checkpoint.tensors.contains_key(*name)) {
        Some((name, shard)) => Err(disagree(format!("tensor {name} is not in {shard}"))),
        None => Ok(checkpoint),
    }
}
