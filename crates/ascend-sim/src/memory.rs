//! Device memory and page-locked host memory.
//!
//! Invariant: a device address is never given out twice and can be touched by nobody: blocks have addresses in a range
//! that is reserved without access, and their bytes elsewhere. So a host that follows a device pointer crashes, and a pointer
//! that is used after it was freed is known for one.

use std::{alloc::Layout, collections::BTreeMap};

use crate::array::Fault;

/// Bytes of address space for device memory. None is ever used again after a free.
const SPACE: u64 = 1 << 44;
/// Blocks start on this boundary, in bytes.
pub const ALIGNMENT: u64 = 64;
/// What device memory holds before anybody writes it.
pub const GARBAGE: u8 = 0xA5;

/// Address space of which no byte can be read or written; its start and length.
pub fn reserve(length: u64) -> (u64, u64) {
    // SAFETY: a new private mapping without access at an address of the kernel's choice; no memory of ours is touched.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length as usize,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    assert!(start != libc::MAP_FAILED, "{length} bytes of address space could not be reserved");
    let start = (start as u64).next_multiple_of(1 << 21);
    (start, length - (1 << 21))
}

struct Block {
    device: u32,
    bytes: Box<[u8]>,
}

/// What an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Device(u32),
    /// In the reserved range, and in no live block.
    Dangling,
    Pinned,
    Pageable,
}

/// All memory of the process that the simulator gave out.
pub struct Memory {
    start: u64,
    end: u64,
    next: u64,
    blocks: BTreeMap<u64, Block>,
    pinned: BTreeMap<u64, u64>,
}

/// Half-open range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub len: u64,
}

impl Range {
    pub fn new(start: u64, len: u64) -> Self {
        Self { start, len }
    }

    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.start + other.len && other.start < self.start + self.len
    }
}

impl Memory {
    pub fn new() -> Self {
        let (start, length) = reserve(SPACE);
        Self { start, end: start + length, next: start, blocks: BTreeMap::new(), pinned: BTreeMap::new() }
    }

    /// What a block of `size` bytes takes of a device's memory: kernels read up to 32 bytes past the end.
    pub fn footprint(size: u64) -> u64 {
        size.next_multiple_of(32) + 32
    }

    /// A block of `size` bytes, full of [`GARBAGE`]. `None` if the address space is used up.
    pub fn allocate(&mut self, device: u32, size: u64) -> Option<u64> {
        let address = self.next;
        // A gap behind each block, so that its end is no other's start.
        let next = address.checked_add(Self::footprint(size).next_multiple_of(ALIGNMENT) + ALIGNMENT)?;
        if next > self.end {
            return None;
        }
        self.next = next;
        self.blocks.insert(address, Block { device, bytes: vec![GARBAGE; size as usize].into_boxed_slice() });
        Some(address)
    }

    /// Frees the block that starts at `address`; its device and size in bytes, or why not.
    pub fn free(&mut self, address: u64) -> Result<(u32, u64), String> {
        let block = self.blocks.remove(&address).ok_or_else(|| self.describe(address))?;
        Ok((block.device, block.bytes.len() as u64))
    }

    /// The range of the block that starts at `address`.
    pub fn block(&self, address: u64) -> Option<Range> {
        self.blocks.get(&address).map(|b| Range::new(address, b.bytes.len() as u64))
    }

    /// Frees every block of a device.
    pub fn clear(&mut self, device: u32) {
        self.blocks.retain(|_, block| block.device != device);
    }

    /// Live blocks and the sum of their bytes.
    pub fn live(&self) -> (usize, u64) {
        (self.blocks.len(), self.blocks.values().map(|b| b.bytes.len() as u64).sum())
    }

    pub fn live_pinned(&self) -> usize {
        self.pinned.len()
    }

    pub fn place(&self, address: u64) -> Place {
        if (self.start..self.end).contains(&address) {
            return self.containing(address).map_or(Place::Dangling, |(_, block)| Place::Device(block.device));
        }
        let pinned = self.pinned.range(..=address).next_back().is_some_and(|(start, len)| address < start + len);
        if pinned { Place::Pinned } else { Place::Pageable }
    }

    /// The bytes of a range of device memory.
    pub fn read(&self, range: Range) -> Result<&[u8], Fault> {
        let (start, block) = self.containing(range.start).ok_or_else(|| self.fault(range))?;
        let offset = (range.start - start) as usize;
        block.bytes.get(offset..offset + range.len as usize).ok_or_else(|| self.fault(range))
    }

    pub fn write(&mut self, range: Range) -> Result<&mut [u8], Fault> {
        self.read(range)?;
        let (start, block) = self.blocks.range_mut(..=range.start).next_back().expect("the range was found just now");
        let offset = (range.start - start) as usize;
        Ok(&mut block.bytes[offset..offset + range.len as usize])
    }

    /// The device on which a range lies.
    pub fn device(&self, range: Range) -> Result<u32, Fault> {
        self.read(range)?;
        Ok(self.containing(range.start).expect("the range was found just now").1.device)
    }

    fn containing(&self, address: u64) -> Option<(u64, &Block)> {
        let (&start, block) = self.blocks.range(..=address).next_back()?;
        (address - start <= block.bytes.len() as u64).then_some((start, block))
    }

    fn fault(&self, range: Range) -> Fault {
        let text = format!("{} bytes at {}", range.len, self.describe(range.start));
        match self.place(range.start) {
            Place::Dangling if range.start < self.next => {
                Fault::Violation(format!("use after free, or far out of range: {text}"))
            }
            _ => Fault::OutOfRange(text),
        }
    }

    /// An address, said in terms of the blocks around it.
    pub fn describe(&self, address: u64) -> String {
        match (self.place(address), self.containing(address)) {
            (_, Some((start, block))) => {
                format!("{address:#x}, byte {} of a block of {} bytes", address - start, block.bytes.len())
            }
            (Place::Dangling, None) if address < self.next => {
                format!("{address:#x}, which was freed or never part of a block")
            }
            (Place::Dangling, None) => format!("{address:#x}, which was never given out"),
            _ => format!("{address:#x}, which is host memory"),
        }
    }

    /// Page-locked host memory of `size` bytes.
    pub fn allocate_pinned(&mut self, size: u64) -> Option<u64> {
        let layout = pinned_layout(size)?;
        // SAFETY: the layout's size is not zero: callers refuse a size of zero.
        let address = unsafe { std::alloc::alloc(layout) } as u64;
        if address == 0 {
            return None;
        }
        // SAFETY: the block was allocated just now with `size` bytes.
        unsafe { std::ptr::write_bytes(address as *mut u8, GARBAGE, size as usize) };
        self.pinned.insert(address, size);
        Some(address)
    }

    /// The range of the page-locked block that starts at `address`.
    pub fn pinned_block(&self, address: u64) -> Option<Range> {
        self.pinned.get(&address).map(|&len| Range::new(address, len))
    }

    pub fn free_pinned(&mut self, address: u64) -> Result<(), String> {
        let size = self.pinned.remove(&address).ok_or_else(|| format!("{address:#x} is no live page-locked block"))?;
        let layout = pinned_layout(size).expect("the block was allocated with this layout");
        // SAFETY: the block came from `allocate_pinned` with this layout, and was in the map, so it was not freed before.
        unsafe { std::alloc::dealloc(address as *mut u8, layout) };
        Ok(())
    }

    /// A range of page-locked memory that is still live.
    pub fn pinned(&self, range: Range) -> Result<*mut u8, Fault> {
        let found = self.pinned.range(..=range.start).next_back();
        match found {
            Some((start, len)) if range.start + range.len <= start + len => Ok(range.start as *mut u8),
            _ => {
                Err(Fault::Violation(format!("page-locked memory at {:#x} was freed before the copy ran", range.start)))
            }
        }
    }
}

fn pinned_layout(size: u64) -> Option<Layout> {
    Layout::from_size_align(size as usize, ALIGNMENT as usize).ok()
}
