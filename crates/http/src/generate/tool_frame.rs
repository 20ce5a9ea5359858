//! How each syntax writes calls, for a grammar to demand it. The splitters of `baton_text` read all of it.

use baton_grammar::{Literal, ToolFrame};
use baton_text::{TextModel, ToolSyntax};

/// The frame of a model's calls.
pub(super) fn tool_frame(syntax: ToolSyntax, text: &TextModel) -> ToolFrame {
    // A marker is its token where that is special, since no other tokens spell it then.
    let marker = |marker: &str| match text.token_id(marker).filter(|&id| text.is_special(id)) {
        Some(id) => Literal::Token(id),
        None => spelled(marker),
    };
    let known = |name: &str| text.token_id(name).is_some().then(|| marker(name));
    match syntax {
        ToolSyntax::DeepseekV3 => ToolFrame {
            begin: known("<｜tool▁calls▁begin｜>").into_iter().collect(),
            before_name: vec![marker("<｜tool▁call▁begin｜>"), spelled("function"), marker("<｜tool▁sep｜>")],
            before_arguments: vec![spelled("\n```json\n")],
            after_arguments: vec![spelled("\n```"), marker("<｜tool▁call▁end｜>")],
            between: vec![spelled("\n")],
            end: known("<｜tool▁calls▁end｜>").into_iter().collect(),
        },
        ToolSyntax::DeepseekV31 => ToolFrame {
            begin: known("<｜tool▁calls▁begin｜>").into_iter().collect(),
            before_name: vec![marker("<｜tool▁call▁begin｜>")],
            before_arguments: vec![marker("<｜tool▁sep｜>")],
            after_arguments: vec![marker("<｜tool▁call▁end｜>")],
            between: Vec::new(),
            end: known("<｜tool▁calls▁end｜>").into_iter().collect(),
        },
        ToolSyntax::Hermes => ToolFrame {
            begin: Vec::new(),
            before_name: vec![marker("<tool_call>"), spelled("\n{\"name\": \"")],
            before_arguments: vec![spelled("\", \"arguments\": ")],
            after_arguments: vec![spelled("}\n"), marker("</tool_call>")],
            between: vec![spelled("\n")],
            end: Vec::new(),
        },
        ToolSyntax::Llama3Json => ToolFrame {
            begin: Vec::new(),
            before_name: vec![spelled("{\"name\": \"")],
            before_arguments: vec![spelled("\", \"parameters\": ")],
            after_arguments: vec![spelled("}")],
            between: vec![spelled("; ")],
            end: Vec::new(),
        },
        // The newer form has a marker of its own behind the name.
        ToolSyntax::Mistral => match known("[ARGS]") {
            Some(arguments) => ToolFrame {
                before_name: vec![marker("[TOOL_CALLS]")],
                before_arguments: vec![arguments],
                ..ToolFrame::default()
            },
            None => ToolFrame {
                begin: vec![marker("[TOOL_CALLS]"), spelled("[")],
                before_name: vec![spelled("{\"name\": \"")],
                before_arguments: vec![spelled("\", \"arguments\": ")],
                after_arguments: vec![spelled("}")],
                between: vec![spelled(", ")],
                end: vec![spelled("]")],
            },
        },
    }
}

fn spelled(text: &str) -> Literal {
    Literal::Text(text.to_owned())
}
