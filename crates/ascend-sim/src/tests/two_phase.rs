//! Operators, from the caller's side.

use std::ptr::null_mut;

use super::harness::*;
use crate::{
    array::{Array, Chip, Fault, Refusal},
    op::{Kernel, Out, Tensor, operator},
    runtime::Runtime,
};

operator! {
    /// Copies, and looks its values up as indices of a table of four: what a kernel with indices does.
    Lookup = aclnnTestLookup, aclnnTestLookupGetWorkspaceSize (indices: Tensor, out: Out)
}

impl Kernel for Lookup {
    fn check(&self, _: Chip) -> Result<(), Refusal> {
        Ok(())
    }

    fn run(&self, runtime: &mut Runtime) -> Result<(), Fault> {
        let values = runtime.load(&self.indices)?;
        if let Some(index) = values.data.iter().find(|&&v| v >= 4.0) {
            return Err(Fault::OutOfRange(format!("index {index} of 4")));
        }
        if values.data.windows(2).any(|pair| pair[0] == pair[1]) {
            runtime.violation("an index twice");
        }
        runtime.store(&self.out, &Array { dims: self.out.shape(), ..values })
    }
}

fn lookup(s: &Session, indices: &[f32]) -> i32 {
    let dims = [indices.len() as i64];
    let (from, out) =
        (tensor(s.upload_floats(indices), &dims, ACL_FLOAT), tensor(s.upload_floats(indices), &dims, ACL_FLOAT));
    s.run(|size, e| unsafe { aclnnTestLookupGetWorkspaceSize(from, out, size, e) }, aclnnTestLookup)
}

/// A sum of two numbers between its phases.
struct Half {
    operands: [Ptr; 3],
    out: Ptr,
    size: u64,
    executor: Ptr,
}

impl Half {
    fn new(s: &Session) -> Self {
        let memory = [0; 3].map(|_| s.upload_floats(&[1.0, 2.0]));
        let operands = memory.map(|address| tensor(address, &[2], ACL_FLOAT));
        let (mut size, mut executor) = (0, null_mut());
        let [a, b, out] = operands;
        assert_eq!(unsafe { aclnnAddGetWorkspaceSize(a, b, scalar(1.0), out, &mut size, &mut executor) }, 0);
        Self { operands, out: memory[2], size, executor }
    }

    fn execute(&self, s: &Session) -> i32 {
        let workspace = made(|out| unsafe { aclrtMalloc(out, self.size as usize, 0) });
        aclnnAdd(workspace, self.size, self.executor, s.stream)
    }
}

#[test]
pub fn a_sum_is_there_after_a_synchronise_and_not_before() {
    let s = Session::new();
    let (a, b) = (s.upload_floats(&[1.0, 2.0, 3.0, 4.0]), s.upload_floats(&[10.0, 20.0]));
    let out = s.upload_floats(&[0.0; 4]);
    let b = view(b, &[2, 2], &[1, 0], 0, &[2], ACL_FLOAT);
    assert_eq!(s.add(tensor(a, &[2, 2], ACL_FLOAT), b, 2.0, tensor(out, &[2, 2], ACL_FLOAT)), 0, "{:?}", message());
    assert_eq!(s.floats(out, 4), [0.0; 4]);
    assert_eq!(s.synchronize(), 0, "{:?}", message());
    assert_eq!(s.floats(out, 4), [21.0, 22.0, 43.0, 44.0]);
    assert!(s.violations().is_empty(), "{:?}", s.violations());
}

#[test]
pub fn an_executor_runs_once_on_its_own_thread_or_is_reported() {
    let s = Session::new();
    let twice = Half::new(&s);
    assert_eq!((twice.execute(&s), s.violations().len()), (0, 0));
    assert_eq!(i64::from(twice.execute(&s)), ACLNN_ERR_INNER_NULLPTR);
    s.assert_violation("the executor was destroyed before");
    lock().counters = Default::default();

    let elsewhere = Half::new(&s);
    let (size, executor, stream) = (elsewhere.size, elsewhere.executor as usize, s.stream as usize);
    let workspace = made(|out| unsafe { aclrtMalloc(out, size as usize, 0) }) as usize;
    let other = std::thread::spawn(move || {
        assert_eq!(aclrtSetDevice(0), 0);
        aclnnAdd(workspace as Ptr, size, executor as Ptr, stream as Ptr)
    });
    assert_eq!(i64::from(other.join().unwrap()), ACLNN_ERR_INNER);
    s.assert_violation("another thread");

    let before = lock().objects.executors.len();
    Half::new(&s);
    assert_eq!(lock().objects.executors.len(), before + 1);
    assert!(report().contains(&format!("\"executors\":{}", before + 1)));
}

#[test]
pub fn a_null_workspace_is_refused_and_the_executor_is_gone() {
    let s = Session::new();
    let half = Half::new(&s);
    assert_eq!(i64::from(aclnnAdd(null_mut(), 0, half.executor, s.stream)), ACLNN_ERR_PARAM_NULLPTR);
    assert!(s.violations().is_empty());
    assert_eq!(i64::from(half.execute(&s)), ACLNN_ERR_INNER_NULLPTR);
}

#[test]
pub fn a_workspace_is_odd_and_overwritten_whole_and_a_smaller_one_is_a_violation() {
    let s = Session::new();
    let half = Half::new(&s);
    assert_eq!(half.size % 2, 1);
    let size = half.size as usize;
    let workspace = s.upload(&vec![7; size + 1]);
    assert_eq!((aclnnAdd(workspace, half.size, half.executor, s.stream), s.synchronize()), (0, 0));
    let after = s.download(workspace, size + 1);
    assert_eq!((after[size], after[..size].contains(&7)), (7, false));
    assert!(s.violations().is_empty());

    let half = Half::new(&s);
    assert_eq!(i64::from(aclnnAdd(workspace, half.size - 1, half.executor, s.stream)), ACLNN_ERR_INNER);
    s.assert_violation("a workspace of");
}

#[test]
fn a_workspace_that_is_an_operand_spoils_the_result() {
    let s = Session::new();
    let half = Half::new(&s);
    let a = s.upload(&vec![0; half.size as usize]);
    let (mut size, mut executor) = (0, null_mut());
    let [_, b, out] = half.operands;
    let a_tensor = tensor(a, &[2], ACL_FLOAT);
    unsafe { aclnnAddGetWorkspaceSize(a_tensor, b, scalar(1.0), out, &mut size, &mut executor) };
    assert_eq!((aclnnAdd(a, size, executor, s.stream), s.synchronize()), (0, 0));
    assert!(s.floats(half.out, 2).iter().all(|v| v.is_nan()));
}

#[test]
pub fn an_operand_destroyed_between_the_phases_is_a_violation() {
    let s = Session::new();
    let half = Half::new(&s);
    assert_eq!(aclDestroyTensor(half.operands[1]), 0);
    assert_eq!(i64::from(half.execute(&s)), ACLNN_ERR_INNER);
    s.assert_violation("destroyed between the phases");
}

#[test]
fn operands_may_be_destroyed_once_phase_2_has_returned() {
    let s = Session::new();
    let half = Half::new(&s);
    assert_eq!(half.execute(&s), 0);
    half.operands.iter().for_each(|&operand| assert_eq!(aclDestroyTensor(operand), 0));
    assert_eq!(s.synchronize(), 0);
    assert_eq!(s.floats(half.out, 2), [2.0, 4.0]);
}

#[test]
pub fn bf16_is_refused_on_310p_in_every_operator() {
    let s = Session::new();
    for (soc, expected) in [("Ascend910B3", 0), ("Ascend910_9391", 0), ("Ascend310P3", ACLNN_ERR_PARAM_INVALID)] {
        control(&format!("soc={soc}"));
        let [a, b] = [0; 2].map(|_| tensor(s.upload(&[0; 4]), &[2], ACL_BF16));
        let code = s.run(|size, e| unsafe { aclnnTestLookupGetWorkspaceSize(a, b, size, e) }, aclnnTestLookup);
        assert_eq!(i64::from(code), expected, "{soc}");
    }
}

#[test]
pub fn a_shape_that_an_operator_cannot_take_is_refused_in_phase_1() {
    let s = Session::new();
    let refused = |a: &[i64], b: &[i64], out: &[i64]| {
        let [a, b, out] = [a, b, out].map(|dims| tensor(s.upload(&[0; 64]), dims, ACL_FLOAT));
        let (mut size, mut executor) = (0, null_mut());
        i64::from(unsafe { aclnnMmGetWorkspaceSize(a, b, out, 0, &mut size, &mut executor) })
    };
    assert_eq!(refused(&[2, 3], &[3, 4], &[2, 4]), 0);
    assert_eq!(refused(&[2, 3], &[4, 4], &[2, 4]), ACLNN_ERR_PARAM_INVALID);
    assert_eq!(refused(&[2, 0], &[0, 4], &[2, 4]), ACLNN_ERR_PARAM_INVALID);
}

#[test]
pub fn a_fault_of_a_kernel_shows_at_the_next_synchronise() {
    let s = Session::new();
    assert_eq!((lookup(&s, &[1.0, 3.0]), s.synchronize()), (0, 0));
    assert_eq!((lookup(&s, &[1.0, 4.0]), i64::from(s.synchronize())), (0, ACL_ERROR_RT_AICORE_EXCEPTION));
    assert!(message().unwrap().contains("index 4 of 4"));
    assert_eq!(i64::from(s.synchronize()), ACL_ERROR_RT_AICORE_EXCEPTION, "the context stays poisoned");
    assert_eq!((aclrtResetDeviceForce(0), aclrtSetDevice(0)), (0, 0));
    let stream = made(|out| unsafe { aclrtCreateStream(out) });
    assert_eq!(aclrtSynchronizeStream(stream), 0, "a new context is sound");
}

#[test]
pub fn what_a_kernel_reports_as_undefined_is_a_violation() {
    let s = Session::new();
    assert_eq!((lookup(&s, &[1.0, 1.0]), s.synchronize()), (0, 0));
    s.assert_violation("an index twice");
}

#[test]
fn a_null_operand_and_an_output_that_overlaps_itself_are_refused() {
    let s = Session::new();
    let a = tensor(s.upload_floats(&[0.0; 4]), &[4], ACL_FLOAT);
    assert_eq!(i64::from(s.add(null_mut(), a, 1.0, a)), ACLNN_ERR_PARAM_NULLPTR);
    let repeated = view(s.upload_floats(&[0.0; 4]), &[4], &[0], 0, &[4], ACL_FLOAT);
    assert_eq!(s.add(repeated, a, 1.0, a), 0);
    assert_eq!(i64::from(s.add(a, a, 1.0, repeated)), ACLNN_ERR_PARAM_INVALID);
}

#[test]
fn a_repeatable_executor_runs_again_with_other_addresses() {
    let s = Session::new();
    let half = Half::new(&s);
    assert_eq!(aclSetAclOpExecutorRepeatable(half.executor), 0);
    assert_eq!((half.execute(&s), s.synchronize()), (0, 0));
    assert_eq!(s.floats(half.out, 2), [2.0, 4.0]);
    let other = s.upload_floats(&[10.0, 20.0]);
    assert_eq!(aclSetInputTensorAddr(half.executor, 1, half.operands[1], other), 0);
    assert_eq!((half.execute(&s), s.synchronize()), (0, 0));
    assert_eq!(s.floats(half.out, 2), [11.0, 22.0]);
    assert_eq!(aclDestroyAclOpExecutor(half.executor), 0);
    assert_eq!(i64::from(half.execute(&s)), ACLNN_ERR_INNER_NULLPTR);
}

#[test]
fn an_executor_that_would_copy_its_operands_is_not_repeatable() {
    let s = Session::new();
    let (a, out) = (s.upload_floats(&[0.0; 8]), tensor(s.upload_floats(&[0.0; 4]), &[4], ACL_FLOAT));
    let strided = view(a, &[4], &[2], 0, &[8], ACL_FLOAT);
    let (mut size, mut executor) = (0, null_mut());
    assert_eq!(unsafe { aclnnAddGetWorkspaceSize(strided, out, scalar(1.0), out, &mut size, &mut executor) }, 0);
    assert_eq!(i64::from(aclSetAclOpExecutorRepeatable(executor)), ACLNN_ERR_INNER);
    assert_eq!(i64::from(aclSetAclOpExecutorRepeatable(null_mut())), ACLNN_ERR_INNER_NULLPTR);
}

#[test]
fn a_product_takes_the_transposed_view_of_a_weight() {
    let s = Session::new();
    let (x, w) = (s.upload_floats(&[1.0, 2.0, 3.0]), s.upload_floats(&[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]));
    let out = s.upload_floats(&[0.0; 2]);
    let x = tensor(x, &[1, 3], ACL_FLOAT);
    let w = view(w, &[3, 2], &[1, 3], 0, &[6], ACL_FLOAT);
    let to = tensor(out, &[1, 2], ACL_FLOAT);
    let code = s.run(|size, executor| unsafe { aclnnMmGetWorkspaceSize(x, w, to, 0, size, executor) }, aclnnMm);
    assert_eq!((code, s.synchronize()), (0, 0));
    assert_eq!(s.floats(out, 2), [4.0, 2.0]);
}

#[test]
fn a_cast_rounds_to_nearest_even() {
    let s = Session::new();
    let source = s.upload_floats(&[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
    let out = s.upload(&[0; 4]);
    let (from, to) = (tensor(source, &[2], ACL_FLOAT), tensor(out, &[2], ACL_BF16));
    let code = s.run(
        |size, executor| unsafe { aclnnCastGetWorkspaceSize(from, ACL_BF16 as i32, to, size, executor) },
        aclnnCast,
    );
    assert_eq!((code, s.synchronize()), (0, 0));
    assert_eq!(s.download(out, 4), [0x80, 0x3f, 0x82, 0x3f]);
}

#[test]
fn a_slice_is_written_and_what_lies_around_it_is_kept() {
    let s = Session::new();
    let (target, source) = (s.upload_floats(&[0.0; 9]), s.upload_floats(&[1.0, 2.0]));
    let to = view(target, &[2, 2], &[3, 1], 4, &[9], ACL_FLOAT);
    let from = tensor(source, &[2], ACL_FLOAT);
    let code =
        s.run(|size, executor| unsafe { aclnnInplaceCopyGetWorkspaceSize(to, from, size, executor) }, aclnnInplaceCopy);
    assert_eq!((code, s.synchronize()), (0, 0));
    assert_eq!(s.floats(target, 9), [0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
}
