//! Operators: the two-phase call, made from one declaration each.
//!
//! Invariant: phase 1 launches nothing, and refuses from metadata alone; phase 2 has only what phase 1 left (see [`executor`]).
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
pub mod executor;

use std::{ffi::c_void, sync::Arc};

pub use args::{Arg, Binder, Operand, Out, Ref, Role, Tensor};
pub use executor::{Executor, launch};

use crate::{
    array::{Chip, Fault, Refusal},
    constants::*,
    dtype,
    machine::{Needs, call, refusal, thread_number},
    meta::put,
    runtime::Runtime,
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
        m.settings.accepts(name)?;
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
            repeatable: false,
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
