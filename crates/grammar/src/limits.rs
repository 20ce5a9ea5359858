//! What a compiler spends at most.

use llguidance::api::ParserLimits;

/// Bounds on what is compiled, and on what is kept of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Longest text of a schema, a regular expression, a grammar, or of all choices together, in bytes.
    pub spec_bytes: usize,
    /// Deepest nesting of a schema or of a regular expression's groups.
    pub depth: usize,
    /// Most schemas within a schema: properties, items, alternatives.
    pub schemas: usize,
    /// Most values of one `enum`, and most choices.
    pub values: usize,
    /// Longest regular expression, also as a schema's `pattern`, in bytes.
    pub regex_bytes: usize,
    /// Largest number in a repetition or in a schema's counts: `{1000}`, `maxItems`.
    pub repetitions: u64,
    /// Most tools.
    pub tools: usize,
    /// Compiled grammars that are kept for requests to come.
    pub cached: usize,
    /// What they hold, in bytes, estimated from their size.
    pub cached_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            spec_bytes: 128 << 10,
            depth: 32,
            schemas: 2000,
            values: 1000,
            regex_bytes: 4096,
            repetitions: 10_000,
            tools: 128,
            cached: 256,
            cached_bytes: 64 << 20,
        }
    }
}

/// What the parser spends on one grammar and on one mask.
pub(crate) fn parser_limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        initial_lexer_fuel: 500_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_lexer_states: 50_000,
        max_grammar_size: 100_000,
        precompute_large_lexemes: false,
        // Its errors would repeat the client's words.
        verbose_errors: false,
    }
}
