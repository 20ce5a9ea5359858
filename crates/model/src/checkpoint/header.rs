//! The header of a safetensors file: eight bytes of length, then a JSON object from tensor names to
//! dtype, shape and byte range. Read by our own scan, because a header comes from outside:
//!
//! - names are distinct and printable, ranks and counts capped;
//! - every range holds exactly the bytes that shape and dtype imply;
//! - the ranges tile the rest of the file: no overlap, no hole, no trailing byte.

use std::collections::HashSet;
use std::fmt;

use baton_device::{BlockFormat, DType};
use serde::Deserialize;
use serde::de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Largest header read; the largest published ones are below 16 MiB.
const MAX_HEADER: u64 = 32 << 20;
pub(super) const MAX_TENSORS: usize = 1 << 18;
const MAX_RANK: usize = 8;
pub(super) const MAX_NAME: usize = 512;

/// Element types that the format has; those that [`DType`] lacks cannot be weights.
const STORED_TYPES: [(&str, u64); 16] = [
    ("F32", 4),
    ("F16", 2),
    ("BF16", 2),
    ("F64", 8),
    ("I64", 8),
    ("U64", 8),
    ("I32", 4),
    ("U32", 4),
    ("I16", 2),
    ("U16", 2),
    ("I8", 1),
    ("U8", 1),
    ("BOOL", 1),
    ("F8_E4M3", 1),
    ("F8_E5M2", 1),
    ("F8_E8M0", 1),
];

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// As the file spells it.
    pub(crate) stored_type: &'static str,
    pub(crate) shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub(crate) offset: u64,
    pub(crate) bytes: usize,
}

/// Stored types that a weight may have as it is: floats, and the blocks of a GGUF file.
pub(crate) const WEIGHTS: &[&str] = &[
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
];

/// Stored types that a table of experts may have.
pub(crate) const INTEGERS: &[&str] = &["I64", "I32"];

impl Entry {
    /// Its element type, if that can be a weight's.
    pub(crate) fn dtype(&self) -> Option<DType> {
        Self::dtype_of(self.stored_type)
    }

    /// The element type of that name, if it can be a weight's.
    pub(super) fn dtype_of(stored_type: &str) -> Option<DType> {
        match stored_type {
            "F32" => Some(DType::F32),
            "F16" => Some(DType::F16),
            "BF16" => Some(DType::BF16),
            _ => BlockFormat::ALL.into_iter().find(|f| f.name() == stored_type).map(DType::Ggml),
        }
    }
}

/// Length of the header of a file of `file_len` bytes that begins with `prefix`.
pub(crate) fn header_len(prefix: [u8; 8], file_len: u64) -> Result<usize, String> {
    let len = u64::from_le_bytes(prefix);
    if len > MAX_HEADER {
        return Err(format!("its header claims {len} bytes; at most {MAX_HEADER} are read"));
    }
    if len + 8 > file_len {
        return Err(format!("its header claims {len} bytes, but the file has {file_len}: it is truncated"));
    }
    Ok(len as usize)
}

/// The tensors of a file of `file_len` bytes, by offset.
pub(crate) fn parse(header: &[u8], file_len: u64) -> Result<Vec<Entry>, String> {
    let Header(raw) = serde_json::from_slice(header).map_err(|e| format!("its header is not valid: {e}"))?;
    let start = header.len() as u64 + 8;
    let mut entries = raw.into_iter().map(|(name, raw)| entry(name, raw, start)).collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(|e| e.offset);
    let mut end = start;
    for e in &entries {
        if e.offset != end {
            let what = if e.offset < end { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(format!("tensor {} {what}", e.name));
        }
        end = e.offset + e.bytes as u64;
        if end > file_len {
            return Err(format!("tensor {} ends at byte {end} of {file_len}: the file is truncated", e.name));
        }
    }
    if end != file_len {
        return Err(format!("{} bytes follow its last tensor", file_len - end));
    }
    Ok(entries)
}

fn entry(name: String, raw: RawEntry, start: u64) -> Result<Entry, String> {
    let Some(&(stored_type, size)) = STORED_TYPES.iter().find(|t| t.0 == raw.dtype) else {
        return Err(format!("tensor {name} has an unknown dtype"));
    };
    let elements = raw.shape.0.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim as u64));
    let wanted = elements.and_then(|n| n.checked_mul(size));
    let (from, to) = raw.data_offsets;
    let absolute = start.checked_add(from).zip(to.checked_sub(from));
    match (absolute, wanted) {
        (_, Some(0)) => Err(format!("tensor {name} has no elements")),
        (Some((offset, bytes)), Some(wanted)) if bytes == wanted && offset.checked_add(bytes).is_some() => {
            let bytes = usize::try_from(bytes).map_err(|_| format!("tensor {name} is too large"))?;
            Ok(Entry { name, stored_type, shape: raw.shape.0, offset, bytes })
        }
        _ => Err(format!(
            "tensor {name} has bytes {from}..{to}, which is not what {stored_type} {:?} takes",
            raw.shape.0
        )),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dims;
        impl<'de> Visitor<'de> for Dims {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_RANK} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == MAX_RANK {
                        return Err(A::Error::invalid_length(MAX_RANK + 1, &self));
                    }
                    dims.push(dim);
                }
                Ok(Shape(dims))
            }
        }
        deserializer.deserialize_seq(Dims)
    }
}

struct Header(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                distinct_keys(&mut map, |map, name| {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                    Ok(())
                })?;
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}

/// Visits an object's keys, refusing a repeated, unprintable or overlong one, and too many.
/// (`serde_json` alone keeps the last of two equal keys.)
pub(super) fn distinct_keys<'de, A: MapAccess<'de>>(
    map: &mut A,
    mut visit: impl FnMut(&mut A, String) -> Result<(), A::Error>,
) -> Result<(), A::Error> {
    let mut seen = HashSet::new();
    while let Some(name) = map.next_key::<String>()? {
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(A::Error::custom("a tensor name is empty, overlong or not printable"));
        }
        if seen.len() == MAX_TENSORS {
            return Err(A::Error::custom(format_args!("there are more than {MAX_TENSORS} tensors")));
        }
        if !seen.insert(name.clone()) {
            return Err(A::Error::custom(format_args!("the name {name} occurs twice")));
        }
        visit(map, name)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_of_a_weight_has_an_element_type_and_every_block_format_is_one() {
        assert!(WEIGHTS.iter().all(|name| Entry::dtype_of(name).is_some()));
        assert!(BlockFormat::ALL.iter().all(|format| WEIGHTS.contains(&format.name())));
    }
}
