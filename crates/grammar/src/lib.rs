//! Constraints on outputs.
