//! Libraries of compiled kernels, and grids of them on the host's threads.
//!
//! Invariant: a signal that a kernel raises ends its launch and nothing else: the handler leaves the lane's stack for the scheduler's. The
//! layouts here are those of `include/emulate.h`.

use std::{
    cell::Cell,
    ffi::{CStr, c_char, c_void},
    io::Write as _,
    os::fd::{AsRawFd as _, FromRawFd as _},
    ptr::null_mut,
    sync::{Arc, Mutex, Once, PoisonError, atomic::AtomicU64},
    thread,
};

use crate::{
    codes::cuda,
    machine::{Fail, fail},
};

/// `emulated::Kernel`.
#[repr(C)]
struct Kernel {
    name: *const c_char,
    call: *const c_void,
    parameters: u32,
    parameter_bytes: *const u32,
}

/// `emulated::Run`.
#[repr(C)]
struct Run {
    kernel: *const Kernel,
    arguments: *mut *mut c_void,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    order: u64,
    next: *mut u64,
    code: i32,
    message: [c_char; 256],
}

type Worker = *mut c_void;
type NewWorker = unsafe extern "C" fn() -> Worker;
type RunBlocks = unsafe extern "C" fn(Worker, *mut Run) -> bool;
type Escape = unsafe extern "C" fn(i32, *const c_void) -> !;

/// One compiled program.
pub struct Library {
    kernels: &'static [Kernel],
    new_worker: NewWorker,
    run: RunBlocks,
    escape: Escape,
    _library: libloading::Library,
}

// SAFETY: the table and the functions are constants of a library that stays loaded.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Opens a shared library by its bytes.
    pub fn open(bytes: &[u8]) -> Result<Self, String> {
        // SAFETY: a new file in memory, of which the name is not used.
        let fd = unsafe { libc::memfd_create(c"cuda-sim".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(format!("a file in memory: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was opened just now and has no other owner.
        let mut file = unsafe { std::fs::File::from_raw_fd(fd) };
        file.write_all(bytes).map_err(|error| error.to_string())?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // The loader knows libraries by their paths, so this one must not come again.
        std::mem::forget(file);
        // SAFETY: the library was made by this crate's compiler; it has no initialisers but those of the C library.
        let library = unsafe { libloading::Library::new(path) }.map_err(|error| error.to_string())?;
        // SAFETY: the symbols have these types in emulate.h and in what the compiler writes behind a source.
        unsafe {
            let symbol = |error: libloading::Error| error.to_string();
            let kernels = *library.get::<*const Kernel>(b"emulated_kernels").map_err(symbol)?;
            let count = **library.get::<*const u32>(b"emulated_kernel_count").map_err(symbol)?;
            Ok(Self {
                kernels: std::slice::from_raw_parts(kernels, count as usize),
                new_worker: *library.get(b"emulated_worker").map_err(symbol)?,
                run: *library.get(b"emulated_run").map_err(symbol)?,
                escape: *library.get(b"emulated_escape").map_err(symbol)?,
                _library: library,
            })
        }
    }

    /// The place of a kernel in the table, by lowered name.
    pub fn kernel(&self, lowered: &str) -> Option<usize> {
        (0..self.kernels.len()).find(|&kernel| lowered_name(kernel, self.name(kernel)) == lowered)
    }

    /// The name expression.
    pub fn name(&self, kernel: usize) -> &str {
        // SAFETY: names are constants of the library.
        unsafe { CStr::from_ptr(self.kernels[kernel].name) }.to_str().unwrap_or("a kernel")
    }

    /// Bytes of each parameter.
    pub fn parameters(&self, kernel: usize) -> &[u32] {
        let kernel = &self.kernels[kernel];
        // SAFETY: the table says how many parameters there are.
        unsafe { std::slice::from_raw_parts(kernel.parameter_bytes, kernel.parameters as usize) }
    }
}

/// The name by which a module knows a kernel: its place in the table and what letters its expression has.
pub fn lowered_name(kernel: usize, expression: &str) -> String {
    let letters = expression.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' });
    format!("emulated_{kernel}_{}", letters.collect::<String>())
}

/// A grid, with its arguments as they were at the call.
pub struct Launch {
    /// Its handle.
    pub function: u64,
    pub library: Arc<Library>,
    pub kernel: usize,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared: u32,
    /// Each argument, in 16-byte words.
    pub arguments: Vec<Box<[u128]>>,
}

impl Launch {
    pub fn name(&self) -> &str {
        self.library.name(self.kernel)
    }

    /// Runs all blocks, on two threads if that is worth it.
    pub fn run(&self, order: u64) -> Result<(), Fail> {
        let next = AtomicU64::new(0);
        let threads: u64 = self.grid.iter().chain(&self.block).map(|&n| u64::from(n)).product();
        let blocks: u64 = self.grid.iter().map(|&n| u64::from(n)).product();
        if blocks < 2 || threads < 8192 {
            return self.run_blocks(order, &next);
        }
        thread::scope(|scope| {
            let other = scope.spawn(|| self.run_blocks(order, &next));
            let here = self.run_blocks(order, &next);
            here.and(other.join().expect("kernels do not unwind"))
        })
    }

    /// Runs blocks that nobody has taken yet, on this thread.
    fn run_blocks(&self, order: u64, next: &AtomicU64) -> Result<(), Fail> {
        let worker = Taken::new(self.library.new_worker)?;
        let arguments = self.arguments.iter().map(|a| a.as_ptr() as *mut c_void);
        let mut arguments: Vec<_> = arguments.chain([null_mut()]).collect();
        let mut run = Run {
            kernel: &self.library.kernels[self.kernel],
            arguments: arguments.as_mut_ptr(),
            grid: self.grid,
            block: self.block,
            shared: self.shared,
            order,
            next: next.as_ptr(),
            code: 0,
            message: [0; 256],
        };
        catch_signals();
        ESCAPE.set(Some(self.library.escape));
        // SAFETY: the arguments are as many and as large as the kernel's parameters; the worker is used by this thread alone.
        let well = unsafe { (self.library.run)(worker.0, &mut run) };
        ESCAPE.set(None);
        if well {
            return Ok(());
        }
        // SAFETY: the emulator ends its messages with zero.
        let message = unsafe { CStr::from_ptr(run.message.as_ptr()) }.to_string_lossy().into_owned();
        eprintln!("cuda-sim: {message}");
        Err(fail!(run.code, "{message}"))
    }
}

/// A worker of the pool, given back when dropped.
struct Taken(Worker);

static IDLE: Mutex<Vec<usize>> = Mutex::new(Vec::new());

impl Taken {
    fn new(make: NewWorker) -> Result<Self, Fail> {
        let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        // SAFETY: makes a worker out of new memory.
        let worker = idle.map_or_else(|| unsafe { make() }, |worker| worker as Worker);
        match worker.is_null() {
            false => Ok(Self(worker)),
            true => Err(fail!(cuda::OUT_OF_MEMORY, "no memory for the stacks of a block's threads")),
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        IDLE.lock().unwrap_or_else(PoisonError::into_inner).push(self.0 as usize);
    }
}

thread_local! {
    /// How the kernel that runs on this thread is left.
    static ESCAPE: Cell<Option<Escape>> = const { Cell::new(None) };
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

static BEFORE: Mutex<[Option<libc::sigaction>; 4]> = Mutex::new([None; 4]);
const SIGNALS: [i32; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

/// Takes the signals of kernels, on a stack of their own: a lane may have used up its own.
fn catch_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
        for (signal, before) in SIGNALS.into_iter().zip(before.iter_mut()) {
            // SAFETY: all fields that matter are set; the handler is one for SA_SIGINFO.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                let mut old: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_signal as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                libc::sigaction(signal, &action, &mut old);
                *before = Some(old);
            }
        }
    });
    if PREPARED.replace(true) {
        return;
    }
    // SAFETY: asks for this thread's stack for signals, and gives it one that is never freed if it has none.
    unsafe {
        let mut stack: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &mut stack);
        if stack.ss_flags & libc::SS_DISABLE != 0 {
            let memory = Box::leak(vec![0u8; 64 << 10].into_boxed_slice());
            stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: memory.len() };
            libc::sigaltstack(&stack, null_mut());
        }
    }
}

unsafe extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
    if let Some(escape) = ESCAPE.get() {
        // SAFETY: this thread is in `emulated_run` of the library whose function this is; the signal came from the kernel's code.
        unsafe { escape(signal, (*info).si_addr()) }
    }
    // Not a kernel's: whoever had the signal before gets it when the instruction is tried again.
    if let Ok(before) = BEFORE.try_lock() {
        let at = SIGNALS.iter().position(|&s| s == signal);
        if let Some(old) = at.and_then(|at| before[at]) {
            // SAFETY: restores what the system gave for this signal.
            unsafe { libc::sigaction(signal, &old, null_mut()) };
        }
    }
}
