//! The backend's numbers against those of the simulator, which were written apart from the same documents.

use std::collections::BTreeMap;

use baton_device_ascend::describe;

#[test]
fn every_number_of_the_abi_is_the_one_that_was_written_down_apart() {
    let theirs: BTreeMap<_, _> = ascend_sim::constants().into_iter().collect();
    let ours = baton_device_ascend::constants();
    assert!(ours.len() > 20);
    let differing: Vec<_> =
        ours.iter().filter(|(name, value)| theirs.get(name) != Some(value)).map(|(name, _)| *name).collect();
    assert_eq!(differing, [""; 0]);
}

#[test]
fn every_error_has_the_name_that_was_written_down_apart() {
    let mut errors = 0;
    for (name, value) in ascend_sim::constants() {
        let short = name.strip_prefix("ACL_ERROR_").or(name.starts_with("ACLNN_ERR").then_some(name));
        if let Some(short) = short {
            assert_eq!(describe(value as i32).0, short, "{value}");
            errors += 1;
        }
    }
    assert!(errors > 50);
}
