//! Random sequences of events, with the invariants checked after each; then scenarios with a clock.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::rollout::ledger::{Ledger, Record};
use crate::rollout::rules::{Figures, Latency};

fn plan(value: serde_json::Value) -> Plan {
    let serde_json::Value::Object(body) = value else { panic!("an object") };
    Plan::parse(body).unwrap()
}

/// Rollouts, what their transitions say, and what their actions do to a service.
struct World {
    rollouts: Rollouts,
    ledger: Ledger,
    now: Duration,
    staged: bool,
    traffic: Traffic,
    admitted: bool,
    promotions: usize,
}

impl World {
    fn new() -> Self {
        Self {
            rollouts: Rollouts::default(),
            ledger: Ledger::default(),
            now: Duration::ZERO,
            staged: false,
            traffic: Traffic::None,
            admitted: false,
            promotions: 0,
        }
    }

    fn start(&mut self, plan: Plan) -> Result<(), Refused> {
        let started = Started { base: "a".into(), names: vec!["m".into()], plan };
        let step = self.rollouts.start(started, self.now)?;
        assert!(!self.staged, "two candidates");
        self.admitted = false;
        self.take(step);
        Ok(())
    }

    fn on(&mut self, event: Event) -> Result<(), Refused> {
        let Some(rollout) = &mut self.rollouts.current else { return Ok(()) };
        let was = rollout.phase;
        self.admitted |= was == Phase::Gating && matches!(&event, Event::Gated(verdict) if verdict.admitted);
        let before = rollout.clone();
        let step = rollout.on(event, self.now).inspect_err(|_| assert_eq!(self.rollouts.current, Some(before)))?;
        self.take(step);
        Ok(())
    }

    fn take(&mut self, step: Step) {
        let id = self.rollouts.last_id;
        for transition in step.transitions {
            let record = Record { seq: self.ledger.seq + 1, unix_ms: 0, rollout: id, transition };
            // What is read back says the same.
            let line = serde_json::to_string(&record).unwrap();
            assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), record, "{line}");
            self.ledger.apply(&record).unwrap();
        }
        for action in step.actions {
            match action {
                Action::Stage => {
                    assert!(!self.staged && self.admitted, "staged without the gate");
                    (self.staged, self.traffic) = (true, Traffic::None);
                }
                Action::SetTraffic(traffic) => {
                    assert!(self.staged, "traffic without a candidate");
                    self.traffic = traffic;
                }
                Action::Promote => {
                    assert!(self.staged && self.admitted, "promoted without the gate");
                    self.staged = false;
                    self.promotions += 1;
                }
                Action::Withdraw => self.staged = false,
            }
        }
        let rollout = self.rollouts.current.as_ref().unwrap();
        assert_eq!((self.ledger.rollout, self.ledger.phase), (id, Some(rollout.phase)));
        assert_eq!(self.staged, rollout.phase.is_admitted());
        if self.staged {
            assert_eq!(self.traffic, rollout.traffic);
        }
        let last = self.ledger.promotions.get("a").map_or(0, |promoted| promoted.rollout);
        assert!(last <= id && (last > 0) == (self.promotions > 0));
        if matches!(rollout.phase, Phase::Promoting | Phase::Promoted) {
            assert_eq!(last, id);
        }
    }

    fn phase(&self) -> Phase {
        self.rollouts.current.as_ref().unwrap().phase
    }

    fn reason(&self) -> &str {
        self.rollouts.current.as_ref().unwrap().reason.as_deref().unwrap_or("")
    }

    /// Up to the gate's verdict.
    fn admitted(plan: Plan) -> Self {
        let mut world = Self::new();
        world.start(plan).unwrap();
        world.on(Event::Loaded { generation: "b".into() }).unwrap();
        world.on(Event::Gated(verdict(true, None))).unwrap();
        world
    }

    fn observe(&mut self, seconds: u64, seen: Observation) {
        self.now += Duration::from_secs(seconds);
        self.on(Event::Observed(seen.into())).unwrap();
    }
}

fn verdict(admitted: bool, parity: Option<Parity>) -> Verdict {
    Verdict { admitted, summary: "words".into(), parity }
}

/// Requests of a candidate, of which some failed.
fn requests(requests: u64, errors: u64) -> Observation {
    Observation { candidate: Figures { requests, errors, ..Figures::default() }, ..Observation::default() }
}

fn compared(compared: u64, agreement: f64) -> Observation {
    let tokens = compared * 10;
    Observation {
        shadows: compared,
        compared,
        compared_tokens: tokens,
        agreed_tokens: (tokens as f64 * agreement) as u64,
        ..Observation::default()
    }
}

/// What a test does next; `None` starts a rollout.
fn event() -> impl Strategy<Value = Option<Event>> {
    let part = prop_oneof![Just(0.0), Just(0.25), Just(1.0)];
    let observation = (0..3_u64, 0..200_u64, 0..3_u64, any::<bool>()).prop_map(|(non_finite, many, errors, broken)| {
        let mut seen = compared(many, 0.9);
        seen.candidate = Figures { requests: many, errors, non_finite: non_finite / 2, ..Figures::default() };
        seen.broken = (broken && many % 7 == 0).then(|| "gone".to_owned());
        seen
    });
    prop_oneof![
        2 => Just(None),
        4 => Just(Some(Event::Loaded { generation: "b".into() })),
        1 => Just(Some(Event::LoadFailed { reason: "no".into() })),
        4 => any::<bool>().prop_map(|admitted| Some(Event::Gated(verdict(admitted, None)))),
        8 => observation.prop_map(|seen| Some(Event::Observed(seen.into()))),
        2 => part.clone().prop_map(|part| Some(Event::Command(Command::Shadow(part)))),
        2 => part.prop_map(|part| Some(Event::Command(Command::Share(part)))),
        2 => Just(Some(Event::Command(Command::Promote))),
        1 => Just(Some(Event::Command(Command::Rollback { reason: "wish".into() }))),
        1 => Just(Some(Event::Broken { reason: "broken".into() })),
        4 => Just(Some(Event::Gone)),
    ]
}

proptest! {
    #[test]
    fn no_sequence_promotes_without_the_gate_or_has_two_candidates_and_each_can_be_ended(
        events in proptest::collection::vec((event(), 0..40_u64), 1..80),
        auto in any::<bool>(),
    ) {
        let mut world = World::new();
        let stages = json!([{"shadow": 0.5, "requests": 20}, {"share": 0.1, "seconds": 30}, {"share": 1, "requests": 50}]);
        for (event, seconds) in events {
            world.now += Duration::from_secs(seconds);
            // Refusals change nothing.
            let _ = match event {
                None if auto => world.start(plan(json!({"model": "/b", "stages": stages}))),
                None => world.start(plan(json!({"model": "/b"}))),
                Some(event) => world.on(event),
            };
        }
        // Whatever was, a rollback or a promotion comes to its end, and then the next may begin.
        let _ = world.on(Event::Command(Command::Rollback { reason: "the end".into() }));
        world.on(Event::Gone).unwrap();
        if world.rollouts.current.is_some() {
            prop_assert!(world.phase().is_terminal());
        }
        prop_assert!(!world.staged);
        world.start(plan(json!({"model": "/c"}))).unwrap();
    }
}

#[test]
fn a_plan_is_followed_stage_by_stage_to_its_promotion() {
    let stages = json!([{"shadow": 0.1, "requests": 100}, {"share": 0.05, "seconds": 60}, {"share": 0.5, "requests": 500, "seconds": 10}]);
    let mut world = World::admitted(plan(json!({"model": "/b", "stages": stages})));
    assert_eq!((world.phase(), world.traffic), (Phase::Shadow, Traffic::Shadow(0.1)));
    world.observe(1000, compared(99, 1.0));
    assert_eq!(world.phase(), Phase::Shadow);
    world.observe(1, compared(100, 1.0));
    assert_eq!((world.phase(), world.traffic), (Phase::Share, Traffic::Share(0.05)));
    world.observe(59, requests(7, 0));
    assert_eq!(world.traffic, Traffic::Share(0.05));
    world.observe(1, requests(8, 0));
    assert_eq!(world.traffic, Traffic::Share(0.5));
    // Requests count from the beginning of the stage, and both ends are needed.
    world.observe(9, requests(508, 0));
    assert_eq!(world.phase(), Phase::Share);
    world.observe(1, requests(508, 0));
    assert_eq!((world.phase(), world.promotions), (Phase::Promoting, 1));
    world.on(Event::Gone).unwrap();
    assert_eq!(world.phase(), Phase::Promoted);
}

#[test]
fn a_manual_plan_keeps_its_last_traffic_until_a_command() {
    let stages = json!([{"share": 0.5, "requests": 1}]);
    let mut world = World::admitted(plan(json!({"model": "/b", "stages": stages, "promote": "manual"})));
    for n in 1..5 {
        world.observe(1, requests(n, 0));
        assert_eq!((world.phase(), world.traffic), (Phase::Share, Traffic::Share(0.5)));
    }
    assert!(world.rollouts.current.as_ref().unwrap().waits());
    world.on(Event::Command(Command::Promote)).unwrap();
    assert_eq!(world.phase(), Phase::Promoting);
}

#[test]
fn a_command_takes_the_place_of_the_plan_and_rules_go_on() {
    let stages = json!([{"share": 0.5, "requests": 10}]);
    let mut world = World::admitted(plan(json!({"model": "/b", "stages": stages})));
    world.on(Event::Command(Command::Shadow(0.25))).unwrap();
    world.observe(1000, requests(1000, 0));
    assert_eq!((world.phase(), world.traffic), (Phase::Shadow, Traffic::Shadow(0.25)));
    world.on(Event::Command(Command::Share(0.0))).unwrap();
    assert_eq!((world.phase(), world.traffic), (Phase::Standing, Traffic::None));
    world.observe(1, Observation { broken: Some("its engine has stopped".into()), ..requests(1000, 0) });
    assert_eq!((world.phase(), world.reason()), (Phase::RollingBack, "its engine has stopped"));
}

#[test]
fn logits_that_are_not_finite_end_it_at_once_seen_or_unseen() {
    let seen =
        Observation { candidate: Figures { requests: 1, non_finite: 1, ..Figures::default() }, ..requests(1, 0) };
    let unseen = Observation { shadow_non_finite: 1, ..Observation::default() };
    for observation in [seen, unseen] {
        let mut world = World::admitted(plan(json!({"model": "/b"})));
        world.observe(1, observation.clone());
        assert!(world.phase() == Phase::RollingBack && world.reason().contains("nan_logits"), "{}", world.reason());
        let mut lax = World::admitted(plan(json!({"model": "/b", "rules": {"nan_logits": false}})));
        lax.observe(1, observation);
        assert_eq!(lax.phase(), Phase::Standing);
    }
}

#[test]
fn failures_end_it_once_there_are_enough_requests_and_count_from_the_stage() {
    let stages = json!([{"share": 0.1, "requests": 1000}, {"share": 0.5, "requests": 1000}]);
    let mut world = World::admitted(plan(json!({"model": "/b", "stages": stages})));
    world.observe(1, requests(19, 19));
    assert_eq!(world.phase(), Phase::Share);
    let mut world = World::admitted(plan(json!({"model": "/b", "stages": stages})));
    world.observe(1, requests(1000, 10));
    assert_eq!(world.traffic, Traffic::Share(0.5), "one in a hundred is allowed");
    // Over all it would still be allowed: 12 of 1100.
    world.observe(1, requests(1100, 12));
    assert!(world.reason().contains("2 of 100 requests failed"), "{}", world.reason());
}

#[test]
fn a_slow_candidate_is_rolled_back_with_the_figures() {
    let latency = |ms: u64, count: u64| Latency {
        to_first_token: Some(Duration::from_millis(50)),
        first_tokens: count,
        per_output_token: Some(Duration::from_millis(ms)),
        output_tokens: count,
    };
    let rules = json!({"max_latency_ratio": 1.5});
    let plan = plan(json!({"model": "/b", "rules": rules}));
    let unseen = |ms, count| Observation {
        shadow_serving: latency(10, count),
        shadow_candidate: latency(ms, count),
        ..Observation::default()
    };
    let figures = |ms, count| Figures { requests: count, latency: latency(ms, count), ..Figures::default() };
    let seen = |ms, count| Observation {
        serving: figures(10, count),
        candidate: figures(ms, count),
        ..Observation::default()
    };
    for (observation, falls) in [
        (unseen(16, 19), false),
        (unseen(15, 20), false),
        (unseen(16, 20), true),
        (seen(14, 20), false),
        (seen(16, 20), true),
    ] {
        let mut world = World::admitted(plan.clone());
        world.observe(1, observation);
        assert_eq!(world.phase() == Phase::RollingBack, falls, "{}", world.reason());
        assert!(!falls || world.reason().contains("16.00 ms where 10.00 ms"), "{}", world.reason());
    }
}

#[test]
fn answers_that_differ_from_what_clients_got_end_it() {
    let plan = plan(json!({"model": "/b", "rules": {"min_shadow_agreement": 0.95}}));
    for (many, agreement, falls) in [(19, 0.1, false), (20, 0.96, false), (20, 0.9, true)] {
        let mut world = World::admitted(plan.clone());
        world.on(Event::Command(Command::Shadow(1.0))).unwrap();
        world.observe(1, compared(many, agreement));
        assert_eq!(world.phase() == Phase::RollingBack, falls, "{}", world.reason());
        assert!(!falls || world.reason().contains("180 of 200 tokens agree"), "{}", world.reason());
    }
}

#[test]
fn what_the_gate_refuses_or_did_not_measure_never_gets_traffic() {
    let parity = |diff| Some(Parity { max_abs_logprob_diff: diff, kl: 1e-6, top1_agreement: 1.0 });
    let strict = json!({"model": "/b", "rules": {"max_parity_logprob_diff": 0.01}});
    for (rules, verdict, admitted) in [
        (json!({"model": "/b"}), verdict(false, None), false),
        (strict.clone(), verdict(true, None), false),
        (strict.clone(), verdict(true, parity(0.02)), false),
        (strict.clone(), verdict(true, parity(f64::NAN)), false),
        (strict, verdict(true, parity(0.009)), true),
    ] {
        let mut world = World::new();
        world.start(plan(rules)).unwrap();
        for command in [Command::Promote, Command::Share(0.5), Command::Shadow(0.5)] {
            world.on(Event::Command(command.clone())).unwrap_err();
        }
        world.on(Event::Loaded { generation: "b".into() }).unwrap();
        world.on(Event::Command(Command::Promote)).unwrap_err();
        world.on(Event::Gated(verdict)).unwrap();
        assert_eq!(world.phase() == Phase::Standing, admitted, "{}", world.reason());
        assert!(admitted || world.reason().starts_with("the gate does not admit it"), "{}", world.reason());
    }
}

#[test]
fn a_rollback_while_it_loads_ends_when_the_loading_has() {
    for loads in [true, false] {
        let mut world = World::new();
        world.start(plan(json!({"model": "/b"}))).unwrap();
        world.on(Event::Command(Command::Rollback { reason: "wish".into() })).unwrap();
        world.start(plan(json!({"model": "/c"}))).unwrap_err();
        match loads {
            true => {
                world.on(Event::Loaded { generation: "b".into() }).unwrap();
                assert_eq!(world.phase(), Phase::RollingBack);
                world.on(Event::Gone).unwrap();
            }
            false => world.on(Event::LoadFailed { reason: "no".into() }).unwrap(),
        }
        assert_eq!((world.phase(), world.reason()), (Phase::RolledBack, "wish"));
    }
}
