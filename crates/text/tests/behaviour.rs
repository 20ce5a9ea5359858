//! What the goldens do not show: template choice and variables, BOS by tokenizer class, unusual decoders.

mod common;

use baton_text::{
    ChatInput, Detokenizer, ReasoningSplitter, StopMatcher, TextError, TextFiles, TextModel, TokenizerFile,
};
use common::{golden_file, model, noon, with_template};
use serde_json::{Value, json};

fn chat(messages: Value) -> ChatInput {
    ChatInput { messages, ..ChatInput::default() }
}

fn user() -> ChatInput {
    chat(json!([{ "role": "user", "content": "hi" }]))
}

#[test]
fn the_template_is_chosen_by_file_then_name() {
    let config = json!({ "chat_template": [
        { "name": "default", "template": "default" },
        { "name": "tool_use", "template": "tools" },
        { "name": "rag", "template": "{{ broken" },
    ]});
    let listed = model(&config).unwrap();
    let with_tools = |tools: Value| ChatInput { tools: Some(tools), ..user() };
    assert_eq!(listed.render_chat(&user(), noon()).as_deref(), Ok("default"));
    assert_eq!(listed.render_chat(&with_tools(json!([])), noon()).as_deref(), Ok("default"));
    assert_eq!(listed.render_chat(&with_tools(json!([{}])), noon()).as_deref(), Ok("tools"));

    let file = TextModel::new(&TextFiles {
        tokenizer: TokenizerFile::Json(&golden_file("chatml", "tokenizer.json")),
        tokenizer_config: Some(config.to_string().as_bytes()),
        special_tokens_map: None,
        chat_template_jinja: Some(b"file"),
    })
    .unwrap();
    assert_eq!(file.render_chat(&with_tools(json!([{}])), noon()).as_deref(), Ok("file"));

    let none = model(&json!({})).unwrap();
    assert!(!none.has_chat_template());
    assert_eq!(none.render_chat(&user(), noon()), Err(TextError::NoChatTemplate));
}

#[test]
fn request_variables_are_seen_but_replace_nothing() {
    let source = "{{ bos_token }}|{{ messages[0].content }}|{{ tools is none }}|{{ add_generation_prompt }}|\
                  {{ strftime_now('%d %b %Y') }}|{{ thinking }}|{{ pad_token is defined }}";
    let model =
        model(&json!({ "chat_template": source, "bos_token": { "content": "<s>" }, "pad_token": null })).unwrap();
    let kwargs = json!({
        "bos_token": "x", "messages": [], "tools": [1], "add_generation_prompt": true, "strftime_now": 1, "thinking": false,
    });
    let chat = ChatInput { kwargs: kwargs.as_object().unwrap().clone(), ..user() };
    assert_eq!(model.render_chat(&chat, noon()).as_deref(), Ok("<s>|hi|True|False|26 Jul 2024|False|False"));
    let raised = with_template("{{ raise_exception('no') }}").unwrap();
    let kwargs = json!({ "raise_exception": 1 }).as_object().unwrap().clone();
    let raised = raised.render_chat(&ChatInput { kwargs, ..user() }, noon());
    assert_eq!(raised, Err(TextError::TemplateRaised("no".into())));
}

/// The expected texts are those of Python's jinja2, set up as transformers does.
#[test]
fn templates_render_as_in_jinja2() {
    let messages = json!([
        { "role": "system", "content": "Be é." },
        { "role": "user", "content": "  Hi <b> \n" },
        { "role": "assistant", "content": "<think>\nr\n</think>\n\nans", "tool_calls": [{ "function":
            { "name": "f", "arguments": { "a": 1, "b": [1.5, null, true], "c": { "d": "x'y\"z" } } } }] },
    ]);
    let cases = [
        ("{{ messages | map(attribute='role') | join(', ') }}", "system, user, assistant"),
        (
            "{{ messages[2].tool_calls[0].function.arguments }}",
            "{'a': 1, 'b': [1.5, None, True], 'c': {'d': 'x\\'y\"z'}}",
        ),
        (
            "{{ messages[2].tool_calls[0].function.arguments | tojson }}",
            "{\"a\": 1, \"b\": [1.5, null, true], \"c\": {\"d\": \"x'y\\\"z\"}}",
        ),
        ("{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}", "ans"),
        ("[{{ messages[1].content | trim }}][{{ messages[1].content.rstrip('\\n') }}]", "[Hi <b>][  Hi <b> ]"),
        ("{{ messages[-1].role }} {{ messages[1:] | length }} {{ messages[::-1][0].role }}", "assistant 2 assistant"),
        (
            "{{ x }}|{{ x is defined }}|{{ x | default('d') }}|{{ none }}|{{ true }}|{{ 7 // 2 }}|{{ 4 / 2 }}",
            "|False|d|None|True|3|2.0",
        ),
        (
            "{{ 'a.b.c'.rsplit('.', 1) }} {{ 'a,b'.split(',') }} {{ 'abc'.removeprefix('a').removesuffix('c') }}",
            "['a.b', 'c'] ['a', 'b'] b",
        ),
        (
            "{% for m in messages if m.role != 'user' %}{{ loop.index0 }}{{ m.role }}{{ ',' if not loop.last }}{% endfor %}",
            "0system,1assistant",
        ),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
            "user",
        ),
        (
            "{% set ns = namespace(a=[]) %}{% for m in messages %}{% set ns.a = ns.a + [m.role] %}{% endfor %}{{ ns.a }}",
            "['system', 'user', 'assistant']",
        ),
        ("{% macro f(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, b=3) }}", "1213"),
        ("a\n  {% if true %}\n  b\n  {%- endif %}\n c {#- x -#}  d\n", "a\n  b cd"),
    ];
    for (source, expected) in cases {
        let rendered = with_template(source).unwrap().render_chat(&chat(messages.clone()), noon());
        assert_eq!(rendered.as_deref(), Ok(expected), "{source}");
    }
    for source in
        ["{{ x.y }}", "{{ messages[0].content + x }}", "{{ 'a' + 1 }}", "{{ messages[9].role }}", "{{ x | tojson }}"]
    {
        let rendered = with_template(source).unwrap().render_chat(&chat(messages.clone()), noon());
        assert!(matches!(rendered, Err(TextError::TemplateFailed { line: 1, .. })), "{source}: {rendered:?}");
    }
}

#[test]
fn generation_blocks_are_transparent() {
    let source = "{%- for m in messages %}\n  {%- generation -%}\n  {{ m.content }}\n  {%- endgeneration +%}\n{% endfor %}{% generation%}x{%endgeneration %}";
    let plain = source.replace("endgeneration", "endif").replace("generation", "if true");
    let render = |source: &str| with_template(source).unwrap().render_chat(&user(), noon()).unwrap();
    assert_eq!(render(source), render(&plain));
    assert!(render(source).starts_with("hi"));
    // The words elsewhere are left alone.
    assert_eq!(render("{{ 'generation' }} endgeneration {% if true %}{% endif %}"), "generation endgeneration ");
}

#[test]
fn a_final_message_is_continued_where_its_text_ends() {
    let continued = |source: &str, content: Value| {
        let messages = json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": content }]);
        let chat = ChatInput { continue_final_message: true, ..chat(messages) };
        with_template(source).unwrap().render_chat(&chat, noon())
    };
    let plain = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    assert_eq!(continued(plain, json!("I am ")).as_deref(), Ok("[hi][I am "));
    let trimming = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}";
    assert_eq!(continued(trimming, json!("I am ")).as_deref(), Ok("[hi][I am"));
    let parts =
        "{% for m in messages %}{% for p in m.content %}[{{ p.text if p.text else p }}]{% endfor %}{% endfor %}";
    let content = json!([{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }]);
    assert_eq!(continued(parts, content).as_deref(), Ok("[h][i][a][b"));
    for (source, content) in [("{{ messages[0].content }}", json!("x")), (plain, json!(null)), (plain, json!([]))] {
        assert!(matches!(continued(source, content), Err(TextError::ContinueFinalMessage(_))), "{source}");
    }
    let both = ChatInput { continue_final_message: true, add_generation_prompt: true, ..user() };
    let both = with_template(plain).unwrap().render_chat(&both, noon());
    assert!(matches!(both, Err(TextError::ContinueFinalMessage(_))));
}

#[test]
fn tokenizer_classes_that_add_bos_themselves_are_obeyed() {
    let ids = |name: &str, class: &str, bos: Option<bool>, eos: bool| {
        let mut config: Value = serde_json::from_slice(&golden_file(name, "tokenizer_config.json")).unwrap();
        config["tokenizer_class"] = json!(class);
        config["add_eos_token"] = json!(eos);
        match bos {
            Some(bos) => config["add_bos_token"] = json!(bos),
            None => drop(config.as_object_mut().unwrap().remove("add_bos_token")),
        }
        let model = TextModel::new(&TextFiles {
            tokenizer: TokenizerFile::Json(&golden_file(name, "tokenizer.json")),
            tokenizer_config: Some(config.to_string().as_bytes()),
            special_tokens_map: None,
            chat_template_jinja: None,
        });
        model.unwrap().encode("a", true).unwrap()
    };
    assert_eq!(ids("deepseek", "LlamaTokenizerFast", Some(true), false), [0, 67]);
    assert_eq!(ids("deepseek", "LlamaTokenizerFast", None, true), [0, 67, 1]);
    assert_eq!(ids("deepseek", "LlamaTokenizerFast", Some(false), false), [67]);
    assert_eq!(ids("deepseek", "PreTrainedTokenizerFast", Some(true), true), [67]);
    // tokenizer.json's own BOS counts unless the class overrules it.
    assert_eq!(ids("spm", "PreTrainedTokenizerFast", Some(false), false), [1, 340]);
    assert_eq!(ids("spm", "LlamaTokenizer", Some(false), false), [340]);
}

#[test]
fn reasoning_markers_are_sent_even_where_they_are_special() {
    let mut tokenizer: Value = serde_json::from_slice(&golden_file("chatml", "tokenizer.json")).unwrap();
    for token in tokenizer["added_tokens"].as_array_mut().unwrap() {
        token["special"] = json!(true);
    }
    let load = |template: &str| {
        TextModel::new(&TextFiles {
            tokenizer: TokenizerFile::Json(tokenizer.to_string().as_bytes()),
            tokenizer_config: None,
            special_tokens_map: None,
            chat_template_jinja: Some(template.as_bytes()),
        })
        .unwrap()
    };
    let text = "<think>a</think>b<|im_end|>";
    let run = |model: &TextModel| {
        let ids = model.encode(text, false).unwrap();
        let mut detokenizer = model.detokenizer(true);
        let streamed: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        assert_eq!(streamed + &detokenizer.flush(), model.decode(&ids, true));
        model.decode(&ids, true)
    };
    assert_eq!(run(&load("{{ content.split('</think>') }}")), "<think>a</think>b");
    assert_eq!(run(&load("no thoughts")), "ab");
}

/// Decoders outside the two known families go through the tokenizer's own decoding of a short window.
#[test]
fn an_unknown_decoder_streams_what_it_decodes() {
    let mut tokenizer: Value = serde_json::from_slice(&golden_file("spm", "tokenizer.json")).unwrap();
    let metaspace = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false });
    let fallback = tokenizer["decoder"].clone();
    let decoders =
        [metaspace.clone(), json!({ "type": "Sequence", "decoders": [{ "type": "ByteFallback" }, metaspace] })];
    for decoder in decoders {
        assert_ne!(decoder, fallback);
        tokenizer["decoder"] = decoder;
        let model = TextModel::new(&TextFiles {
            tokenizer: TokenizerFile::Json(tokenizer.to_string().as_bytes()),
            tokenizer_config: None,
            special_tokens_map: None,
            chat_template_jinja: None,
        })
        .unwrap();
        for text in ["Hello, world", "naïve 你好 😀 done", " two  spaces", ""] {
            let ids = model.encode(text, false).unwrap();
            let mut detokenizer = model.detokenizer(true);
            let sent: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
            assert_eq!(sent.concat() + &detokenizer.flush(), model.decode(&ids, true), "{text}");
        }
    }
}

#[test]
fn a_model_is_shared_and_an_output_moves_between_threads() {
    fn shared<T: Send + Sync + 'static>() {}
    fn moved<T: Send + 'static>() {}
    shared::<TextModel>();
    moved::<Detokenizer>();
    moved::<StopMatcher>();
    moved::<ReasoningSplitter>();
    // A detokenizer outlives the model it came from.
    let model = with_template("x").unwrap();
    let ids = model.encode("né", false).unwrap();
    let mut detokenizer = model.detokenizer(true);
    drop(model);
    let text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
    assert_eq!(text + &detokenizer.flush(), "né");
}
