//! Golden vectors: what [`Reference`] once computed for every case. They judge the judge of another machine, and
//! with it the compiler, the processor and the memory that it runs on.
//!
//! A file is text, then numbers: a first line [`MAGIC`]; a line `name outputs kept` for each vector; an empty line; then
//! what is kept of all of them in that order, f32, little-endian. Inputs are not in it: they come from the counter hash of the list.
//! Invariant: of a case's outputs those are kept that [`kept`] names, evenly spread over all of them.

use std::collections::BTreeMap;

use super::{Case, Outcome, evaluate};
use crate::{DType, Reference, Result};

/// The first line of a file.
pub const MAGIC: &str = "baton-vectors 1";

/// Outputs that are kept of a case, at most.
const KEPT: usize = 256;

/// Types of activations that devices compute in, and of the inputs that they are then judged by.
const INPUTS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The name of a case with inputs of a type: that of the case, and behind an `@` the type if it is not f32.
pub fn name(case: &Case, inputs: DType) -> String {
    if inputs == DType::F32 { case.to_string() } else { format!("{case}@{inputs}") }
}

/// How many outputs are kept.
fn count(outputs: usize) -> usize {
    outputs.min(KEPT)
}

/// Indices of the outputs that are kept.
fn kept(outputs: usize) -> impl Iterator<Item = usize> {
    (0..count(outputs)).map(move |i| i * outputs / count(outputs))
}

/// Vectors by the [names](name) of their cases.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Vectors(BTreeMap<String, Vector>);

/// What is kept of one case.
#[derive(Debug, Clone, PartialEq)]
pub struct Vector {
    /// How many there were.
    outputs: usize,
    values: Vec<f32>,
}

/// Why bytes are no vectors.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VectorsError {
    /// Another kind or version of file.
    #[error("its first line is not {MAGIC:?}")]
    Magic,
    /// A line of the list of cases.
    #[error("line {0} is not a case's name, its number of outputs and how many of them are kept, at most {KEPT}")]
    Line(usize),
    /// The numbers end early, or go on.
    #[error("it has {actual} bytes of numbers, and its cases keep {expected}")]
    Length {
        /// What follows the list.
        actual: usize,
        /// What the list promises.
        expected: usize,
    },
}

impl Vectors {
    /// What the judge computes for each case, with inputs of each type.
    pub fn compute(cases: &[Case]) -> Result<Self> {
        let judge = Reference::new();
        let each = cases.iter().flat_map(|case| INPUTS.map(|inputs| (case, inputs)));
        let vector = |(case, inputs)| Ok((name(case, inputs), Vector::of(&evaluate(case, &judge, inputs)?)));
        Ok(Self(each.map(vector).collect::<Result<_>>()?))
    }

    /// The bytes of a file.
    pub fn encode(&self) -> Vec<u8> {
        let line = |(name, vector): (&String, &Vector)| format!("{name} {} {}\n", vector.outputs, vector.values.len());
        let list: String = self.0.iter().map(line).collect();
        let values = self.0.values().flat_map(|vector| &vector.values);
        format!("{MAGIC}\n{list}\n").into_bytes().into_iter().chain(values.flat_map(|v| v.to_le_bytes())).collect()
    }

    /// Reads a file.
    pub fn parse(bytes: &[u8]) -> std::result::Result<Self, VectorsError> {
        let mut rest =
            bytes.strip_prefix(MAGIC.as_bytes()).and_then(|b| b.strip_prefix(b"\n")).ok_or(VectorsError::Magic)?;
        let mut list = Vec::new();
        loop {
            let number = list.len() + 2;
            let end = rest.iter().position(|b| *b == b'\n').ok_or(VectorsError::Line(number))?;
            let (line, after) = (&rest[..end], &rest[end + 1..]);
            rest = after;
            if line.is_empty() {
                break;
            }
            list.push(listed(line).ok_or(VectorsError::Line(number))?);
        }
        let expected = list.iter().map(|(_, outputs)| count(*outputs) * size_of::<f32>()).sum();
        if rest.len() != expected {
            return Err(VectorsError::Length { actual: rest.len(), expected });
        }
        let mut values = rest.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value));
        let vector = |outputs: usize| Vector { outputs, values: values.by_ref().take(count(outputs)).collect() };
        let (names, outputs): (Vec<String>, Vec<usize>) = list.into_iter().unzip();
        Ok(Self(names.into_iter().zip(outputs.into_iter().map(vector)).collect()))
    }

    /// By name.
    pub fn get(&self, name: &str) -> Option<&Vector> {
        self.0.get(name)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Vector)> {
        self.0.iter().map(|(name, vector)| (name.as_str(), vector))
    }
}

/// Name and outputs from a line of the list.
fn listed(line: &[u8]) -> Option<(String, usize)> {
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (name, outputs, kept) =
        (words.next()?, words.next()?.parse::<u32>().ok()?, words.next()?.parse::<usize>().ok()?);
    let outputs = outputs as usize;
    let whole = words.next().is_none() && outputs > 0 && kept == count(outputs);
    whole.then(|| (name.to_owned(), outputs))
}

impl Vector {
    fn of(outputs: &[f32]) -> Self {
        Self { outputs: outputs.len(), values: kept(outputs.len()).map(|i| outputs[i]).collect() }
    }

    /// Outputs of the same case, judged by the vector; `None` if they are not as many, so that it is another case.
    pub fn outcome(&self, outputs: &[f32], tolerance: f32) -> Option<Outcome> {
        self.against(&Self::of(outputs), tolerance)
    }

    /// Another vector of the same case, likewise.
    pub fn against(&self, other: &Self, tolerance: f32) -> Option<Outcome> {
        let same = other.outputs == self.outputs;
        same.then(|| Outcome { expected: self.values.clone(), actual: other.values.clone(), tolerance })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn few() -> Vec<Case> {
        super::super::cases().into_iter().step_by(40).collect()
    }

    #[test]
    fn a_file_says_what_was_computed() {
        let vectors = Vectors::compute(&few()).unwrap();
        assert_eq!(Vectors::parse(&vectors.encode()), Ok(vectors));
    }

    #[test]
    fn a_file_that_is_cut_or_has_more_is_refused_wherever() {
        let bytes = Vectors::compute(&few()).unwrap().encode();
        for len in (0..bytes.len()).step_by(97) {
            assert!(Vectors::parse(&bytes[..len]).is_err(), "{len} of {}", bytes.len());
        }
        assert!(matches!(Vectors::parse(&[bytes, vec![0]].concat()), Err(VectorsError::Length { .. })));
        for line in ["a 1", "a 1 2", "a 0 0", "a 1 1 1", "a 999999999999 999999999999", "a -1 1"] {
            assert_eq!(Vectors::parse(format!("{MAGIC}\n{line}\n\n").as_bytes()), Err(VectorsError::Line(2)), "{line}");
        }
    }

    #[test]
    fn what_is_kept_reaches_over_all_outputs() {
        for outputs in [1, 2, KEPT - 1, KEPT, KEPT + 1, 2 * KEPT - 1, 134_400] {
            let indices: Vec<usize> = kept(outputs).collect();
            assert!(indices.windows(2).all(|pair| pair[0] < pair[1]) && indices[0] == 0);
            let last = *indices.last().unwrap();
            assert!(last < outputs && outputs - last <= outputs.div_ceil(indices.len()), "{last} of {outputs}");
        }
    }

    #[test]
    fn a_wrong_number_or_another_case_is_noticed() {
        let cases = few();
        let vectors = Vectors::compute(&cases).unwrap();
        let (case, vector) = (&cases[1], vectors.get(&name(&cases[1], DType::BF16)).unwrap());
        let mut outputs = evaluate(case, &Reference::new(), DType::BF16).unwrap();
        assert!(vector.outcome(&outputs, 0.0).unwrap().passed());
        outputs[0] += 1e-3;
        assert!(!vector.outcome(&outputs, 2e-5).unwrap().passed());
        assert!(vector.outcome(&outputs[1..], 2e-5).is_none());
    }
}
