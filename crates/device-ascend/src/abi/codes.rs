//! What the numbers mean that calls return, and what follows from them.

/// What an error calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// We called wrongly.
    Bug,
    /// Not on this chip, or not in this shape, dtype or release.
    Unsupported,
    /// The machine or its environment is set up wrongly.
    Setup,
    /// Out of memory or of another resource; may go well later.
    Memory,
    /// The call failed; the device goes on.
    Failed,
    /// A kernel faulted: the context is worthless and must be made anew.
    Poisoned,
    /// The device is gone or does not answer.
    Lost,
}

/// The symbolic name of a code and its class. An unknown code of the aclnn range is a failed call; any other unknown code
/// counts as poison, since nothing is known of what it leaves behind.
pub fn describe(code: i32) -> (&'static str, Class) {
    use Class::{Bug, Failed, Lost, Memory, Poisoned, Setup, Unsupported};
    match code {
        100000 => ("INVALID_PARAM", Bug),
        100001 => ("UNINITIALIZE", Bug),
        100002 => ("REPEAT_INITIALIZE", Bug),
        100024 => ("OP_NOT_FOUND", Unsupported),
        100026 => ("UNSUPPORTED_DATA_TYPE", Unsupported),
        100039 => ("COMPILING_STUB_MODE", Setup),
        107000 => ("RT_PARAM_INVALID", Bug),
        107001 => ("RT_INVALID_DEVICEID", Setup),
        107002 => ("RT_CONTEXT_NULL", Bug),
        107003 => ("RT_STREAM_CONTEXT", Bug),
        107008 => ("RT_ADDR_UNALIGNED", Bug),
        107017 => ("RT_INVALID_HANDLE", Bug),
        107018 => ("RT_INVALID_MALLOC_TYPE", Bug),
        107019 => ("RT_WAIT_TIMEOUT", Lost),
        107020 => ("RT_TASK_TIMEOUT", Lost),
        107022 => ("RT_TASK_ABORT", Poisoned),
        107023 => ("RT_STREAM_ABORT", Poisoned),
        107024..=107031 | 107036..=107038 | 507903 => ("CAPTURE", Failed),
        200000 => ("BAD_ALLOC", Memory),
        200001 => ("API_NOT_SUPPORT", Unsupported),
        200003 => ("MEMORY_ADDRESS_UNALIGNED", Bug),
        200006 | 207000 => ("FEATURE_NOT_SUPPORT", Unsupported),
        207001 => ("RT_MEMORY_ALLOCATION", Memory),
        207002 => ("RT_MEMORY_FREE", Bug),
        207003 => ("AICORE_OVER_FLOW", Failed),
        207004 => ("NO_DEVICE", Setup),
        207005 => ("RESOURCE_ALLOC_FAIL", Memory),
        207006 => ("NO_PERMISSION", Setup),
        207008 => ("NO_STREAM_RESOURCE", Memory),
        207018 => ("DEVICE_OOM", Memory),
        500000 => ("INTERNAL_ERROR", Poisoned),
        500001 => ("FAILURE", Poisoned),
        500003 => ("RT_FAILURE", Poisoned),
        500004 => ("GE_FAILURE", Poisoned),
        507000 => ("RT_INTERNAL_ERROR", Poisoned),
        507009 => ("TASK_TYPE_NOT_SUPPORT", Poisoned),
        507010 => ("LOST_HEARTBEAT", Lost),
        507011 => ("MODEL_EXECUTE", Poisoned),
        507014 => ("AICORE_TIMEOUT", Poisoned),
        507015 => ("AICORE_EXCEPTION", Poisoned),
        507034 => ("VECTOR_CORE_TIMEOUT", Poisoned),
        507035 => ("VECTOR_CORE_EXCEPTION", Poisoned),
        507046 => ("STREAM_SYNC_TIMEOUT", Lost),
        507053 => ("DEVICE_MEM_ERROR", Lost),
        507054 => ("HBM_MULTI_BIT_ECC_ERROR", Lost),
        507899 => ("DRV_INTERNAL_ERROR", Lost),
        161001 => ("ACLNN_ERR_PARAM_NULLPTR", Bug),
        161002 => ("ACLNN_ERR_PARAM_INVALID", Unsupported),
        361001 => ("ACLNN_ERR_RUNTIME_ERROR", Poisoned),
        561001 => ("ACLNN_ERR_INNER_INFERSHAPE_ERROR", Unsupported),
        561002 => ("ACLNN_ERR_INNER_TILING_ERROR", Unsupported),
        561003 => ("ACLNN_ERR_INNER_FIND_KERNEL_ERROR", Setup),
        561101 => ("ACLNN_ERR_INNER_CREATE_EXECUTOR", Memory),
        561102 | 561103 => ("ACLNN_ERR_INNER_NULLPTR", Bug),
        561107 => ("ACLNN_ERR_INNER_OPP_PATH_NOT_FOUND", Setup),
        561112 => ("ACLNN_ERR_INNER_OPP_KERNEL_PKG_NOT_FOUND", Setup),
        561000..562000 => ("ACLNN_ERR_INNER", Failed),
        _ => ("unknown", Poisoned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_memory_a_fault_and_a_lost_device_call_for_differs() {
        for (code, class) in
            [(207001, Class::Memory), (507015, Class::Poisoned), (507046, Class::Lost), (561002, Class::Unsupported)]
        {
            assert_eq!(describe(code).1, class, "{code}");
        }
    }
}
