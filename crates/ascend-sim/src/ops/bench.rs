//! A device for tests of single operators: memory, and operators run on it at once.

use std::{
    cell::RefCell,
    sync::{LazyLock, Mutex, PoisonError},
};

use crate::{
    array::{Array, Chip, Fault, Ints, Meta, row_major},
    constants::*,
    dtype,
    memory::Memory,
    op::{Kernel, Out, Ref, Tensor},
    runtime::Runtime,
};

pub const F32: i64 = ACL_FLOAT;
pub const F16: i64 = ACL_FLOAT16;
pub const BF16: i64 = ACL_BF16;
pub const I8: i64 = ACL_INT8;
pub const I32: i64 = ACL_INT32;
pub const I64: i64 = ACL_INT64;
pub const BOOL: i64 = ACL_BOOL;

/// One for all tests: each reserves much address space and gives none back.
static MEMORY: LazyLock<Mutex<Memory>> = LazyLock::new(|| Mutex::new(Memory::new()));

pub struct Bench {
    chip: Chip,
    addresses: RefCell<Vec<u64>>,
    pub perturb: bool,
}

impl Bench {
    pub fn new(chip: Chip) -> Self {
        Self { chip, addresses: RefCell::default(), perturb: false }
    }

    fn with<T>(&self, use_it: impl FnOnce(&mut Runtime) -> T) -> T {
        let mut memory = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
        use_it(&mut Runtime {
            device: 0,
            chip: self.chip,
            perturb: self.perturb,
            peers: &[],
            memory: &mut memory,
            violations: &mut Vec::new(),
            addresses: &self.addresses.borrow(),
        })
    }

    /// A dense tensor of garbage.
    pub fn empty(&self, dims: &[i64], dtype: i64) -> Tensor {
        let meta = Meta::dense(dims, dtype as i32);
        let bytes = dtype::bytes(meta.dtype, meta.numel() as u64).max(1);
        let address = self.with(|rt| rt.memory.allocate(0, bytes)).unwrap();
        let mut addresses = self.addresses.borrow_mut();
        addresses.push(address);
        Tensor { meta, slot: addresses.len() - 1 }
    }

    pub fn out(&self, dims: &[i64], dtype: i64) -> Out {
        Out(self.empty(dims, dtype))
    }

    pub fn fill(&self, tensor: &Tensor, data: &[f32]) {
        self.with(|rt| rt.store(tensor, &Array { dims: tensor.shape(), data: data.to_vec() })).unwrap();
    }

    pub fn floats(&self, dims: &[i64], dtype: i64, data: &[f32]) -> Tensor {
        let tensor = self.empty(dims, dtype);
        self.fill(&tensor, data);
        tensor
    }

    pub fn ints(&self, dims: &[i64], dtype: i64, data: &[i64]) -> Tensor {
        let tensor = self.empty(dims, dtype);
        self.with(|rt| rt.store_ints(&tensor, &Ints { dims: tensor.shape(), data: data.to_vec() })).unwrap();
        tensor
    }

    pub fn read(&self, tensor: &Tensor) -> Vec<f32> {
        self.with(|rt| rt.load(tensor)).unwrap().data
    }

    pub fn read_ints(&self, tensor: &Tensor) -> Vec<i64> {
        self.with(|rt| rt.load_ints(tensor)).unwrap().data
    }

    /// Phase 1: 0, or the code it is refused with.
    pub fn check(&self, kernel: &impl Kernel) -> i32 {
        kernel.check(self.chip).map_or_else(|refusal| refusal.code, |()| 0)
    }

    /// Both phases, the first of which must pass.
    pub fn run(&self, kernel: &impl Kernel) -> Result<(), Fault> {
        kernel.check(self.chip).unwrap();
        self.with(|rt| kernel.run(rt))
    }
}

/// Numbers of both signs that repeat late.
pub fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 + seed * 101) % 61) as f32 / 16.0 - 1.875).collect()
}

/// Whether two rows are equal to a relative tolerance.
pub fn near(a: &[f32], b: &[f32], tolerance: f32) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance * (1.0 + b.abs()))
}

/// The tensor turned: the same memory with its two dimensions exchanged.
pub fn turned(tensor: &Tensor) -> Tensor {
    tensor.transposed()
}

/// A tensor of another shape in place of this one's, for checks that never run.
pub fn reshaped(tensor: &Tensor, dims: &[i64]) -> Tensor {
    tensor.view(dims.to_vec(), row_major(dims), 0)
}

/// The tensor as one that is read and written.
pub fn inplace(tensor: &Tensor) -> Ref {
    Ref(tensor.clone())
}
