//! The exported functions, called as a C program calls them.

mod harness;
mod two_phase;
