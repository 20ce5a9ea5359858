//! Steps as they are recorded: all of them while somebody asks, none otherwise.

use baton_engine::sim::{MockControl, MockModel, MockRunner};
use baton_engine::{EngineConfig, EngineHandle, Request, RunSpec, SamplingParams, spawn};

const PROMPT: usize = 40;

fn start() -> (EngineHandle, MockControl) {
    let spec = RunSpec {
        vocab_size: 500,
        max_model_len: 400,
        block_size: 8,
        num_blocks: 100,
        passing: None,
        max_step_tokens: 16,
        max_step_sequences: 4,
        max_draft_tokens: 0,
        steps_ahead: false,
    };
    let runner = MockRunner::new(spec, MockModel::Hash { seed: 3, vocab_size: 500, end: None });
    let control = runner.control();
    (spawn(Box::new(runner), EngineConfig::default()).0, control)
}

fn run(handle: &EngineHandle, max_tokens: u32) {
    let prompt = (1..=PROMPT as u32).collect();
    let mut stream = handle.submit(Request::new(prompt, SamplingParams::greedy(), max_tokens)).unwrap();
    while stream.blocking_next().is_some() {}
}

#[test]
fn every_step_of_a_recording_is_there_with_its_tokens_and_times_in_order() {
    let (handle, _) = start();
    let recording = handle.record_steps(1000).unwrap();
    run(&handle, 10);
    let recorded = recording.finish();
    // A prompt of 40 in steps of 16, the last of which gives the first token.
    let tokens: Vec<_> = recorded.steps.iter().map(|step| (step.tokens, step.generated)).collect();
    let expected: Vec<_> = [(16, 0), (16, 0), (8, 1)].into_iter().chain([(1, 1); 9]).collect();
    assert_eq!((tokens, recorded.lost), (expected, 0));
    assert!(recorded.steps.iter().all(|step| step.begin <= step.end && step.preemptions == 0 && !step.failed));
    assert!(recorded.steps.windows(2).all(|pair| pair[0].end <= pair[1].begin));
    let (first, last) = (recorded.steps[0], recorded.steps[11]);
    // All blocks of a prompt are taken with its first step.
    assert_eq!((first.running, first.waiting, first.used_blocks), (1, 0, 5));
    assert_eq!((last.running, last.waiting, last.used_blocks), (0, 0, 0));
}

#[test]
fn a_recording_keeps_its_newest_steps_and_counts_the_others() {
    let (handle, _) = start();
    let recording = handle.record_steps(4).unwrap();
    run(&handle, 10);
    let recorded = recording.finish();
    assert_eq!((recorded.steps.len(), recorded.lost), (4, 8));
    assert_eq!(recorded.steps[3].running, 0, "the last step of all");
}

#[test]
fn one_at_a_time_records_and_what_nobody_asks_for_is_not_kept() {
    let (handle, _) = start();
    let recording = handle.record_steps(100).unwrap();
    assert!(handle.record_steps(100).is_none());
    run(&handle, 2);
    drop(recording);
    run(&handle, 2);
    let recording = handle.record_steps(100).expect("the other has ended");
    assert_eq!(recording.finish().steps, []);
    assert!(handle.record_steps(100).is_some(), "so has this one");
}

#[test]
fn a_step_that_failed_is_told_from_others_and_what_was_before_a_recording_is_not_in_it() {
    let (handle, control) = start();
    run(&handle, 5);
    control.fail_steps(1);
    let recording = handle.record_steps(100).unwrap();
    run(&handle, 5);
    run(&handle, 1);
    let steps = recording.finish().steps;
    let told: Vec<_> = steps.iter().map(|step| (step.tokens, step.generated, step.failed)).collect();
    assert_eq!(told, [(0, 0, true), (16, 0, false), (16, 0, false), (8, 1, false)]);
}
