//! A device that computes a made-up model, golden cases of the same model, and faults to plant between them.
#![allow(dead_code)] // every test file uses its part

use std::collections::BTreeMap;

use baton_handoff::{Case, Replay, ReplayError, Replayed, Score, Task, Way};

pub const VOCAB: u32 = 8;
pub const END: u32 = 7;

/// Log-probabilities of the next token: any function of all ids before it will do.
pub fn logprobs(ids: &[u32]) -> Vec<f32> {
    let mix = |hash: u64, id: u32| (hash ^ u64::from(id + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    let context = ids.iter().fold(17, |hash, &id| mix(hash, id));
    let logits: Vec<f64> = (0..VOCAB).map(|id| (mix(context, id) >> 40) as f64 / f64::from(1 << 22)).collect();
    let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
    logits.iter().map(|logit| (logit - sum.ln()) as f32).collect()
}

/// Tokens by their log-probabilities, best first.
fn ranked(ids: &[u32]) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logprobs(ids)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all
}

/// What an honest device computes.
pub fn computed(task: &Task) -> Replayed {
    let mut replayed = Replayed::default();
    let mut ids = task.ids.clone();
    for position in 0..if task.score { ids.len() } else { 0 } {
        let all = logprobs(&ids[..=position]);
        let (best, best_logprob) = ranked(&ids[..=position])[0];
        let targets = task.targets.get(&(position as u32)).into_iter().flatten();
        replayed.scores.push(Score {
            best,
            best_logprob,
            next: ids.get(position + 1).map(|&id| all[id as usize]),
            targets: targets.map(|&id| all[id as usize]).collect(),
        });
    }
    while replayed.tokens.len() < task.generate as usize && replayed.tokens.last() != Some(&END) {
        let (best, logprob) = ranked(&ids)[0];
        ids.push(best);
        replayed.tokens.push(best);
        replayed.logprobs.push(logprob);
    }
    replayed
}

/// A golden case whose trainer computed with `logprobs`.
pub fn case(name: &str, prompt: &[u32], answer: u32) -> Case {
    let task = Task { ids: prompt.to_vec(), generate: answer, ..Task::default() };
    let greedy_ids = computed(&task).tokens;
    let ids = [prompt, &greedy_ids].concat();
    let top = |position: usize| ranked(&ids[..=position])[..3].iter().map(|&(id, x)| (id, x.into())).collect();
    let ahead = |position: usize| {
        let all = ranked(&ids[..position]);
        f64::from(all[0].1) - f64::from(all[1].1)
    };
    Case {
        name: name.into(),
        chat: None,
        prompt: None,
        prompt_ids: prompt.to_vec(),
        margins: (prompt.len()..ids.len()).map(ahead).collect(),
        logprobs: (1..ids.len()).map(|end| logprobs(&ids[..end])[ids[end] as usize].into()).collect(),
        top: (0..ids.len()).map(|position| (position as u32, top(position))).collect::<BTreeMap<_, _>>(),
        greedy_ids,
    }
}

/// Three cases of different lengths.
pub fn cases() -> Vec<Case> {
    vec![case("first", &[1, 2, 3], 4), case("second", &[4, 4, 5, 0, 2], 6), case("third", &[6], 3)]
}

/// A device with a fault: `plant` changes what an honest one computes.
pub struct Device<F>(pub F);

impl<F: FnMut(Way, &Task, &mut Replayed)> Replay for Device<F> {
    fn replay(&mut self, tasks: &[Task], way: Way) -> Result<Vec<Replayed>, ReplayError> {
        let replay = |task: &Task| {
            let mut replayed = computed(task);
            replayed.cached_ids = if way == Way::Cached { task.ids.len() / 2 } else { 0 };
            (self.0)(way, task, &mut replayed);
            replayed
        };
        Ok(tasks.iter().map(replay).collect())
    }
}

/// The plant of an honest device.
pub fn nothing(_: Way, _: &Task, _: &mut Replayed) {}
