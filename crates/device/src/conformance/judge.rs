//! What a backend computes for a case, beside what [`Reference`] computes for it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::{Case, Full, evaluate, name, tolerance::tolerance};
use crate::{DType, Reference, Result};

/// What a backend gave for a case beside what the judge gave: equal lengths.
pub struct Outcome {
    /// The judge's numbers.
    pub expected: Vec<f32>,
    /// The backend's numbers.
    pub actual: Vec<f32>,
    /// Largest difference allowed, absolute, on outputs of order one.
    pub tolerance: f32,
}

impl Outcome {
    /// Largest absolute difference; infinite where one side is not finite.
    pub fn max_error(&self) -> f32 {
        assert_eq!(self.expected.len(), self.actual.len());
        let error = |(e, a): (&f32, &f32)| if e.is_finite() && a.is_finite() { (e - a).abs() } else { f32::INFINITY };
        self.expected.iter().zip(&self.actual).map(error).fold(0.0, f32::max)
    }

    /// Whether the backend may keep its kernel.
    pub fn passed(&self) -> bool {
        !self.expected.is_empty() && self.max_error() <= self.tolerance
    }
}

/// Runs one case on `backend` and on the judge. Inputs are numbers that the backend's activations hold, so that both compute
/// with the same.
pub fn run<B: Full>(case: &Case, backend: &B) -> Result<Outcome> {
    Judge::default().run(case, backend)
}

/// The judge of many backends, or of one many times: it is slow, so it computes once for each case and type of inputs.
#[derive(Default)]
pub struct Judge(Mutex<HashMap<String, Vec<f32>>>);

impl Judge {
    /// As [`run`].
    pub fn run<B: Full>(&self, case: &Case, backend: &B) -> Result<Outcome> {
        let inputs = backend.caps().activations;
        let expected = self.expected(case, inputs)?;
        let tolerance = tolerance(case, backend.caps(), &expected);
        Ok(Outcome { expected, actual: evaluate(case, backend, inputs)?, tolerance })
    }

    fn expected(&self, case: &Case, inputs: DType) -> Result<Vec<f32>> {
        let name = name(case, inputs);
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(expected) = known().get(&name) {
            return Ok(expected.clone());
        }
        // Others need not wait meanwhile.
        let expected = evaluate(case, &Reference::new(), inputs)?;
        known().insert(name, expected.clone());
        Ok(expected)
    }
}
