//! A chat template, on plain conversations and on one that has something of everything.

use baton_text::{ChatInput, TextFiles, TextModel, TokenizerFile};
use serde_json::json;

/// A tokenizer of one token.
const TOKENIZER: &str = r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;

pub fn run(data: &[u8]) -> bool {
    let files = TextFiles {
        tokenizer: TokenizerFile::Json(TOKENIZER.as_bytes()),
        tokenizer_config: Some(br#"{"bos_token": "<s>", "eos_token": "</s>"}"#),
        special_tokens_map: None,
        chat_template_jinja: Some(data),
    };
    let Ok(model) = TextModel::new(&files) else { return false };
    let system = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]);
    let plain = json!([
        {"role": "user", "content": "2 < 3 & \"é\"?\n"},
        {"role": "assistant", "content": "<think>\n</think>Yes"},
        {"role": "user", "content": ""},
    ]);
    let call = json!({"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": [1, 2.5, null]}}});
    let rich = json!([
        {"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}]},
        {"role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "yes"},
        {"role": "assistant", "content": "Yes"},
    ]);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let noon = chrono::NaiveDate::from_ymd_opt(2024, 7, 26).and_then(|d| d.and_hms_opt(12, 0, 0)).expect("a date");
    let mut rendered = false;
    for (messages, tools, continued) in [(system, None, false), (plain, None, false), (rich, Some(tools), true)] {
        let chat = ChatInput {
            messages,
            tools,
            add_generation_prompt: !continued,
            continue_final_message: continued,
            ..ChatInput::default()
        };
        if let Ok(prompt) = model.render_chat(&chat, noon) {
            model.prompt_opens_reasoning(&chat, &prompt);
            rendered = true;
        }
    }
    rendered
}
