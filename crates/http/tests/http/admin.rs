//! Admin routes: generations, and rollouts commanded through whoever controls them; listeners of their own.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use baton_http::{Admission, ApiKey, RolloutControl, RolloutRefusal, ServiceConfig, Surface, Traffic};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use crate::harness::{
    CHAT, COMPLETIONS, DIGEST, Other, PATIENCE, Reply, Server, Setup, chat_body, raw, read_until, request,
};

const ROLLOUT: &str = "/admin/rollout";

async fn start() -> Server {
    let key = |key: &str| vec![ApiKey::new(key.into()).unwrap()];
    let config = ServiceConfig { api_keys: key("user"), admin_api_keys: key("admin"), ..Default::default() };
    Setup { config, ..Setup::default() }.start().await
}

async fn command(server: &Server, path: &str, body: &Value) -> Reply {
    server.post_with_key(path, "admin", body).await
}

/// Remembers what it is told, and refuses as it is told.
#[derive(Default)]
struct Control(Mutex<Vec<(String, Value)>>);

impl RolloutControl for Control {
    fn status(&self) -> Value {
        json!({"commands": self.0.lock().len()})
    }

    fn command(&self, command: &str, body: Map<String, Value>) -> Result<Value, RolloutRefusal> {
        let refuse = body.get("refuse").and_then(Value::as_str).map(str::to_owned);
        self.0.lock().push((command.into(), body.into()));
        let reason = "because".to_owned();
        match refuse.as_deref() {
            None => Ok(json!({"obeyed": command})),
            Some("invalid") => Err(RolloutRefusal::Invalid { param: "share".into(), reason }),
            Some("conflict") => Err(RolloutRefusal::Conflict(reason)),
            Some("unavailable") => Err(RolloutRefusal::Unavailable(reason)),
            Some("failed") => Err(RolloutRefusal::Failed(reason)),
            Some(_) => panic!("canary"),
        }
    }
}

#[tokio::test]
async fn commands_reach_the_control_and_its_answers_the_admin() {
    let server = start().await;
    let control = Arc::new(Control::default());
    server.service.set_rollout(control.clone());
    let obeyed = async |path: &str, body: Value| {
        let reply = command(&server, path, &body).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["obeyed"].as_str().unwrap().to_owned()
    };
    assert_eq!(obeyed(ROLLOUT, json!({"model": "next"})).await, "start");
    for word in ["shadow", "share", "promote", "rollback"] {
        assert_eq!(obeyed(&format!("{ROLLOUT}/{word}"), json!({})).await, word);
    }
    assert_eq!(control.0.lock()[0], ("start".to_owned(), json!({"model": "next"})));
    assert_eq!(server.get_with_key(ROLLOUT, "admin").await.json(), json!({"commands": 5}));
    for word in ["start", "Promote", "promote/", "nope", "%ff"] {
        let reply = command(&server, &format!("{ROLLOUT}/{word}"), &json!({})).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (404, "not_found"), "{word}");
    }
    for body in ["", "[]", "{", "{\"a\":1,\"a\":2}"] {
        let bytes = request("POST", ROLLOUT, "authorization: Bearer admin\r\n", body.as_bytes());
        assert_eq!(server.raw(&bytes).await.error_code(), "invalid_json", "{body}");
    }
    assert_eq!(control.0.lock().len(), 5, "nothing else got through");
}

#[tokio::test]
async fn r35_a_refusal_is_the_admin_s_alone() {
    let server = start().await;
    server.service.set_rollout(Arc::new(Control::default()));
    for (kind, status, code, param) in [
        ("invalid", 400, "invalid_value", json!("share")),
        ("conflict", 409, "conflict", json!(null)),
        ("unavailable", 400, "not_configured", json!(null)),
        ("failed", 500, "rollout_failed", json!(null)),
        ("panic", 500, "internal_error", json!(null)),
    ] {
        let reply = command(&server, ROLLOUT, &json!({"refuse": kind})).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (status, code));
        assert_eq!(reply.json()["error"]["param"], param);
        assert!(reply.body.contains("because") != (kind == "panic") && !reply.body.contains("canary"), "{reply:?}");
        assert_eq!(server.post_with_key(CHAT, "user", &chat_body()).await.status, 200);
        assert_eq!(server.get("/ready").await.status, 200);
    }
}

#[tokio::test]
async fn without_a_control_the_refusal_says_what_to_start_the_server_with() {
    let server = start().await;
    let replies = [
        server.get_with_key(ROLLOUT, "admin").await,
        command(&server, ROLLOUT, &json!({})).await,
        command(&server, "/admin/rollout/promote", &json!({})).await,
    ];
    for reply in replies {
        assert_eq!((reply.status, reply.error_code().as_str()), (400, "not_configured"));
        assert!(reply.body.contains("--state-dir"), "{reply:?}");
    }
}

#[tokio::test]
async fn while_draining_nothing_is_commanded() {
    let server = start().await;
    server.service.set_rollout(Arc::new(Control::default()));
    server.service.drain();
    assert_eq!(command(&server, ROLLOUT, &json!({})).await.error_code(), "draining");
    assert_eq!(server.get_with_key(ROLLOUT, "admin").await.json(), json!({"commands": 0}));
}

#[tokio::test]
async fn generations_are_listed_with_their_part_until_their_last_request_has_ended() {
    let server = start().await;
    let list = async || server.get_with_key("/admin/generations", "admin").await.json();
    let roles = |list: &Value| {
        let of = |g: &Value| (g["role"].as_str().unwrap().to_owned(), g["generation"].as_str().unwrap().to_owned());
        list["data"].as_array().unwrap().iter().map(of).collect::<Vec<_>>()
    };
    let first = list().await;
    assert_eq!(first["candidate_traffic"], Value::Null);
    let serving = &first["data"][0];
    assert_eq!(serving["names"], json!(["tiny", "org/tiny"]));
    assert_eq!((&serving["system_fingerprint"], &serving["alive"]), (&json!("fp_test"), &json!(true)));
    assert_eq!(serving["handoff"], json!({"state": "off", "reason": null, "required": false}));
    assert_eq!(serving["requests_in_flight"], 0);
    assert_eq!(serving["kv_blocks"], json!({"total": 512, "used": 0, "cached": 0, "free": 512}));
    assert!(serving["since"].as_u64().unwrap() > 1_700_000_000);

    server.control.hang();
    let bytes = request("POST", CHAT, "authorization: Bearer user\r\n", chat_body().to_string().as_bytes());
    let mut client = server.connect().await;
    tokio::io::AsyncWriteExt::write_all(&mut client, &bytes).await.unwrap();
    server.until("it runs", |stats| stats.step_under_way.is_some()).await;
    let (candidate, new) = Other::saying(1, "one");
    candidate.handoff.set_admission(Admission::Failed { reason: "because".into() });
    server.service.stage(new).unwrap();
    server.service.set_traffic(Traffic::Share(0.25)).unwrap();
    let both = list().await;
    let of = |role: &str, digest: &str| (role.to_owned(), digest.to_owned());
    assert_eq!(roles(&both), [of("serving", DIGEST), of("candidate", &candidate.digest)]);
    assert_eq!(both["candidate_traffic"], json!({"kind": "share", "share": 0.25}));
    assert_eq!(both["data"][0]["requests_in_flight"], 1);
    assert_eq!(both["data"][1]["handoff"]["reason"], "because");

    let old = server.service.promote().unwrap();
    assert_eq!(roles(&list().await), [of("serving", &candidate.digest), of("retired", DIGEST)]);
    server.control.release();
    read_until(&mut client, "\"usage\"").await;
    timeout(PATIENCE, old.ended()).await.unwrap();
    assert_eq!(roles(&list().await), [of("serving", &candidate.digest)]);
}

#[tokio::test]
async fn a_listener_shows_its_surface_and_nothing_else_and_all_drain_together() {
    let server = start().await;
    let (public, admin) = (server.listen(Surface::WithoutAdmin).await, server.listen(Surface::AdminOnly).await);
    let of_users = [("POST", CHAT), ("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/v1/models/tiny")];
    let of_admins = [
        ("GET", "/admin/generations"),
        ("GET", ROLLOUT),
        ("POST", ROLLOUT),
        ("POST", "/admin/rollout/promote"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("GET", "/v1/models/tiny/load-report"),
        ("GET", "/v1/models/org/tiny/handoff"),
    ];
    // A hand-off without a report is a 404 of its own, so codes are looked at as well.
    let shown = async |addr, routes: &[(&str, &str)]| {
        let mut shown = BTreeSet::new();
        for (method, path) in routes {
            for key in ["user", "admin"] {
                let body = chat_body().to_string();
                let headers = format!("authorization: Bearer {key}\r\n");
                let reply = raw(addr, &request(method, path, &headers, body.as_bytes())).await;
                shown.insert(!reply.body.contains("\"not_found\"") && reply.status != 405);
            }
        }
        assert_eq!(shown.len(), 1, "all or none");
        shown.contains(&true)
    };
    for (addr, users, admins) in [(server.addr, true, true), (public, true, false), (admin, false, true)] {
        assert_eq!(shown(addr, &of_users).await, users, "{addr}");
        assert_eq!(shown(addr, &of_admins).await, admins, "{addr}");
    }
    for addr in [public, admin] {
        for path in ["/live", "/ready", "/startup", "/version", "/metrics"] {
            assert_eq!(raw(addr, &request("GET", path, "", b"")).await.status, 200, "{path}");
        }
    }

    server.control.delay_steps(Duration::from_millis(20));
    let bytes = request("POST", CHAT, "authorization: Bearer user\r\n", chat_body().to_string().as_bytes());
    let mut client = tokio::net::TcpStream::connect(public).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut client, &bytes).await.unwrap();
    server.until("it runs", |stats| stats.running == 1).await;
    server.shutdown.cancel();
    let draining = async {
        let ready = async || raw(admin, &request("GET", "/ready", "", b"")).await;
        while ready().await.status == 200 {}
        assert_eq!(ready().await.error_code(), "draining");
    };
    timeout(PATIENCE, draining).await.expect("never draining");
    server.control.delay_steps(Duration::ZERO);
    read_until(&mut client, "\"usage\"").await;
    timeout(PATIENCE, server.served).await.unwrap().unwrap().unwrap();
    for addr in [public, admin] {
        let closed = async { while tokio::net::TcpStream::connect(addr).await.is_ok() {} };
        timeout(PATIENCE, closed).await.expect("every listener ends");
    }
}
