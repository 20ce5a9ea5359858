//! The state of the process: devices, contexts, handles, counters; and the guard of every exported call.
//!
//! Invariant: all of it is behind one lock. Tasks run with the lock held; whoever waits gives it up meanwhile.

use std::{
    cell::Cell,
    collections::BTreeMap,
    sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    thread::{self, ThreadId},
};

use crate::{
    blas::Blas,
    codes::{cuda, flag},
    collective::{Communicator, Ring},
    control::{Effect, Settings},
    memory::Memory,
    module::{Function, Module},
    report,
    stream::{Stream, Task},
    table::{Kind, Table},
};

/// Why a call or a task failed: the code of the library that was called, and words for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fail {
    pub code: i32,
    pub message: String,
}

/// `fail!(CODE, "text {}", value)`.
macro_rules! fail {
    ($code:expr, $($text:tt)*) => { $crate::machine::Fail { code: $code, message: format!($($text)*) } };
}
pub(crate) use fail;

static MACHINE: LazyLock<Mutex<Machine>> = LazyLock::new(|| Mutex::new(Machine::new()));
static CHANGED: Condvar = Condvar::new();

pub type Guard = MutexGuard<'static, Machine>;

thread_local! {
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

#[derive(Default)]
pub struct Device {
    /// The primary context, while somebody retains it.
    pub context: Option<u64>,
    pub retained: u32,
    /// Bytes that are allocated, and the most that ever were.
    pub used: u64,
    pub peak: u64,
    /// A sticky error that outlives its context, where resets do not help.
    pub fault: Option<i32>,
}

pub struct Context {
    pub device: u32,
    /// What a null stream stands for.
    pub default_stream: u64,
    /// The code that every later call of the context returns, once a task has failed.
    pub fault: Option<i32>,
}

pub struct Event {
    pub context: u64,
    pub record: Option<Record>,
}

/// Where an event was recorded last.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// Behind the task of a stream at the position.
    Stream { stream: u64, position: u64 },
    /// In a graph; it can be asked for nothing.
    Captured { stream: u64 },
}

/// Tasks of a captured graph, in order. Executable graphs share them.
pub type Tasks = std::sync::Arc<Vec<Task>>;

pub struct Graph {
    pub context: u64,
    pub tasks: Tasks,
    /// Of the device's memory, which an executable one takes.
    pub bytes: u64,
}

/// Counts since the start or the last `cuda_sim_reset`.
#[derive(Default)]
pub struct Counters {
    pub calls: BTreeMap<&'static str, u64>,
    /// Kernels that ran, by name expression.
    pub kernels: BTreeMap<String, Ran>,
    /// Copies that ran and their bytes, by direction.
    pub copies: BTreeMap<&'static str, (u64, u64)>,
    /// What was refused and what failed, in words.
    pub messages: Vec<String>,
}

/// Launches of one kernel that ran.
#[derive(Default)]
pub struct Ran {
    pub times: u64,
    /// Threads of a block and its bytes of dynamic shared memory, at most.
    pub threads: u64,
    pub shared: u64,
}

pub struct Machine {
    pub settings: Settings,
    pub initialized: bool,
    pub devices: Vec<Device>,
    pub contexts: Table<Context>,
    pub streams: Table<Stream>,
    pub events: Table<Event>,
    pub modules: Table<Module>,
    pub functions: Table<Function>,
    pub graphs: Table<Graph>,
    pub execs: Table<Graph>,
    pub blas: Blas,
    pub communicators: Table<Communicator>,
    pub rings: BTreeMap<u64, Ring>,
    pub memory: Memory,
    pub counters: Counters,
}

impl Machine {
    fn new() -> Self {
        report::at_exit();
        Self {
            settings: Settings::from_environment(),
            initialized: false,
            devices: Vec::new(),
            contexts: Table::new(Kind::Context),
            streams: Table::new(Kind::Stream),
            events: Table::new(Kind::Event),
            modules: Table::new(Kind::Module),
            functions: Table::new(Kind::Function),
            graphs: Table::new(Kind::Graph),
            execs: Table::new(Kind::GraphExec),
            blas: Blas::new(),
            communicators: Table::new(Kind::Communicator),
            rings: BTreeMap::new(),
            memory: Memory::new(),
            counters: Counters::default(),
        }
    }

    /// A visible device, by number.
    pub fn device(&mut self, device: i32) -> Result<&mut Device, Fail> {
        let count = self.settings.devices;
        if device < 0 || device as u32 >= count {
            return Err(fail!(cuda::INVALID_DEVICE, "device {device}: there are {count}, counted from 0"));
        }
        while self.devices.len() <= device as usize {
            self.devices.push(Device::default());
        }
        Ok(&mut self.devices[device as usize])
    }

    /// Counts bytes of a device as in use, if it has them.
    pub fn take(&mut self, device: u32, bytes: u64) -> Result<(), Fail> {
        let total = self.settings.memory;
        let device = &mut self.devices[device as usize];
        let used = device.used + bytes;
        if used > total {
            return Err(fail!(cuda::OUT_OF_MEMORY, "{bytes} bytes: {used} of {total} would be used"));
        }
        (device.used, device.peak) = (used, device.peak.max(used));
        Ok(())
    }

    /// The thread's context, which must be of use.
    fn current(&self) -> Result<u64, Fail> {
        let context = current();
        match self.contexts.get(context)?.fault {
            Some(code) => Err(fail!(code, "an error of a task before")),
            None => Ok(context),
        }
    }

    /// Refuses what may not happen beside a capture, which is lost by it.
    pub fn refuse_in_capture(&mut self, symbol: &str) -> Result<(), Fail> {
        let here = thread::current().id();
        let harmed = self.streams.iter_mut().filter_map(|(_, stream)| stream.capture.as_mut()).filter(|capture| {
            capture.mode == flag::CAPTURE_GLOBAL || capture.mode == flag::CAPTURE_THREAD_LOCAL && capture.thread == here
        });
        match harmed.map(|capture| capture.broken = true).count() {
            0 => Ok(()),
            _ => Err(fail!(cuda::STREAM_CAPTURE_UNSUPPORTED, "{symbol} during a capture")),
        }
    }

    /// The handle of a stream, where null is the context's own.
    pub fn stream(&self, context: u64, stream: u64) -> Result<u64, Fail> {
        match stream {
            0 => Ok(self.contexts.get(context)?.default_stream),
            _ => self.streams.get(stream).map(|_| stream),
        }
    }

    /// Ends everything of a context: what was queued never runs, and every later call returns the code.
    pub fn poison(&mut self, context: u64, failure: Fail) {
        if let Ok(context) = self.contexts.get_mut(context) {
            context.fault.get_or_insert(failure.code);
            if !self.settings.reset {
                self.devices[context.device as usize].fault = context.fault;
            }
        }
        self.counters.messages.push(failure.message);
        self.streams.iter_mut().filter(|(_, s)| s.context == context).for_each(|(_, s)| s.abandon());
        notify();
    }
}

/// A capture in progress.
pub struct Capture {
    pub mode: i32,
    pub thread: ThreadId,
    pub tasks: Vec<Task>,
    /// Something happened that a capture does not survive.
    pub broken: bool,
}

pub fn current() -> u64 {
    CURRENT.get()
}

pub fn set_current(context: u64) {
    CURRENT.set(context);
}

pub fn lock() -> Guard {
    // A panic under the lock is a bug of the simulator, and has ended the process at the edge of the C ABI.
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells whoever waits that something was submitted, released or changed.
pub fn notify() {
    CHANGED.notify_all();
}

/// Gives the lock up until something changes.
pub fn wait(guard: Guard) -> Guard {
    CHANGED.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// An exported call that needs `cuInit` and nothing else: counts it, applies what was injected, and turns a failure into its code.
pub fn call(symbol: &'static str, body: impl FnOnce(&mut Machine) -> Result<(), Fail>) -> i32 {
    let mut m = lock();
    let result = m.enter(symbol).and_then(|_| match m.initialized {
        true => body(&mut m),
        false => Err(fail!(cuda::NOT_INITIALIZED, "cuInit was not called")),
    });
    m.answer(symbol, result)
}

/// [`call`], with the thread's context.
pub fn in_context(symbol: &'static str, body: impl FnOnce(&mut Machine, u64) -> Result<(), Fail>) -> i32 {
    waiting(symbol, |mut guard, context, _| {
        let result = body(&mut guard, context);
        (guard, result)
    })
}

/// [`in_context`], for a call that captures do not survive.
pub fn outside_capture(symbol: &'static str, body: impl FnOnce(&mut Machine, u64) -> Result<(), Fail>) -> i32 {
    in_context(symbol, |m, context| {
        m.refuse_in_capture(symbol)?;
        body(m, context)
    })
}

/// [`in_context`], for a body that gives the lock up while it waits, and wants to know what was injected.
pub fn waiting(
    symbol: &'static str,
    body: impl FnOnce(Guard, u64, Option<Effect>) -> (Guard, Result<(), Fail>),
) -> i32 {
    let mut guard = lock();
    let admitted = guard.enter(symbol).and_then(|effect| Ok((guard.current()?, effect)));
    let (mut guard, result) = match admitted {
        Ok((context, effect)) => body(guard, context, effect),
        Err(failure) => (guard, Err(failure)),
    };
    guard.answer(symbol, result)
}

impl Machine {
    /// Counts a call; what was injected into it, or why it does not come through.
    pub fn enter(&mut self, symbol: &'static str) -> Result<Option<Effect>, Fail> {
        *self.counters.calls.entry(symbol).or_default() += 1;
        let effect = self.settings.injected(symbol)?;
        match self.settings.lost {
            Some(code) => Err(fail!(code, "the device is lost")),
            None => Ok(effect),
        }
    }

    /// The code of a result; the words of a failure are kept.
    pub fn answer(&mut self, symbol: &str, result: Result<(), Fail>) -> i32 {
        match result {
            Ok(()) => 0,
            Err(Fail { code, message }) => {
                // Neither is a mistake: to ask too early, and to try an image that a cache kept from another version.
                if ![cuda::NOT_READY, cuda::INVALID_IMAGE].contains(&code) {
                    self.counters.messages.push(format!("{symbol}: {message}"));
                }
                code
            }
        }
    }
}

/// Gives a caller of the C ABI a value. Null is refused.
pub fn put<T>(out: *mut T, value: T) -> Result<(), Fail> {
    if out.is_null() {
        return Err(fail!(cuda::INVALID_VALUE, "a pointer for a result is null"));
    }
    // SAFETY: callers of the C ABI give a pointer with room for what the function is documented to write.
    unsafe { out.write_unaligned(value) };
    Ok(())
}
