//! A form with a file, as it comes; where it is taken and is the input of a batch, the batch is run to its end.

use std::thread::sleep;
use std::time::{Duration, Instant};

use axum::body::Body;
use http::Request;
use serde_json::{Value, json};

use super::service;

/// No batch takes longer.
const PATIENCE: Duration = Duration::from_secs(20);

pub fn run(data: &[u8]) -> bool {
    let form = Request::post("/v1/files").header("content-type", "multipart/form-data; boundary=x");
    let (status, file) = service::answer(form.body(Body::from(data.to_vec())).expect("a request"));
    if status != 200 {
        return false;
    }
    let file = id(&file);
    let input = json!({"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"});
    let begin = Request::post("/v1/batches").body(Body::from(input.to_string())).expect("a request");
    let (status, batch) = service::answer(begin);
    let mut kept = vec![file];
    if status == 200 {
        let path = format!("/v1/batches/{}", id(&batch));
        let begin = Instant::now();
        let batch = loop {
            let (_, batch) = service::answer(Request::get(&path).body(Body::empty()).expect("a request"));
            let batch: Value = serde_json::from_slice(&batch).expect("JSON");
            if ["completed", "failed", "cancelled", "expired"].contains(&batch["status"].as_str().expect("a status")) {
                break batch;
            }
            assert!(begin.elapsed() < PATIENCE, "{batch}");
            sleep(Duration::from_millis(1));
        };
        let results = ["output_file_id", "error_file_id"].map(|name| batch[name].as_str().map(str::to_owned));
        kept.extend(results.into_iter().flatten());
    }
    for file in kept {
        service::answer(Request::delete(format!("/v1/files/{file}")).body(Body::empty()).expect("a request"));
    }
    true
}

fn id(object: &[u8]) -> String {
    let object: Value = serde_json::from_slice(object).expect("JSON");
    object["id"].as_str().expect("an id").to_owned()
}
