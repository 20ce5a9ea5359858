//! Products of many rows: cuBLASLt, whose choice of an algorithm is kept for every shape.
//!
//! cuBLASLt sees matrices by columns, so that ours are transposed: `outᵀ [n, rows] = (weightᵀ)ᵀ [n, k] · xᵀ [k, rows]`.
//! Invariant: an algorithm is chosen once for a shape, so that equal steps queue equal calls; its workspace is one
//! fixed buffer, which products use in the order of the stream.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use baton_device::{DeviceError, Result};
use cudarc::cublaslt::sys::{self as lt, cublasStatus_t};
use cudarc::driver::sys::{self, CUresult, CUstream};

use crate::context::{Context, Handle};
use crate::gpu::Gpu;
use crate::tensor::DataType;

/// What the vendor recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// `out = x · weightᵀ`, row-major, contiguous, sums in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Matmul {
    /// Rows of x and out.
    pub(crate) rows: usize,
    /// Columns of out, rows of weight.
    pub(crate) n: usize,
    /// Columns of x and weight.
    pub(crate) k: usize,
    /// Type of x and weight.
    pub(crate) input: DataType,
    /// Type of out: that of the input, or f32.
    pub(crate) output: DataType,
    /// `[rows, k]`.
    pub(crate) x: u64,
    /// `[n, k]`.
    pub(crate) weight: u64,
    /// `[rows, n]`.
    pub(crate) out: u64,
    /// Elements from one row of out to the next.
    pub(crate) out_stride: usize,
}

/// cuBLASLt on one device.
pub(crate) struct Blas {
    handle: Handle<lt::cublasLtHandle_t>,
    workspace: u64,
    plans: Mutex<HashMap<Shape, Plan>>,
}

/// What decides about the algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    n: usize,
    k: usize,
    input: DataType,
    output: DataType,
    out_stride: usize,
    /// Of x, weight and out, in bytes.
    alignment: [u32; 3],
}

/// How a shape is computed. Descriptors live as long as [`Blas`].
#[derive(Debug, Clone, Copy)]
struct Plan {
    product: Handle<lt::cublasLtMatmulDesc_t>,
    weight: Handle<lt::cublasLtMatrixLayout_t>,
    x: Handle<lt::cublasLtMatrixLayout_t>,
    out: Handle<lt::cublasLtMatrixLayout_t>,
    algorithm: lt::cublasLtMatmulAlgo_t,
}

impl Blas {
    pub(crate) fn new(context: &Context) -> Result<Self> {
        let (mut handle, mut workspace) = (std::ptr::null_mut(), 0);
        context.enter()?;
        // SAFETY: valid out pointers.
        unsafe {
            check(context, "cublasLtCreate", lt::cublasLtCreate(&raw mut handle))?;
            match sys::cuMemAlloc_v2(&raw mut workspace, WORKSPACE) {
                CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    let (device, what) = (context.name.clone(), "the workspace of products");
                    return Err(DeviceError::OutOfMemory { device, bytes: WORKSPACE, what });
                }
                code => context.check("cuMemAlloc", code)?,
            }
        }
        Ok(Self { handle: Handle(handle), workspace, plans: Mutex::default() })
    }

    /// Queues a product.
    pub(crate) fn queue(&self, gpu: &Gpu, product: &Matmul) -> Result<()> {
        let product = *product;
        let Matmul { rows, n, k, input, output, x, weight, out, out_stride } = product;
        if rows == 0 || n == 0 {
            return Ok(());
        }
        let alignment = [x, weight, out].map(|address| 1 << address.trailing_zeros().min(8));
        let plan = self.plan(gpu.context(), Shape { rows, n, k, input, output, out_stride, alignment })?;
        let (handle, workspace) = (self.handle, self.workspace);
        // The plan is the shape's own, so that its descriptor stands for both.
        let key = [plan.product.0 as u64, x, weight, out];
        gpu.call("matmul", &key, move |context, stream| {
            // SAFETY: descriptors as made for these matrices, which are the caller's until the stream has passed; the
            // algorithm was chosen for them and for the workspace.
            match unsafe { plan.run(handle, [x, weight, out], workspace, stream) } {
                cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
                code => Err(context.foreign("matmul", format!("cublasLtMatmul gave {code:?}: {product:?}"), stream)),
            }
        })
    }

    fn plan(&self, context: &Context, shape: Shape) -> Result<Plan> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&shape) {
            return Ok(*plan);
        }
        context.enter()?;
        let plan = Plan::new(context, self.handle.0, shape)?;
        plans.insert(shape, plan);
        Ok(plan)
    }

    /// Gives everything back; nothing of it runs any more.
    pub(crate) fn free(&self, context: &Context) {
        if !context.enter_to_free() {
            return;
        }
        for (_, plan) in self.plans.lock().unwrap_or_else(PoisonError::into_inner).drain() {
            // SAFETY: each made once.
            unsafe {
                lt::cublasLtMatmulDescDestroy(plan.product.0);
                for layout in [plan.weight, plan.x, plan.out] {
                    lt::cublasLtMatrixLayoutDestroy(layout.0);
                }
            }
        }
        // SAFETY: made once.
        unsafe {
            sys::cuMemFree_v2(self.workspace);
            lt::cublasLtDestroy(self.handle.0);
        }
    }
}

impl Plan {
    /// Puts the product of `[x, weight, out]` on a stream.
    ///
    /// # Safety
    /// The addresses are those of matrices as planned, which live until the stream has passed.
    unsafe fn run(
        &self,
        handle: Handle<lt::cublasLtHandle_t>,
        [x, weight, out]: [u64; 3],
        workspace: u64,
        stream: CUstream,
    ) -> cublasStatus_t {
        let (one, zero) = (1.0f32, 0.0f32);
        let address = |address: u64| address as *mut c_void;
        // SAFETY: as the caller says; the scalars are read now.
        unsafe {
            lt::cublasLtMatmul(
                handle.0,
                self.product.0,
                (&raw const one).cast(),
                address(weight),
                self.weight.0,
                address(x),
                self.x.0,
                (&raw const zero).cast(),
                address(out),
                self.out.0,
                address(out),
                self.out.0,
                &raw const self.algorithm,
                address(workspace),
                WORKSPACE,
                stream.cast(),
            )
        }
    }

    fn new(context: &Context, handle: lt::cublasLtHandle_t, shape: Shape) -> Result<Self> {
        use lt::cublasLtMatmulPreferenceAttributes_t::*;
        let Shape { rows, n, k, input, output, out_stride, alignment } = shape;
        let check = |call, code| check(context, call, code);
        let mut product = std::ptr::null_mut();
        let (sums, scale) = (lt::cublasComputeType_t::CUBLAS_COMPUTE_32F, lt::cudaDataType_t::CUDA_R_32F);
        let transposed = TRANSPOSED;
        let layout = |dtype: DataType, rows: usize, cols: usize, leading: usize| {
            let mut layout = std::ptr::null_mut();
            let (rows, cols, leading) = (rows as u64, cols as u64, leading as i64);
            // SAFETY: a valid out pointer.
            let code = unsafe { lt::cublasLtMatrixLayoutCreate(&raw mut layout, element(dtype), rows, cols, leading) };
            check("cublasLtMatrixLayoutCreate", code).map(|()| Handle(layout))
        };
        // SAFETY: valid pointers, and sizes of what they point to.
        unsafe {
            check("cublasLtMatmulDescCreate", lt::cublasLtMatmulDescCreate(&raw mut product, sums, scale))?;
            let attribute = lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
            let (value, size) = ((&raw const transposed).cast(), size_of_val(&transposed));
            let code = lt::cublasLtMatmulDescSetAttribute(product, attribute, value, size);
            check("cublasLtMatmulDescSetAttribute", code)?;
        }
        let (weight, x, out) =
            (layout(input, k, n, k)?, layout(input, k, rows, k)?, layout(output, n, rows, out_stride)?);
        let mut preference = std::ptr::null_mut();
        let mut found = 0;
        // SAFETY: as above; a heuristic's result is plain data, for which zeros are a value.
        let (code, best) = unsafe {
            check("cublasLtMatmulPreferenceCreate", lt::cublasLtMatmulPreferenceCreate(&raw mut preference))?;
            let set = |attribute, value: *const c_void, size| {
                let code = lt::cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, size);
                check("cublasLtMatmulPreferenceSetAttribute", code)
            };
            let workspace = WORKSPACE as u64;
            set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), 8)?;
            let [x_alignment, weight_alignment, out_alignment] = alignment;
            for (attribute, alignment) in [
                (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, weight_alignment),
                (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x_alignment),
                (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out_alignment),
                (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out_alignment),
            ] {
                set(attribute, (&raw const alignment).cast(), size_of_val(&alignment))?;
            }
            let mut best: lt::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
            let code = lt::cublasLtMatmulAlgoGetHeuristic(
                handle,
                product,
                weight.0,
                x.0,
                out.0,
                out.0,
                preference,
                1,
                &raw mut best,
                &raw mut found,
            );
            lt::cublasLtMatmulPreferenceDestroy(preference);
            (code, best)
        };
        check("cublasLtMatmulAlgoGetHeuristic", code)?;
        check("cublasLtMatmulAlgoGetHeuristic", if found == 0 { NOTHING } else { best.state })?;
        Ok(Self { product: Handle(product), weight, x, out, algorithm: best.algo })
    }
}

/// `CUBLAS_OP_T`, of an enum that cuBLASLt takes from cuBLAS.
const TRANSPOSED: i32 = 1;
/// No algorithm at all.
const NOTHING: cublasStatus_t = cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED;

fn element(dtype: DataType) -> lt::cudaDataType_t {
    match dtype {
        DataType::F32 => lt::cudaDataType_t::CUDA_R_32F,
        DataType::F16 => lt::cudaDataType_t::CUDA_R_16F,
        DataType::BF16 => lt::cudaDataType_t::CUDA_R_16BF,
    }
}

fn check(context: &Context, op: &'static str, code: cublasStatus_t) -> Result<()> {
    match code {
        cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        code => Err(DeviceError::Execution { device: context.name.clone(), op, reason: format!("{code:?}") }),
    }
}
