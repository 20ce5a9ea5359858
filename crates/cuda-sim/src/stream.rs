//! Queues of tasks, and when they run.
//!
//! Invariant: a task runs only when somebody waits for it: at a synchronise, a blocking copy, a query (one task each), or when a stream that
//! somebody waits for waits for it. So what is read without a synchronise was not computed yet, and page-locked memory that is written
//! again too early is seen with what it holds then. Tasks of a stream run in order.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    blas::Product,
    codes::{cuda, flag},
    collective::Meeting,
    emulator::Launch,
    machine::{Capture, Fail, Guard, Machine, Record, Tasks, fail, notify, wait},
    memory::Place,
};

/// One end of a copy.
#[derive(Clone)]
pub enum Side {
    Device(u64),
    /// Page-locked memory, looked at when the copy runs.
    Pinned(u64),
    /// Memory that the caller promised to keep, looked at when the copy runs.
    Pageable(u64),
    /// Bytes as they were at the call.
    Taken(Arc<[u8]>),
}

#[derive(Clone)]
pub enum Task {
    Launch(Arc<Launch>),
    Copy {
        to: Side,
        from: Side,
        bytes: u64,
    },
    /// `count` times the lowest `width` bytes of `value`.
    Fill {
        at: u64,
        value: u32,
        width: u64,
        count: u64,
    },
    Product(Arc<Product>),
    Record,
    /// Until the stream has completed its task at the position.
    Wait {
        stream: u64,
        position: u64,
    },
    /// One rank's part of a collective.
    Meet(Meeting),
    /// Every task of a captured graph.
    Graph(Tasks),
    /// Fails.
    Fault(Fail),
}

pub struct Stream {
    pub context: u64,
    pub flags: u32,
    pub queue: VecDeque<Task>,
    /// Tasks that were ever submitted, and of these how many are complete.
    pub submitted: u64,
    pub done: u64,
    /// The graph into which tasks are captured instead of queued.
    pub capture: Option<Capture>,
    /// Tasks of the graph at the head that are complete.
    cursor: usize,
    /// Set while the stream's tasks run, to notice streams that wait for each other.
    running: bool,
}

/// How far a stream came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    Done,
    /// It waits for something that was not submitted yet.
    Blocked,
}

impl Stream {
    pub fn new(context: u64, flags: u32) -> Self {
        Self { context, flags, queue: VecDeque::new(), submitted: 0, done: 0, capture: None, cursor: 0, running: false }
    }

    /// Drops what is queued, as if it were complete.
    pub fn abandon(&mut self) {
        self.queue.clear();
        self.done = self.submitted;
        self.cursor = 0;
    }
}

impl Machine {
    /// Puts a task at the end of a stream, or into the graph that is captured from it; its position in the stream.
    pub fn submit(&mut self, handle: u64, task: Task) -> Result<u64, Fail> {
        let stream = self.streams.get_mut(handle)?;
        if let Some(code) = self.contexts.get(stream.context)?.fault {
            return Err(fail!(code, "an error of a task before"));
        }
        let Some(capture) = &mut stream.capture else {
            stream.queue.push_back(task);
            stream.submitted += 1;
            notify();
            return Ok(stream.submitted);
        };
        if capture.broken {
            return Err(fail!(cuda::STREAM_CAPTURE_INVALIDATED, "the stream's capture is invalid"));
        }
        capture.tasks.push(task);
        Ok(stream.submitted)
    }

    /// Runs tasks of a stream until the one at `position` is complete.
    pub fn advance(&mut self, handle: u64, position: u64) -> Result<Progress, Fail> {
        let stream = self.streams.get_mut(handle)?;
        if stream.done >= position {
            return Ok(Progress::Done);
        }
        if std::mem::replace(&mut stream.running, true) {
            return Ok(Progress::Blocked);
        }
        let context = stream.context;
        let device = self.contexts.get(context)?.device;
        self.memory.open(device);
        let progress = self.run_tasks(handle, position);
        self.memory.close(device);
        if let Ok(stream) = self.streams.get_mut(handle) {
            stream.running = false;
        }
        progress.or_else(|failure| {
            self.poison(context, failure);
            Ok(Progress::Done)
        })
    }

    fn run_tasks(&mut self, handle: u64, position: u64) -> Result<Progress, Fail> {
        loop {
            let stream = self.streams.get(handle)?;
            if stream.done >= position {
                return Ok(Progress::Done);
            }
            if self.settings.hang {
                return Ok(Progress::Blocked);
            }
            let before = stream.done;
            let task = stream.queue.front().expect("a task that is not done is in the queue").clone();
            if self.perform(handle, &task)? == Progress::Blocked {
                return Ok(Progress::Blocked);
            }
            let stream = self.streams.get_mut(handle)?;
            if stream.done == before {
                stream.queue.pop_front();
                stream.done += 1;
            }
        }
    }

    fn perform(&mut self, stream: u64, task: &Task) -> Result<Progress, Fail> {
        match task {
            Task::Launch(launch) => {
                self.function_is_live(launch)?;
                launch.run(self.settings.order)?;
                let ran = self.counters.kernels.entry(launch.name().to_owned()).or_default();
                ran.times += 1;
                ran.threads = ran.threads.max(launch.block.iter().map(|&n| u64::from(n)).product());
                ran.shared = ran.shared.max(u64::from(launch.shared));
            }
            Task::Copy { to, from, bytes } => self.copy(to, from, *bytes)?,
            Task::Fill { at, value, width, count } => {
                self.range(*at, width * count)?;
                let bytes = value.to_le_bytes();
                // SAFETY: the range lies in a live block, and its device is open while its tasks run.
                let filled = unsafe { std::slice::from_raw_parts_mut(*at as *mut u8, (width * count) as usize) };
                filled.chunks_exact_mut(*width as usize).for_each(|one| one.copy_from_slice(&bytes[..*width as usize]));
            }
            Task::Product(product) => {
                for (address, bytes) in product.ranges() {
                    self.range(address, bytes)?;
                }
                product.run();
            }
            Task::Record => {}
            Task::Wait { stream, position } => return self.wait_for(*stream, *position),
            Task::Meet(meeting) => return self.meet(meeting),
            Task::Graph(tasks) => {
                while let Some(task) = tasks.get(self.streams.get(stream)?.cursor) {
                    if self.perform(stream, task)? == Progress::Blocked {
                        return Ok(Progress::Blocked);
                    }
                    self.streams.get_mut(stream)?.cursor += 1;
                }
                self.streams.get_mut(stream)?.cursor = 0;
            }
            Task::Fault(failure) => return Err(failure.clone()),
        }
        Ok(Progress::Done)
    }

    /// A stream that was destroyed completed its tasks first, so nobody waits for it.
    pub fn wait_for(&mut self, stream: u64, position: u64) -> Result<Progress, Fail> {
        if self.streams.contains(stream) { self.advance(stream, position) } else { Ok(Progress::Done) }
    }

    /// A range of device memory that a task is about to touch.
    fn range(&self, address: u64, bytes: u64) -> Result<u32, Fail> {
        self.memory.device(address, bytes).map_err(|text| fail!(cuda::ILLEGAL_ADDRESS, "a task touches {text}"))
    }

    /// The address of a side, and its device if it has one.
    fn locate(&self, side: &Side, bytes: u64) -> Result<(u64, Option<u32>), Fail> {
        match side {
            Side::Device(at) => Ok((*at, Some(self.range(*at, bytes)?))),
            Side::Pinned(at) if !self.memory.is_pinned(*at, bytes) => {
                Err(fail!(cuda::ILLEGAL_ADDRESS, "page-locked memory at {at:#x} was freed before the copy ran"))
            }
            Side::Pinned(at) | Side::Pageable(at) => Ok((*at, None)),
            Side::Taken(taken) => Ok((taken.as_ptr() as u64, None)),
        }
    }

    /// Copies now.
    pub fn copy(&mut self, to: &Side, from: &Side, bytes: u64) -> Result<(), Fail> {
        let ((to, to_device), (from, from_device)) = (self.locate(to, bytes)?, self.locate(from, bytes)?);
        let devices = [to_device, from_device];
        devices.iter().flatten().for_each(|&device| self.memory.open(device));
        // SAFETY: device ranges lie in live blocks that are open, page-locked ones are live, the caller promised the others.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes as usize) };
        devices.iter().flatten().for_each(|&device| self.memory.close(device));
        let direction = match (from_device, to_device) {
            (None, Some(_)) => "host_to_device",
            (Some(_), None) => "device_to_host",
            (Some(_), Some(_)) => "device_to_device",
            (None, None) => "host_to_host",
        };
        let counted = self.counters.copies.entry(direction).or_default();
        *counted = (counted.0 + 1, counted.1 + bytes);
        Ok(())
    }

    /// What a pointer of host memory is as a side of a copy that runs later.
    pub fn host_side(&self, address: u64, bytes: u64) -> Result<Side, Fail> {
        match self.memory.place(address) {
            Place::Device => Err(fail!(cuda::INVALID_VALUE, "{address:#x} is device memory, not the host's")),
            Place::Pinned if self.memory.is_pinned(address, bytes) => Ok(Side::Pinned(address)),
            Place::Pinned => Err(fail!(cuda::INVALID_VALUE, "{bytes} bytes reach over the end of page-locked memory")),
            Place::Pageable => Ok(Side::Pageable(address)),
        }
    }

    /// What a device address is as a side of a copy.
    pub fn device_side(&self, address: u64, bytes: u64) -> Result<Side, Fail> {
        let known = self.memory.device(address, bytes);
        known.map(|_| Side::Device(address)).map_err(|text| fail!(cuda::INVALID_VALUE, "{text}"))
    }

    /// Lets a stream complete one more task, unless it has completed that at `position` or is gone; whether it had.
    pub fn poll(&mut self, handle: u64, position: u64) -> Result<bool, Fail> {
        let Ok(stream) = self.streams.get(handle) else { return Ok(true) };
        let (done, context) = (stream.done, stream.context);
        if done < position {
            self.advance(handle, done + 1)?;
        }
        match self.contexts.get(context)?.fault {
            Some(code) => Err(fail!(code, "a task failed")),
            None => Ok(done >= position),
        }
    }

    /// All streams of a context that the null stream waits for, and the null stream, with their last positions.
    pub fn blocking_streams(&self, context: u64) -> Vec<(u64, u64)> {
        let blocking = |s: &Stream| s.context == context && s.flags & flag::STREAM_NON_BLOCKING == 0;
        self.streams.iter().filter(|(_, s)| blocking(s)).map(|(handle, s)| (handle, s.submitted)).collect()
    }

    pub fn all_streams(&self, context: u64) -> Vec<(u64, u64)> {
        self.streams.iter().filter(|(_, s)| s.context == context).map(|(handle, s)| (handle, s.submitted)).collect()
    }

    /// Where an event that was recorded stands; `None` for one that never was.
    pub fn recorded(&self, event: u64) -> Result<Option<(u64, u64)>, Fail> {
        match self.events.get(event)?.record {
            Some(Record::Stream { stream, position }) => Ok(Some((stream, position))),
            Some(Record::Captured { .. }) => Err(fail!(cuda::CAPTURED_EVENT, "the event was recorded in a capture")),
            None => Ok(None),
        }
    }
}

/// Waits until each stream has completed its task at the position.
pub fn synchronize(mut guard: Guard, targets: &[(u64, u64)]) -> (Guard, Result<(), Fail>) {
    for &(stream, position) in targets {
        let Ok(context) = guard.streams.get(stream).map(|found| found.context) else { continue };
        loop {
            if guard.contexts.get(context).is_err() {
                return (guard, Err(fail!(cuda::CONTEXT_IS_DESTROYED, "the context ended meanwhile")));
            }
            // Destroyed alone, a stream has completed what was queued.
            if guard.streams.get(stream).is_err() {
                break;
            }
            let blocked = match guard.advance(stream, position) {
                Ok(progress) => progress == Progress::Blocked,
                Err(failure) => return (guard, Err(failure)),
            };
            let fault = guard.contexts.get(context).ok().and_then(|context| context.fault);
            if let Some(code) = guard.settings.lost.or(fault) {
                return (guard, Err(fail!(code, "a task failed")));
            }
            if !blocked {
                break;
            }
            guard = wait(guard);
        }
    }
    (guard, Ok(()))
}
