//! What the operators compute: pure functions on dense row-major data, written plainly.
//!
//! Floats are f32 with sums in f64, except products of matrices, whose sums run in f32 as a cube unit's do. Nothing here
//! rounds to a narrower dtype: that happens once, where a result is stored. Shapes have been checked before a function
//! here is called, so a wrong one is a bug; only values of indices are judged here, since nothing else looks at them.

pub mod attention;
pub mod choose;
pub mod elementwise;
pub mod matmul;
pub mod moe;
pub mod moves;
pub mod norm;
pub mod nz;
pub mod quant;
pub mod rope;
pub mod shape;
