//! The bundled model's evaluation.

use std::{fs, path::Path};

use serde_json::Value;

/// The folder of the bundled model.
pub const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/abacus");

/// The rows of one of its files.
pub fn rows(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(Path::new(MODEL).join(name)).expect(name);
    text.lines().map(|l| serde_json::from_str(l).expect("one JSON object per line")).collect()
}
