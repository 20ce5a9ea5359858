//! What an output is asked to be: a schema, a regular expression or a grammar, told by the first byte; then an output.

use baton_grammar::{Compiler, Limits, Spec, Token, Vocabulary};

/// Tokens of the output.
const MOST: usize = 24;

pub fn run(data: &[u8]) -> bool {
    let Some((&kind, text)) = data.split_first() else { return false };
    let Ok(text) = std::str::from_utf8(text) else { return false };
    let spec = match kind {
        b's' => match serde_json::from_str(text) {
            Ok(schema) => Spec::JsonSchema(schema),
            Err(_) => return false,
        },
        b'r' => Spec::Regex(text.into()),
        b'g' => Spec::Grammar(text.into()),
        _ => return false,
    };
    let mut tokens: Vec<Token> = (0..=255).map(|byte| Token::Text(vec![byte])).collect();
    tokens.push(Token::Control("<|end|>".into()));
    tokens.extend(["{\"", "\":", "true", "  ", "ab"].map(|text| Token::Text(text.into())));
    let compiler = Compiler::new(Vocabulary::new(tokens), Limits::default());
    let Ok(grammar) = compiler.compile(&spec, None) else { return false };
    let mut constraint = grammar.begin(&[256]);
    for step in 0..MOST {
        let Ok(masks) = constraint.masks(&[]) else { break };
        let allowed: Vec<u32> = masks[0].as_ref().expect("restricted").ids().collect();
        assert!(!allowed.is_empty(), "a mask allows something");
        // Every other token the last, which is a long one.
        let token = allowed[if step % 2 == 0 { 0 } else { allowed.len() - 1 }];
        if token == 256 || constraint.accept(token).is_err() {
            break;
        }
    }
    true
}
