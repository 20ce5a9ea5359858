//! The licences of all that is linked into a binary, as the crates themselves have them: each text once, with those that bring it.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{dist::graph::Crate, root};

/// The licence of Baton, whose text is that of all who use it.
const OURS: &str = "Apache-2.0";
/// How names of files begin that hold licences and notices.
const NAMES: [&str; 6] = ["license", "licence", "copying", "copyright", "notice", "unlicense"];
/// Folders of a crate whose code is not linked.
const ASIDE: [&str; 6] = ["tests", "benches", "examples", "fuzz", "target", ".github"];

/// A page with the licences of these crates, but of those of the workspace, and of what comes besides, as title and text.
///
/// # Errors
/// If a crate has no text, none is beside it in its repository, and it is not to be had under Baton's own licence either.
pub fn page(crates: &[Crate], besides: &[(&str, String)]) -> Result<String> {
    let theirs: Vec<&Crate> = crates.iter().filter(|one| one.checksum.is_some()).collect();
    let own: BTreeMap<String, Vec<(PathBuf, String)>> =
        theirs.iter().map(|one| Ok((one.id(), texts(&one.folder)?))).collect::<io::Result<_>>()?;
    let ours = vec![(PathBuf::from("LICENSE of Baton"), fs::read_to_string(root().join("LICENSE"))?)];
    // By text: who brings it, and where it is there.
    let mut bringers: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for one in &theirs {
        let neighbour = || {
            let same = |other: &&&Crate| one.repository.is_some() && other.repository == one.repository;
            theirs.iter().filter(same).map(|other| &own[&other.id()]).find(|texts| !texts.is_empty())
        };
        let texts = Some(&own[&one.id()]).filter(|texts| !texts.is_empty()).or_else(neighbour);
        let texts = texts.or_else(|| one.license.split(" OR ").any(|choice| choice == OURS).then_some(&ours));
        let texts = texts.with_context(|| format!("{} {}: no text of its licence is found", one.name, one.version))?;
        for (file, text) in texts {
            let bringer = format!("{} {} ({}), {}", one.name, one.version, one.license, file.display());
            bringers.entry(text).or_default().push(bringer);
        }
    }
    let mut parts: Vec<(String, &str)> = bringers.iter().map(|(text, bringers)| (bringers.join("\n"), *text)).collect();
    parts.sort();
    let rest = besides.iter().map(|(title, text)| ((*title).to_owned(), text.as_str()));

    let mut page = String::from(
        "Licences of what is linked into this binary.\n\n\
         Each text stands once, behind the packages that bring it: name, version, licence as the package states it, and the file\n\
         in the package, or in another one of the same repository. A package under Baton's own licence that brings no text has that of LICENSE.\n",
    );
    for (bringers, text) in parts.into_iter().chain(rest) {
        page += &format!("\n{}\n{bringers}\n{}\n\n{}\n", "=".repeat(80), "-".repeat(80), text.trim_end());
    }
    Ok(page)
}

/// Files below a folder that hold licences, with their texts; in the order of their names.
fn texts(folder: &Path) -> io::Result<Vec<(PathBuf, String)>> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
            if path.is_dir() {
                folders.extend((!ASIDE.contains(&name.as_str())).then_some(path));
            } else if NAMES.iter().any(|start| name.starts_with(start)) && !name.ends_with(".rs") {
                let text = String::from_utf8_lossy(&fs::read(&path)?).replace('\r', "");
                found.push((path.strip_prefix(folder).unwrap_or(&path).to_owned(), text));
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::dist::{TARGETS, graph::linked};

    fn package(folder: &Path, name: &str, repository: Option<&str>, files: &[(&str, &str)]) -> Crate {
        let folder = folder.join(name);
        for (file, text) in files {
            let path = folder.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::create_dir_all(&folder).unwrap();
        Crate {
            name: name.into(),
            version: "1.0.0".into(),
            license: "MIT".into(),
            repository: repository.map(str::to_owned),
            folder,
            checksum: Some(String::new()),
            uses: BTreeSet::new(),
        }
    }

    #[test]
    fn a_text_stands_once_with_all_who_bring_it() {
        let folder = tempfile::tempdir().unwrap();
        let crates = [
            package(folder.path(), "a", Some("r"), &[("LICENSE-MIT", "do\r\nwhat\n"), ("src/license.rs", "no")]),
            package(folder.path(), "b", None, &[("vendored/COPYING", "do\nwhat\n"), ("tests/LICENSE", "no")]),
            package(folder.path(), "c", Some("r"), &[]),
        ];
        let text = page(&crates, &[("what else", "yes".into())]).unwrap();
        assert_eq!((text.matches("do\nwhat").count(), text.matches("no\n").count()), (1, 0), "{text}");
        let bringers = "a 1.0.0 (MIT), LICENSE-MIT\nb 1.0.0 (MIT), vendored/COPYING\nc 1.0.0 (MIT), LICENSE-MIT\n";
        assert!(text.contains(bringers) && text.contains("what else"), "{text}");

        let none = package(folder.path(), "d", None, &[]);
        assert!(page(std::slice::from_ref(&none), &[]).unwrap_err().to_string().contains("d 1.0.0"));
        let apache = Crate { license: "MIT OR Apache-2.0".into(), ..none };
        assert!(page(&[apache], &[]).unwrap().contains("d 1.0.0 (MIT OR Apache-2.0), LICENSE of Baton\n"));
    }

    #[test]
    fn everything_that_is_linked_has_its_licence() {
        for target in TARGETS {
            let crates = linked("baton", target).unwrap();
            let text = page(&crates, &[]).unwrap();
            for one in crates.iter().filter(|one| one.checksum.is_some()) {
                assert!(text.contains(&format!("\n{} {} (", one.name, one.version)), "{}", one.name);
            }
            assert!(text.contains("LICENSE-BoringSSL") && text.len() < 4 << 20, "{}", text.len());
        }
    }
}
