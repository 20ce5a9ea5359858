//! The bundled model's evaluation.

use std::path::Path;

use baton_loadgen::evaluation;
use serde_json::Value;

/// The folder of the bundled model.
pub const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/abacus");

/// The rows of one of its files.
pub fn rows(name: &str) -> Vec<Value> {
    evaluation::rows(&Path::new(MODEL).join(name)).expect(name)
}
