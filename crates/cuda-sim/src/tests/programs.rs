//! The run-time compiler, and images on devices.

use super::harness::*;

const NOTHING: &str = "template <typename T> __global__ void nothing(T x) {}";

#[test]
fn a_source_that_does_not_compile_fails_with_the_compilers_words() {
    if !can_compile() {
        return;
    }
    let _session = Session::new();
    let (code, log) = compile("__global__ void wrong() { unknown(); }", &[], &[], &[]).unwrap_err();
    assert_eq!(code, nvrtc::COMPILATION);
    assert!(log.contains("test.cu:1") && log.contains("unknown"), "{log}");
    let (code, _) = compile("#include \"other.cuh\"", &[], &[], &[]).unwrap_err();
    assert_eq!(code, nvrtc::COMPILATION, "a header that was not given");
    let (code, _) = compile(NOTHING, &[], &["nothing<wrong>"], &[]).unwrap_err();
    assert_eq!(code, nvrtc::COMPILATION, "an expression that names nothing");
}

#[test]
fn options_that_are_not_the_compilers_own_are_refused() {
    let _session = Session::new();
    for option in ["-O2", "--gpu-architecture=sm_91", "-std=c++11", "-march=native"] {
        let (code, log) = compile(NOTHING, &[], &[], &[option]).unwrap_err();
        assert_eq!(code, nvrtc::INVALID_OPTION, "{log}");
        assert!(log.contains(option), "{log}");
    }
}

#[test]
fn headers_and_definitions_are_seen() {
    if !can_compile() {
        return;
    }
    let _session = Session::new();
    let source = "#include \"some/other.cuh\"\n__global__ void one() { static_assert(VALUE + OTHER == 3); }";
    let headers = [("some/other.cuh", "#define OTHER 1")];
    let compiled =
        compile(source, &headers, &["one"], &["-DVALUE=2", "--gpu-architecture=compute_80", "--use_fast_math"]);
    assert!(compiled.is_ok(), "{compiled:?}");
}

#[test]
fn machine_code_is_for_chips_of_its_own_kind_and_portable_code_for_newer_ones() {
    if !can_compile() {
        return;
    }
    let load = |cc: u32, arch: &str| {
        let _session = Session::with(&format!("cc={cc}"));
        let image = compile(NOTHING, &[], &["nothing<int>"], &[&format!("--gpu-architecture={arch}")]).unwrap().0;
        // SAFETY: the compiler gave the image.
        unsafe { cuModuleLoadData(&mut 0, image.as_ptr()) }
    };
    assert_eq!([load(90, "sm_90"), load(90, "compute_80"), load(89, "sm_80")], [0; 3]);
    let refused = [load(80, "sm_90"), load(90, "sm_80"), load(80, "compute_90")];
    assert_eq!(refused, [cuda::NO_BINARY_FOR_GPU; 3]);
}

#[test]
fn a_damaged_image_is_refused() {
    if !can_compile() {
        return;
    }
    let _session = Session::new();
    let mut image = compile(NOTHING, &[], &["nothing<int>"], &["--gpu-architecture=sm_90"]).unwrap().0;
    *image.last_mut().unwrap() ^= 1;
    // SAFETY: the image is as long as it says.
    assert_eq!(unsafe { cuModuleLoadData(&mut 0, image.as_ptr()) }, cuda::INVALID_IMAGE);
    // SAFETY: 48 bytes that are no image.
    assert_eq!(unsafe { cuModuleLoadData(&mut 0, [0u8; 48].as_ptr()) }, cuda::INVALID_IMAGE);
    // SAFETY: the text ends in zero.
    assert_eq!(unsafe { cuModuleGetFunction(&mut 0, 5, c"nothing".as_ptr()) }, cuda::INVALID_HANDLE);
}
