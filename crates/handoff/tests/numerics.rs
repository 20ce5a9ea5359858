//! Figures over golden cases, and the judgement of them.

mod device;

use std::collections::BTreeMap;

use baton_handoff::{
    Case, CaseFault, Finding, Measure, Numerics, Outcome, Parity, PrecisionClass, Replay, ReplayError, Replayed, Score,
    Task, Tolerances, Verdict, Way, check_vocabulary, judge, replay_case, replay_cases, task,
};
use device::{Device, VOCAB, case, cases, computed, nothing};
use proptest::prelude::*;

const CONTEXT: usize = 64;

fn float32() -> Tolerances {
    Tolerances::default_for(PrecisionClass::Float32)
}

fn outcomes(cases: &[Case], device: &mut dyn Replay) -> Vec<Outcome> {
    replay_cases(cases, CONTEXT, device, &mut |_, _| true).unwrap()
}

fn measured(cases: &[Case], plant: impl FnMut(Way, &Task, &mut Replayed)) -> Numerics {
    Parity::of(cases, &outcomes(cases, &mut Device(plant))).numerics(float32().top1_margin())
}

fn failed(findings: &[Finding]) -> Vec<Measure> {
    findings.iter().filter(|f| f.verdict == Verdict::Fail).map(|f| f.measure).collect()
}

#[test]
fn figures_are_those_of_a_computation_by_hand() {
    let (half, quarter) = (0.5f64.ln(), 0.25f64.ln());
    let golden = Case {
        prompt_ids: vec![0, 1],
        greedy_ids: vec![2, 3],
        margins: vec![0.7, 0.7],
        logprobs: vec![-1.0, -2.0, -3.0],
        // Position 1 as the trainer has it, position 2 with the two best exchanged.
        top: BTreeMap::from([(1, vec![(2, half), (5, quarter)]), (2, vec![(3, half), (5, quarter)])]),
        ..case("by hand", &[0], 0)
    };
    let score = |best, next, a: f64, b: f64, positions: bool| Score {
        best,
        best_logprob: half as f32,
        next,
        targets: if positions { vec![a as f32, b as f32] } else { Vec::new() },
    };
    let replayed = Replayed {
        scores: vec![
            score(9, Some(-1.0), 0.0, 0.0, false),
            score(2, Some(-2.0), half, quarter, true),
            score(5, Some(-6.0), quarter, half, true),
            score(1, None, 0.0, 0.0, false),
        ],
        ..Replayed::default()
    };
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} {b}");
    let ln2 = 2f64.ln();
    let numerics = Parity::of(std::slice::from_ref(&golden), &[Ok(replayed.clone())]).numerics(0.5);
    assert_eq!((numerics.cases, numerics.positions, numerics.values), (1, 2, 4));
    near(numerics.max_abs_logprob_diff, ln2);
    near(numerics.mean_abs_logprob_diff, ln2 / 2.0);
    // At position 2, p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4): 1/2 ln 2 - 1/4 ln 2; at position 1 zero.
    near(numerics.kl, ln2 / 8.0);
    near(numerics.top1.agreement().unwrap(), 0.5);
    let worst = numerics.top1.worst.as_ref().unwrap();
    assert_eq!((worst.position, worst.expected, worst.got), (2, 3, 5));
    near(worst.margin, ln2);
    assert_eq!(numerics.greedy_total(), (1, 2));
    assert_eq!(numerics.likely.values, 4);
    near(numerics.likely.p99, ln2);
    assert_eq!(numerics.perplexity.tokens, 3);
    near(numerics.perplexity.trainer, 2f64.exp());
    near(numerics.perplexity.device, 3f64.exp());
    near(numerics.perplexity.ratio, 1f64.exp());
    let largest = numerics.largest.as_ref().unwrap();
    assert_eq!((largest.case.as_str(), largest.position), ("by hand", 2));
    let by_position: Vec<(u32, usize)> = numerics.by_position.iter().map(|at| (at.position, at.values)).collect();
    assert_eq!(by_position, [(1, 2), (2, 2)]);
    near(numerics.by_position[1].mean, ln2);
    let count = |exponent| numerics.histogram.iter().find(|bucket| bucket.exponent == exponent).unwrap().count;
    assert_eq!(count(-1), 2, "ln 2 is between 0.1 and 1");
    assert_eq!(count(-8), 2, "what is rounded to f32 alone is in the first bucket");
    // With a margin beyond ln 2 nothing is demanded of the best token.
    let strict = Parity::of(&[golden], &[Ok(replayed)]).numerics(0.7);
    assert_eq!((strict.top1.considered, strict.top1.agreement()), (0, None));
    let findings = judge(&strict, &float32());
    assert_eq!(findings.iter().find(|f| f.measure == Measure::Top1Agreement).unwrap().verdict, Verdict::Skipped);
}

#[test]
fn an_identical_device_has_no_difference_and_passes() {
    let numerics = measured(&cases(), nothing);
    assert_eq!(numerics.max_abs_logprob_diff, 0.0);
    assert_eq!(numerics.mean_abs_logprob_diff, 0.0);
    assert!(numerics.kl < 1e-15, "{}", numerics.kl);
    assert_eq!(numerics.perplexity.ratio, 1.0);
    assert_eq!(numerics.top1.agreed, numerics.top1.considered);
    assert!(numerics.top1.considered > 0 && numerics.perplexity.tokens > 0);
    let (agreed, of) = numerics.greedy_total();
    assert!(agreed == of && of > 0);
    let findings = judge(&numerics, &float32());
    assert!(findings.iter().all(|finding| finding.verdict == Verdict::Pass), "{findings:?}");
}

#[test]
fn one_position_that_is_off_is_named() {
    let cases = cases();
    let numerics = measured(&cases, |_, task, replayed| {
        if task.ids[0] == 4 {
            replayed.scores[6].targets[1] -= 0.25;
        }
    });
    let largest = numerics.largest.as_ref().unwrap();
    assert_eq!((largest.case.as_str(), largest.position, largest.token), ("second", 6, cases[1].top[&6][1].0));
    assert!((numerics.max_abs_logprob_diff - 0.25).abs() < 1e-6);
    let at = numerics.by_position.iter().max_by(|a, b| a.max.total_cmp(&b.max)).unwrap();
    assert_eq!(at.position, 6);
    let findings = judge(&numerics, &float32());
    assert!(failed(&findings).contains(&Measure::MaxAbsLogprobDiff));
    assert!(findings[1].to_string().contains("case second, position 6"), "{}", findings[1]);
}

#[test]
fn values_that_are_not_finite_or_missing_are_faults_with_their_place() {
    type Plant = fn(&mut Replayed);
    let faults: [(Plant, CaseFault); 6] = [
        (|r| r.scores[3].targets[0] = f32::NAN, CaseFault::NonFinite { position: Some(3) }),
        (|r| r.scores[2].next = Some(f32::NEG_INFINITY), CaseFault::NonFinite { position: Some(2) }),
        (|r| r.scores[1].best_logprob = f32::INFINITY, CaseFault::NonFinite { position: Some(1) }),
        (|r| r.scores.truncate(4), CaseFault::Incomplete { position: 4, what: "the score" }),
        (
            |r| r.scores[1].targets.truncate(2),
            CaseFault::Incomplete { position: 1, what: "a log-probability asked for" },
        ),
        (
            |r| r.scores[2].next = None,
            CaseFault::Incomplete { position: 2, what: "the log-probability of the id that follows" },
        ),
    ];
    for (plant, fault) in faults {
        let numerics = measured(&cases(), |_, task, replayed| {
            if task.ids[0] == 4 {
                plant(replayed);
            }
        });
        assert_eq!(numerics.broken.len(), 1);
        assert_eq!((&*numerics.broken[0].case, &numerics.broken[0].reason), ("second", &fault.to_string()));
        assert_eq!(numerics.cases, 2, "the others are compared");
        assert_eq!(failed(&judge(&numerics, &float32())), [Measure::BrokenCases]);
    }
}

#[test]
fn a_device_that_refuses_a_case_fails_it_and_one_that_fails_ends_the_replay() {
    struct Broken(fn() -> ReplayError);
    impl Replay for Broken {
        fn replay(&mut self, _: &[Task], _: Way) -> Result<Vec<Replayed>, ReplayError> {
            Err(self.0())
        }
    }
    let golden = &cases()[0];
    let outcome = |error| replay_case(golden, CONTEXT, &mut Broken(error));
    assert_eq!(outcome(|| ReplayError::NonFinite).unwrap(), Err(CaseFault::NonFinite { position: None }));
    assert_eq!(outcome(|| ReplayError::Unfit("no".into())).unwrap(), Err(CaseFault::Refused("no".into())));
    assert!(matches!(outcome(|| ReplayError::Failed("gone".into())), Err(ReplayError::Failed(_))));
}

#[test]
fn cases_beyond_the_context_are_skipped_by_name_and_a_bundle_of_them_fails() {
    let cases = cases();
    let replay = |context| {
        let outcomes = replay_cases(&cases, context, &mut Device(nothing), &mut |_, _| true).unwrap();
        Parity::of(&cases, &outcomes).numerics(0.0)
    };
    let longest = cases.iter().map(|case| case.ids().count()).max().unwrap();
    let some = replay(longest - 1);
    assert_eq!(some.skipped.iter().map(|note| &*note.case).collect::<Vec<_>>(), ["second"]);
    assert_eq!(failed(&judge(&some, &float32())), []);
    let none = replay(1);
    assert_eq!((none.cases, none.skipped.len()), (0, 3));
    assert_eq!(failed(&judge(&none, &float32())), [Measure::BrokenCases]);
}

#[test]
fn a_replay_ends_when_it_is_told_to() {
    let mut seen = Vec::new();
    let outcomes = replay_cases(&cases(), CONTEXT, &mut Device(nothing), &mut |index, name| {
        seen.push(name.to_owned());
        index < 1
    });
    assert_eq!((outcomes.unwrap().len(), seen), (1, vec!["first".to_owned(), "second".to_owned()]));
}

#[test]
fn goldens_of_another_vocabulary_are_refused_by_name() {
    let mut cases = cases();
    check_vocabulary(&cases, VOCAB as usize).unwrap();
    cases[0].greedy_ids[0] = VOCAB;
    cases[2].top.get_mut(&0).unwrap()[2].0 = 1 << 20;
    let reasons = check_vocabulary(&cases, VOCAB as usize).unwrap_err();
    assert_eq!(reasons.len(), 2);
    assert!(reasons[0].contains("another vocabulary") && reasons[0].contains("case first"), "{reasons:?}");
    assert!(reasons[1].contains("case third has id 1048576"), "{reasons:?}");
}

#[test]
fn each_demand_can_fail_alone_and_nan_never_passes() {
    let good = measured(&cases(), nothing);
    type Spoil = fn(&mut Numerics, f64);
    let spoils: [(Measure, Spoil, f64); 7] = [
        (Measure::MaxAbsLogprobDiff, |n, x| n.max_abs_logprob_diff = x, 0.1),
        (Measure::MeanAbsLogprobDiff, |n, x| n.mean_abs_logprob_diff = x, 0.1),
        (Measure::P99AbsLogprobDiff, |n, x| n.likely.p99 = x, 0.1),
        (Measure::Kl, |n, x| n.kl = x, 0.1),
        (Measure::Top1Agreement, |n, _| n.top1.agreed -= 1, 0.0),
        (Measure::PerplexityRatio, |n, x| n.perplexity.ratio = x, 1.1),
        (Measure::PerplexityRatio, |n, x| n.perplexity.ratio = x, 0.9),
    ];
    for (measure, spoil, value) in spoils {
        for value in [value, f64::NAN] {
            let mut numerics = good.clone();
            spoil(&mut numerics, value);
            assert_eq!(failed(&judge(&numerics, &float32())), [measure], "{value}");
        }
    }
}

#[test]
fn a_distribution_without_a_rest_costs_no_infinite_divergence() {
    // The trainer's tokens have all the mass, as far as six decimals show; the device rounds to float32.
    let mut golden = case("sure", &[1], 0);
    for (expected, got) in [(-0.0, -0.0), (-0.0, -1.9e-6), (-1e-6, -0.0)] {
        golden.top = BTreeMap::from([(0, vec![(2, expected), (3, -16.5)])]);
        let score = Score { best: 2, best_logprob: got as f32, next: None, targets: vec![got as f32, -16.500_002] };
        let replayed = Replayed { scores: vec![score], ..Replayed::default() };
        let numerics = Parity::of(std::slice::from_ref(&golden), &[Ok(replayed)]).numerics(0.0);
        assert!((0.0..1e-6).contains(&numerics.kl), "{}", numerics.kl);
    }
}

#[test]
fn likely_tokens_are_counted_apart() {
    let mut golden = case("sure", &[1], 0);
    golden.top = BTreeMap::from([(0, vec![(2, -0.01), (3, -4.6), (4, -4.7)])]); // 0.01 is between the last two
    let score = Score { best: 2, best_logprob: -0.01, next: None, targets: vec![-0.01, -4.5, -9.0] };
    let replayed = Replayed { scores: vec![score], ..Replayed::default() };
    let numerics = Parity::of(&[golden], &[Ok(replayed)]).numerics(0.0);
    assert_eq!((numerics.values, numerics.likely.values), (3, 2));
    assert!((numerics.likely.max - 0.1).abs() < 1e-6 && (numerics.max_abs_logprob_diff - 4.3).abs() < 1e-6);
}

#[test]
fn two_devices_are_compared_without_what_both_are_off_by() {
    let cases = cases();
    let off = |by: f32| {
        move |_: Way, _: &Task, replayed: &mut Replayed| {
            for score in &mut replayed.scores {
                score.targets.iter_mut().chain(&mut score.next).for_each(|value| *value -= by);
            }
        }
    };
    let [a, b] = [0.5, 0.625].map(|by| outcomes(&cases, &mut Device(off(by))));
    let figures = |parity: Parity| parity.numerics(-1.0);
    let between = figures(Parity::between(&cases, &a, &b));
    assert!((between.max_abs_logprob_diff - 0.125).abs() < 1e-6, "{}", between.max_abs_logprob_diff);
    assert!((between.perplexity.ratio - 0.125f64.exp()).abs() < 1e-6);
    assert_eq!(between.top1.agreed, between.positions);
    assert!(figures(Parity::of(&cases, &b)).max_abs_logprob_diff > 0.6);
    let same = figures(Parity::between(&cases, &a, &a));
    assert_eq!((same.max_abs_logprob_diff, same.perplexity.ratio), (0.0, 1.0));
    // A case that one of them lacks is a fault of the comparison.
    let mut lacking = b.clone();
    lacking[1] = Err(CaseFault::Refused("no room".into()));
    assert_eq!(figures(Parity::between(&cases, &a, &lacking)).broken[0].case, "second");
}

#[test]
fn a_bundles_own_tolerances_win_class_by_class() {
    let defaults = PrecisionClass::Half;
    let own = Tolerances { max_abs_logprob_diff: 0.125, ..float32() };
    let manifest = serde_json::json!({
        "format": "baton-handoff", "version": 1, "model": {"name": "m"}, "generation": "00".repeat(32), "files": {},
        "trained": {"dtype": "float32"}, "computed": {"dtype": "float32"}, "cases": [],
        "tolerances": {"float32": own},
    });
    let manifest = serde_json::from_value(manifest).unwrap();
    assert_eq!(baton_handoff::tolerances_for(&manifest, PrecisionClass::Float32), own);
    assert_eq!(baton_handoff::tolerances_for(&manifest, defaults), Tolerances::default_for(defaults));
}

#[test]
fn a_coarser_class_is_allowed_no_less() {
    let classes = [PrecisionClass::Float32, PrecisionClass::Half, PrecisionClass::Int8, PrecisionClass::Int4];
    for pair in classes.map(Tolerances::default_for).windows(2) {
        let (fine, coarse) = (pair[0], pair[1]);
        assert!(fine.max_abs_logprob_diff < coarse.max_abs_logprob_diff);
        assert!(fine.mean_abs_logprob_diff < coarse.mean_abs_logprob_diff);
        assert!(fine.p99_abs_logprob_diff < coarse.p99_abs_logprob_diff);
        assert!(fine.kl < coarse.kl && fine.top1_agreement >= coarse.top1_agreement);
        assert!(
            fine.perplexity_ratio < coarse.perplexity_ratio && fine.mean_abs_logprob_diff < fine.max_abs_logprob_diff
        );
    }
}

proptest! {
    /// Cases in any order, in any two parts, some of them computed twice.
    #[test]
    fn figures_depend_on_the_set_of_cases_alone(
        noise in prop::collection::vec(-0.5..0.5f32, 5),
        order in Just((0..5).collect::<Vec<usize>>()).prop_shuffle(),
        cut in 0..=5usize,
    ) {
        let prompts: Vec<Vec<u32>> = (0..5).map(|i| (0..=i).map(|j| (i + 3 * j) % VOCAB).collect()).collect();
        let cases: Vec<Case> = prompts.iter().enumerate().map(|(i, p)| case(&format!("case {i}"), p, 3)).collect();
        let outcome = |index: usize| {
            let mut replayed = computed(&task(&cases[index]));
            for (position, score) in replayed.scores.iter_mut().enumerate() {
                let noise = noise[index] / (position + 1) as f32;
                score.targets.iter_mut().chain(&mut score.next).for_each(|x| *x += noise);
            }
            Ok(replayed)
        };
        let of = |indices: &[usize]| {
            let cases: Vec<Case> = indices.iter().map(|&i| cases[i].clone()).collect();
            Parity::of(&cases, &indices.iter().map(|&i| outcome(i)).collect::<Vec<Outcome>>())
        };
        let whole = of(&[0, 1, 2, 3, 4]).numerics(0.1);
        prop_assert_eq!(&of(&order).numerics(0.1), &whole);
        let (left, right) = order.split_at(cut);
        let mut merged = of(right);
        merged.merge(of(left));
        merged.merge(of(&order[..1]));
        prop_assert_eq!(&merged.numerics(0.1), &whole);
    }

    #[test]
    fn divergence_is_never_negative_nor_infinite(
        a in -30.0..0.0f64, b in -30.0..0.0f32, c in -30.0..0.0f64, d in -30.0..0.0f32,
    ) {
        let mut golden = case("any", &[1], 0);
        golden.top = BTreeMap::from([(0, vec![(2, a.max(c)), (3, a.min(c))])]);
        let score = Score { best: 2, best_logprob: b, next: None, targets: vec![b, d] };
        let replayed = Replayed { scores: vec![score], ..Replayed::default() };
        let numerics = Parity::of(&[golden], &[Ok(replayed)]).numerics(0.0);
        prop_assert!(numerics.kl >= 0.0 && numerics.kl.is_finite(), "{}", numerics.kl);
    }
}
