//! A simulator of Huawei's Ascend runtime.
//!
//! The library exports the C ABI of the runtime (`acl*`, `aclrt*`), of operators' operands (`aclCreateTensor`, ...), of the operators
//! (`aclnn*`) and of the collectives (`Hccl*`), and computes on the host. It knows nothing about those who call it, and is strict:
//! what a real device leaves undefined is recorded as a violation, nothing runs before somebody waits for it, and a device
//! address cannot be touched by the host. It proves that a caller keeps the rules; it says nothing about speed, about the rounding
//! of real kernels, or about limits that no public document states. Left out: virtual memory, host callbacks, collectives inside of
//! captured graphs.
//!
//! # Control
//!
//! `ascend_sim_control("key=value")` and, read once at the first call of anything, the variable `ASCEND_SIM_KEY`:
//!
//! | Key | Value | At first |
//! |---|---|---|
//! | `soc` | the chip, as `aclrtGetSocName` gives it: `Ascend910B3` (A2), `Ascend910_9391` (A3), `Ascend310P3` (310P) | `Ascend910B3` |
//! | `version` | of the toolkit | `8.5.0` |
//! | `devices` | how many; 0 is a machine without a driver | 1 |
//! | `memory` | bytes of each device | 2 GiB |
//! | `stub` | `on`: `aclInit` says that this is a library for linking only | `off` |
//! | `perturb` | `on`: sums in an order that depends on the size of the batch | `off` |
//! | `slow` | milliseconds that each queued copy takes | 0 |
//! | `hang` | `on`: no task comes to an end, until `off` | `off` |
//! | `lost` | a code that every call returns from now on (507010, 507899); 0: the device is back | 0 |
//! | `collective_timeout` | milliseconds that a rank waits for the others | 60000 |
//! | `refuse` | `OPERATOR:CODE`: phase 1 of the operator returns the code; code 0 ends it | |
//! | `fault` | `SYMBOL:N:CODE`: the n-th call from now returns the code. `SYMBOL:N:run`: it succeeds, and its task fails with 507015 when it runs (operators). `SYMBOL:N:hang`: as `hang=on` from that call on. Several with commas; empty forgets them | |
//! | `nan` | `OPERATOR:N`: the first value that the n-th call from now writes is not a number | |
//! | `report` | a file, replaced with the report whenever a device is reset (before its memory goes) and at `aclFinalize` | |
//! | `control` | a file of lines `key=value`; all are applied when it changes, looked at whenever somebody synchronises or waits | |
//!
//! `ascend_sim_report` gives counters, what is live, and violations, as JSON; `ascend_sim_reset` forgets counters and violations.

mod array;
mod collective;
mod constants;
mod control;
mod dtype;
mod event;
mod graph;
mod limits;
mod machine;
mod math;
mod memory;
mod meta;
mod op;
mod ops;
mod report;
mod rt;
mod runtime;
mod stream;
mod table;

pub use constants::constants;

#[cfg(test)]
mod tests;
