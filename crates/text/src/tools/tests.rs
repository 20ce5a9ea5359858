//! The splitter on each syntax: what models write well, what they write badly, and any way to cut it.

use proptest::prelude::*;
use serde_json::Value;

use super::{ToolSplitter, ToolSyntax};
use crate::Segment;
use crate::testing::cut;

use ToolSyntax::{DeepseekV3, DeepseekV31, Hermes, Llama3Json, Mistral};

const NAMES: [&str; 3] = ["add", "get_weather", "no-op"];

/// Content, and name and arguments of each call.
type Split = (String, Vec<(String, String)>);

fn splitter(syntax: ToolSyntax, single: bool) -> ToolSplitter {
    ToolSplitter::new(syntax, NAMES.map(str::to_owned).into(), single)
}

/// All segments, those of one kind that touch joined.
fn segments(mut splitter: ToolSplitter, pieces: &[&str]) -> Vec<Segment> {
    let mut all: Vec<Segment> = pieces.iter().flat_map(|piece| splitter.push(piece)).collect();
    all.extend(splitter.flush());
    let mut joined: Vec<Segment> = Vec::new();
    for segment in all {
        match (joined.last_mut(), segment) {
            (Some(Segment::Content(all)), Segment::Content(more)) => all.push_str(&more),
            (Some(Segment::Arguments { index, text }), Segment::Arguments { index: same, text: more }) => {
                assert_eq!(*index, same, "the arguments of a call stand together");
                text.push_str(&more);
            }
            (_, segment) => joined.push(segment),
        }
    }
    joined
}

fn joined(segments: &[Segment]) -> Split {
    let (mut content, mut calls) = (String::new(), Vec::new());
    for segment in segments {
        match segment {
            Segment::Content(text) => content.push_str(text),
            Segment::Call { index, name } => {
                assert_eq!(*index, calls.len(), "calls are numbered in order");
                calls.push((name.clone(), String::new()));
            }
            Segment::Arguments { index, text } => {
                assert_eq!(*index + 1, calls.len(), "arguments follow their call");
                calls[*index].1.push_str(text);
            }
            Segment::Reasoning(_) => panic!("reasoning is split before"),
        }
    }
    (content, calls)
}

fn split(syntax: ToolSyntax, text: &str) -> Split {
    joined(&segments(splitter(syntax, false), &[text]))
}

/// A call in a syntax, and what stands before, between and behind calls of one answer.
fn write(syntax: ToolSyntax, calls: &[(&str, &str)]) -> String {
    let texts = calls.iter().map(|(name, arguments)| match syntax {
        DeepseekV3 => {
            format!("<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>")
        }
        DeepseekV31 => format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"),
        Hermes => format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>"),
        Llama3Json => format!("{{\"name\": \"{name}\", \"parameters\": {arguments}}}"),
        Mistral => format!("{{\"name\": \"{name}\", \"arguments\": {arguments}}}"),
    });
    let texts: Vec<String> = texts.collect();
    match syntax {
        DeepseekV3 | DeepseekV31 => format!("<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>", texts.join("\n")),
        Hermes => texts.join("\n"),
        Llama3Json => texts.join("; "),
        Mistral => format!("[TOOL_CALLS] [{}]", texts.join(", ")),
    }
}

fn call(name: &str, arguments: &str) -> (String, String) {
    (name.into(), arguments.into())
}

/// Arguments that tempt a parser: markers, brackets and escapes in strings, and odd spacing.
const TRICKY: [&str; 8] = [
    "{}",
    r#"{"a": 1, "b": [2, {"c": null}]}"#,
    r#"{"s": "</tool_call> <｜tool▁call▁end｜> ``` [TOOL_CALLS] ; ] }}"}"#,
    r#"{"s": "\"}\\", "t": "\\\"{", "é": "你好 \u00e9 \ud83d\ude00"}"#,
    "{\n  \"name\": \"add\",\n  \"arguments\": {\"x\": -1.5e3}\n}",
    r#"{ "nested": {"name": "x", "parameters": {"deep": [[[]]]}} }"#,
    r#"{"s": "<tool_call>\n{\"name\": \"add\", \"arguments\": {}}\n</tool_call>"}"#,
    "{\"s\":\"<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\\n```json\\n{}\"}",
];

#[test]
fn calls_come_out_with_their_arguments_as_they_were_written() {
    for syntax in ToolSyntax::ALL {
        for arguments in TRICKY {
            let text = write(syntax, &[("get_weather", arguments)]);
            assert_eq!(split(syntax, &text), (String::new(), vec![call("get_weather", arguments)]), "{text}");
            let text = write(syntax, &[("add", arguments), ("no-op", "{}"), ("add", arguments)]);
            let calls = vec![call("add", arguments), call("no-op", "{}"), call("add", arguments)];
            assert_eq!(split(syntax, &text), (String::new(), calls), "{text}");
        }
    }
}

#[test]
fn text_around_calls_is_content_without_the_space_that_touches_them() {
    for syntax in [DeepseekV3, DeepseekV31, Hermes, Mistral] {
        let text = format!("Let me\n see. \n\n{}\n\nDone  now. \n", write(syntax, &[("add", "{}"), ("add", "{}")]));
        let calls = vec![call("add", "{}"), call("add", "{}")];
        assert_eq!(split(syntax, &text), ("Let me\n see.Done  now. \n".into(), calls), "{text}");
    }
}

#[test]
fn an_answer_without_calls_is_content() {
    for syntax in ToolSyntax::ALL {
        for text in ["", " \n", "No call.", "  a < b [x] {y} ``` \n", "<tool", "<｜tool▁call", "[TOOL_C", "é你"] {
            assert_eq!(split(syntax, text), (text.into(), Vec::new()), "{syntax:?}");
        }
    }
}

#[test]
fn each_family_reads_its_variants() {
    let one = |arguments: &str| vec![call("add", arguments)];
    let cases = [
        // The other order, an object as text, other keys, none.
        (Hermes, r#"<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>"#, one(r#"{"a": 1}"#)),
        (Hermes, r#"<tool_call>{"name": "add", "arguments": "{\"a\": 1}"}</tool_call>"#, one(r#"{"a": 1}"#)),
        (Hermes, r#"<tool_call>{"id": 7, "name": "add", "x": [1], "arguments": {}, "y": {}}</tool_call>"#, one("{}")),
        (Hermes, r#"<tool_call>{"name": "add"}</tool_call>"#, one("{}")),
        (Hermes, r#"<tool_call>{"name": "add", "arguments": null}</tool_call>"#, one("{}")),
        (Hermes, r#"<tool_call>{"arguments": null, "name": "add"}</tool_call>"#, one("{}")),
        (Hermes, r#"<tool_call>{"name": "add", "arguments": {}, "id": 7}</tool_call>"#, one("{}")),
        (Hermes, r#"<tool_call>{"name": "\u0061dd", "arguments": {}}</tool_call>"#, one("{}")),
        // The frame's end is missing.
        (Hermes, r#"<tool_call>{"name": "add", "arguments": {}}"#, one("{}")),
        (DeepseekV31, "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{}", one("{}")),
        // Without the frame of all calls, as R1 often writes.
        (DeepseekV3, "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{}\n```<｜tool▁call▁end｜>", one("{}")),
        (DeepseekV3, "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n{}<｜tool▁call▁end｜>", one("{}")),
        (Llama3Json, r#"<|python_tag|>{"name": "add", "parameters": {"a": 1}}"#, one(r#"{"a": 1}"#)),
        (Llama3Json, r#"{"type": "function", "name": "add", "parameters": {}}"#, one("{}")),
        (Llama3Json, "\n{\"name\": \"add\", \"arguments\": {}}\n", one("{}")),
        (Mistral, r#"[TOOL_CALLS]add[ARGS]{"a": 1}"#, one(r#"{"a": 1}"#)),
        (Mistral, r#"[TOOL_CALLS]add[CALL_ID]aB3dE6gH9[ARGS]{"a": 1}"#, one(r#"{"a": 1}"#)),
        (Mistral, r#"[TOOL_CALLS]add{"a": 1}"#, one(r#"{"a": 1}"#)),
        (Mistral, r#"[TOOL_CALLS][{"arguments": {"a": 1}, "name": "add", "id": "aB3dE6gH9"}]"#, one(r#"{"a": 1}"#)),
    ];
    for (syntax, text, calls) in cases {
        assert_eq!(split(syntax, text), (String::new(), calls), "{text}");
    }
    let two = vec![call("add", "{}"), call("no-op", "{}")];
    for (syntax, text) in [
        (Mistral, "[TOOL_CALLS]add[ARGS]{}[TOOL_CALLS]no-op[ARGS]{}"),
        (Mistral, r#"[TOOL_CALLS][{"name": "add"}][TOOL_CALLS][{"name": "no-op"}]"#),
        (Llama3Json, r#"{"name": "add", "parameters": {}};{"name": "no-op", "parameters": {}}"#),
        (Llama3Json, "{\"name\": \"add\"}\n{\"name\": \"no-op\"}"),
        (Llama3Json, r#"<|python_tag|>{"name": "add"}; <|python_tag|>{"name": "no-op"}"#),
    ] {
        assert_eq!(split(syntax, text), (String::new(), two.clone()), "{text}");
    }
}

#[test]
fn what_is_no_call_is_content_whole_and_the_next_call_is_found() {
    for (syntax, nonsense) in [
        (Hermes, "<tool_call>\nadd(1, 2)\n</tool_call>"),
        (Hermes, r#"<tool_call>{"name": "launch", "arguments": {}}</tool_call>"#),
        (Hermes, r#"<tool_call>{"name": "add", "arguments": [1]}</tool_call>"#),
        (Hermes, r#"<tool_call>{"name": 7, "arguments": {}}</tool_call>"#),
        (Hermes, r#"<tool_call>{"arguments": {}}</tool_call>"#),
        (Hermes, r#"<tool_call>["add", {}]</tool_call>"#),
        (Hermes, r#"<tool_call>{"name": "add" "arguments"}</tool_call>"#),
        (Hermes, "<tool_call>"),
        (DeepseekV3, "<｜tool▁call▁begin｜>function<｜tool▁sep｜>launch\n```json\n{}\n```<｜tool▁call▁end｜>"),
        (DeepseekV3, "<｜tool▁call▁begin｜>add {}<｜tool▁call▁end｜>"),
        (DeepseekV3, "<｜tool▁calls▁begin｜>x"),
        (DeepseekV31, "<｜tool▁call▁begin｜>launch<｜tool▁sep｜>{}"),
        (DeepseekV31, "<｜tool▁call▁begin｜>add"),
        (Mistral, "[TOOL_CALLS][]"),
        (Mistral, r#"[TOOL_CALLS][{"name": "launch", "arguments": {}}]"#),
        (Mistral, "[TOOL_CALLS]launch[ARGS]{}"),
        (Mistral, "[TOOL_CALLS]add[OTHER]{}"),
        (Llama3Json, r#"{"name": "launch", "parameters": {}}"#),
        (Llama3Json, r#"{"answer": 42}"#),
        (Llama3Json, "{a set}"),
        (Llama3Json, "<|python_tag|>print(1)"),
    ] {
        assert_eq!(split(syntax, nonsense), (nonsense.into(), Vec::new()));
        if syntax == Llama3Json {
            continue;
        }
        let text = format!("{nonsense} {}", write(syntax, &[("add", "{}")]));
        assert_eq!(split(syntax, &text), (nonsense.into(), vec![call("add", "{}")]), "{text}");
    }
}

#[test]
fn a_list_keeps_its_good_calls() {
    let text = r#"[TOOL_CALLS][{"name": "add"}, {"name": "launch"}]"#;
    assert_eq!(split(Mistral, text), (r#", {"name": "launch"}]"#.into(), vec![call("add", "{}")]));
    let text = r#"{"name": "add"}; {"name": "launch"}"#;
    assert_eq!(split(Llama3Json, text), (r#"; {"name": "launch"}"#.into(), vec![call("add", "{}")]));
}

#[test]
fn arguments_that_are_not_json_run_to_the_end_of_their_frame() {
    let bad = r#"{"code": "print("hi")"}"#;
    let (content, calls) = split(Hermes, &(write(Hermes, &[("add", bad)]) + "\nDone."));
    assert_eq!((content.as_str(), calls.len()), ("Done.", 1));
    assert!(calls[0].1.starts_with(bad), "{calls:?}");
    let (content, calls) = split(DeepseekV31, &write(DeepseekV31, &[("add", bad), ("no-op", "{}")]));
    assert_eq!((content.as_str(), calls), ("", vec![call("add", bad), call("no-op", "{}")]));
    // Where nothing ends a frame, nothing is lost either.
    assert_eq!(split(Mistral, r#"[TOOL_CALLS]add[ARGS]{"a" 1} x"#).1, [call("add", r#"{"a" 1} x"#)]);
}

#[test]
fn an_output_that_is_cut_off_gives_what_it_has() {
    let text = write(Hermes, &[("add", r#"{"a": "long"}"#)]);
    let begins = text.find(r#"{"a"#).unwrap() + 1;
    for end in (0..text.len()).filter(|&end| text.is_char_boundary(end)) {
        let (content, calls) = split(Hermes, &text[..end]);
        if end < begins {
            assert_eq!((content.as_str(), calls.len()), (&text[..end], 0));
        } else {
            assert!(content.is_empty());
            assert!(r#"{"a": "long"}"#.starts_with(&calls[0].1), "{calls:?}");
        }
    }
}

#[test]
fn arguments_are_sent_as_they_come() {
    for syntax in ToolSyntax::ALL {
        let text = write(syntax, &[("add", r#"{"a": "some longer text"}"#)]);
        let mut splitter = splitter(syntax, false);
        let (before, after) = text.split_at(text.find("longer").unwrap());
        let sent = joined(&splitter.push(before));
        assert_eq!(sent.1, [call("add", r#"{"a": "some "#)], "{syntax:?}");
        assert!(splitter.in_arguments());
        splitter.push(after);
        assert!(!splitter.in_arguments());
        assert_eq!(splitter.calls(), 1);
    }
}

#[test]
fn a_single_call_ends_the_answer() {
    for syntax in ToolSyntax::ALL {
        for arguments in TRICKY {
            let text = write(syntax, &[("add", arguments), ("no-op", "{}")]) + " and more";
            let mut splitter = splitter(syntax, true);
            let mut sent = Vec::new();
            let mut taken = 0;
            for c in text.chars() {
                if splitter.is_over() {
                    break;
                }
                taken += c.len_utf8();
                sent.extend(splitter.push(c.encode_utf8(&mut [0; 4])));
            }
            assert_eq!(joined(&sent), (String::new(), vec![call("add", arguments)]), "{text}");
            assert!(text[..taken].ends_with(arguments), "over with the last brace: {}", &text[..taken]);
            assert_eq!(splitter.push(&text[taken..]), []);
            assert_eq!(splitter.flush(), []);
        }
    }
}

#[test]
fn an_unending_head_is_not_held_for_ever() {
    let mut splitter = splitter(DeepseekV31, false);
    splitter.push("<｜tool▁call▁begin｜>");
    let sent = splitter.push(&"a".repeat(4096));
    assert!(joined(&sent).0.len() >= 4096, "{sent:?}");
}

/// Pieces of which answers are made, most of them traps.
fn fragment() -> impl Strategy<Value = String> {
    let literal = prop::sample::select(vec![
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        "```json\n",
        "\n```",
        "function",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "{",
        "}",
        "[",
        "]",
        ";",
        ",",
        ":",
        " ",
        "\n",
        "\"",
        "\\",
        "add",
        "no-op",
        "é",
        "\"name\": ",
        "\"add\"",
        "\"arguments\": ",
        "\"parameters\": ",
        "{}",
        "null",
        "12",
        "{\"a\": \"}\"}",
        "text",
    ]);
    let whole = (prop::sample::select(&ToolSyntax::ALL[..]), prop::sample::select(&TRICKY[..]))
        .prop_map(|(syntax, arguments)| write(syntax, &[("add", arguments)]));
    prop_oneof![4 => literal.prop_map(str::to_owned), 1 => whole]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_chunking_gives_what_the_whole_text_gives(
        fragments in prop::collection::vec(fragment(), 0..16),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        single in any::<bool>(),
    ) {
        let text = fragments.concat();
        for syntax in ToolSyntax::ALL {
            let whole = segments(splitter(syntax, single), &[&text]);
            prop_assert_eq!(&segments(splitter(syntax, single), &cut(&text, &cuts)), &whole);
            let characters: Vec<String> = text.chars().map(String::from).collect();
            let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
            prop_assert_eq!(&segments(splitter(syntax, single), &characters), &whole);
            // Nothing is lost where nothing is called; else content stands in the text in its order, once.
            let (content, calls) = joined(&whole);
            if calls.is_empty() {
                prop_assert_eq!(content, text.as_str());
            } else {
                let mut rest = text.chars();
                prop_assert!(content.chars().all(|c| rest.any(|other| other == c)), "{:?}", content);
            }
        }
    }

    #[test]
    fn calls_of_any_arguments_come_back_whole(
        arguments in prop::collection::vec(prop::collection::btree_map("[a-z\"\\\\é]{0,4}", ".{0,12}", 0..4), 1..4),
        before in "[a-zé ]{0,8}",
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let written: Vec<String> = arguments.iter().map(|a| serde_json::to_string(a).unwrap()).collect();
        let calls: Vec<(&str, &str)> = written.iter().map(|text| ("add", text.as_str())).collect();
        for syntax in ToolSyntax::ALL {
            let before = if syntax == Llama3Json { "" } else { before.as_str() };
            let text = before.to_owned() + &write(syntax, &calls);
            let (content, split) = joined(&segments(splitter(syntax, false), &cut(&text, &cuts)));
            prop_assert_eq!(content, before.trim_end());
            prop_assert_eq!(split.len(), calls.len());
            for ((name, got), wanted) in split.iter().zip(&written) {
                prop_assert_eq!((name.as_str(), got), ("add", wanted));
                prop_assert!(serde_json::from_str::<Value>(got).is_ok());
            }
        }
    }
}
