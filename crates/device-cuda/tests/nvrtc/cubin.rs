//! What a chip's code says of its kernels: an ELF file, with a section of attributes for each (`.nv.info.NAME`), one for all, and one
//! for the shared memory of each (`.nv.shared.NAME`). Numbers of attributes as `cuobjdump -elf` names them.

use std::collections::BTreeMap;

use object::elf::FileHeader64;
use object::read::elf::ElfFile;
use object::{Endianness, Object, ObjectSection, ObjectSymbol, SymbolIndex};

/// Of each kernel by its symbol: `EIATTR_FRAME_SIZE`, `EIATTR_REGCOUNT`.
const FRAME_SIZE: u8 = 0x11;
const REGCOUNT: u8 = 0x2f;
/// Of one kernel: `EIATTR_MAX_THREADS`, in three dimensions.
const MAX_THREADS: u8 = 0x05;

/// What a launch of a kernel takes, and what it may have at most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// Of a thread.
    pub registers: u64,
    /// Bytes of a thread's memory for what finds no register, arrays that are indexed included.
    pub frame: u64,
    /// Bytes of a block, beside what the launch asks for.
    pub shared: u64,
    /// Threads of a block that the code was made for; 0 if it does not say.
    pub threads: u64,
}

/// By the names that kernels have in the code.
pub fn kernels(code: &[u8]) -> BTreeMap<String, Needs> {
    let file = ElfFile::<FileHeader64<Endianness>>::parse(code).expect("an ELF file of 64 bits");
    let mut kernels: BTreeMap<String, Needs> = BTreeMap::new();
    let named = |section: &str, prefix: &str| section.strip_prefix(prefix).map(str::to_owned);
    for section in file.sections() {
        let name = section.name().expect("a name");
        if let Some(kernel) = named(name, ".nv.shared.") {
            kernels.entry(kernel).or_default().shared = section.size();
        }
        if let Some(kernel) = named(name, ".nv.info.") {
            for (attribute, value) in attributes(section.data().expect("its bytes")) {
                if let (MAX_THREADS, &[x, y, z]) = (attribute, value.as_slice()) {
                    kernels.entry(kernel.clone()).or_default().threads = x * y * z;
                }
            }
        }
    }
    let all = file.section_by_name(".nv.info").expect("attributes of all kernels");
    for (attribute, value) in attributes(all.data().expect("its bytes")) {
        let [symbol, count] = value[..] else { continue };
        let symbol = file.symbol_by_index(SymbolIndex(symbol as usize)).expect("a symbol");
        let Some(kernel) = kernels.get_mut(symbol.name().expect("a name")) else { continue };
        match attribute {
            REGCOUNT => kernel.registers = count,
            FRAME_SIZE => kernel.frame = count,
            _ => {}
        }
    }
    // The system keeps some of a multiprocessor's for itself.
    kernels.retain(|name, _| !name.starts_with("reserved."));
    kernels
}

/// Attributes with their values in words of 32 bits; those with no more than 16 bits of their own have none here.
fn attributes(mut bytes: &[u8]) -> Vec<(u8, Vec<u64>)> {
    /// Marks a value whose length comes first.
    const SIZED: u8 = 4;
    let mut found = Vec::new();
    while let Some(([format, attribute, low, high], rest)) = bytes.split_first_chunk::<4>() {
        bytes = rest;
        if *format == SIZED {
            let (value, rest) = bytes.split_at(usize::from(u16::from_le_bytes([*low, *high])));
            bytes = rest;
            let words = value.as_chunks().0.iter().map(|word| u64::from(u32::from_le_bytes(*word)));
            found.push((*attribute, words.collect()));
        }
    }
    assert!(bytes.is_empty(), "{} bytes behind the last attribute", bytes.len());
    found
}
