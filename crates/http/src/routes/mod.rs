//! The routes, and the layers around them.

mod adapters;
mod admin;
mod batches;
mod chat;
mod completions;
mod embeddings;
mod files;
mod health;
mod messages;
mod models;
mod observe;
mod rerank;
mod responses;
mod tokenize;

use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::middleware::{from_fn, from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use http::header::{CONTENT_TYPE, WARNING};
use http::{HeaderValue, Method, StatusCode};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::predicate::{NotForContentType, Predicate, SizeAbove};
use tower_http::compression::{CompressionLayer, CompressionLevel};

use crate::error::ApiError;
use crate::service::Service;
use crate::{access, admission, anthropic, auth, cors, headers, openapi, page};

/// Which routes a listener shows. The page, probes, version and metrics are on every one; what is not shown does not exist there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surface {
    /// All routes.
    All,
    /// All but those that ask for the admin scope.
    WithoutAdmin,
    /// Those that ask for the admin scope.
    AdminOnly,
}

impl Surface {
    fn admin(self) -> bool {
        self != Self::WithoutAdmin
    }

    fn inference(self) -> bool {
        self != Self::AdminOnly
    }
}

/// The routes of a service. Every reply that is not 2xx is an error object, of OpenAI's form or the route's own.
pub fn router(service: Service, surface: Surface) -> Router {
    let inference = |route: MethodRouter<Service>| {
        // Only on the methods of the route: another one is refused as such, not as overload.
        route.route_layer(from_fn_with_state(service.clone(), admission::layer))
    };
    let mut routes = Router::new()
        // An admin sees more of a model than others.
        .route(auth::MODEL, get(models::one).layer(Extension(surface)))
        .route("/", get(page::index))
        .route("/page/{file}", get(page::file))
        .route("/live", get(health::live))
        .route("/health/live", get(health::live))
        .route("/v2/health/live", get(health::live))
        .route("/ready", get(health::ready))
        .route("/health", get(health::ready))
        .route("/health/ready", get(health::ready))
        .route("/v2/health/ready", get(health::ready))
        .route("/startup", get(health::startup))
        .route("/health/startup", get(health::startup))
        .route("/version", get(health::version))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi::document))
        .route("/docs", get(openapi::page));
    if surface.inference() {
        routes = routes
            .route("/v1/chat/completions", inference(post(chat::create)))
            .route("/v1/chat/completions/render", inference(post(chat::render)))
            .route("/v1/completions", inference(post(completions::create)))
            .route("/v1/embeddings", inference(post(embeddings::create)))
            .route("/rerank", inference(post(rerank::rerank)))
            .route("/v1/rerank", inference(post(rerank::rerank)))
            .route("/v2/rerank", inference(post(rerank::rerank)))
            .route("/score", inference(post(rerank::score)))
            .route("/v1/score", inference(post(rerank::score)))
            .route("/v1/messages", inference(post(messages::create)))
            .route("/v1/messages/count_tokens", inference(post(messages::count_tokens)))
            .route("/v1/responses", inference(post(responses::create)))
            .route("/v1/responses/{id}", get(responses::one).delete(responses::delete))
            .route("/v1/responses/{id}/cancel", post(responses::cancel))
            .route("/v1/responses/{id}/input_items", get(responses::input_items))
            .route("/tokenize", inference(post(tokenize::tokenize)))
            .route("/detokenize", inference(post(tokenize::detokenize)))
            // Those that take up work are closed while nothing new is taken.
            .route("/v1/files", inference(post(files::upload)).get(files::list))
            .route("/v1/files/{id}", get(files::one).delete(files::delete))
            .route("/v1/files/{id}/content", get(files::content))
            .route("/v1/batches", inference(post(batches::create)).get(batches::list))
            .route("/v1/batches/{id}", get(batches::one))
            .route("/v1/batches/{id}/cancel", post(batches::cancel))
            .route("/v1/models", get(models::list));
    }
    if surface.admin() {
        routes = routes
            .route("/v1/load_lora_adapter", post(adapters::load))
            .route("/v1/unload_lora_adapter", post(adapters::unload))
            .route("/admin/generations", get(admin::generations))
            .route("/admin/rollout", get(admin::status).post(admin::start))
            .route("/admin/rollout/{command}", post(admin::command))
            .route("/admin/slow-requests", get(observe::slow_requests))
            .route("/admin/timeline", get(observe::timeline))
            .route("/admin/usage", get(observe::usage));
    }
    wrap(routes, service)
}

/// Shortest body worth compressing, in bytes.
const MIN_COMPRESSED_BYTES: u64 = 1024;

/// Adds what every route has: from the outside in, request id and log, headers, compression, other origins, panics caught, keys.
fn wrap(routes: Router<Service>, service: Service) -> Router {
    routes
        .fallback(async || ApiError::route_not_found())
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(service.clone(), auth::layer))
        .layer(CatchPanicLayer::custom(|_| ApiError::internal().into_response()))
        .layer(map_response(no_plain_refusals))
        .layer(from_fn(anthropic::layer))
        .layer(from_fn_with_state(service.clone(), cors::layer))
        .layer(compression())
        .layer(map_response(headers::layer))
        .layer(from_fn_with_state(service.clone(), access::layer))
        .with_state(service)
}

/// Gzip for clients that accept it, fast rather than small. Never of an event stream: each event is to arrive when it is sent.
fn compression() -> CompressionLayer<impl Predicate> {
    let worth_it = SizeAbove::new(MIN_COMPRESSED_BYTES).and(NotForContentType::SSE);
    CompressionLayer::new().quality(CompressionLevel::Fastest).compress_when(worth_it)
}

/// The header `allow` is added by the router.
async fn method_not_allowed(method: Method) -> Response {
    match method {
        Method::OPTIONS => StatusCode::NO_CONTENT.into_response(),
        _ => ApiError::method_not_allowed().into_response(),
    }
}

/// Whatever refusal is not ours, for example the framework's of a path that does not decode, becomes one of ours.
async fn no_plain_refusals(response: Response<Body>) -> Response {
    let json = response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    match response.status() {
        status if json || !(status.is_client_error() || status.is_server_error()) => response,
        status if status.is_client_error() => ApiError::route_not_found().into_response(),
        _ => ApiError::internal().into_response(),
    }
}

async fn metrics(State(service): State<Service>) -> Response {
    let metrics = service.metrics();
    metrics.ready.set(i64::from(service.ready().is_ok()));
    let encoder = service.encoder().map(AsRef::as_ref);
    let text = metrics.expose(service.generations(), encoder, service.usage(), &service.config().counters);
    ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response()
}

/// Names the parameters that were ignored because the server is lenient.
pub(crate) fn warn(response: &mut Response, ignored: &[String]) {
    if ignored.is_empty() {
        return;
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'[' | b']');
    let printable = |name: &&String| name.bytes().all(plain) && name.len() <= 64;
    let names: Vec<_> = ignored.iter().filter(printable).take(32).map(String::as_str).collect();
    let text = format!("299 baton \"ignored parameters: {}\"", names.join(", "));
    if let Ok(value) = HeaderValue::try_from(text) {
        response.headers_mut().insert(WARNING, value);
    }
}

#[cfg(test)]
mod tests {
    use http::Request;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;
    use crate::service::ServiceConfig;

    #[tokio::test]
    async fn a_panic_in_a_handler_is_a_500_object_and_the_next_request_is_served() {
        let service = Service::new(ServiceConfig::default());
        let routes = Router::new()
            .route("/panic", get(async || -> Response { panic!("canary") }))
            .route("/fine", get(async || "fine"));
        let router = wrap(routes, service);
        let call = |path: &str| router.clone().oneshot(Request::get(path).body(Body::empty()).unwrap());

        let response = call("/panic").await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert!(response.headers().contains_key("x-request-id"));
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let error: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(error["error"]["type"], "server_error");
        assert!(!error.to_string().contains("canary"));
        assert_eq!(call("/fine").await.unwrap().status(), StatusCode::OK);
    }
}
