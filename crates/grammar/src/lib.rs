//! Constraints on outputs: what a request asks for ([`Spec`]) becomes a [`Grammar`](baton_model::Grammar) of the engine.
//!
//! A [`Compiler`] belongs to a vocabulary. Everything here may take as long as its limits allow, so nothing of it is
//! called where a step or a connection waits.

mod compiler;
mod constraint;
mod error;
mod finite;
mod gbnf;
mod lark;
mod limits;
mod regex;
mod schema;
mod spec;
mod thinking;
mod vocabulary;

pub use baton_model::Grammar;
pub use compiler::Compiler;
pub use error::GrammarError;
pub use limits::Limits;
pub use spec::{Literal, Spec, Structure, Tool, ToolChoice, ToolFrame};
pub use thinking::Thinking;
pub use vocabulary::{Token, Vocabulary};
