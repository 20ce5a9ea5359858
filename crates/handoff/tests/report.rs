//! The report: what passes, and how it is shown.

mod device;

use baton_handoff::{
    CheckName, Column, Comparison, DeviceFacts, Manifest, Parity, PrecisionClass, Replayed, Report, Task, Tolerances,
    Verdict, Way, determinism, html, judge, replay_cases,
};
use device::{Device, cases, nothing};
use serde_json::{Value, json};

const HOSTILE: &str = "</title><script>alert('x')</script>\"><img src=x onerror=y>&amp;\u{1b}[2J\u{202e}\n";

fn manifest(name: &str) -> Manifest {
    let mut cases = cases();
    cases[0].name = name.into();
    let manifest = json!({
        "format": "baton-handoff", "version": 1, "generation": "0f".repeat(32), "files": {},
        "model": {"name": name, "license": name, "lineage": {name: [name]}},
        "trained": {"dtype": "bfloat16", "quantization": null, "framework": name, "commit": name},
        "computed": {"dtype": "float32", "framework": name, "device": name},
        "cases": cases,
    });
    serde_json::from_value(manifest).expect("a manifest")
}

fn column(manifest: &Manifest, device: &str, plant: impl FnMut(Way, &Task, &mut Replayed)) -> Column {
    let tolerances = Tolerances::default_for(PrecisionClass::Half);
    let outcomes = replay_cases(&manifest.cases, 64, &mut Device(plant), &mut |_, _| true).unwrap();
    let numerics = Parity::of(&manifest.cases, &outcomes).numerics(tolerances.top1_margin());
    let findings = judge(&numerics, &tolerances);
    let device = DeviceFacts {
        device: device.into(),
        isa: "avx2".into(),
        formats: "weights bf16, activations f32".into(),
        precision: PrecisionClass::Half,
    };
    Column { device, tolerances, numerics, findings }
}

fn slightly_off(_: Way, _: &Task, replayed: &mut Replayed) {
    for (position, score) in replayed.scores.iter_mut().enumerate() {
        score.targets.iter_mut().chain(&mut score.next).for_each(|x| *x -= 0.001 * (position + 1) as f32);
    }
}

/// A report in which everything was run.
fn whole(name: &str) -> Report {
    let manifest = manifest(name);
    let mut report = Report::new(&manifest);
    for check in [CheckName::Integrity, CheckName::Compatibility, CheckName::Tokenizer] {
        report.check(check, Ok(vec![name.to_owned()]));
    }
    report.skip(CheckName::Template, name);
    report.skip(CheckName::Signature, "no signature");
    report.set_signature(name);
    let (a, b) = (column(&manifest, name, nothing), column(&manifest, "cuda", slightly_off));
    let comparison = Comparison {
        from: name.into(),
        to: "cuda".into(),
        a: a.numerics.clone(),
        b: b.numerics.clone(),
        between: b.numerics.clone(),
    };
    report.add_device(a);
    report.add_device(b);
    report.set_determinism(determinism(&manifest.cases, 64, true, &mut Device(nothing)).unwrap());
    report.set_comparison(comparison);
    report
}

#[test]
fn a_report_passes_only_when_all_that_is_required_was_run_and_holds() {
    assert_eq!(Report::default().verdict(), Verdict::NotRun);
    let report = whole("model");
    assert_eq!(report.verdict(), Verdict::Pass, "{report}");
    assert_eq!(report.reasons(), Vec::<String>::new());
    for check in report.checks() {
        let mut failing = report.clone();
        failing.check(check.name, Err(vec!["one".into(), "two".into()]));
        assert_eq!(failing.verdict(), Verdict::Fail);
        assert_eq!(failing.reasons(), [format!("{}: one", check.name), format!("{}: two", check.name)]);
    }
    let mut partial = Report::new(&manifest("model"));
    partial.check(CheckName::Integrity, Ok(Vec::new()));
    partial.add_device(column(&manifest("model"), "cpu", nothing));
    assert_eq!(partial.verdict(), Verdict::NotRun, "nobody has looked at tokenizer and template");
}

#[test]
fn one_device_of_two_that_is_off_fails_the_whole_in_any_order() {
    let manifest = manifest("model");
    let far = |_: Way, task: &Task, replayed: &mut Replayed| {
        if task.ids[0] == 6 {
            replayed.scores[1].targets[0] -= 7.5;
        }
    };
    for order in [[true, false], [false, true]] {
        let mut report = whole("model");
        for good in order {
            report.add_device(if good { column(&manifest, "good", nothing) } else { column(&manifest, "bad", far) });
        }
        assert_eq!(report.verdict(), Verdict::Fail);
        let reasons = report.reasons();
        let named = |text: &str| reasons.iter().any(|reason| reason.contains(text));
        assert!(named("numerics: bad (avx2), half: max |Δ logprob| is 7.5, allowed is 6"), "{reasons:?}");
        assert!(named("case third, position 1"), "{reasons:?}");
        assert!(!named("good"), "{reasons:?}");
    }
}

#[test]
fn json_has_the_whole_report() {
    let value = serde_json::to_value(whole("model")).unwrap();
    assert_eq!(value["verdict"], "pass");
    assert_eq!(value["bundle"]["generation"], "0f".repeat(32));
    let checks: Vec<&Value> = value["checks"].as_array().unwrap().iter().map(|check| &check["name"]).collect();
    let names = "integrity signature compatibility tokenizer template numerics determinism comparison";
    assert_eq!(checks, names.split(' ').collect::<Vec<_>>());
    assert_eq!(value["devices"][1]["device"], "cuda");
    assert_eq!(value["devices"][1]["precision"], "half");
    assert_eq!(value["devices"][1]["findings"][1]["measure"], "max_abs_logprob_diff");
    assert_eq!(value["devices"][1]["findings"][1]["verdict"], "pass");
    assert!(value["devices"][1]["numerics"]["largest"]["position"].is_u64());
    assert_eq!(value["determinism"]["ways"][2], json!({"way": "cached", "found": "equal"}));
    assert!(value["comparison"]["between"]["kl"].is_f64());
}

#[test]
fn the_table_is_aligned_and_has_no_control_characters() {
    let text = whole(HOSTILE).to_string();
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()) && !text.contains('\u{202e}'), "{text}");
    let text = whole("model").to_string();
    let rows: Vec<&str> = text.lines().filter(|line| line.contains("|Δ logprob|") && line.ends_with("pass")).collect();
    let starts = |line: &str| line.chars().collect::<Vec<_>>().windows(2).position(|w| w == [' ', '0']);
    assert_eq!(rows.len(), 3);
    assert_eq!(starts(rows[0]), starts(rows[1]), "{text}");
    assert!(text.contains("model        model\n") && text.ends_with("\npass\n"), "{text}");
}

#[test]
fn a_page_of_hostile_names_has_no_tag_of_theirs_and_is_balanced() {
    for name in ["model", HOSTILE] {
        let page = html(&whole(name));
        balanced(&page);
        assert_eq!(page.matches("<svg").count(), 3, "all plots are drawn");
        let lower = page.to_lowercase();
        assert!(!lower.contains("<script") && !lower.contains("<img") && !lower.contains("onerror=y>"), "{page}");
        for fetched in ["src=", "href=", "url(", "@import"] {
            // The name says so too, as text.
            assert_eq!(
                lower.matches(fetched).count(),
                lower.matches("&lt;img src=x").count() * usize::from(fetched == "src=")
            );
        }
    }
    let mut failing = whole(HOSTILE);
    failing.check(CheckName::Integrity, Err(vec![HOSTILE.into()]));
    balanced(&html(&failing));
    balanced(&html(&Report::default()));
}

#[test]
fn plots_of_extreme_values_and_no_values_are_drawn() {
    let manifest = manifest("model");
    for spoil in [f64::INFINITY, f64::NAN, 1e300, 0.0] {
        let mut column = column(&manifest, "cpu", slightly_off);
        column.numerics.by_position.iter_mut().for_each(|at| (at.max, at.mean) = (spoil, spoil));
        column.numerics.histogram.iter_mut().for_each(|bucket| bucket.count = 0);
        column.numerics.greedy.iter_mut().for_each(|greedy| (greedy.agreed, greedy.of) = (0, 0));
        let mut report = Report::new(&manifest);
        report.add_device(column);
        let page = html(&report);
        balanced(&page);
        assert_eq!(page.matches("<svg").count(), 3, "{spoil}");
    }
    let mut empty = column(&manifest, "cpu", nothing);
    empty.numerics = Parity::default().numerics(0.0);
    let mut report = Report::new(&manifest);
    report.add_device(empty);
    balanced(&html(&report));
}

/// Scans tags: every opened one is closed in order, and attributes are quoted. Panics otherwise.
fn balanced(page: &str) {
    let (mut open, mut rest) = (Vec::new(), page);
    while let Some(at) = rest.find('<') {
        assert!(!rest[..at].contains('>'), "a bare > before {}", &rest[at..rest.len().min(at + 40)]);
        let end = at + rest[at..].find('>').expect("a tag that ends");
        let tag = &rest[at + 1..end];
        assert!(!tag.contains('<') && tag.matches('"').count() % 2 == 0, "<{tag}>");
        let name = tag.split([' ', '/']).next().unwrap();
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
        } else if !tag.ends_with('/') && !matches!(name, "meta" | "!doctype") {
            open.push(name);
        }
        rest = &rest[end + 1..];
    }
    assert_eq!(open, Vec::<&str>::new());
}
