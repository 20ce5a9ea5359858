//! What an output can be asked to be.

use serde_json::Value;

/// What an output must be.
#[derive(Debug, Clone, PartialEq)]
pub enum Spec {
    /// Anything: for an output of which only the thinking is bounded.
    Any,
    /// Any JSON object.
    JsonObject,
    /// JSON that a JSON Schema accepts.
    JsonSchema(Value),
    /// What a regular expression matches from its first to its last character.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// What a grammar derives: llguidance's Lark, or GBNF/EBNF, which is told by its `::=`.
    Grammar(String),
    /// Free text, in which each trigger begins one of the structures.
    StructuralTag {
        /// At most one structure for each pair of begin and end.
        structures: Vec<Structure>,
        /// Texts that do not occur outside structures. Each structure's `begin` starts with one of them.
        triggers: Vec<String>,
    },
    /// Calls of tools.
    Tools {
        /// How the model writes calls.
        frame: ToolFrame,
        /// What may be called, in the request's order.
        tools: Vec<Tool>,
        /// Whether something is called.
        choice: ToolChoice,
        /// More than one call may be made.
        parallel: bool,
    },
}

/// A part of an output with a structure of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct Structure {
    /// Text before it.
    pub begin: String,
    /// JSON Schema of what is between.
    pub schema: Value,
    /// Text behind it.
    pub end: String,
}

/// Something that a model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name: letters, digits and `_-.`.
    pub name: String,
    /// JSON Schema of its arguments.
    pub parameters: Value,
    /// The arguments must be what the schema accepts; else they are any JSON object.
    pub strict: bool,
}

/// Whether an output has calls.
#[derive(Debug, Clone, PartialEq)]
pub enum ToolChoice {
    /// The model decides: any text, or what `otherwise` says, without a call; or text and then calls.
    Auto {
        /// What an output without a call must be.
        otherwise: Option<Box<Spec>>,
    },
    /// At least one call, and nothing else.
    Required,
    /// Calls of the tool of this name, and nothing else.
    Named(String),
}

/// How a model writes calls: `begin (call (between call)*) end`, where a call is
/// `before_name NAME before_arguments ARGUMENTS after_arguments`, and arguments are JSON.
///
/// With [`ToolChoice::Auto`] text goes before, and the first literal of `begin`, or of `before_name` if `begin` has none,
/// is what tells a call from text; so it does not occur in text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToolFrame {
    /// Before the first call.
    pub begin: Vec<Literal>,
    /// Before the name of a tool.
    pub before_name: Vec<Literal>,
    /// Between the name and the arguments.
    pub before_arguments: Vec<Literal>,
    /// Behind the arguments.
    pub after_arguments: Vec<Literal>,
    /// Between a call and the next.
    pub between: Vec<Literal>,
    /// Behind the last call.
    pub end: Vec<Literal>,
}

/// Something that stands in an output as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Literal {
    /// A text, in any tokens.
    Text(String),
    /// The token of this id, which the vocabulary knows as [`Token::Control`](crate::Token::Control).
    Token(u32),
}
