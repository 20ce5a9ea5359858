//! The layer for multi-token prediction, on the bundled checkpoint, which has a trained one: what it drafts is mostly
//! what the model then says. That drafts change nothing is shown in `equalities.rs`.

use crate::common::{Pool, Sequence, folder, json, options};
use baton_device::{Backend, CompressedOps, LatentOps, Reference};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_model::{Files, LoadError, LoadOptions, Runner, SamplingParams, SequenceStep, StepPlan, load};

fn abacus() -> Files {
    Files::folder(folder("../abacus")).unwrap()
}

/// The greedy outputs of the bundled prompts, generated in chunks of at most `chunk` tokens, and of all drafts how many
/// were what came next.
fn outputs<B: Backend + LatentOps + CompressedOps>(backend: B, mtp: bool, chunk: usize) -> (Vec<Vec<u32>>, f64) {
    let mut runner = load(backend, &abacus(), &LoadOptions { mtp, ..options() }).unwrap().0;
    let (mut outputs, mut drafts, mut right) = (Vec::new(), 0, 0);
    for case in json(folder("../abacus/golden.json"))["chats"].as_array().unwrap() {
        let prompt: Vec<u32> = serde_json::from_value(case["prompt_ids"].clone()).unwrap();
        let length = case["output_ids"].as_array().unwrap().len();
        let mut sequence = Sequence::new(1, &prompt, SamplingParams::greedy());
        let mut pool = Pool::new(&runner);
        let mut draft: Vec<u32> = Vec::new();
        while sequence.tokens.len() < prompt.len() + length {
            let count = sequence.remaining().min(chunk);
            let end = sequence.num_computed + count + draft.len();
            pool.cover(&mut sequence, end);
            let step = SequenceStep { draft: draft.clone(), propose: 1, ..sequence.step(count) };
            let output = runner.step(&StepPlan::new(vec![step])).unwrap().sequences.remove(0);
            sequence.num_computed += count;
            for (i, sampled) in output.sampled.into_iter().enumerate() {
                sequence.num_computed = sequence.tokens.len();
                let token = sampled.unwrap().token;
                right += usize::from(draft.get(i) == Some(&token));
                sequence.tokens.push(token);
            }
            drafts += draft.len();
            draft = output.proposed;
            assert!(draft.len() <= usize::from(mtp && sequence.remaining() == 1));
        }
        outputs.push(sequence.tokens[prompt.len()..][..length].to_vec());
    }
    (outputs, right as f64 / drafts.max(1) as f64)
}

fn drafts_are_mostly_right<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B) {
    let (plain, _) = outputs(make(), false, usize::MAX);
    for chunk in [usize::MAX, 7] {
        let (drafted, right) = outputs(make(), true, chunk);
        assert_eq!(drafted, plain);
        assert!(right > 0.75, "{right} of the drafts were right, in chunks of {chunk}");
    }
}

#[test]
fn reference_drafts_are_mostly_right() {
    drafts_are_mostly_right(Reference::new);
}

#[test]
fn cpu_drafts_are_mostly_right() {
    drafts_are_mostly_right(|| CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap());
}

#[test]
fn the_layer_is_no_part_of_the_digest_and_refused_where_there_is_none() {
    let report = |mtp| load(Reference::new(), &abacus(), &LoadOptions { mtp, ..options() }).unwrap().1;
    let (without, with) = (report(false), report(true));
    assert_eq!(without.digest, with.digest);
    assert!(without.weight_bytes < with.weight_bytes);

    for case in ["deepseek-v2", "llama-rope3"] {
        let files = Files::folder(folder(case)).unwrap();
        let refusal = load(Reference::new(), &files, &LoadOptions { mtp: true, ..options() }).err().unwrap();
        assert!(matches!(&refusal, LoadError::Unsupported { .. }), "{refusal}");
        assert!(refusal.to_string().contains("multi-token prediction"), "{refusal}");
    }
}
