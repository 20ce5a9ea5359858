//! `models/supported.toml` says what the code does, and what it calls judged by goldens has goldens.

use std::collections::BTreeSet;

use crate::common::gguf::{GgufFile, layouts, text};
use crate::common::{CASES, folder, json, options};
use baton_device::{Backend, DType, Reference};
use baton_device_cpu::{CpuBackend, CpuOptions, Isa};
use baton_model::{Architecture, Files, load};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Supported {
    architecture: Vec<ArchitectureEntry>,
    /// Compared with the code in `crates/encoder`.
    #[serde(rename = "encoder")]
    _encoder: serde::de::IgnoredAny,
    gguf: Vec<ArchitectureEntry>,
    format: Vec<FormatEntry>,
    stored: Vec<FormatEntry>,
    adapter: Vec<FormatEntry>,
    device: Vec<DeviceEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ArchitectureEntry {
    name: String,
    models: String,
    judged: Judged,
    #[serde(default)]
    cases: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FormatEntry {
    name: String,
    judged: Judged,
    #[serde(default)]
    cases: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceEntry {
    name: String,
    isa: String,
    judged: Judged,
}

#[derive(Debug, Deserialize, PartialEq)]
enum Judged {
    #[serde(rename = "golden")]
    Golden,
    #[serde(rename = "conformance")]
    Conformance,
    #[serde(rename = "bits")]
    Bits,
    #[serde(rename = "library")]
    Library,
    #[serde(rename = "peft")]
    Peft,
    #[serde(rename = "judge")]
    Judge,
    #[serde(rename = "emulated")]
    Emulated,
    #[serde(rename = "simulator")]
    Simulator,
    #[serde(rename = "not run")]
    NotRun,
}

fn supported() -> Supported {
    let path = folder("../supported.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    toml::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn architecture_of(case: &str) -> String {
    json(folder(case).join("config.json"))["architectures"][0].as_str().unwrap().to_owned()
}

#[test]
fn every_architecture_is_listed_in_the_order_of_the_code() {
    let listed: Vec<String> = supported().architecture.into_iter().map(|a| a.name).collect();
    assert_eq!(listed, Architecture::ALL.map(Architecture::name));
}

#[test]
fn goldens_are_of_the_architecture_that_names_them_and_every_golden_is_named() {
    let mut named = BTreeSet::new();
    for entry in supported().architecture {
        assert!(!entry.models.is_empty());
        assert_eq!(entry.judged == Judged::Golden, !entry.cases.is_empty(), "{}", entry.name);
        for case in entry.cases {
            assert_eq!(architecture_of(&case), entry.name, "{case}");
            named.insert(case);
        }
    }
    assert_eq!(named, CASES.map(str::to_owned).into());
}

#[test]
fn every_gguf_architecture_is_listed_and_its_layouts_are_all_named() {
    let (layouts, listed) = (layouts(), supported().gguf);
    let mut odd = GgufFile::of(&layouts["qwen3"], |_, _| DType::F32);
    odd.set("general.architecture", (8, text("odd")));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.gguf");
    std::fs::write(&path, odd.bytes()).unwrap();
    let refusal = load(Reference::new(), &Files::at(path).unwrap(), &options()).err().unwrap().to_string();
    let names: Vec<&str> = listed.iter().map(|a| a.name.as_str()).collect();
    assert!(refusal.ends_with(&format!("supported: {}", names.join(", "))), "{refusal}");
    let mut named = BTreeSet::new();
    for entry in &listed {
        assert!(entry.judged == Judged::Bits && !entry.models.is_empty() && !entry.cases.is_empty(), "{}", entry.name);
        for case in &entry.cases {
            assert_eq!(layouts[case]["keys"]["general.architecture"][1], entry.name, "{case}");
            named.insert(case);
        }
    }
    assert_eq!(layouts.keys().collect::<BTreeSet<_>>(), named);
}

#[test]
fn every_format_is_listed_and_its_goldens_are_stored_in_it() {
    let formats = supported().format;
    let listed: BTreeSet<&str> = formats.iter().map(|f| f.name.as_str()).collect();
    for format in &Reference::new().caps().weight_formats {
        assert!(listed.contains(format.to_string().as_str()), "{format} is not listed");
    }
    for format in &formats {
        assert_eq!(format.judged == Judged::Golden, !format.cases.is_empty(), "{}", format.name);
        for case in &format.cases {
            let stored = json(folder(case).join("config.json"))["torch_dtype"].as_str().unwrap().to_owned();
            assert_eq!(stored.replace("bfloat", "bf").replace("float", "f"), format.name, "{case}");
        }
    }
}

#[test]
fn quantised_checkpoints_that_are_called_judged_are_there() {
    let judges = json(folder("quantized/judges.json"));
    for entry in supported().stored {
        assert!(matches!(entry.judged, Judged::Golden | Judged::Library | Judged::Bits), "{}", entry.name);
        assert!(!entry.cases.is_empty(), "{}", entry.name);
        for case in entry.cases {
            let config = json(folder(&case).join("config.json"));
            // Those are made by tests.
            if entry.judged == Judged::Bits {
                continue;
            }
            assert!(config["quantization_config"].is_object(), "{case}");
            let library = &judges[case.trim_start_matches("quantized/")]["library"];
            assert_eq!(entry.judged == Judged::Library, library.is_string(), "{case}");
        }
    }
}

#[test]
fn every_golden_adapter_is_named_and_no_other() {
    let mut named = BTreeSet::new();
    for entry in supported().adapter {
        assert!(entry.judged == Judged::Peft && !entry.cases.is_empty(), "{}", entry.name);
        named.extend(entry.cases);
    }
    let folders = std::fs::read_dir(folder("lora")).unwrap();
    let there: BTreeSet<String> = folders.map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(named, there);
    for case in named {
        let golden = json(folder("lora").join(&case).join("golden.json"));
        assert_eq!(golden["case"], *case);
        assert!(CASES.contains(&golden["base"].as_str().unwrap()), "{case}");
    }
}

/// Those of this machine; others are listed too.
#[test]
fn every_device_and_instruction_set_is_listed() {
    let devices = supported().device;
    let judged = |name: &str, isa: &str| devices.iter().find(|d| d.name == name && d.isa == isa).map(|d| &d.judged);
    let reference = Reference::new();
    assert_eq!(judged(&reference.caps().device, &reference.caps().isa), Some(&Judged::Judge));
    for isa in Isa::available() {
        let backend = CpuBackend::new(&CpuOptions { threads: 1, isa: Some(isa) }).unwrap();
        assert!(judged(&backend.caps().device, &backend.caps().isa).is_some(), "{isa} is not listed");
    }
}
