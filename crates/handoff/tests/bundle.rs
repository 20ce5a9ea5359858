//! Faults planted in the files of a bundle, on a real file system: each is found, and by name.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use baton_handoff::{Bundle, BundleError, FileProblem, Integrity, MANIFEST, ManifestError, SIGNATURE};
use baton_model::Files;
use tempfile::TempDir;

const FILES: &[(&str, &[u8])] = &[
    ("config.json", b"{\"vocab_size\": 6}"),
    ("model.safetensors", &[7; 3000]),
    ("train/data.py", b"print(1)\n"),
    ("train/__init__.py", b""),
];

fn written() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    common::write(folder.path(), FILES);
    folder
}

fn open(folder: &Path) -> Bundle {
    Bundle::open(&Files::Folder(folder.into())).unwrap().unwrap()
}

fn verify(folder: &Path) -> Integrity {
    open(folder).verify_files(&|_| {})
}

/// The problems in words.
fn problems(folder: &Path) -> Vec<String> {
    verify(folder).problems.iter().map(ToString::to_string).collect()
}

#[test]
fn a_bundle_as_it_was_handed_over_has_no_problem() {
    let folder = written();
    let bundle = open(folder.path());
    let hashed = AtomicU64::new(0);
    let integrity = bundle.verify_files(&|bytes| _ = hashed.fetch_add(bytes, Ordering::Relaxed));
    assert!(integrity.problems.is_empty(), "{:?}", integrity.problems);
    assert_eq!(hashed.into_inner(), bundle.manifest().total_bytes());
    assert!(bundle.manifest().total_bytes() > 3000);
    integrity.snapshot.unchanged().unwrap();
}

#[test]
fn a_folder_without_a_manifest_is_no_bundle_and_one_that_is_not_there_an_error() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    assert!(Bundle::open(&Files::Folder(folder.path().into())).unwrap().is_none());
    assert!(Bundle::open(&Files::Gguf(folder.path().join("model.gguf"))).unwrap().is_none());
    let gone = Bundle::open(&Files::Folder(folder.path().join("gone")));
    assert!(matches!(gone, Err(BundleError::Folder(_))), "{gone:?}");
}

#[test]
fn every_flipped_bit_of_every_file_is_named() {
    let folder = written();
    for (name, content) in FILES {
        for bit in (0..content.len() * 8).step_by(if content.len() > 100 { 997 } else { 1 }) {
            let mut flipped = content.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(folder.path().join(name), flipped).unwrap();
            match verify(folder.path()).problems.as_slice() {
                [FileProblem::Digest { name: found, .. }] => assert_eq!(found, name),
                other => panic!("bit {bit} of {name}: {other:?}"),
            }
        }
        fs::write(folder.path().join(name), content).unwrap();
    }
    assert_eq!(problems(folder.path()), Vec::<String>::new());
}

#[test]
fn missing_extra_cut_grown_and_empty_files_are_named_all_at_once() {
    let folder = written();
    let at = |name: &str| folder.path().join(name);
    fs::remove_file(at("config.json")).unwrap();
    fs::write(at("model.safetensors"), b"").unwrap();
    fs::write(at("train/data.py"), b"print(1)").unwrap();
    fs::write(at("train/__init__.py"), b"\n").unwrap();
    fs::write(at("adapter.bin"), b"x").unwrap();
    fs::write(at("train/.hidden"), b"x").unwrap();
    assert_eq!(
        problems(folder.path()),
        [
            "adapter.bin is not listed in handoff.json",
            "config.json is missing",
            "model.safetensors is empty, often a failed download; expected 3000 bytes",
            "train/.hidden is not listed in handoff.json",
            "train/__init__.py has 1 bytes; expected 0",
            "train/data.py has 8 bytes; expected 9",
        ]
    );
}

#[test]
fn links_out_of_the_bundle_are_refused_and_nothing_is_read_through_them() {
    let (folder, outside) = (written(), tempfile::tempdir().unwrap());
    let at = |name: &str| folder.path().join(name);
    // The same content, so that only the link itself can be the objection.
    fs::write(outside.path().join("config.json"), FILES[0].1).unwrap();
    fs::remove_file(at("config.json")).unwrap();
    symlink(outside.path().join("config.json"), at("config.json")).unwrap();
    fs::rename(at("model.safetensors"), at("train/weights")).unwrap();
    symlink("train/weights", at("model.safetensors")).unwrap();
    symlink(outside.path(), at("more")).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    let found = verify(folder.path()).problems;
    let links = found.iter().filter(|problem| matches!(problem, FileProblem::Link { .. }));
    assert_eq!(
        links.map(FileProblem::name).collect::<Vec<_>>(),
        ["config.json", "dangling", "model.safetensors", "more"]
    );
    let others = found.iter().filter(|problem| !matches!(problem, FileProblem::Link { .. }));
    assert_eq!(others.map(FileProblem::name).collect::<Vec<_>>(), ["train/weights"]);
}

#[test]
fn a_listed_folder_that_is_a_link_is_refused() {
    let (folder, outside) = (written(), tempfile::tempdir().unwrap());
    fs::rename(folder.path().join("train"), outside.path().join("train")).unwrap();
    symlink(outside.path().join("train"), folder.path().join("train")).unwrap();
    let found = problems(folder.path());
    assert!(found[0].starts_with("train is a link to "), "{found:?}");
    assert_eq!(found[1..], ["train/__init__.py is missing", "train/data.py is missing"]);
}

/// A snapshot folder as the hub cache has it; its blobs are named after their content, as large files' are.
fn cached() -> (TempDir, std::path::PathBuf) {
    let cache = tempfile::tempdir().unwrap();
    let snapshot = cache.path().join("snapshots/0123");
    let manifest = common::manifest(FILES.iter().copied()).to_string();
    fs::create_dir_all(cache.path().join("blobs")).unwrap();
    for (name, content) in FILES.iter().copied().chain([(MANIFEST, manifest.as_bytes())]) {
        let blob = baton_handoff::Digest::of(content).to_string();
        fs::write(cache.path().join("blobs").join(&blob), content).unwrap();
        let link = snapshot.join(name);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        let up = "../".repeat(2 + name.matches('/').count());
        symlink(format!("{up}blobs/{blob}"), link).unwrap();
    }
    (cache, snapshot)
}

#[test]
fn the_hub_caches_links_are_followed_to_their_blobs_and_no_further() {
    let (cache, snapshot) = cached();
    let integrity = verify(&snapshot);
    assert!(integrity.problems.is_empty(), "{:?}", integrity.problems);

    let blob = cache.path().join("blobs").join(baton_handoff::Digest::of(FILES[0].1).to_string());
    fs::write(&blob, b"{\"vocab_size\": 7}").unwrap();
    assert!(integrity.snapshot.unchanged().is_err());
    assert!(
        matches!(verify(&snapshot).problems.as_slice(), [FileProblem::Digest { name, .. }] if name == "config.json")
    );

    // A blob that is a link itself could lead anywhere.
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("x"), FILES[0].1).unwrap();
    fs::remove_file(&blob).unwrap();
    symlink(outside.path().join("x"), &blob).unwrap();
    assert!(matches!(verify(&snapshot).problems.as_slice(), [FileProblem::Link { name, .. }] if name == "config.json"));

    // So could the folder of blobs.
    fs::rename(cache.path().join("blobs"), outside.path().join("blobs")).unwrap();
    symlink(outside.path().join("blobs"), cache.path().join("blobs")).unwrap();
    assert!(matches!(Bundle::open(&Files::Folder(snapshot)), Err(BundleError::File(FileProblem::Io { .. }))));
}

#[test]
fn pipes_sockets_and_folders_in_the_place_of_files_are_refused_without_waiting() {
    let folder = written();
    let at = |name: &str| folder.path().join(name);
    fs::remove_file(at("config.json")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("config.json"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    fs::remove_file(at("model.safetensors")).unwrap();
    fs::create_dir(at("model.safetensors")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    assert_eq!(
        problems(folder.path()),
        ["config.json is a pipe, not a file", "model.safetensors is missing", "socket is a socket, not a file"]
    );
}

#[test]
fn files_whose_names_no_manifest_could_list_are_refused() {
    use std::os::unix::ffi::OsStrExt;
    let folder = written();
    let at = |name: &[u8]| folder.path().join(std::ffi::OsStr::from_bytes(name));
    fs::write(at(b"new\nline"), "").unwrap();
    fs::write(at(b"\xff"), "").unwrap();
    fs::create_dir_all(at(b"1/2/3/4/5/6/7/8")).unwrap();
    fs::write(at(b"1/2/3/4/5/6/7/8/nine"), "").unwrap();
    assert_eq!(
        problems(folder.path()),
        [
            "the file name \"1/2/3/4/5/6/7/8/nine\" has more than 8 parts",
            "the file name \"new\\nline\" has a backslash or a control character",
            "the file name \"\u{fffd}\" is not UTF-8",
        ]
    );
}

/// Sets the times of all files back, so that a write changes them however coarse the clock is.
fn age(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if entry.path().is_dir() {
            age(&entry.path());
        } else {
            let past = SystemTime::now() - Duration::from_secs(3600);
            File::options().append(true).open(entry.path()).unwrap().set_modified(past).unwrap();
        }
    }
}

#[test]
fn whatever_changes_after_a_file_was_hashed_is_named() {
    type Change = fn(&Path);
    let changes: &[(&[&str], Change)] = &[
        (&["config.json"], |f| fs::write(f.join("config.json"), FILES[0].1).unwrap()),
        (&["model.safetensors"], |f| fs::write(f.join("model.safetensors"), [7; 2000]).unwrap()),
        (&["train/data.py"], |f| fs::remove_file(f.join("train/data.py")).unwrap()),
        (&["generation_config.json"], |f| fs::write(f.join("generation_config.json"), "{}").unwrap()),
        (&["generation_config.json"], |f| symlink("config.json", f.join("generation_config.json")).unwrap()),
        (&[MANIFEST], |f| fs::write(f.join(MANIFEST), "{}").unwrap()),
        (&[SIGNATURE], |f| fs::write(f.join(SIGNATURE), "").unwrap()),
        // Another file under the same name, with the same content and time.
        (&["config.json"], |f| {
            fs::write(f.join("copy"), FILES[0].1).unwrap();
            let time = fs::metadata(f.join("config.json")).unwrap().modified().unwrap();
            File::options().append(true).open(f.join("copy")).unwrap().set_modified(time).unwrap();
            fs::rename(f.join("copy"), f.join("config.json")).unwrap();
        }),
        // Another folder under the same path.
        (&[MANIFEST, "config.json", "model.safetensors", "train/__init__.py", "train/data.py"], |f| {
            fs::rename(f, f.with_extension("old")).unwrap();
            common::write(f, FILES);
        }),
    ];
    for (names, change) in changes {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("bundle");
        fs::create_dir(&folder).unwrap();
        common::write(&folder, FILES);
        age(&folder);
        let snapshot = verify(&folder).snapshot;
        snapshot.unchanged().unwrap();
        change(&folder);
        let mut found: Vec<_> = snapshot.unchanged().unwrap_err().iter().map(|p| p.name().to_owned()).collect();
        found.sort();
        let mut expected = names.to_vec();
        expected.sort();
        assert_eq!(found, expected);
    }
}

#[test]
fn a_manifest_rewritten_after_it_was_opened_is_refused() {
    let folder = written();
    age(folder.path());
    let bundle = open(folder.path());
    fs::write(folder.path().join(SIGNATURE), "late").unwrap();
    let manifest = fs::read(folder.path().join(MANIFEST)).unwrap();
    fs::write(folder.path().join(MANIFEST), manifest).unwrap();
    let found = bundle.verify_files(&|_| {}).problems;
    assert!(found.iter().all(|problem| matches!(problem, FileProblem::Changed { .. })), "{found:?}");
    assert_eq!(found.iter().map(FileProblem::name).collect::<Vec<_>>(), [MANIFEST, SIGNATURE]);
    fs::remove_file(folder.path().join(MANIFEST)).unwrap();
    assert!(bundle.verify_files(&|_| {}).problems.iter().any(|problem| problem.name() == MANIFEST));
}

#[test]
fn a_file_that_changes_while_it_is_hashed_is_refused() {
    let folder = written();
    age(folder.path());
    let weights = folder.path().join("model.safetensors");
    // The progress of its own bytes is where a file is certainly in the middle of being hashed.
    let integrity = open(folder.path()).verify_files(&|bytes| {
        if bytes == 3000 {
            fs::write(&weights, [7; 3000]).unwrap();
        }
    });
    assert!(
        matches!(integrity.problems.as_slice(), [FileProblem::Changed { name }] if name == "model.safetensors"),
        "{:?}",
        integrity.problems
    );
}

#[test]
fn the_manifest_itself_must_be_a_file_of_bounded_length() {
    let folder = written();
    let path = folder.path().join(MANIFEST);
    fs::rename(&path, folder.path().join("elsewhere")).unwrap();
    symlink("elsewhere", &path).unwrap();
    let error = Bundle::open(&Files::Folder(folder.path().into())).unwrap_err();
    assert!(matches!(error, BundleError::File(FileProblem::Link { .. })), "{error}");

    fs::remove_file(&path).unwrap();
    File::create(&path).unwrap().set_len(baton_handoff::MAX_MANIFEST + 1).unwrap();
    let error = Bundle::open(&Files::Folder(folder.path().into())).unwrap_err();
    assert!(matches!(error, BundleError::Manifest(ManifestError::TooLarge { .. })), "{error}");

    fs::rename(folder.path().join("elsewhere"), &path).unwrap();
    File::create(folder.path().join(SIGNATURE)).unwrap().set_len(1 << 20).unwrap();
    let error = Bundle::open(&Files::Folder(folder.path().into())).unwrap_err();
    assert!(error.to_string().starts_with(SIGNATURE), "{error}");
}

#[test]
fn a_bundle_in_the_binary_is_checked_like_one_on_disk() {
    let manifest: &'static str = common::manifest(FILES.iter().copied()).to_string().leak();
    let mut files = FILES.to_vec();
    files.push((MANIFEST, manifest.as_bytes()));
    let verify = |files: Vec<(&'static str, &'static [u8])>| {
        Bundle::open(&Files::Embedded(files.leak())).unwrap().unwrap().verify_files(&|_| {})
    };
    let integrity = verify(files.clone());
    assert!(integrity.problems.is_empty(), "{:?}", integrity.problems);
    integrity.snapshot.unchanged().unwrap();

    files[0].1 = b"{\"vocab_size\": 7}";
    files[2].1 = b"";
    files[3].0 = "other";
    let found: Vec<_> = verify(files).problems.iter().map(ToString::to_string).collect();
    assert!(found[0].starts_with("config.json has SHA-256 "), "{found:?}");
    assert_eq!(
        found[1..],
        [
            "other is not listed in handoff.json",
            "train/__init__.py is missing",
            "train/data.py is empty, often a failed download; expected 9 bytes",
        ]
    );
}

#[test]
fn a_gguf_files_bundle_is_the_folder_that_it_lies_in() {
    let folder = tempfile::tempdir().unwrap();
    common::write(folder.path(), &[("model.gguf", b"GGUF")]);
    let bundle = Bundle::open(&Files::Gguf(folder.path().join("model.gguf"))).unwrap().unwrap();
    assert!(bundle.verify_files(&|_| {}).problems.is_empty());
    fs::write(folder.path().join("model.gguf"), b"GGUG").unwrap();
    let bundle = Bundle::open(&Files::Gguf(folder.path().join("model.gguf"))).unwrap().unwrap();
    assert_eq!(bundle.verify_files(&|_| {}).problems.len(), 1);
}
