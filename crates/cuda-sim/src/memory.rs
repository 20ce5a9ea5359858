//! Device memory and page-locked host memory.
//!
//! Invariant: a device address is never given out twice, and its bytes can be touched only while a task of its device runs: outside of tasks,
//! and behind the end of a block, and after a free, whoever touches it gets a signal. In a kernel that is an illegal address; in the host's
//! own code it is a crash.

use std::{collections::BTreeMap, ptr::null_mut};

use crate::{
    codes::cuda,
    machine::{Fail, fail},
};

/// Bytes of address space for device memory. None is ever used again after a free.
const SPACE: u64 = 1 << 43;
/// Blocks start on this boundary, in bytes.
const ALIGNMENT: u64 = 256;
/// Protection is by the page; this is a multiple of it on every machine. Large blocks lie in huge pages where there are any: each task opens
/// and closes its device's memory, which costs time for each page.
const PAGE: u64 = 64 << 10;
const HUGE_PAGE: u64 = 2 << 20;
/// What memory holds before anybody writes it: NaN.
pub const GARBAGE: u8 = 0xff;

struct Block {
    device: u32,
    bytes: u64,
}

impl Block {
    /// First page and bytes of the pages that hold a block.
    fn pages(&self, address: u64) -> (u64, u64) {
        let page = page_of(self.bytes);
        let first = address / page * page;
        (first, (address + self.bytes).next_multiple_of(page) - first)
    }
}

/// Of a block of so many bytes.
fn page_of(bytes: u64) -> u64 {
    if bytes < HUGE_PAGE { PAGE } else { HUGE_PAGE }
}

/// What an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Device,
    Pinned,
    Pageable,
}

/// All memory of the process that the simulator gave out.
pub struct Memory {
    start: u64,
    next: u64,
    blocks: BTreeMap<u64, Block>,
    pinned: BTreeMap<u64, u64>,
    /// Tasks that run on a device now.
    open: BTreeMap<u32, u32>,
}

impl Memory {
    pub fn new() -> Self {
        let start = map(null_mut(), SPACE, libc::PROT_NONE, libc::MAP_NORESERVE);
        let start = start.expect("address space for device memory").next_multiple_of(PAGE);
        Self { start, next: start, blocks: BTreeMap::new(), pinned: BTreeMap::new(), open: BTreeMap::new() }
    }

    /// A block of `bytes`, full of garbage, whose end is the end of what may be touched.
    pub fn allocate(&mut self, device: u32, bytes: u64) -> Option<u64> {
        let page = page_of(bytes);
        let end = (self.next.next_multiple_of(page) + bytes.next_multiple_of(ALIGNMENT)).next_multiple_of(page);
        if end + page > self.start + SPACE - PAGE {
            return None;
        }
        self.next = end + page;
        let address = end - bytes.next_multiple_of(ALIGNMENT);
        let block = Block { device, bytes };
        let (first, length) = block.pages(address);
        // SAFETY: a hint about pages of ours that nobody uses yet; it may be refused.
        unsafe { libc::madvise(first as *mut _, length as usize, libc::MADV_HUGEPAGE) };
        protect(block.pages(address), true);
        // SAFETY: the pages were made writable just now, and belong to no other block.
        unsafe { std::ptr::write_bytes(address as *mut u8, GARBAGE, (end - address) as usize) };
        protect(block.pages(address), self.open.contains_key(&device));
        self.blocks.insert(address, block);
        Some(address)
    }

    /// Frees the block that starts at `address`; its device and bytes.
    pub fn free(&mut self, address: u64) -> Result<(u32, u64), Fail> {
        let block = self.blocks.remove(&address);
        let block = block.ok_or_else(|| fail!(cuda::INVALID_VALUE, "{address:#x} is the start of no live block"))?;
        let (first, bytes) = block.pages(address);
        map(first as *mut _, bytes, libc::PROT_NONE, libc::MAP_NORESERVE | libc::MAP_FIXED);
        Ok((block.device, block.bytes))
    }

    /// Frees every block of a device; their bytes.
    pub fn clear(&mut self, device: u32) -> u64 {
        let blocks: Vec<u64> = self.blocks.iter().filter(|(_, b)| b.device == device).map(|(&a, _)| a).collect();
        blocks.into_iter().map(|address| self.free(address).map_or(0, |(_, bytes)| bytes)).sum()
    }

    /// Lets tasks touch a device's memory, until as many [`Self::close`].
    pub fn open(&mut self, device: u32) {
        let tasks = self.open.entry(device).or_default();
        *tasks += 1;
        if *tasks == 1 {
            self.blocks.iter().filter(|(_, b)| b.device == device).for_each(|(&a, b)| protect(b.pages(a), true));
        }
    }

    pub fn close(&mut self, device: u32) {
        let tasks = self.open.get_mut(&device).expect("opened before");
        *tasks -= 1;
        if *tasks == 0 {
            self.open.remove(&device);
            self.blocks.iter().filter(|(_, b)| b.device == device).for_each(|(&a, b)| protect(b.pages(a), false));
        }
    }

    /// The device of a range that lies in one live block.
    pub fn device(&self, address: u64, bytes: u64) -> Result<u32, String> {
        let found = self.blocks.range(..=address).next_back();
        match found {
            Some((start, block)) if address + bytes <= start + block.bytes => Ok(block.device),
            Some((start, block)) if address < start + block.bytes => {
                let offset = address - start;
                Err(format!("{bytes} bytes at byte {offset} of a block of {} bytes", block.bytes))
            }
            _ => Err(format!("{bytes} bytes at {address:#x}, which is in no live block of device memory")),
        }
    }

    pub fn place(&self, address: u64) -> Place {
        let pinned = || self.pinned.range(..=address).next_back().is_some_and(|(start, len)| address < start + len);
        match address {
            _ if (self.start..self.start + SPACE).contains(&address) => Place::Device,
            _ if pinned() => Place::Pinned,
            _ => Place::Pageable,
        }
    }

    /// Whether the whole range is page-locked and live.
    pub fn is_pinned(&self, address: u64, bytes: u64) -> bool {
        self.pinned.range(..=address).next_back().is_some_and(|(start, len)| address + bytes <= start + len)
    }

    pub fn allocate_pinned(&mut self, bytes: u64) -> Option<u64> {
        let address = map(null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        // SAFETY: a mapping of at least as many bytes was made just now.
        unsafe { std::ptr::write_bytes(address as *mut u8, GARBAGE, bytes as usize) };
        self.pinned.insert(address, bytes);
        Some(address)
    }

    pub fn free_pinned(&mut self, address: u64) -> Result<(), Fail> {
        let bytes = self.pinned.remove(&address);
        let bytes = bytes.ok_or_else(|| fail!(cuda::INVALID_VALUE, "{address:#x} is no live page-locked block"))?;
        // SAFETY: the mapping is ours and was in the table, so nobody unmapped it before.
        unsafe { libc::munmap(address as *mut _, bytes as usize) };
        Ok(())
    }

    /// Live device blocks, their bytes, live page-locked blocks.
    pub fn live(&self) -> (usize, u64, usize) {
        (self.blocks.len(), self.blocks.values().map(|b| b.bytes).sum(), self.pinned.len())
    }
}

fn map(at: *mut libc::c_void, bytes: u64, protection: i32, flags: i32) -> Option<u64> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
    // SAFETY: a new mapping at an address of the kernel's choice, or in place of pages of ours that nobody may use any more.
    let start = unsafe { libc::mmap(at, bytes as usize, protection, flags, -1, 0) };
    (start != libc::MAP_FAILED).then_some(start as u64)
}

fn protect((first, bytes): (u64, u64), writable: bool) {
    let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
    // SAFETY: the pages are ours; no reference of Rust points into them.
    let code = unsafe { libc::mprotect(first as *mut _, bytes as usize, protection) };
    assert_eq!(code, 0, "pages of device memory could not be protected");
}
