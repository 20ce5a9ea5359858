//! What tenants do to each other: no more than a constant, however much one of them asks for.

use std::collections::{BTreeMap, BTreeSet};

use baton_fairness::Fault;
use baton_model::RunSpec;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::MockModel;
use super::cases::{request, spec, world};
use super::world::World;
use crate::sequence::Class;
use crate::{EngineConfig, FinishReason, Request, RequestId, Share, Tenant};

/// What a world saw tenants being served, by class.
#[derive(Default)]
pub(crate) struct Fairness {
    /// By weight.
    served: BTreeMap<(Class, Tenant), f64>,
    /// Of two that have waited since, the least and the most by which the first was served more.
    both_wait: BTreeMap<[(Class, Tenant); 2], (f64, f64)>,
    widest: f64,
    planted: bool,
}

impl Fairness {
    pub fn serve(&mut self, tenant: (Class, Tenant), by_weight: f64) {
        *self.served.entry(tenant).or_default() += by_weight;
    }

    /// A step has ended; these wait.
    pub fn observe(&mut self, waiting: &BTreeSet<(Class, Tenant)>) {
        let served = |tenant| self.served.get(tenant).copied().unwrap_or_default();
        self.both_wait.retain(|both, _| both.iter().all(|tenant| waiting.contains(tenant)));
        for first in waiting {
            for second in waiting.range(..first).filter(|second| second.0 == first.0) {
                let more = served(first) - served(second);
                let (least, most) = self.both_wait.entry([*first, *second]).or_insert((more, more));
                (*least, *most) = (least.min(more), most.max(more));
                self.widest = self.widest.max(*most - *least);
            }
        }
    }

    /// By how much one of two tenants was served more than the other while both waited, at most.
    pub fn widest_gap(&self) -> f64 {
        self.widest
    }

    /// Whether it is expected not to hold.
    pub fn is_planted(&self) -> bool {
        self.planted
    }
}

/// What the gap may be: what is under way when somebody begins to wait fills the cache at most, and counts twice at most.
/// The one may be ahead by that, then the other.
pub(crate) fn limit(spec: &RunSpec) -> f64 {
    2.0 * 2.0 * tokens(spec)
}

/// Those that the cache holds. Where no request needs much of it, the gap is no more than that.
fn tokens(spec: &RunSpec) -> f64 {
    (spec.num_blocks * spec.block_size) as f64
}

fn of(number: u8, request: Request) -> Request {
    Request { share: Share { tenant: Tenant([number; 32]), ..request.share }, ..request }
}

/// Tenants of other weights and appetites come and go; as long as one is there, something of it waits.
fn floods(seed: u64, fault: Option<Fault>) -> World {
    let mut rng = StdRng::seed_from_u64(seed);
    let rng = &mut rng;
    let num_blocks = rng.random_range(20..60);
    let spec = RunSpec {
        max_step_tokens: rng.random_range(4..40),
        max_step_sequences: rng.random_range(2..9),
        steps_ahead: rng.random_bool(0.5),
        ..spec(num_blocks)
    };
    let model = MockModel::Hash { seed, vocab_size: 100, end: None };
    let mut world = World::new(spec, &EngineConfig::default(), model);
    world.is_long = true;
    if let Some(fault) = fault {
        world.core.scheduler_mut().plant(fault);
        world.fairness.planted = true;
    }
    let tenants: Vec<(u8, u32, u32, u32)> = (0..rng.random_range(2..5))
        .map(|number| {
            let [prompt, output] = [0, 1].map(|_| [3, 30][rng.random_range(0..2)]);
            (number, [1, 1, 2, 4][rng.random_range(0..4)], prompt, output)
        })
        .collect();
    let mut present = vec![false; tenants.len()];
    for step in 0..600 {
        for (present, &(number, weight, prompt, output)) in present.iter_mut().zip(&tenants) {
            // The first is alone for a while.
            *present ^= rng.random_bool(0.01) && (number == 0 || step > 200);
            let waits = |world: &World| {
                let all = world.core.scheduler().waiting();
                all.values().filter(|sequence| sequence.share.tenant.0[0] == number).count()
            };
            while *present && waits(&world) < 3 {
                let family = rng.random_range(0..1000);
                let request = request(family, rng.random_range(1..=prompt), rng.random_range(1..=output));
                let priority = rng.random_range(-2..3);
                let share = Share { weight, ..Share::default() };
                world.submit(vec![of(number, Request { priority, share, ..request })]).expect("it fits");
            }
        }
        world.step();
    }
    world
}

#[test]
fn r12_between_tenants_that_wait_the_gap_of_service_is_bounded_whatever_they_ask_for() {
    let mut widest: f64 = 0.0;
    for seed in 0..12 {
        let world = floods(seed, None);
        widest = widest.max(world.fairness.widest_gap() / tokens(&world.spec));
    }
    assert!((0.3..=1.0).contains(&widest), "{widest} of what is allowed");
}

#[test]
fn r12_a_ledger_that_forgets_to_lift_to_charge_or_to_weigh_is_noticed() {
    for fault in [Fault::Lift, Fault::Charge, Fault::Weight] {
        let worlds = (0..6).map(|seed| floods(seed, Some(fault)));
        let noticed = worlds.filter(|world| world.fairness.widest_gap() > tokens(&world.spec)).count();
        assert!(noticed > 0, "{fault:?} is noticed in {noticed} of 6 runs");
    }
}

/// Steps to the first token of each of one tenant's requests, sorted, beside a flood of another that is never short of
/// requests. The tenant sends one at a time.
fn steps_to_first_token(requests: usize, flood: Option<(u8, Request)>) -> Vec<usize> {
    let mut world = world(250);
    world.is_long = true;
    let mut steps = Vec::new();
    let mut family = 0;
    for _ in 0..requests {
        let asked = world.submit(vec![of(1, request(1000 + family, 24, 12))]).expect("it fits")[0];
        let mut waited = 0;
        let mut rested = 0;
        // Between two requests it is away for a while.
        while rested < 8 {
            while flood.is_some() && world.core.stats().waiting < 16 {
                let (number, more) = flood.clone().expect("there is one");
                family += 1;
                let prompt = more.prompt.iter().map(|token| (token + family) % 100).collect();
                world.submit(vec![of(number, Request { prompt, ..more })]).expect("it fits");
            }
            world.step();
            waited += usize::from(world.record(asked).tokens.is_empty());
            rested += usize::from(world.record(asked).end.is_some());
        }
        steps.push(waited + 1);
        family += 1;
    }
    steps.sort_unstable();
    steps
}

#[test]
fn r12_a_flood_does_not_double_the_steps_to_the_first_token_of_others() {
    let p95 = |steps: &[usize]| steps[steps.len() * 95 / 100];
    let alone = p95(&steps_to_first_token(20, None));
    for (what, flood) in
        [("long answers", request(0, 4, 150)), ("long prompts", request(0, 150, 4)), ("both", request(0, 100, 90))]
    {
        let beside = p95(&steps_to_first_token(20, Some((2, flood.clone()))));
        let as_the_same = p95(&steps_to_first_token(4, Some((1, flood))));
        assert!(beside <= 2 * alone, "{what}: {beside} steps beside the flood, {alone} alone");
        assert!(as_the_same > 4 * alone, "{what}: {as_the_same} steps as part of the flood: it is none");
    }
}

fn submit_as(world: &mut World, number: u8, weight: u32, request: Request) -> RequestId {
    let share = Share { tenant: Tenant([number; 32]), weight };
    world.submit(vec![Request { share, ..request }]).expect("it fits")[0]
}

#[test]
fn r12_a_better_priority_gains_a_tenant_nothing_from_others() {
    let starts = |priority| {
        let mut world = world(20);
        let mut ids = Vec::new();
        for family in 0..6 {
            let one = Request { priority, ..request(family, 60, 5) };
            ids.push(submit_as(&mut world, 1, 1, one));
            ids.push(submit_as(&mut world, 2, 1, request(10 + family, 60, 5)));
        }
        while !world.core.is_idle() {
            world.now += std::time::Duration::from_millis(1);
            world.step();
        }
        ids.sort_by_key(|&id| world.record(id).started);
        ids
    };
    assert_eq!(starts(0), starts(-100));
    let order: Vec<u64> = starts(0).iter().map(|id| id.0 % 2).collect();
    assert!(order.chunks(2).all(|pair| pair[0] != pair[1]), "one at a time, they take turns: {order:?}");
}

#[test]
fn a_batch_comes_behind_whoever_waits_for_an_answer_and_has_turns_of_its_own() {
    let mut world = world(20);
    let running = submit_as(&mut world, 9, 1, request(0, 60, 5));
    world.step();
    let batch = [1, 1, 2].map(|number| {
        let line = Request { batch: true, priority: -5, ..request(u32::from(number), 60, 5) };
        submit_as(&mut world, number, 1, line)
    });
    let later = submit_as(&mut world, 1, 1, request(7, 60, 5));
    while !world.core.is_idle() {
        world.now += std::time::Duration::from_millis(1);
        world.step();
    }
    let mut order = [running, batch[0], batch[1], batch[2], later];
    order.sort_by_key(|&id| world.record(id).started);
    assert_eq!(order, [running, later, batch[0], batch[2], batch[1]]);
}

#[test]
fn weights_divide_what_is_served() {
    let mut world = world(40);
    world.is_long = true;
    for family in 0..200 {
        submit_as(&mut world, 1, 1, request(family, 10, 10));
        submit_as(&mut world, 2, 3, request(1000 + family, 10, 10));
    }
    (0..300).for_each(|_| world.step());
    let served = |number| world.fairness.served[&(Class::Foreground, Tenant([number; 32]))];
    // Both by weight.
    let ratio = served(2) / served(1);
    assert!((0.9..1.1).contains(&ratio), "{ratio}");
}

#[test]
fn nobody_gives_way_to_one_for_whom_it_is_not_enough() {
    let mut world = world(20);
    for family in 0..4 {
        submit_as(&mut world, 1, 1, request(family, 4, 12));
    }
    (0..6).for_each(|_| world.step());
    assert_eq!(world.core.stats().running, 4);
    // It needs nearly all blocks, and one of the others would stay.
    let large = submit_as(&mut world, 2, 1, request(9, 72, 2));
    world.run();
    assert_eq!((world.core.stats().preemptions, world.end(large)), (0, &FinishReason::Length));
}

#[test]
fn a_newcomer_is_let_in_also_where_as_many_run_as_a_step_has_rows() {
    let spec = RunSpec { max_step_tokens: 4, max_step_sequences: 4, ..spec(200) };
    let model = MockModel::Hash { seed: 1, vocab_size: 100, end: None };
    let mut world = World::new(spec, &EngineConfig::default(), model);
    for family in 0..8 {
        submit_as(&mut world, 1, 1, request(family, 1, 100));
    }
    (0..8).for_each(|_| world.step());
    let newcomer = submit_as(&mut world, 2, 1, request(9, 1, 2));
    (0..4).for_each(|_| world.step());
    assert!(world.record(newcomer).started.is_some());
}
