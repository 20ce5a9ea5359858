//! Files and chats that are broken or made to do harm end in a typed error, quickly, in bounded stack and memory.

mod common;

use baton_text::{ChatInput, MAX_RENDERED_BYTES, MAX_TEMPLATE_BYTES, TextError, TextFiles, TextModel, TokenizerFile};
use common::{golden_file, model, noon, with_template};
use serde_json::json;

fn render(source: &str) -> Result<String, TextError> {
    let messages = json!([{ "role": "user", "content": "SECRET" }]);
    with_template(source)?.render_chat(&ChatInput { messages, ..ChatInput::default() }, noon())
}

#[test]
fn templates_that_never_end_or_grow_without_end_hit_a_limit() {
    let doubling = "{% set ns = namespace(s='0123456789') %}{% for i in range(60) %}";
    let cases = [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% set x = 1 %}{% endfor %}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        &format!("{doubling}{{% set ns.s = ns.s ~ ns.s %}}{{% endfor %}}"),
        &format!("{doubling}{{% set t %}}{{{{ ns.s }}}}{{{{ ns.s }}}}{{% endset %}}{{% set ns.s = t %}}{{% endfor %}}"),
        "{% for i in range(20) %}{{ 'a' * 1000000 }}{% endfor %}",
        "{{ 'a' | indent(1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ ('{0}' * 100000).format('a' * 100000) }}",
        "{{ ('a' * 100000).replace('a', 'a' * 100000) }}",
        "{{ ('a' * 100000).join(range(90000)) }}",
        "{{ ('a,' * 10000000).split(',') | length }}",
        "{{ (['a' * 100000] * 100000) | tojson }}",
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    ];
    for source in cases {
        let result = render(source);
        assert!(matches!(result, Err(TextError::TemplateLimit(_))), "{source}: {:?}", result.map(|s| s.len()));
    }
}

#[test]
fn templates_that_ask_for_too_much_at_once_fail() {
    let cases = [
        "{% for i in range(1000000000) %}{% for j in range(1000000000) %}x{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:.1000000000f}'.format(1.5) }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ [1] | tojson(separators=('a' * 1000000, ':')) }}",
        "{{ strftime_now('%Q') }}",
    ];
    for source in cases {
        let result = render(source);
        assert!(matches!(result, Err(TextError::TemplateFailed { .. })), "{source}: {:?}", result.map(|s| s.len()));
    }
}

/// The parser limits nesting itself, but a chain such as `1+1+1+…` becomes as deep a tree without nesting.
#[test]
fn deep_templates_and_deep_values_do_not_overflow_the_stack() {
    let nested = |open: &str, close: &str| {
        let n = (MAX_TEMPLATE_BYTES - 10) / (open.len() + close.len());
        open.repeat(n) + "1" + &close.repeat(n)
    };
    for (open, close) in
        [("{% if 1 %}", "{% endif %}"), ("{% for i in x %}", "{% endfor %}"), ("{% set x %}", "{% endset %}")]
    {
        assert!(matches!(render(&nested(open, close)), Err(TextError::TemplateSyntax { .. })), "{open}");
    }
    for (open, close) in [("(", ")"), ("[", "]"), ("{1:", "}")] {
        let source = format!("{{{{{}}}}}", &nested(open, close)[..]);
        assert!(matches!(render(&source), Err(TextError::TemplateSyntax { .. })), "{open}");
    }
    let chain = |link: &str| format!("{{{{ 1{} }}}}", link.repeat((MAX_TEMPLATE_BYTES - 10) / link.len()));
    for link in ["+1", "|e", ".a", "()", "[0]", "==1", " if x"] {
        // Whether it means something is all the same: it ends.
        let _ = render(&chain(link));
    }
    let _ = render(&format!("{{{{ {}1 }}}}", "-".repeat(MAX_TEMPLATE_BYTES - 10)));
    let deepen = "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}";
    assert_eq!(render(deepen).as_deref(), Ok(""));
    assert!(matches!(render(&format!("{deepen}{{{{ ns.x | tojson }}}}")), Err(TextError::TemplateFailed { .. })));
}

#[test]
fn a_template_reaches_no_file_and_no_other_template() {
    for source in ["{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'chat' %}", "{% block a %}{% endblock %}"]
    {
        assert!(matches!(render(source), Err(TextError::TemplateSyntax { line: 1, .. })), "{source}");
    }
    for source in ["{{ open('/etc/passwd') }}", "{{ ''.__class__.__mro__ }}", "{{ self._TemplateReference__context }}"]
    {
        assert!(matches!(render(source), Err(TextError::TemplateFailed { .. })), "{source}");
    }
}

#[test]
fn a_template_that_is_too_long_or_does_not_parse_is_refused_at_load() {
    let long = "a".repeat(MAX_TEMPLATE_BYTES + 1);
    let too_large = TextError::TemplateTooLarge { bytes: long.len(), max: MAX_TEMPLATE_BYTES };
    assert_eq!(with_template(&long).err(), Some(too_large));
    for source in ["{% if x %}", "{{ x", "{% for %}", "{{ 1 + }}", "a\n{% bogus %}", "{% endif %}", "{#"] {
        let Some(TextError::TemplateSyntax { line, reason }) = with_template(source).err() else {
            panic!("{source:?} must not load")
        };
        assert!(
            line == if source.starts_with('a') { 2 } else { 1 } && !reason.is_empty(),
            "{source}: {line}: {reason}"
        );
    }
}

#[test]
fn a_prompt_longer_than_the_limit_is_refused() {
    let model =
        with_template("{% for m in messages %}{{ m.content }}{{ m.content }}{{ m.content }}{% endfor %}").unwrap();
    let chat = |len: usize| ChatInput { messages: json!([{ "content": "a".repeat(len) }]), ..ChatInput::default() };
    let limit = MAX_RENDERED_BYTES / 3;
    assert_eq!(model.render_chat(&chat(limit), noon()).map(|text| text.len()), Ok(limit * 3));
    assert_eq!(model.render_chat(&chat(limit + 1), noon()), Err(TextError::TemplateLimit("output bytes")));
}

#[test]
fn errors_do_not_repeat_the_users_text() {
    for source in [
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content | int + none }}",
        "{{ messages[0].content.missing.x }}",
        "{{ messages[0].content() }}",
        "{{ messages | sum }}",
    ] {
        let error = render(source).expect_err(source).to_string();
        assert!(!error.contains("SECRET"), "{error}");
    }
    // What the template itself says is for the user to read, within reason.
    let raised = render("{{ raise_exception('no ' ~ 'é' * 100000) }}");
    assert!(matches!(raised, Err(TextError::TemplateRaised(text)) if text.starts_with("no é") && text.len() < 2000));
}

#[test]
fn broken_tokenizer_files_are_named() {
    let good = golden_file("deepseek", "tokenizer.json");
    let load = |tokenizer_json: &[u8], config: Option<&[u8]>, map: Option<&[u8]>, template: Option<&[u8]>| {
        let (tokenizer_config, special_tokens_map, chat_template_jinja) = (config, map, template);
        TextModel::new(&TextFiles {
            tokenizer: TokenizerFile::Json(tokenizer_json),
            tokenizer_config,
            special_tokens_map,
            chat_template_jinja,
        })
        .err()
    };
    assert_eq!(load(&good, None, None, None), None);
    let mut no_model: serde_json::Value = serde_json::from_slice(&good).unwrap();
    no_model.as_object_mut().unwrap().remove("model");
    let mut far_id: serde_json::Value = serde_json::from_slice(&good).unwrap();
    far_id["model"]["vocab"]["far"] = json!(4_000_000_000u32);
    let (no_model, far_id) = (no_model.to_string(), far_id.to_string());
    let deep = "[".repeat(100_000);
    let broken: [&[u8]; 10] = [
        b"",
        b"{}",
        b"null",
        b"not JSON",
        b"{\"decoder\": {\"type\": \"Fuse\"",
        &good[..good.len() / 2],
        &good[..good.len() - 2],
        no_model.as_bytes(),
        far_id.as_bytes(),
        deep.as_bytes(),
    ];
    for bytes in broken {
        assert!(matches!(load(bytes, None, None, None), Some(TextError::Tokenizer(_))), "{}", bytes.len());
    }
    for bytes in [&b"{"[..], b"[]", b"{\"chat_template\": 7}", b"{\"chat_template\": [{\"name\": 1}]}"] {
        let error = load(&good, Some(bytes), None, None);
        assert!(matches!(error, Some(TextError::File { file: "tokenizer_config.json", .. })), "{error:?}");
    }
    let error = load(&good, None, Some(b"7"), None);
    assert!(matches!(error, Some(TextError::File { file: "special_tokens_map.json", .. })), "{error:?}");
    let error = load(&good, None, None, Some(b"\xff"));
    assert!(matches!(error, Some(TextError::File { file: "chat_template.jinja", .. })), "{error:?}");
}

#[test]
fn a_vocabulary_that_would_multiply_text_or_panics_is_refused() {
    let load = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut json = serde_json::from_slice(&golden_file("spm", "tokenizer.json")).unwrap();
        edit(&mut json);
        // A key may be written in more than one way.
        let json = json.to_string().replace("precompiled_charsmap", "precompiled\\u005fcharsmap");
        TextModel::new(&TextFiles {
            tokenizer: TokenizerFile::Json(json.as_bytes()),
            tokenizer_config: None,
            special_tokens_map: None,
            chat_template_jinja: None,
        })
    };
    let doubling = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    let chain = vec![doubling; 60];
    let refused = |edit: &dyn Fn(&mut serde_json::Value)| load(edit).unwrap_err().to_string();
    let normalizer = refused(&|json| json["normalizer"] = json!({"type": "Sequence", "normalizers": chain}));
    let decoder = refused(&|json| {
        let steps = [&chain[..], &[json!({"type": "ByteFallback"})]].concat();
        json["decoder"] = json!({"type": "Sequence", "decoders": steps});
    });
    assert!(normalizer.contains("times as long") && decoder.contains("times as long"), "{normalizer}; {decoder}");
    // A table that claims a gigabyte, one of bytes that are no text, and one that leads out of itself.
    let table = |base64: &str| {
        let step = json!({"type": "Precompiled", "precompiled_charsmap": base64});
        load(&|json| json["normalizer"] = step.clone())
    };
    assert!(table("AAAAQAAAAAAA").unwrap_err().to_string().contains("truncated"));
    assert!(table("BAAAAAAAAAD/").unwrap_err().to_string().contains("library failed"));
    let out_of_itself = table("BAAAAAD8//8A").unwrap();
    assert!(matches!(out_of_itself.encode("a", false), Err(TextError::Encode(_))));
}

#[test]
fn long_runs_of_one_character_encode_and_come_back() {
    for name in ["deepseek", "chatml", "llama3"] {
        let model = TextModel::new(&TextFiles {
            tokenizer: TokenizerFile::Json(&golden_file(name, "tokenizer.json")),
            tokenizer_config: None,
            special_tokens_map: None,
            chat_template_jinja: None,
        })
        .unwrap();
        for run in [" ", "a", "7", "\n", "\u{4f60}", "!", " a", "\r\n "] {
            let text = run.repeat(20_000);
            let ids = model.encode(&text, false).unwrap_or_else(|e| panic!("{name}: {run:?}: {e}"));
            assert!(model.decode(&ids, false) == text, "{name}: {run:?}");
        }
    }
}

#[test]
fn ids_outside_the_vocabulary_have_no_text() {
    let model = model(&json!({})).unwrap();
    let ids = [u32::MAX, model.vocab_size() as u32, 0, u32::MAX];
    let mut detokenizer = model.detokenizer(true);
    let text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
    assert_eq!(text + &detokenizer.flush(), model.decode(&[0], true));
    assert_eq!(model.decode(&ids, true), model.decode(&[0], true));
}
