//! Products of many rows: cuBLASLt, whose choice of an algorithm is kept for every shape.
//!
//! cuBLASLt sees matrices by columns, so that ours are transposed: `outᵀ [n, rows] = (weightᵀ)ᵀ [n, k] · xᵀ [k, rows]`.
//! Invariant: an algorithm is chosen once for a shape, so that equal steps queue equal calls; its workspace is one
//! fixed buffer, which products use in the order of the stream.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use baton_device::{DeviceError, Result};
use cudarc::cublaslt::sys::{self as lt, cublasStatus_t};
use cudarc::driver::sys::{self, CUresult, CUstream};

use crate::context::{Context, Owned};
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
    handle: Arc<Owned<lt::cublasLtHandle_t>>,
    workspace: Owned<u64>,
    plans: Mutex<HashMap<Shape, Arc<Plan>>>,
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

/// How a shape is computed. Kept as long as [`Blas`], so that the address of its descriptor stands for it.
struct Plan {
    product: Owned<lt::cublasLtMatmulDesc_t>,
    weight: Owned<lt::cublasLtMatrixLayout_t>,
    x: Owned<lt::cublasLtMatrixLayout_t>,
    out: Owned<lt::cublasLtMatrixLayout_t>,
    algorithm: lt::cublasLtMatmulAlgo_t,
}

impl Blas {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        let (mut handle, mut workspace) = (std::ptr::null_mut(), 0);
        context.enter()?;
        // SAFETY: a valid out pointer.
        check(context, "cublasLtCreate", unsafe { lt::cublasLtCreate(&raw mut handle) })?;
        // SAFETY: made once.
        let handle = Owned::new(context, handle, |handle| _ = unsafe { lt::cublasLtDestroy(handle) });
        // SAFETY: a valid out pointer.
        match unsafe { sys::cuMemAlloc_v2(&raw mut workspace, WORKSPACE) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (device, what) = (context.name.clone(), "the workspace of products");
                return Err(DeviceError::OutOfMemory { device, bytes: WORKSPACE, what });
            }
            code => context.check("cuMemAlloc", code)?,
        }
        // SAFETY: allocated once, and no product runs.
        let workspace = Owned::new(context, workspace, |address| _ = unsafe { sys::cuMemFree_v2(address) });
        Ok(Self { handle: Arc::new(handle), workspace, plans: Mutex::default() })
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
        let (handle, workspace) = (self.handle.clone(), self.workspace.get());
        // The plan is the shape's own, so that its descriptor stands for both.
        let key = [plan.product.get() as u64, x, weight, out];
        gpu.call("matmul", &key, move |context, stream| {
            // SAFETY: descriptors as made for these matrices, which are the caller's until the stream has passed; the
            // algorithm was chosen for them and for the workspace.
            match unsafe { plan.run(handle.get(), [x, weight, out], workspace, stream) } {
                cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
                code => {
                    Err(context.foreign("matmul", format!("cublasLtMatmul gave {}: {product:?}", name(code)), stream))
                }
            }
        })
    }

    fn plan(&self, context: &Context, shape: Shape) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&shape) {
            return Ok(plan.clone());
        }
        context.enter()?;
        let plan = Arc::new(Plan::new(context, self.handle.get(), shape)?);
        plans.insert(shape, plan.clone());
        Ok(plan)
    }
}

impl Plan {
    /// Puts the product of `[x, weight, out]` on a stream.
    ///
    /// # Safety
    /// The addresses are those of matrices as planned, which live until the stream has passed.
    unsafe fn run(
        &self,
        handle: lt::cublasLtHandle_t,
        [x, weight, out]: [u64; 3],
        workspace: u64,
        stream: CUstream,
    ) -> cublasStatus_t {
        let (one, zero) = (1.0f32, 0.0f32);
        let address = |address: u64| address as *mut c_void;
        // SAFETY: as the caller says; the scalars are read now.
        unsafe {
            lt::cublasLtMatmul(
                handle,
                self.product.get(),
                (&raw const one).cast(),
                address(weight),
                self.weight.get(),
                address(x),
                self.x.get(),
                (&raw const zero).cast(),
                address(out),
                self.out.get(),
                address(out),
                self.out.get(),
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
            check("cublasLtMatrixLayoutCreate", code)?;
            // SAFETY: made once.
            Ok(Owned::on_host(layout, |layout| _ = unsafe { lt::cublasLtMatrixLayoutDestroy(layout) }))
        };
        // SAFETY: a valid out pointer.
        let code = unsafe { lt::cublasLtMatmulDescCreate(&raw mut product, sums, scale) };
        check("cublasLtMatmulDescCreate", code)?;
        // SAFETY: made once.
        let product = Owned::on_host(product, |product| _ = unsafe { lt::cublasLtMatmulDescDestroy(product) });
        let attribute = lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        let (value, size) = ((&raw const transposed).cast(), size_of_val(&transposed));
        // SAFETY: a live descriptor, a valid pointer and the size of what it points to.
        let code = unsafe { lt::cublasLtMatmulDescSetAttribute(product.get(), attribute, value, size) };
        check("cublasLtMatmulDescSetAttribute", code)?;
        let (weight, x, out) =
            (layout(input, k, n, k)?, layout(input, k, rows, k)?, layout(output, n, rows, out_stride)?);
        let mut preference = std::ptr::null_mut();
        let mut found = 0;
        // SAFETY: a valid out pointer.
        let code = unsafe { lt::cublasLtMatmulPreferenceCreate(&raw mut preference) };
        check("cublasLtMatmulPreferenceCreate", code)?;
        let give_back = |preference| {
            // SAFETY: made once.
            unsafe { lt::cublasLtMatmulPreferenceDestroy(preference) };
        };
        let preference = Owned::on_host(preference, give_back);
        // SAFETY: live objects, valid pointers and sizes of what they point to; a heuristic's result is plain data, for which zeros
        // are a value.
        let (code, best) = unsafe {
            let set = |attribute, value: *const c_void, size| {
                let code = lt::cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, value, size);
                check("cublasLtMatmulPreferenceSetAttribute", code)
            };
            let workspace = WORKSPACE as u64;
            set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), 8)?;
            // Where k is cut, parts are added up in f32: not rounded to the type of out, nor in whatever order they come.
            let reductions = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const reductions).cast(), size_of_val(&reductions))?;
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
                product.get(),
                weight.get(),
                x.get(),
                out.get(),
                out.get(),
                preference.get(),
                1,
                &raw mut best,
                &raw mut found,
            );
            (code, best)
        };
        check("cublasLtMatmulAlgoGetHeuristic", code)?;
        check("cublasLtMatmulAlgoGetHeuristic", if found == 0 { NOTHING } else { best.state })?;
        Ok(Self { product, weight, x, out, algorithm: best.algo })
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
        code => Err(DeviceError::Execution { device: context.name.clone(), op, reason: name(code) }),
    }
}

/// cuBLASLt's name of a code; a newer one has codes that the binding's type has no name for.
fn name(code: cublasStatus_t) -> String {
    // SAFETY: any code; the library's text lives for ever.
    unsafe { CStr::from_ptr(lt::cublasLtGetStatusName(code)) }.to_string_lossy().into_owned()
}
