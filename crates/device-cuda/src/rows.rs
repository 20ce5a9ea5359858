//! Operations on rows: norms, sums, functions of single numbers, copies of rows.
//!
//! Tensors come in the type of activations, and in f32 where a weight in f32 gave them. What an operation writes to another
//! tensor is in the type of activations; what it changes in place keeps its type.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use baton_device::{Activation, Result, Rows};

use crate::gpu::{Arg, Gpu, Launch};
use crate::program::{Kernel, Source};
use crate::staging::Slot;
use crate::tensor::{DataType, Tensor, Vector};

/// Elements that a thread takes at once: `STEP` of `kernels/rows.cu`.
const STEP: usize = 8;
/// Threads of a block that takes elements as they come.
const THREADS: usize = 256;
/// The longest run that a warp norms by itself.
const WARP_RUN: usize = 1024;

/// Kernels met so far, by name and types.
type Known = HashMap<(&'static str, [Option<DataType>; 3]), Kernel>;

/// The kernels of this file, for activations of a type.
pub(crate) struct RowKernels {
    gpu: Arc<Gpu>,
    activations: DataType,
    kernels: Mutex<Known>,
    gathered: Slot,
    added: Slot,
}

impl RowKernels {
    pub(crate) fn new(gpu: &Arc<Gpu>, activations: DataType) -> Result<Self> {
        let rows = Self {
            gpu: gpu.clone(),
            activations,
            kernels: Mutex::default(),
            gathered: gpu.slot(4096, "gathered rows")?,
            added: gpu.slot(4096, "rows of a sum")?,
        };
        // What models need whose weights are not in f32; kernels of other types are compiled when they are met.
        let t = activations;
        for (name, types) in [
            ("rms_norm", &[t, t][..]),
            ("add_rms_norm", &[t, t, t]),
            ("scale", &[t]),
            ("softcap", &[t]),
            ("add", &[t, t]),
            ("gated_activation", &[t, t, t]),
            ("gather_rows", &[t]),
            ("add_rows", &[t, t]),
        ] {
            rows.kernel(name, types)?;
        }
        Ok(rows)
    }

    /// The kernel `name<types…>`.
    fn kernel(&self, name: &'static str, types: &[DataType]) -> Result<Kernel> {
        let mut key = [None; 3];
        key.iter_mut().zip(types).for_each(|(key, dtype)| *key = Some(*dtype));
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&(name, key)) {
            return Ok(kernel.clone());
        }
        let kernel = self.gpu.kernel(Source::Rows, expression(name, types))?;
        kernels.insert((name, key), kernel.clone());
        Ok(kernel)
    }

    /// Launches a kernel whose last argument is the number of elements.
    fn each(&self, name: &'static str, types: &[DataType], args: &[Arg], count: usize) -> Result<()> {
        let args = [args, &[Arg::I64(count as i64)]].concat();
        self.gpu.launch(&self.kernel(name, types)?, elements(count), &args)
    }

    /// The root-mean-square norm of each run.
    pub(crate) fn rms_norm(&self, x: &Tensor, weight: &Vector, eps: f32, out: &mut Tensor) -> Result<()> {
        assert_eq!(x.cols(), out.cols(), "width of a norm");
        let to = out.output(x.rows(), self.activations);
        self.norm(x, x.address(), weight, eps, (to, self.activations))
    }

    pub(crate) fn rms_norm_in_place(&self, x: &mut Tensor, weight: &Vector, eps: f32) -> Result<()> {
        self.norm(x, x.address(), weight, eps, (x.address(), x.dtype()))
    }

    fn norm(&self, x: &Tensor, from: u64, weight: &Vector, eps: f32, (to, dtype): (u64, DataType)) -> Result<()> {
        let (launch, shape) = runs(x, weight);
        let args = [&[Arg::Ptr(from), Arg::Ptr(weight.address()), Arg::F32(eps), Arg::Ptr(to)][..], &shape].concat();
        self.gpu.launch(&self.kernel("rms_norm", &[x.dtype(), dtype])?, launch, &args)
    }

    pub(crate) fn add_rms_norm(
        &self,
        x: &Tensor,
        residual: &mut Tensor,
        weight: &Vector,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        same_shape(x, residual);
        assert_eq!(x.cols(), out.cols(), "width of a norm");
        let (launch, shape) = runs(x, weight);
        let kernel = self.kernel("add_rms_norm", &[x.dtype(), residual.dtype(), self.activations])?;
        let to = out.output(x.rows(), self.activations);
        let (x, residual, weight) = (x.address(), residual.address(), weight.address());
        let args = [Arg::Ptr(x), Arg::Ptr(residual), Arg::Ptr(weight), Arg::F32(eps), Arg::Ptr(to)];
        self.gpu.launch(&kernel, launch, &[&args[..], &shape].concat())
    }

    pub(crate) fn scale(&self, x: &mut Tensor, factor: f32) -> Result<()> {
        self.each("scale", &[x.dtype()], &[Arg::Ptr(x.address()), Arg::F32(factor)], len(x))
    }

    pub(crate) fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        self.each("softcap", &[x.dtype()], &[Arg::Ptr(x.address()), Arg::F32(cap)], len(x))
    }

    pub(crate) fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        same_shape(x, y);
        self.each("add", &[y.dtype(), x.dtype()], &[Arg::Ptr(y.address()), Arg::Ptr(x.address())], len(x))
    }

    pub(crate) fn gated_activation(
        &self,
        activation: Activation,
        gate: &Tensor,
        up: &Tensor,
        out: &mut Tensor,
    ) -> Result<()> {
        same_shape(gate, up);
        assert_eq!(gate.cols(), out.cols(), "width of a gated activation");
        let to = out.output(gate.rows(), self.activations);
        let [gate_at, up_at, to] = [gate.address(), up.address(), to].map(Arg::Ptr);
        let args = [Arg::I32(number(activation).cast_signed()), gate_at, up_at, to];
        self.each("gated_activation", &[gate.dtype(), up.dtype(), self.activations], &args, len(gate))
    }

    pub(crate) fn gather_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        assert_eq!(x.cols(), out.cols(), "width of gathered rows");
        let kernel = self.kernel("gather_rows", &[x.dtype()])?;
        let launch = by_rows(rows.len(), x.cols().div_ceil(STEP));
        let to = out.output(rows.len(), x.dtype());
        let rows = self.row_numbers(&self.gathered, rows, x.rows())?;
        let args = [Arg::Ptr(x.address()), Arg::Ptr(rows), Arg::Ptr(to), Arg::I32(x.cols() as i32)];
        self.gpu.launch(&kernel, launch, &args)
    }

    pub(crate) fn add_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        assert_eq!((x.rows(), x.cols()), (rows.len(), out.cols()), "shape of added rows");
        let kernel = self.kernel("add_rows", &[x.dtype(), out.dtype()])?;
        let launch = by_rows(rows.len(), x.cols().div_ceil(STEP));
        let rows = self.row_numbers(&self.added, rows, out.rows())?;
        let args = [Arg::Ptr(x.address()), Arg::Ptr(rows), Arg::Ptr(out.address()), Arg::I32(x.cols() as i32)];
        self.gpu.launch(&kernel, launch, &args)
    }

    /// Copies numbers of rows, all below `limit`, to the device.
    fn row_numbers(&self, slot: &Slot, rows: &[u32], limit: usize) -> Result<u64> {
        assert!(rows.iter().all(|row| (*row as usize) < limit), "a row beyond {limit}");
        self.gpu.upload(slot, &rows.iter().flat_map(|row| row.to_ne_bytes()).collect::<Vec<_>>())
    }
}

/// Queues the rows in use of `x` in another type, to an address.
pub(crate) fn convert(gpu: &Gpu, x: &Tensor, (to, dtype): (u64, DataType)) -> Result<()> {
    let kernel = gpu.kernel(Source::Rows, expression("convert", &[x.dtype(), dtype]))?;
    gpu.launch(&kernel, elements(len(x)), &[Arg::Ptr(x.address()), Arg::Ptr(to), Arg::I64(len(x) as i64)])
}

/// Of a function, as kernels have it.
pub(crate) fn number(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    }
}

/// A kernel's name with its parameters.
fn expression(name: &str, types: &[DataType]) -> String {
    let types: Vec<_> = types.iter().map(|dtype| dtype.name()).collect();
    format!("{name}<{}>", types.join(", "))
}

fn len(x: &Tensor) -> usize {
    x.rows() * x.cols()
}

fn same_shape(a: &Tensor, b: &Tensor) {
    assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()), "shapes of two activations");
}

/// [`STEP`] elements for each thread.
fn elements(count: usize) -> Launch {
    Launch { grid: [count.div_ceil(STEP * THREADS) as u32, 1, 1], block: [THREADS as u32, 1, 1], shared: 0 }
}

/// `units` threads for each row.
fn by_rows(rows: usize, units: usize) -> Launch {
    let threads = units.next_multiple_of(32).min(THREADS);
    Launch { grid: [rows as u32, units.div_ceil(threads) as u32, 1], block: [threads as u32, 1, 1], shared: 0 }
}

/// A launch over the runs of a norm, and the arguments that say its shape: runs, their width, whether each is a warp's.
fn runs(x: &Tensor, weight: &Vector) -> (Launch, [Arg; 3]) {
    let width = weight.len();
    assert!(x.cols().is_multiple_of(width), "a norm over {width} of {} columns", x.cols());
    let runs = len(x) / width;
    let warps = width <= WARP_RUN && runs > 1;
    let (blocks, threads) = match warps {
        true => (runs.div_ceil(4), 128),
        false => (runs, width.div_ceil(STEP).next_multiple_of(32).min(512)),
    };
    let launch = Launch { grid: [blocks as u32, 1, 1], block: [threads as u32, 1, 1], shared: 0 };
    (launch, [Arg::I64(runs as i64), Arg::I32(width as i32), Arg::I32(i32::from(warps))])
}
