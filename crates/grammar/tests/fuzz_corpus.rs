//! The inputs of the fuzz target `grammar`, kept in `crates/fuzz/corpus`.

#[path = "../../fuzz/inputs/grammar.rs"]
mod grammar;
#[path = "../../fuzz/inputs/replay.rs"]
mod replay;

#[test]
fn grammars_never_panic() {
    replay::replay("grammar", grammar::run);
}
