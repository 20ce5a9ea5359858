//! The engine under simulation: a runner without a model, and the seeded simulator that drives the
//! engine's core with it. The mock is public, since tests of other crates serve it as well.

#[cfg(test)]
mod ahead;
#[cfg(test)]
mod background;
#[cfg(test)]
mod cases;
#[cfg(test)]
mod fairness;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod grammars;
#[cfg(test)]
mod invariants;
mod mock;
mod mock_model;
#[cfg(test)]
mod passing;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod toy;
#[cfg(test)]
mod urgency;
#[cfg(test)]
mod world;

pub use mock::{MockControl, MockRunner};
pub use mock_model::MockModel;
