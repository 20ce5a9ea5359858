//! The state of the process: devices, contexts, handles, counters, violations; and the guard of every exported call.
//!
//! Invariant: all of it is behind one lock. Tasks run with the lock held; whoever waits gives it up meanwhile.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    ffi::{CString, c_char},
    sync::{Condvar, LazyLock, Mutex, MutexGuard},
    time::Instant,
};

use crate::{
    array::Refusal,
    collective::{self, Communicator},
    constants::*,
    control::Settings,
    event::Event,
    graph::{self, Graph},
    memory::Memory,
    meta::Objects,
    stream::Stream,
    table::{Kind, Table},
};

/// `refusal!(CODE, "text {}", value)`: the error of an exported call.
macro_rules! refusal {
    ($code:expr, $($text:tt)*) => { $crate::array::Refusal { code: $code as i32, message: format!($($text)*) } };
}
pub(crate) use refusal;

static MACHINE: LazyLock<Mutex<Machine>> = LazyLock::new(|| Mutex::new(Machine::new()));
static CHANGED: Condvar = Condvar::new();

pub type Guard = MutexGuard<'static, Machine>;

thread_local! {
    static THREAD: RefCell<Thread> = const { RefCell::new(Thread { context: 0, message: None, given: None }) };
    static NUMBER: Cell<u64> = const { Cell::new(0) };
}

/// What the runtime keeps per thread.
struct Thread {
    context: u64,
    message: Option<String>,
    /// Keeps the text alive to which `aclGetRecentErrMsg` gave a pointer.
    given: Option<CString>,
}

pub struct Device {
    /// `aclrtSetDevice` minus `aclrtResetDevice`.
    pub references: u64,
    pub default_context: u64,
    /// Bytes taken of the budget, and the most that ever were.
    pub used: u64,
    pub peak: u64,
    /// Devices whose memory this one may read.
    pub peers: Vec<u32>,
}

pub struct Context {
    pub device: u32,
    pub default_stream: u64,
    /// The code that every later call of the context returns, once a task has failed.
    pub fault: Option<(i32, String)>,
    pub determinism: i64,
}

/// Counts since the start or the last `ascend_sim_reset`.
#[derive(Default)]
pub struct Counters {
    pub calls: BTreeMap<&'static str, u64>,
    pub launches: BTreeMap<&'static str, u64>,
    /// Copies and their bytes by direction.
    pub copies: BTreeMap<&'static str, (u64, u64)>,
    pub violations: Vec<String>,
}

pub struct Machine {
    pub settings: Settings,
    pub initialized: bool,
    pub devices: Vec<Device>,
    pub contexts: Table<Context>,
    pub streams: Table<Stream>,
    pub events: Table<Event>,
    pub graphs: Table<Graph>,
    pub groups: Table<graph::Group>,
    pub communicators: Table<Communicator>,
    pub groups_of_ranks: BTreeMap<u64, collective::Group>,
    pub objects: Objects,
    pub memory: Memory,
    pub counters: Counters,
}

impl Machine {
    fn new() -> Self {
        let settings = Settings::from_environment();
        Self {
            settings,
            initialized: false,
            devices: Vec::new(),
            contexts: Table::new(Kind::Context),
            streams: Table::new(Kind::Stream),
            events: Table::new(Kind::Event),
            graphs: Table::new(Kind::Graph),
            groups: Table::new(Kind::TaskGroup),
            communicators: Table::new(Kind::Communicator),
            groups_of_ranks: BTreeMap::new(),
            objects: Objects::new(),
            memory: Memory::new(),
            counters: Counters::default(),
        }
    }

    /// Refuses what may not be called yet, or any more.
    pub fn admit(&self, needs: Needs) -> Result<(), Refusal> {
        match needs {
            Needs::Nothing => Ok(()),
            Needs::Init if !self.initialized => Err(refusal!(ACL_ERROR_UNINITIALIZE, "aclInit was not called")),
            Needs::Init => self.settings.reachable(),
        }
    }

    pub fn violation(&mut self, text: impl Into<String>) {
        self.counters.violations.push(text.into());
    }

    /// Applies what the file of settings says by now.
    pub fn look_at_control(&mut self) {
        let refused = self.settings.read_control();
        refused.into_iter().for_each(|line| self.violation(line));
    }

    /// A visible device, by number.
    pub fn device(&mut self, device: i64) -> Result<&mut Device, Refusal> {
        let count = self.settings.devices;
        if !(0..i64::from(count)).contains(&device) {
            return Err(refusal!(ACL_ERROR_RT_INVALID_DEVICEID, "device {device}: there are {count}, counted from 0"));
        }
        while self.devices.len() <= device as usize {
            self.devices.push(Device { references: 0, default_context: 0, used: 0, peak: 0, peers: Vec::new() });
        }
        Ok(&mut self.devices[device as usize])
    }

    /// A new context on a device, with its default stream.
    pub fn create_context(&mut self, device: u32) -> u64 {
        let context = self.contexts.insert(Context { device, default_stream: 0, fault: None, determinism: 0 });
        let stream = self.streams.insert(Stream::new(context));
        self.contexts.get_mut(context).expect("made just now").default_stream = stream;
        context
    }

    /// The handle of the thread's context.
    pub fn current(&self) -> Result<u64, Refusal> {
        let context = THREAD.with_borrow(|t| t.context);
        if self.contexts.contains(context) {
            return Ok(context);
        }
        Err(refusal!(
            ACL_ERROR_RT_CONTEXT_NULL,
            "this thread has no device: call aclrtSetDevice or aclrtSetCurrentContext on it"
        ))
    }

    /// The handle of the thread's context, refused if a task of it has failed.
    pub fn sound(&self) -> Result<u64, Refusal> {
        let context = self.current()?;
        self.check_fault(context)?;
        Ok(context)
    }

    /// The failure of an earlier task of the context, if there was one.
    pub fn check_fault(&self, context: u64) -> Result<(), Refusal> {
        match &self.contexts.get(context)?.fault {
            Some((code, text)) => Err(refusal!(*code, "an earlier task failed: {text}")),
            None => Ok(()),
        }
    }

    /// The number of the thread's device.
    pub fn current_device(&self) -> Result<u32, Refusal> {
        Ok(self.contexts.get(self.current()?)?.device)
    }

    /// The stream that an exported call was given: of the thread's context, null for its default stream.
    pub fn stream(&self, raw: u64) -> Result<u64, Refusal> {
        let context = self.current()?;
        if raw == 0 {
            return Ok(self.contexts.get(context)?.default_stream);
        }
        if self.streams.get(raw)?.context != context {
            return Err(refusal!(
                ACL_ERROR_RT_STREAM_CONTEXT,
                "the stream belongs to another context than the thread's"
            ));
        }
        Ok(raw)
    }
}

pub fn set_current(context: u64) {
    THREAD.with_borrow_mut(|t| t.context = context);
}

/// A number of this thread's own.
pub fn thread_number() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NUMBER.with(|n| {
        if n.get() == 0 {
            n.set(NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        }
        n.get()
    })
}

/// The thread's last error text, forgotten by this call; null if there is none. Valid until the thread's next call of it.
pub fn take_message() -> *const c_char {
    THREAD.with_borrow_mut(|t| {
        t.given = t.message.take().and_then(|text| CString::new(text).ok());
        t.given.as_ref().map_or(std::ptr::null(), |text| text.as_ptr())
    })
}

pub fn lock() -> Guard {
    // A panic under the lock is a bug of the simulator, and has ended the process at the edge of the C ABI.
    MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Tells whoever waits that something was submitted, released or changed.
pub fn notify() {
    CHANGED.notify_all();
}

/// Gives the lock up until something changes or `until` has come.
pub fn wait(guard: Guard, until: Option<Instant>) -> Guard {
    match until {
        None => CHANGED.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner),
        Some(until) => {
            let left = until.saturating_duration_since(Instant::now());
            CHANGED.wait_timeout(guard, left).unwrap_or_else(std::sync::PoisonError::into_inner).0
        }
    }
}

/// What must hold before a call is let through.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    Init,
}

/// Runs an exported call: counts it, applies what was injected, and turns a refusal into its code and the thread's message.
pub fn call(symbol: &'static str, needs: Needs, body: impl FnOnce(&mut Machine) -> Result<(), Refusal>) -> i32 {
    call_waiting(symbol, needs, |mut guard| body(&mut guard))
}

/// [`call`], for a body that waits and so takes the lock itself.
pub fn call_waiting(symbol: &'static str, needs: Needs, body: impl FnOnce(Guard) -> Result<(), Refusal>) -> i32 {
    let mut guard = lock();
    guard.look_at_control();
    *guard.counters.calls.entry(symbol).or_default() += 1;
    let admitted = guard.settings.injected(symbol).and_then(|_| guard.admit(needs));
    answer(symbol, admitted.and_then(|()| body(guard)))
}

/// The code of a result; the text of a refusal becomes the thread's message.
pub fn answer(symbol: &str, result: Result<(), Refusal>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(Refusal { code, message }) => {
            THREAD.with_borrow_mut(|t| t.message = Some(format!("{symbol}: {message}")));
            code
        }
    }
}
