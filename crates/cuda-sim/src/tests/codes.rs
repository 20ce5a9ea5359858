//! The numbers of the C ABIs, beside bindings that were generated from the headers.

use cudarc::{
    cublaslt::sys::{
        cublasComputeType_t as compute, cublasLtEpilogue_t as epilogue, cublasLtMatmulDescAttributes_t as lt_desc,
        cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreferenceAttributes_t as lt_preference,
        cublasLtMatrixLayoutAttribute_t as lt_layout, cublasStatus_t as status, cudaDataType_t as cuda_type,
    },
    driver::sys::{
        CUdevice_attribute_enum as device, CUfunction_attribute_enum as function_attribute,
        CUstreamCaptureMode_enum as mode, CUstreamCaptureStatus_enum as capture, cudaError_enum as error,
    },
    nccl::sys::{ncclDataType_t as nccl_type, ncclRedOp_t as operation, ncclResult_t as nccl_result, ncclUniqueId},
    nvrtc::sys::nvrtcResult as compiled,
};

use super::harness::*;
use crate::{blas, dtype::DType};

/// `same!(ENUM: OURS = THEIRS, ...)`.
macro_rules! same {
    ($theirs:ident: $($our:expr => $name:ident),* $(,)?) => {
        $(assert_eq!($our as i64, $theirs::$name as i64, stringify!($name));)*
    };
}

#[test]
fn numbers_are_those_of_the_headers() {
    same!(error:
        cuda::INVALID_VALUE => CUDA_ERROR_INVALID_VALUE, cuda::OUT_OF_MEMORY => CUDA_ERROR_OUT_OF_MEMORY,
        cuda::NOT_INITIALIZED => CUDA_ERROR_NOT_INITIALIZED, cuda::DEVICE_UNAVAILABLE => CUDA_ERROR_DEVICE_UNAVAILABLE,
        cuda::NO_DEVICE => CUDA_ERROR_NO_DEVICE, cuda::INVALID_DEVICE => CUDA_ERROR_INVALID_DEVICE,
        cuda::INVALID_IMAGE => CUDA_ERROR_INVALID_IMAGE, cuda::INVALID_CONTEXT => CUDA_ERROR_INVALID_CONTEXT,
        cuda::NO_BINARY_FOR_GPU => CUDA_ERROR_NO_BINARY_FOR_GPU, cuda::ECC_UNCORRECTABLE => CUDA_ERROR_ECC_UNCORRECTABLE,
        cuda::INVALID_HANDLE => CUDA_ERROR_INVALID_HANDLE, cuda::NOT_FOUND => CUDA_ERROR_NOT_FOUND,
        cuda::NOT_READY => CUDA_ERROR_NOT_READY, cuda::ILLEGAL_ADDRESS => CUDA_ERROR_ILLEGAL_ADDRESS,
        cuda::CONTEXT_IS_DESTROYED => CUDA_ERROR_CONTEXT_IS_DESTROYED,
        cuda::MISALIGNED_ADDRESS => CUDA_ERROR_MISALIGNED_ADDRESS, cuda::LAUNCH_FAILED => CUDA_ERROR_LAUNCH_FAILED,
        cuda::NOT_SUPPORTED => CUDA_ERROR_NOT_SUPPORTED,
        cuda::STREAM_CAPTURE_UNSUPPORTED => CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
        cuda::STREAM_CAPTURE_INVALIDATED => CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
        cuda::STREAM_CAPTURE_UNMATCHED => CUDA_ERROR_STREAM_CAPTURE_UNMATCHED,
        cuda::STREAM_CAPTURE_ISOLATION => CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
        cuda::STREAM_CAPTURE_IMPLICIT => CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
        cuda::CAPTURED_EVENT => CUDA_ERROR_CAPTURED_EVENT,
        cuda::STREAM_CAPTURE_WRONG_THREAD => CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, cuda::UNKNOWN => CUDA_ERROR_UNKNOWN,
    );
    same!(device:
        attribute::MAX_THREADS_PER_BLOCK => CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
        attribute::MAX_BLOCK_DIM_X => CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X,
        attribute::MAX_BLOCK_DIM_Y => CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y,
        attribute::MAX_BLOCK_DIM_Z => CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z,
        attribute::MAX_GRID_DIM_X => CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X,
        attribute::MAX_GRID_DIM_Y => CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y,
        attribute::MAX_GRID_DIM_Z => CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z,
        attribute::MAX_SHARED_MEMORY_PER_BLOCK => CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK,
        attribute::WARP_SIZE => CU_DEVICE_ATTRIBUTE_WARP_SIZE, attribute::CLOCK_RATE => CU_DEVICE_ATTRIBUTE_CLOCK_RATE,
        attribute::MULTIPROCESSOR_COUNT => CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        attribute::INTEGRATED => CU_DEVICE_ATTRIBUTE_INTEGRATED, attribute::COMPUTE_MODE => CU_DEVICE_ATTRIBUTE_COMPUTE_MODE,
        attribute::ECC_ENABLED => CU_DEVICE_ATTRIBUTE_ECC_ENABLED,
        attribute::MEMORY_CLOCK_RATE => CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE,
        attribute::GLOBAL_MEMORY_BUS_WIDTH => CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH,
        attribute::L2_CACHE_SIZE => CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE,
        attribute::MAX_THREADS_PER_MULTIPROCESSOR => CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR,
        attribute::UNIFIED_ADDRESSING => CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING,
        attribute::COMPUTE_CAPABILITY_MAJOR => CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        attribute::COMPUTE_CAPABILITY_MINOR => CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        attribute::MAX_SHARED_MEMORY_PER_MULTIPROCESSOR => CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
        attribute::MAX_REGISTERS_PER_MULTIPROCESSOR => CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR,
        attribute::MAX_SHARED_MEMORY_PER_BLOCK_OPTIN => CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        attribute::MAX_BLOCKS_PER_MULTIPROCESSOR => CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR,
        attribute::RESERVED_SHARED_MEMORY_PER_BLOCK => CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK,
    );
    same!(function_attribute:
        function::MAX_THREADS_PER_BLOCK => CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
        function::SHARED_SIZE_BYTES => CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
        function::CONST_SIZE_BYTES => CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES,
        function::LOCAL_SIZE_BYTES => CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function::NUM_REGS => CU_FUNC_ATTRIBUTE_NUM_REGS,
        function::PTX_VERSION => CU_FUNC_ATTRIBUTE_PTX_VERSION, function::BINARY_VERSION => CU_FUNC_ATTRIBUTE_BINARY_VERSION,
        function::CACHE_MODE_CA => CU_FUNC_ATTRIBUTE_CACHE_MODE_CA,
        function::MAX_DYNAMIC_SHARED_SIZE_BYTES => CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        function::PREFERRED_SHARED_MEMORY_CARVEOUT => CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
    );
    same!(mode: flag::CAPTURE_GLOBAL => CU_STREAM_CAPTURE_MODE_GLOBAL,
        flag::CAPTURE_THREAD_LOCAL => CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        flag::CAPTURE_RELAXED => CU_STREAM_CAPTURE_MODE_RELAXED);
    same!(capture: flag::CAPTURE_NONE => CU_STREAM_CAPTURE_STATUS_NONE, flag::CAPTURE_ACTIVE => CU_STREAM_CAPTURE_STATUS_ACTIVE,
        flag::CAPTURE_INVALIDATED => CU_STREAM_CAPTURE_STATUS_INVALIDATED);
    same!(compiled: nvrtc::INVALID_INPUT => NVRTC_ERROR_INVALID_INPUT, nvrtc::INVALID_PROGRAM => NVRTC_ERROR_INVALID_PROGRAM,
        nvrtc::INVALID_OPTION => NVRTC_ERROR_INVALID_OPTION, nvrtc::COMPILATION => NVRTC_ERROR_COMPILATION,
        nvrtc::NO_NAME_EXPRESSIONS_AFTER_COMPILATION => NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION,
        nvrtc::NO_LOWERED_NAMES_BEFORE_COMPILATION => NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION,
        nvrtc::NAME_EXPRESSION_NOT_VALID => NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID,
        nvrtc::INTERNAL_ERROR => NVRTC_ERROR_INTERNAL_ERROR);
}

#[test]
fn numbers_of_products_and_collectives_are_those_of_the_headers() {
    same!(status: blas::INVALID_VALUE => CUBLAS_STATUS_INVALID_VALUE, blas::NOT_SUPPORTED => CUBLAS_STATUS_NOT_SUPPORTED,
        blas::EXECUTION_FAILED => CUBLAS_STATUS_EXECUTION_FAILED);
    same!(lt_desc: desc::POINTER_MODE => CUBLASLT_MATMUL_DESC_POINTER_MODE, desc::TRANSA => CUBLASLT_MATMUL_DESC_TRANSA,
        desc::TRANSB => CUBLASLT_MATMUL_DESC_TRANSB, desc::EPILOGUE => CUBLASLT_MATMUL_DESC_EPILOGUE,
        desc::BIAS_POINTER => CUBLASLT_MATMUL_DESC_BIAS_POINTER,
        desc::BIAS_DATA_TYPE => CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
    same!(lt_layout: layout::ORDER => CUBLASLT_MATRIX_LAYOUT_ORDER,
        layout::BATCH_COUNT => CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
        layout::STRIDED_BATCH_OFFSET => CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);
    same!(lt_preference: preference::MAX_WORKSPACE_BYTES => CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
        preference::REDUCTION_SCHEME_MASK => CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        preference::MIN_ALIGNMENT_A_BYTES => CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        preference::MIN_ALIGNMENT_D_BYTES => CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
    same!(epilogue: EPILOGUE_DEFAULT => CUBLASLT_EPILOGUE_DEFAULT, EPILOGUE_BIAS => CUBLASLT_EPILOGUE_BIAS);
    same!(compute: COMPUTE_32F[0] => CUBLAS_COMPUTE_32F, COMPUTE_32F[1] => CUBLAS_COMPUTE_32F_PEDANTIC,
        COMPUTE_32F[2] => CUBLAS_COMPUTE_32F_FAST_16F, COMPUTE_32F[3] => CUBLAS_COMPUTE_32F_FAST_16BF,
        COMPUTE_32F[4] => CUBLAS_COMPUTE_32F_FAST_TF32);
    let of = [
        (cuda_type::CUDA_R_32F, DType::F32),
        (cuda_type::CUDA_R_16F, DType::F16),
        (cuda_type::CUDA_R_16BF, DType::BF16),
    ];
    of.iter().for_each(|&(number, dtype)| assert_eq!(DType::of_cuda(number as i32), Some(dtype)));
    let of = [
        (nccl_type::ncclFloat32, DType::F32),
        (nccl_type::ncclFloat16, DType::F16),
        (nccl_type::ncclBfloat16, DType::BF16),
    ];
    of.iter().for_each(|&(number, dtype)| assert_eq!(DType::of_nccl(number as i32), Some(dtype)));
    same!(operation: SUM => ncclSum);
    same!(nccl_result: UNHANDLED_CUDA_ERROR => ncclUnhandledCudaError, INVALID_ARGUMENT => ncclInvalidArgument,
        INVALID_USAGE => ncclInvalidUsage, REMOTE_ERROR => ncclRemoteError);
    assert_eq!(size_of::<Heuristic>(), size_of::<cublasLtMatmulHeuristicResult_t>());
    assert_eq!(size_of::<UniqueId>(), size_of::<ncclUniqueId>());
}
