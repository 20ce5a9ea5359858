//! Answers of a form that the request asks for: what is refused, and that nothing else suffers from it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{CHAT, COMPLETIONS, Server, Setup, chat_body, with};

const CANARY: &str = "canary-7c1f";

/// Sends fields to both endpoints; each must refuse them with a code that names a field.
async fn refuses(server: &Server, fields: Value, code: &str, param: &str) {
    for (path, body) in [(CHAT, chat_body()), (COMPLETIONS, json!({"prompt": "hi"}))] {
        for stream in [false, true] {
            let body = with(with(body.clone(), fields.clone()), json!({"stream": stream}));
            let reply = server.post(path, &body).await;
            assert_eq!(reply.status, 400, "{fields}: {reply:?}");
            assert_eq!(reply.error_code(), code, "{fields}: {reply:?}");
            assert_eq!(reply.json()["error"]["param"], param, "{fields}");
            assert!(!reply.body.contains(CANARY), "{reply:?}");
        }
    }
}

#[tokio::test]
async fn forms_are_refused_by_the_name_of_their_field() {
    let server = Setup::default().start().await;
    let format = |format: Value| json!({"response_format": format});
    let schema = |schema: Value| {
        let named = json!({"name": "n", "strict": true, "schema": schema});
        json!({"response_format": {"type": "json_schema", "json_schema": named}})
    };
    let outputs = |outputs: Value| json!({"structured_outputs": outputs});
    const SCHEMA: &str = "response_format.json_schema.schema";
    let cases = [
        (json!({"response_format": "json"}), "invalid_type", "response_format"),
        (format(json!({})), "missing_required_parameter", "response_format.type"),
        (format(json!({"type": CANARY})), "out_of_range", "response_format.type"),
        (format(json!({"type": "text", "x": 1})), "unknown_parameter", "response_format.x"),
        (format(json!({"type": "json_schema"})), "missing_required_parameter", "response_format.json_schema"),
        (
            format(json!({"type": "json_schema", "json_schema": {"schema": {}}})),
            "missing_required_parameter",
            "response_format.json_schema.name",
        ),
        (
            format(json!({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}})),
            "out_of_range",
            "response_format.json_schema.name",
        ),
        (format(json!({"type": "json_schema", "json_schema": {"name": "n"}})), "missing_required_parameter", SCHEMA),
        (schema(json!(CANARY)), "invalid_value", SCHEMA),
        (schema(json!({"type": CANARY})), "invalid_value", SCHEMA),
        (schema(json!({"type": "array", "uniqueItems": true})), "invalid_value", SCHEMA),
        (schema(json!({"$ref": format!("https://{CANARY}/x")})), "invalid_value", SCHEMA),
        (schema(json!({"type": "string", "pattern": format!("({CANARY}")})), "invalid_value", SCHEMA),
        (schema(json!({"enum": (0..50_000).collect::<Vec<_>>()})), "invalid_value", SCHEMA),
        (
            format(json!({"type": "structural_tag", "structures": [], "triggers": [CANARY]})),
            "invalid_value",
            "response_format.structures",
        ),
        (outputs(json!({})), "out_of_range", "structured_outputs"),
        (outputs(json!({"regex": "a", "choice": ["b"]})), "out_of_range", "structured_outputs"),
        (outputs(json!({"json_object": false})), "out_of_range", "structured_outputs"),
        (outputs(json!({"json": "{"})), "invalid_value", "structured_outputs.json"),
        (outputs(json!({"regex": format!("({CANARY}")})), "invalid_value", "structured_outputs.regex"),
        (outputs(json!({"regex": "(a{1,1000}){1,1000}"})), "invalid_value", "structured_outputs.regex"),
        (outputs(json!({"choice": []})), "invalid_value", "structured_outputs.choice"),
        (outputs(json!({"choice": [1]})), "invalid_type", "structured_outputs.choice"),
        (outputs(json!({"grammar": CANARY})), "invalid_value", "structured_outputs.grammar"),
        (outputs(json!({"structural_tag": "[]"})), "invalid_value", "structured_outputs.structural_tag"),
        (
            outputs(json!({"regex": "a", "whitespace_pattern": " "})),
            "unknown_parameter",
            "structured_outputs.whitespace_pattern",
        ),
        (json!({"grammar": "root ::= nothing"}), "invalid_value", "grammar"),
        (json!({"json_schema": {"not": {}}}), "invalid_value", "json_schema"),
        (json!({"json_schema": {}, "grammar": "root ::= \"a\""}), "invalid_value", "json_schema"),
        (json!({"ignore_eos": true, "structured_outputs": {"regex": "a"}}), "invalid_value", "ignore_eos"),
    ];
    for (fields, code, param) in cases {
        refuses(&server, fields, code, param).await;
    }
    let budgets = [
        (json!({"thinking_token_budget": -1}), "out_of_range", "thinking_token_budget"),
        (
            json!({"chat_template_kwargs": {"thinking_budget": "x"}}),
            "invalid_type",
            "chat_template_kwargs.thinking_budget",
        ),
        (
            json!({"thinking_token_budget": 1, "chat_template_kwargs": {"thinking_budget": 2}}),
            "invalid_value",
            "chat_template_kwargs.thinking_budget",
        ),
    ];
    for (fields, code, param) in budgets {
        let reply = server.chat(fields.clone()).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (400, code), "{fields}: {reply:?}");
        assert_eq!(reply.json()["error"]["param"], param, "{fields}");
    }
    assert_eq!(server.chat(json!({})).await.status, 200);
    server.blocks_are_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_chats_go_on_beside_a_flood_of_costly_forms() {
    let server = Arc::new(Setup::default().start().await);
    let costly = |i: usize| {
        let properties: serde_json::Map<_, _> = (0..300)
            .map(|p| (format!("p{i}_{p}"), json!({"type": "string", "pattern": format!("^(a|b{p}){{1,50}}$")})))
            .collect();
        let schema = json!({"type": "object", "properties": properties});
        json!({"max_tokens": 1, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}})
    };
    let flood: Vec<_> = (0..24)
        .map(|i| {
            let server = server.clone();
            tokio::spawn(async move { server.chat(costly(i)).await.status })
        })
        .collect();
    let mut slowest = Duration::ZERO;
    for _ in 0..10 {
        let begun = Instant::now();
        assert_eq!(server.chat(json!({})).await.status, 200);
        slowest = slowest.max(begun.elapsed());
    }
    assert!(slowest < Duration::from_secs(5), "a plain chat took {slowest:?}");
    for status in flood {
        assert!(matches!(status.await.unwrap(), 200 | 400));
    }
}
