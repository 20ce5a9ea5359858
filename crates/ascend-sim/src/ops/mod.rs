//! The operators, one file per family: for each, what it refuses before it runs, and how it computes.
//!
//! Phase 1 refuses what the tables of [`crate::limits`] and the shapes forbid; an index is looked at only when an operator
//! runs, since a device does no more. Arithmetic is in [`crate::math`].

#[cfg(test)]
mod attention_tests;
#[cfg(test)]
mod bench;
mod view;

pub mod arithmetic;
pub mod attention;
pub mod cache;
pub mod choose;
pub mod copy;
pub mod experts;
pub mod gate;
pub mod grouped;
pub mod index;
pub mod latent;
pub mod matmul;
pub mod norm;
pub mod quant;
pub mod rope;
pub mod weight;
pub mod weight_only;
