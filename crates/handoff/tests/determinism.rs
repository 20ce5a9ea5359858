//! Determinism: every way against alone.

mod device;

use baton_handoff::{Found, Replay, ReplayError, Replayed, Task, Verdict, Way, determinism};
use device::{Device, cases, nothing};

const CONTEXT: usize = 64;

fn found(promised: bool, plant: impl FnMut(Way, &Task, &mut Replayed)) -> (Vec<(Way, Found)>, Verdict) {
    let determinism = determinism(&cases(), CONTEXT, promised, &mut Device(plant)).unwrap();
    (determinism.ways.iter().map(|way| (way.way, way.found.clone())).collect(), determinism.verdict())
}

#[test]
fn a_device_whose_rows_are_independent_is_equal_in_every_way() {
    let (ways, verdict) = found(true, nothing);
    let all = [Way::Batched, Way::Chunked, Way::Cached, Way::Preempted];
    assert_eq!(ways, all.map(|way| (way, Found::Equal)));
    assert_eq!(verdict, Verdict::Pass);
}

#[test]
fn one_bit_in_one_way_is_found_there_and_only_there() {
    type Plant = fn(&mut Replayed);
    fn flip(x: &mut f32) {
        *x = f32::from_bits(x.to_bits() ^ 1);
    }
    let plants: [(bool, usize, &str, Plant); 8] = [
        (true, 6, "its log-probability", |r| flip(&mut r.scores[6].best_logprob)),
        (true, 2, "the log-probability of the next id", |r| flip(r.scores[2].next.as_mut().unwrap())),
        (true, 3, "a log-probability asked for", |r| flip(&mut r.scores[3].targets[2])),
        (true, 1, "the best token", |r| r.scores[1].best ^= 1),
        (true, 0, "the number of scores", |r| r.scores.truncate(4)),
        (false, 7, "the token", |r| r.tokens[2] ^= 1),
        (false, 8, "the token's log-probability", |r| flip(&mut r.logprobs[3])),
        (false, 9, "the token", |r| r.tokens.truncate(4)),
    ];
    for (scored, position, what, plant) in plants {
        let (ways, verdict) = found(true, |way, task, replayed| {
            if way == Way::Chunked && task.ids[0] == 4 && task.score == scored {
                plant(replayed);
            }
        });
        assert_eq!(verdict, Verdict::Fail);
        for (way, found) in ways {
            match found {
                Found::Different(unequal) if way == Way::Chunked => {
                    assert_eq!((&*unequal.case, unequal.position, unequal.what), ("second", position, what));
                    assert_ne!(unequal.alone, unequal.got);
                }
                found => assert_eq!(found, Found::Equal, "{way}"),
            }
        }
    }
}

#[test]
fn ids_that_the_cache_saved_need_no_scores_but_the_others_do() {
    let lose = |more: usize| {
        move |way: Way, task: &Task, replayed: &mut Replayed| {
            if way == Way::Cached && task.score {
                replayed.scores.drain(..replayed.cached_ids + more);
            }
        }
    };
    let cached =
        |(ways, _): (Vec<(Way, Found)>, Verdict)| ways.into_iter().find(|(way, _)| *way == Way::Cached).unwrap().1;
    assert_eq!(cached(found(true, lose(0))), Found::Equal);
    assert!(matches!(cached(found(true, lose(1))), Found::Different(_)));
    let late = cached(found(true, |way, task, replayed| {
        lose(0)(way, task, replayed);
        if let (Way::Cached, Some(last)) = (way, replayed.scores.last_mut()) {
            last.best ^= 1;
        }
    }));
    let Found::Different(unequal) = late else { panic!("{late:?}") };
    assert_eq!(unequal.position, cases()[0].ids().count() - 1, "counted from the first id, cached or not");
}

#[test]
fn a_cache_that_was_not_used_is_no_proof() {
    let (ways, verdict) = found(true, |_, _, replayed| replayed.cached_ids = 0);
    assert!(matches!(ways[2], (Way::Cached, Found::NotExercised(_))));
    assert_eq!(verdict, Verdict::Pass, "of the other ways");
    let (ways, verdict) = {
        let determinism = determinism(&cases(), 1, true, &mut Device(nothing)).unwrap();
        (determinism.ways.clone(), determinism.verdict())
    };
    assert!(ways.iter().all(|way| matches!(way.found, Found::NotExercised(_))));
    assert_eq!(verdict, Verdict::Skipped);
}

#[test]
fn what_a_device_does_not_promise_is_shown_and_does_not_fail() {
    let (ways, verdict) = found(false, |way, _, replayed| {
        if way != Way::Alone {
            replayed.scores.iter_mut().for_each(|score| score.best_logprob -= 1e-3);
        }
    });
    assert!(ways.iter().all(|(_, found)| matches!(found, Found::NotPromised(_))));
    assert_eq!(verdict, Verdict::Skipped);
}

#[test]
fn a_device_that_loses_results_has_failed() {
    struct Lossy;
    impl Replay for Lossy {
        fn replay(&mut self, tasks: &[Task], way: Way) -> Result<Vec<Replayed>, ReplayError> {
            let mut all = Device(nothing).replay(tasks, way)?;
            all.pop();
            Ok(all)
        }
    }
    assert!(matches!(determinism(&cases(), CONTEXT, true, &mut Lossy), Err(ReplayError::Failed(_))));
}
