//! A simulator of Huawei's Ascend runtime.
//!
//! The library exports the C ABI of the runtime (`acl*`, `aclrt*`), of operators' operands (`aclCreateTensor`, ...), of the operators
//! (`aclnn*`) and of the collectives (`Hccl*`), and computes on the host. It knows nothing about those who call it, and is strict:
//! what a real device leaves undefined is recorded as a violation, nothing runs before somebody waits for it, and a device
//! address cannot be touched by the host. It proves that a caller keeps the rules; it says nothing about speed, about the rounding
//! of real kernels, or about limits that no public document states.

mod array;
mod constants;
mod control;
mod dtype;
mod machine;
mod memory;
mod meta;
mod op;
mod ops;
mod rt;
mod runtime;
mod stream;
mod table;

pub use constants::constants;

#[cfg(test)]
mod tests;
