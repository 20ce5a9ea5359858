//! Live objects by handle.
//!
//! Invariant: a handle is never given out twice. It is an address in a range that no process may touch, so following it as a
//! pointer crashes; and one that is not in the table any more was destroyed, which is told from one that never was.

use std::{collections::BTreeMap, sync::OnceLock};

use crate::{array::Refusal, constants::ACL_ERROR_RT_INVALID_HANDLE, memory::reserve};

/// Handles of one kind lie in a range of their own.
const SPAN: u64 = 1 << 36;
const STEP: u64 = 16;

/// What a handle stands for; also the word for it in messages and in the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Context,
    Stream,
    Event,
    Tensor,
    Scalar,
    Array,
    List,
    Executor,
    Graph,
    TaskGroup,
    Communicator,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Context => "context",
            Self::Stream => "stream",
            Self::Event => "event",
            Self::Tensor => "tensor",
            Self::Scalar => "scalar",
            Self::Array => "array",
            Self::List => "list",
            Self::Executor => "executor",
            Self::Graph => "graph",
            Self::TaskGroup => "task group",
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
        static BASE: OnceLock<u64> = OnceLock::new();
        let base = *BASE.get_or_init(|| reserve(SPAN * 16).0);
        let first = base + kind as u64 * SPAN;
        Self { kind, first, next: first, live: BTreeMap::new() }
    }

    pub fn insert(&mut self, value: T) -> u64 {
        let handle = self.next;
        self.next += STEP;
        self.live.insert(handle, value);
        handle
    }

    pub fn get(&self, handle: u64) -> Result<&T, Refusal> {
        self.live.get(&handle).ok_or_else(|| self.unknown(handle))
    }

    pub fn get_mut(&mut self, handle: u64) -> Result<&mut T, Refusal> {
        let unknown = self.unknown(handle);
        self.live.get_mut(&handle).ok_or(unknown)
    }

    pub fn remove(&mut self, handle: u64) -> Result<T, Refusal> {
        self.live.remove(&handle).ok_or_else(|| self.unknown(handle))
    }

    /// Puts an object that was removed back under its handle.
    pub fn restore(&mut self, handle: u64, value: T) {
        assert!(self.was_destroyed(handle), "the handle was the object's");
        self.live.insert(handle, value);
    }

    pub fn contains(&self, handle: u64) -> bool {
        self.live.contains_key(&handle)
    }

    /// Whether the handle stood for an object of this kind once, and does no more.
    pub fn was_destroyed(&self, handle: u64) -> bool {
        (self.first..self.next).contains(&handle) && !self.contains(handle)
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

    fn unknown(&self, handle: u64) -> Refusal {
        let kind = self.kind.name();
        let message = match handle {
            0 => format!("the {kind} is null"),
            _ if self.was_destroyed(handle) => format!("the {kind} was destroyed before"),
            _ => format!("{handle:#x} is no {kind}"),
        };
        Refusal { code: ACL_ERROR_RT_INVALID_HANDLE as i32, message }
    }
}
