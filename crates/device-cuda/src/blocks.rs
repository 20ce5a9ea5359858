//! Weights in blocks. To be replaced whole; only `linear.rs` (and `moe.rs`) use it.
