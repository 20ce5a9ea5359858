//! A GGUF file (versions 2 and 3, little-endian): typed metadata, then a list of tensors, then their bytes.
//!
//! The format is ggml's (`docs/gguf.md` there). Read by our own scan of the mapped file, because it comes
//! from outside: every count, length and offset is checked against the bytes that are there, arrays stay
//! where they lie, and nothing is allocated for which the file has not paid in bytes.

use std::collections::BTreeMap;

use baton_device::DType;

use super::header::{Entry, MAX_NAME, MAX_TENSORS};

const MAGIC: &[u8] = b"GGUF";
const MAX_KEYS: u64 = 1 << 16;
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;

/// Tensor types by their number in the file. Those without a [`DType`] are named in refusals only.
const TYPES: [(u32, &str); 32] = [
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (30, "BF16"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

/// What a file says, borrowed from its bytes.
#[derive(Debug)]
pub(crate) struct Gguf<'a> {
    pub(crate) metadata: BTreeMap<&'a str, Value<'a>>,
    /// In the order of the file, under the file's own names.
    pub(crate) tensors: Vec<Entry>,
}

/// A metadata value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a str),
    Array(Array<'a>),
}

impl Value<'_> {
    /// A whole number from 0 on.
    pub(crate) fn unsigned(self) -> Option<u64> {
        match self {
            Value::Unsigned(v) => Some(v),
            Value::Signed(v) => u64::try_from(v).ok(),
            _ => None,
        }
    }
}

/// Elements of one scalar type, checked once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Array<'a> {
    kind: u32,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// The elements.
    pub(crate) fn iter(self) -> impl Iterator<Item = Value<'a>> {
        let mut cursor = Cursor { rest: self.bytes };
        (0..self.len).map(move |_| cursor.scalar(self.kind).expect("checked when the file was read"))
    }

    pub(crate) fn len(self) -> usize {
        self.len
    }
}

/// Reads a file's metadata and its list of tensors; the error says what is wrong.
pub(crate) fn parse(file: &[u8]) -> Result<Gguf<'_>, String> {
    let mut cursor = Cursor { rest: file };
    if cursor.take(4)? != MAGIC {
        return Err("it does not begin with GGUF".into());
    }
    match cursor.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() <= 3 => return Err("it is big-endian; little-endian files are read".into()),
        version => return Err(format!("it has GGUF version {version}; 2 and 3 are read")),
    }
    let (tensors, keys) = (cursor.u64()?, cursor.u64()?);
    if tensors > MAX_TENSORS as u64 || keys > MAX_KEYS {
        return Err(format!(
            "it claims {tensors} tensors and {keys} keys; at most {MAX_TENSORS} and {MAX_KEYS} are read"
        ));
    }
    let mut metadata = BTreeMap::new();
    for _ in 0..keys {
        let key = cursor.name()?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind).map_err(|reason| format!("key {key}: {reason}"))?;
        if metadata.insert(key, value).is_some() {
            return Err(format!("the key {key} occurs twice"));
        }
    }
    let mut infos = BTreeMap::new();
    let mut order = Vec::new();
    for _ in 0..tensors {
        let name = cursor.name()?;
        let info = cursor.info().map_err(|reason| format!("tensor {name}: {reason}"))?;
        if infos.insert(name, info).is_some() {
            return Err(format!("the name {name} occurs twice"));
        }
        order.push(name);
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(&Value::Unsigned(a)) if a.is_power_of_two() && a <= MAX_ALIGNMENT => a,
        Some(_) => return Err("general.alignment is not a power of two of reasonable size".into()),
    };
    let start = ((file.len() - cursor.rest.len()) as u64).next_multiple_of(alignment);
    let place = |name: &str| {
        let info = &infos[name];
        entry(name, info, start, alignment, file.len() as u64).map_err(|reason| format!("tensor {name}: {reason}"))
    };
    let tensors: Vec<Entry> = order.into_iter().map(place).collect::<Result<_, _>>()?;
    let mut ranges: Vec<_> = tensors.iter().map(|t| (t.offset, t.bytes as u64, &t.name)).collect();
    ranges.sort_unstable();
    match ranges.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
        Some(pair) => Err(format!("tensor {} overlaps tensor {}", pair[1].2, pair[0].2)),
        None => Ok(Gguf { metadata, tensors }),
    }
}

/// A tensor as the file lists it.
struct Info {
    stored_type: &'static str,
    dtype: DType,
    /// Outermost first.
    shape: Vec<usize>,
    /// From the start of the data.
    offset: u64,
}

fn entry(name: &str, info: &Info, start: u64, alignment: u64, file_len: u64) -> Result<Entry, String> {
    let Info { stored_type, dtype, shape, offset } = info;
    let elements = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim)).filter(|n| *n <= usize::MAX / 8);
    let elements = elements.ok_or_else(|| format!("{shape:?} is too large"))?;
    if elements == 0 {
        return Err("it has no elements".into());
    }
    let cols = shape.last().copied().unwrap_or(1);
    if !cols.is_multiple_of(dtype.block()) {
        return Err(format!("its rows of {cols} are not whole blocks of {stored_type}, which have {}", dtype.block()));
    }
    if !offset.is_multiple_of(alignment) {
        return Err(format!("its offset {offset} is not a multiple of {alignment}"));
    }
    let bytes = dtype.bytes(elements);
    let end = start.checked_add(*offset).and_then(|at| at.checked_add(bytes as u64));
    if end.is_none_or(|end| end > file_len) {
        return Err(format!("its {bytes} bytes at {offset} reach beyond the file: it is truncated"));
    }
    Ok(Entry { name: name.to_owned(), stored_type, shape: shape.clone(), offset: start + offset, bytes })
}

struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or("it ends within its header: it is truncated")?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.take(N)?.try_into().expect("N bytes were taken"))
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<&'a str, String> {
        let len = usize::try_from(self.u64()?).unwrap_or(usize::MAX);
        std::str::from_utf8(self.take(len)?).map_err(|_| "a string is not UTF-8".into())
    }

    /// The name of a key or a tensor.
    fn name(&mut self) -> Result<&'a str, String> {
        let name = self.text()?;
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err("a name is empty, overlong or not printable".into());
        }
        Ok(name)
    }

    fn value(&mut self, kind: u32) -> Result<Value<'a>, String> {
        if kind != 9 {
            return self.scalar(kind);
        }
        let kind = self.u32()?;
        let len = usize::try_from(self.u64()?).unwrap_or(usize::MAX);
        let before = self.rest;
        match width(kind) {
            Some(width) => {
                self.take(len.saturating_mul(width))?;
            }
            None if kind == 8 => {
                for _ in 0..len {
                    self.text()?;
                }
            }
            None => return Err(format!("an array of type {kind}; arrays of numbers, flags and strings are read")),
        }
        let bytes = &before[..before.len() - self.rest.len()];
        if kind == 7 && bytes.iter().any(|b| *b > 1) {
            return Err("a flag is neither 0 nor 1".into());
        }
        Ok(Value::Array(Array { kind, len, bytes }))
    }

    fn scalar(&mut self, kind: u32) -> Result<Value<'a>, String> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => match self.array()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                _ => return Err("a flag is neither 0 nor 1".into()),
            },
            8 => Value::Text(self.text()?),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(format!("unknown value type {kind}")),
        })
    }

    fn info(&mut self) -> Result<Info, String> {
        let rank = self.u32()?;
        if rank == 0 || rank > MAX_DIMS {
            return Err(format!("it has {rank} dimensions; 1 to {MAX_DIMS} are read"));
        }
        let dim = |_| usize::try_from(self.u64()?).map_err(|_| "a dimension is too large".to_owned());
        let mut shape = (0..rank).map(dim).collect::<Result<Vec<_>, _>>()?;
        shape.reverse(); // the file has the innermost first
        let number = self.u32()?;
        let Some(&(_, stored_type)) = TYPES.iter().find(|t| t.0 == number) else {
            return Err(format!("unknown type {number}"));
        };
        let dtype = Entry::dtype_of(stored_type).ok_or_else(|| {
            let readable: Vec<_> = TYPES.iter().filter(|t| Entry::dtype_of(t.1).is_some()).map(|t| t.1).collect();
            format!("its type {stored_type} is not supported; {} are", readable.join(", "))
        })?;
        Ok(Info { stored_type, dtype, shape, offset: self.u64()? })
    }
}

/// Bytes of an array's element, if all have the same.
fn width(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}
