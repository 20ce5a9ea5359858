//! Which form an operation takes: one of CANN's fused operators, or composed of simpler ones.
//!
//! A form is settled once for each shape, when the shape is first met, never by a version: the chip's limits must allow it,
//! and a trial on this very device must run and agree with a judge. So an operator that is missing, that refuses the real
//! shapes, or that means something else than its public description said, costs speed and nothing else. What a trial calls
//! runs to its end on scratch memory, so it leaves no executor behind.

mod experts;

use std::sync::{Mutex, PoisonError};

use baton_device::Result as SeamResult;

pub(crate) use experts::experts;

use crate::abi::codes::Class;
use crate::device::Device;
use crate::error::AscendError;
use crate::object::DataType;
use crate::ops::moe::MoeForm;
use crate::owner::Owner;

/// What is settled so far, by family.
#[derive(Default)]
pub(crate) struct Forms {
    /// Composed forms only: for comparisons.
    pub(crate) strict: bool,
    pub(crate) experts: Memo<MoeForm>,
}

impl Forms {
    /// One line for each shape met so far: how often, which form, and why not a better one.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.experts.lines()
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
pub(crate) struct Memo<F>(Mutex<Vec<Settled<F>>>);

struct Settled<F> {
    shape: String,
    form: F,
    name: String,
    objections: Vec<String>,
    uses: usize,
}

impl<F> Default for Memo<F> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<F: Copy> Memo<F> {
    /// The form for a shape: the first of `candidates` that nothing excludes and whose trial ends well. The last is taken
    /// without a trial.
    pub(crate) fn settle(
        &self,
        shape: String,
        candidates: impl FnOnce() -> Vec<Candidate<F>>,
        trial: impl Fn(F) -> SeamResult<Verdict>,
    ) -> SeamResult<F> {
        let mut settled = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = settled.iter_mut().find(|known| known.shape == shape) {
            known.uses += 1;
            return Ok(known.form);
        }
        let mut objections = Vec::new();
        let mut candidates = candidates().into_iter().peekable();
        while let Some(Candidate { name, form, objection }) = candidates.next() {
            let verdict = match objection {
                Some(objection) => Err(objection),
                None if candidates.peek().is_none() => Ok(()),
                None => trial(form)?,
            };
            match verdict {
                Ok(()) => {
                    settled.push(Settled { shape, form, name, objections, uses: 1 });
                    return Ok(form);
                }
                Err(objection) => objections.push(format!("not {name}: {objection}")),
            }
        }
        unreachable!("the last candidate has no objection")
    }

    fn lines(&self) -> Vec<String> {
        let settled = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let line = |Settled { shape, name, objections, uses, .. }: &Settled<F>| {
            let why = if objections.is_empty() { String::new() } else { format!(" ({})", objections.join("; ")) };
            format!("{uses} x {shape}: {name}{why}")
        };
        settled.iter().map(line).collect()
    }
}

/// Runs a trial on the device and waits for it. What says that the device cannot do it is a verdict; what says that the
/// device is worthless or full now is an error.
pub(crate) fn try_on<T: Send + 'static>(
    owner: &Owner,
    trial: impl FnOnce(&mut Device) -> Result<T, AscendError> + Send + 'static,
) -> SeamResult<Result<T, String>> {
    owner.call("trial of a form", move |device| match trial(device) {
        Ok(value) => Ok(Ok(value)),
        Err(error) => match error.class() {
            Class::Unsupported | Class::Setup | Class::Failed => Ok(Err(error.to_string())),
            Class::Bug | Class::Memory | Class::Poisoned | Class::Lost => Err(error),
        },
    })
}

/// Whether a form's numbers are the judge's, but for rounding in `dtype`.
pub(crate) fn agree(actual: &[f32], judged: &[f32], dtype: DataType) -> Verdict {
    assert_eq!(actual.len(), judged.len(), "outputs of one shape");
    // Some units in the last place of the largest: a form that means something else is off by far more.
    let bound = match dtype {
        DataType::F32 => 2f32.powi(-10),
        DataType::F16 => 2f32.powi(-7),
        _ => 2f32.powi(-5),
    };
    let largest = judged.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let differ = |(a, b): (&f32, &f32)| if a.is_finite() && b.is_finite() { (a - b).abs() } else { f32::INFINITY };
    let error = actual.iter().zip(judged).map(differ).fold(0f32, f32::max) / largest.max(f32::MIN_POSITIVE);
    if error <= bound {
        Ok(())
    } else {
        Err(format!("on this device its numbers are off by {error:.2e} of the largest"))
    }
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
        let candidates = || {
            let limits = candidate("limited", 1, Some("too wide"));
            vec![limits, candidate("wrong", 2, None), candidate("right", 3, None), candidate("last", 4, None)]
        };
        for _ in 0..2 {
            assert_eq!(memo.settle("shape".into(), candidates, trial).unwrap(), 3);
        }
        assert_eq!(*tried.borrow(), [2, 3]);
        assert_eq!(memo.settle("other".into(), || vec![candidate("last", 4, None)], trial).unwrap(), 4);
        assert_eq!(*tried.borrow(), [2, 3], "the last form needs no trial");
        assert_eq!(memo.lines(), ["2 x shape: right (not limited: too wide; not wrong: it is off)", "1 x other: last"]);
    }

    #[test]
    fn numbers_agree_up_to_the_rounding_of_their_type_and_not_beyond() {
        let judged = [1.0, -2.0, 0.5];
        for (dtype, near) in [(DataType::F32, 1e-3), (DataType::F16, 1e-2), (DataType::BF16, 4e-2)] {
            assert!(agree(&judged.map(|x| x + near), &judged, dtype).is_ok());
            assert!(agree(&judged.map(|x| x + 4.0 * near), &judged, dtype).is_err());
        }
        assert!(agree(&[1.0, f32::NAN, 0.5], &judged, DataType::BF16).is_err());
    }
}
