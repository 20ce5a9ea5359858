//! Rules of the simulator, each with a test, through the exported functions.

mod codes;
mod collectives;
mod faults;
mod graphs;
mod harness;
mod kernels;
mod memory;
mod products;
mod programs;
