//! Bundles: what `handoff.json` lists is fetched, all of it and nothing else.

use std::fs;

use baton_hub::HubError;
use serde_json::{Value, json};

use crate::{
    directory,
    hostile::assert_untouched,
    model::{COMMIT, Cache, File, assert_holds, honest, listing, unwanted},
    server::{Reply, Server},
};

const WEIGHTS: &str = "model.safetensors";

/// Files of a bundle without its manifest, an empty one and two equal ones among them.
fn handed_over() -> Vec<File> {
    let file = |name, bytes: &[u8], lfs| File { name, bytes: bytes.into(), lfs };
    vec![
        file("config.json", b"{\"model_type\":\"llama\"}", false),
        file(WEIGHTS, &[7; 300_000], true),
        file("README.md", b"# tiny", false),
        file("train/data.py", b"print()", false),
        file("train/deep/copy.py", b"print()", false),
        file("train/__init__.py", b"", false),
    ]
}

fn manifest(files: &[File]) -> Value {
    let entry = |f: &File| (f.name.to_owned(), json!({"bytes": f.bytes.len(), "sha256": f.sha256()}));
    json!({"format": "baton-handoff", "version": 1, "files": files.iter().map(entry).collect::<Value>()})
}

/// The files with this manifest and a signature.
fn with(manifest: &Value, mut files: Vec<File>) -> Vec<File> {
    files.push(File { name: "handoff.json", bytes: manifest.to_string().into(), lfs: false });
    files.push(File { name: "handoff.json.minisig", bytes: b"untrusted comment: x".into(), lfs: false });
    files
}

fn bundle() -> Vec<File> {
    with(&manifest(&handed_over()), handed_over())
}

/// A cache of a hub, and one of a directory, that have these files; with what to ask for.
fn places(files: &[File]) -> [(Server, Cache, String); 2] {
    let served = files.to_vec();
    let hub = Server::start(move |request| honest(&served, request));
    let directory = directory::serve(files.to_vec(), |_, reply| reply);
    let (in_hub, in_directory) = (Cache::new(&hub), Cache::new(&directory));
    let url = directory::url(&directory);
    [(hub, in_hub, crate::model::ID.into()), (directory, in_directory, url)]
}

#[test]
fn a_bundle_comes_whole_and_with_its_signature_and_nothing_else_does() {
    for (server, cache, target) in places(&[bundle(), unwanted_besides()].concat()) {
        let snapshot = cache.pull_target(&target, &|_| {}).unwrap();
        assert_holds(&snapshot, &bundle());
        let link = fs::read_link(snapshot.folder.join("train/deep/copy.py")).unwrap();
        assert!(link.starts_with("../../../../blobs"), "{}", link.display());
        let asked = server.requests().len();
        assert_eq!(cache.pull_target(&target, &|_| {}).unwrap().folder, snapshot.folder);
        assert_eq!(server.requests().len(), asked, "a second run uses no network");
        for file in unwanted_besides() {
            assert!(server.asked(file.name).is_empty(), "{} was asked for", file.name);
        }
    }
}

fn unwanted_besides() -> Vec<File> {
    unwanted().into_iter().filter(|f| f.name != "README.md").collect()
}

#[test]
fn a_bundle_needs_no_signature() {
    let mut files = bundle();
    files.pop();
    for (_server, cache, target) in places(&files) {
        assert_holds(&cache.pull_target(&target, &|_| {}).unwrap(), &files);
    }
}

#[test]
fn hostile_and_executable_names_in_a_manifest_are_refused_and_nothing_is_written() {
    let nine = ["a"; 9].join("/");
    for name in ["../x", "/x", "a/../../x", "a\\x", "x\u{1b}[2J", "x/", &nine, "config.json/x", "pytorch_model.bin"] {
        let mut manifest = manifest(&handed_over());
        manifest["files"][name] = json!({"bytes": 1, "sha256": "a".repeat(64)});
        for (server, cache, target) in places(&with(&manifest, handed_over())) {
            let error = cache.pull_target(&target, &|_| {}).unwrap_err();
            assert!(matches!(error, HubError::Name { .. }), "{name:?}: {error}");
            assert!(!error.to_string().contains('\u{1b}'));
            assert_eq!(fs::read_dir(cache.around.path()).unwrap().count(), 1);
            assert!(server.asked(WEIGHTS).is_empty());
            if target == crate::model::ID {
                assert_untouched(&cache);
            }
        }
    }
}

#[test]
fn a_file_that_is_not_as_the_manifest_has_it_is_refused_by_name() {
    for (name, field, value) in [
        ("config.json", "bytes", json!(5)),
        ("config.json", "sha256", json!("a".repeat(64))),
        (WEIGHTS, "bytes", json!(5)),
        (WEIGHTS, "sha256", json!("a".repeat(64))),
        ("train/data.py", "sha256", json!("a".repeat(64))),
    ] {
        let mut manifest = manifest(&handed_over());
        manifest["files"][name][field] = value;
        for (_server, cache, target) in places(&with(&manifest, handed_over())) {
            let error = cache.pull_target(&target, &|_| {}).unwrap_err();
            let named = matches!(&error, HubError::Size { file, .. } | HubError::Digest { file, .. } if file == name);
            assert!(named, "{target} {name} {field}: {error}");
            assert_eq!(cache.visible(), 0);
        }
    }
}

#[test]
fn a_listed_file_that_is_not_there_is_named() {
    let mut files = bundle();
    // Not one of the two equal ones: which of those is asked for is chance, since one serves both.
    files.retain(|f| f.name != "README.md");
    for (_server, cache, target) in places(&files) {
        let error = cache.pull_target(&target, &|_| {}).unwrap_err();
        assert!(matches!(error, HubError::Missing { .. } | HubError::NotFound { .. }), "{error}");
        assert!(error.to_string().contains("README.md"), "{error}");
    }
}

#[test]
fn a_manifest_that_lists_no_weights_or_nothing_at_all_is_refused() {
    let mut without = manifest(&handed_over());
    without["files"].as_object_mut().unwrap().remove(WEIGHTS);
    for (_server, cache, target) in places(&with(&without, handed_over())) {
        let error = cache.pull_target(&target, &|_| {}).unwrap_err();
        assert!(matches!(error, HubError::NoWeights { .. }), "{error}");
    }
    for other in [json!({}), json!([]), json!({"files": {}}), json!({"files": {"a": 1}})] {
        for (_server, cache, target) in places(&with(&other, handed_over())) {
            let error = cache.pull_target(&target, &|_| {}).unwrap_err();
            assert!(matches!(&error, HubError::Answer { url, .. } if url.ends_with("handoff.json")), "{error}");
        }
    }
}

#[test]
fn a_manifest_that_changes_after_it_was_read_is_refused() {
    let (first, mut second) = (bundle(), bundle());
    let last = second.iter_mut().find(|f| f.name == "handoff.json").unwrap();
    last.bytes.push(b' ');
    let asked = std::sync::Mutex::new(0);
    let server = Server::start(move |request| {
        if request.path.ends_with("/handoff.json") {
            let mut asked = asked.lock().unwrap();
            *asked += 1;
            return honest(if *asked == 1 { &first } else { &second }, request);
        }
        match request.path.starts_with("/api/") {
            // Of the second: its own digest fits, the list that was followed is another.
            true => Reply::new(200, listing(&second).to_string()),
            false => honest(&first, request),
        }
    });
    let cache = Cache::new(&server);
    let error = cache.pull().unwrap_err();
    assert!(matches!(&error, HubError::Size { file, .. } if file == "handoff.json"), "{error}");
    assert_eq!(cache.visible(), 0);
}

#[test]
fn what_another_tool_left_of_a_bundle_is_completed() {
    let files = bundle();
    let [(_server, mut cache, _), _] = places(&files);
    let snapshot = cache.model().join("snapshots").join(COMMIT);
    fs::create_dir_all(snapshot.join("train")).unwrap();
    fs::create_dir_all(cache.model().join("refs")).unwrap();
    fs::write(cache.model().join("refs/main"), COMMIT).unwrap();
    for file in files.iter().filter(|f| f.name != "train/deep/copy.py") {
        fs::write(snapshot.join(file.name), &file.bytes).unwrap();
    }
    cache.options.offline = true;
    let error = cache.pull().unwrap_err();
    assert!(error.to_string().contains("train/deep/copy.py is missing"), "{error}");
    cache.options.offline = false;
    assert_holds(&cache.pull().unwrap(), &files);
}
