//! What one input does is in `inputs`, where the replay test finds it too.
#![no_main]

#[path = "../inputs/grammar.rs"]
mod input;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    input::run(data);
});
