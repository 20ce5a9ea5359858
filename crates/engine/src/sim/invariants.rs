//! What holds after every step, each under its name, and for each a sabotage that it notices.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use baton_model::{PASSED, SequenceStep};

use super::fairness;
use super::world::{Record, World};
use crate::intake::Amount;
use crate::sequence::{Class, Rank, Sequence};
use crate::{EngineFailure, FinishReason, RequestId, Tenant};

/// A named property of a [`World`].
pub(crate) struct Invariant {
    pub name: &'static str,
    pub check: fn(&World) -> Result<(), String>,
    /// Whether it looks at the last step alone, not at all that ever was.
    pub is_of_a_step: bool,
    /// Breaks it in a world in which several requests run and wait.
    pub sabotage: fn(&mut World),
}

/// All of them.
pub(crate) const ALL: &[Invariant] = &[
    Invariant {
        name: "one terminal event",
        check: one_terminal_event,
        is_of_a_step: false,
        sabotage: |world| {
            let (id, _) = live(world).next().expect("something lives");
            world.core.abort(id, world.now).into_iter().for_each(|output| world.note(vec![output.clone(), output]));
        },
    },
    Invariant {
        name: "blocks are conserved",
        check: blocks_are_conserved,
        is_of_a_step: false,
        sabotage: |world| {
            world.core.scheduler_mut().leak_a_block();
        },
    },
    Invariant {
        name: "passing blocks are conserved",
        check: blocks_are_conserved,
        is_of_a_step: false,
        sabotage: |world| {
            world.core.scheduler_mut().leak_a_passing_block();
        },
    },
    Invariant {
        name: "what has passed is given back",
        check: what_has_passed_is_given_back,
        is_of_a_step: false,
        sabotage: |world| {
            world.core.scheduler_mut().give_too_much();
        },
    },
    Invariant {
        name: "the ended hold nothing, the others are kept",
        check: the_ended_hold_nothing,
        is_of_a_step: false,
        sabotage: |world| {
            world.core.scheduler_mut().lose_a_sequence();
        },
    },
    Invariant {
        name: "what waits and fits is scheduled",
        check: what_fits_is_scheduled,
        is_of_a_step: true,
        sabotage: |world| {
            world.last_step.plan = None;
        },
    },
    Invariant {
        name: "who runs advances",
        check: who_runs_advances,
        is_of_a_step: true,
        sabotage: |world| {
            world.last_step.plan.as_mut().expect("it stepped").sequences.remove(0);
        },
    },
    Invariant {
        name: "nobody waits for a step ahead",
        check: nobody_waits_for_a_step_ahead,
        is_of_a_step: true,
        sabotage: |world| {
            world.last_step.ahead = world.last_step.plan.clone();
            world.last_step.before_ahead.running.pop_last();
            world.last_step.before_ahead.available = world.spec.num_blocks;
        },
    },
    Invariant {
        name: "steps ahead take all along",
        check: steps_ahead_take_all_along,
        is_of_a_step: true,
        sabotage: |world| {
            world.last_step.ahead = world.last_step.plan.clone();
            world.last_step.ahead.as_mut().expect("it stepped").sequences.remove(0);
        },
    },
    Invariant {
        name: "nobody is overtaken",
        check: nobody_is_overtaken,
        is_of_a_step: true,
        sabotage: |world| {
            let (id, _) = live(world).last().expect("something waits");
            world.record_mut(id).request.priority = -1;
            world.last_step.holders.clear();
        },
    },
    Invariant {
        name: "the last are preempted",
        check: the_last_are_preempted,
        is_of_a_step: true,
        sabotage: |world| {
            let (id, _) = live(world).last().expect("something waits");
            world.record_mut(id).request.priority = -1;
            world.last_step.holders.insert(id);
        },
    },
    Invariant {
        name: "tenants are served alike",
        check: tenants_are_served_alike,
        is_of_a_step: true,
        sabotage: |world| {
            let alike = [1, 2].map(|number| (Class::Foreground, Tenant([number; 32])));
            world.fairness.observe(&alike.into());
            world.fairness.serve(alike[0], fairness::limit(&world.spec) + 1.0);
            world.fairness.observe(&alike.into());
        },
    },
    Invariant {
        name: "the background takes idle steps only",
        check: the_background_takes_idle_steps_only,
        is_of_a_step: true,
        sabotage: |world| {
            world.last_step.plan.as_mut().expect("it stepped").sequences[0].id = RequestId::BACKGROUND.0;
        },
    },
    Invariant {
        name: "nothing starts past its deadline",
        check: nothing_starts_past_its_deadline,
        is_of_a_step: false,
        sabotage: |world| {
            let now = world.now;
            let record = world.journal.values_mut().next().expect("something lives");
            record.request.deadline = Some(now);
            record.started = Some(record.arrival + now);
        },
    },
    Invariant {
        name: "nothing advances past its time limit",
        check: nothing_advances_past_its_time_limit,
        is_of_a_step: false,
        sabotage: |world| {
            let id = *world.last_step.planned().first().expect("it stepped");
            let now = world.now;
            let record = world.record_mut(id);
            record.request.time_limit = Some(now - record.arrival);
        },
    },
    Invariant {
        name: "tokens are those of the solo run",
        check: tokens_are_those_of_the_solo_run,
        is_of_a_step: false,
        sabotage: |world| {
            let record = world.journal.values_mut().find(|record| !record.tokens.is_empty()).expect("tokens are out");
            record.tokens[0] ^= 1;
        },
    },
    Invariant {
        name: "scores are those of the solo run",
        check: scores_are_those_of_the_solo_run,
        is_of_a_step: false,
        sabotage: |world| {
            let record = world.journal.values_mut().find(|record| !record.scores.is_empty()).expect("scores are out");
            record.scores[0].targets.push(0.0);
        },
    },
    Invariant {
        name: "only the faulty fail",
        check: only_the_faulty_fail,
        is_of_a_step: false,
        sabotage: |world| {
            let (id, _) = live(world).next().expect("something lives");
            let reason = FinishReason::Error(EngineFailure::NonFiniteLogits);
            world.record_mut(id).end = Some((reason, Default::default()));
        },
    },
    Invariant {
        name: "cached tokens are of the same scope and adapter",
        check: cached_tokens_are_of_the_same_scope_and_adapter,
        is_of_a_step: false,
        sabotage: |world| {
            let record = world
                .journal
                .values_mut()
                .find(|record| record.end.as_ref().is_some_and(|(_, usage)| usage.cached_tokens > 0));
            record.expect("a hit").request.cache_scope.salt.push(b'!');
        },
    },
    Invariant {
        name: "drafts take what is left",
        check: drafts_take_what_is_left,
        is_of_a_step: false,
        sabotage: |world| {
            world.core.scheduler_mut().keep_a_draft_block();
        },
    },
    Invariant {
        name: "drafts are counted",
        check: drafts_are_counted,
        is_of_a_step: false,
        sabotage: |world| {
            world.core.scheduler_mut().miscount_a_draft();
        },
    },
    Invariant {
        name: "gauges are true",
        check: gauges_are_true,
        is_of_a_step: false,
        sabotage: |world| {
            world.core.scheduler_mut().miscount_a_token();
        },
    },
];

fn live(world: &World) -> impl Iterator<Item = (RequestId, &Record)> {
    world.journal.iter().filter(|(_, record)| record.end.is_none()).map(|(&id, record)| (id, record))
}

/// `Err` with the text unless the condition holds.
fn ensure(holds: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(why()) }
}

fn one_terminal_event(world: &World) -> Result<(), String> {
    world.journal.iter().try_for_each(|(id, record)| {
        ensure(record.events_after_end == 0, || format!("{id:?} got {} events after its end", record.events_after_end))
    })
}

fn blocks_are_conserved(world: &World) -> Result<(), String> {
    let stats = world.core.stats();
    std::iter::once(stats.blocks).chain(stats.passing_blocks).try_for_each(|blocks| {
        ensure(blocks.free + blocks.cached + blocks.used == blocks.total, || format!("{blocks:?}"))
    })?;
    world.core.scheduler().check_blocks()
}

/// Between steps a sequence has the passing blocks that it may still read, up to the token that was sampled last.
fn what_has_passed_is_given_back(world: &World) -> Result<(), String> {
    let Some(passing) = world.spec.passing else { return Ok(()) };
    let block_size = world.spec.block_size;
    world.core.scheduler().running().values().try_for_each(|sequence| {
        let held = sequence.table.passing().iter().filter(|&&block| block != PASSED).count();
        let known = sequence.tokens.len();
        let end = if known > sequence.num_computed + 1 { sequence.num_computed } else { known };
        let needed = end.div_ceil(block_size) - passing.first(sequence.num_computed, block_size);
        ensure(held <= needed, || format!("{:?} holds {held} passing blocks and needs {needed}", sequence.id))
    })
}

fn the_ended_hold_nothing(world: &World) -> Result<(), String> {
    let scheduler = world.core.scheduler();
    let kept = |id: &RequestId| {
        usize::from(scheduler.running().contains_key(id)) + usize::from(scheduler.waiting().contains_key(id))
    };
    world.journal.iter().try_for_each(|(id, record)| {
        let expected = usize::from(record.end.is_none());
        ensure(kept(id) == expected, || format!("{id:?} is kept {} times, expected {expected}", kept(id)))
    })?;
    let in_doubt = scheduler.in_doubt();
    ensure(in_doubt.is_empty() || world.core.is_under_way(), || format!("{in_doubt:?} for no step"))?;
    scheduler.waiting().values().try_for_each(|sequence| {
        let table = &sequence.table;
        let holds_nothing = table.blocks().is_empty() && table.passing().is_empty();
        ensure(holds_nothing, || format!("{:?} waits and holds blocks", sequence.id))
    })
}

fn what_fits_is_scheduled(world: &World) -> Result<(), String> {
    let step = &world.last_step;
    let Some(plan) = &step.plan else {
        let stepped = !step.before.running.is_empty() || step.before.head.is_some();
        let excused = step.before.under_way || world.core.is_idle();
        return ensure(!stepped || excused, || "an empty step, and there was work".into());
    };
    ensure(!step.before.under_way, || "a step of known tokens behind one that is under way".into())?;
    // What the plan left.
    let after = &step.before_ahead;
    let Some(head) = after.head else { return Ok(()) };
    let (record, running) = (world.record(head), after.running.len());
    let (max_num_seqs, max_num_batched_tokens) = world.core.scheduler().limits();
    let needed = (record.request.prompt.len() + record.tokens.len()).div_ceil(world.spec.block_size);
    let preempted = step.before.running.iter().any(|id| world.core.scheduler().waiting().contains_key(id));
    // A block for each running sequence to spare.
    let fits = running < max_num_seqs
        && plan.sequences.iter().map(|step| step.tokens.count()).sum::<usize>() < max_num_batched_tokens
        && after.available >= needed + running
        && !preempted;
    let awaits_a_choice = after.running.iter().any(|&id| world.record(id).group == record.group);
    ensure(!fits || awaits_a_choice, || format!("{head:?} fits and is not part of the step"))
}

/// Whoever waits comes before a step that could be begun ahead: such a step is begun only if the first that waits lacks a
/// place, a row or blocks, or awaits another choice of its request.
fn nobody_waits_for_a_step_ahead(world: &World) -> Result<(), String> {
    let (step, scheduler) = (&world.last_step, world.core.scheduler());
    let (Some(ahead), Some(head)) = (&step.ahead, step.before_ahead.head) else { return Ok(()) };
    let (record, running) = (world.record(head), step.before_ahead.running.len());
    let needed = (record.request.prompt.len() + record.tokens.len()).div_ceil(world.spec.block_size);
    let (max_num_seqs, max_num_batched_tokens) = scheduler.limits();
    // Rows that others have before it: of those behind it one each.
    let rank = record.rank(head);
    let before_it = |id: RequestId| {
        let other = world.record(id).rank(id);
        (other.class, other.tenant) != (rank.class, rank.tenant) || other < rank
    };
    let rows = |step: &SequenceStep| if before_it(RequestId(step.id)) { step.tokens.count() } else { 1 };
    let fits = running < max_num_seqs
        && ahead.sequences.iter().map(rows).sum::<usize>() < max_num_batched_tokens
        && step.before_ahead.available >= needed + running;
    let awaits_a_choice = step.before_ahead.running.iter().any(|&id| world.record(id).group == record.group);
    ensure(!fits || awaits_a_choice || record.end.is_some(), || format!("{head:?} waits for a step ahead and fits"))
}

/// All those that a step ahead did not take along have ended.
fn steps_ahead_take_all_along(world: &World) -> Result<(), String> {
    let (step, scheduler) = (&world.last_step, world.core.scheduler());
    let Some(ahead) = &step.ahead else { return Ok(()) };
    let ids: BTreeSet<_> = ahead.sequences.iter().map(|step| RequestId(step.id)).collect();
    let left_out =
        step.before_ahead.running.iter().find(|id| !ids.contains(id) && scheduler.running().contains_key(id));
    ensure(left_out.is_none(), || format!("{left_out:?} runs and is not part of the step ahead"))
}

fn who_runs_advances(world: &World) -> Result<(), String> {
    if world.last_step.plan.is_none() {
        return Ok(());
    }
    let (planned, scheduler) = (world.last_step.planned(), world.core.scheduler());
    world.last_step.before.running.iter().try_for_each(|id| {
        let preempted = scheduler.waiting().contains_key(id);
        let late = matches!(world.record(*id).end, Some((FinishReason::Error(EngineFailure::DeadlineExceeded), _)));
        // After a step that failed, even the preempted may have been ended.
        let excused = preempted || late || world.core.down().is_some();
        ensure(planned.contains(id) || excused, || format!("{id:?} ran and is not part of the step"))
    })
}

/// Within a class and tenant: whoever a step admitted goes before all of them who wait.
fn nobody_is_overtaken(world: &World) -> Result<(), String> {
    let step = &world.last_step;
    let ranks = |ids: Vec<RequestId>| ids.into_iter().map(|id| world.record(id).rank(id)).collect::<Vec<_>>();
    let waiting = ranks(world.core.scheduler().waiting().into_keys().collect());
    let admitted = step.planned().into_iter().filter(|id| !step.holders.contains(id)).collect();
    ranks(admitted).into_iter().try_for_each(|admitted| {
        let of = |rank: &Rank| (rank.class, rank.tenant);
        let passed = waiting.iter().find(|rank| of(rank) == of(&admitted) && **rank < admitted);
        ensure(passed.is_none(), || format!("{admitted:?} was admitted, {passed:?} waits"))
    })
}

/// Within a class and tenant. And before anybody of the foreground is, for want of blocks, all of the background are.
fn the_last_are_preempted(world: &World) -> Result<(), String> {
    let (step, scheduler) = (&world.last_step, world.core.scheduler());
    let waiting = scheduler.waiting();
    let (preempted, others): (Vec<_>, Vec<_>) = step.holders.iter().partition(|id| waiting.contains_key(id));
    let rank = |id: RequestId| world.record(id).rank(id);
    let running = others.into_iter().copied().filter(|id| scheduler.running().contains_key(id));
    let running: Vec<Rank> = running.map(rank).collect();
    let admits = step.planned().iter().any(|id| !step.holders.contains(id));
    preempted.into_iter().copied().map(rank).try_for_each(|preempted| {
        let same = |other: &Rank| (other.class, other.tenant) == (preempted.class, preempted.tenant);
        let in_the_way = |other: &Rank| !admits && other.id.is_background() && !preempted.id.is_background();
        let stays = running.iter().find(|other| (same(other) && **other > preempted) || in_the_way(other));
        ensure(stays.is_none(), || format!("{preempted:?} was preempted, {stays:?} runs"))
    })
}

/// Of tenants that both wait all the time, none is served more than another by more than a constant.
fn tenants_are_served_alike(world: &World) -> Result<(), String> {
    let (gap, limit) = (world.fairness.widest_gap(), fairness::limit(&world.spec));
    ensure(gap <= limit || world.fairness.is_planted(), || format!("a gap of {gap:.1} between tenants, limit {limit}"))
}

/// What is left of the foreground after a step of the background was there before it.
fn the_background_takes_idle_steps_only(world: &World) -> Result<(), String> {
    let planned = world.last_step.planned();
    let ahead = world.last_step.ahead.iter().flat_map(|plan| &plan.sequences);
    let in_the_way = ahead.map(|step| RequestId(step.id)).find(|id| id.is_background());
    ensure(in_the_way.is_none(), || format!("a step of the background ahead: {in_the_way:?}"))?;
    let Some(id) = planned.iter().find(|id| id.is_background()) else { return Ok(()) };
    let foreground = planned.iter().copied().chain(live(world).map(|(id, _)| id)).find(|id| !id.is_background());
    ensure(foreground.is_none(), || format!("{id:?} is part of a step, and there was {foreground:?}"))
}

fn nothing_starts_past_its_deadline(world: &World) -> Result<(), String> {
    world.journal.iter().try_for_each(|(id, record)| {
        let (Some(started), Some(deadline)) = (record.started, record.request.deadline) else { return Ok(()) };
        ensure(started < record.arrival + deadline, || format!("{id:?} started at {started:?}"))
    })
}

fn nothing_advances_past_its_time_limit(world: &World) -> Result<(), String> {
    world.last_step.planned().into_iter().try_for_each(|id| {
        let record = world.record(id);
        let in_time = record.request.time_limit.is_none_or(|limit| world.now < record.arrival + limit);
        ensure(in_time, || format!("{id:?} was part of a step at {:?}", world.now))
    })
}

fn tokens_are_those_of_the_solo_run(world: &World) -> Result<(), String> {
    world.journal.iter().try_for_each(|(id, record)| {
        let (tokens, solo) = (&record.tokens, &record.solo);
        ensure(solo.starts_with(tokens), || format!("{id:?} got {tokens:?}, alone it gives {solo:?}"))?;
        let stop = tokens.iter().find(|token| record.request.stop_token_ids.contains(token));
        ensure(stop.is_none(), || format!("{id:?} got the stop token {stop:?}"))?;
        match &record.end {
            Some((FinishReason::Stop { token }, usage)) => {
                let stopped = solo.get(tokens.len()) == Some(token) && record.request.stop_token_ids.contains(token);
                ensure(stopped, || format!("{id:?} stopped with {token} after {tokens:?}, alone it gives {solo:?}"))?;
                ensure(usage.completion_tokens == tokens.len() + 1, || format!("{id:?} counts {usage:?}"))
            }
            Some((reason, usage)) => {
                ensure(usage.completion_tokens == tokens.len(), || format!("{id:?} counts {usage:?}"))?;
                let max_tokens = record.request.max_tokens as usize;
                let complete = *reason != FinishReason::Length || tokens.len() == max_tokens;
                ensure(complete, || format!("{id:?} ended after {} of {max_tokens} tokens", tokens.len()))
            }
            None => Ok(()),
        }
    })
}

/// Each position once and in order, and all of them before the first token; none that is told was found in the cache.
fn scores_are_those_of_the_solo_run(world: &World) -> Result<(), String> {
    world.journal.iter().try_for_each(|(id, record)| {
        let (scores, solo) = (&record.scores, &record.solo_scores);
        ensure(solo.starts_with(scores), || format!("{id:?} got {scores:?}, alone it gives {solo:?}"))?;
        let ended = matches!(record.end, Some((FinishReason::Stop { .. } | FinishReason::Length, _)));
        let complete = scores.len() == solo.len() || (record.tokens.is_empty() && !ended);
        ensure(complete, || format!("{id:?} got {} of {} scores", scores.len(), solo.len()))?;
        let cached = record.end.as_ref().map_or(0, |(_, usage)| usage.cached_tokens);
        let first = solo.first().map_or(cached, |first| first.position);
        ensure(cached <= first, || format!("{id:?} did not compute all that it tells"))
    })
}

fn only_the_faulty_fail(world: &World) -> Result<(), String> {
    let passed = |record: &Record, time: Option<Duration>| time.is_some_and(|time| record.arrival + time <= world.now);
    world.journal.iter().try_for_each(|(id, record)| match &record.end {
        Some((FinishReason::Error(EngineFailure::QueueTimeout), _)) => {
            let overdue = passed(record, record.request.deadline);
            ensure(overdue && record.started.is_none(), || format!("{id:?} timed out"))
        }
        Some((FinishReason::Error(EngineFailure::DeadlineExceeded), _)) => {
            ensure(passed(record, record.request.time_limit), || format!("{id:?} exceeded no deadline"))
        }
        Some((FinishReason::Error(EngineFailure::GrammarFailed(_)), _)) => {
            let fails = record.solo.len() < record.request.max_tokens as usize;
            ensure(fails && record.tokens == record.solo, || format!("{id:?} failed to follow its grammar"))
        }
        Some((FinishReason::Error(EngineFailure::AdapterLost), _)) => {
            let lost = record.request.adapter.as_ref().is_some_and(|adapter| adapter.current().is_none());
            ensure(lost, || format!("{id:?} lost no adapter"))
        }
        Some((FinishReason::Error(failure), _)) => {
            ensure(record.faulty, || format!("{id:?} failed without a fault: {failure}"))
        }
        Some((FinishReason::Aborted, _)) => ensure(record.aborted, || format!("{id:?} was not aborted")),
        _ => Ok(()),
    })
}

/// A hit has a source: a foreground request of the same scope and adapter that started before, with the same first
/// tokens.
fn cached_tokens_are_of_the_same_scope_and_adapter(world: &World) -> Result<(), String> {
    world.journal.iter().try_for_each(|(id, record)| {
        let Some((_, usage)) = &record.end else { return Ok(()) };
        let prompt = &record.request.prompt;
        let cached = usage.cached_tokens;
        ensure(cached < prompt.len() && cached % world.spec.block_size == 0, || format!("{id:?} counts {usage:?}"))?;
        let source = world.journal.iter().any(|(other_id, other)| {
            let (a, b) = (&other.request, &record.request);
            let same_scope = (&a.cache_scope, &a.adapter) == (&b.cache_scope, &b.adapter);
            let known = other.request.prompt.iter().chain(&other.tokens).take(cached);
            let first = record.started.is_none_or(|started| other.started <= Some(started));
            let published = other_id != id && !other_id.is_background() && other.started.is_some() && first;
            same_scope && published && known.eq(&prompt[..cached])
        });
        ensure(cached == 0 || source, || format!("{id:?} found {cached} tokens that nobody computed for it"))
    })
}

/// Of rows and blocks: no step is filled beyond the limit for drafts, and between steps no block is held for them.
fn drafts_take_what_is_left(world: &World) -> Result<(), String> {
    if let (Some(plan), Some(speculation)) = (&world.last_step.plan, &world.config.speculation) {
        let drafts: usize = plan.sequences.iter().map(|step| step.draft.len()).sum();
        let rows = plan.num_tokens();
        let limit = speculation.disable_by_batch_size.min(world.core.scheduler().limits().1);
        ensure(drafts == 0 || rows <= limit, || format!("{drafts} drafts in a step of {rows} rows, limit {limit}"))?;
    }
    world.core.scheduler().running().values().try_for_each(|sequence| {
        let (held, tokens) = (sequence.table.blocks().len(), sequence.tokens.len());
        let needed = tokens.div_ceil(world.spec.block_size);
        ensure(held <= needed, || format!("{:?} holds {held} blocks for {tokens} tokens", sequence.id))
    })
}

/// As many as the journal shows: what a step gave a client, as far as it is the draft that the step had for it.
fn drafts_are_counted(world: &World) -> Result<(), String> {
    let Some(stats) = world.core.stats().speculation else {
        return ensure(world.config.speculation.is_none(), || "no statistics of drafts".into());
    };
    let sum = |of: fn(&(usize, usize)) -> usize| world.drafts.iter().map(of).sum::<usize>() as u64;
    let by_position = stats.accepted_by_position.iter().sum();
    for (name, told, counted) in [
        ("drafts", stats.drafts, world.drafts.len() as u64),
        ("their tokens", stats.draft_tokens, sum(|draft| draft.0)),
        ("accepted", stats.accepted_tokens, sum(|draft| draft.1)),
        ("accepted by position", by_position, sum(|draft| draft.1)),
    ] {
        ensure(told == counted, || format!("{name}: told {told}, counted {counted}"))?;
    }
    Ok(())
}

fn gauges_are_true(world: &World) -> Result<(), String> {
    let (stats, scheduler, records) = (world.core.stats(), world.core.scheduler(), world.journal.values());
    let ended = records.clone().filter(|record| record.end.is_some()).count() as u64;
    let not_finite = FinishReason::Error(EngineFailure::NonFiniteLogits);
    let not_finite = records.clone().filter(|r| r.end.as_ref().is_some_and(|(reason, _)| *reason == not_finite));
    let not_finite = not_finite.count() as u64;
    let left_queue = [false, true].map(|background| {
        let class = world.journal.iter().filter(|(id, _)| id.is_background() == background);
        let left = class.filter(|(_, record)| record.started.is_some() || record.end.is_some());
        Amount::of(left.map(|(_, record)| &record.request))
    });
    let generated: usize = records
        .map(|record| record.end.as_ref().map_or(record.tokens.len(), |(_, usage)| usage.completion_tokens))
        .sum();
    let foreground = |all: BTreeMap<RequestId, &Sequence>| all.keys().filter(|id| !id.is_background()).count() as u64;
    let holders = scheduler.running().iter().map(|(&id, sequence)| (id, sequence)).collect();
    let background = live(world).filter(|(id, _)| id.is_background()).count() as u64;
    let held = scheduler.running().values().flat_map(|sequence| sequence.table.blocks());
    let in_doubt = scheduler.in_doubt().values().flat_map(|blocks| &blocks.kept);
    let held: BTreeSet<_> = held.chain(in_doubt).collect();
    for (name, told, counted) in [
        ("running", stats.running as u64, foreground(holders)),
        ("waiting", stats.waiting as u64, foreground(scheduler.waiting())),
        ("background", stats.background as u64, background),
        ("used blocks", stats.blocks.used as u64, held.len() as u64),
        ("finished", stats.finished.total(), ended),
        ("not finite", stats.finished.non_finite_logits, not_finite),
        ("generated tokens", stats.generated_tokens, generated as u64),
    ] {
        ensure(told == counted, || format!("{name}: told {told}, counted {counted}"))?;
    }
    let told = world.core.left_queue();
    ensure(told == left_queue, || format!("left the queues: told {told:?}, counted {left_queue:?}"))
}
