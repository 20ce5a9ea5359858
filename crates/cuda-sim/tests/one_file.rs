//! `include/try.cpp`: a kernel's author needs the host's compiler and nothing else.

use std::{path::Path, process::Command};

#[test]
fn kernels_of_one_file_agree_with_plain_loops_in_any_order_of_threads() {
    if !cuda_sim::can_compile() {
        return;
    }
    let compiler = cuda_sim::compiler().expect("one");
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("try");
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut build = Command::new(compiler);
    build.args(["-std=c++17", "-O2", "-w", "-DBATON_EMULATED", "-DEMULATED_MAIN", "-include"]);
    build.arg(here.join("include/emulate.h")).arg("-I").arg(here.join("../device-cuda/kernels"));
    let built = build.arg(here.join("include/try.cpp")).arg("-o").arg(&program).output().expect("it runs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    for order in ["forward", "reverse", "1"] {
        let ran = Command::new(&program).env("CUDA_SIM_ORDER", order).output().expect("it runs");
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success(), "{order}: {said}{}", String::from_utf8_lossy(&ran.stderr));
        assert_eq!(said, "as plain loops have it\n");
    }
}
