//! What a hand-off that is required, or fails, or is reported does to the service.

use baton_http::{Admission, ApiKey, HandoffState, NewGeneration, Parity, ServiceConfig, Traffic};
use serde_json::json;

use crate::harness::{COMPLETIONS, Other, Server, Setup};

const REPORT: &str = "/v1/models/org/tiny/handoff";

async fn start(admission: Admission, required: bool) -> (Server, HandoffState) {
    let config = ServiceConfig { admin_api_keys: vec![ApiKey::new("admin".into()).unwrap()], ..Default::default() };
    let server = Setup { config, ..Setup::default() }.start_loading().await.0;
    let handoff = HandoffState::new(admission, required);
    let (_, new) = Other::saying(0, "zero");
    server.service.install(NewGeneration { handoff: handoff.clone(), ..new });
    (server, handoff)
}

fn failed() -> Admission {
    Admission::Failed { reason: "parity: a log-probability differs by 0.7".into() }
}

/// Whether readiness and inference are refused alike, and with which code.
async fn refused(server: &Server) -> Option<String> {
    let replies = [
        server.get("/ready").await,
        server.get("/v2/health/ready").await,
        server.chat(json!({})).await,
        server.chat(json!({"stream": true})).await,
        server.post(COMPLETIONS, &json!({"prompt": "x"})).await,
    ];
    if replies.iter().all(|reply| reply.status == 200) {
        return None;
    }
    let codes: Vec<_> = replies.iter().map(|reply| (reply.status, reply.error_code())).collect();
    assert!(codes.iter().all(|code| *code == codes[0]) && codes[0].0 == 503, "{codes:?}");
    let pending = codes[0].1 == "handoff_pending";
    assert!(replies.iter().all(|reply| reply.header("retry-after").is_some() == pending), "{replies:?}");
    // The process itself is well, and what is not inference goes on.
    for path in ["/live", "/startup", "/v1/models", "/metrics"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    Some(codes[0].1.clone())
}

#[tokio::test]
async fn where_a_hand_off_is_required_nothing_serves_before_it_has_passed() {
    let (server, handoff) = start(Admission::Pending, true).await;
    assert_eq!(refused(&server).await.as_deref(), Some("handoff_pending"));
    assert!(server.get("/metrics").await.body.contains("baton_ready 0\n"));
    handoff.set_admission(Admission::Passed);
    assert_eq!(refused(&server).await, None);
    assert!(server.get("/metrics").await.body.contains("baton_ready 1\n"));
    // It may fail at any time, and come back.
    handoff.set_admission(failed());
    assert_eq!(refused(&server).await.as_deref(), Some("handoff_failed"));
    assert!(server.get("/ready").await.body.contains("differs by 0.7"));
    handoff.set_admission(Admission::Passed);
    assert_eq!(refused(&server).await, None);
    handoff.set_admission(Admission::Absent);
    assert_eq!(refused(&server).await.as_deref(), Some("handoff_absent"));
}

#[tokio::test]
async fn where_it_is_not_required_nothing_is_refused_until_it_is() {
    let (server, handoff) = start(Admission::Off, false).await;
    for admission in [Admission::Absent, Admission::Pending, Admission::Passed, failed()] {
        handoff.set_admission(admission);
        assert_eq!(refused(&server).await, None);
    }
    handoff.set_required(true);
    assert_eq!(refused(&server).await.as_deref(), Some("handoff_failed"));
}

#[tokio::test]
async fn a_candidate_that_has_not_passed_gets_no_traffic() {
    let (server, _) = start(Admission::Passed, true).await;
    let (candidate, new) = Other::saying(1, "one");
    candidate.handoff.set_required(true);
    candidate.handoff.set_admission(Admission::Pending);
    server.service.stage(new).unwrap();
    for traffic in [Traffic::Share(1.0), Traffic::Shadow(1.0)] {
        server.service.set_traffic(traffic).unwrap();
        assert_eq!(server.chat(json!({})).await.json()["system_fingerprint"], "fp_0");
    }
    assert_eq!(candidate.control.steps(), 0);
    server.service.set_traffic(Traffic::Share(1.0)).unwrap();
    candidate.handoff.set_admission(Admission::Passed);
    assert_eq!(server.chat(json!({})).await.json()["system_fingerprint"], "fp_1");
    candidate.handoff.set_admission(failed());
    assert_eq!(server.chat(json!({})).await.json()["system_fingerprint"], "fp_0");
    assert_eq!(server.get("/ready").await.status, 200);
}

#[tokio::test]
async fn the_report_is_that_of_the_generation_that_serves() {
    let (server, handoff) = start(Admission::Absent, false).await;
    for (admission, word) in [(Admission::Absent, "handoff.json"), (Admission::Pending, "yet"), (Admission::Off, "off")]
    {
        handoff.set_admission(admission);
        let reply = server.get_with_key(REPORT, "admin").await;
        assert_eq!((reply.status, reply.error_code().as_str()), (404, "handoff_not_found"));
        assert!(reply.body.contains(word), "{reply:?}");
    }
    handoff.set_report(br#"{"passed":true}"#.to_vec());
    for path in [REPORT, "/v1/models/tiny/handoff", "/v1/models/org%2Ftiny/handoff"] {
        let reply = server.get_with_key(path, "admin").await;
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
        assert_eq!(reply.body, r#"{"passed":true}"#);
    }
    let (_, new) = Other::saying(1, "one");
    server.service.stage(new).unwrap();
    assert_eq!(server.get_with_key(REPORT, "admin").await.status, 200);
    server.service.promote().unwrap();
    assert_eq!(server.get_with_key(REPORT, "admin").await.status, 404);
    assert_eq!(server.get_with_key("/v1/models/nope/handoff", "admin").await.error_code(), "model_not_found");
}

#[tokio::test]
async fn metrics_say_where_the_hand_off_stands_and_what_was_measured() {
    let (server, handoff) = start(Admission::Pending, false).await;
    let metrics = async || server.get("/metrics").await.body;
    let labels = "{model_name=\"tiny\",engine=\"0\",generation=\"000000000000\"";
    let is = |metrics: &str, name: &str, more: &str, value: &str| {
        let line = format!("{name}{labels}{more}}} {value}");
        assert!(metrics.lines().any(|other| other == line), "{line}\n{metrics}");
    };
    let before = metrics().await;
    for state in ["off", "absent", "pending", "passed", "failed"] {
        let value = if state == "pending" { "1" } else { "0" };
        is(&before, "baton_handoff_state", &format!(",state=\"{state}\""), value);
    }
    assert!(!before.contains("baton_parity_"), "nothing was measured");
    is(&before, "baton_canary_runs_total", "", "0");

    handoff.set_admission(failed());
    handoff.set_parity(Parity { max_abs_logprob_diff: 0.5, kl: 0.25, top1_agreement: 0.75 });
    handoff.canary_run(false);
    handoff.canary_run(true);
    let after = metrics().await;
    is(&after, "baton_handoff_state", ",state=\"failed\"", "1");
    is(&after, "baton_parity_max_abs_logprob_diff", "", "0.5");
    is(&after, "baton_parity_kl", "", "0.25");
    is(&after, "baton_parity_top1_agreement", "", "0.75");
    is(&after, "baton_canary_runs_total", "", "2");
    is(&after, "baton_canary_drift", "", "1");
    handoff.canary_run(false);
    is(&metrics().await, "baton_canary_drift", "", "0");
}
