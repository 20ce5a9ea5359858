//! A real server on a real socket, over the engine on a mock runner, and a client that sends exactly what it is told.

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_engine::sim::{MockControl, MockModel, MockRunner};
use baton_engine::{Engine, EngineConfig, EngineHandle, RunSpec};
use baton_http::{Adapters, Defaults, HandoffState, ModelCard, NewGeneration, Service, ServiceConfig, Surface};
use baton_text::{TextFiles, TextModel, TokenizerFile};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// No test waits longer for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What the mock model answers unless told otherwise.
pub const REPLY: &str = "<think>\nadd them\n</think>\n\nHello, wörld 你好! 12 STOP 34";

/// The digest of the model, unless there are several.
pub const DIGEST: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// The parts of `REPLY`.
pub const REASONING: &str = "add them";
pub const CONTENT: &str = "Hello, wörld 你好! 12 STOP 34";

pub struct Setup {
    pub reply: String,
    pub config: ServiceConfig,
    pub engine: EngineConfig,
    /// Whether another runner can take the place of a broken one.
    pub rebuildable: bool,
    pub spec: RunSpec,
    pub defaults: Defaults,
    pub drain_timeout: Duration,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            reply: REPLY.into(),
            // The name that requests of the tests' own making call it by.
            config: ServiceConfig { allowed_hosts: vec!["x".parse().unwrap()], ..ServiceConfig::default() },
            engine: EngineConfig::default(),
            rebuildable: false,
            spec: RunSpec {
                vocab_size: 1024,
                max_model_len: 512,
                block_size: 4,
                num_blocks: 512,
                passing: None,
                max_step_tokens: 256,
                max_step_sequences: 32,
                max_draft_tokens: 4,
                steps_ahead: false,
            },
            defaults: Defaults::default(),
            drain_timeout: Duration::from_secs(5),
        }
    }
}

pub struct Server {
    pub addr: SocketAddr,
    pub service: Service,
    pub engine: EngineHandle,
    pub text: Arc<TextModel>,
    pub control: MockControl,
    pub shutdown: CancellationToken,
    pub served: JoinHandle<std::io::Result<()>>,
}

const TEXT_FILES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];

fn read(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus").join(name)).unwrap()
}

/// The bundled model's tokenizer and template.
pub fn abacus() -> TextModel {
    let files = TEXT_FILES.map(read);
    TextModel::new(&TextFiles {
        tokenizer: TokenizerFile::Json(&files[0]),
        tokenizer_config: Some(&files[1]),
        special_tokens_map: Some(&files[2]),
        chat_template_jinja: None,
    })
    .unwrap()
}

/// The bundled model's tokenizer, and another template or none.
pub fn abacus_with(template: Option<&str>) -> TextModel {
    TextModel::new(&TextFiles {
        tokenizer: TokenizerFile::Json(&read(TEXT_FILES[0])),
        tokenizer_config: None,
        special_tokens_map: Some(&read(TEXT_FILES[2])),
        chat_template_jinja: template.map(str::as_bytes),
    })
    .unwrap()
}

impl Setup {
    pub async fn start(self) -> Server {
        let server = self.start_loading().await;
        server.0.install(server.1);
        server.0
    }

    /// A server whose model is still to be installed.
    pub async fn start_loading(self) -> (Server, ModelCard) {
        let text = Arc::new(abacus());
        let model = script(&text, &self.reply);
        let runner = MockRunner::new(self.spec, model);
        let (control, rebuild) = (runner.control(), runner.rebuild());
        let (engine, _) = match self.rebuildable {
            true => baton_engine::spawn_rebuildable(Box::new(runner), rebuild, self.engine),
            false => baton_engine::spawn(Box::new(runner), self.engine),
        };
        let service = Service::new(self.config);
        let card = ModelCard { defaults: self.defaults, ..card(DIGEST, "fp_test") };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let serve = baton_http::serve(listener, service.clone(), Surface::All, shutdown.clone(), self.drain_timeout);
        let served = tokio::spawn(serve);
        (Server { addr, service, engine, text, control, shutdown, served }, card)
    }
}

/// How every model of the tests presents itself, but for these.
pub fn card(digest: &str, fingerprint: &str) -> ModelCard {
    ModelCard {
        names: vec!["tiny".into(), "org/tiny".into()],
        created: 1_790_000_000,
        owned_by: "local".into(),
        generation: digest.into(),
        system_fingerprint: fingerprint.into(),
        defaults: Defaults::default(),
        load_report: br#"{"architecture":"mock"}"#.to_vec(),
        embeddings: None,
    }
}

/// A model that says this.
pub fn script(text: &TextModel, reply: &str) -> MockModel {
    MockModel::Script { reply: text.encode(reply, false).unwrap(), end: text.eos_token_id().unwrap() }
}

/// A model beside the one that the server started with.
pub struct Other {
    pub engine: EngineHandle,
    pub thread: Engine,
    pub text: Arc<TextModel>,
    pub control: MockControl,
    pub handoff: HandoffState,
    pub digest: String,
}

impl Other {
    /// The model of this number, and what the service is to be given of it.
    pub fn new(number: u32, model: MockModel, config: EngineConfig, text: Arc<TextModel>) -> (Self, NewGeneration) {
        let runner = MockRunner::new(Setup::default().spec, model);
        let control = runner.control();
        let (engine, thread) = baton_engine::spawn(Box::new(runner), config);
        // The digits that labels show are the first.
        let digest = format!("{number:012x}{:052x}", 0);
        let new = generation(&engine, &text, card(&digest, &format!("fp_{number}")));
        let handoff = new.handoff.clone();
        (Self { engine, thread, text, control, handoff, digest }, new)
    }

    /// Says this.
    pub fn saying(number: u32, reply: &str) -> (Self, NewGeneration) {
        let text = Arc::new(abacus());
        Self::new(number, script(&text, reply), EngineConfig::default(), text)
    }
}

/// A generation without adapters, of whose hand-off nobody asks.
pub fn generation(engine: &EngineHandle, text: &Arc<TextModel>, card: ModelCard) -> NewGeneration {
    let (adapters, handoff) = (Adapters::none(), HandoffState::default());
    NewGeneration { engine: engine.clone(), text: text.clone(), card, adapters, handoff }
}

/// An HTTP reply.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    /// Checks the form of the error object and returns its code.
    #[track_caller]
    pub fn error_code(&self) -> String {
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:?}");
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("no error object: {self:?}"));
        assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        assert!(error["message"].as_str().unwrap().chars().count() <= 300);
        assert!(error["param"].is_null() || error["param"].is_string());
        error["code"].as_str().unwrap().to_owned()
    }

    /// The events of a stream, comments and `[DONE]` included.
    pub fn events(&self) -> Vec<&str> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"), "{self:?}");
        assert!(self.body.ends_with("\n\n"));
        let data = |event: &'_ str| -> usize { event.find("data: ").map_or(0, |start| start + 6) };
        self.body.split_terminator("\n\n").map(|event| &event[data(event)..]).collect()
    }

    /// The chunks of a stream that ended well.
    #[track_caller]
    pub fn chunks(&self) -> Vec<Value> {
        let events = self.events();
        let (done, chunks) = events.split_last().unwrap();
        assert_eq!(*done, "[DONE]");
        chunks.iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
    }

    fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("a complete head");
        let head = std::str::from_utf8(&bytes[..end]).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let header = |line: &str| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_ascii_lowercase(), value.trim().to_owned())
        };
        let headers: Vec<_> = lines.map(header).collect();
        let chunked = headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        let body = &bytes[end + 4..];
        let body = if chunked { unchunked(body) } else { body.to_vec() };
        Self { status, headers, body: String::from_utf8(body).unwrap() }
    }
}

pub fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let line = bytes.windows(2).position(|w| w == b"\r\n").expect("a chunk size");
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..line]).unwrap(), 16).unwrap();
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&bytes[line + 2..line + 2 + size]);
        bytes = &bytes[line + 2 + size + 2..];
    }
}

/// The bytes of a request.
pub fn request(method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
    );
    [head.as_bytes(), body].concat()
}

impl Server {
    pub fn install(&self, card: ModelCard) {
        self.install_with(card, Adapters::none());
    }

    pub fn install_with(&self, card: ModelCard, adapters: Adapters) {
        self.service.install(NewGeneration { adapters, ..generation(&self.engine, &self.text, card) });
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    /// Sends bytes and reads until the server closes.
    pub async fn raw(&self, bytes: &[u8]) -> Reply {
        raw(self.addr, bytes).await
    }

    /// Shows routes on a listener of their own, and says where.
    pub async fn listen(&self, surface: Surface) -> SocketAddr {
        self.listen_on("127.0.0.1", surface).await
    }

    /// The same on an address of this machine.
    pub async fn listen_on(&self, host: &str, surface: Surface) -> SocketAddr {
        let listener = TcpListener::bind((host, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let drain_timeout = Setup::default().drain_timeout;
        tokio::spawn(baton_http::serve(listener, self.service.clone(), surface, self.shutdown.clone(), drain_timeout));
        addr
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.raw(&request("GET", path, "", b"")).await
    }

    pub async fn get_with_key(&self, path: &str, key: &str) -> Reply {
        self.raw(&request("GET", path, &format!("authorization: Bearer {key}\r\n"), b"")).await
    }

    pub async fn post_with_key(&self, path: &str, key: &str, body: &Value) -> Reply {
        let headers = format!("authorization: Bearer {key}\r\n");
        self.raw(&request("POST", path, &headers, body.to_string().as_bytes())).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.raw(&request("POST", path, "content-type: application/json\r\n", body.to_string().as_bytes())).await
    }

    /// A chat of one user message, with further fields.
    pub async fn chat(&self, fields: Value) -> Reply {
        self.post(CHAT, &with(chat_body(), fields)).await
    }

    pub async fn completion(&self, fields: Value) -> Reply {
        self.post(COMPLETIONS, &with(json!({"prompt": "What is 1 + 1?", "max_tokens": 100}), fields)).await
    }

    /// Sends a chat and leaves the connection open.
    pub async fn open_chat(&self, fields: Value) -> TcpStream {
        let mut stream = self.connect().await;
        let body = with(chat_body(), fields).to_string();
        stream.write_all(&request("POST", CHAT, "", body.as_bytes())).await.unwrap();
        stream
    }

    /// Waits until a condition on the engine holds.
    #[track_caller]
    pub fn until<'a>(
        &'a self,
        what: &'a str,
        condition: impl Fn(&baton_engine::EngineStats) -> bool + 'a,
    ) -> impl Future<Output = ()> + 'a {
        eventually(what, move || condition(&self.engine.stats()))
    }

    pub async fn blocks_are_free(&self) {
        self.until("all blocks free", |s| s.running == 0 && s.waiting == 0 && s.blocks.used == 0).await;
    }
}

/// Sends bytes to a listener and reads until it closes.
pub async fn raw(addr: SocketAddr, bytes: &[u8]) -> Reply {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(bytes).await;
    read_all(stream).await
}

pub const CHAT: &str = "/v1/chat/completions";
pub const COMPLETIONS: &str = "/v1/completions";

pub fn chat_body() -> Value {
    json!({"messages": [{"role": "user", "content": "What is 1 + 1?"}]})
}

/// `body` with these fields set.
pub fn with(mut body: Value, fields: Value) -> Value {
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

pub async fn read_all(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the server answers and closes");
    Reply::parse(&bytes)
}

/// Reads until the text so far contains `marker`.
pub async fn read_until(stream: &mut TcpStream, marker: &str) -> String {
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains(marker) {
        let read = timeout(PATIENCE, stream.read_buf(&mut bytes)).await.expect("more to read").unwrap();
        assert!(read > 0, "closed before {marker}: {}", String::from_utf8_lossy(&bytes));
    }
    String::from_utf8(bytes).unwrap()
}

/// Waits until a condition holds.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}
