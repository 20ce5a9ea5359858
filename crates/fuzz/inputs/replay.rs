//! Replays a target's kept inputs: none may panic, and those named `seed-` are still read, so that the others are near
//! something that is.

use std::fs;
use std::path::Path;

pub fn replay(target: &str, run: fn(&[u8]) -> bool) {
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
