//! Collectives: ranks on threads of one process that meet, each on its own device.
//!
//! Invariant: what ranks ask for is compared before anything is computed, and sums are taken in the order of ranks, so every rank
//! has the same bits. A rank that waits for others gives up after the time that was set, never later.

use std::{collections::BTreeMap, time::Instant};

use crate::{
    array::{Fault, Refusal},
    constants::*,
    dtype,
    machine::{Machine, refusal},
    memory::Range,
    stream::{Action, Outcome, Progress, Task},
};

/// Ranks that were made from one root info.
pub struct Group {
    /// The communicator of each rank that has joined.
    pub ranks: Vec<Option<u64>>,
    meetings: BTreeMap<Key, Vec<Option<Part>>>,
}

pub struct Communicator {
    pub group: u64,
    pub rank: usize,
    device: u32,
    /// Collectives so far, and messages so far by (sender, receiver).
    collectives: u64,
    messages: BTreeMap<(usize, usize), u64>,
    pub error: i64,
}

/// Which meeting: the n-th of all ranks, or the n-th message from one rank to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    All(u64),
    Pair(usize, usize, u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    AllReduce { op: i64 },
    AllGather,
    ReduceScatter { op: i64 },
    Broadcast { root: usize },
    Message { from: usize, to: usize },
    Barrier,
}

/// What a rank asks for. `count` is as the exported call has it; ranks must agree on all but the addresses.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    pub kind: Kind,
    pub dtype: i32,
    pub count: u64,
    pub send: u64,
    pub receive: u64,
}

#[derive(Clone, Copy)]
struct Part {
    ask: Ask,
    stream: u64,
    position: u64,
    /// Set when the meeting took place, until the rank's own stream has come by.
    met: bool,
}

/// The task of one rank.
#[derive(Clone)]
pub struct Meeting {
    group: u64,
    key: Key,
    communicator: u64,
}

impl Ask {
    /// Bytes that this rank sends and receives.
    fn ranges(&self, ranks: u64) -> (Range, Range) {
        let bytes = |elements| dtype::bytes(self.dtype, elements);
        let (send, receive) = match self.kind {
            Kind::AllGather => (self.count, self.count * ranks),
            Kind::ReduceScatter { .. } => (self.count * ranks, self.count),
            _ => (self.count, self.count),
        };
        (Range::new(self.send, bytes(send)), Range::new(self.receive, bytes(receive)))
    }

    fn agrees(&self, other: &Self) -> bool {
        (self.kind, self.dtype, self.count) == (other.kind, other.dtype, other.count)
    }
}

impl Machine {
    /// A rank joins a group of `size`; its communicator. The group is whole when all have joined.
    pub fn join_group(&mut self, id: u64, size: usize, rank: usize) -> Result<u64, Refusal> {
        let device = self.current_device().map_err(|r| refusal!(HCCL_E_RUNTIME, "{}", r.message))?;
        let group = self
            .groups_of_ranks
            .entry(id)
            .or_insert_with(|| Group { ranks: vec![None; size], meetings: BTreeMap::new() });
        if group.ranks.len() != size || rank >= size {
            let have = group.ranks.len();
            return Err(refusal!(HCCL_E_PARA, "rank {rank} of {size}, where other ranks said {have}"));
        }
        if group.ranks[rank].is_some() {
            return Err(refusal!(HCCL_E_PARA, "rank {rank} has joined before"));
        }
        let taken = |handle: &u64| self.communicators.get(*handle).is_ok_and(|c| c.device == device);
        if group.ranks.iter().flatten().any(taken) {
            return Err(refusal!(HCCL_E_PARA, "device {device} is another rank's: each rank has one of its own"));
        }
        let communicator =
            Communicator { group: id, rank, device, collectives: 0, messages: BTreeMap::new(), error: HCCL_SUCCESS };
        let handle = self.communicators.insert(communicator);
        group.ranks[rank] = Some(handle);
        Ok(handle)
    }

    /// Queues one rank's part of a meeting.
    pub fn post(&mut self, name: &'static str, communicator: u64, ask: Ask, stream: u64) -> Result<(), Refusal> {
        let state = self.communicators.get_mut(communicator)?;
        let (id, rank) = (state.group, state.rank);
        let key = match ask.kind {
            Kind::Message { from, to } => {
                let count = state.messages.entry((from, to)).or_default();
                *count += 1;
                Key::Pair(from, to, *count)
            }
            _ => {
                state.collectives += 1;
                Key::All(state.collectives)
            }
        };
        if self.streams.get(stream)?.capture.is_some() {
            return Err(refusal!(HCCL_E_NOT_SUPPORT, "a collective in a captured graph is not simulated"));
        }
        let size = self.groups_of_ranks[&id].ranks.len();
        let (send, receive) = ask.ranges(size as u64);
        let action = Action::Meet(Meeting { group: id, key, communicator });
        let ranges = [send, receive].into_iter().filter(|range| range.len > 0).collect();
        let position = self.submit(stream, Task { ranges, ..Task::plain(name, action) })?;
        let group = self.groups_of_ranks.get_mut(&id).expect("a communicator has a group");
        let parts = group.meetings.entry(key).or_insert_with(|| vec![None; size]);
        parts[rank] = Some(Part { ask, stream, position, met: false });
        Ok(())
    }

    /// One rank's stream has come to a meeting: waits for the others, lets their streams come to it too, computes for all.
    pub fn meet(&mut self, stream: u64, meeting: &Meeting) -> Result<Outcome, Refusal> {
        let Ok(rank) = self.communicators.get(meeting.communicator).map(|c| c.rank) else {
            return Ok(Outcome::Failed(Fault::Violation(
                "the communicator was destroyed before its task ran".to_owned(),
            )));
        };
        let parts = &self.groups_of_ranks[&meeting.group].meetings[&meeting.key];
        if parts[rank].is_some_and(|part| part.met) {
            self.leave(meeting, rank);
            return Ok(Outcome::Done);
        }
        let here: Vec<(usize, Part)> = parts.iter().enumerate().filter_map(|(r, p)| Some((r, (*p)?))).collect();
        let wanted = match meeting.key {
            Key::All(_) => parts.len(),
            Key::Pair(..) => 2,
        };
        if here.len() < wanted {
            return self.give_up_in_time(stream, meeting);
        }
        for (_, part) in here.iter().filter(|(other, _)| *other != rank) {
            let blocked = matches!(self.wait_for(part.stream, part.position - 1)?, Progress::Blocked(_));
            let context = self.streams.get(part.stream).map(|s| s.context);
            if blocked || !context.is_ok_and(|context| self.check_fault(context).is_ok()) {
                return self.give_up_in_time(stream, meeting);
            }
        }
        let (first, ask) = (here[0].0, here[0].1.ask);
        if let Some((other, part)) = here.iter().find(|(_, part)| !part.ask.agrees(&ask)) {
            let text = format!("rank {other} asks for {:?}, rank {first} for {ask:?}", part.ask);
            return Ok(self.disagree(meeting, &here, text));
        }
        if let Err(fault) = self.exchange(&here)? {
            return Ok(Outcome::Failed(fault));
        }
        let group = self.groups_of_ranks.get_mut(&meeting.group).expect("looked up above");
        let parts = group.meetings.get_mut(&meeting.key).expect("looked up above");
        parts.iter_mut().flatten().for_each(|part| part.met = true);
        self.leave(meeting, rank);
        crate::machine::notify();
        Ok(Outcome::Done)
    }

    fn leave(&mut self, meeting: &Meeting, rank: usize) {
        let group = self.groups_of_ranks.get_mut(&meeting.group).expect("a meeting has a group");
        let parts = group.meetings.get_mut(&meeting.key).expect("a rank leaves what it has posted");
        parts[rank] = None;
        if parts.iter().all(Option::is_none) {
            group.meetings.remove(&meeting.key);
        }
    }

    /// Blocked until the time that was set has passed, then failed.
    fn give_up_in_time(&mut self, stream: u64, meeting: &Meeting) -> Result<Outcome, Refusal> {
        let limit = self.settings.collective_timeout;
        let until = *self.streams.get_mut(stream)?.begun.get_or_insert_with(Instant::now) + limit;
        if Instant::now() < until {
            return Ok(Outcome::Blocked(Some(until)));
        }
        self.communicators.get_mut(meeting.communicator)?.error = HCCL_E_TIMEOUT;
        let text = format!("the other ranks did not come to {:?} within {} ms", meeting.key, limit.as_millis());
        Ok(Outcome::Failed(Fault::Code(ACL_ERROR_RT_TASK_TIMEOUT as i32, text)))
    }

    /// Fails every rank of a meeting.
    fn disagree(&mut self, meeting: &Meeting, here: &[(usize, Part)], text: String) -> Outcome {
        let ranks = self.groups_of_ranks[&meeting.group].ranks.clone();
        for (rank, part) in here {
            let communicator = ranks[*rank].and_then(|handle| self.communicators.get_mut(handle).ok());
            communicator.into_iter().for_each(|c| c.error = HCCL_E_PARA);
            if let Ok(context) = self.streams.get(part.stream).map(|s| s.context) {
                self.poison(context, "collective", Fault::Code(ACL_ERROR_RT_AICORE_EXCEPTION as i32, text.clone()));
            }
        }
        Outcome::Failed(Fault::Violation(text))
    }

    /// Computes a meeting of ranks that agree.
    fn exchange(&mut self, here: &[(usize, Part)]) -> Result<Result<(), Fault>, Refusal> {
        let (ask, size) = (here[0].1.ask, here.len() as u64);
        if ask.kind == Kind::Barrier {
            return Ok(Ok(()));
        }
        let mut sent = Vec::new();
        for (_, part) in here {
            let (context, range) = (self.streams.get(part.stream)?.context, part.ask.ranges(size).0);
            match self.run(context, |runtime| runtime.read(range).map(<[u8]>::to_vec))? {
                Ok(bytes) => sent.push(bytes),
                Err(fault) => return Ok(Err(fault)),
            }
        }
        let all = match ask.kind {
            Kind::AllReduce { op } | Kind::ReduceScatter { op } => reduce(ask.dtype, op, &sent),
            Kind::AllGather => sent.concat(),
            Kind::Broadcast { root } => sent.swap_remove(root),
            Kind::Message { from, .. } => {
                sent.swap_remove(here.iter().position(|(rank, _)| *rank == from).expect("both ranks are here"))
            }
            Kind::Barrier => unreachable!("returned above"),
        };
        for (rank, part) in here {
            let (context, range) = (self.streams.get(part.stream)?.context, part.ask.ranges(size).1);
            let bytes = match ask.kind {
                Kind::ReduceScatter { .. } => &all[*rank * range.len as usize..][..range.len as usize],
                Kind::Message { from, .. } if from == *rank => continue,
                _ => &all[..],
            };
            if let Err(fault) = self.run(context, |runtime| runtime.write(range).map(|to| to.copy_from_slice(bytes)))? {
                return Ok(Err(fault));
            }
        }
        Ok(Ok(()))
    }
}

/// Combines what the ranks sent, in their order; floats in f32, rounded once at the end.
fn reduce(dtype: i32, op: i64, sent: &[Vec<u8>]) -> Vec<u8> {
    fn fold<T: Copy>(sent: &[Vec<T>], combine: impl Fn(T, T) -> T) -> Vec<T> {
        let mut total = sent[0].clone();
        for rank in &sent[1..] {
            total.iter_mut().zip(rank).for_each(|(t, &v)| *t = combine(*t, v));
        }
        total
    }
    let elements = sent[0].len() / dtype::bytes(dtype, 1) as usize;
    let mut out = vec![0; sent[0].len()];
    if dtype::is_float(dtype) {
        let widened = |bytes: &Vec<u8>| {
            let mut values = vec![0.0_f32; elements];
            dtype::widen(dtype, bytes, &mut values);
            values
        };
        let sent: Vec<_> = sent.iter().map(widened).collect();
        let total = match op {
            HCCL_REDUCE_PROD => fold(&sent, |a, b| a * b),
            HCCL_REDUCE_MAX => fold(&sent, f32::max),
            HCCL_REDUCE_MIN => fold(&sent, f32::min),
            _ => fold(&sent, |a, b| a + b),
        };
        dtype::narrow(dtype, &total, &mut out);
    } else {
        let widened = |bytes: &Vec<u8>| {
            let mut values = vec![0_i64; elements];
            dtype::widen_ints(dtype, bytes, &mut values);
            values
        };
        let sent: Vec<_> = sent.iter().map(widened).collect();
        let total = match op {
            HCCL_REDUCE_PROD => fold(&sent, i64::wrapping_mul),
            HCCL_REDUCE_MAX => fold(&sent, i64::max),
            HCCL_REDUCE_MIN => fold(&sent, i64::min),
            _ => fold(&sent, i64::wrapping_add),
        };
        dtype::narrow_ints(dtype, &total, &mut out);
    }
    out
}
