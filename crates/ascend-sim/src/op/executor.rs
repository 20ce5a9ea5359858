//! Executors: what phase 1 leaves for phase 2.
//!
//! Invariant: an executor runs on the thread that made it, in the context that was current then, and is gone after phase 2
//! whatever that returned, unless it was made repeatable. Its workspace has an odd size and is overwritten whole, before the
//! operator reads and after it wrote, so a workspace that is anything else's memory shows.

use std::{ffi::c_void, sync::Arc, time::Duration};

use crate::{
    array::{Fault, Refusal},
    constants::*,
    control::Effect,
    dtype,
    machine::{Machine, Needs, answer, call, lock, refusal, thread_number},
    memory::Range,
    op::{Operand, Role},
    runtime::{Runtime, byte_range},
    stream::{Action, Task, Work},
};

/// What a workspace is overwritten with: a NaN in every float type.
const SCRATCH: u8 = 0xFF;

pub struct Executor {
    pub name: &'static str,
    pub run: Work,
    pub operands: Vec<Operand>,
    /// Handles that must be live in phase 2.
    pub used: Vec<u64>,
    /// Bytes of workspace.
    pub workspace: u64,
    pub thread: u64,
    pub context: u64,
    /// May run many times, with other addresses.
    pub repeatable: bool,
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

fn launch_with(m: &mut Machine, name: &str, workspace: Range, executor: u64, stream: u64) -> Result<(), Refusal> {
    let taken = m.objects.executors.remove(executor).map_err(|refusal| {
        m.violation(format!("{name}: {}", refusal.message));
        refusal!(ACLNN_ERR_INNER_NULLPTR, "{}", refusal.message)
    })?;
    let submitted = taken.submit_to(m, name, workspace, stream);
    if taken.repeatable {
        m.objects.executors.restore(executor, taken);
    }
    submitted?;
    *m.counters.launches.entry(name.to_owned()).or_default() += 1;
    Ok(())
}

impl Executor {
    fn submit_to(&self, m: &mut Machine, name: &str, workspace: Range, stream: u64) -> Result<(), Refusal> {
        let effect = m.settings.injected(name)?;
        m.admit(Needs::Init)?;
        m.sound()?;
        self.check(m, name, workspace)?;
        let stream = m.stream(stream)?;
        m.submit(stream, self.task(Range::new(workspace.start, self.workspace), effect)).map(drop)
    }

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
            return Err(refusal!(ACLNN_ERR_PARAM_NULLPTR, "a null workspace, phase 1 asked for {}", self.workspace));
        }
        Ok(())
    }

    /// The task on a stream.
    fn task(&self, workspace: Range, effect: Option<Effect>) -> Task {
        let addresses: Vec<u64> = self.operands.iter().map(|o| o.address).collect();
        let mut ranges: Vec<Range> = self.operands.iter().map(|o| byte_range(&o.meta, o.address)).collect();
        ranges.push(workspace);
        let spoiled = self.spoiled(effect);
        let run = self.run.clone();
        let work = move |outer: &mut Runtime| {
            if effect == Some(Effect::Run) {
                return Err(Fault::OutOfRange("a fault that was asked for".to_owned()));
            }
            outer.write(workspace)?.fill(SCRATCH);
            run(&mut Runtime { addresses: &addresses, memory: outer.memory, violations: outer.violations, ..*outer })?;
            outer.write(workspace)?.fill(SCRATCH);
            if let Some(value) = spoiled {
                outer.write(value)?.fill(SCRATCH);
            }
            Ok(())
        };
        Task { name: self.name, ranges, delay: Duration::ZERO, action: Action::Work(Arc::new(work)) }
    }

    /// The value that an injected NaN takes the place of: the first of the first float output.
    fn spoiled(&self, effect: Option<Effect>) -> Option<Range> {
        let written = |o: &&Operand| o.role != Role::In && dtype::is_float(o.meta.dtype);
        let output = self.operands.iter().find(written).filter(|_| effect == Some(Effect::Nan))?;
        let bytes = dtype::bytes(output.meta.dtype, 1);
        Some(Range::new(output.address + output.meta.offset as u64 * bytes, bytes))
    }

    /// Whether the operator would copy operands of its own: a view that is neither dense nor the transpose of a dense one.
    fn copies(&self) -> bool {
        self.operands.iter().any(|operand| {
            let mut swapped = operand.meta.clone();
            if let rank @ 2.. = swapped.rank() {
                swapped.dims.swap(rank - 2, rank - 1);
                swapped.strides.swap(rank - 2, rank - 1);
            }
            !operand.meta.is_contiguous() && !swapped.is_contiguous()
        })
    }

    /// Gives a new address to the tensor that is number `index` among the arguments with one of the roles; with a list, to its
    /// element `relative`.
    fn set_address(&mut self, roles: &[Role], index: usize, relative: usize, address: u64) -> Result<(), Refusal> {
        let mut arguments: Vec<&'static str> = Vec::new();
        for operand in self.operands.iter().filter(|o| roles.contains(&o.role)) {
            if arguments.last() != Some(&operand.name) {
                arguments.push(operand.name);
            }
        }
        let name = arguments.get(index).copied();
        let tensor = self.operands.iter_mut().filter(|o| Some(o.name) == name).nth(relative);
        let tensor = tensor.ok_or_else(|| {
            refusal!(ACLNN_ERR_PARAM_INVALID, "tensor {relative} of argument {index}: the arguments are {arguments:?}")
        })?;
        tensor.address = address;
        Ok(())
    }
}

/// UNCONFIRMED: that an operator which would copy is refused with this code on every release.
#[unsafe(no_mangle)]
pub extern "C" fn aclSetAclOpExecutorRepeatable(executor: *mut c_void) -> i32 {
    with("aclSetAclOpExecutorRepeatable", executor, |executor| {
        if executor.copies() {
            return Err(refusal!(ACLNN_ERR_INNER, "{} makes copies of its own operands", executor.name));
        }
        executor.repeatable = true;
        Ok(())
    })
}

/// Frees an executor, repeatable or never run. UNCONFIRMED for the latter.
#[unsafe(no_mangle)]
pub extern "C" fn aclDestroyAclOpExecutor(executor: *mut c_void) -> i32 {
    call("aclDestroyAclOpExecutor", Needs::Nothing, |m| {
        let removed = m.objects.executors.remove(executor as u64);
        removed.map(drop).map_err(|refusal| {
            m.violation(format!("aclDestroyAclOpExecutor: {}", refusal.message));
            refusal!(ACLNN_ERR_INNER_NULLPTR, "{}", refusal.message)
        })
    })
}

fn with(symbol: &'static str, executor: *mut c_void, body: impl FnOnce(&mut Executor) -> Result<(), Refusal>) -> i32 {
    call(symbol, Needs::Init, |m| {
        let executor = m.objects.executors.get_mut(executor as u64);
        body(executor.map_err(|refusal| refusal!(ACLNN_ERR_INNER_NULLPTR, "{}", refusal.message))?)
    })
}

/// The exported functions that give a tensor of a repeatable executor another address.
macro_rules! set_address {
    ($($name:ident($roles:expr);)*) => {
        $(#[unsafe(no_mangle)]
        pub extern "C" fn $name(executor: *mut c_void, index: usize, _tensor: *mut c_void, address: *mut c_void) -> i32 {
            with(stringify!($name), executor, |executor| executor.set_address(&$roles, index, 0, address as u64))
        })*
    };
}

set_address! {
    aclSetInputTensorAddr([Role::In, Role::InOut]);
    aclSetOutputTensorAddr([Role::Out, Role::InOut]);
    aclSetTensorAddr([Role::In, Role::Out, Role::InOut]);
}

/// The same for an element of a list.
macro_rules! set_dynamic_address {
    ($($name:ident($roles:expr);)*) => {
        $(#[unsafe(no_mangle)]
        pub extern "C" fn $name(
            executor: *mut c_void,
            index: usize,
            relative: usize,
            _list: *mut c_void,
            address: *mut c_void,
        ) -> i32 {
            with(stringify!($name), executor, |executor| executor.set_address(&$roles, index, relative, address as u64))
        })*
    };
}

set_dynamic_address! {
    aclSetDynamicInputTensorAddr([Role::In, Role::InOut]);
    aclSetDynamicOutputTensorAddr([Role::Out, Role::InOut]);
}
