//! The sampler against transformers' own processors (`models/golden/sampling.json`), and the
//! properties of its draw.

use std::sync::Arc;

use crate::common::{Rng, folder, json};
use baton_model::{ConstraintError, SampleRequest, Sampler, SamplingParams, SequenceFailure, StepMasks, TokenMask};
use serde_json::Value;

fn request(params: SamplingParams) -> SampleRequest {
    SampleRequest { params: Arc::new(params), position: 0, history: Vec::new(), prompt_len: 0, masks: None }
}

fn golden_request(case: &Value) -> SampleRequest {
    let params = &case["params"];
    let float = |name: &str, default: f32| params.get(name).map_or(default, |v| v.as_f64().unwrap() as f32);
    let ids = |name: &str| -> Vec<u32> { serde_json::from_value(case[name].clone()).unwrap() };
    let bias = params.get("logit_bias").and_then(Value::as_object).into_iter().flatten();
    let (prompt, output) = (ids("prompt_ids"), ids("output_ids"));
    SampleRequest {
        params: Arc::new(SamplingParams {
            temperature: float("temperature", 1.0),
            top_k: float("top_k", 0.0) as u32,
            top_p: float("top_p", 1.0),
            min_p: float("min_p", 0.0),
            repetition_penalty: float("repetition_penalty", 1.0),
            presence_penalty: float("presence_penalty", 0.0),
            frequency_penalty: float("frequency_penalty", 0.0),
            logit_bias: bias.map(|(id, v)| (id.parse().unwrap(), v.as_f64().unwrap() as f32)).collect(),
            ..SamplingParams::default()
        }),
        position: output.len() as u32,
        prompt_len: prompt.len(),
        history: [prompt, output].concat(),
        masks: None,
    }
}

#[test]
fn probabilities_are_those_of_transformers() {
    let golden = json(folder("sampling.json"));
    let mut sampler = Sampler::default();
    let cases = golden["cases"].as_array().unwrap();
    for (i, case) in cases.iter().enumerate() {
        let vector = case["vector"].as_str().unwrap();
        let logit = |v: &Value| v.as_f64().map_or(f32::NEG_INFINITY, |v| v as f32);
        let logits: Vec<f32> = golden["vectors"][vector].as_array().unwrap().iter().map(logit).collect();
        let mut actual = sampler.probabilities(&logits, &golden_request(case)).unwrap();
        let mut expected: Vec<f64> = serde_json::from_value(case["probs"].clone()).unwrap();
        if vector == "ties" {
            // Which of several equal logits top_p keeps is an accident of the sort.
            actual.sort_by(f64::total_cmp);
            expected.sort_by(f64::total_cmp);
        }
        for (a, e) in actual.iter().zip(&expected) {
            assert!((a - e).abs() <= 1e-6, "case {i} ({vector}, {}): {a}, not {e}", case["params"]);
        }
    }
    assert!(cases.len() > 200);
}

#[test]
fn draws_follow_the_probabilities() {
    let logits = [1.0, -2.0, 0.5, 3.0, 2.5, -30.0];
    let mut sampler = Sampler::default();
    let params = SamplingParams { temperature: 1.5, ..SamplingParams::default() };
    let probabilities = sampler.probabilities(&logits, &request(params.clone())).unwrap();
    let (mut counts, draws) = ([0; 6], 40_000);
    for position in 0..draws {
        let request = SampleRequest { position, ..request(params.clone()) };
        counts[sampler.sample(&logits, &request).unwrap().token as usize] += 1;
    }
    for (count, p) in counts.iter().zip(probabilities) {
        // Five standard deviations of a binomial count.
        let expected = p * f64::from(draws);
        assert!(
            (f64::from(*count) - expected).abs() <= 5.0 * (expected * (1.0 - p)).sqrt() + 1.0,
            "{count} {expected}"
        );
    }
}

#[test]
fn a_drawn_token_is_never_one_that_was_cut() {
    let mut rng = Rng(3);
    let mut sampler = Sampler::default();
    for case in 0..2000 {
        let logits: Vec<f32> = (0..200).map(|_| rng.below(4000) as f32 / 200.0 - 10.0).collect();
        let params = SamplingParams {
            temperature: [0.0, 0.3, 1.0, 2.0][rng.below(4)],
            top_k: [0, 1, 7, 150, 999][rng.below(5)],
            top_p: [0.0, 0.5, 0.99, 1.0][rng.below(4)],
            min_p: [0.0, 0.1, 1.0][rng.below(3)],
            seed: case,
            ..SamplingParams::default()
        };
        let request = request(params);
        let probabilities = sampler.probabilities(&logits, &request).unwrap();
        let token = sampler.sample(&logits, &request).unwrap().token;
        assert!(probabilities[token as usize] > 0.0, "case {case}");
    }
}

/// The nucleus by sorting everything, as the judge of the selection that does not.
#[test]
fn the_nucleus_is_the_one_that_sorting_gives() {
    let mut rng = Rng(5);
    let mut sampler = Sampler::default();
    for case in 0..300 {
        let spread = [1, 30, 3000][rng.below(3)];
        let logits: Vec<f32> = (0..1000).map(|_| rng.below(spread * 100) as f32 / 300.0).collect();
        let top_p = [0.05, 0.5, 0.9, 0.999][rng.below(4)];
        let params = SamplingParams { top_p, ..SamplingParams::default() };
        let kept = sampler.probabilities(&logits, &request(params)).unwrap();

        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let max = f64::from(logits[order[0]]);
        let weight = |id: usize| (f64::from(logits[id]) - max).exp();
        let goal = f64::from(top_p) * (0..logits.len()).map(weight).sum::<f64>();
        let mut mass = 0.0;
        let size = 1 + order
            .iter()
            .take_while(|&&id| {
                mass += weight(id);
                mass < goal
            })
            .count();
        for (rank, &id) in order.iter().enumerate() {
            assert_eq!(kept[id] > 0.0, rank < size, "case {case}: rank {rank} of a nucleus of {size}");
        }
    }
}

#[test]
fn greedy_takes_the_first_maximum_of_the_processed_logits() {
    let mut sampler = Sampler::default();
    let logits = [1.0, 5.0, 5.0, 4.0];
    assert_eq!(sampler.sample(&logits, &request(SamplingParams::greedy())).unwrap().token, 1);
    let biased = SamplingParams { logit_bias: vec![(3, 2.0), (99, 100.0)], ..SamplingParams::greedy() };
    assert_eq!(sampler.sample(&logits, &request(biased)).unwrap().token, 3);
    let penalized = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy() };
    let request = SampleRequest { history: vec![1, 2, 99], prompt_len: 3, ..request(penalized) };
    assert_eq!(sampler.sample(&logits, &request).unwrap().token, 3);
}

#[test]
fn the_first_maximum_is_found_in_rows_of_any_length() {
    let mut rng = Rng(2);
    let mut sampler = Sampler::default();
    for len in 1..200 {
        // Few values, so that the maximum occurs often more than once.
        let logits: Vec<f32> = (0..len).map(|_| rng.below(9) as f32 - 8.0).collect();
        let first = (0..len).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        let sampled = sampler.sample(&logits, &request(SamplingParams::greedy())).unwrap();
        assert_eq!(sampled.token as usize, first, "{logits:?}");
        let mut broken = logits;
        broken[rng.below(len)] = f32::NAN;
        assert!(sampler.sample(&broken, &request(SamplingParams::greedy())).is_err());
    }
}

#[test]
fn end_tokens_are_suppressed_until_enough_tokens_are_out() {
    let mut sampler = Sampler::default();
    let params = SamplingParams { min_tokens: 2, suppressed_until_min: vec![1, 77], ..SamplingParams::greedy() };
    for (position, token) in [(0, 2), (1, 2), (2, 1)] {
        let request = SampleRequest { position, ..request(params.clone()) };
        assert_eq!(sampler.sample(&[0.0, 5.0, 4.0], &request).unwrap().token, token);
    }
}

#[test]
fn logprobs_are_the_models_own() {
    let mut sampler = Sampler::default();
    let params = SamplingParams {
        temperature: 0.1,
        logit_bias: vec![(0, 100.0)],
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    let sampled = sampler.sample(&[0.0, 2.0, 2.0, 1.0], &request(params)).unwrap();
    let normalizer = (1.0f64 + 2.0 * 2.0f64.exp() + 1.0f64.exp()).ln();
    assert_eq!(sampled.token, 0);
    assert!((f64::from(sampled.logprob) + normalizer).abs() < 1e-6);
    assert_eq!(sampled.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
    assert!((f64::from(sampled.top[0].1) - (2.0 - normalizer)).abs() < 1e-6);
}

#[test]
fn logits_that_are_not_finite_fail_and_nothing_panics() {
    let mut sampler = Sampler::default();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for params in [SamplingParams::greedy(), SamplingParams::default()] {
            let failed = sampler.sample(&[1.0, bad, 2.0], &request(params)).unwrap_err();
            assert_eq!(failed, SequenceFailure::NonFiniteLogits);
        }
    }
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, 1e-38, f32::MAX] {
        let fields: [fn(&mut SamplingParams) -> &mut f32; 6] = [
            |p| &mut p.temperature,
            |p| &mut p.top_p,
            |p| &mut p.min_p,
            |p| &mut p.repetition_penalty,
            |p| &mut p.presence_penalty,
            |p| &mut p.logit_bias[0].1,
        ];
        for field in fields {
            let mut params = SamplingParams { logit_bias: vec![(1, 0.0)], ..SamplingParams::default() };
            *field(&mut params) = odd;
            let request = SampleRequest { history: vec![0, 1, 2], prompt_len: 9, ..request(params) };
            assert!(sampler.sample(&[1.0, 3.0, 2.0], &request).unwrap().token < 3);
        }
    }
    let everything = SamplingParams { min_tokens: 1, suppressed_until_min: vec![0, 1, 2], ..SamplingParams::default() };
    assert!(sampler.sample(&[1.0, 3.0, 2.0], &request(everything)).unwrap().token < 3);
}

/// A request with everything that can refuse an id, some of it more often than not.
fn refusing_request(rng: &mut Rng, vocab_size: usize) -> (SampleRequest, Option<TokenMask>) {
    let mut ids =
        |most: usize| -> Vec<u32> { (0..rng.below(most + 1)).map(|_| rng.below(vocab_size + 3) as u32).collect() };
    let allowed = ids(vocab_size / 2);
    let suppressed = ids(4);
    let bad_words: Vec<Vec<u32>> = (0..4).map(|_| ids(3)).filter(|word| !word.is_empty()).collect();
    let (prompt, mut output) = (ids(5), ids(3));
    // So that bad words are often all but complete.
    if let Some(word) = bad_words.first() {
        output.extend(&word[..word.len() - 1]);
    }
    let inside = |id: &u32| (*id as usize) < vocab_size;
    let mut mask = TokenMask::only(vocab_size, ids(vocab_size).into_iter().filter(inside));
    mask.allow(rng.below(vocab_size) as u32);
    let mask = (rng.below(2) == 0).then_some(mask);
    let params = SamplingParams {
        temperature: [0.0, 0.8][rng.below(2)],
        top_k: [0, 1, 5][rng.below(3)],
        top_p: [1.0, 0.6][rng.below(2)],
        min_p: [0.0, 0.2][rng.below(2)],
        presence_penalty: [0.0, 0.5][rng.below(2)],
        logit_bias: if rng.below(3) == 0 { vec![(rng.below(vocab_size) as u32, 100.0)] } else { vec![] },
        allowed_token_ids: (rng.below(2) == 0).then_some(allowed),
        bad_words,
        min_tokens: 4,
        suppressed_until_min: suppressed,
        seed: rng.below(1000) as u64,
        logprobs: Some(1),
        ..SamplingParams::default()
    };
    let masks = mask.clone().map(|mask| {
        let masks = StepMasks::default();
        masks.set(Ok(vec![Some(mask)]));
        masks
    });
    let position = output.len() as u32;
    let (prompt_len, history) = (prompt.len(), [prompt, output].concat());
    (SampleRequest { params: Arc::new(params), position, history, prompt_len, masks }, mask)
}

/// What may be chosen, rule by rule and id by id: the judge of the bits.
fn naively_choosable(vocab_size: usize, request: &SampleRequest, mask: Option<&TokenMask>) -> Vec<u32> {
    let (params, output) = (&request.params, &request.history[request.prompt_len..]);
    let completes = |id: u32| params.bad_words.iter().any(|word| [output, &[id]].concat().ends_with(word));
    let rules: [&dyn Fn(u32) -> bool; 4] = [
        &|id| mask.is_none_or(|mask| mask.allows(id)),
        &|id| params.allowed_token_ids.as_ref().is_none_or(|ids| ids.contains(&id)),
        &|id| !completes(id),
        &|id| request.position >= params.min_tokens || !params.suppressed_until_min.contains(&id),
    ];
    rules.iter().fold((0..vocab_size as u32).collect(), |left: Vec<u32>, rule| {
        let followed: Vec<u32> = left.iter().copied().filter(|&id| rule(id)).collect();
        if followed.is_empty() { left } else { followed }
    })
}

#[test]
fn what_is_refused_is_as_good_as_not_in_the_vocabulary() {
    let mut rng = Rng(11);
    let mut sampler = Sampler::default();
    let mut narrowed = 0;
    for case in 0..4000 {
        let vocab_size = [1, 20, 33, 64, 150][rng.below(5)];
        // Few values, so that maxima tie.
        let logits: Vec<f32> = (0..vocab_size).map(|_| rng.below(12) as f32 / 2.0 - 3.0).collect();
        let (request, mask) = refusing_request(&mut rng, vocab_size);
        let choosable = naively_choosable(vocab_size, &request, mask.as_ref());
        narrowed += usize::from(choosable.len() < vocab_size);

        // The same request of a model that has nothing but what may be chosen, in the same order.
        let place = |id: &u32| choosable.binary_search(id).ok().map(|place| place as u32);
        let params = SamplingParams {
            logit_bias: request.params.logit_bias.iter().filter_map(|(id, bias)| Some((place(id)?, *bias))).collect(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            min_tokens: 0,
            ..(*request.params).clone()
        };
        let elsewhere = |ids: &[u32]| ids.iter().map(|id| place(id).unwrap_or(u32::MAX)).collect::<Vec<_>>();
        let history = elsewhere(&request.history);
        let twin = SampleRequest { params: Arc::new(params), history, masks: None, ..request.clone() };
        let few: Vec<f32> = choosable.iter().map(|&id| logits[id as usize]).collect();

        let expected = sampler.sample(&few, &twin).unwrap().token;
        let sampled = sampler.sample(&logits, &request).unwrap();
        assert_eq!(sampled.token, choosable[expected as usize], "case {case}: {request:?}");
        let expected = sampler.probabilities(&few, &twin).unwrap();
        let actual = sampler.probabilities(&logits, &request).unwrap();
        let of_choosable: Vec<f64> = choosable.iter().map(|&id| actual[id as usize]).collect();
        assert_eq!(of_choosable, expected, "case {case}: {request:?}");

        // The logprobs know nothing of it.
        let plain = SampleRequest {
            masks: None,
            ..self::request(SamplingParams { logprobs: Some(1), ..SamplingParams::greedy() })
        };
        assert_eq!(sampled.top, sampler.sample(&logits, &plain).unwrap().top);
    }
    assert!(narrowed > 3000, "{narrowed} cases refuse something");
}

#[test]
fn a_grammar_wins_over_everything_that_would_leave_nothing() {
    let mut sampler = Sampler::default();
    let end = SamplingParams {
        allowed_token_ids: Some(vec![0, 1]),
        bad_words: vec![vec![2]],
        min_tokens: 9,
        suppressed_until_min: vec![2],
        ..SamplingParams::greedy()
    };
    for temperature in [0.0, 1.0] {
        let masks = StepMasks::default();
        masks.set(Ok(vec![Some(TokenMask::only(4, [2]))]));
        let params = SamplingParams { temperature, ..end.clone() };
        let request = SampleRequest { masks: Some(masks), ..request(params) };
        assert_eq!(sampler.sample(&[9.0, 1.0, -5.0, 2.0], &request).unwrap().token, 2);
    }
}

#[test]
fn a_bad_word_is_not_completed_and_its_beginning_is_free() {
    let mut sampler = Sampler::default();
    let params = SamplingParams { bad_words: vec![vec![3, 1], vec![2]], ..SamplingParams::greedy() };
    assert!(params.needs_history());
    let logits = [0.0, 5.0, 6.0, 4.0];
    // In the prompt it counts for nothing.
    for (history, prompt_len, token) in [(vec![3], 0, 3), (vec![3], 1, 1), (vec![3, 0], 0, 1), (vec![], 0, 1)] {
        let request = SampleRequest { history, prompt_len, ..request(params.clone()) };
        assert_eq!(sampler.sample(&logits, &request).unwrap().token, token, "{request:?}");
    }
}

#[test]
fn a_grammar_that_fails_or_allows_nothing_the_model_has_fails_its_sequence() {
    let mut sampler = Sampler::default();
    let failed = Err(ConstraintError("no".into()));
    for masks in [failed, Ok(vec![Some(TokenMask::only(100, [70]))]), Ok(vec![Some(TokenMask::from_words(vec![]))])] {
        let step = StepMasks::default();
        step.set(masks);
        let request = SampleRequest { masks: Some(step), ..request(SamplingParams::greedy()) };
        let failure = sampler.sample(&[1.0, 2.0], &request).unwrap_err();
        assert!(matches!(failure, SequenceFailure::Grammar(_)), "{failure}");
        assert!(sampler.probabilities(&[1.0, 2.0], &request).is_err());
    }
}
