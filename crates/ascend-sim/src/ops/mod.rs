//! The operators, one file per family.

pub mod examples;
