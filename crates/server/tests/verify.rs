//! `baton verify` on bundles with a fault, and on honest ones: what catches each, and by how much.

mod common;

use std::fs;

use common::bundle::{Bundle, Verdict, models};
use serde_json::{Value, json};

/// Kept and computed as the trainer did, so that nothing but a fault shows.
const EXACT: [&str; 2] = ["--dtype", "float32"];

impl Verdict {
    fn check(&self, name: &str) -> &Value {
        let checks = self.report["checks"].as_array().unwrap_or_else(|| panic!("no report: {}", self.stderr));
        checks.iter().find(|check| check["name"] == name).expect("every check is in the report")
    }

    /// Names of the checks that failed.
    fn failed(&self) -> Vec<&str> {
        let checks = self.report["checks"].as_array().unwrap_or_else(|| panic!("no report: {}", self.stderr));
        let failed = checks.iter().filter(|check| check["verdict"] == "fail");
        failed.map(|check| check["name"].as_str().expect("a name")).collect()
    }

    /// Everything said of a check.
    fn details(&self, name: &str) -> String {
        self.check(name)["details"].to_string()
    }

    fn figure(&self, name: &str) -> f64 {
        self.report["devices"][0]["numerics"][name].as_f64().unwrap_or(f64::NAN)
    }
}

fn abacus() -> Bundle {
    Bundle::copy(&models("abacus"))
}

#[test]
fn the_bundled_model_passes_in_every_precision_that_is_honest() {
    let bundle = abacus();
    for flags in [&[][..], &EXACT, &["--dtype", "float16"], &["--quantize", "q8_0"], &["--quantize", "int8"]] {
        let verdict = bundle.verify(flags);
        assert_eq!(verdict.code, 0, "{flags:?}: {:#}{}", verdict.report, verdict.stderr);
        assert_eq!(verdict.report["verdict"], "pass");
    }
    let exact = bundle.verify(&EXACT);
    assert!(exact.figure("max_abs_logprob_diff") < 2e-3, "{}", exact.figure("max_abs_logprob_diff"));
    let coarse = bundle.verify(&["--quantize", "q4_0"]);
    assert_eq!(coarse.report["devices"][0]["precision"], "int4", "judged at its own class");
}

#[test]
fn one_flipped_bit_in_any_file_is_found_and_the_file_named() {
    let listed = abacus();
    let manifest: Value = serde_json::from_slice(&fs::read(listed.file("handoff.json")).unwrap()).unwrap();
    for (i, name) in manifest["files"].as_object().unwrap().keys().enumerate() {
        let bundle = abacus();
        bundle.edit(name, |bytes| {
            let at = bytes.len() * (2 * i + 1) / 37 % bytes.len();
            bytes[at] ^= 1 << (i % 8);
        });
        let verdict = bundle.verify(&[]);
        assert_eq!(verdict.code, 1, "{name}: {}", verdict.stderr);
        assert!(verdict.failed().contains(&"integrity"), "{name}");
        assert!(verdict.details("integrity").contains(name.as_str()), "{}", verdict.details("integrity"));
    }
}

/// A fault from before the digests were made: how it comes about, the check that catches it, and a word of why.
struct Fault {
    name: &'static str,
    plant: fn(&Bundle),
    /// Digests of tensors were made anew as well, so that only the numbers can tell.
    tensors_anew: bool,
    caught_by: &'static str,
    says: &'static str,
}

const O_PROJ: &str = "model.layers.2.self_attn.o_proj.weight";
const EXPERTS: [&str; 2] =
    ["model.layers.2.mlp.experts.1.up_proj.weight", "model.layers.2.mlp.experts.5.up_proj.weight"];

fn swapped(bundle: &Bundle) {
    bundle.tensors(EXPERTS, |[a, b]| a.swap_with_slice(b));
}

fn transposed(bundle: &Bundle) {
    bundle.tensors([O_PROJ], |[bytes]| {
        let (elements, _) = bytes.as_chunks_mut::<2>();
        let side = elements.len().isqrt();
        assert_eq!(side * side, elements.len());
        for row in 0..side {
            for column in 0..row {
                elements.swap(row * side + column, column * side + row);
            }
        }
    });
}

const FAULTS: &[Fault] = &[
    Fault {
        name: "two tensors swapped",
        plant: swapped,
        tensors_anew: false,
        caught_by: "integrity",
        says: EXPERTS[1],
    },
    Fault {
        name: "two tensors swapped, digested anew",
        plant: swapped,
        tensors_anew: true,
        caught_by: "numerics",
        says: "logprob",
    },
    Fault {
        name: "a matrix transposed",
        plant: transposed,
        tensors_anew: false,
        caught_by: "integrity",
        says: "ranspose",
    },
    Fault {
        name: "a matrix transposed, digested anew",
        plant: transposed,
        tensors_anew: true,
        caught_by: "numerics",
        says: "logprob",
    },
    Fault {
        name: "another rope base",
        plant: |bundle| bundle.replace("config.json", "\"rope_theta\": 10000.0", "\"rope_theta\": 50000.0"),
        tensors_anew: true,
        caught_by: "numerics",
        says: "logprob",
    },
    Fault {
        name: "norm epsilon 1e-5 for 1e-6",
        plant: |bundle| bundle.replace("config.json", "\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 1e-05"),
        tensors_anew: true,
        caught_by: "numerics",
        says: "logprob",
    },
    Fault {
        name: "a scale applied twice",
        plant: |bundle| bundle.bf16("model.layers.3.input_layernorm.weight", |_, scale| scale * scale),
        tensors_anew: true,
        caught_by: "numerics",
        says: "logprob",
    },
    Fault {
        name: "a merge removed from the tokenizer",
        plant: without_a_merge,
        tensors_anew: true,
        caught_by: "tokenizer",
        says: "",
    },
    Fault {
        name: "a second BOS from the template",
        plant: |bundle| {
            let bos = "{{- '<｜begin▁of▁sentence｜>' -}}";
            bundle.replace("tokenizer_config.json", bos, &bos.repeat(2));
        },
        tensors_anew: true,
        caught_by: "template",
        says: "begin",
    },
    Fault {
        name: "a newline changed in the template",
        plant: |bundle| bundle.replace("tokenizer_config.json", r"'# Tools\\n'", r"'# Tools\\n\\n'"),
        tensors_anew: true,
        caught_by: "template",
        says: "Tools",
    },
    Fault {
        name: "weights of another step",
        plant: |bundle| {
            for layer in 0..5 {
                let name = format!("model.layers.{layer}.self_attn.o_proj.weight");
                bundle.bf16(&name, |i, weight| weight * if i % 2 == 0 { 1.06 } else { 0.94 });
            }
        },
        tensors_anew: true,
        caught_by: "numerics",
        says: "logprob",
    },
];

/// A line of the table of faults: what failed, and for each column its class, verdict and figures.
fn row(name: &str, verdict: &Verdict) -> String {
    let column = |column: &Value| {
        let failed = column["findings"].as_array().expect("findings").iter().any(|found| found["verdict"] == "fail");
        let figure = |name: &str| column["numerics"][name].as_f64().unwrap_or(f64::NAN);
        let p99 = column["numerics"]["likely"]["p99"].as_f64().unwrap_or(f64::NAN);
        format!(
            "{} {}: max {:.2e}, mean {:.2e}, p99 {p99:.2e}, KL {:.2e}",
            column["precision"].as_str().expect("a class"),
            if failed { "FAIL" } else { "pass" },
            figure("max_abs_logprob_diff"),
            figure("mean_abs_logprob_diff"),
            figure("kl"),
        )
    };
    let columns = verdict.report["devices"].as_array().expect("columns").iter().map(column);
    format!("| {name} | {} | {} |\n", verdict.failed().join(", "), columns.collect::<Vec<_>>().join(" | "))
}

/// With `--nocapture`, the record of faults.
#[allow(clippy::print_stdout)]
fn record(lines: &str) {
    println!("{lines}");
}

/// The merge that makes a token of the first golden prompt.
fn without_a_merge(bundle: &Bundle) {
    bundle.edit("tokenizer.json", |bytes| {
        let mut tokenizer: Value = serde_json::from_slice(bytes).expect("JSON");
        let merges = tokenizer["model"]["merges"].as_array_mut().expect("merges");
        merges.remove(20);
        *bytes = tokenizer.to_string().into_bytes();
    });
}

#[test]
fn faults_from_before_the_digests_are_caught_by_the_check_that_is_for_them() {
    let mut table = String::new();
    for fault in FAULTS {
        let bundle = abacus();
        (fault.plant)(&bundle);
        bundle.digest_anew(fault.tensors_anew);
        let verdict = bundle.verify(&[]);
        table += &row(fault.name, &verdict);
        assert_eq!(verdict.code, 1, "{}: {}{}", fault.name, verdict.report, verdict.stderr);
        assert!(verdict.failed().contains(&fault.caught_by), "{}: {:?}", fault.name, verdict.failed());
        let details = verdict.details(fault.caught_by);
        assert!(details.contains(fault.says), "{}: {details}", fault.name);
    }
    record(&table);
}

/// A tiny model with yarn, the values of its golden prompt made into a manifest.
fn with_yarn() -> Bundle {
    let bundle = Bundle::copy(&models("golden/deepseek-v3"));
    for name in ["golden.json", "golden.safetensors"] {
        fs::remove_file(bundle.file(name)).unwrap();
    }
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(models("golden/tokenizers/deepseek").join(name), bundle.file(name)).unwrap();
    }
    let golden: Value =
        serde_json::from_slice(&fs::read(models("golden/deepseek-v3").join("golden.json")).unwrap()).unwrap();
    let prompts = golden["prompts"].as_array().unwrap();
    let short = prompts.iter().find(|prompt| prompt["name"] == "short").expect("it has all positions");
    let top = short["top20_logprobs"].as_array().unwrap().iter().enumerate();
    let top: serde_json::Map<_, _> = top.map(|(position, list)| (position.to_string(), list.clone())).collect();
    let manifest = json!({
        "format": "baton-handoff", "version": 1, "model": {"name": "yarn"}, "generation": "0".repeat(64), "files": {},
        "trained": {"dtype": "bfloat16"}, "computed": {"dtype": "float32"},
        "cases": [{
            "name": "short", "prompt_ids": short["ids"], "logprobs": short["prompt_logprobs"], "top": top,
        }],
    });
    fs::write(bundle.file("handoff.json"), manifest.to_string()).unwrap();
    bundle.digest_anew(false);
    bundle
}

#[test]
fn a_missing_yarn_factor_is_caught() {
    let honest = with_yarn().verify(&EXACT);
    assert_eq!(honest.code, 0, "{:#}{}", honest.report, honest.stderr);
    let bundle = with_yarn();
    bundle.edit("config.json", |bytes| {
        let mut config: Value = serde_json::from_slice(bytes).unwrap();
        config.as_object_mut().unwrap().remove("rope_scaling").expect("it has yarn");
        *bytes = config.to_string().into_bytes();
    });
    bundle.digest_anew(false);
    let verdict = bundle.verify(&EXACT);
    record(&row("yarn missing from the config", &verdict));
    assert_eq!((verdict.code, verdict.failed()), (1, vec!["numerics"]), "{:#}", verdict.report);
}

#[test]
fn what_cannot_be_judged_ends_with_2_and_says_what_would_have_been_taken() {
    let bundle = abacus();
    bundle.manifest(|manifest| manifest["version"] = 2.into());
    let verdict = bundle.verify(&[]);
    assert_eq!(verdict.code, 2);
    assert!(verdict.stderr.contains('2') && verdict.stderr.contains('1'), "{}", verdict.stderr);

    let verdict = abacus().verify(&["--devices", "cpu,abacus"]);
    assert_eq!(verdict.code, 2);
    assert!(verdict.stderr.contains("reference"), "{}", verdict.stderr);

    let bare = abacus();
    fs::remove_file(bare.file("handoff.json")).unwrap();
    let verdict = bare.verify(&[]);
    assert_eq!(verdict.code, 2);
    assert!(verdict.stderr.contains("baton_export.py"), "{}", verdict.stderr);
}

#[test]
fn devices_stand_side_by_side_and_every_way_gives_the_same_bits() {
    let verdict = abacus().verify(&["--devices", "cpu,reference", "--determinism"]);
    assert_eq!(verdict.code, 0, "{:#}{}", verdict.report, verdict.stderr);
    let devices = verdict.report["devices"].as_array().unwrap();
    assert!(["cpu", "reference"].iter().all(|name| devices.iter().any(|column| column["device"] == *name)));
    // What serves in less than float32 is judged without rounding besides.
    assert!(devices.iter().any(|column| column["device"] == "cpu" && column["precision"] == "float32"));
    assert_eq!(verdict.check("determinism")["verdict"], "pass");
    let ways = verdict.details("determinism");
    assert!(!ways.contains("not exercised"), "{ways}");
}

#[test]
fn the_cost_of_a_quantisation_is_a_number() {
    let verdict = abacus().verify(&["--against", "q4_0"]);
    let between = &verdict.report["comparison"]["between"];
    assert!(between["kl"].as_f64().unwrap() > 1e-6, "{between:#}");
    assert!(between["perplexity"]["ratio"].as_f64().unwrap() > 0.0);
}
