//! Communicators of several simulated devices in one process, and the rounds in which their ranks meet.
//!
//! Invariant: a rank's n-th collective that runs belongs to the n-th round of its ring, whether it was queued or comes from a graph. The last
//! rank to come computes for all; sums are taken in the order of ranks, rounded at each step.

use std::collections::BTreeMap;

use half::{bf16, f16};

use crate::{
    codes::cuda,
    dtype::DType,
    machine::{Fail, Machine, fail, notify},
    stream::Progress,
};

pub struct Communicator {
    pub ring: u64,
    pub rank: u32,
    pub device: u32,
    /// The stream on which its last collective was queued.
    pub stream: Option<u64>,
    /// Collectives that are complete.
    rounds: u64,
}

impl Communicator {
    pub fn new(ring: u64, rank: u32, device: u32) -> Self {
        Self { ring, rank, device, stream: None, rounds: 0 }
    }
}

/// The ranks of one communicator.
#[derive(Default)]
pub struct Ring {
    pub size: u32,
    /// Communicators by rank.
    pub ranks: BTreeMap<u32, u64>,
    /// Somebody gave up: nobody waits any more, and results are not defined.
    pub aborted: bool,
    rounds: BTreeMap<u64, Round>,
}

#[derive(Default)]
struct Round {
    came: BTreeMap<u32, Meeting>,
    left: u32,
    /// How it came out, once all have come.
    outcome: Option<Result<(), Fail>>,
}

/// One rank's part of a collective.
#[derive(Clone, Copy, Debug)]
pub struct Meeting {
    pub communicator: u64,
    pub from: u64,
    pub to: u64,
    pub count: u64,
    pub kind: Kind,
}

/// What becomes of the elements of all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Sum(DType),
    /// All get those of this rank, which are words of 32 bits.
    Of(u32),
}

impl Meeting {
    pub fn bytes(&self) -> u64 {
        self.count
            * match self.kind {
                Kind::Sum(dtype) => dtype.bytes(),
                Kind::Of(_) => size_of::<u32>() as u64,
            }
    }
}

impl Machine {
    /// A rank comes to its next round. It waits for those that did not come yet, after it has let the device run their streams.
    pub fn meet(&mut self, meeting: &Meeting) -> Result<Progress, Fail> {
        let gone = |_| fail!(cuda::LAUNCH_FAILED, "a collective runs after its communicator was destroyed");
        let own = self.communicators.get(meeting.communicator).map_err(gone)?;
        let (ring, rank, number) = (own.ring, own.rank, own.rounds);
        if self.arrive(ring, rank, number, meeting)? {
            return self.depart(ring, number, meeting);
        }
        let others: Vec<u64> = self.rings[&ring].ranks.values().copied().collect();
        for other in others {
            let stream = self.communicators.get(other).ok().and_then(|c| c.stream);
            if let Some((stream, queued)) = stream.and_then(|s| Some((s, self.streams.get(s).ok()?.submitted))) {
                self.advance(stream, queued)?;
            }
        }
        match self.arrive(ring, rank, number, meeting)? {
            true => self.depart(ring, number, meeting),
            false => Ok(Progress::Blocked),
        }
    }

    /// Whether all have come, or nobody waits any more.
    fn arrive(&mut self, ring: u64, rank: u32, number: u64, meeting: &Meeting) -> Result<bool, Fail> {
        let found = self.rings.get_mut(&ring).expect("a communicator has its ring");
        let size = found.size;
        let round = found.rounds.entry(number).or_default();
        if found.aborted {
            return Ok(true);
        }
        if let Some(outcome) = &round.outcome {
            return outcome.clone().map(|()| true);
        }
        round.came.insert(rank, *meeting);
        if round.came.len() < size as usize {
            return Ok(false);
        }
        let parts: Vec<Meeting> = round.came.values().copied().collect();
        let outcome = self.exchange(&parts);
        let round = self.rings.get_mut(&ring).and_then(|found| found.rounds.get_mut(&number));
        round.expect("found above").outcome = Some(outcome.clone());
        notify();
        outcome.map(|()| true)
    }

    fn depart(&mut self, ring: u64, number: u64, meeting: &Meeting) -> Result<Progress, Fail> {
        self.communicators.get_mut(meeting.communicator)?.rounds += 1;
        let found = self.rings.get_mut(&ring).expect("a communicator has its ring");
        let size = found.size;
        if let Some(round) = found.rounds.get_mut(&number) {
            round.left += 1;
            if round.left == size {
                found.rounds.remove(&number);
            }
        }
        Ok(Progress::Done)
    }

    /// `parts`: of all ranks, in their order.
    fn exchange(&mut self, parts: &[Meeting]) -> Result<(), Fail> {
        let first = parts[0];
        if parts.iter().any(|part| (part.count, part.kind) != (first.count, first.kind)) {
            return Err(fail!(cuda::LAUNCH_FAILED, "ranks meet with different counts or kinds: {parts:?}"));
        }
        let mut devices = Vec::new();
        for part in parts {
            for address in [part.from, part.to] {
                let device = self.memory.device(address, part.bytes());
                devices.push(device.map_err(|text| fail!(cuda::ILLEGAL_ADDRESS, "a collective touches {text}"))?);
            }
        }
        devices.iter().for_each(|&device| self.memory.open(device));
        match first.kind {
            Kind::Sum(dtype) => {
                let mut sum = read(&first, dtype);
                for part in &parts[1..] {
                    let value = read(part, dtype);
                    sum.iter_mut().zip(value).for_each(|(sum, value)| *sum = round(dtype, *sum + value));
                }
                parts.iter().for_each(|part| write(part, dtype, &sum));
            }
            Kind::Of(rank) => {
                let root = parts[rank as usize];
                // SAFETY: all ranges are live and open, and each has as many bytes.
                parts.iter().for_each(|part| unsafe {
                    std::ptr::copy(root.from as *const u8, part.to as *mut u8, root.bytes() as usize);
                });
            }
        }
        devices.iter().for_each(|&device| self.memory.close(device));
        Ok(())
    }
}

fn round(dtype: DType, value: f32) -> f32 {
    match dtype {
        DType::F32 => value,
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
    }
}

fn read(part: &Meeting, dtype: DType) -> Vec<f32> {
    let at = |i: u64| {
        // SAFETY: the range is live and open.
        unsafe {
            match dtype {
                DType::F32 => (part.from as *const f32).add(i as usize).read_unaligned(),
                DType::F16 => (part.from as *const f16).add(i as usize).read_unaligned().to_f32(),
                DType::BF16 => (part.from as *const bf16).add(i as usize).read_unaligned().to_f32(),
            }
        }
    };
    (0..part.count).map(at).collect()
}

fn write(part: &Meeting, dtype: DType, values: &[f32]) {
    for (i, &value) in values.iter().enumerate() {
        // SAFETY: the range is live and open.
        unsafe {
            match dtype {
                DType::F32 => (part.to as *mut f32).add(i).write_unaligned(value),
                DType::F16 => (part.to as *mut f16).add(i).write_unaligned(f16::from_f32(value)),
                DType::BF16 => (part.to as *mut bf16).add(i).write_unaligned(bf16::from_f32(value)),
            }
        }
    }
}
