//! A model as a hub serves it, and a cache to pull it into.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use baton_hub::{Event, HubError, Options, Snapshot, Target, pull};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::server::{Reply, Request, Server};

pub const ID: &str = "org/tiny";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// A file large enough that cutting it off leaves something.
pub const SHARD: &str = "model-00001-of-00002.safetensors";

/// A file of the model; `lfs` files have a published SHA-256 and are redirected.
#[derive(Debug, Clone)]
pub struct File {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    pub lfs: bool,
}

impl File {
    pub fn sha256(&self) -> String {
        Sha256::digest(&self.bytes).iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Git's object id.
    pub fn blob_id(&self) -> String {
        let mut hasher = Sha1::new_with_prefix(format!("blob {}\0", self.bytes.len()));
        hasher.update(&self.bytes);
        hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    fn listed(&self) -> serde_json::Value {
        let mut sibling = serde_json::json!({
            "rfilename": self.name, "size": self.bytes.len(), "blobId": self.blob_id(),
        });
        if self.lfs {
            sibling["lfs"] =
                serde_json::json!({ "sha256": self.sha256(), "size": self.bytes.len(), "pointerSize": 130 });
        }
        sibling
    }
}

/// Files that are fetched.
pub fn wanted() -> Vec<File> {
    let index = serde_json::json!({ "weight_map": { "a": SHARD, "b": "model-00002-of-00002.safetensors" } });
    let noise = |seed: u32, len: u32| (0..len).map(|i| (i.wrapping_mul(2_654_435_761) ^ seed) as u8).collect();
    vec![
        File { name: "config.json", bytes: b"{\"model_type\":\"llama\"}".into(), lfs: false },
        File { name: "tokenizer.json", bytes: b"{\"version\":\"1.0\"}".into(), lfs: false },
        File { name: "chat_template.jinja", bytes: b"{{ messages }}".into(), lfs: false },
        File { name: "model.safetensors.index.json", bytes: index.to_string().into(), lfs: false },
        File { name: SHARD, bytes: noise(1, 700_000), lfs: true },
        File { name: "model-00002-of-00002.safetensors", bytes: noise(2, 300_000), lfs: true },
    ]
}

/// Files that must stay where they are.
pub fn unwanted() -> Vec<File> {
    ["pytorch_model.bin", "model.onnx", "modeling_evil.py", "original/consolidated.safetensors", "README.md"]
        .map(|name| File { name, bytes: b"never fetched".into(), lfs: false })
        .into()
}

/// The hub's answer about a model with these files.
pub fn listing(files: &[File]) -> serde_json::Value {
    serde_json::json!({ "sha": COMMIT, "siblings": files.iter().map(File::listed).collect::<Vec<_>>() })
}

/// What an honest hub answers. LFS files are redirected to `/cdn/NAME` on the same host.
pub fn honest(files: &[File], request: &Request) -> Reply {
    if request.path.starts_with(&format!("/api/models/{ID}/revision/")) {
        return Reply::new(200, listing(files).to_string());
    }
    let path = request.path.split('?').next().unwrap();
    let resolved = format!("/{ID}/resolve/{COMMIT}/");
    let name = path.strip_prefix(&resolved).or_else(|| path.strip_prefix("/cdn/")).unwrap_or_default();
    match files.iter().find(|f| f.name == name) {
        Some(file) if file.lfs && !request.path.starts_with("/cdn/") => {
            Reply::new(302, "").with("Location", format!("/cdn/{name}"))
        }
        Some(file) => Reply::file(request, &file.bytes),
        None => Reply::new(404, ""),
    }
}

/// A hub that is honest wherever `fault` has no answer of its own.
pub fn hub(fault: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) -> Server {
    let files = [wanted(), unwanted()].concat();
    Server::start(move |request| fault(request).unwrap_or_else(|| honest(&files, request)))
}

/// Calls `fault` for the first `n` requests whose path ends in `ending`.
pub fn first(
    n: usize,
    ending: &'static str,
    fault: impl Fn(&Request) -> Reply + Send + Sync + 'static,
) -> impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static {
    let seen = Mutex::new(0);
    move |request| {
        if !request.path.ends_with(ending) {
            return None;
        }
        let mut seen = seen.lock().unwrap();
        *seen += 1;
        (*seen <= n).then(|| fault(request))
    }
}

/// A cache of its own, and options that do not wait.
pub struct Cache {
    pub options: Options,
    /// Holds nothing but `home`, unless something escapes from there.
    pub around: tempfile::TempDir,
}

impl Cache {
    pub fn new(server: &Server) -> Self {
        let around = tempfile::tempdir().unwrap();
        fs::create_dir(around.path().join("home")).unwrap();
        let mut options = Options::new(&around.path().join("home"));
        options.endpoint = server.url();
        options.tries = 3;
        options.stall = Duration::from_secs(20);
        options.sleep = |_| {};
        Cache { options, around }
    }

    pub fn home(&self) -> PathBuf {
        self.around.path().join("home")
    }

    pub fn model(&self) -> PathBuf {
        self.options.hub_cache.join("models--org--tiny")
    }

    pub fn pull(&self) -> Result<Snapshot, HubError> {
        self.pull_target(ID, &|_| {})
    }

    pub fn pull_target(&self, target: &str, progress: &baton_hub::Progress<'_>) -> Result<Snapshot, HubError> {
        pull(&target.parse::<Target>().unwrap(), &self.options, progress)
    }

    /// Pulls, and what was told meanwhile, as text.
    pub fn pull_told(&self) -> (Result<Snapshot, HubError>, Vec<String>) {
        let told = Arc::new(Mutex::new(Vec::new()));
        let result = self.pull_target(ID, &|event: Event<'_>| told.lock().unwrap().push(format!("{event:?}")));
        let told = told.lock().unwrap().clone();
        (result, told)
    }

    /// Snapshots that a reader of the cache sees.
    pub fn visible(&self) -> usize {
        fs::read_dir(self.model().join("snapshots")).map_or(0, Iterator::count)
    }

    /// Names of blobs, finished or not.
    pub fn blobs(&self) -> Vec<String> {
        let blobs = fs::read_dir(self.model().join("blobs")).into_iter().flatten();
        blobs.map(|b| b.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// A snapshot holds exactly these files, byte for byte.
pub fn assert_holds(snapshot: &Snapshot, files: &[File]) {
    let mut names = names_below(&snapshot.folder, "");
    names.sort();
    let mut expected: Vec<_> = files.iter().map(|f| f.name.to_owned()).collect();
    expected.sort();
    assert_eq!(names, expected);
    for file in files {
        assert!(fs::read(snapshot.folder.join(file.name)).unwrap() == file.bytes, "{} differs", file.name);
    }
}

fn names_below(folder: &Path, prefix: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    let names = entries.flat_map(|entry| {
        let name = format!("{prefix}{}", entry.file_name().into_string().unwrap());
        match entry.file_type().unwrap().is_dir() {
            true => names_below(&entry.path(), &format!("{name}/")),
            false => vec![name],
        }
    });
    names.collect()
}
