//! The inputs of the fuzz targets `template` and `tokenizer`, kept in `crates/fuzz/corpus`.

#[path = "../../fuzz/inputs/parts.rs"]
mod parts;
#[path = "../../fuzz/inputs/replay.rs"]
mod replay;
#[path = "../../fuzz/inputs/template.rs"]
mod template;
#[path = "../../fuzz/inputs/tokenizer.rs"]
mod tokenizer;

use replay::replay;

#[test]
fn templates_never_panic() {
    replay("template", template::run);
}

#[test]
fn tokenizers_never_panic() {
    replay("tokenizer", tokenizer::run);
}
