//! Numbers of the ABI, and their list for the test that compares them with the simulator's, which were written apart.

/// Defines constants of a type, and their list by the names of the C side.
macro_rules! constants {
    ($($(#[$group_meta:meta])* $group:ident { $($(#[$meta:meta])* $name:ident = $c_name:literal, $value:expr;)* })*) => {
        $(
            $(#[$group_meta])*
            pub(crate) mod $group {
                $($(#[$meta])* pub(crate) const $name: i32 = $value;)*
            }
        )*

        /// Every constant by its name on the C side.
        pub fn constants() -> Vec<(&'static str, i64)> {
            vec![$($(($c_name, i64::from($group::$name)),)*)*]
        }
    };
}

constants! {
    data_type {
        FLOAT = "ACL_FLOAT", 0;
        FLOAT16 = "ACL_FLOAT16", 1;
        INT8 = "ACL_INT8", 2;
        INT32 = "ACL_INT32", 3;
        UINT8 = "ACL_UINT8", 4;
        INT64 = "ACL_INT64", 9;
        BOOL = "ACL_BOOL", 12;
        BF16 = "ACL_BF16", 27;
        INT4 = "ACL_INT4", 29;
    }
    format {
        ND = "ACL_FORMAT_ND", 2;
        FRACTAL_NZ = "ACL_FORMAT_FRACTAL_NZ", 29;
    }
    memcpy_kind {
        HOST_TO_DEVICE = "ACL_MEMCPY_HOST_TO_DEVICE", 1;
        DEVICE_TO_HOST = "ACL_MEMCPY_DEVICE_TO_HOST", 2;
        DEVICE_TO_DEVICE = "ACL_MEMCPY_DEVICE_TO_DEVICE", 3;
    }
    malloc_policy {
        HUGE_FIRST = "ACL_MEM_MALLOC_HUGE_FIRST", 0;
    }
    mem_attr {
        HBM = "ACL_HBM_MEM", 1;
    }
    stream_flag {
        FAST_LAUNCH = "ACL_STREAM_FAST_LAUNCH", 1;
        FAST_SYNC = "ACL_STREAM_FAST_SYNC", 2;
    }
    capture_mode {
        THREAD_LOCAL = "ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL", 1;
    }
    cann_attr {
        INF_NAN = "ACL_CANN_ATTR_INF_NAN", 0;
        BF16 = "ACL_CANN_ATTR_BF16", 1;
    }
    /// Arithmetic of matrix products (`cubeMathType`).
    cube_math {
        KEEP_DTYPE = "KEEP_DTYPE", 0;
        ALLOW_FP32_DOWN_PRECISION = "ALLOW_FP32_DOWN_PRECISION", 1;
    }
    /// Of collectives: other numbers than `data_type`.
    hccl_type {
        FP16 = "HCCL_DATA_TYPE_FP16", 3;
        FP32 = "HCCL_DATA_TYPE_FP32", 4;
        BFP16 = "HCCL_DATA_TYPE_BFP16", 11;
    }
    hccl_reduce {
        SUM = "HCCL_REDUCE_SUM", 0;
    }
}
