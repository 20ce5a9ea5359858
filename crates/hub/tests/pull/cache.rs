//! What a pull leaves in the cache, and when the network is used at all.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use baton_hub::HubError;

use crate::{
    model::{COMMIT, Cache, ID, SHARD, assert_holds, honest, hub, unwanted, wanted},
    server::{Reply, Server},
};

#[test]
fn a_pull_fetches_what_is_wanted_in_the_layout_of_hugging_face_tools() {
    let server = hub(|_| None);
    let cache = Cache::new(&server);
    let snapshot = cache.pull().unwrap();
    assert_holds(&snapshot, &wanted());
    assert_eq!(snapshot.commit, COMMIT);
    assert_eq!(snapshot.folder, cache.model().join("snapshots").join(COMMIT));
    assert_eq!(snapshot.fetched_bytes, wanted().iter().map(|f| f.bytes.len() as u64).sum::<u64>());
    assert_eq!(fs::read_to_string(cache.model().join("refs/main")).unwrap(), COMMIT);
    let shard = wanted().into_iter().find(|f| f.name == SHARD).unwrap();
    let link = fs::read_link(snapshot.folder.join(SHARD)).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(shard.sha256()));
    assert_eq!(cache.blobs().len(), wanted().len());
    let asked = server.requests();
    assert_eq!(asked[0].path, format!("/api/models/{ID}/revision/main?blobs=true"));
    assert!(asked[1..].iter().all(|r| r.path.contains(COMMIT) || r.path.starts_with("/cdn/")), "all pinned");
}

#[test]
fn a_second_run_uses_no_network_for_the_revision_or_its_commit() {
    let server = hub(|_| None);
    let mut cache = Cache::new(&server);
    let first = cache.pull().unwrap();
    let asked = server.requests().len();
    for offline in [false, true] {
        cache.options.offline = offline;
        for target in [ID.to_owned(), format!("{ID}@{COMMIT}")] {
            let again = cache.pull_target(&target, &|_| {}).unwrap();
            assert_eq!((&again.folder, again.fetched_bytes), (&first.folder, 0));
        }
    }
    assert_eq!(server.requests().len(), asked);
}

#[test]
fn refresh_asks_for_the_commit_and_fetches_nothing_that_is_there() {
    let server = hub(|_| None);
    let mut cache = Cache::new(&server);
    cache.pull().unwrap();
    let asked = server.requests().len();
    cache.options.refresh = true;
    assert_eq!(cache.pull().unwrap().fetched_bytes, 0);
    let new = &server.requests()[asked..];
    assert!(new.iter().all(|r| r.path.starts_with("/api/") || r.path.ends_with(".index.json")), "{new:?}");
    assert!(!new.is_empty());
}

#[test]
fn offline_nothing_is_asked_and_what_is_missing_is_named() {
    let server = hub(|_| None);
    let mut cache = Cache::new(&server);
    cache.options.offline = true;
    let error = cache.pull().unwrap_err();
    assert!(matches!(&error, HubError::Offline { target, .. } if target == "org/tiny@main"), "{error}");
    assert!(server.requests().is_empty());
    assert_eq!(fs::read_dir(cache.home()).unwrap().count(), 0, "nothing is written");
}

#[test]
fn one_changed_byte_of_the_template_is_found_named_and_healed() {
    let server = hub(|_| None);
    let mut cache = Cache::new(&server);
    let snapshot = cache.pull().unwrap();
    fs::write(snapshot.folder.join("chat_template.jinja"), "{{ massages }}").unwrap();
    cache.options.offline = true;
    let error = cache.pull().unwrap_err();
    assert!(error.to_string().contains("chat_template.jinja is not what was fetched"), "{error}");
    cache.options.offline = false;
    assert_holds(&cache.pull().unwrap(), &wanted());
    assert_eq!(server.asked(&format!("/cdn/{SHARD}")).len(), 1, "weights are not fetched again");
}

/// Hugging Face tools fetch file by file, so their snapshot may be partial, or complete without our record.
#[test]
fn a_snapshot_of_another_tool_is_used_if_complete_and_completed_if_not() {
    let server = hub(|_| None);
    let mut cache = Cache::new(&server);
    let folder = cache.model().join("snapshots").join(COMMIT);
    fs::create_dir_all(&folder).unwrap();
    fs::create_dir_all(cache.model().join("refs")).unwrap();
    fs::write(cache.model().join("refs/main"), COMMIT).unwrap();
    for file in wanted().iter().filter(|f| f.name != SHARD) {
        fs::write(folder.join(file.name), &file.bytes).unwrap();
    }
    cache.options.offline = true;
    let error = cache.pull().unwrap_err();
    assert!(error.to_string().contains(&format!("{SHARD} is missing")), "{error}");

    let shard = wanted().into_iter().find(|f| f.name == SHARD).unwrap();
    fs::write(folder.join(SHARD), &shard.bytes).unwrap();
    assert_holds(&cache.pull().unwrap(), &wanted());
    assert!(server.requests().is_empty());

    fs::remove_file(folder.join(SHARD)).unwrap();
    cache.options.offline = false;
    assert_holds(&cache.pull().unwrap(), &wanted());
}

#[test]
fn who_watches_sees_all_files_of_a_snapshot_or_none() {
    let server = hub(|_| None);
    for _ in 0..20 {
        let cache = Cache::new(&server);
        let (folder, done) = (cache.model().join("snapshots").join(COMMIT), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    if let Ok(entries) = fs::read_dir(&folder) {
                        assert_eq!(entries.count(), wanted().len());
                    }
                }
            });
            let result = cache.pull();
            done.store(true, Ordering::SeqCst);
            result.unwrap();
        });
    }
}

#[test]
fn concurrent_pulls_fetch_once_and_agree() {
    let server = hub(|_| None);
    let cache = Cache::new(&server);
    let folders: Vec<_> = thread::scope(|scope| {
        let pulls: Vec<_> = (0..4).map(|_| scope.spawn(|| cache.pull().unwrap().folder)).collect();
        pulls.into_iter().map(|p| p.join().unwrap()).collect()
    });
    assert!(folders.iter().all(|f| *f == folders[0]));
    assert_eq!(server.asked(&format!("/cdn/{SHARD}")).len(), 1);
    assert_eq!(server.asked("?blobs=true").len(), 1);
}

#[test]
fn too_little_space_is_refused_before_any_file_is_fetched() {
    let server = hub(|_| None);
    let mut cache = Cache::new(&server);
    let size: u64 = wanted().iter().map(|f| f.bytes.len() as u64).sum();
    cache.options.free_space = |_| Ok(1_000_000);
    let error = cache.pull().unwrap_err();
    assert!(matches!(error, HubError::Space { needed, free: 1_000_000, .. } if needed == size), "{error}");
    assert!(server.asked(SHARD).is_empty());
    assert_eq!(cache.visible(), 0);
}

#[test]
fn a_revision_is_one_segment_of_the_url_and_a_nested_ref() {
    let server = hub(|_| None);
    let cache = Cache::new(&server);
    cache.pull_target("org/tiny@refs/pr/1", &|_| {}).unwrap();
    assert_eq!(server.requests()[0].path, "/api/models/org/tiny/revision/refs%2Fpr%2F1?blobs=true");
    assert_eq!(fs::read_to_string(cache.model().join("refs/refs/pr/1")).unwrap(), COMMIT);
}

#[test]
fn a_commit_that_the_hub_answers_with_another_is_refused() {
    let server = hub(|_| None);
    let cache = Cache::new(&server);
    let other = "f".repeat(40);
    let error = cache.pull_target(&format!("{ID}@{other}"), &|_| {}).unwrap_err();
    assert!(matches!(error, HubError::Answer { .. }), "{error}");
}

#[test]
fn a_model_without_safetensors_is_refused_by_the_name_of_what_it_has() {
    let files = unwanted();
    let config = wanted().swap_remove(0);
    let files = [files, vec![config]].concat();
    let server = Server::start(move |request| honest(&files, request));
    let error = Cache::new(&server).pull().unwrap_err();
    assert!(matches!(&error, HubError::NoWeights { found, .. } if found.contains("pytorch_model.bin")), "{error}");
    assert!(server.asked("pytorch_model.bin").is_empty());
}

#[test]
fn an_unknown_model_and_a_private_one_are_told_apart() {
    for (status, expected) in [(404, "does not exist"), (401, "HF_TOKEN"), (403, "HF_TOKEN")] {
        let server = hub(move |_| Some(Reply::new(status, "")));
        let error = Cache::new(&server).pull().unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(server.requests().len(), 1, "not retried");
    }
}

#[test]
fn a_mirror_that_lists_names_alone_is_asked_for_each_files_digest_and_size() {
    let server = Server::start(|request| {
        let files = wanted();
        if request.path.starts_with("/api/") {
            let names: Vec<_> = files.iter().map(|f| serde_json::json!({ "rfilename": f.name })).collect();
            return Reply::new(200, serde_json::json!({ "sha": COMMIT, "siblings": names }).to_string());
        }
        let reply = honest(&files, request);
        match files.iter().find(|f| request.method == "HEAD" && request.path.ends_with(f.name)) {
            Some(file) if file.lfs => reply
                .with("X-Linked-Etag", format!("\"{}\"", file.sha256()))
                .with("X-Linked-Size", file.bytes.len().to_string()),
            Some(file) => reply.with("ETag", format!("W/\"{}\"", file.blob_id())),
            None => reply,
        }
    });
    let cache = Cache::new(&server);
    assert_holds(&cache.pull().unwrap(), &wanted());
    let mut blobs = cache.blobs();
    let mut names: Vec<_> = wanted().iter().map(|f| if f.lfs { f.sha256() } else { f.blob_id() }).collect();
    blobs.sort();
    names.sort();
    assert_eq!(blobs, names, "under the names that a hub's own listing gives them");
    assert!(server.requests().iter().all(|r| r.method != "HEAD" || !r.path.starts_with("/cdn/")));
}
