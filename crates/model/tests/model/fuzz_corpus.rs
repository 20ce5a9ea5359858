//! The inputs of the fuzz targets `safetensors_index`, `gguf` and `config`, kept in `crates/fuzz/corpus`.

#[path = "../../../fuzz/inputs/checkpoint.rs"]
mod checkpoint;
#[path = "../../../fuzz/inputs/config.rs"]
mod config;
#[path = "../../../fuzz/inputs/gguf.rs"]
mod gguf;
#[path = "../../../fuzz/inputs/parts.rs"]
mod parts;
#[path = "../../../fuzz/inputs/replay.rs"]
mod replay;
#[path = "../../../fuzz/inputs/safetensors_index.rs"]
mod safetensors_index;

use replay::replay;

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
