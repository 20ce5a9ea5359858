//! A request: its route, told by the first byte, two headers, and its body.

use axum::body::Body;
use http::{HeaderValue, Request};

use super::{parts, service};

const ROUTES: [&str; 10] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/render",
    "/tokenize",
    "/detokenize",
    "/v1/batches",
    "/v1/rerank",
];

pub fn run(data: &[u8]) -> bool {
    let Some((route, rest)) = data.split_first() else { return false };
    let Some(route) = ROUTES.get(usize::from(route.wrapping_sub(b'a'))) else { return false };
    let [trace, id, body] = parts::split(rest);
    let mut request = Request::post(*route);
    for (name, value) in [("traceparent", trace), ("x-request-id", id)] {
        let Ok(value) = HeaderValue::from_bytes(value) else { return false };
        request = request.header(name, value);
    }
    let (status, _) = service::answer(request.body(Body::from(body.to_vec())).expect("a request"));
    status == 200
}
