//! What one input does is in `inputs`, where the replay test finds it too.
#![no_main]

#[path = "../inputs/upload.rs"]
mod input;
#[path = "../inputs/service.rs"]
mod service;

libfuzzer_sys::fuzz_target!(
    // A panic of a handler is caught, and shows as a reply; whatever panics elsewhere is a finding at once.
    |data: &[u8]| {
        input::run(data);
    }
);
