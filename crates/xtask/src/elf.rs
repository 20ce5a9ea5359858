//! What a binary asks of the system that it runs on, read from the file itself.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use object::{
    Endianness,
    read::elf::{ElfFile64, FileHeader},
};

/// See the head of the file.
#[derive(Debug, PartialEq, Eq)]
pub struct Needs {
    /// As `uname -m` names it.
    pub processor: &'static str,
    /// Libraries that must be there when it starts.
    pub libraries: BTreeSet<String>,
    /// The newest version of glibc of which it uses a symbol; (0, 0) if it uses none.
    pub glibc: (u32, u32),
}

/// What a 64-bit ELF file needs.
///
/// # Errors
/// If it is none, or for a processor that we do not build for.
pub fn needs(file: &[u8]) -> Result<Needs> {
    let elf = ElfFile64::<Endianness>::parse(file).context("no ELF file of 64 bits")?;
    let (header, endian) = (elf.elf_header(), elf.endian());
    let processor = match header.e_machine(endian) {
        object::elf::EM_X86_64 => "x86_64",
        object::elf::EM_AARCH64 => "aarch64",
        other => bail!("an ELF file of machine {other}"),
    };
    let sections = elf.elf_section_table();
    let mut libraries = BTreeSet::new();
    if let Some((entries, strings)) = sections.dynamic(endian, file)? {
        let strings = sections.strings(endian, file, strings)?;
        for entry in entries.iter().filter(|entry| entry.d_tag.get(endian) == object::elf::DT_NEEDED) {
            let name = strings.get(u32::try_from(entry.d_val.get(endian))?).ok().context("a library without a name")?;
            libraries.insert(String::from_utf8_lossy(name).into_owned());
        }
    }
    let mut glibc = (0, 0);
    if let Some((mut needed, strings)) = sections.gnu_verneed(endian, file)? {
        let strings = sections.strings(endian, file, strings)?;
        while let Some((_, mut versions)) = needed.next()? {
            while let Some(version) = versions.next()? {
                let name = String::from_utf8_lossy(version.name(endian, strings)?);
                glibc = glibc.max(glibc_version(&name).unwrap_or_default());
            }
        }
    }
    Ok(Needs { processor, libraries, glibc })
}

/// The numbers of `GLIBC_2.34`; `None` of what is no version of glibc.
fn glibc_version(name: &str) -> Option<(u32, u32)> {
    let mut numbers = name.strip_prefix("GLIBC_")?.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn versions_are_numbers() {
        assert_eq!(
            ["GLIBC_2.9", "GLIBC_2.34", "GLIBC_2.4.1"].map(glibc_version),
            [Some((2, 9)), Some((2, 34)), Some((2, 4))]
        );
        assert_eq!(["GLIBC_PRIVATE", "GCC_3.0", "GLIBC_", ""].map(glibc_version), [None; 4]);
    }

    #[test]
    fn this_test_needs_the_c_library_of_a_machine_that_it_runs_on() {
        let found = needs(&fs::read(std::env::current_exe().unwrap()).unwrap()).unwrap();
        assert_eq!(found.processor, std::env::consts::ARCH);
        assert!(found.libraries.contains("libc.so.6"), "{found:?}");
        assert!((2, 2) < found.glibc && found.glibc < (3, 0), "{found:?}");
        assert!(needs(b"#!/bin/sh\n").is_err());
    }
}
