//! Which libraries are taken, and what is said where none will do.

use std::path::PathBuf;

use tempfile::TempDir;

use super::search;
use crate::installation::{self, Unusable};
use crate::libraries::{Role, Search};
use crate::probe::probe;
use crate::simulator::{NAMES, Simulator, folder};

fn search_in(folder: &TempDir) -> Search {
    Search { folder: Some(folder.path().to_owned()) }
}

/// A library that can be opened and has nothing to do with CANN.
fn other_library() -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("a map of this process");
    let file = maps.split_whitespace().find(|word| word.contains("/libc.so")).expect("the C library");
    PathBuf::from(file)
}

fn opened(folder: &TempDir) -> Vec<(Role, String)> {
    let acl = installation::libraries(&search_in(folder)).unwrap_or_else(|unusable| panic!("{unusable}"));
    let name = |place: &PathBuf| place.file_name().expect("a name").to_string_lossy().into_owned();
    acl.attempts.iter().filter(|a| a.problem.is_none()).map(|a| (a.role, name(&a.place))).collect()
}

#[test]
fn every_set_of_names_under_which_cann_comes_is_found() {
    let _simulator = Simulator::new();
    let sets: [&[&str]; 4] = [
        &NAMES,
        &["libascendcl.so", "libnnopbase.so", "libopapi.so"],
        &["libacl_rt.so", "libnnopbase.so", "libopapi_nn.so", "libopapi_math.so", "libopapi_transformer.so"],
        &["libascendcl.so", "libacl_rt.so", "libnnopbase.so", "libopapi.so", "libhccl.so"],
    ];
    for names in sets {
        let opened = opened(&folder(names));
        assert!(opened.iter().all(|(_, name)| names.contains(&name.as_str())), "{opened:?}");
        for role in [Role::Runtime, Role::Meta, Role::Operators] {
            assert!(opened.iter().any(|(found, _)| *found == role), "{role} of {names:?}");
        }
        let collectives = opened.iter().any(|(role, _)| *role == Role::Collectives);
        assert_eq!(collectives, names.contains(&"libhccl.so"), "{names:?}");
    }
}

#[test]
fn a_library_without_the_functions_gives_way_to_the_next_candidate() {
    let _simulator = Simulator::new();
    let folder = folder(&["libacl_rt.so", "libnnopbase.so", "libopapi.so"]);
    std::os::unix::fs::symlink(other_library(), folder.path().join("libascendcl.so")).expect("a link");
    std::os::unix::fs::symlink(other_library(), folder.path().join("libopapi_nn.so")).expect("a link");
    let found = opened(&folder);
    assert!(found.contains(&(Role::Runtime, "libacl_rt.so".into())), "{found:?}");
    let acl = installation::libraries(&search_in(&folder)).unwrap_or_else(|unusable| panic!("{unusable}"));
    let problem = |name: &str| {
        let attempt = acl.attempts.iter().find(|a| a.place.ends_with(name)).expect("it was tried");
        attempt.problem.clone().expect("it does not serve")
    };
    assert!(problem("libascendcl.so").contains("aclInit"));
    assert!(problem("libopapi_nn.so").contains("no operator"));
}

#[test]
fn a_role_without_a_library_is_named_with_all_that_was_tried() {
    let _simulator = Simulator::new();
    for (role, missing) in
        [(Role::Meta, "libnnopbase.so"), (Role::Runtime, "libascendcl.so"), (Role::Operators, "libopapi")]
    {
        let names: Vec<&str> = NAMES
            .into_iter()
            .filter(|name| !name.starts_with(missing) && !(role == Role::Runtime && *name == "libacl_rt.so"))
            .collect();
        match installation::find(&search_in(&folder(&names)), 0).map(|_| ()) {
            Err(Unusable::Libraries(unavailable)) => {
                let reason = unavailable.reason;
                assert!(reason.contains(&role.to_string()) && reason.contains(missing), "{reason}");
                let others = [Role::Meta, Role::Runtime, Role::Operators].into_iter().filter(|other| *other != role);
                others.for_each(|other| assert!(!reason.contains(&format!("{other}:")), "{reason}"));
            }
            other => panic!("{role}: {:?}", other.err().map(|unusable| unusable.to_string())),
        }
    }
}

#[test]
fn stubs_missing_drivers_and_unknown_chips_are_told_apart() {
    let simulator = Simulator::new();
    // What was once initialised stays so; stubs are met by a search of its own.
    let stubs = folder(&NAMES);
    simulator.control("stub=on");
    assert_eq!(installation::find(&search_in(&stubs), 0).err(), Some(Unusable::Stub));
    simulator.calm();
    simulator.control("devices=0");
    assert_eq!(installation::find(&search(), 0).err(), Some(Unusable::Devices { count: 0 }));
    simulator.control("devices=2");
    assert!(installation::find(&search(), 1).is_ok());
    assert_eq!(installation::find(&search(), 2).err(), Some(Unusable::Devices { count: 2 }));
    for code in [107001, 207004, 507899] {
        simulator.control(&format!("fault=aclrtGetDeviceCount:1:{code}"));
        assert_eq!(installation::find(&search(), 0).err(), Some(Unusable::Devices { count: 0 }), "{code}");
    }
    simulator.control("soc=Ascend999X1");
    assert_eq!(installation::find(&search(), 0).err(), Some(Unusable::Chip { soc: "Ascend999X1".into() }));
}

#[test]
fn a_probe_tells_chip_memory_versions_and_functions() {
    let simulator = Simulator::new();
    let facts = probe(&search(), 0);
    assert_eq!((facts.count, facts.chip.as_deref(), facts.missing.as_slice()), (1, Some("Ascend910B3"), &[][..]));
    assert_eq!(facts.memory.map(|memory| (memory.total, memory.free)), Some((2 << 30, 2 << 30)));
    for name in ["aclInit", "aclCreateTensor", "aclnnMm", "HcclAllReduce"] {
        assert_eq!(facts.symbols.get(name), Some(&true), "{name}");
    }
    simulator.expect_clean();
    let facts = probe(&search(), 1);
    assert_eq!(facts.missing.len(), 1, "{:?}", facts.missing);
    simulator.control("devices=0");
    assert_eq!((probe(&search(), 0).count, probe(&search(), 0).chip), (0, None));
}
