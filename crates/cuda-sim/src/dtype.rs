//! Types of elements that the libraries' functions take.

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F16,
    BF16,
}

impl DType {
    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// By `cudaDataType_t`.
    pub fn of_cuda(number: i32) -> Option<Self> {
        match number {
            0 => Some(Self::F32),
            2 => Some(Self::F16),
            14 => Some(Self::BF16),
            _ => None,
        }
    }

    /// By `ncclDataType_t`.
    pub fn of_nccl(number: i32) -> Option<Self> {
        match number {
            7 => Some(Self::F32),
            6 => Some(Self::F16),
            9 => Some(Self::BF16),
            _ => None,
        }
    }
}
