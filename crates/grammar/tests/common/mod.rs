//! A small vocabulary, and outputs drawn from grammars at random.

#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::LazyLock;

use baton_grammar::{Compiler, Limits, Spec, Thinking, Token, Vocabulary};
use baton_model::{Constraint, TokenMask};

pub const END: u32 = 256;
pub const OPEN: u32 = 257;
pub const CLOSE: u32 = 258;
pub const CALL: u32 = 259;
pub const END_CALL: u32 = 260;

const CONTROLS: [&str; 5] = ["<|end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"];
const CHUNKS: [&str; 40] = [
    "{\"", "\":", "\": ", "\",", "\", \"", "\"}", "}}", "]}", "[[", "[\"", "\"]", "true", "false", "null", "12", "345",
    "0.", "1e", "-1", "ab", "the", " the", "name", "\"name", "  ", "\n", "\n\n", "é", "日本", "\\\"", "\\n", "\\u00",
    "<th", "ink", "</", "think>", "a1", "x\"", "foo", "bar",
];

/// One token for each byte, the controls, and chunks of several bytes.
pub fn tokens() -> Vec<Token> {
    let bytes = (0..=255).map(|byte| Token::Text(vec![byte]));
    let controls = CONTROLS.iter().map(|name| Token::Control((*name).into()));
    bytes.chain(controls).chain(CHUNKS.iter().map(|chunk| Token::Text(chunk.as_bytes().to_vec()))).collect()
}

pub static COMPILER: LazyLock<Compiler> = LazyLock::new(|| Compiler::new(Vocabulary::new(tokens()), Limits::default()));

static TOKENS: LazyLock<Vec<Token>> = LazyLock::new(tokens);

/// Bytes of tokens as an output shows them; control tokens by their names.
pub fn text(ids: &[u32]) -> Vec<u8> {
    let shown = |&id: &u32| match &TOKENS[id as usize] {
        Token::Text(text) => text.clone(),
        Token::Control(name) => name.clone().into_bytes(),
    };
    ids.iter().flat_map(shown).collect()
}

/// The ids of a text, one for each byte, and of the controls in it.
pub fn ids(text: &str) -> Vec<u32> {
    let (mut ids, mut rest) = (Vec::new(), text);
    while let Some(&byte) = rest.as_bytes().first() {
        let control = CONTROLS.iter().position(|name| rest.starts_with(name));
        ids.push(control.map_or(u32::from(byte), |at| END + at as u32));
        match control {
            Some(at) => rest = &rest[CONTROLS[at].len()..],
            None if rest.is_char_boundary(1) => rest = &rest[1..],
            None => {
                let c = rest.chars().next().expect("not empty");
                ids.pop();
                ids.extend(c.to_string().bytes().map(u32::from));
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    ids
}

pub fn begin(spec: &Spec, thinking: Option<Thinking>) -> Box<dyn Constraint> {
    COMPILER.compile(spec, thinking).unwrap_or_else(|error| panic!("{error}: {spec:?}")).begin(&[END])
}

/// What may follow.
pub fn mask(constraint: &mut dyn Constraint) -> Option<TokenMask> {
    constraint.masks(&[]).expect("a mask").remove(0)
}

/// How many of these tokens are taken, each as far as its mask allows.
pub fn taken(constraint: &mut dyn Constraint, ids: &[u32]) -> usize {
    let allowed = |id: &&u32| {
        let fits = mask(constraint).is_none_or(|mask| mask.allows(**id));
        if fits {
            constraint.accept(**id).expect("it was allowed");
        }
        fits
    };
    ids.iter().take_while(allowed).count()
}

/// Whether a text is an output of the grammar, token by token and with the end behind it.
pub fn accepts(spec: &Spec, text: &str) -> bool {
    let ids = ids(text);
    let mut constraint = begin(spec, None);
    taken(&mut *constraint, &ids) == ids.len() && mask(&mut *constraint).is_none_or(|mask| mask.allows(END))
}

/// Numbers from a seed.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

/// Draws an output, with a bias to what ends it; `None` if it is not complete after so many tokens.
pub fn draw(constraint: &mut dyn Constraint, random: &mut Random, most: usize) -> Option<Vec<u32>> {
    let mut output = Vec::new();
    for step in 0..most {
        let mask = mask(constraint).expect("these grammars always restrict");
        let allowed: Vec<u32> = mask.ids().collect();
        assert!(!allowed.is_empty(), "nothing may follow {:?}", String::from_utf8_lossy(&text(&output)));
        let closing = |id: &&u32| matches!(u8::try_from(**id).ok(), Some(b'"' | b'}' | b']' | b'0'..=b'9'));
        let closers: Vec<u32> = allowed.iter().filter(closing).copied().collect();
        let hurry = step > most / 4 || random.below(4) == 0;
        let token = match () {
            () if mask.allows(END) && (hurry || random.below(3) == 0) => END,
            () if hurry && !closers.is_empty() => closers[random.below(closers.len())],
            () => allowed[random.below(allowed.len())],
        };
        constraint.accept(token).expect("it was allowed");
        if token == END {
            return Some(output);
        }
        output.push(token);
    }
    None
}
