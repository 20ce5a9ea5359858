//! A plain directory over HTTP: no listing, no digests.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use baton_hub::{HubError, Token};

use crate::{
    model::{Cache, File, SHARD, assert_holds, unwanted, wanted},
    server::{End, Reply, Request, Server},
};

/// Serves `files` under `/models/tiny/` with an ETag, changed by `change`.
pub fn serve(files: Vec<File>, change: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static) -> Server {
    Server::start(move |request| {
        let file = request.path.strip_prefix("/models/tiny/").and_then(|n| files.iter().find(|f| f.name == n));
        let reply = match file {
            Some(file) => Reply::file(request, &file.bytes).with("ETag", format!("\"{}\"", &file.sha256()[..8])),
            None => Reply::new(404, ""),
        };
        change(request, reply)
    })
}

pub fn url(server: &Server) -> String {
    format!("{}/models/tiny", server.url())
}

#[test]
fn a_directory_is_fetched_by_known_names_and_its_index() {
    let server = serve([wanted(), unwanted()].concat(), |_, reply| reply);
    let cache = Cache::new(&server);
    let snapshot = cache.pull_target(&url(&server), &|_| {}).unwrap();
    assert_holds(&snapshot, &wanted());
    assert!(snapshot.folder.starts_with(&cache.options.directory_cache));
    let asked = server.requests().len();
    assert_eq!(cache.pull_target(&url(&server), &|_| {}).unwrap().folder, snapshot.folder);
    assert_eq!(server.requests().len(), asked, "a second run uses no network");
    for file in unwanted() {
        assert!(server.asked(file.name).is_empty(), "{} was asked for", file.name);
    }
}

#[test]
fn one_file_of_weights_is_enough_and_403_may_mean_absent() {
    let mut files = vec![wanted().swap_remove(0)];
    files.push(File { name: "model.safetensors", bytes: vec![7; 100], lfs: false });
    let server = serve(files.clone(), |_, reply| match reply.status {
        404 => Reply::new(403, ""),
        _ => reply,
    });
    assert_holds(&Cache::new(&server).pull_target(&url(&server), &|_| {}).unwrap(), &files);
}

#[test]
fn the_hub_token_is_not_sent_to_another_host() {
    let hub = Server::start(|_| Reply::new(404, ""));
    let server = serve(wanted(), |_, reply| reply);
    let mut cache = Cache::new(&hub);
    cache.options.token = Some(Token::new("hf_secret").unwrap());
    cache.pull_target(&url(&server), &|_| {}).unwrap();
    assert!(server.requests().iter().all(|r| r.header("authorization").is_none()));
}

#[test]
fn a_file_cut_off_is_resumed_by_the_next_run() {
    let cut = Mutex::new(true);
    let server = serve(wanted(), move |request, reply| {
        let is_shard = request.method == "GET" && request.path.ends_with(SHARD);
        match is_shard && std::mem::take(&mut *cut.lock().unwrap()) {
            true => reply.ending(End::CutAfter(100_000)),
            false => reply,
        }
    });
    let mut cache = Cache::new(&server);
    cache.options.tries = 1;
    cache.pull_target(&url(&server), &|_| {}).unwrap_err();
    assert_holds(&cache.pull_target(&url(&server), &|_| {}).unwrap(), &wanted());
    assert_eq!(server.asked(SHARD).last().unwrap().from(), Some(100_000));
}

#[test]
fn a_file_that_changes_during_the_pull_is_refused() {
    let server = serve(wanted(), |request, mut reply| {
        if request.method == "GET" && request.path.ends_with(SHARD) {
            reply.headers.retain(|h| h.0 != "ETag");
            return reply.with("ETag", "\"new\"");
        }
        reply
    });
    let error = Cache::new(&server).pull_target(&url(&server), &|_| {}).unwrap_err();
    assert!(matches!(&error, HubError::Changed { file } if file == SHARD), "{error}");
}

#[test]
fn what_cannot_be_told_apart_or_measured_is_refused() {
    let server = serve(wanted(), |_, mut reply| {
        reply.headers.retain(|h| h.0 != "ETag");
        reply
    });
    let error = Cache::new(&server).pull_target(&url(&server), &|_| {}).unwrap_err();
    assert!(error.to_string().contains("neither ETag nor Last-Modified"), "{error}");
}

#[test]
fn a_refresh_sees_a_changed_directory_and_the_old_snapshot_stays() {
    let changed = Arc::new(AtomicBool::new(false));
    let server = serve(wanted(), {
        let changed = changed.clone();
        move |request, reply| match changed.load(Ordering::SeqCst) && request.path == "/models/tiny/config.json" {
            true => Reply::file(request, b"{\"model_type\":\"qwen2\"}").with("ETag", "\"new\""),
            false => reply,
        }
    });
    let mut cache = Cache::new(&server);
    let old = cache.pull_target(&url(&server), &|_| {}).unwrap();
    changed.store(true, Ordering::SeqCst);
    assert_eq!(cache.pull_target(&url(&server), &|_| {}).unwrap().folder, old.folder);
    cache.options.refresh = true;
    let new = cache.pull_target(&url(&server), &|_| {}).unwrap();
    assert_holds(&old, &wanted());
    let mut files = wanted();
    let len = files[0].bytes.len();
    files[0].bytes = b"{\"model_type\":\"qwen2\"}".into();
    assert_eq!(files[0].bytes.len(), len, "only the validator tells them apart");
    assert_holds(&new, &files);
}
