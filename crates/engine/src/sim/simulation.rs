//! Seeded runs: everything that can happen to an engine, in an order that the seed decides.

use std::sync::Arc;
use std::time::Duration;

use baton_model::{Grammar, Passing, RunError, RunSpec, SamplingParams, Tokens};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::MockModel;
use super::invariants;
use super::toy::ToyGrammar;
use super::world::{Record, World};
use crate::{
    Adapter, CacheScope, DraftMethod, EngineConfig, EngineFailure, EngineStats, FinishReason, HiddenStates,
    PromptScores, Request, RequestId, Share, SpeculationConfig, Tenant,
};

const VOCAB_SIZE: u32 = 50;
const END: u32 = 0;

/// A world of random limits, tiny ones included.
fn random_world(rng: &mut StdRng) -> World {
    let block_size = [1, 2, 4, 8][rng.random_range(0..4)];
    let num_blocks = rng.random_range(2..40);
    let steps_ahead = rng.random_bool(0.5);
    let spec = RunSpec {
        vocab_size: VOCAB_SIZE as usize,
        max_model_len: rng.random_range(2..=(num_blocks * block_size + 1).min(120)),
        block_size,
        num_blocks,
        passing: None,
        max_step_tokens: rng.random_range(1..48),
        max_step_sequences: rng.random_range(1..9),
        max_draft_tokens: 5,
        steps_ahead,
    };
    // By numbers of its own: all else is what it would be without.
    let passing = random_passing(&mut StdRng::seed_from_u64(rng.clone().random()), &spec);
    let spec = RunSpec { passing, ..spec };
    let config = EngineConfig {
        max_num_seqs: rng.random_range(1..9),
        max_num_batched_tokens: rng.random_range(1..64),
        enable_prefix_caching: rng.random_bool(0.8),
        // There are drafts or steps ahead.
        speculation: rng.random_bool(if steps_ahead { 0.2 } else { 0.7 }).then(|| random_speculation(rng)),
        ..EngineConfig::default()
    };
    let model = MockModel::Hash { seed: rng.random(), vocab_size: VOCAB_SIZE, end: Some((END, 12)) };
    World::with_mask_threads([0, 2][rng.random_range(0..2)], spec, &config, model)
}

/// As few blocks as there may be, or some more for the cache.
fn random_passing(rng: &mut StdRng, spec: &RunSpec) -> Option<Passing> {
    let reach = [None, None, Some(0), Some(1), Some(3), Some(8), Some(11), Some(30)][rng.random_range(0..8)]?;
    let fewest = Passing::fewest(reach, spec.block_size, spec.max_step_sequences, spec.max_step_tokens);
    let more = [0, 0, 1, 5, 40][rng.random_range(0..5)];
    Some(Passing { reach, num_blocks: fewest + more })
}

fn random_speculation(rng: &mut StdRng) -> SpeculationConfig {
    let (min, more) = (rng.random_range(1..3), rng.random_range(0..3));
    SpeculationConfig {
        method: [DraftMethod::Ngram { min, max: min + more }, DraftMethod::Model][rng.random_range(0..2)],
        num_speculative_tokens: rng.random_range(1..7),
        disable_by_batch_size: rng.random_range(1..64),
    }
}

/// A draw from the logits as they are.
fn plain_params(rng: &mut StdRng) -> SamplingParams {
    let temperature = [0.0, 0.7][rng.random_range(0..2)];
    SamplingParams { temperature, seed: rng.random(), ..SamplingParams::default() }
}

fn random_params(rng: &mut StdRng) -> SamplingParams {
    SamplingParams {
        repetition_penalty: [1.0, 1.1][rng.random_range(0..2)],
        logit_bias: (0..rng.random_range(0..3)).map(|_| (rng.random_range(0..VOCAB_SIZE), 1.5)).collect(),
        logprobs: rng.random_bool(0.2).then_some(3),
        ..plain_params(rng)
    }
}

/// An adapter that is told from others by its digest alone.
pub(super) fn adapter(digest: u8) -> Adapter {
    Adapter::new([digest; 32], 1, 0, ())
}

fn random_scores(rng: &mut StdRng, prompt_len: usize) -> PromptScores {
    let target = |rng: &mut StdRng| {
        (rng.random_range(0..prompt_len), vec![rng.random_range(0..VOCAB_SIZE), rng.random_range(0..VOCAB_SIZE)])
    };
    let targets = (0..if prompt_len > 0 { 3 } else { 0 }).map(|_| target(rng)).collect();
    let hidden = match rng.random_range(0..4) {
        0 => Some(HiddenStates::Last),
        1 => Some(HiddenStates::All),
        _ => None,
    };
    PromptScores { top: rng.random_range(0..3), targets, hidden }
}

/// A grammar, perhaps one that fails.
fn random_grammar(rng: &mut StdRng) -> Arc<dyn Grammar> {
    let fails_after = rng.random_bool(0.25).then(|| rng.random_range(0..20));
    Arc::new(ToyGrammar { seed: rng.random(), vocab_size: VOCAB_SIZE, fails_after })
}

/// A prompt that starts like others, and its choices.
fn random_group(rng: &mut StdRng, spec: &RunSpec, prefixes: &[Vec<u32>]) -> Vec<Request> {
    let longest = spec.max_model_len - 1;
    let prefix = &prefixes[rng.random_range(0..prefixes.len())];
    let mut prompt = prefix[..rng.random_range(0..=prefix.len().min(longest))].to_vec();
    let rest = rng.random_range(0..=(longest - prompt.len()).min(12));
    prompt.extend((0..rest).map(|_| rng.random_range(0..VOCAB_SIZE)));
    let max_tokens = rng.random_range(1..=(spec.max_model_len - prompt.len()).min(30)) as u32;
    // Others keep steps from being begun ahead.
    let is_plain = spec.steps_ahead && rng.random_bool(0.9);
    let tenant = |request: Request| {
        let tenant = request.cache_scope.tenant;
        Request { share: Share { tenant, weight: 1 + 2 * u32::from(tenant.0[0]) }, ..request }
    };
    let request = tenant(Request {
        stop_token_ids: if rng.random_bool(0.7) { vec![END] } else { vec![] },
        deadline: rng.random_bool(0.3).then(|| Duration::from_millis(rng.random_range(0..200))),
        adapter: [None, None, Some(1), Some(2)][rng.random_range(0..4)].map(adapter),
        cache_scope: CacheScope { tenant: Tenant([rng.random_range(0..2); 32]), salt: vec![rng.random_range(0..2)] },
        background: rng.random_bool(0.25),
        grammar: (!is_plain && rng.random_bool(0.3)).then(|| random_grammar(rng)),
        priority: [0, 0, 0, -1, 1][rng.random_range(0..5)],
        time_limit: rng.random_bool(0.1).then(|| Duration::from_millis(rng.random_range(0..400))),
        prompt_scores: rng.random_bool(0.2).then(|| random_scores(rng, prompt.len())),
        batch: max_tokens.is_multiple_of(5),
        ..Request::new(prompt, if is_plain { plain_params(rng) } else { random_params(rng) }, max_tokens)
    });
    let choices = if rng.random_bool(0.3) { rng.random_range(2..5) } else { 1 };
    (0..choices)
        .map(|choice| Request { params: SamplingParams { choice, ..request.params.clone() }, ..request.clone() })
        .collect()
}

/// What came of a run.
struct Run {
    stats: EngineStats,
    /// See [`World`].
    displaced: usize,
    in_vain: usize,
    prompts_ahead: usize,
    /// Whether something passes.
    passes: bool,
    journal: Vec<Record>,
}

/// One whole run.
fn simulate(seed: u64) -> Run {
    let mut rng = StdRng::seed_from_u64(seed);
    let rng = &mut rng;
    let mut world = random_world(rng);
    let prefixes: Vec<Vec<u32>> =
        (0..3).map(|_| (0..rng.random_range(1..60)).map(|_| rng.random_range(0..VOCAB_SIZE)).collect()).collect();
    let with_faults = rng.random_bool(0.5);
    if with_faults && rng.random_bool(0.5) {
        world.control.fail_early();
    }
    let arrivals = rng.random_range(1..25);
    let mut arrived = 0;
    while (arrived < arrivals || !world.core.is_idle()) && world.core.down().is_none() {
        world.now += Duration::from_millis(rng.random_range(0..20));
        if arrived < arrivals && rng.random_bool(0.5) {
            arrived += 1;
            let group = random_group(rng, &world.spec, &prefixes);
            for id in world.submit(group).into_iter().flatten() {
                if with_faults && rng.random_bool(0.1) {
                    world.poison(id, rng.random_range(0..40));
                }
            }
        }
        if rng.random_bool(0.05) && !world.journal.is_empty() {
            let nth = rng.random_range(0..world.journal.len());
            let id = *world.journal.keys().nth(nth).expect("below the length");
            world.abort(id);
        }
        if with_faults && rng.random_bool(0.02) {
            let words = || "mock fault".into();
            let errors = [RunError::Failed, RunError::OutOfMemory, RunError::Poisoned, RunError::Lost];
            let error = errors[[0, 0, 0, 1, 2, 2, 2, 2, 2, 3][rng.random_range(0..10)]](words());
            world.control.fail_steps_with(1, error);
            world.control.fail_rebuilds([0, 0, 1, 3][rng.random_range(0..4)]);
        }
        if with_faults && rng.random_bool(0.002) {
            world.control.panic_steps(1);
        }
        if with_faults && rng.random_bool(0.01) {
            world.control.fail_clears(1);
        }
        world.step();
    }
    assert!(world.journal.values().all(|record| record.end.is_some()), "a request never ended");
    assert_eq!(world.core.stats().blocks.used, 0, "blocks are used and nothing runs");
    Run {
        stats: world.core.stats(),
        displaced: world.displaced,
        in_vain: world.in_vain,
        prompts_ahead: world.prompts_ahead,
        passes: world.spec.passing.is_some_and(|passing| passing.reach > 0),
        journal: world.journal.into_values().collect(),
    }
}

/// Seeds that failed once.
const REGRESSIONS: [u64; 3] = [1696, 1820, 2765];

/// More or other seeds: `BATON_SIM_SEEDS=first..end`.
fn seeds() -> std::ops::Range<u64> {
    let Ok(range) = std::env::var("BATON_SIM_SEEDS") else { return 0..1000 };
    let (first, end) = range.split_once("..").expect("BATON_SIM_SEEDS is first..end");
    first.parse().expect("a number")..end.parse().expect("a number")
}

#[test]
fn all_invariants_hold_after_every_step_of_every_seed() {
    let mut runs = Vec::new();
    for seed in seeds().chain(REGRESSIONS) {
        match std::panic::catch_unwind(|| simulate(seed)) {
            Ok(run) => runs.push(run),
            Err(panic) => {
                eprintln!("seed {seed} fails; replay it with BATON_SIM_SEEDS={seed}..{}", seed + 1);
                std::panic::resume_unwind(panic);
            }
        }
    }
    if runs.len() < 1000 {
        return;
    }
    // Invariants that nothing ever strains prove nothing.
    let count = |happened: fn(&EngineStats) -> bool| runs.iter().filter(|run| happened(&run.stats)).count();
    let records = |happened: fn(&Record) -> bool| runs.iter().filter(|run| run.journal.iter().any(happened)).count();
    fn failure(record: &Record) -> Option<&EngineFailure> {
        match &record.end {
            Some((FinishReason::Error(failure), _)) => Some(failure),
            _ => None,
        }
    }
    for (what, count) in [
        ("preemption", count(|stats| stats.preemptions > 0)),
        ("displaced background", runs.iter().filter(|run| run.displaced > 0).count()),
        ("step ahead", count(|stats| stats.steps_ahead > 9)),
        ("prompt ahead", runs.iter().filter(|run| run.prompts_ahead > 0).count()),
        ("step ahead in vain", runs.iter().filter(|run| run.in_vain > 0).count()),
        ("prefix hit", count(|stats| stats.prefix_hit_tokens > 0)),
        (
            "prefix hit beside what passes",
            runs.iter().filter(|run| run.passes && run.stats.prefix_hit_tokens > 0).count(),
        ),
        ("step ahead beside what passes", runs.iter().filter(|run| run.passes && run.stats.steps_ahead > 9).count()),
        ("failed step", count(|stats| stats.failed_steps > 0)),
        ("runner in the place of another", count(|stats| stats.rebuilds > 0)),
        ("accepted draft", count(|stats| stats.speculation.as_ref().is_some_and(|s| s.accepted_tokens > 9))),
        (
            "rejected draft",
            count(|stats| stats.speculation.as_ref().is_some_and(|s| s.draft_tokens > s.accepted_tokens + 9)),
        ),
        ("stop token", count(|stats| stats.finished.stop > 0)),
        ("length", count(|stats| stats.finished.length > 0)),
        ("grammar", records(|record| record.request.grammar.is_some() && record.tokens.len() > 9)),
        ("grammar that failed", records(|record| matches!(failure(record), Some(EngineFailure::GrammarFailed(_))))),
        ("time limit", records(|record| failure(record) == Some(&EngineFailure::DeadlineExceeded))),
        ("abort", count(|stats| stats.finished.aborted > 0)),
        ("failure", count(|stats| stats.finished.error > 0)),
    ] {
        assert!(count >= runs.len() / 20, "{what} happens in {count} of {} runs only", runs.len());
    }
}

/// What was begun for the foreground in each step of the world, with the drafts it had; idle steps are empty.
type Trace = Vec<Vec<(u64, usize, Tokens, Vec<u32>)>>;

/// One run without faults and without cached prefixes, which the background's blocks would displace. Whether there is a
/// background decides nothing else about it.
fn trace(seed: u64, with_background: bool) -> (Trace, EngineStats) {
    let mut rng = StdRng::seed_from_u64(seed);
    let rng = &mut rng;
    let world = random_world(rng);
    let config = EngineConfig { enable_prefix_caching: false, ..world.config.clone() };
    let mut world =
        World::new(world.spec, &config, MockModel::Hash { seed, vocab_size: VOCAB_SIZE, end: Some((END, 12)) });
    let prefixes: Vec<Vec<u32>> = vec![(0..60).map(|_| rng.random_range(0..VOCAB_SIZE)).collect()];
    let (arrivals, mut arrived, mut trace) = (rng.random_range(1..25), 0, Trace::new());
    while arrived < arrivals || !world.core.is_idle() {
        if arrived < arrivals && rng.random_bool(0.3) {
            arrived += 1;
            let mut group = random_group(rng, &world.spec, &prefixes);
            group.iter_mut().for_each(|request| (request.deadline, request.time_limit) = (None, None));
            if with_background || !group[0].background {
                let _ = world.submit(group);
            }
        }
        world.step();
        let steps = world.last_step.plan.iter().chain(&world.last_step.ahead).flat_map(|plan| &plan.sequences);
        let foreground = steps.filter(|step| !RequestId(step.id).is_background()).cloned();
        trace.push(foreground.map(|step| (step.id, step.num_computed, step.tokens, step.draft)).collect());
    }
    let idle = trace.iter().rev().take_while(|step| step.is_empty()).count();
    trace.truncate(trace.len() - idle);
    (trace, world.core.stats())
}

#[test]
fn steps_of_the_foreground_are_the_same_with_a_background_and_none_is_delayed() {
    let (mut busy, mut drafted, mut ahead) = (0, 0, 0);
    for seed in 0..300 {
        let ((with, stats), (without, _)) = (trace(seed, true), trace(seed, false));
        assert!(with == without, "seed {seed}");
        busy += usize::from(stats.step_tokens.count > with.iter().filter(|step| !step.is_empty()).count() as u64);
        drafted += usize::from(with.iter().flatten().any(|(.., draft)| !draft.is_empty()));
        ahead += usize::from(stats.steps_ahead > 0);
    }
    assert!(
        busy > 100 && drafted > 60 && ahead > 60,
        "{busy} runs with steps of the background, {drafted} with drafts, {ahead} with steps ahead"
    );
}

/// A world in the middle of things: of those that ended one got a hit and one its scores; some run, some wait.
fn busy_world() -> World {
    let spec = RunSpec {
        vocab_size: VOCAB_SIZE as usize,
        max_model_len: 64,
        block_size: 4,
        num_blocks: 16,
        passing: Some(Passing { reach: 5, num_blocks: 40 }),
        max_step_tokens: 32,
        max_step_sequences: 3,
        max_draft_tokens: 5,
        steps_ahead: false,
    };
    let model = MockModel::Hash { seed: 7, vocab_size: VOCAB_SIZE, end: None };
    let speculation =
        SpeculationConfig { method: DraftMethod::Model, num_speculative_tokens: 2, disable_by_batch_size: 32 };
    let config = EngineConfig { speculation: Some(speculation), ..EngineConfig::default() };
    let mut world = World::new(spec, &config, model);
    let request = |max_tokens| Request::new((1..10).collect(), SamplingParams::default(), max_tokens);
    for prompt_scores in [None, None, Some(PromptScores::default())] {
        world.submit(vec![Request { prompt_scores, ..request(2) }]).unwrap();
        world.run();
    }
    for _ in 0..5 {
        world.submit(vec![request(20)]).unwrap();
    }
    world.now += Duration::from_millis(5);
    world.step();
    world.step();
    world
}

#[test]
fn every_invariant_notices_its_sabotage() {
    for invariant in invariants::ALL {
        let mut world = busy_world();
        assert!(world.core.stats().running >= 2 && world.core.stats().waiting >= 2);
        assert_eq!((invariant.check)(&world), Ok(()), "{}", invariant.name);
        (invariant.sabotage)(&mut world);
        assert!((invariant.check)(&world).is_err(), "`{}` did not notice", invariant.name);
    }
}

#[test]
fn a_run_is_decided_by_its_seed_alone() {
    let outcome = || {
        let mut world = busy_world();
        world.run();
        let ends: Vec<_> = world.journal.values().map(|record| (record.tokens.clone(), record.end.clone())).collect();
        (ends, world.core.stats())
    };
    assert_eq!(outcome(), outcome());
    assert!(outcome().0.iter().all(|(_, end)| matches!(end, Some((FinishReason::Length, _)))));
}
