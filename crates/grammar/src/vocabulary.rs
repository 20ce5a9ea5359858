//! The tokens of a model, in the form in which grammars walk them.

use std::sync::Arc;

use toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

/// What a token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// These bytes of a text; none for a token without a text, which no grammar ever allows.
    Text(Vec<u8>),
    /// Itself, under this name: it never matches a text, and is allowed only where a grammar asks for it.
    Control(String),
}

/// Longest text of a token that is ever allowed, in bytes; the trie's nodes cannot lie deeper.
const MAX_TOKEN_BYTES: usize = 1000;

/// Begins the words of control tokens in the trie. No UTF-8 has this byte.
const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// The word of the end of an output.
const END: &[u8] = b"\xff<|end of the output|>";

/// The tokens of a model by id.
#[derive(Clone)]
pub struct Vocabulary {
    env: TokEnv,
    /// Texts of all tokens; of a control token its name.
    pub(crate) texts: Arc<[Box<[u8]>]>,
}

impl Vocabulary {
    /// The tokens from id 0 on.
    pub fn new(tokens: impl IntoIterator<Item = Token>) -> Self {
        let (mut words, mut texts) = (Vec::new(), Vec::new());
        for token in tokens {
            let (word, text) = match token {
                Token::Text(text) if text.len() <= MAX_TOKEN_BYTES && text.first() != Some(&MARKER) => {
                    (text.clone(), text)
                }
                Token::Text(text) => (Vec::new(), text),
                Token::Control(name) => {
                    let mut word = vec![MARKER];
                    word.extend(name.bytes().take(MAX_TOKEN_BYTES));
                    (word, name.into_bytes())
                }
            };
            words.push(word);
            texts.push(text.into_boxed_slice());
        }
        // The tokens that end an output are known per request only. In the trie one more id stands for them.
        words.push(END.to_vec());
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, texts.len() as u32), &words);
        Self { env: Arc::new(Env(trie)), texts: texts.into() }
    }

    /// Number of ids.
    pub fn size(&self) -> usize {
        self.texts.len()
    }

    pub(crate) fn env(&self) -> &TokEnv {
        &self.env
    }
}

/// A token environment that never forces a tokenisation: the model chooses among all that the grammar allows.
struct Env(TokTrie);

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(text)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}
