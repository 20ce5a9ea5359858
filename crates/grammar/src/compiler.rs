//! [`Compiler`]: from what is asked for to grammars, within limits, and those that were asked for before at once.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use baton_model::Grammar;
use llguidance::{Matcher, ParserFactory};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use toktrie::InferenceCapabilities;

use crate::constraint::Compiled;
use crate::limits::parser_limits;
use crate::spec::{Spec, Tool, ToolChoice};
use crate::thinking::{Closing, Thinking, Thoughtful};
use crate::{GrammarError, Limits, Vocabulary, lark};

/// Stack of a thread that compiles: rules are followed by recursion, within the limits' depths.
const STACK_BYTES: usize = 64 << 20;

/// Compiles for one vocabulary.
pub struct Compiler {
    vocabulary: Vocabulary,
    factory: ParserFactory,
    limits: Limits,
    cache: Mutex<Cache>,
    /// What closes thinking; a model has one such token.
    closing: Mutex<Option<Arc<Closing>>>,
}

impl Compiler {
    /// A compiler for this vocabulary. Takes as long as sorting the vocabulary some times.
    pub fn new(vocabulary: Vocabulary, limits: Limits) -> Self {
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(vocabulary.env(), InferenceCapabilities::default(), &slices)
            .expect("the slices are the library's own");
        factory.quiet();
        *factory.limits_mut() = parser_limits();
        Self { vocabulary, factory, limits, cache: Mutex::default(), closing: Mutex::default() }
    }

    /// The grammar of what is asked for. With `thinking` it begins behind the thinking.
    ///
    /// # Errors
    /// A [`GrammarError`] that says what would have been accepted.
    pub fn compile(&self, spec: &Spec, thinking: Option<Thinking>) -> Result<Arc<dyn Grammar>, GrammarError> {
        let answer = self.answer(spec)?;
        Ok(match (answer, thinking) {
            (Some(answer), None) => answer,
            (answer, Some(thinking)) => {
                let closing = self.closing(&thinking);
                Arc::new(Thoughtful::new(answer, thinking, closing))
            }
            (None, None) => Arc::new(crate::constraint::Unbounded),
        })
    }

    /// `None` for anything.
    fn answer(&self, spec: &Spec) -> Result<Option<Arc<Compiled>>, GrammarError> {
        let text = format!("{spec:?}");
        let key: Key = Sha256::digest(text.as_bytes()).into();
        if let Some(known) = self.cache.lock().get(&key) {
            return Ok(Some(known));
        }
        let Some(compiled) = self.on_deep_stack(spec)? else { return Ok(None) };
        let compiled = Arc::new(compiled);
        // A grammar's rules and the states of its lexer, by measurement well below this.
        let bytes = 16_384 + 64 * text.len();
        self.cache.lock().insert(key, compiled.clone(), bytes, &self.limits);
        Ok(Some(compiled))
    }

    /// Recursion over what a client has written must not meet the end of a small stack.
    fn on_deep_stack(&self, spec: &Spec) -> Result<Option<Compiled>, GrammarError> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES);
            let compile = thread.spawn_scoped(scope, || self.fresh(spec));
            let busy = || GrammarError::TooLarge("there is no memory to compile a grammar now".into());
            compile.map_err(|_| busy())?.join().unwrap_or_else(|_| Err(generic(spec)))
        })
    }

    fn fresh(&self, spec: &Spec) -> Result<Option<Compiled>, GrammarError> {
        let Some(grammar) = lark::grammar(spec, &self.limits)? else { return Ok(None) };
        let matcher = Matcher::new(self.factory.create_parser(grammar));
        match matcher.get_error() {
            None => Compiled::new(matcher, self.vocabulary.size(), || generic(spec)).map(Some),
            Some(message) => Err(self.blame(spec, &message)),
        }
    }

    /// Which tool's parameters are at fault, if any's are.
    fn blame(&self, spec: &Spec, message: &str) -> GrammarError {
        let Spec::Tools { tools, choice, .. } = spec else { return refusal(spec, message) };
        let asked = |tool: &Tool| tool.strict && !matches!(choice, ToolChoice::Named(name) if *name != tool.name);
        for (index, tool) in tools.iter().enumerate().filter(|(_, tool)| asked(tool)) {
            if let Err(reason) = self.fresh(&Spec::JsonSchema(tool.parameters.clone())) {
                return GrammarError::Tool { index, reason: Box::new(reason) };
            }
        }
        refusal(spec, message)
    }

    fn closing(&self, thinking: &Thinking) -> Arc<Closing> {
        let mut known = self.closing.lock();
        match &*known {
            Some(closing) if closing.is_of(thinking) => closing.clone(),
            _ => {
                let closing = Arc::new(Closing::new(&self.vocabulary, thinking));
                *known = Some(closing.clone());
                closing
            }
        }
    }
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiler").field("vocabulary", &self.vocabulary.size()).finish_non_exhaustive()
    }
}

/// The library's words, which repeat the client's, as ours.
fn refusal(spec: &Spec, message: &str) -> GrammarError {
    let has = |words: &[&str]| words.iter().any(|word| message.contains(word));
    if has(&["Unsatisfiable", "unsatisfiable", "NoExtension"]) {
        return GrammarError::Unsatisfiable;
    }
    if has(&["too large", "too big", "too complex", "limit", "fuel", "exceeded", "Too many"]) {
        return GrammarError::TooLarge("what is asked for is too complex to be compiled".into());
    }
    if matches!(spec, Spec::JsonSchema(_)) {
        let known = [
            ("oneOf", "oneOf of a JSON Schema needs alternatives that evidently exclude each other; anyOf does not"),
            (
                "min/maxProperties",
                "minProperties and maxProperties of a JSON Schema need all of its properties to be required",
            ),
            ("ormat", "format of a JSON Schema must be one that JSON Schema 2020-12 defines"),
            ("ultipleOf", "multipleOf of a JSON Schema must be above 0 and at most 4294967295, with few digits"),
        ];
        if let Some((_, message)) = known.iter().find(|(word, _)| message.contains(word)) {
            return GrammarError::Invalid((*message).into());
        }
    }
    generic(spec)
}

fn generic(spec: &Spec) -> GrammarError {
    GrammarError::Invalid(
        match spec {
            Spec::Regex(_) => {
                "the regular expression must be valid in the syntax of Rust's regex crate; anchors within it, word \
                 boundaries, look-around and back-references are not supported"
            }
            Spec::Grammar(_) => {
                "the grammar must be valid: Lark as llguidance reads it, with a rule start, or GBNF, with a rule root"
            }
            Spec::JsonSchema(_) => "the JSON Schema must be valid, with $refs that can be resolved within it",
            _ => "what is asked for cannot be compiled: its schemas, regular expressions and texts must be valid",
        }
        .into(),
    )
}

type Key = [u8; 32];

/// Compiled grammars by what they were compiled from; the one used longest ago goes first.
#[derive(Default)]
struct Cache {
    entries: HashMap<Key, Entry>,
    bytes: usize,
    clock: u64,
}

struct Entry {
    compiled: Arc<Compiled>,
    bytes: usize,
    used: u64,
}

impl Cache {
    fn get(&mut self, key: &Key) -> Option<Arc<Compiled>> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used = self.clock;
        Some(entry.compiled.clone())
    }

    fn insert(&mut self, key: Key, compiled: Arc<Compiled>, bytes: usize, limits: &Limits) {
        self.remove(key);
        while !self.entries.is_empty()
            && (self.entries.len() >= limits.cached || self.bytes + bytes > limits.cached_bytes)
        {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| *key);
            self.remove(oldest.expect("not empty"));
        }
        if limits.cached > 0 && bytes <= limits.cached_bytes {
            self.bytes += bytes;
            self.entries.insert(key, Entry { compiled, bytes, used: self.clock });
        }
    }

    fn remove(&mut self, key: Key) {
        if let Some(entry) = self.entries.remove(&key) {
            self.bytes -= entry.bytes;
        }
    }
}
