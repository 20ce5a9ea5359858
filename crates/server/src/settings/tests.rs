//! Precedence, refusals and what is shown of settings.

use anyhow::Result;
use baton_text::ToolSyntax;
use clap::Args;

use super::*;

fn parse(flags: &[&str], file: &str) -> Result<(Settings, Origins)> {
    let command = ServeArgs::augment_args(clap::Command::new("serve"));
    let matches = command.try_get_matches_from(std::iter::once(&"serve").chain(flags))?;
    let (args, mut origins) = ServeArgs::from_matches(&matches)?;
    Ok((args.over(file, &mut origins)?.resolve()?, origins))
}

#[test]
fn a_flag_beats_the_file_and_the_file_beats_the_default() {
    let file = "port = 9000\nmax-num-seqs = 7\napi-key = [\"s3cret\"]";
    let (settings, origins) = parse(&["--port", "9001"], file).unwrap();
    assert_eq!((settings.port, settings.max_num_seqs, settings.max_n), (9001, 7, 8));
    assert_eq!(settings.api_key[0].0, "s3cret");
    let table = settings.table(&origins).unwrap();
    let origin = |key: &str| table.lines().find(|l| l.starts_with(key)).unwrap().split_whitespace().last().unwrap();
    assert_eq!((origin("port"), origin("max-num-seqs"), origin("host")), ("flag", "file", "default"));
}

#[test]
fn secrets_are_shown_nowhere() {
    let flags = ["--api-key", "s3cret", "--admin-api-key", "s3cret-too"];
    let (settings, origins) = parse(&flags, "").unwrap();
    let shown = format!("{settings:?}{}", settings.table(&origins).unwrap());
    assert!(shown.contains("[redacted]") && !shown.contains("s3cret"), "{shown}");
    for (file, names) in [
        ("port = 1\napi-key = \"s3cret\"", "line 2, api-key"),
        ("api-keys = [\"s3cret\"]", "`api-keys`"),
        ("api-key = [\n  \"a\",\n  s3cret,\n]", "line 3"),
        ("admin-api-key = s3cret", "line 1"),
        ("api-key = [\n  s3cret==,\n]", "line 2"),
        ("api-key = [\n  12, \"s3cret==\",\n]", "line 2"),
    ] {
        let refusal = format!("{:?}", parse(&[], file).unwrap_err());
        assert!(refusal.contains(names) && !refusal.contains("s3cret"), "{refusal}");
    }
}

#[test]
fn unknown_keys_and_absurd_values_are_refused_by_name() {
    let refusal = |flags: &[&str], file: &str| format!("{:#}", parse(flags, file).unwrap_err());
    assert!(refusal(&[], "prot = 1").contains("prot"));
    assert!(refusal(&[], "port = 70000").contains("port"));
    assert!(refusal(&["--max-num-seqs", "0"], "").contains("--max-num-seqs"));
    assert!(refusal(&["--max-num-batched-tokens", "8"], "").contains("--max-num-batched-tokens (8)"));
    assert!(refusal(&["--dtype", "fp4"], "").contains("float32"));
    assert!(refusal(&["--admin-host", "::1"], "").contains("--admin-port"));
    assert!(refusal(&["--max-connections", "0"], "").contains("--max-connections"));
    assert!(refusal(&["--prefix-cache-scope", "tenant"], "").contains("shared"));
    assert!(refusal(&["--ssl-certfile", "a"], "").contains("--ssl-keyfile"));
    assert!(refusal(&["--ssl-ca-certs", "a"], "").contains("--ssl-certfile"));
    assert!(refusal(&["--otlp-traces-endpoint", "collector:4317"], "").contains("http://HOST:PORT"));
    for origin in ["", "example.org", "https://example.org/", "HTTPS://example.org", "https://*.example.org", "[1]"] {
        assert!(refusal(&["--allowed-origins", origin], "").contains("--allowed-origins"), "{origin}");
    }
    for host in ["", "http://baton", "baton:8000", "*.example.org"] {
        assert!(refusal(&["--allowed-hosts", host], "").contains("--allowed-hosts"), "{host}");
    }
    let kv = refusal(&["--kv-cache-dtype", "fp8"], "");
    assert!(["auto", "float32", "bfloat16", "float16", "int8"].iter().all(|name| kv.contains(name)), "{kv}");
    assert!(refusal(&[], "kv-cache-dtype = \"fp8\"").contains("int8"));
    assert!(refusal(&["--lora-modules", "a=b"], "").contains("--enable-lora"));
    assert!(refusal(&["--enable-lora", "--lora-modules", "a"], "").contains("NAME=PATH"));
    assert!(refusal(&["--enable-lora", "--max-lora-rank", "513"], "").contains("--max-lora-rank"));
}

#[test]
fn whoever_asks_for_something_guards_and_whoever_says_so_need_not() {
    let guards = |flags: &[&str]| {
        let settings = parse(flags, "").unwrap().0;
        (settings.guards_inference(), settings.guards_admin())
    };
    assert_eq!(guards(&[]), (false, false));
    assert_eq!(guards(&["--admin-api-key", "k"]), (false, true));
    let tls = ["--ssl-certfile", "a", "--ssl-keyfile", "b"];
    assert_eq!(guards(&tls), (false, false));
    assert_eq!(guards(&[&tls[..], &["--ssl-ca-certs", "c"]].concat()), (true, true));
    for flags in [&["--api-key", "k"][..], &["--api-keys-file", "f"], &["--allow-unauthenticated"]] {
        assert_eq!(guards(flags), (true, true), "{flags:?}");
    }
}

#[test]
fn parsers_of_tool_calls_go_by_their_syntaxes_names() {
    for syntax in ToolSyntax::ALL {
        let parser = parse(&["--tool-call-parser", syntax.name()], "").unwrap().0.tool_call_parser;
        let file = format!("tool-call-parser = \"{}\"", syntax.name());
        assert_eq!(parse(&[], &file).unwrap().0.tool_call_parser, parser);
        assert_eq!(parser.syntax(), Some(syntax));
    }
    assert_eq!(parse(&[], "").unwrap().0.tool_call_parser, ToolCallParser::Auto);
    let refusal = format!("{:#}", parse(&["--tool-call-parser", "qwen"], "").unwrap_err());
    assert!(["auto", "none", "hermes"].iter().all(|name| refusal.contains(name)), "{refusal}");
}

#[test]
fn origins_are_listed_as_flags_commas_or_json() {
    let origins = |flags: &[&str], file: &str| -> Vec<String> {
        let (settings, origins) = parse(flags, file).unwrap();
        let shown = settings.described(&origins).unwrap()["allowed-origins"]["value"].clone();
        // What is shown is what is allowed.
        let shown: Vec<String> = serde_json::from_value(shown).unwrap();
        let allowed: Vec<baton_http::Origin> = shown.iter().map(|origin| origin.parse().unwrap()).collect();
        assert!(settings.allowed_origins.iter().map(|given| &given.origin).eq(&allowed));
        shown
    };
    let both = ["https://example.org", "http://[::1]:3000"];
    assert_eq!(origins(&["--allowed-origins", both[0], both[1]], ""), both);
    assert_eq!(origins(&["--allowed-origins", &both.join(", ")], ""), both);
    assert_eq!(origins(&["--allowed-origins", &format!("{both:?}")], ""), both);
    assert_eq!(origins(&[], &format!("allowed-origins = {both:?}")), both);
    assert_eq!(origins(&["--allowed-origins", "[\"*\"]"], ""), ["*"]);
    assert!(origins(&[], "").is_empty());
}

#[test]
fn a_collector_is_shown_as_it_is_written_in_full() {
    let endpoint = |flags: &[&str]| {
        let (settings, origins) = parse(flags, "").unwrap();
        settings.described(&origins).unwrap()["otlp-traces-endpoint"]["value"].clone()
    };
    assert_eq!(endpoint(&["--otlp-traces-endpoint", "http://collector:4318"]), "http://collector:4318/v1/traces");
    assert!(endpoint(&[]).is_null());
}

#[test]
fn adapters_are_named_as_vllm_names_them() {
    let module = |name: &str, path: &str, base: Option<&str>| LoraModule {
        name: name.into(),
        path: path.into(),
        base_model_name: base.map(str::to_owned),
    };
    let object = r#"{"name": "b", "path": "c, d", "base_model_name": "m"}"#;
    let flags = ["--enable-lora", "--lora-modules", "a=/x=y", object];
    let expected = [module("a", "/x=y", None), module("b", "c, d", Some("m"))];
    assert_eq!(parse(&flags, "").unwrap().0.lora_modules, expected);
    let file = format!("enable-lora = true\nlora-modules = [\"a=/x=y\", '{object}']");
    assert_eq!(parse(&[], &file).unwrap().0.lora_modules, expected);
}
