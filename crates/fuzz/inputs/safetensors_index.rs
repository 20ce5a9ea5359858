//! `config.json`, `model.safetensors.index.json` and three shards. Without an index the first shard is the only file.
//!
//! A shard that begins with `{` is a header up to the first newline, then data: it gets its length in front here, or
//! hardly any mutation would come past it. Another is taken as it is.

use super::{checkpoint, parts};
use std::fs;

pub fn run(data: &[u8]) -> bool {
    let [config, index, shards @ ..] = parts::split::<5>(data);
    let Ok(folder) = tempfile::tempdir() else { return false };
    let write = |name: &str, content: &[u8]| fs::write(folder.path().join(name), content).expect("a temporary file");
    write("config.json", config);
    let names = match index {
        [] => ["model.safetensors", "b.safetensors", "c.safetensors"],
        index => {
            write("model.safetensors.index.json", index);
            ["a.safetensors", "b.safetensors", "c.safetensors"]
        }
    };
    for (name, shard) in names.into_iter().zip(shards) {
        let header = shard.iter().position(|b| *b == b'\n').filter(|_| shard.starts_with(b"{"));
        match header {
            Some(len) => write(name, &[&(len as u64).to_le_bytes(), &shard[..len], &shard[len + 1..]].concat()),
            None if shard.is_empty() => {}
            None => write(name, shard),
        }
    }
    checkpoint::run(folder.path())
}
