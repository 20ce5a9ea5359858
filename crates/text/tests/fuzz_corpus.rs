//! The inputs of the fuzz targets `template` and `tokenizer`, kept in `crates/fuzz/corpus`: none makes a
//! panic, and those named `seed-` are still read, so that the others are near something that is.

#[path = "../../fuzz/inputs/parts.rs"]
mod parts;
#[path = "../../fuzz/inputs/template.rs"]
mod template;
#[path = "../../fuzz/inputs/tokenizer.rs"]
mod tokenizer;

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
fn templates_never_panic() {
    replay("template", template::run);
}

#[test]
fn tokenizers_never_panic() {
    replay("tokenizer", tokenizer::run);
}
