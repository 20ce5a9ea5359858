//! The page's files as they are sent. What a browser makes of them is tested in one.

use std::path::Path;

use baton_http::ApiKey;

use crate::harness::{Server, Setup, request};

/// Everything in the folder of the page but what serves it, and the index, which is at `/`.
fn files() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/page");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let file = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        let url = match name.as_str() {
            "mod.rs" => return None,
            "index.html" => "/".to_owned(),
            name => format!("/page/{name}"),
        };
        Some((url, std::fs::read_to_string(entry.path()).unwrap()))
    };
    entries.filter_map(file).collect()
}

async fn guarded() -> Server {
    let mut setup = Setup::default();
    setup.config.api_keys = vec![ApiKey::new("key".into()).unwrap()];
    setup.start().await
}

#[tokio::test]
async fn every_file_of_the_page_is_sent_without_a_key_under_a_policy_that_lets_it_load_nothing_else() {
    let server = guarded().await;
    let files = files();
    assert!(files.len() > 10, "{files:?}");
    for (url, text) in files {
        let reply = server.get(&url).await;
        let kind = match url.rsplit('.').next().unwrap() {
            "js" => "text/javascript; charset=utf-8",
            "css" => "text/css; charset=utf-8",
            "svg" => "image/svg+xml",
            _ => "text/html; charset=utf-8",
        };
        assert_eq!((reply.status, reply.header("content-type"), &reply.body), (200, Some(kind), &text), "{url}");
        let policy: Vec<_> = reply.header("content-security-policy").unwrap().split("; ").collect();
        assert_eq!(policy[0], "default-src 'none'", "{url}");
        let sources = policy[1..].iter().filter_map(|rule| rule.split_once("-src "));
        assert!(sources.clone().count() >= 4 && sources.clone().all(|(_, source)| source == "'self'"), "{policy:?}");
        for rule in ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"] {
            assert!(policy.contains(&rule), "{policy:?}");
        }
        for (name, value) in
            [("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer"), ("cache-control", "no-cache")]
        {
            assert_eq!(reply.header(name), Some(value), "{url}");
        }
    }
}

#[tokio::test]
async fn a_browser_that_has_a_file_is_told_so_and_sent_nothing() {
    let server = guarded().await;
    let tag = |reply: &crate::harness::Reply| reply.header("etag").unwrap().to_owned();
    let (script, style) = (server.get("/page/app.js").await, server.get("/page/style.css").await);
    assert_ne!(tag(&script), tag(&style));
    for tags in [tag(&script), format!("\"other\", {}", tag(&script))] {
        for method in ["GET", "HEAD"] {
            let asked = request(method, "/page/app.js", &format!("if-none-match: {tags}\r\n"), b"");
            let reply = server.raw(&asked).await;
            assert_eq!((reply.status, reply.body.as_str()), (304, ""), "{method} {tags}");
            assert_eq!((tag(&reply), reply.header("cache-control")), (tag(&script), Some("no-cache")));
        }
    }
    let outdated = request("GET", "/page/app.js", &format!("if-none-match: {}\r\n", tag(&style)), b"");
    assert_eq!(server.raw(&outdated).await.body, script.body);
}

#[tokio::test]
async fn what_is_no_file_of_the_page_is_not_found() {
    let server = guarded().await;
    for path in ["/page/nope.js", "/page/mod.rs", "/page/index.html", "/page/..%2fmod.rs", "/page/%ff"] {
        let reply = server.get(path).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (404, "not_found"), "{path}");
    }
    let reply = server.raw(&request("POST", "/", "", b"")).await;
    assert_eq!((reply.status, reply.header("allow")), (405, Some("GET,HEAD")));
}

#[test]
fn the_page_names_no_other_place_writes_no_markup_and_has_nothing_inline() {
    for (url, text) in files() {
        // The name of SVG's elements is written as a place, which nobody asks.
        let text = text.replace("http://www.w3.org/2000/svg", "");
        for outside in ["http:", "https:", "@import", "url("] {
            assert!(!text.contains(outside), "{outside} in {url}");
        }
        for markup in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser", "srcdoc"]
        {
            assert!(!text.contains(markup), "{markup} in {url}");
        }
        if url == "/" {
            for inline in ["<style", " style=", "<script>", "javascript:", " onclick", " onload"] {
                assert!(!text.contains(inline), "{inline}");
            }
        }
    }
}
