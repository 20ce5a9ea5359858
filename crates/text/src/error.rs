//! What can go wrong with a checkpoint's text files or with a chat. No message repeats text of a request.

/// An error of this crate. Those before [`TextError::TemplateRaised`] condemn the checkpoint at load; the rest concern
/// one request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The vocabulary is damaged, or of a kind that is not read.
    #[error("the tokenizer cannot be read: {0}")]
    Tokenizer(String),
    /// One of the other files is not JSON or holds a value of the wrong kind.
    #[error("{file} cannot be read: {reason}")]
    File {
        /// Name of the file in the checkpoint.
        file: &'static str,
        /// What was found, or where the JSON ends to be JSON.
        reason: String,
    },
    /// The chat template is longer than [`crate::MAX_TEMPLATE_BYTES`].
    #[error("the chat template has {bytes} bytes; at most {max} are accepted")]
    TemplateTooLarge {
        /// Length of the template's source.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The chat template is not a Jinja template.
    #[error("the chat template does not parse: line {line}: {reason}")]
    TemplateSyntax {
        /// Line in the template's source, from 1.
        line: usize,
        /// The parser's complaint.
        reason: String,
    },
    /// The model cannot have the tool syntax that is asked for.
    #[error("the model has no token {token:?}, which calls of tools by {syntax} need")]
    ToolSyntax {
        /// The syntax's name.
        syntax: &'static str,
        /// The token.
        token: &'static str,
    },
    /// The template called `raise_exception`: it refuses this chat, and says why.
    #[error("the chat template refuses this chat: {0}")]
    TemplateRaised(String),
    /// The template failed on this chat, for example on a field that a message lacks.
    #[error("the chat template failed on this chat: line {line}: {reason}")]
    TemplateFailed {
        /// Line in the template's source, from 1; 0 if unknown.
        line: usize,
        /// The kind of failure.
        reason: String,
    },
    /// The template ran too long, recursed too deep or wrote too much.
    #[error("the chat template exceeds its limit of {0}")]
    TemplateLimit(&'static str),
    /// The checkpoint has no chat template.
    #[error("the model has no chat template; use completions with a plain prompt")]
    NoChatTemplate,
    /// The chat has tools and the model cannot be told of them.
    #[error("the model's chat template does not take tools; another can be given by --chat-template")]
    ToolsNotShown,
    /// The chat has tools, and it is not known how the model calls them.
    #[error("it is not known how the model calls tools; --tool-call-parser can say it")]
    NoToolSyntax,
    /// `continue_final_message` cannot be met.
    #[error("continue_final_message: {0}")]
    ContinueFinalMessage(&'static str),
    /// The text cannot be encoded.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
}
