//! Why something asked for is refused.

/// A [`Spec`](crate::Spec) that is not compiled. The texts say what would have been accepted and never repeat what was
/// asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It is not what it claims to be.
    #[error("{0}")]
    Invalid(String),
    /// It is more than a limit allows.
    #[error("{0}")]
    TooLarge(String),
    /// No output satisfies it.
    #[error("no output can satisfy it")]
    Unsatisfiable,
    /// A tool's parameters are at fault.
    #[error("the parameters of tool {index} are refused: {reason}")]
    Tool {
        /// The tool's place in the list, from 0.
        index: usize,
        /// What is wrong with them.
        reason: Box<GrammarError>,
    },
}
