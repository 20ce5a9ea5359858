//! The engine on its own thread, through its public API: what clients, drains and faults do to it.
//! Loops that wait for the thread end by themselves; a guard fails them long after they should have.

use std::panic::panic_any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use baton_engine::sim::{MockControl, MockModel, MockRunner};
use baton_engine::{
    Adapter, Engine, EngineConfig, EngineFailure, EngineHandle, FinishReason, OutputEvent, OutputStream, PromptScores,
    Request, RunError, RunSpec, SamplingParams, SubmitError, Usage, spawn, spawn_rebuildable,
};
use baton_model::{Constraint, ConstraintError, Grammar, TokenMask};

const MODEL: MockModel = MockModel::Hash { seed: 11, vocab_size: 500, end: Some((0, 20)) };

fn spec() -> RunSpec {
    RunSpec {
        vocab_size: 500,
        max_model_len: 4000,
        block_size: 8,
        num_blocks: 600,
        passing: None,
        max_step_tokens: 64,
        max_step_sequences: 16,
        max_draft_tokens: 5,
        steps_ahead: true,
    }
}

fn start(config: EngineConfig) -> (EngineHandle, Engine, MockControl) {
    let runner = MockRunner::new(spec(), MODEL);
    let control = runner.control();
    let (handle, engine) = spawn(Box::new(runner), config);
    (handle, engine, control)
}

fn request(family: u32, max_tokens: u32) -> Request {
    let prompt = (1..40).map(|i| (family * 13 + i) % 500).collect();
    Request::new(prompt, SamplingParams { seed: family.into(), ..SamplingParams::default() }, max_tokens)
}

/// A step that others can be measured against: it has begun and does not end before its release.
fn hang(handle: &EngineHandle, control: &MockControl) -> OutputStream {
    control.hang();
    let stream = handle.submit(request(0, 3)).unwrap();
    eventually(|| handle.stats().step_under_way.is_some());
    stream
}

fn eventually(condition: impl Fn() -> bool) {
    let guard = Instant::now();
    while !condition() {
        assert!(guard.elapsed() < Duration::from_secs(60), "it does not come about");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// All tokens, and how it ended.
fn collect(mut stream: OutputStream) -> (Vec<u32>, FinishReason, Usage) {
    let mut tokens = Vec::new();
    loop {
        match stream.blocking_next().expect("a stream ends with `Finished`") {
            OutputEvent::PromptScores(_) => panic!("no scores were asked for"),
            OutputEvent::Token { token, .. } => tokens.push(token),
            OutputEvent::Finished { reason, usage, .. } => {
                assert_eq!(stream.blocking_next(), None, "nothing follows `Finished`");
                return (tokens, reason, usage);
            }
        }
    }
}

fn reason(stream: OutputStream) -> FinishReason {
    collect(stream).1
}

#[test]
fn many_clients_at_once_get_what_each_would_get_alone() {
    let (handle, _engine, _) = start(EngineConfig::default());
    std::thread::scope(|scope| {
        for client in 0..8 {
            let handle = handle.clone();
            scope.spawn(move || {
                for i in 0..10 {
                    let request = Request { stop_token_ids: vec![0], ..request(client * 3 + i % 4, 30) };
                    let solo = MODEL.solo(&request);
                    let (tokens, reason, usage) = collect(handle.submit(request).unwrap());
                    let expected: Vec<u32> = solo.into_iter().take_while(|&token| token != 0).collect();
                    assert_eq!(tokens, expected);
                    let stopped = usize::from(tokens.len() < 30);
                    assert_eq!(reason == FinishReason::Stop { token: 0 }, stopped == 1);
                    assert_eq!(usage.completion_tokens, tokens.len() + stopped);
                    assert_eq!(usage.prompt_tokens, 39);
                }
            });
        }
    });
    let stats = handle.stats();
    assert_eq!((stats.finished.total(), stats.running, stats.waiting, stats.blocks.used), (80, 0, 0, 0));
    assert!(stats.prefix_hit_tokens > 0);
    assert_eq!(stats.prompt_tokens_computed + stats.prefix_hit_tokens, 80 * 39);
    assert_eq!(stats.step_tokens.buckets.iter().sum::<u64>(), stats.step_tokens.count);
}

#[test]
fn r1_the_blocks_of_dropped_streams_are_free_and_their_events_counted() {
    let (handle, _engine, control) = start(EngineConfig::default());
    control.delay_steps(Duration::from_millis(1));
    let mut streams: Vec<_> = (0..50).map(|family| handle.submit(request(family, 2000)).unwrap()).collect();
    streams.iter_mut().take(10).for_each(|stream| drop(stream.blocking_next()));
    drop(streams);
    eventually(|| handle.stats().finished.aborted == 50);
    let stats = handle.stats();
    assert_eq!((stats.running, stats.waiting, stats.blocks.used), (0, 0, 0));
    eventually(|| handle.stats().dropped_events >= 50);
}

#[test]
fn r8_a_full_queue_refuses_at_once_counts_each_choice_and_an_abort_frees_the_place() {
    let (handle, _engine, control) = start(EngineConfig { max_queued: 3, ..EngineConfig::default() });
    let running = hang(&handle, &control);
    let group = handle.submit_group(vec![request(1, 3); 2]).unwrap();
    let full = SubmitError::QueueFull { queued: 2, wanted: 2, max_queued: 3 };
    assert_eq!(handle.submit_group(vec![request(2, 3); 2]).err(), Some(full));
    let last = handle.submit(request(2, 3)).unwrap();
    let full = SubmitError::QueueFull { queued: 3, wanted: 1, max_queued: 3 };
    assert_eq!(handle.submit(request(3, 3)).err(), Some(full));

    last.abort();
    control.release();
    assert_eq!(reason(last), FinishReason::Aborted);
    let next = handle.submit(request(3, 3)).expect("a place is free");
    for stream in group.into_iter().chain([running, next]) {
        assert_eq!(reason(stream), FinishReason::Length);
    }
}

#[test]
fn r8_tokens_of_prompts_that_wait_are_bounded_and_what_waits_alone_may_have_more() {
    let (handle, _engine, control) = start(EngineConfig { max_queued_tokens: Some(20), ..EngineConfig::default() });
    let running = hang(&handle, &control);
    let long = Request { prompt: vec![1; 30], ..request(1, 3) };
    let waiting = handle.submit(long.clone()).unwrap();
    let full = SubmitError::QueuedTokens { queued: 30, wanted: 30, max_queued_tokens: 20 };
    assert_eq!(handle.submit(long).err(), Some(full.clone()));
    assert!(handle.room_in(Some(&full)) > Duration::ZERO);
    waiting.abort();
    control.release();
    assert_eq!(reason(waiting), FinishReason::Aborted);
    let next = handle.submit(request(3, 3)).expect("there is room");
    for stream in [running, next] {
        assert_eq!(reason(stream), FinishReason::Length);
    }
}

#[test]
fn r8_the_background_fills_no_place_in_the_queue_of_the_foreground() {
    let (handle, _engine, control) = start(EngineConfig { max_queued: 2, ..EngineConfig::default() });
    let running = hang(&handle, &control);
    let background = |family| Request { background: true, ..request(family, 3) };
    let canaries = handle.submit_group(vec![background(1), background(2)]).unwrap();
    let full = SubmitError::QueueFull { queued: 2, wanted: 1, max_queued: 2 };
    assert_eq!(handle.submit(background(3)).err(), Some(full.clone()));
    let clients = [4, 5].map(|family| handle.submit(request(family, 3)).unwrap());
    assert_eq!(handle.submit(request(6, 3)).err(), Some(full));
    assert!(canaries.iter().all(|stream| stream.id().is_background()));

    control.release();
    for stream in clients.into_iter().chain(canaries).chain([running]) {
        assert_eq!(reason(stream), FinishReason::Length);
    }
    let stats = handle.stats();
    assert_eq!((stats.finished.length, stats.running, stats.waiting, stats.background), (5, 0, 0, 0));
}

#[test]
fn r10_the_deadline_counts_from_submission() {
    let (handle, _engine, control) = start(EngineConfig::default());
    let running = hang(&handle, &control);
    let late = handle.submit(Request { deadline: Some(Duration::ZERO), ..request(1, 3) }).unwrap();
    let patient = handle.submit(Request { deadline: Some(Duration::from_secs(3600)), ..request(2, 3) }).unwrap();
    control.release();
    assert_eq!(reason(late), FinishReason::Error(EngineFailure::QueueTimeout));
    assert_eq!(reason(patient), FinishReason::Length);
    assert_eq!(reason(running), FinishReason::Length);
}

#[test]
fn r14_a_device_that_keeps_failing_takes_the_engine_down_and_nobody_hangs() {
    let (handle, engine, control) = start(EngineConfig::default());
    let failing = hang(&handle, &control);
    control.fail_steps(u32::MAX);
    let waiting: Vec<_> = (0..40).map(|family| handle.submit(request(family, 30)).unwrap()).collect();
    control.release();
    for stream in waiting.into_iter().chain([failing]) {
        assert_eq!(reason(stream), FinishReason::Error(EngineFailure::Device(RunError::Failed("mock fault".into()))));
    }
    engine.join();
    assert!(!handle.stats().alive);
    assert_eq!(handle.submit(request(0, 3)).err(), Some(SubmitError::EngineDown));
    handle.drain();
    handle.shutdown();
}

#[test]
fn r15_a_step_that_hangs_is_visible_while_submitting_and_aborting_do_not_wait_for_it() {
    let (handle, _engine, control) = start(EngineConfig::default());
    let hanging = hang(&handle, &control);
    let aborted = handle.submit(request(1, 3)).unwrap();
    aborted.abort();
    let stats = handle.stats();
    assert_eq!((stats.running, stats.alive), (1, true), "what runs is counted from the start of its step");
    eventually(|| handle.stats().step_under_way > Some(Duration::from_millis(5)));
    control.release();
    assert_eq!(reason(hanging), FinishReason::Length);
    assert_eq!(reason(aborted), FinishReason::Aborted);
    eventually(|| handle.stats().step_under_way.is_none());
}

#[tokio::test]
async fn a_drain_finishes_what_was_accepted_and_refuses_the_rest() {
    let (handle, engine, control) = start(EngineConfig::default());
    let running = hang(&handle, &control);
    let waiting = handle.submit(request(1, 20)).unwrap();
    handle.drain();
    assert_eq!(handle.submit(request(2, 20)).err(), Some(SubmitError::Draining));
    control.release();
    handle.drained().await;
    let stats = handle.stats();
    assert_eq!((stats.finished.length, stats.running, stats.alive), (2, 0, true));
    let ends = std::thread::spawn(move || [reason(running), reason(waiting)]).join().unwrap();
    assert_eq!(ends, [FinishReason::Length, FinishReason::Length]);
    handle.shutdown();
    engine.join();
    assert!(!handle.stats().alive);
    handle.drained().await;
}

#[tokio::test]
async fn a_shutdown_ends_the_rest_with_an_error_event() {
    let (handle, engine, control) = start(EngineConfig::default());
    let mut running = hang(&handle, &control);
    let mut waiting = handle.submit(request(1, 2000)).unwrap();
    handle.shutdown();
    assert_eq!(handle.submit(request(2, 20)).err(), Some(SubmitError::Draining));
    control.release();
    handle.drained().await;
    for stream in [&mut running, &mut waiting] {
        let mut last = None;
        while let Some(event) = stream.next().await {
            last = Some(event);
        }
        let expected = FinishReason::Error(EngineFailure::ShuttingDown);
        assert!(matches!(last, Some(OutputEvent::Finished { reason, .. }) if reason == expected));
    }
    engine.join();
}

#[test]
fn the_engine_stops_when_nobody_can_reach_it_any_more() {
    let (handle, engine, _) = start(EngineConfig::default());
    let stream = handle.submit(request(0, 5)).unwrap();
    drop(handle);
    assert_eq!(reason(stream), FinishReason::Length);
    engine.join();
}

#[test]
fn timings_cover_the_time_from_submission_to_the_end() {
    let (handle, _engine, control) = start(EngineConfig::default());
    control.delay_steps(Duration::from_millis(2));
    let before = Instant::now();
    let mut stream = handle.submit(request(0, 5)).unwrap();
    let timings = loop {
        if let OutputEvent::Finished { timings, .. } = stream.blocking_next().unwrap() {
            break timings;
        }
    };
    assert!(timings.queue + timings.prefill + timings.decode <= before.elapsed());
    // Sleeps do not end early: one step of prefill, four of decode.
    assert!(timings.prefill >= Duration::from_millis(2) && timings.decode >= Duration::from_millis(8));
}

#[test]
fn logprobs_come_with_the_tokens_that_asked_for_them() {
    let (handle, _engine, _) = start(EngineConfig::default());
    let params = SamplingParams { logprobs: Some(3), ..SamplingParams::default() };
    let mut stream = handle.submit(Request { params, ..request(0, 1) }).unwrap();
    let Some(OutputEvent::Token { token, logprob, top }) = stream.blocking_next() else { panic!("a token first") };
    assert_eq!((top.len(), top[0]), (3, (token, logprob)));
}

#[test]
fn scores_of_a_prompt_come_before_its_first_token() {
    let (handle, _engine, _) = start(EngineConfig::default());
    // The same prompt before, so that its blocks are cached; longer than a step.
    let prompt: Vec<u32> = (0..150).collect();
    let plain = Request::new(prompt.clone(), SamplingParams::greedy(), 2);
    assert_eq!(reason(handle.submit(plain.clone()).unwrap()), FinishReason::Length);
    let wanted = PromptScores { top: 3, targets: [(4, vec![7, 499]), (149, vec![0])].into(), hidden: None };
    let request = Request { prompt_scores: Some(wanted), ..plain };
    let mut stream = handle.submit(request.clone()).unwrap();
    let (mut scores, mut events) = (Vec::new(), 0);
    let token = loop {
        match stream.blocking_next().unwrap() {
            OutputEvent::PromptScores(more) => scores.extend(more),
            OutputEvent::Token { token, .. } => break token,
            OutputEvent::Finished { reason, .. } => panic!("{reason:?} before a token"),
        }
        events += 1;
    };
    assert_eq!((scores, events), (MODEL.solo_scores(&request, 500), 3));
    assert_eq!(token, MODEL.solo(&request)[0]);
    let Some(OutputEvent::Token { .. }) = stream.blocking_next() else { panic!("the second token") };
    assert!(matches!(stream.blocking_next(), Some(OutputEvent::Finished { usage, .. }) if usage.cached_tokens == 0));
}

#[test]
fn an_adapter_is_kept_by_its_requests_and_free_when_the_last_has_ended() {
    let (handle, _engine, control) = start(EngineConfig::default());
    let first = hang(&handle, &control);
    let weights = Arc::new(());
    let adapter = Adapter::new([1; 32], 1, 0, weights.clone());
    let requests = [4, 90].map(|max_tokens| Request { adapter: Some(adapter.clone()), ..request(5, max_tokens) });
    let expected = requests.each_ref().map(|request| MODEL.solo(request));
    let streams = requests.map(|request| handle.submit(Request { stop_token_ids: vec![], ..request }).unwrap());
    // Unloaded: only the requests hold it.
    drop(adapter);
    assert!(Arc::strong_count(&weights) > 1);
    control.release();
    collect(first);
    for (stream, expected) in streams.into_iter().zip(expected) {
        assert_eq!(collect(stream).0, expected);
    }
    eventually(|| Arc::strong_count(&weights) == 1);
}

/// The output is one id, again and again, of which so many are out that the request ends; or its parser panics.
#[derive(Debug, Default)]
struct Monotony {
    id: u32,
    panics: bool,
    masks: Arc<AtomicUsize>,
}

struct Monotonous {
    id: u32,
    panics: bool,
    masks: Arc<AtomicUsize>,
}

impl Grammar for Monotony {
    fn begin(&self, _: &[u32]) -> Box<dyn Constraint> {
        Box::new(Monotonous { id: self.id, panics: self.panics, masks: self.masks.clone() })
    }
}

impl Constraint for Monotonous {
    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        assert_eq!(token, self.id);
        Ok(())
    }

    fn masks(&mut self, _: &[u32]) -> Result<Vec<Option<TokenMask>>, ConstraintError> {
        if self.panics {
            panic_any(());
        }
        self.masks.fetch_add(1, Ordering::Relaxed);
        Ok(vec![Some(TokenMask::only(500, [self.id]))])
    }
}

#[test]
fn masks_are_computed_while_the_step_computes() {
    let (handle, _engine, control) = start(EngineConfig::default());
    control.hang();
    let masks = Arc::default();
    let grammar = Monotony { id: 7, masks: Arc::clone(&masks), ..Monotony::default() };
    let stream = handle.submit(Request { grammar: Some(Arc::new(grammar)), ..request(0, 5) }).unwrap();
    eventually(|| masks.load(Ordering::Relaxed) == 1);
    assert!(handle.stats().step_under_way.is_some(), "the step has not ended");
    control.release();
    assert_eq!(collect(stream).0, [7; 5]);
    assert_eq!(masks.load(Ordering::Relaxed), 5);
}

#[test]
fn a_grammar_that_panics_fails_its_request_alone_and_the_next_is_served() {
    let (handle, _engine, _) = start(EngineConfig::default());
    let constrained = |id, panics| {
        let grammar = Monotony { id, panics, ..Monotony::default() };
        handle.submit(Request { grammar: Some(Arc::new(grammar)), ..request(id, 5) }).unwrap()
    };
    for _ in 0..4 {
        let streams = [constrained(3, true), constrained(4, false)];
        let [(none, failure, _), (tokens, reason, _)] = streams.map(collect);
        assert!(matches!(failure, FinishReason::Error(EngineFailure::GrammarFailed(_))), "{failure:?}");
        assert_eq!((none, tokens, reason), (vec![], vec![4; 5], FinishReason::Length));
    }
}

#[test]
fn a_grammar_is_kept_by_its_requests_and_free_when_the_last_has_ended() {
    let (handle, _engine, control) = start(EngineConfig::default());
    let grammar: Arc<dyn Grammar> = Arc::new(Monotony { id: 5, ..Monotony::default() });
    let first = hang(&handle, &control);
    let streams = [3, 900]
        .map(|max_tokens| handle.submit(Request { grammar: Some(grammar.clone()), ..request(1, max_tokens) }).unwrap());
    assert!(Arc::strong_count(&grammar) > 1);
    control.release();
    let [finished, dropped] = streams;
    assert_eq!(collect(finished).0, [5; 3]);
    drop(dropped);
    collect(first);
    eventually(|| Arc::strong_count(&grammar) == 1);
}

#[test]
fn a_time_limit_counts_from_submission_to_the_last_token() {
    let (handle, _engine, control) = start(EngineConfig::default());
    control.delay_steps(Duration::from_millis(2));
    let limited = |limit| {
        let request = Request { stop_token_ids: Vec::new(), ..request(1, 3000) };
        handle.submit(Request { time_limit: Some(limit), ..request }).unwrap()
    };
    let before = Instant::now();
    let (tokens, reason, usage) = collect(limited(Duration::from_millis(40)));
    assert!(before.elapsed() >= Duration::from_millis(40));
    assert_eq!(reason, FinishReason::Error(EngineFailure::DeadlineExceeded));
    assert_eq!(usage.completion_tokens, tokens.len());
    assert!(tokens.len() <= 20, "a step takes two milliseconds at least");
    assert_eq!(collect(limited(Duration::ZERO)).1, FinishReason::Error(EngineFailure::DeadlineExceeded));
}

/// An engine whose runner can be replaced.
fn start_rebuildable(config: EngineConfig) -> (EngineHandle, Engine, MockControl) {
    let runner = MockRunner::new(spec(), MODEL);
    let (control, rebuild) = (runner.control(), runner.rebuild());
    let (handle, engine) = spawn_rebuildable(Box::new(runner), rebuild, config);
    (handle, engine, control)
}

fn poisoned() -> RunError {
    RunError::Poisoned("mock fault".into())
}

/// An engine whose runner has just broken, and none other is there before the release; and one that waited meanwhile.
fn rebuilding() -> (EngineHandle, Engine, MockControl, OutputStream) {
    let (handle, engine, control) = start_rebuildable(EngineConfig { max_num_seqs: 1, ..EngineConfig::default() });
    let running = hang(&handle, &control);
    let waiting = handle.submit(request(1, 20)).unwrap();
    control.fail_steps_with(1, poisoned());
    control.hang_rebuilds();
    // The step alone: the rebuild goes on hanging.
    control.release_steps();
    assert_eq!(reason(running), FinishReason::Error(EngineFailure::Device(poisoned())));
    eventually(|| handle.stats().rebuilding);
    (handle, engine, control, waiting)
}

#[test]
fn r14_while_another_runner_is_loaded_requests_wait_leave_expire_and_then_run() {
    let (handle, _engine, control, waiting) = rebuilding();
    eventually(|| handle.stats().waiting == 1);
    let stats = handle.stats();
    assert_eq!((stats.alive, stats.failure, stats.running, stats.waiting), (true, None, 0, 1));
    let (later, left) = (handle.submit(request(2, 20)).unwrap(), handle.submit(request(3, 20)).unwrap());
    let late = handle.submit(Request { deadline: Some(Duration::ZERO), ..request(4, 20) }).unwrap();
    left.abort();
    assert_eq!(reason(left), FinishReason::Aborted);
    assert_eq!(reason(late), FinishReason::Error(EngineFailure::QueueTimeout));
    control.release();
    for (stream, family) in [(waiting, 1), (later, 2)] {
        assert_eq!(collect(stream).0, MODEL.solo(&request(family, 20)));
    }
    let stats = handle.stats();
    assert_eq!((stats.rebuilds, stats.rebuilding, stats.device_failures.poisoned), (1, false, 1));
}

#[tokio::test]
async fn r19_a_drain_that_comes_while_another_runner_is_loaded_finishes_what_waits() {
    let (handle, engine, control, waiting) = std::thread::spawn(rebuilding).join().unwrap();
    handle.drain();
    assert_eq!(handle.submit(request(2, 20)).err(), Some(SubmitError::Draining));
    control.release();
    handle.drained().await;
    assert_eq!(std::thread::spawn(move || reason(waiting)).join().unwrap(), FinishReason::Length);
    handle.shutdown();
    engine.join();
}

#[test]
fn r20_a_shutdown_does_not_wait_for_another_runner_and_neither_does_the_end_of_the_last_client() {
    let (handle, engine, _control, waiting) = rebuilding();
    handle.shutdown();
    assert_eq!(reason(waiting), FinishReason::Error(EngineFailure::ShuttingDown));
    engine.join();

    let (handle, engine, _control, waiting) = rebuilding();
    drop((handle, waiting));
    engine.join();
}

/// At once: the thread that told it has not ended then.
#[test]
fn r14_whoever_is_told_that_the_device_is_lost_is_refused_from_then_on() {
    for _ in 0..300 {
        let (handle, engine, control) = start(EngineConfig::default());
        control.fail_steps_with(1, RunError::Lost("mock fault".into()));
        let mut stream = handle.submit(request(0, 3)).unwrap();
        assert!(matches!(stream.blocking_next(), Some(OutputEvent::Finished { reason: FinishReason::Error(_), .. })));
        assert_eq!(handle.submit(request(1, 3)).err(), Some(SubmitError::EngineDown));
        engine.join();
    }
}

#[test]
fn r14_a_lost_device_ends_everything_at_once_and_the_engine_says_why_it_is_down() {
    let (handle, engine, control) = start_rebuildable(EngineConfig::default());
    let running = hang(&handle, &control);
    let waiting: Vec<_> = (0..40).map(|family| handle.submit(request(family, 30)).unwrap()).collect();
    let lost = EngineFailure::Device(RunError::Lost("mock fault".into()));
    control.fail_steps_with(1, RunError::Lost("mock fault".into()));
    control.release();
    for stream in waiting.into_iter().chain([running]) {
        assert_eq!(reason(stream), FinishReason::Error(lost.clone()));
    }
    engine.join();
    let stats = handle.stats();
    assert_eq!((stats.alive, stats.failure, stats.device_failures.lost), (false, Some(lost), 1));
    assert_eq!(handle.submit(request(0, 3)).err(), Some(SubmitError::EngineDown));
}

#[tokio::test]
async fn r15_a_device_that_hangs_fails_its_requests_within_the_timeout_once_and_for_all() {
    let timeout = Duration::from_millis(300);
    let config = EngineConfig { max_num_seqs: 1, device_timeout: Some(timeout), ..EngineConfig::default() };
    let (handle, engine, control) = start_rebuildable(config);
    let streams = std::thread::spawn({
        let (handle, control) = (handle.clone(), control.clone());
        move || {
            let running = hang(&handle, &control);
            // One the thread knows of, and some that it never gets to read.
            let others: Vec<_> = (1..5).map(|family| handle.submit(request(family, 30)).unwrap()).collect();
            drop(handle.submit(request(5, 30)));
            others.into_iter().chain([running]).collect::<Vec<_>>()
        }
    });
    for stream in streams.join().unwrap() {
        let end = std::thread::spawn(move || collect(stream)).join().unwrap();
        assert_eq!(end, (vec![], FinishReason::Error(EngineFailure::Hung(timeout)), Usage::default()));
    }
    handle.drained().await;
    let stats = handle.stats();
    assert_eq!((stats.alive, &stats.failure), (false, &Some(EngineFailure::Hung(timeout))));
    assert_eq!((stats.running, stats.waiting, stats.device_failures.hung, stats.finished.error), (0, 0, 1, 6));
    assert_eq!(handle.submit(request(0, 3)).err(), Some(SubmitError::EngineDown));
    handle.shutdown();
    engine.join();

    // What comes of the step after all reaches nobody, and changes nothing.
    control.release();
    eventually(|| handle.stats().step_under_way.is_none());
    let late = handle.stats();
    assert_eq!((late.alive, late.failure, late.finished), (false, stats.failure, stats.finished));
}

#[test]
fn r15_steps_that_end_in_time_trip_nothing_however_long_they_take_together() {
    let timeout = Duration::from_secs(2);
    let (handle, _engine, control) = start(EngineConfig { device_timeout: Some(timeout), ..EngineConfig::default() });
    control.delay_steps(Duration::from_millis(30));
    let before = Instant::now();
    let long = Request { stop_token_ids: vec![], ..request(0, 100) };
    assert_eq!(reason(handle.submit(long).unwrap()), FinishReason::Length);
    assert!(before.elapsed() > timeout);
    assert!(handle.stats().alive);
}
