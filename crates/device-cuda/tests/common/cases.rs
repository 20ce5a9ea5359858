//! Which of the shared cases are run: in the emulator all of them in every type take minutes.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::discriminant;

use baton_device::conformance::{self, Case};
use baton_device::{BlockFormat, Code, WeightFormat};

/// Blocks of each way to hold scales. Most of what tests cost is compiling kernels, which are others for each format.
pub const BLOCKS: [BlockFormat; 3] = [BlockFormat::Q4_0, BlockFormat::Q8_0, BlockFormat::Q4_K];

/// Integers, and floats.
pub const CODES: [Code; 2] = [Code::Int4, Code::E4M3];

/// Those of the cases that are run: all; or of each kind of case, plain format or one of [`BLOCKS`] and [`CODES`], and type of caches one,
/// the last.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Part {
    All,
    OfEachKind,
}

impl Part {
    pub fn cases(self) -> Vec<Case> {
        let cases = conformance::cases();
        let kind = |(i, case): (usize, &Case)| match (self, case) {
            // They are cheap, and each of them is of a kind of its own.
            (Part::All, _)
            | (_, Case::Norm { .. } | Case::Elementwise { .. } | Case::Choose { .. } | Case::Rope(_)) => i.to_string(),
            _ => format!("{:?} {:?}", discriminant(case), case.needs()),
        };
        let last: BTreeMap<String, usize> = cases
            .iter()
            .enumerate()
            .filter(|(_, case)| self == Part::All || usual(case))
            .map(|(i, case)| (kind((i, case)), i))
            .collect();
        let kept: BTreeSet<usize> = last.into_values().collect();
        cases.into_iter().enumerate().filter(|(i, _)| kept.contains(i)).map(|(_, case)| case).collect()
    }
}

/// Whether a case needs no other blocks than [`BLOCKS`], and no other codes than [`CODES`].
fn usual(case: &Case) -> bool {
    let known = |format: &WeightFormat| match format {
        WeightFormat::Ggml(block) => BLOCKS.contains(block),
        WeightFormat::Coded(code) => CODES.contains(code),
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 => true,
    };
    case.needs().weight_formats.iter().all(known)
}
