//! Tools on real vocabularies and templates: which syntax a model has, markers that are special tokens, and earlier calls.

use std::path::{Path, PathBuf};

use baton_text::{ChatInput, Segment, TextError, TextFiles, TextModel, TokenizerFile, ToolSplitter, ToolSyntax};
use serde_json::{Value, json};

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models")
}

/// A model's tokenizer with its own template or another.
fn load(folder: &Path, template: Option<&str>) -> TextModel {
    let read = |file: &str| std::fs::read(folder.join(file)).ok();
    let own = read("chat_template.jinja");
    TextModel::new(&TextFiles {
        tokenizer: TokenizerFile::Json(&read("tokenizer.json").expect("tokenizer.json")),
        tokenizer_config: read("tokenizer_config.json").as_deref(),
        special_tokens_map: read("special_tokens_map.json").as_deref(),
        chat_template_jinja: template.map(str::as_bytes).or(own.as_deref()),
    })
    .expect("the files of a good checkpoint load")
}

fn golden_with_template(name: &str, template: Option<&str>) -> TextModel {
    load(&models().join("golden/tokenizers").join(name), template)
}

fn abacus() -> TextModel {
    load(&models().join("abacus"), None)
}

fn add() -> Value {
    json!([{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}])
}

/// A question, a call and its result.
fn history(id: &str, arguments: Value) -> Value {
    let call = json!({"id": id, "type": "function", "function": {"name": "add", "arguments": arguments}});
    json!([
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": id, "content": "3"},
    ])
}

fn render(model: &TextModel, messages: Value) -> Result<String, TextError> {
    let chat = ChatInput { messages, tools: Some(add()), add_generation_prompt: true, ..ChatInput::default() };
    model.render_chat(&chat, chrono::NaiveDateTime::default())
}

/// DeepSeek's published templates in what matters here: V3 and R1 join arguments to text and know no tools.
const DEEPSEEK_R1: &str = "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}\
    {% for tool in m['tool_calls'] %}{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + \
    '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + \
    '```' + '<｜tool▁call▁end｜>' }}{% endfor %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}";

/// V3.1, with the tools written as the templates that are served with it do.
const DEEPSEEK_V31: &str = "{% if tools %}{% for tool in tools %}{{ tool['function'] | tojson }}{% endfor %}{% endif %}\
    {% for m in messages %}{% if m['tool_calls'] %}{% for tool in m['tool_calls'] %}{{ '<｜tool▁call▁begin｜>' + \
    tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments'] + '<｜tool▁call▁end｜>' }}{% endfor %}\
    {% else %}{{ m['content'] }}{% endif %}{% endfor %}";

/// Mistral's: it refuses ids that are not nine characters long.
const MISTRAL: &str = "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
    {% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}\
    {% if call.id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}\
    {% endif %}{{ call.function | tojson }}{% endfor %}]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }} \
    {{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}";

#[test]
fn the_syntax_is_read_off_the_template_and_the_vocabulary() {
    let syntax = |name: &str| golden_with_template(name, None).tool_syntax();
    assert_eq!(syntax("chatml"), Ok(ToolSyntax::Hermes));
    assert_eq!(syntax("llama3"), Ok(ToolSyntax::Llama3Json));
    assert_eq!(syntax("gemma"), Err(TextError::NoToolSyntax));
    assert_eq!(syntax("spm"), Err(TextError::NoToolSyntax));
    // It writes calls, and never the tools.
    assert_eq!(syntax("deepseek"), Err(TextError::ToolsNotShown));
    assert_eq!(abacus().tool_syntax(), Ok(ToolSyntax::Hermes));

    let deepseek = |template: &str| golden_with_template("deepseek", Some(template)).tool_syntax();
    assert_eq!(deepseek(DEEPSEEK_R1), Err(TextError::ToolsNotShown));
    assert_eq!(deepseek(&format!("{{{{ tools | tojson }}}}{DEEPSEEK_R1}")), Ok(ToolSyntax::DeepseekV3));
    assert_eq!(deepseek(DEEPSEEK_V31), Ok(ToolSyntax::DeepseekV31));
    // The template of another model: the vocabulary lacks the marker.
    assert_eq!(deepseek(MISTRAL), Err(TextError::NoToolSyntax));
    assert_eq!(deepseek("{{ tools }}{{ messages }}"), Err(TextError::NoToolSyntax));
}

#[test]
fn a_syntax_can_be_given_if_the_vocabulary_has_its_tokens() {
    let template = "{{ tools | tojson }}{{ messages | tojson }}";
    let with = |name: &str, syntax| golden_with_template(name, Some(template)).with_tool_syntax(syntax);
    assert_eq!(with("gemma", Some(ToolSyntax::Hermes)).unwrap().tool_syntax(), Ok(ToolSyntax::Hermes));
    assert_eq!(with("deepseek", Some(ToolSyntax::DeepseekV3)).unwrap().tool_syntax(), Ok(ToolSyntax::DeepseekV3));
    assert_eq!(abacus().with_tool_syntax(None).unwrap().tool_syntax(), Err(TextError::NoToolSyntax));
    for (syntax, token) in [(ToolSyntax::Mistral, "[TOOL_CALLS]"), (ToolSyntax::DeepseekV31, "<｜tool▁call▁begin｜>")]
    {
        let refused = with("gemma", Some(syntax)).unwrap_err();
        assert_eq!(refused, TextError::ToolSyntax { syntax: syntax.name(), token });
    }
}

#[test]
fn markers_that_are_special_tokens_reach_the_splitter_and_no_other_special_token_does() {
    let model = golden_with_template("deepseek", Some(DEEPSEEK_V31));
    let text = "Let me see.<｜tool▁call▁begin｜>add<｜tool▁sep｜>{\"a\": \"é你\"}<｜tool▁call▁end｜><｜▁pad▁｜>";
    let ids = model.encode(text, false).unwrap();
    let run = |mut detokenizer: baton_text::Detokenizer| {
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        text += &detokenizer.flush();
        text
    };
    assert_eq!(run(model.detokenizer(true)), "Let me see.add{\"a\": \"é你\"}");
    assert_eq!(run(model.tool_detokenizer(true)), text.trim_end_matches("<｜▁pad▁｜>"));
    assert_eq!(run(model.tool_detokenizer(false)), text);

    let mut splitter = ToolSplitter::new(model.tool_syntax().unwrap(), ["add".to_owned()].into(), false);
    let mut segments = splitter.push(&run(model.tool_detokenizer(true)));
    segments.extend(splitter.flush());
    let expected = [
        Segment::Content("Let me see.".into()),
        Segment::Call { index: 0, name: "add".into() },
        Segment::Arguments { index: 0, text: "{\"a\": \"é你\"}".into() },
    ];
    assert_eq!(segments, expected);
}

#[test]
fn earlier_calls_are_written_as_the_template_wants_them() {
    let arguments = || json!({"a": 1, "b": [2, "é"]});
    let written = r#"{"a": 1, "b": [2, "é"]}"#;
    for name in ["chatml", "llama3", "deepseek"] {
        let prompt = render(&golden_with_template(name, None), history("call_1", arguments())).unwrap();
        assert!(prompt.contains(written), "{name}: {prompt}");
    }
    for template in [DEEPSEEK_R1, DEEPSEEK_V31] {
        let model = golden_with_template("deepseek", Some(template));
        let prompt = render(&model, history("call_1", arguments())).unwrap();
        assert!(prompt.contains(written), "{prompt}");
        // What the model wrote badly comes back as it was.
        assert!(render(&model, history("call_1", "{bad".into())).unwrap().contains("{bad"));
    }
    let prompt = render(&abacus(), history("call_1", arguments())).unwrap();
    let call = format!("<tool_call>\n{{\"name\": \"add\", \"arguments\": {written}}}\n</tool_call>");
    assert!(prompt.contains(&call) && prompt.contains("<tool_response>\n3\n</tool_response>"), "{prompt}");
}

#[test]
fn ids_are_shortened_where_the_template_refuses_long_ones() {
    let model = golden_with_template("gemma", Some(MISTRAL));
    let prompt = render(&model, history("call_0123456789abcdef0000", json!({}))).unwrap();
    let id = prompt.split("[TOOL_RESULTS]").nth(1).unwrap().split(' ').next().unwrap();
    assert_eq!(id.len(), 9);
    assert!(id.bytes().all(|b| b.is_ascii_alphanumeric()));
    let kept = render(&model, history("aB3dE6gH9", json!({}))).unwrap();
    assert!(kept.contains("[TOOL_RESULTS]aB3dE6gH9 3"), "{kept}");
}
