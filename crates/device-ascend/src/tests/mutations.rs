//! Mistakes planted on purpose: what a backend could get wrong, done wrongly through its own layers, and the rule of the
//! simulator that catches it. So that a test that passes through the simulator says something.
//!
//! | Mistake | Caught by |
//! |---|---|
//! | strides in bytes | a view that reaches past its storage |
//! | an offset in bytes | a view that reaches past its storage |
//! | a base address between boundaries | tensors start on 32 bytes |
//! | an executor used twice | an executor is used once |
//! | an executor of another thread | both phases are of one thread |
//! | an executor that nobody runs | what is live at the end |
//! | a thread without a device | every thread makes the device current (107002) |
//! | reading without waiting | nothing has run before a synchronise |
//! | an address of the host given to an operator | addresses are the device's (507015) |
//! | pageable memory in a queued copy | the host's side is page-locked (107017) |
//! | a tensor destroyed between the phases | operands live through both phases |
//! | an element of a list destroyed with its list | a list owns its elements |
//! | a workspace that is too small | as many bytes as phase 1 asked for |
//! | no workspace | as many bytes as phase 1 asked for (161001) |
//! | memory used after it was freed | addresses are the device's (507015) |
//! | memory freed that queued work uses | nothing is freed that a task in the queue uses |
//! | a copy past the end of a block | ranges lie within a block (507015) |
//! | a row that the table does not have | indices are in range (507015) |
//! | bf16 on a chip without it | dtypes of the chip (161002) |
//! | a tensor that is never destroyed | what is live at the end |
//! | a graph run in the place of calls on another block | the numbers: a graph has the addresses of its capture |
//! | a graph run after its memory was given back | addresses are the device's (507015) |
//! | a graph run after its workspace became a block | the numbers: a workspace is overwritten |
//! | a wait inside of a capture | nothing of a captured stream runs (107027) |
//! | a copy that waits inside of a capture | unsafe calls end a capture (107030) |
//! | a graph destroyed before it ran | a queued graph is there when it runs |
//! | memory of as many bytes as a weight's blocks have elements | a weight has room for whole blocks (161002) |
//! | blocks described as those of the turned weight | storage has the shape of the blocks (161002) |
//! | blocks passed as rows | the product's numbers |

use std::mem::forget;

use baton_device::DeviceError;

use super::{floats, open, values};
use crate::abi::consts::{capture_mode, format};
use crate::abi::operators::Execute;
use crate::abi::runtime::GraphFunctions;
use crate::abi::{ExecutorPtr, Graph, Stream, TensorListPtr};
use crate::device::{Device, check};
use crate::error::AscendError;
use crate::object::{Address, DataType, ScalarHandle, Tensor, TensorHandle, View};
use crate::ops::fractal;
use crate::simulator::Simulator;

type Result<T> = std::result::Result<T, AscendError>;

/// Does something wrong on a device, waits, and gives the error if there was one.
fn wrongly(work: impl FnOnce(&mut Device) -> Result<()> + Send + 'static) -> (Simulator, Option<DeviceError>) {
    let simulator = Simulator::new();
    let error = {
        let owner = open();
        let result = owner.call("mistake", work).and_then(|()| owner.call("read", Device::synchronize));
        result.err()
    };
    (simulator, error)
}

/// That a rule was broken, in these words.
fn violates(work: impl FnOnce(&mut Device) -> Result<()> + Send + 'static, words: &str) {
    let (simulator, error) = wrongly(work);
    let violations = simulator.violations();
    assert!(violations.iter().any(|text| text.contains(words)), "{words:?} in {violations:?}; {error:?}");
}

/// That a call or the synchronise gave this code.
fn fails(work: impl FnOnce(&mut Device) -> Result<()> + Send + 'static, code: i32) {
    let (_simulator, error) = wrongly(work);
    let text = error.map(|error| error.to_string()).unwrap_or_default();
    assert!(text.contains(&format!(" {code} ")), "{code} in {text:?}");
}

fn matrix(device: &mut Device) -> Result<View> {
    Ok(floats(device, &[1.0; 64], DataType::F32)?.reshape(&[8, 8]))
}

/// Its tensor.
fn tensor(device: &mut Device) -> Result<TensorHandle> {
    let x = matrix(device)?;
    TensorHandle::new(&device.acl().meta, &device.tensor(&x))
}

/// `x += x`.
fn double(device: &mut Device, x: &View) -> Result<()> {
    let (x, one) = (device.tensor(x), device.scalar(1.0, DataType::F32));
    device.add_in_place(&x, &x, &one)
}

/// Phase 1 of `x += x`, and what phase 2 takes.
struct Prepared {
    execute: Execute,
    size: u64,
    executor: ExecutorPtr,
    stream: Stream,
    operands: (TensorHandle, ScalarHandle),
}

fn prepare(device: &mut Device) -> Result<Prepared> {
    let x = tensor(device)?;
    let one = ScalarHandle::new(&device.acl().meta, &device.scalar(1.0, DataType::F32))?;
    let operator = device.operators().add_in_place.expect("the simulator has it");
    let (mut size, mut executor) = (0, ExecutorPtr::NULL);
    // SAFETY: live operands, valid out pointers.
    let code = unsafe { (operator.prepare)(x.as_ptr(), x.as_ptr(), one.as_ptr(), &raw mut size, &raw mut executor) };
    check(device.acl(), "prepare", code)?;
    let (execute, stream) = (operator.execute, device.stream());
    Ok(Prepared { execute, size, executor, stream, operands: (x, one) })
}

impl Prepared {
    /// Phase 2, with a workspace of this many bytes.
    fn execute(&self, device: &mut Device, workspace: Address, bytes: u64) -> Result<()> {
        // SAFETY: the simulator checks what these tests get wrong, and touches no memory of the host.
        let code = unsafe { (self.execute)(workspace.as_ptr(), bytes, self.executor, self.stream) };
        check(device.acl(), "execute", code)
    }
}

#[test]
fn strides_in_bytes() {
    let work = |device: &mut Device| {
        let mut x = matrix(device)?;
        x.strides.iter_mut().for_each(|stride| *stride *= 4);
        double(device, &x)
    };
    violates(work, "reaches element");
}

#[test]
fn an_offset_in_bytes() {
    let work = |device: &mut Device| {
        let mut x = matrix(device)?.narrow(0, 4, 4);
        x.offset *= 4;
        double(device, &x)
    };
    violates(work, "reaches element");
}

#[test]
fn a_base_address_between_boundaries() {
    let work = |device: &mut Device| {
        let mut x = matrix(device)?.narrow(0, 0, 1).narrow(1, 0, 4);
        x.base.0 += 4;
        double(device, &x)
    };
    violates(work, "boundary of 32");
}

#[test]
fn an_executor_used_twice() {
    let work = |device: &mut Device| {
        let prepared = prepare(device)?;
        let workspace = device.alloc(prepared.size as usize)?;
        prepared.execute(device, workspace, prepared.size)?;
        prepared.execute(device, workspace, prepared.size)
    };
    violates(work, "executor");
}

#[test]
fn an_executor_of_another_thread() {
    let work = |device: &mut Device| {
        let prepared = prepare(device)?;
        let workspace = device.alloc(prepared.size as usize)?.0;
        let context = device.context().0.addr();
        let (acl, execute, size) = (device.acl(), prepared.execute, prepared.size);
        let (executor, stream) = (prepared.executor.0.addr(), prepared.stream.0.addr());
        let other = move || {
            let pointer = std::ptr::without_provenance_mut;
            // SAFETY: handles of the simulator, which it looks up by their number.
            unsafe {
                (acl.runtime.set_context)(crate::abi::Context(pointer(context)));
                execute(pointer(workspace), size, ExecutorPtr(pointer(executor)), Stream(pointer(stream)));
            }
        };
        std::thread::spawn(other).join().expect("no panic");
        Ok(())
    };
    violates(work, "another thread");
}

#[test]
fn an_executor_that_nobody_runs() {
    let (simulator, error) = wrongly(|device| prepare(device).map(drop));
    assert!(error.is_none(), "{error:?}");
    assert_eq!(simulator.live().get("executors"), Some(&1));
}

#[test]
fn a_thread_without_a_device() {
    let work = |device: &mut Device| {
        let acl = device.acl();
        let other = move || {
            let mut block = std::ptr::null_mut();
            // SAFETY: a valid out pointer.
            let code = unsafe { (acl.runtime.malloc)(&raw mut block, 512, 0) };
            check(acl, "aclrtMalloc", code)
        };
        std::thread::spawn(other).join().expect("no panic")
    };
    fails(work, 107002);
}

#[test]
fn reading_without_waiting() {
    let work = |device: &mut Device| {
        let x = floats(device, &[1.0; 8], DataType::F32)?;
        device.synchronize()?;
        double(device, &x)?;
        let mut seen = [0u8; 32];
        let memcpy = device.acl().runtime.memcpy.expect("the simulator has it");
        // SAFETY: as many bytes as the array has. This copy waits for no stream.
        let code = unsafe { memcpy(seen.as_mut_ptr().cast(), 32, x.base.as_ptr(), 32, 2) };
        check(device.acl(), "aclrtMemcpy", code)?;
        assert_eq!(values(device, &x)?, [2.0; 8]);
        assert_ne!(seen[..], crate::device::encode(&[2.0; 8], DataType::F32)[..], "the result was there too early");
        Ok(())
    };
    assert!(wrongly(work).1.is_none());
}

#[test]
fn an_address_of_the_host_given_to_an_operator() {
    #[repr(align(64))]
    struct Aligned([f32; 64]);
    let work = |device: &mut Device| {
        let host = Box::leak(Box::new(Aligned([1.0; 64])));
        let x = View::new(Address((&raw const host.0).addr()), DataType::F32, &[8, 8]);
        double(device, &x)
    };
    fails(work, 507015);
}

#[test]
fn pageable_memory_in_a_queued_copy() {
    let work = |device: &mut Device| {
        let (block, data) = (device.alloc(512)?, vec![1u8; 512]);
        // SAFETY: as many bytes as both have; the copy is refused.
        let code = unsafe {
            let copy = device.acl().runtime.memcpy_async;
            copy(block.as_ptr(), 512, data.as_ptr().cast(), 512, 1, device.stream())
        };
        check(device.acl(), "aclrtMemcpyAsync", code)
    };
    fails(work, 107017);
}

#[test]
fn a_tensor_destroyed_between_the_phases() {
    let work = |device: &mut Device| {
        let prepared = prepare(device)?;
        let Prepared { execute, size, executor, stream, operands } = prepared;
        drop(operands);
        let workspace = device.alloc(size as usize)?;
        // SAFETY: the simulator checks what this gets wrong.
        let code = unsafe { execute(workspace.as_ptr(), size, executor, stream) };
        check(device.acl(), "execute", code)
    };
    violates(work, "destroyed between the phases");
}

#[test]
fn an_element_of_a_list_destroyed_with_its_list() {
    let work = |device: &mut Device| {
        let tensor = tensor(device)?;
        let elements = [tensor.as_ptr()];
        let meta = &device.acl().meta;
        // SAFETY: one live handle.
        let list = unsafe { (meta.create_tensor_list)(elements.as_ptr(), 1) };
        assert!(list != TensorListPtr::NULL);
        // SAFETY: a live list; that the tensor is dropped too is the mistake.
        unsafe { (meta.destroy_tensor_list)(list) };
        drop(tensor);
        Ok(())
    };
    violates(work, "aclDestroyTensor");
}

#[test]
fn a_workspace_that_is_too_small() {
    let work = |device: &mut Device| {
        let prepared = prepare(device)?;
        let workspace = device.alloc(prepared.size as usize)?;
        prepared.execute(device, workspace, prepared.size - 1)
    };
    violates(work, "workspace of");
}

#[test]
fn no_workspace() {
    let (simulator, error) = wrongly(|device| {
        let prepared = prepare(device)?;
        prepared.execute(device, Address::NULL, prepared.size)
    });
    assert!(error.expect("it is refused").to_string().contains("161001"));
    assert_eq!(simulator.live().get("executors"), None, "and the executor is gone");
}

#[test]
fn memory_used_after_it_was_freed() {
    let work = |device: &mut Device| {
        let x = View::new(device.alloc(16 << 20)?, DataType::F32, &[8, 8]);
        device.free(x.base);
        device.release_free()?;
        double(device, &x)
    };
    fails(work, 507015);
}

#[test]
fn memory_freed_that_queued_work_uses() {
    let work = |device: &mut Device| {
        let mut block = std::ptr::null_mut();
        // SAFETY: a valid out pointer, and a block that is ours to free; that it is in use is the mistake.
        unsafe {
            check(device.acl(), "aclrtMalloc", (device.acl().runtime.malloc)(&raw mut block, 512, 0))?;
            device.clear(Address(block.addr()), 512)?;
            check(device.acl(), "aclrtFree", (device.acl().runtime.free)(block))
        }
    };
    violates(work, "uses the memory");
}

#[test]
fn a_copy_past_the_end_of_a_block() {
    let work = |device: &mut Device| {
        let block = device.alloc(9 << 20)?;
        device.clear(block, 64 << 20)
    };
    fails(work, 507015);
}

#[test]
fn a_row_that_the_table_does_not_have() {
    let work = |device: &mut Device| {
        let x = matrix(device)?;
        let index = View::new(device.alloc(64)?, DataType::I32, &[2]);
        device.upload(&[1i32, 8].map(i32::to_le_bytes).concat(), index.base)?;
        let out = View::new(device.alloc(64)?, DataType::F32, &[2, 8]);
        let (x, index, out) = (device.tensor(&x), device.tensor(&index), device.tensor(&out));
        device.index_select(&x, 0, &index, &out)
    };
    fails(work, 507015);
}

#[test]
fn bf16_on_a_chip_without_it() {
    let simulator = Simulator::new();
    simulator.control("soc=Ascend310P3");
    let owner = open();
    let result = owner.call("mistake", |device| {
        let x = floats(device, &[1.0; 8], DataType::BF16)?;
        let (x, one) = (device.tensor(&x), device.scalar(1.0, DataType::BF16));
        device.muls_in_place(&x, &one)
    });
    assert!(result.expect_err("it is refused").to_string().contains("161002"));
}

#[test]
fn a_tensor_that_is_never_destroyed() {
    let (simulator, error) = wrongly(|device| {
        forget(tensor(device)?);
        Ok(())
    });
    assert!(error.is_none(), "{error:?}");
    assert_eq!(simulator.live().get("tensors"), Some(&1));
}

fn functions(device: &Device) -> GraphFunctions {
    device.acl().runtime.graph_functions().expect("the simulator has them")
}

/// The graph of `work`.
fn captured(device: &mut Device, work: impl FnOnce(&mut Device) -> Result<()>) -> Result<Graph> {
    let (functions, mut graph) = (functions(device), Graph::NULL);
    // SAFETY: the device's own stream, a valid out pointer.
    let code = unsafe { (functions.capture_begin)(device.stream(), capture_mode::THREAD_LOCAL) };
    check(device.acl(), "aclmdlRICaptureBegin", code)?;
    let result = work(device);
    // SAFETY: as above.
    let code = unsafe { (functions.capture_end)(device.stream(), &raw mut graph) };
    result.and(check(device.acl(), "aclmdlRICaptureEnd", code))?;
    Ok(graph)
}

fn run_graph(device: &Device, graph: Graph) -> Result<()> {
    // SAFETY: the simulator looks handles up.
    let code = unsafe { (functions(device).execute)(graph, device.stream()) };
    check(device.acl(), "aclmdlRIExecuteAsync", code)
}

/// A device on which `x += x` ran once, so that it has a workspace.
fn doubled(device: &mut Device) -> Result<View> {
    let x = matrix(device)?;
    double(device, &x)?;
    Ok(x)
}

#[test]
fn a_graph_run_in_the_place_of_calls_on_another_block() {
    let work = |device: &mut Device| {
        let (x, y) = (doubled(device)?, matrix(device)?);
        let graph = captured(device, |device| double(device, &x))?;
        run_graph(device, graph)?;
        assert_eq!((values(device, &x)?[0], values(device, &y)?[0]), (4.0, 1.0), "it should have been the other");
        Ok(())
    };
    assert!(wrongly(work).1.is_none());
}

#[test]
fn a_graph_run_after_its_memory_was_given_back() {
    let work = |device: &mut Device| {
        doubled(device)?;
        let x = View::new(device.alloc(40 << 20)?, DataType::F32, &[8, 8]);
        let graph = captured(device, |device| double(device, &x))?;
        device.free(x.base);
        device.release_free()?;
        run_graph(device, graph)
    };
    fails(work, 507015);
}

#[test]
fn a_graph_run_after_its_workspace_became_a_block() {
    let work = |device: &mut Device| {
        let x = doubled(device)?;
        let graph = captured(device, |device| double(device, &x))?;
        let workspace = device.workspace_now().expect("it has one").0;
        device.upload(&[0; 64], workspace)?;
        run_graph(device, graph)?;
        let block = View::new(workspace, DataType::F32, &[16]);
        assert!(values(device, &block)?.iter().all(|x| x.is_nan()), "what lay there is gone");
        Ok(())
    };
    assert!(wrongly(work).1.is_none());
}

#[test]
fn a_wait_inside_of_a_capture() {
    let work = |device: &mut Device| {
        let x = doubled(device)?;
        captured(device, |device| {
            double(device, &x)?;
            device.synchronize()
        })
        .map(drop)
    };
    fails(work, 107027);
}

#[test]
fn a_copy_that_waits_inside_of_a_capture() {
    let work = |device: &mut Device| {
        let x = doubled(device)?;
        let memcpy = device.acl().runtime.memcpy.expect("the simulator has it");
        captured(device, |device| {
            let mut seen = [0u8; 32];
            // SAFETY: as many bytes as the array has.
            let code = unsafe { memcpy(seen.as_mut_ptr().cast(), 32, x.base.as_ptr(), 32, 2) };
            check(device.acl(), "aclrtMemcpy", code)
        })
        .map(drop)
    };
    fails(work, 107030);
}

#[test]
fn a_graph_destroyed_before_it_ran() {
    let work = |device: &mut Device| {
        let x = doubled(device)?;
        let graph = captured(device, |device| double(device, &x))?;
        run_graph(device, graph)?;
        // SAFETY: a live handle; that it is queued is the mistake.
        check(device.acl(), "aclmdlRIDestroy", unsafe { (functions(device).destroy)(graph) })
    };
    violates(work, "destroyed before it ran");
}

/// A weight of `WEIGHT` in memory for its blocks, and a row for it.
fn weight(device: &mut Device) -> Result<[View; 2]> {
    let rows = fractal::with_room(device.alloc(fractal::elements(WEIGHT) * 2)?, DataType::F16, WEIGHT);
    let values: Vec<f32> = (0..rows.numel()).map(|i| (i * 7 % 31) as f32 / 8.0).collect();
    device.upload(&crate::device::encode(&values, DataType::F16), rows.base)?;
    let x = floats(device, &[1.0; WEIGHT[1]], DataType::F16)?.reshape(&[1, WEIGHT[1]]);
    Ok([rows, x])
}

/// `[out, in]`.
const WEIGHT: [usize; 2] = [24, 40];

/// The product of the row with a weight.
fn product(device: &mut Device, x: &View, weight: &Tensor) -> Result<Vec<f32>> {
    let out = floats(device, &[0.0; WEIGHT[0]], DataType::F16)?.reshape(&[1, WEIGHT[0]]);
    let (a, y) = (device.tensor(x), device.tensor(&out));
    device.mm(&a, weight, &y, 0)?;
    device.with_type(&out, DataType::F32, values)
}

#[test]
fn memory_of_as_many_bytes_as_a_weights_blocks_have_elements() {
    let work = |device: &mut Device| {
        let [mut rows, _] = weight(device)?;
        let bytes = fractal::elements_asked(device, &rows)? as i64;
        rows.storage = bytes / DataType::F16.bytes() as i64;
        fractal::to_blocks(device, &rows)
    };
    fails(work, 161002);
}

#[test]
fn blocks_described_as_those_of_the_turned_weight() {
    let work = |device: &mut Device| {
        let [rows, x] = weight(device)?;
        fractal::to_blocks(device, &rows)?;
        let (view, storage) = (rows.swap(0, 1), [2, 3, 16, 16]);
        let turned = Tensor::with_storage(&view, format::FRACTAL_NZ, &storage);
        product(device, &x, &turned).map(drop)
    };
    fails(work, 161002);
}

#[test]
fn blocks_passed_as_rows() {
    let (simulator, error) = wrongly(|device| {
        let [rows, x] = weight(device)?;
        let plain = device.tensor(&rows.swap(0, 1));
        let before = product(device, &x, &plain)?;
        fractal::to_blocks(device, &rows)?;
        let blocks = fractal::turned(&rows);
        assert_eq!(product(device, &x, &blocks)?, before);
        assert_ne!(product(device, &x, &plain)?, before, "nothing but a product of blocks understands them");
        Ok(())
    });
    assert!(error.is_none(), "{error:?}");
    simulator.expect_clean();
}

#[test]
fn what_is_right_breaks_no_rule() {
    let (simulator, error) = wrongly(|device| {
        let x = matrix(device)?;
        double(device, &x)?;
        double(device, &x.narrow(0, 4, 4).narrow(1, 1, 5))?;
        let prepared = prepare(device)?;
        let workspace = device.alloc(prepared.size as usize)?;
        prepared.execute(device, workspace, prepared.size)?;
        let graph = captured(device, |device| double(device, &x))?;
        run_graph(device, graph)?;
        device.synchronize()?;
        // SAFETY: it has run, and is used no more.
        check(device.acl(), "aclmdlRIDestroy", unsafe { (functions(device).destroy)(graph) })
    });
    assert!(error.is_none(), "{error:?}");
    simulator.expect_clean();
}
