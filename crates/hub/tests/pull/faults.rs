//! Servers that stall, cut off, corrupt and refuse.

use std::{
    fs,
    process::{Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use baton_hub::{HubError, Options, Token};

use crate::{
    model::{Cache, SHARD, assert_holds, first, hub, wanted},
    server::{End, Reply, Request, Server},
};

fn shard() -> Vec<u8> {
    wanted().into_iter().find(|f| f.name == SHARD).unwrap().bytes
}

fn broken(end: End) -> impl Fn(&Request) -> Reply + Send + Sync + 'static {
    let bytes = shard();
    move |request| Reply::file(request, &bytes).ending(end)
}

const CDN: &str = "/cdn/model-00001-of-00002.safetensors";

#[test]
fn a_file_cut_off_is_resumed_in_the_same_run() {
    let server = hub(first(2, CDN, broken(End::CutAfter(100_000))));
    let cache = Cache::new(&server);
    assert_holds(&cache.pull().unwrap(), &wanted());
    let ranges: Vec<_> = server.asked(CDN).iter().map(Request::from).collect();
    assert_eq!(ranges, [None, Some(100_000), Some(200_000)]);
}

#[test]
fn a_file_cut_off_for_good_is_resumed_by_the_next_run() {
    let server = hub(first(3, CDN, |request| match request.from() {
        None => broken(End::CutAfter(100_000))(request),
        Some(_) => Reply::new(500, ""),
    }));
    let cache = Cache::new(&server);
    let error = cache.pull().unwrap_err();
    assert!(matches!(&error, HubError::GaveUp { tries: 3, .. }), "{error}");
    assert_eq!(cache.visible(), 0);
    assert_holds(&cache.pull().unwrap(), &wanted());
    assert_eq!(server.asked(CDN).last().unwrap().from(), Some(100_000));
    assert!(cache.blobs().iter().all(|b| !b.ends_with(".incomplete")));
}

#[test]
fn a_server_that_ignores_or_confuses_ranges_makes_the_file_begin_anew() {
    let whole = |_: &Request| Reply::new(200, shard());
    let shifted = |_: &Request| Reply::new(206, &shard()[5..]).with("Content-Range", "bytes 5-699999/700000");
    let beyond = |_: &Request| Reply::new(416, "");
    let answers: [fn(&Request) -> Reply; 3] = [whole, shifted, beyond];
    for answer in answers {
        let server = hub(first(2, CDN, move |request| match request.from() {
            None => broken(End::CutAfter(100_000))(request),
            Some(_) => answer(request),
        }));
        assert_holds(&Cache::new(&server).pull().unwrap(), &wanted());
    }
}

#[test]
fn a_server_that_falls_silent_is_left_and_asked_again() {
    let server = hub(first(1, CDN, broken(End::StallAfter(100_000))));
    let mut cache = Cache::new(&server);
    cache.options.stall = Duration::from_millis(300);
    let (result, told) = cache.pull_told();
    assert_holds(&result.unwrap(), &wanted());
    assert!(told.iter().any(|t| t.contains("Retry") && t.contains("Stalled")), "{told:?}");
}

#[test]
fn a_server_that_stays_silent_is_a_typed_error() {
    let server = hub(first(usize::MAX, CDN, broken(End::StallAfter(0))));
    let mut cache = Cache::new(&server);
    cache.options.stall = Duration::from_millis(100);
    cache.options.tries = 2;
    let error = cache.pull().unwrap_err();
    assert!(matches!(&error, HubError::GaveUp { last, .. } if matches!(**last, HubError::Stalled { .. })), "{error}");
}

#[test]
fn a_corrupt_small_file_is_refused_by_git_s_own_digest() {
    let corrupt = |request: &Request| Reply::file(request, b"{\"model_type\":\"llamb\"}");
    let server = hub(first(1, "/config.json", corrupt));
    let cache = Cache::new(&server);
    let error = cache.pull().unwrap_err();
    let id = wanted()[0].blob_id();
    assert!(
        matches!(&error, HubError::Digest { file, expected, .. } if file == "config.json" && *expected == id),
        "{error}"
    );
    assert!(cache.visible() == 0 && !cache.blobs().iter().any(|b| b.starts_with(&id)));
    assert_holds(&cache.pull().unwrap(), &wanted());
}

#[test]
fn a_corrupt_file_is_refused_with_both_digests_and_not_kept() {
    let corrupt = |request: &Request| {
        let mut bytes = shard();
        bytes[350_000] ^= 1;
        Reply::file(request, &bytes)
    };
    let server = hub(first(1, CDN, corrupt));
    let cache = Cache::new(&server);
    let error = cache.pull().unwrap_err();
    let digest = wanted().into_iter().find(|f| f.name == SHARD).unwrap().sha256();
    assert!(
        matches!(&error, HubError::Digest { file, expected, .. } if file == SHARD && *expected == digest),
        "{error}"
    );
    assert_eq!(cache.visible(), 0);
    assert!(!cache.blobs().iter().any(|b| b.starts_with(&digest)));
    assert_holds(&cache.pull().unwrap(), &wanted());
}

/// The bytes on disk went bad between two runs: resuming would never give the right file.
#[test]
fn a_partial_file_that_went_bad_costs_one_run_and_not_all_of_them() {
    let server = hub(first(1, CDN, broken(End::CutAfter(100_000))));
    let mut cache = Cache::new(&server);
    cache.options.tries = 1;
    cache.pull().unwrap_err();
    let digest = wanted().into_iter().find(|f| f.name == SHARD).unwrap().sha256();
    let partial = cache.model().join("blobs").join(format!("{digest}.incomplete"));
    assert_eq!(fs::read(&partial).unwrap(), shard()[..100_000]);
    fs::write(&partial, vec![0; 100_000]).unwrap();
    assert!(matches!(cache.pull(), Err(HubError::Digest { .. })));
    assert_holds(&cache.pull().unwrap(), &wanted());
}

#[test]
fn too_many_requests_waits_as_long_as_the_server_says() {
    for ending in ["?blobs=true", CDN, "/config.json"] {
        let server = hub(first(1, ending, |_| Reply::new(429, "").with("Retry-After", "7")));
        let cache = Cache::new(&server);
        let (result, told) = cache.pull_told();
        assert_holds(&result.unwrap(), &wanted());
        assert!(told.iter().any(|t| t.contains("Retry") && t.contains("delay: 7s")), "{told:?}");
    }
}

#[test]
fn a_wait_of_hours_is_an_error_at_once() {
    let server = hub(|_| Some(Reply::new(429, "").with("Retry-After", "7200")));
    let error = Cache::new(&server).pull().unwrap_err();
    assert!(matches!(&error, HubError::GaveUp { tries: 1, .. }), "{error}");
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn failing_forever_ends_in_a_typed_error_after_growing_waits() {
    let server = hub(|r| r.path.starts_with("/cdn/").then(|| Reply::new(500, "")));
    let mut cache = Cache::new(&server);
    cache.options.parallel = 1;
    let (result, told) = cache.pull_told();
    let error = result.unwrap_err();
    let status = |e: &HubError| matches!(e, HubError::Status { status: 500, .. });
    assert!(matches!(&error, HubError::GaveUp { tries: 3, last } if status(last)), "{error}");
    let delays: Vec<_> = told.iter().filter_map(|t| t.split("delay: ").nth(1)).collect();
    assert_eq!(delays, ["1s }", "2s }"]);
    assert_eq!(cache.visible(), 0);
}

#[test]
fn a_file_of_another_size_is_refused() {
    let sized = |len: usize| move |_: &Request| Reply::new(200, vec![1; len]);
    for len in [699_999, 700_001] {
        let server = hub(first(usize::MAX, CDN, sized(len)));
        let error = Cache::new(&server).pull().unwrap_err();
        let HubError::Size { expected: 700_000, actual, .. } = &error else { panic!("{error}") };
        assert_eq!(*actual, Some(len as u64));
    }
}

#[test]
fn a_body_that_runs_on_is_cut_at_the_announced_size() {
    let longer = |_: &Request| {
        let body = [b"f4240\r\n".as_slice(), &[b'x'; 1_000_000], b"\r\n0\r\n\r\n"].concat();
        Reply::new(200, body).with("Transfer-Encoding", "chunked")
    };
    let server = hub(first(usize::MAX, CDN, longer));
    let cache = Cache::new(&server);
    let error = cache.pull().unwrap_err();
    assert!(matches!(&error, HubError::Size { file, expected: 700_000, actual: None } if file == SHARD), "{error}");
    assert_eq!(cache.visible(), 0);
}

#[test]
fn an_empty_file_is_named_as_such() {
    let server = hub(first(usize::MAX, CDN, |_| Reply::new(200, "")));
    let error = Cache::new(&server).pull().unwrap_err();
    assert!(matches!(&error, HubError::Empty { file } if file == SHARD), "{error}");

    let mut files = wanted();
    files[1].bytes.clear();
    let server = Server::start(move |request| crate::model::honest(&files, request));
    let error = Cache::new(&server).pull().unwrap_err();
    assert_eq!(error.to_string(), "tokenizer.json is empty on the server: its upload probably failed");
}

#[test]
fn the_token_goes_to_the_hub_and_not_where_it_redirects() {
    let files = wanted();
    let cdn = Server::start(move |request| crate::model::honest(&files, request));
    let address = cdn.url();
    let server = hub(move |request| {
        let path = request.path.strip_prefix("/cdn/")?;
        Some(Reply::new(302, "").with("Location", format!("{address}/cdn/{path}?signature=s")))
    });
    let mut cache = Cache::new(&server);
    cache.options.token = Some(Token::new("hf_secret").unwrap());
    assert_holds(&cache.pull().unwrap(), &wanted());
    assert_eq!(cdn.requests().len(), 2, "both shards");
    assert!(cdn.requests().iter().all(|r| r.header("authorization").is_none()));
    // Also after a redirect on the hub itself.
    assert!(server.requests().iter().all(|r| r.header("authorization") == Some("Bearer hf_secret")));
}

/// The query of such a URL gives access to the file for a while.
#[test]
fn a_signed_url_is_shown_without_its_query() {
    let server = hub(|request| match request.path.contains("signature") {
        true => Some(Reply::new(403, "")),
        false => request
            .path
            .strip_prefix("/cdn/")
            .map(|p| Reply::new(302, "").with("Location", format!("/cdn/{p}?signature=s"))),
    });
    let error = Cache::new(&server).pull().unwrap_err();
    assert!(
        matches!(&error, HubError::Denied { url, .. } if url.contains("/cdn/model") && !url.contains("signature")),
        "{error}"
    );
}

#[test]
fn redirects_in_a_circle_and_to_other_schemes_end() {
    for location in ["/cdn/model-00001-of-00002.safetensors", "file:///etc/passwd", "gopher://x/", "http://u:p@h/"] {
        let server = hub(first(usize::MAX, CDN, move |_| Reply::new(302, "").with("Location", location)));
        let error = Cache::new(&server).pull().unwrap_err();
        assert!(matches!(error, HubError::Redirect { .. }), "{error}");
    }
}

/// A real process, really killed in the middle of a file.
#[test]
fn killed_in_mid_pull_nothing_is_visible_and_the_next_run_completes() {
    const HOME: &str = "BATON_HUB_TEST_HOME";
    const ENDPOINT: &str = "BATON_HUB_TEST_ENDPOINT";
    if let (Ok(home), Ok(endpoint)) = (std::env::var(HOME), std::env::var(ENDPOINT)) {
        let options = Options { endpoint, ..Options::new(home.as_ref()) };
        baton_hub::pull(&crate::model::ID.parse().unwrap(), &options, &|_| {}).unwrap();
        return;
    }
    let (arrived, wait) = mpsc::channel();
    let server = hub(first(1, CDN, move |request| {
        arrived.send(()).unwrap();
        broken(End::StallAfter(100_000))(request)
    }));
    let cache = Cache::new(&server);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "faults::killed_in_mid_pull_nothing_is_visible_and_the_next_run_completes"])
        .env(HOME, cache.home())
        .env(ENDPOINT, server.url())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait.recv_timeout(Duration::from_secs(60)).expect("the child asks for the shard");
    // The shard will never end, so the child is certainly in the middle of the pull.
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(cache.visible(), 0);
    assert!(!cache.model().join("refs/main").exists());
    assert_holds(&cache.pull().unwrap(), &wanted());
}
