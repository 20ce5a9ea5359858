//! The golden vectors that `baton selftest` carries, written from what the reference device computes here.

use std::fs;

use anyhow::Result;
use baton_device::conformance::{Vectors, cases};

use crate::root;

/// Writes the file; a test of `baton-device` says when it must be written anew.
pub fn main() -> Result<()> {
    let bytes = Vectors::compute(&cases())?.encode();
    Ok(fs::write(root().join("models/golden/vectors/conformance.vectors"), bytes)?)
}
