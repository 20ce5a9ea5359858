//! cuBLASLt: handles, descriptors, and the product.

use std::{
    ffi::{CStr, c_char, c_void},
    sync::Arc,
};

use crate::{
    blas::*,
    dtype::DType,
    machine::{Fail, Machine, current, fail, lock, put},
    stream::Task,
};

/// Attributes of a product's descriptor.
pub mod desc {
    pub const POINTER_MODE: i32 = 2;
    pub const TRANSA: i32 = 3;
    pub const TRANSB: i32 = 4;
    pub const EPILOGUE: i32 = 7;
    pub const BIAS_POINTER: i32 = 8;
    pub const BIAS_DATA_TYPE: i32 = 26;
}

/// Attributes of a matrix layout.
pub mod layout {
    pub const ORDER: i32 = 1;
    pub const BATCH_COUNT: i32 = 5;
    pub const STRIDED_BATCH_OFFSET: i32 = 6;
}

/// Attributes of a preference.
pub mod preference {
    pub const MAX_WORKSPACE_BYTES: i32 = 1;
    pub const REDUCTION_SCHEME_MASK: i32 = 3;
    pub const MIN_ALIGNMENT_A_BYTES: i32 = 5;
    pub const MIN_ALIGNMENT_D_BYTES: i32 = 8;
}

pub const EPILOGUE_DEFAULT: i32 = 1;
pub const EPILOGUE_BIAS: i32 = 4;
/// Computing in f32, with or without short cuts of the tensor cores.
pub const COMPUTE_32F: [i32; 5] = [68, 69, 74, 75, 77];

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
pub struct Heuristic {
    pub algorithm: Algorithm,
    pub workspace: usize,
    pub state: i32,
    pub waves: f32,
    pub reserved: [i32; 4],
}

/// A call that needs no device. Failures of handles are this library's invalid value.
fn blas(symbol: &'static str, body: impl FnOnce(&mut Machine) -> Result<(), Fail>) -> i32 {
    let mut m = lock();
    let result = match m.enter(symbol) {
        Ok(_) => body(&mut m).map_err(|failure| match failure.code {
            NOT_SUPPORTED | EXECUTION_FAILED => failure,
            _ => Fail { code: INVALID_VALUE, ..failure },
        }),
        Err(failure) => Err(Fail { code: EXECUTION_FAILED, ..failure }),
    };
    m.answer(symbol, result)
}

/// An attribute's value, of which the size must be right.
fn value<T: Copy>(from: *const c_void, bytes: usize) -> Result<T, Fail> {
    if from.is_null() || bytes != size_of::<T>() {
        return Err(fail!(INVALID_VALUE, "an attribute of {} bytes, not {bytes}", size_of::<T>()));
    }
    // SAFETY: the caller says that so many bytes are there.
    Ok(unsafe { from.cast::<T>().read_unaligned() })
}

fn dtype(number: i32) -> Result<DType, Fail> {
    DType::of_cuda(number).ok_or_else(|| fail!(NOT_SUPPORTED, "elements of type {number} are not simulated"))
}

fn unknown<T>(attribute: i32) -> Result<T, Fail> {
    Err(fail!(NOT_SUPPORTED, "the attribute {attribute} is not simulated"))
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetVersion() -> usize {
    130_000
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetStatusName(status: i32) -> *const c_char {
    status_name(status).as_ptr()
}

fn status_name(status: i32) -> &'static CStr {
    match status {
        0 => c"CUBLAS_STATUS_SUCCESS",
        INVALID_VALUE => c"CUBLAS_STATUS_INVALID_VALUE",
        EXECUTION_FAILED => c"CUBLAS_STATUS_EXECUTION_FAILED",
        NOT_SUPPORTED => c"CUBLAS_STATUS_NOT_SUPPORTED",
        _ => c"CUBLAS_STATUS unknown",
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtCreate(handle: *mut u64) -> i32 {
    blas("cublasLtCreate", |m| {
        m.contexts.get(current())?;
        put(handle, m.blas.handles.insert(()))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtDestroy(handle: u64) -> i32 {
    blas("cublasLtDestroy", |m| m.blas.handles.remove(handle))
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulDescCreate(handle: *mut u64, compute: i32, scale: i32) -> i32 {
    blas("cublasLtMatmulDescCreate", |m| {
        if !COMPUTE_32F.contains(&compute) || dtype(scale)? != DType::F32 {
            return Err(fail!(NOT_SUPPORTED, "computing as {compute} with factors of type {scale}"));
        }
        let desc = Desc { trans_a: false, trans_b: false, bias: false, bias_at: 0, bias_dtype: None };
        put(handle, m.blas.descs.insert(desc))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulDescDestroy(handle: u64) -> i32 {
    blas("cublasLtMatmulDescDestroy", |m| m.blas.descs.remove(handle).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulDescSetAttribute(
    handle: u64,
    attribute: i32,
    from: *const c_void,
    bytes: usize,
) -> i32 {
    blas("cublasLtMatmulDescSetAttribute", |m| {
        let desc = m.blas.descs.get_mut(handle)?;
        let turned = |operation: i32| match operation {
            0 => Ok(false),
            1 | 2 => Ok(true),
            _ => Err(fail!(INVALID_VALUE, "operation {operation}")),
        };
        match attribute {
            desc::TRANSA => desc.trans_a = turned(value(from, bytes)?)?,
            desc::TRANSB => desc.trans_b = turned(value(from, bytes)?)?,
            desc::EPILOGUE => match value(from, bytes)? {
                EPILOGUE_DEFAULT => desc.bias = false,
                EPILOGUE_BIAS => desc.bias = true,
                epilogue => return Err(fail!(NOT_SUPPORTED, "the epilogue {epilogue} is not simulated")),
            },
            desc::BIAS_POINTER => desc.bias_at = value(from, bytes)?,
            desc::BIAS_DATA_TYPE => desc.bias_dtype = Some(dtype(value(from, bytes)?)?),
            desc::POINTER_MODE if value::<i32>(from, bytes)? == 0 => {}
            _ => return unknown(attribute),
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatrixLayoutCreate(handle: *mut u64, kind: i32, rows: u64, cols: u64, ld: i64) -> i32 {
    blas("cublasLtMatrixLayoutCreate", |m| {
        let layout = Layout { dtype: dtype(kind)?, rows, cols, ld, batch: 1, stride: 0 };
        put(handle, m.blas.layouts.insert(layout))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatrixLayoutDestroy(handle: u64) -> i32 {
    blas("cublasLtMatrixLayoutDestroy", |m| m.blas.layouts.remove(handle).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatrixLayoutSetAttribute(
    handle: u64,
    attribute: i32,
    from: *const c_void,
    bytes: usize,
) -> i32 {
    blas("cublasLtMatrixLayoutSetAttribute", |m| {
        let layout = m.blas.layouts.get_mut(handle)?;
        match attribute {
            layout::BATCH_COUNT => layout.batch = value(from, bytes)?,
            layout::STRIDED_BATCH_OFFSET => layout.stride = value(from, bytes)?,
            layout::ORDER if value::<i32>(from, bytes)? == 0 => {}
            _ => return unknown(attribute),
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulPreferenceCreate(handle: *mut u64) -> i32 {
    blas("cublasLtMatmulPreferenceCreate", |m| {
        put(handle, m.blas.preferences.insert(Preference { workspace: 0, alignment: [256; 4] }))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulPreferenceDestroy(handle: u64) -> i32 {
    blas("cublasLtMatmulPreferenceDestroy", |m| m.blas.preferences.remove(handle).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    handle: u64,
    attribute: i32,
    from: *const c_void,
    bytes: usize,
) -> i32 {
    blas("cublasLtMatmulPreferenceSetAttribute", |m| {
        let preference = m.blas.preferences.get_mut(handle)?;
        match attribute {
            preference::MAX_WORKSPACE_BYTES => preference.workspace = value(from, bytes)?,
            // Products are summed in one way, whatever is allowed.
            preference::REDUCTION_SCHEME_MASK => drop(value::<u32>(from, bytes)?),
            preference::MIN_ALIGNMENT_A_BYTES..=preference::MIN_ALIGNMENT_D_BYTES => {
                let matrix = (attribute - preference::MIN_ALIGNMENT_A_BYTES) as usize;
                preference.alignment[matrix] = value(from, bytes)?;
            }
            _ => return unknown(attribute),
        }
        Ok(())
    })
}

impl Machine {
    fn problem(&self, handle: u64, desc: u64, layouts: [u64; 4]) -> Result<Problem, Fail> {
        self.blas.handles.get(handle)?;
        let [a, b, c, d] = layouts.map(|layout| self.blas.layouts.get(layout).copied());
        Ok(Problem { desc: *self.blas.descs.get(desc)?, a: a?, b: b?, c: c?, d: d? })
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    handle: u64,
    desc: u64,
    a: u64,
    b: u64,
    c: u64,
    d: u64,
    preference: u64,
    requested: i32,
    results: *mut Heuristic,
    count: *mut i32,
) -> i32 {
    blas("cublasLtMatmulAlgoGetHeuristic", |m| {
        put(count, 0)?;
        let problem = m.problem(handle, desc, [a, b, c, d])?;
        let algorithm = problem.algorithm(m.blas.preferences.get(preference)?)?;
        if requested < 1 {
            return Err(fail!(INVALID_VALUE, "{requested} algorithms are requested"));
        }
        let workspace = algorithm.workspace as usize;
        put(results, Heuristic { algorithm, workspace, state: 0, waves: 1.0, reserved: [0; 4] })?;
        put(count, 1)
    })
}

/// # Safety
/// The factors are f32 of the host; the algorithm, if there is one, is a heuristic's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmul(
    handle: u64,
    desc: u64,
    alpha: *const f32,
    a: u64,
    a_layout: u64,
    b: u64,
    b_layout: u64,
    beta: *const f32,
    c: u64,
    c_layout: u64,
    d: u64,
    d_layout: u64,
    algorithm: *const Algorithm,
    workspace: u64,
    workspace_bytes: usize,
    stream: u64,
) -> i32 {
    blas("cublasLtMatmul", |m| {
        let problem = m.problem(handle, desc, [a_layout, b_layout, c_layout, d_layout])?;
        // SAFETY: as the caller promises.
        let (alpha, beta, algorithm) = unsafe {
            let algorithm = match algorithm.is_null() {
                true => problem.algorithm(&Preference { workspace: 0, alignment: [1; 4] })?,
                false => algorithm.read_unaligned(),
            };
            (alpha.read_unaligned(), beta.read_unaligned(), algorithm)
        };
        problem.accepts(&algorithm, [a, b, c, d], workspace_bytes as u64)?;
        let workspace = (workspace, algorithm.workspace);
        let product = Product { problem, alpha, beta, a, b, c, d, workspace };
        for (address, bytes) in product.ranges() {
            m.device_side(address, bytes)?;
        }
        let context = current();
        let stream = m.target(context, stream)?;
        let submitted = m.submit(stream, Task::Product(Arc::new(product)));
        submitted.map(drop).map_err(|failure| Fail { code: EXECUTION_FAILED, ..failure })
    })
}
