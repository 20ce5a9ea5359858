//! Text parity on the golden tokenizers, whole and with a fault in one of their files.

mod device;

use std::path::Path;

use baton_handoff::{Case, Chat, CheckName, Mismatch, Report, TextParity, Verdict, text_parity};
use baton_text::{TextFiles, TextModel, TokenizerFile};
use serde_json::{Value, json};

const NAMES: [&str; 5] = ["deepseek", "chatml", "llama3", "spm", "gemma"];

/// A golden tokenizer's files, to be changed.
struct Files {
    tokenizer: Value,
    config: Value,
    template: Option<String>,
}

fn read(name: &str, file: &str) -> Option<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/golden/tokenizers");
    std::fs::read_to_string(folder.join(name).join(file)).ok()
}

fn golden(name: &str, file: &str) -> Value {
    serde_json::from_str(&read(name, file).expect("a golden file")).expect("golden JSON")
}

impl Files {
    fn of(name: &str) -> Self {
        let template = read(name, "chat_template.jinja");
        Self { tokenizer: golden(name, "tokenizer.json"), config: golden(name, "tokenizer_config.json"), template }
    }

    fn template(&mut self) -> String {
        self.template.clone().unwrap_or_else(|| self.config["chat_template"].as_str().expect("a template").to_owned())
    }

    fn parity(&self, cases: &[Case]) -> TextParity {
        let model = TextModel::new(&TextFiles {
            tokenizer: TokenizerFile::Json(self.tokenizer.to_string().as_bytes()),
            tokenizer_config: Some(self.config.to_string().as_bytes()),
            special_tokens_map: None,
            chat_template_jinja: self.template.as_deref().map(str::as_bytes),
        });
        let noon = chrono::NaiveDate::from_ymd_opt(2024, 7, 26).and_then(|d| d.and_hms_opt(12, 0, 0)).expect("a date");
        text_parity(cases, &model.expect("files that load"), noon)
    }
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("ids")
}

/// The tokenizer's golden chats and texts, as a bundle has them.
fn cases(name: &str) -> Vec<Case> {
    let case = |name: String, chat, prompt: &Value, prompt_ids: &Value| Case {
        name,
        chat,
        prompt: Some(prompt.as_str().expect("text").to_owned()),
        prompt_ids: ids(prompt_ids),
        ..device::case("", &[0], 0)
    };
    let chats = golden(name, "chat_golden.json");
    let chats = chats["cases"].as_array().expect("cases").iter().filter_map(|golden| {
        let mut kwargs = golden["kwargs"].as_object().expect("kwargs").clone();
        let add_generation_prompt = kwargs.remove("add_generation_prompt") == Some(true.into());
        if golden.get("error").is_some() || kwargs.contains_key("continue_final_message") {
            return None; // not in a bundle
        }
        let tools = kwargs.remove("tools").and_then(|tools| tools.as_array().cloned()).unwrap_or_default();
        let messages = golden["messages"].as_array().expect("messages").clone();
        let chat = Chat { messages, tools, template_kwargs: kwargs, add_generation_prompt };
        Some(case(golden["name"].as_str().expect("name").into(), Some(chat), &golden["text"], &golden["ids"]))
    });
    let texts = golden(name, "tokenizer_golden.json");
    let texts = texts["encode"].as_array().expect("texts").iter().enumerate();
    let texts = texts.map(|(index, golden)| case(format!("text {index}"), None, &golden["text"], &golden["ids"]));
    chats.chain(texts).collect()
}

fn verdicts(parity: &TextParity) -> [Verdict; 2] {
    let mut report = Report::default();
    parity.enter(&mut report);
    [CheckName::Tokenizer, CheckName::Template]
        .map(|name| report.checks().iter().find(|c| c.name == name).unwrap().verdict)
}

#[test]
fn golden_chats_and_texts_are_the_trainers() {
    for name in NAMES {
        let parity = Files::of(name).parity(&cases(name));
        assert_eq!((&parity.template[..], &parity.tokenizer[..]), (&[][..], &[][..]), "{name}");
        assert!(parity.rendered > 10 && parity.encoded > parity.rendered + 50, "{name}");
        assert_eq!(verdicts(&parity), [Verdict::Pass; 2]);
    }
}

#[test]
fn a_changed_newline_in_a_template_is_the_templates_fault_alone() {
    for name in NAMES {
        let mut files = Files::of(name);
        // Of the last one that the template writes, escaped or as it is, two are made.
        let source = files.template();
        let (at, newline) = ["\\n", "\n"].iter().find_map(|n| Some((source.rfind(n)?, n))).expect("a newline");
        files.template = Some(format!("{}{newline}{}", &source[..at], &source[at..]));
        let parity = files.parity(&cases(name));
        assert!(!parity.template.is_empty(), "{name}");
        assert!(parity.tokenizer.is_empty(), "{name}");
        assert_eq!(verdicts(&parity), [Verdict::Pass, Verdict::Fail]);
        let Mismatch::Differs { expected, got, .. } = &parity.template[0].found else {
            panic!("{:?}", parity.template[0])
        };
        assert!(expected != got && got.contains("\\n"), "{expected} {got}");
    }
}

#[test]
fn a_removed_merge_is_the_tokenizers_fault_alone() {
    for name in NAMES {
        let mut files = Files::of(name);
        // A merge into a token that nothing else makes.
        let merges = files.tokenizer["model"]["merges"].as_array_mut().expect("merges");
        let removed = merges.remove(0);
        let parity = files.parity(&cases(name));
        assert!(!parity.tokenizer.is_empty(), "{name} without {removed}");
        assert!(parity.template.is_empty(), "{name}");
        assert_eq!(verdicts(&parity), [Verdict::Fail, Verdict::Pass]);
        let text = parity.tokenizer[0].to_string();
        assert!(text.contains("first difference at") && text.contains("expected ["), "{text}");
    }
}

#[test]
fn a_second_bos_is_called_so_wherever_it_is_from() {
    let mut files = Files::of("llama3");
    let cases = cases("llama3");
    let texts = cases.iter().filter(|case| case.chat.is_none()).count();
    let doubled = Mismatch::DoubleBos { here: true };

    // The template of the post-processor writes it twice.
    let processors = files.tokenizer["post_processor"]["processors"].as_array_mut().expect("processors");
    let single = processors[1]["single"].as_array_mut().expect("a template");
    single.insert(0, single[0].clone());
    let parity = files.parity(&cases);
    assert_eq!(parity.tokenizer.len(), texts);
    assert!(parity.tokenizer.iter().all(|difference| difference.found == doubled));
    assert!(parity.template.is_empty());

    // The chat template does.
    let mut files = Files::of("llama3");
    let source = files.template();
    files.template = Some(format!("{{{{ bos_token }}}}{source}"));
    let parity = files.parity(&cases);
    assert_eq!(parity.template.len(), parity.rendered);
    assert!(parity.template.iter().all(|difference| difference.found == doubled));
    assert!(parity.template[0].to_string().contains("double BOS"));

    // The trainer's ids have it.
    let files = Files::of("llama3");
    let mut spoilt = cases.clone();
    spoilt.iter_mut().for_each(|case| case.prompt_ids.insert(0, 506));
    let parity = files.parity(&spoilt);
    assert_eq!(parity.tokenizer.len(), parity.encoded);
    assert!(parity.tokenizer.iter().all(|difference| difference.found == Mismatch::DoubleBos { here: false }));
}

#[test]
fn the_first_difference_is_shown_with_little_around_it() {
    let files = Files::of("chatml");
    let mut cases = cases("chatml");
    cases.truncate(1);
    let prompt = cases[0].prompt.as_mut().unwrap();
    let at = prompt.find("Hello").unwrap();
    prompt.replace_range(at..at + 1, "J");
    cases[0].prompt_ids.truncate(10);
    let parity = files.parity(&cases);
    let Mismatch::Differs { position, expected, got } = &parity.template[0].found else { panic!() };
    assert_eq!(*position, at);
    assert!(
        expected.contains("user\\nJello!<|im_end|>") && got.contains("user\\nHello!<|im_end|>"),
        "{expected} {got}"
    );
    let Mismatch::Differs { position, expected, got } = &parity.tokenizer[0].found else { panic!() };
    assert_eq!(*position, 10);
    assert!(expected.starts_with("[…") && got.starts_with("[…") && expected.len() < got.len(), "{expected} {got}");
}

#[test]
fn without_a_template_or_texts_the_checks_say_so() {
    let mut files = Files::of("chatml");
    files.config.as_object_mut().unwrap().remove("chat_template");
    let cases = cases("chatml");
    let parity = files.parity(&cases);
    assert_eq!(parity.template.len(), parity.rendered);
    assert!(parity.template[0].to_string().contains("no chat template"));
    let ids_only = Case { prompt: None, chat: None, ..cases[0].clone() };
    let parity = files.parity(&[ids_only]);
    assert_eq!(verdicts(&parity), [Verdict::Skipped; 2]);
}

#[test]
fn differences_are_json_of_one_level() {
    let mut cases = cases("llama3");
    cases.truncate(1);
    cases[0].prompt_ids.insert(0, 506);
    let parity = serde_json::to_value(Files::of("llama3").parity(&cases)).unwrap();
    let case = &cases[0].name;
    assert_eq!(parity["tokenizer"], json!([{"case": case, "kind": "double_bos", "here": false}]));
}
