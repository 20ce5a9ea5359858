//! Which form an operation takes: one of CANN's fused operators, or composed of simpler ones; and which form a weight.
//!
//! A form is settled once for each shape, when the shape is first met, never by a version: the chip's limits must allow it,
//! and a trial on this very device must run and agree with a judge. So an operator that is missing, that refuses the real
//! shapes, or that means something else than its public description said, costs speed and nothing else. What a trial calls
//! runs to its end on scratch memory, so it leaves no executor behind.

mod attention;
mod experts;
mod rows;
mod step;
mod trial;
mod weights;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, OnceLock, PoisonError};

use baton_device::Result as SeamResult;

pub(crate) use attention::{AttentionShape, LatentForm, LatentShape, attention, latent};
pub(crate) use experts::{ExpertsShape, experts};
pub(crate) use rows::{CacheShape, NormShape, cache_write, sum_and_norm};
pub(crate) use weights::{WeightShape, weight_in_blocks};

use crate::backend::AscendBackend;
use crate::object::{DataType, View};
use crate::ops::fused_attention::{MASK, mask};
use crate::ops::moe::MoeForm;
use crate::plan::Part;
use crate::tensor::Buffer;

/// What is settled so far, by family.
#[derive(Default)]
pub(crate) struct Forms {
    /// Composed forms only: for comparisons.
    pub(crate) strict: bool,
    /// Whether full attention is fused.
    pub(crate) attention: Memo<AttentionShape, bool>,
    pub(crate) latent: Memo<LatentShape, LatentForm>,
    /// Whether rows are written to a layer's cache by one operator.
    pub(crate) cache: Memo<CacheShape, bool>,
    /// Whether a sum and its norm are one operator.
    pub(crate) norm: Memo<NormShape, bool>,
    pub(crate) experts: Memo<ExpertsShape, MoeForm>,
    /// Whether a linear weight is kept in blocks.
    pub(crate) weights: Memo<WeightShape, bool>,
    /// What fused attention hides keys by.
    mask: OnceLock<Buffer>,
}

impl Forms {
    pub(crate) fn new(strict: bool) -> Self {
        Self { strict, ..Self::default() }
    }
}

impl AscendBackend {
    /// The mask of fused attention, uploaded when it is first asked for.
    pub(crate) fn mask(&self) -> SeamResult<View> {
        let buffer = match self.forms.mask.get() {
            Some(buffer) => buffer,
            None => {
                let made = Buffer::with(&self.owner, mask())?;
                self.forms.mask.get_or_init(|| made)
            }
        };
        Ok(View::new(buffer.address(), DataType::I8, &[MASK, MASK]))
    }
}

impl Forms {
    /// What attention has asked of plans so far; the composed form's numbers before anything was asked for.
    pub(crate) fn parts(&self) -> Vec<Part> {
        let (full, latent) = (self.attention.taken(), self.latent.taken());
        let composed = full.contains(&false) || latent.contains(&LatentForm::Composed);
        let fused_latent = latent.iter().any(|form| *form != LatentForm::Composed);
        let nothing_yet = full.is_empty() && latent.is_empty();
        [(Part::Composed, composed || nothing_yet), (Part::Whole, full.contains(&true)), (Part::Short, fused_latent)]
            .into_iter()
            .filter_map(|(part, needed)| needed.then_some(part))
            .collect()
    }

    /// One line for each shape met so far: in which layers, which form, and why not a better one.
    pub(crate) fn lines(&self) -> Vec<String> {
        [
            self.attention.lines(),
            self.latent.lines(),
            self.cache.lines(),
            self.norm.lines(),
            self.experts.lines(),
            self.weights.lines(),
        ]
        .concat()
    }
}

/// A form that an operation could take.
pub(crate) struct Candidate<F> {
    pub(crate) name: String,
    pub(crate) form: F,
    /// Why the chip's limits or our own rules exclude it.
    pub(crate) objection: Option<String>,
}

/// How a trial of a form ended: well, or why the form is not to be taken.
pub(crate) type Verdict = Result<(), String>;

/// The forms of a family of operations, by shape.
pub(crate) struct Memo<S, F>(Mutex<Vec<Settled<S, F>>>);

struct Settled<S, F> {
    shape: S,
    form: F,
    name: String,
    objections: Vec<String>,
    layers: BTreeSet<usize>,
}

/// Where a shape is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Layer(usize),
    /// In one layer more than the family was met in so far.
    NextLayer,
    /// Wherever.
    Everywhere,
}

impl<S, F> Default for Memo<S, F> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<S: PartialEq + fmt::Display, F: Copy> Memo<S, F> {
    /// The form for a shape: the first of `candidates` that nothing excludes and whose trial ends well. The last is taken
    /// without a trial.
    pub(crate) fn settle(
        &self,
        shape: S,
        place: Place,
        candidates: impl FnOnce(&S) -> Vec<Candidate<F>>,
        trial: impl Fn(F) -> SeamResult<Verdict>,
    ) -> SeamResult<F> {
        let mut settled = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let layer = match place {
            Place::Layer(layer) => Some(layer),
            Place::NextLayer => Some(settled.iter().map(|known| known.layers.len()).sum()),
            Place::Everywhere => None,
        };
        if let Some(known) = settled.iter_mut().find(|known| known.shape == shape) {
            known.layers.extend(layer);
            return Ok(known.form);
        }
        let mut objections = Vec::new();
        let mut candidates = candidates(&shape).into_iter().peekable();
        while let Some(Candidate { name, form, objection }) = candidates.next() {
            let verdict = match objection {
                Some(objection) => Err(objection),
                None if candidates.peek().is_none() => Ok(()),
                None => trial(form)?,
            };
            match verdict {
                Ok(()) => {
                    settled.push(Settled { shape, form, name, objections, layers: layer.into_iter().collect() });
                    return Ok(form);
                }
                Err(objection) => objections.push(format!("not {name}: {objection}")),
            }
        }
        unreachable!("the last candidate has no objection")
    }

    /// The forms that are in use.
    fn taken(&self) -> Vec<F> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|known| known.form).collect()
    }

    fn lines(&self) -> Vec<String> {
        let settled = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let line = |Settled { shape, name, objections, layers, .. }: &Settled<S, F>| {
            let why = if objections.is_empty() { String::new() } else { format!(" ({})", objections.join("; ")) };
            let layers = if layers.is_empty() { String::new() } else { format!(", layers {}", ranges(layers)) };
            format!("{shape}{layers}: {name}{why}")
        };
        settled.iter().map(line).collect()
    }
}

/// `0-2, 5`.
fn ranges(numbers: &BTreeSet<usize>) -> String {
    let mut runs: Vec<[usize; 2]> = Vec::new();
    for &n in numbers {
        match runs.last_mut() {
            Some([_, last]) if *last + 1 == n => *last = n,
            _ => runs.push([n, n]),
        }
    }
    let text = |[a, b]: &[usize; 2]| if a == b { a.to_string() } else { format!("{a}-{b}") };
    runs.iter().map(text).collect::<Vec<_>>().join(", ")
}

/// The first of these that holds.
fn first(objections: impl IntoIterator<Item = (bool, String)>) -> Option<String> {
    objections.into_iter().find_map(|(holds, objection)| holds.then_some(objection))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn candidate(name: &str, form: u32, objection: Option<&str>) -> Candidate<u32> {
        Candidate { name: name.into(), form, objection: objection.map(Into::into) }
    }

    #[test]
    fn the_first_form_that_nothing_excludes_and_whose_trial_ends_well_is_taken_and_kept() {
        let memo = Memo::default();
        let tried = RefCell::new(Vec::new());
        let trial = |form| {
            tried.borrow_mut().push(form);
            Ok(if form == 2 { Err("it is off".into()) } else { Ok(()) })
        };
        let candidates = |_: &&str| {
            let limits = candidate("limited", 1, Some("too wide"));
            vec![limits, candidate("wrong", 2, None), candidate("right", 3, None), candidate("last", 4, None)]
        };
        for layer in [0, 1, 3] {
            assert_eq!(memo.settle("shape", Place::Layer(layer), candidates, trial).unwrap(), 3);
        }
        assert_eq!(*tried.borrow(), [2, 3]);
        assert_eq!(memo.settle("other", Place::NextLayer, |_| vec![candidate("last", 4, None)], trial).unwrap(), 4);
        assert_eq!(*tried.borrow(), [2, 3], "the last form needs no trial");
        assert_eq!(
            memo.lines(),
            ["shape, layers 0-1, 3: right (not limited: too wide; not wrong: it is off)", "other, layers 3: last"]
        );
    }
}
