//! What one input does is in `inputs`, where the replay test finds it too.
#![no_main]

#[path = "../inputs/tokenizer.rs"]
mod input;
#[path = "../inputs/parts.rs"]
mod parts;

libfuzzer_sys::fuzz_target!(
    // A panic of the tokenizer library is caught by its caller; only one that comes out of there is a finding.
    init: drop(std::panic::take_hook()),
    |data: &[u8]| {
        input::run(data);
    }
);
