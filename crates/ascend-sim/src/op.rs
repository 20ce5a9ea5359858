//! Operators: the two-phase call, made from one declaration each.
//!
//! Invariant: an executor runs once, on the thread that made it, in the context that was current then, and is gone after phase 2
//! whatever that returned. Its workspace has an odd size and is overwritten whole, before the operator reads and after it
//! wrote, so a workspace that is anything else's memory shows.
//!
//! A new operator is a declaration and its two functions:
//!
//! ```text
//! operator! {
//!     /// out = self + alpha * other
//!     Add = aclnnAdd, aclnnAddGetWorkspaceSize (a: Tensor, b: Tensor, alpha: Scalar, out: Out)
//! }
//! impl Kernel for Add {
//!     fn check(&self, chip: Chip) -> Result<(), Refusal> { ... }        // phase 1: metadata only
//!     fn run(&self, runtime: &mut Runtime) -> Result<(), Fault> { ... } // when the task runs: load, compute, store
//! }
//! ```
//!
//! The framework has refused before `check`: null for what is not optional (161001), more than eight dimensions, a dimension of
//! zero unless `ACCEPTS_EMPTY`, bf16 on 310P, an output that overlaps itself (161002).

mod args;

use std::{ffi::c_void, sync::Arc, time::Duration};

pub use args::{Arg, Binder, Operand, Out, Ref, Role, Tensor};

use crate::{
    array::{Chip, Fault, Refusal},
    constants::*,
    dtype,
    machine::{Machine, Needs, answer, call, lock, refusal, thread_number},
    memory::Range,
    meta::put,
    runtime::{Runtime, byte_range},
    stream::{Action, Task},
};

/// An operator with its arguments.
pub trait Kernel: Send + Sync + 'static {
    /// Whether operands may have a dimension of zero.
    const ACCEPTS_EMPTY: bool = false;

    /// Phase 1: what the chip refuses, told from shapes, dtypes and attributes.
    fn check(&self, chip: Chip) -> Result<(), Refusal>;

    /// The computation.
    fn run(&self, runtime: &mut Runtime) -> Result<(), Fault>;
}

type Run = Arc<dyn Fn(&mut Runtime) -> Result<(), Fault> + Send + Sync>;

/// What phase 1 leaves for phase 2.
pub struct Executor {
    name: &'static str,
    run: Run,
    operands: Vec<Operand>,
    /// Handles that must be live in phase 2.
    used: Vec<u64>,
    workspace: u64,
    thread: u64,
    context: u64,
}

/// Phase 1 of any operator: binds the arguments, checks them, makes the executor.
///
/// # Safety
/// Each out pointer is null, or points to room for a value.
pub unsafe fn prepare<K: Kernel>(
    symbol: &'static str,
    name: &'static str,
    workspace_size: *mut u64,
    executor: *mut *mut c_void,
    build: impl FnOnce(&mut Binder) -> Result<K, Refusal>,
) -> i32 {
    call(symbol, Needs::Init, |m| {
        let context = m.sound()?;
        if workspace_size.is_null() || executor.is_null() {
            return Err(refusal!(ACLNN_ERR_PARAM_NULLPTR, "workspaceSize or executor is null"));
        }
        let chip = m.settings.chip();
        let mut binder = Binder::new(&m.objects);
        let kernel = build(&mut binder)?;
        let (operands, used) = binder.finish();
        operands.iter().try_for_each(|operand| check_operand(operand, chip, K::ACCEPTS_EMPTY))?;
        m.settings.admit_operator(name)?;
        kernel.check(chip)?;
        let workspace = workspace_for(&operands);
        let executor_handle = m.objects.executors.insert(Executor {
            name,
            run: Arc::new(move |runtime| kernel.run(runtime)),
            operands,
            used,
            workspace,
            thread: thread_number(),
            context,
        });
        // SAFETY: both pointers were found not to be null, and by the caller's word there is room.
        unsafe {
            put(workspace_size, workspace)?;
            put(executor, executor_handle as *mut c_void)
        }
    })
}

/// What no operator accepts.
fn check_operand(operand: &Operand, chip: Chip, accepts_empty: bool) -> Result<(), Refusal> {
    let (name, meta) = (operand.name, &operand.meta);
    if i64::from(meta.dtype) == ACL_BF16 && chip == Chip::P310 {
        return Err(refusal!(ACLNN_ERR_PARAM_INVALID, "{name} is bf16, which this chip has in no operator"));
    }
    if meta.dims.contains(&0) && !accepts_empty {
        return Err(refusal!(ACLNN_ERR_PARAM_INVALID, "{name} has a dimension of zero: {:?}", meta.dims));
    }
    let repeats = meta.dims.iter().zip(&meta.strides).any(|(&dim, &stride)| dim > 1 && stride == 0);
    if repeats && operand.role != Role::In {
        return Err(refusal!(ACLNN_ERR_PARAM_INVALID, "{name} is written, and some elements are the same memory"));
    }
    Ok(())
}

/// Bytes of workspace: odd, never zero, and more for larger operands, so that one that was sized for small ones does not do.
fn workspace_for(operands: &[Operand]) -> u64 {
    let largest = operands.iter().map(|o| dtype::bytes(o.meta.dtype, o.meta.numel() as u64)).max().unwrap_or(0);
    (largest / 16).min(1 << 16) / 2 * 2 + 515
}

/// Phase 2 of any operator: consumes the executor, and queues its task.
pub fn launch(
    name: &'static str,
    workspace: *mut c_void,
    size: u64,
    executor: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    let mut m = lock();
    *m.counters.calls.entry(name.to_owned()).or_default() += 1;
    let result = launch_with(&mut m, name, Range::new(workspace as u64, size), executor as u64, stream as u64);
    drop(m);
    answer(name, result)
}

fn launch_with(
    m: &mut Machine,
    name: &'static str,
    workspace: Range,
    executor: u64,
    stream: u64,
) -> Result<(), Refusal> {
    let executor = m.objects.executors.remove(executor).map_err(|refusal| {
        m.violation(format!("{name}: {}", refusal.message));
        refusal!(ACLNN_ERR_INNER_NULLPTR, "{}", refusal.message)
    })?;
    if !m.initialized {
        return Err(refusal!(ACL_ERROR_UNINITIALIZE, "aclInit was not called"));
    }
    m.settings.admit(name)?;
    m.sound()?;
    executor.check(m, name, workspace)?;
    let stream = m.stream(stream)?;
    m.submit(stream, executor.task(workspace))?;
    *m.counters.launches.entry(name.to_owned()).or_default() += 1;
    Ok(())
}

impl Executor {
    /// What phase 2 must find as phase 1 left it.
    fn check(&self, m: &mut Machine, name: &str, workspace: Range) -> Result<(), Refusal> {
        let mut broken = Vec::new();
        if name != self.name {
            broken.push(format!("the executor was made by {}", self.name));
        }
        if self.thread != thread_number() {
            broken.push("the executor was made on another thread".to_owned());
        }
        if self.context != m.current()? {
            broken.push("the executor was made in another context".to_owned());
        }
        if self.used.iter().any(|&handle| !m.objects.contains(handle)) {
            broken.push("an operand was destroyed between the phases".to_owned());
        }
        if workspace.start != 0 && workspace.len < self.workspace {
            broken.push(format!("a workspace of {} bytes where phase 1 asked for {}", workspace.len, self.workspace));
        }
        if let Some(first) = broken.first().cloned() {
            broken.into_iter().for_each(|text| m.violation(format!("{name}: {text}")));
            return Err(refusal!(ACLNN_ERR_INNER, "{first}"));
        }
        if workspace.start == 0 {
            return Err(refusal!(
                ACLNN_ERR_PARAM_NULLPTR,
                "a null workspace where phase 1 asked for {}",
                self.workspace
            ));
        }
        Ok(())
    }

    /// The task on a stream.
    fn task(self, workspace: Range) -> Task {
        let workspace = Range::new(workspace.start, self.workspace);
        let addresses: Vec<u64> = self.operands.iter().map(|o| o.address).collect();
        let mut ranges: Vec<Range> = self.operands.iter().map(|o| byte_range(&o.meta, o.address)).collect();
        ranges.push(workspace);
        let run = self.run;
        let work = move |runtime: &mut Runtime| {
            runtime.write(workspace)?.fill(SCRATCH);
            let mut runtime =
                Runtime { addresses: &addresses, memory: runtime.memory, violations: runtime.violations, ..*runtime };
            run(&mut runtime)?;
            runtime.write(workspace)?.fill(SCRATCH);
            Ok(())
        };
        Task { name: self.name, ranges, delay: Duration::ZERO, action: Action::Work(Arc::new(work)) }
    }
}

/// What a workspace is overwritten with: a NaN in every float type.
const SCRATCH: u8 = 0xFF;

/// Declares an operator: a type with its arguments, and the two functions that the C ABI has for it.
macro_rules! operator {
    ($(#[$doc:meta])* $kernel:ident = $execute:ident, $prepare:ident ($($arg:ident: $ty:ty),* $(,)?)) => {
        $(#[$doc])*
        pub struct $kernel {
            $(pub $arg: $ty),*
        }

        #[unsafe(no_mangle)]
        #[allow(clippy::too_many_arguments, reason = "the C ABI has as many")]
        pub unsafe extern "C" fn $prepare(
            $($arg: <$ty as $crate::op::Arg>::Raw,)*
            workspace_size: *mut u64,
            executor: *mut *mut std::ffi::c_void,
        ) -> i32 {
            // SAFETY: the C ABI gives room for the two results, and each argument as its type says.
            unsafe {
                $crate::op::prepare(stringify!($prepare), stringify!($execute), workspace_size, executor, |binder| {
                    Ok($kernel { $($arg: <$ty as $crate::op::Arg>::bind($arg, stringify!($arg), binder)?),* })
                })
            }
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $execute(
            workspace: *mut std::ffi::c_void,
            workspace_size: u64,
            executor: *mut std::ffi::c_void,
            stream: *mut std::ffi::c_void,
        ) -> i32 {
            $crate::op::launch(stringify!($execute), workspace, workspace_size, executor, stream)
        }
    };
}
pub(crate) use operator;
