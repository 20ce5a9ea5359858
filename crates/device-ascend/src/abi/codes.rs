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

impl Class {
    /// Whether what fails so fails for ever.
    pub fn is_final(self) -> bool {
        matches!(self, Class::Poisoned | Class::Lost)
    }
}

/// The symbolic name of a code, without `ACL_ERROR_`, and its class. An unknown code of the aclnn range is a failed call; any other unknown code
/// counts as poison, since nothing is known of what it leaves behind.
pub fn describe(code: i32) -> (&'static str, Class) {
    use Class::{Bug, Failed, Lost, Memory, Poisoned, Setup, Unsupported};
    match code {
        100000 => ("INVALID_PARAM", Bug),
        100001 => ("UNINITIALIZE", Bug),
        100002 => ("REPEAT_INITIALIZE", Bug),
        100024 => ("OP_NOT_FOUND", Unsupported),
        100026 => ("UNSUPPORTED_DATA_TYPE", Unsupported),
        100037 => ("REPEAT_FINALIZE", Bug),
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
        107024 => ("RT_CAPTURE_DEPENDENCY", Failed),
        107025 => ("RT_STREAM_UNJOINED", Failed),
        107026 => ("RT_MODEL_CAPTURED", Failed),
        107027 => ("RT_STREAM_CAPTURED", Failed),
        107028 => ("RT_EVENT_CAPTURED", Failed),
        107029 => ("RT_STREAM_NOT_CAPTURED", Failed),
        107030 => ("RT_CAPTURE_MODE_NOT_SUPPORT", Failed),
        107031 => ("RT_STREAM_CAPTURE_IMPLICIT", Failed),
        // Names of these three: UNCONFIRMED.
        107036 => ("RT_CAPTURE_UNMATCHED", Failed),
        107037 => ("RT_MODEL_RUNNING", Failed),
        107038 => ("RT_CAPTURE_WRONG_THREAD", Failed),
        200000 => ("BAD_ALLOC", Memory),
        200001 => ("API_NOT_SUPPORT", Unsupported),
        200003 => ("MEMORY_ADDRESS_UNALIGNED", Bug),
        200006 => ("FEATURE_UNSUPPORTED", Unsupported),
        207000 => ("RT_FEATURE_NOT_SUPPORT", Unsupported),
        207001 => ("RT_MEMORY_ALLOCATION", Memory),
        207002 => ("RT_MEMORY_FREE", Bug),
        207003 => ("RT_AICORE_OVER_FLOW", Failed),
        207004 => ("RT_NO_DEVICE", Setup),
        207005 => ("RT_RESOURCE_ALLOC_FAIL", Memory),
        207006 => ("RT_NO_PERMISSION", Setup),
        207008 => ("RT_NO_STREAM_RESOURCE", Memory),
        207018 => ("RT_DEVICE_OOM", Memory),
        500000 => ("INTERNAL_ERROR", Poisoned),
        500001 => ("FAILURE", Poisoned),
        500003 => ("RT_FAILURE", Poisoned),
        500004 => ("DRV_FAILURE", Poisoned),
        507000 => ("RT_INTERNAL_ERROR", Poisoned),
        507009 => ("RT_TASK_TYPE_NOT_SUPPORT", Poisoned),
        507010 => ("RT_LOST_HEARTBEAT", Lost),
        507011 => ("RT_MODEL_EXECUTE", Poisoned),
        507014 => ("RT_AICORE_TIMEOUT", Poisoned),
        507015 => ("RT_AICORE_EXCEPTION", Poisoned),
        507034 => ("RT_VECTOR_CORE_TIMEOUT", Poisoned),
        507035 => ("RT_VECTOR_CORE_EXCEPTION", Poisoned),
        507046 => ("RT_STREAM_SYNC_TIMEOUT", Lost),
        507053 => ("RT_DEVICE_MEM_ERROR", Lost),
        507054 => ("RT_HBM_MULTI_BIT_ECC_ERROR", Lost),
        507903 => ("RT_STREAM_CAPTURE_INVALIDATED", Failed),
        507899 => ("RT_DRV_INTERNAL_ERROR", Lost),
        161001 => ("ACLNN_ERR_PARAM_NULLPTR", Bug),
        161002 => ("ACLNN_ERR_PARAM_INVALID", Unsupported),
        361001 => ("ACLNN_ERR_RUNTIME_ERROR", Poisoned),
        561001 => ("ACLNN_ERR_INNER_INFERSHAPE_ERROR", Unsupported),
        561002 => ("ACLNN_ERR_INNER_TILING_ERROR", Unsupported),
        561003 => ("ACLNN_ERR_INNER_FIND_KERNEL_ERROR", Setup),
        561101 => ("ACLNN_ERR_INNER_CREATE_EXECUTOR", Memory),
        561102 => ("ACLNN_ERR_INNER_NOT_TRANS_EXECUTOR", Bug),
        561103 => ("ACLNN_ERR_INNER_NULLPTR", Bug),
        561107 => ("ACLNN_ERR_INNER_OPP_PATH_NOT_FOUND", Setup),
        561112 => ("ACLNN_ERR_INNER_OPP_KERNEL_PKG_NOT_FOUND", Setup),
        561000..562000 => ("ACLNN_ERR_INNER", Failed),
        _ => ("unknown", Poisoned),
    }
}

/// The same for results of collectives (the names are UNCONFIRMED). Ranks that wait for one whose call was refused learn of it
/// by their timeout.
pub fn describe_collective(code: i32) -> (&'static str, Class) {
    use Class::{Bug, Lost, Memory, Poisoned, Unsupported};
    match code {
        1 => ("HCCL_E_PARA", Bug),
        2 => ("HCCL_E_PTR", Bug),
        3 => ("HCCL_E_MEMORY", Memory),
        4 => ("HCCL_E_INTERNAL", Poisoned),
        5 => ("HCCL_E_NOT_SUPPORT", Unsupported),
        9 => ("HCCL_E_TIMEOUT", Lost),
        15 => ("HCCL_E_RUNTIME", Poisoned),
        24 => ("HCCL_E_OOM", Memory),
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
