//! Listings that lie: names that would leave the cache, digests that are paths.

use std::{fs, path::Path};

use baton_hub::HubError;

use crate::{
    model::{COMMIT, Cache, ID, honest, listing, wanted},
    server::{Reply, Server},
};

/// A hub whose listing went through `change`.
fn lying(change: impl Fn(&mut serde_json::Value) + Send + Sync + 'static) -> Server {
    Server::start(move |request| {
        if request.path.starts_with("/api/") {
            let mut answer = listing(&wanted());
            change(&mut answer);
            return Reply::new(200, answer.to_string());
        }
        honest(&wanted(), request)
    })
}

/// Nothing but the lock was written.
pub fn assert_untouched(cache: &Cache) {
    let names = |folder: &Path| -> Vec<_> {
        let entries = fs::read_dir(folder).into_iter().flatten();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert_eq!(names(cache.around.path()), ["home"]);
    assert_eq!(names(&cache.home()), ["hub"]);
    assert_eq!(names(&cache.options.hub_cache), [".locks"]);
}

#[test]
fn hostile_names_are_refused_and_nothing_is_written() {
    let long = "x".repeat(300);
    for name in ["../x", "/x", "a/../../x", "x\0.json", "a\\x", "..", "./x", "a//x", "\u{1b}[2J", &long] {
        let server = lying({
            let name = name.to_owned();
            move |answer| answer["siblings"][1]["rfilename"] = name.as_str().into()
        });
        let cache = Cache::new(&server);
        let error = cache.pull().unwrap_err();
        assert!(matches!(error, HubError::Name { .. }), "{name:?}: {error}");
        assert!(!error.to_string().contains(['\0', '\u{1b}']));
        assert_untouched(&cache);
    }
}

#[test]
fn digests_and_commits_that_are_not_digests_are_refused() {
    let bad = ["../../../../x", "", "/x", &"A".repeat(64), &"a".repeat(63)];
    for text in bad {
        let places: [fn(&mut serde_json::Value) -> &mut serde_json::Value; 3] = [
            |answer| &mut answer["sha"],
            |answer| &mut answer["siblings"][0]["blobId"],
            |answer| &mut answer["siblings"][4]["lfs"]["sha256"],
        ];
        for place in places {
            let server = lying({
                let text = text.to_owned();
                move |answer| *place(answer) = text.as_str().into()
            });
            let cache = Cache::new(&server);
            let error = cache.pull().unwrap_err();
            assert!(matches!(error, HubError::Answer { .. }), "{text:?}: {error}");
            assert_untouched(&cache);
        }
    }
}

#[test]
fn an_index_that_names_hostile_or_missing_shards_is_refused() {
    for shard in ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "x.bin", "x.safetensors"] {
        let server = Server::start(move |request| {
            let mut files = wanted();
            files[3].bytes = serde_json::json!({ "weight_map": { "a": shard } }).to_string().into();
            honest(&files, request)
        });
        let cache = Cache::new(&server);
        let error = cache.pull().unwrap_err();
        let missing = shard == "x.safetensors";
        assert!(
            matches!(&error, HubError::Name { .. } if !missing)
                || matches!(&error, HubError::Missing { .. } if missing),
            "{error}"
        );
        assert_untouched(&cache);
    }
}

#[test]
fn an_answer_that_is_no_listing_is_a_typed_error() {
    for body in ["", "[]", "{", "null", "{\"sha\":1}"] {
        let server = Server::start(move |_| Reply::new(200, body));
        assert!(matches!(Cache::new(&server).pull(), Err(HubError::Answer { .. })), "{body}");
    }
    let deep = "[".repeat(1_000_000);
    let server = Server::start(move |_| Reply::new(200, deep.as_str()));
    assert!(matches!(Cache::new(&server).pull(), Err(HubError::Answer { .. })));
}

#[test]
fn sizes_that_overflow_are_refused_for_lack_of_space() {
    let server = lying(|answer| {
        for sibling in answer["siblings"].as_array_mut().unwrap() {
            sibling["size"] = u64::MAX.into();
        }
    });
    assert!(matches!(Cache::new(&server).pull(), Err(HubError::Space { needed: u64::MAX, .. })));
}

#[test]
fn a_ref_in_the_cache_that_is_not_a_commit_leads_nowhere() {
    let server = lying(|_| {});
    let mut cache = Cache::new(&server);
    fs::create_dir_all(cache.model().join("refs")).unwrap();
    fs::write(cache.model().join("refs/main"), "../../../..").unwrap();
    cache.options.offline = true;
    assert!(matches!(cache.pull(), Err(HubError::Offline { .. })));
    cache.options.offline = false;
    assert_eq!(cache.pull_target(ID, &|_| {}).unwrap().commit, COMMIT);
}
