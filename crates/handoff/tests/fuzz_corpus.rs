//! The inputs of the fuzz target `manifest`, kept in `crates/fuzz/corpus`.

#[path = "../../fuzz/inputs/manifest.rs"]
mod manifest;
#[path = "../../fuzz/inputs/parts.rs"]
mod parts;
#[path = "../../fuzz/inputs/replay.rs"]
mod replay;

#[test]
fn manifests_never_panic() {
    replay::replay("manifest", manifest::run);
}
