//! The bundled model over HTTP, against what transformers answers to the same questions
//! (`models/abacus/eval_reference.jsonl`: float32, greedy, at most 200 new tokens).

mod common;

use std::path::Path;

use baton_loadgen::{LocalServer, evaluation::ask};
use baton_text::TextModel;
use serde_json::Value;

use common::abacus::{MODEL, rows};

/// From a step on at which the reference's two best logits are closer than this, texts may differ.
const CLEAR_MARGIN: f64 = 0.5;
const END: &str = "<｜end▁of▁sentence｜>";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_as_right_as_the_references_and_tokens_equal_up_to_a_near_tie() {
    let binary = Path::new(env!("CARGO_BIN_EXE_baton"));
    let server = LocalServer::start(binary, &["--log-level", "warn"]).await.expect("it starts");
    let text = common::text_model(Path::new(MODEL));
    let questions = rows("eval.jsonl");
    let references = rows("eval_reference.jsonl");
    assert_eq!(questions.len(), 360);

    let answers = ask(server.target(), &questions).await.expect("answers");
    let (mut right, mut right_reference, mut compared) = (0, 0, 0);
    for (row, answer) in answers {
        let reference = references.iter().find(|r| r["id"] == row["id"]).expect("a reference for every row");
        right += u32::from(answer.is_right(&row));
        right_reference += u32::from(reference["right"] == true);
        assert_eq!(answer.prompt_tokens, reference["prompt_tokens"], "{}", row["id"]);
        compared += compare(&text, &row["id"], &answer.bytes, reference);
    }
    assert!(compared > 15_000, "only {compared} tokens were compared");
    assert!(
        right.abs_diff(right_reference) * 100 <= 360,
        "{right} of 360 right, the reference has {right_reference}: more than a point apart"
    );
}

/// Compares the bytes of all tokens up to the first that the reference chose by a small margin, and
/// says how many those are. The end token is not sent.
fn compare(text: &TextModel, id: &Value, bytes: &[u8], reference: &Value) -> usize {
    let margins = reference["margins"].as_array().expect("margins").iter().map(|m| m.as_f64().expect("a number"));
    let clear = margins.take_while(|m| *m >= CLEAR_MARGIN).count();
    let ids = reference["output_ids"].as_array().expect("ids").iter().map(|i| i.as_u64().expect("an id") as u32);
    let end = text.token_id(END).expect("an end token");
    let clear: Vec<u32> = ids.take(clear).filter(|&i| i != end).collect();
    let wanted: Vec<u8> = clear.iter().flat_map(|&i| text.token_bytes(i)).collect();
    assert!(
        bytes.starts_with(&wanted),
        "{id}: {:?} does not begin with {:?}",
        String::from_utf8_lossy(bytes),
        String::from_utf8_lossy(&wanted)
    );
    clear.len()
}
