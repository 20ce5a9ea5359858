//! Live objects by handle.
//!
//! Invariant: a handle is never given out twice, and is no address of the process: who follows one as a pointer crashes, and one that is not
//! in its table any more was destroyed.

use std::collections::BTreeMap;

use crate::{
    codes::cuda,
    machine::{Fail, fail},
};

/// Bytes between the handles of two kinds; the lowest is where no mapping of Linux lies.
const SPAN: u64 = 1 << 36;
const STEP: u64 = 16;

/// What a handle stands for; also the word for it in messages and in the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Context = 1,
    Stream,
    Event,
    Module,
    Function,
    Graph,
    GraphExec,
    Program,
    LtHandle,
    MatmulDesc,
    MatrixLayout,
    MatmulPreference,
    Communicator,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Context => "context",
            Self::Stream => "stream",
            Self::Event => "event",
            Self::Module => "module",
            Self::Function => "function",
            Self::Graph => "graph",
            Self::GraphExec => "executable graph",
            Self::Program => "program",
            Self::LtHandle => "cuBLASLt handle",
            Self::MatmulDesc => "product's descriptor",
            Self::MatrixLayout => "matrix layout",
            Self::MatmulPreference => "product's preference",
            Self::Communicator => "communicator",
        }
    }
}

/// The live objects of one kind, in the order in which they were made.
pub struct Table<T> {
    kind: Kind,
    first: u64,
    next: u64,
    live: BTreeMap<u64, T>,
}

impl<T> Table<T> {
    pub fn new(kind: Kind) -> Self {
        let first = kind as u64 * SPAN;
        Self { kind, first, next: first, live: BTreeMap::new() }
    }

    pub fn insert(&mut self, value: T) -> u64 {
        let handle = self.next;
        self.next += STEP;
        self.live.insert(handle, value);
        handle
    }

    pub fn get(&self, handle: u64) -> Result<&T, Fail> {
        self.live.get(&handle).ok_or_else(|| self.unknown(handle))
    }

    pub fn get_mut(&mut self, handle: u64) -> Result<&mut T, Fail> {
        let unknown = self.unknown(handle);
        self.live.get_mut(&handle).ok_or(unknown)
    }

    pub fn remove(&mut self, handle: u64) -> Result<T, Fail> {
        self.live.remove(&handle).ok_or_else(|| self.unknown(handle))
    }

    pub fn contains(&self, handle: u64) -> bool {
        self.live.contains_key(&handle)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.live.iter().map(|(&handle, value)| (handle, value))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut T)> {
        self.live.iter_mut().map(|(&handle, value)| (handle, value))
    }

    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.live.retain(|_, value| keep(value));
    }

    pub fn len(&self) -> usize {
        self.live.len()
    }

    fn unknown(&self, handle: u64) -> Fail {
        let kind = self.kind.name();
        let destroyed = (self.first..self.next).contains(&handle);
        let code = match self.kind {
            Kind::Context if destroyed => cuda::CONTEXT_IS_DESTROYED,
            Kind::Context => cuda::INVALID_CONTEXT,
            _ => cuda::INVALID_HANDLE,
        };
        match handle {
            0 => fail!(code, "the {kind} is null"),
            _ if destroyed => fail!(code, "the {kind} was destroyed before"),
            _ => fail!(code, "{handle:#x} is no {kind}"),
        }
    }
}
