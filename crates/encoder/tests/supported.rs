//! `models/supported.toml` lists the encoders that the code has, and what it calls golden has goldens.

mod common;

use baton_encoder::Architecture;

#[test]
fn every_encoder_is_listed_and_judged_by_cases_of_its_class() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/supported.toml");
    let page: toml::Table = std::fs::read_to_string(file).unwrap().parse().unwrap();
    let strings = |value: &toml::Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect()
    };
    let mut listed = Vec::new();
    for entry in page["encoder"].as_array().unwrap() {
        let names = strings(&entry["names"]);
        assert_eq!(entry["judged"].as_str(), Some("golden"));
        for case in strings(&entry["cases"]) {
            let config = std::fs::read(common::data(&case).join("config.json")).unwrap();
            let architecture = Architecture::of(&config).unwrap();
            assert!(names.iter().any(|name| name == architecture.name), "{case}");
            assert!(!common::golden(&case).is_empty(), "{case}");
        }
        listed.extend(names);
    }
    listed.sort();
    let mut built = Architecture::ALL.map(|a| a.name.to_owned());
    built.sort();
    assert_eq!(listed, built);
}
