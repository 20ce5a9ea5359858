//! The inputs of the fuzz targets `safetensors_index`, `gguf` and `config`, kept in `crates/fuzz/corpus`: none makes a
//! panic, and those named `seed-` are still read, so that the others are near something that is.

#[path = "../../fuzz/inputs/checkpoint.rs"]
mod checkpoint;
#[path = "../../fuzz/inputs/config.rs"]
mod config;
#[path = "../../fuzz/inputs/gguf.rs"]
mod gguf;
#[path = "../../fuzz/inputs/parts.rs"]
mod parts;
#[path = "../../fuzz/inputs/safetensors_index.rs"]
mod safetensors_index;

use std::{fs, path::Path};

fn replay(target: &str, run: fn(&[u8]) -> bool) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut seeds = 0;
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        let read = run(&fs::read(entry.path()).unwrap());
        if name.starts_with("seed-") {
            assert!(read, "{target}: {name} is refused");
            seeds += 1;
        }
    }
    assert!(seeds > 0);
}

#[test]
fn safetensors_and_their_index_never_panic() {
    replay("safetensors_index", safetensors_index::run);
}

#[test]
fn gguf_files_never_panic() {
    replay("gguf", gguf::run);
}

#[test]
fn configs_never_panic() {
    replay("config", config::run);
}
