//! The service that requests are sent to, without sockets: its routes, over the engine with a device that makes up its answers.

use std::future::Future;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use baton_engine::sim::{MockModel, MockRunner};
use baton_engine::{EngineConfig, RunSpec};
use baton_http::{
    Adapters, Defaults, HandoffState, ModelCard, NewGeneration, Service, ServiceConfig, Store, StoreLimits, Surface,
};
use baton_text::{TextFiles, TextModel, TokenizerFile};
use http::Request;
use http_body_util::BodyExt;
use tempfile::TempDir;
use tower::ServiceExt;

/// No request takes longer.
const PATIENCE: Duration = Duration::from_secs(20);

struct Server {
    runtime: tokio::runtime::Runtime,
    routes: Router,
    /// Where files are kept; gone with the process.
    _folder: TempDir,
}

static SERVER: LazyLock<Server> = LazyLock::new(|| {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let folder = TempDir::new().expect("a folder");
    let _entered = runtime.enter();
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus");
    let read = |name: &str| std::fs::read(models.join(name)).expect(name);
    let [tokenizer, config, special] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"].map(read);
    let files = TextFiles {
        tokenizer: TokenizerFile::Json(&tokenizer),
        tokenizer_config: Some(&config),
        special_tokens_map: Some(&special),
        chat_template_jinja: None,
    };
    let text = TextModel::new(&files).expect("a tokenizer");
    let spec = RunSpec {
        vocab_size: 1024,
        max_model_len: 256,
        block_size: 4,
        num_blocks: 2048,
        passing: None,
        max_step_tokens: 256,
        max_step_sequences: 32,
        max_draft_tokens: 0,
        steps_ahead: false,
    };
    let reply = text.encode("<think>\nso\n</think>\n\n{\"a\": 1} STOP", false).expect("a text");
    let model = MockModel::Script { reply, end: text.eos_token_id().expect("an end") };
    let (engine, _) = baton_engine::spawn(Box::new(MockRunner::new(spec, model)), EngineConfig::default());
    let limits = StoreLimits { file_bytes: 1 << 20, total_bytes: 1 << 30 };
    let store = Store::open(folder.path(), limits).expect("an empty folder");
    let service = Service::new(ServiceConfig { store: Some(store), ..ServiceConfig::default() });
    let card = ModelCard {
        names: vec!["tiny".into()],
        created: 0,
        owned_by: "local".into(),
        generation: "0".repeat(64),
        system_fingerprint: "fp".into(),
        defaults: Defaults::default(),
        load_report: b"{}".to_vec(),
        embeddings: None,
    };
    let (adapters, handoff) = (Adapters::none(), HandoffState::default());
    service.install(NewGeneration { engine, text: text.into(), card, adapters, handoff });
    let routes = baton_http::router(service, Surface::All);
    Server { runtime, routes, _folder: folder }
});

/// The status and the whole body of the reply.
///
/// # Panics
/// If it is an error of ours, or never ends.
pub fn answer(request: Request<Body>) -> (u16, Vec<u8>) {
    let routes = SERVER.routes.clone();
    let (status, body) = within(async move {
        let response = routes.oneshot(request).await.unwrap_or_else(|never| match never {});
        let status = response.status().as_u16();
        (status, response.into_body().collect().await.expect("the reply ends").to_bytes())
    });
    assert!(status < 500, "{}", String::from_utf8_lossy(&body));
    (status, body.to_vec())
}

fn within<T>(work: impl Future<Output = T>) -> T {
    SERVER.runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await.expect("it ends") })
}
