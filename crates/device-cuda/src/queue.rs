//! The list of what a step does, collected before any of it runs, and graphs of lists that came before.
//!
//! A decode step is the same few hundred launches again and again, with other contents at the same addresses. So launches are
//! not made at once. When something must be brought to the host, or to the device where queued work reads it, the list
//! runs: one by one the first time, captured as a graph the second, and from then on as that graph, which costs the host
//! one call.
//!
//! While steps are rehearsed, lists do not run at all: each becomes a graph, so that it is known what these take.
//!
//! Invariant: a graph runs for a list only if the list is word for word the one that it was made of: functions, shapes,
//! arguments, and of library calls the whole key. What is not in the list (contents of buffers) is read when it runs.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

use baton_device::Result;
use cudarc::driver::sys::{self, CUgraphExec, CUresult, CUstream, CUstreamCaptureMode};

use crate::context::{Context, Owned};
use crate::gpu::{Arg, Launch};
use crate::program::Kernel;
use crate::staging::{self, Arrival, Staging};
use crate::statistics::{Counters, add};

/// Lists that are remembered, of those that were seen once and of those that have graphs, and their words in all: where ranks sum
/// between graphs a step is two lists a layer, and without ranks it is one of some thousands of words.
const LISTS: usize = 1024;
const WORDS: usize = 1 << 20;
/// The shortest list that is taken to be worth a graph, which was not measured.
const WORTHWHILE: usize = 4;
/// Commands after which a list runs anyway, so that the device is not idle during a long step's queueing.
const LONGEST: usize = 4096;

/// A call that puts work on a stream.
type Call = Box<dyn Fn(&Context, CUstream) -> Result<()> + Send>;

enum Command {
    Kernel { kernel: Kernel, launch: Launch, args: Range<usize> },
    Call(Call),
}

/// What was queued, and the stream that it will run on.
pub(crate) struct Queue {
    stream: Owned<CUstream>,
    staging: Staging,
    commands: Vec<Command>,
    /// Everything about the commands, one after the other: what two equal lists have in common. Arguments are passed from
    /// here.
    words: Vec<u64>,
    /// Where in `words` each argument of each kernel is.
    args: Vec<usize>,
    /// Lists that were seen once, the latest first.
    seen: VecDeque<Vec<u64>>,
    /// Lists that were seen again, the latest first.
    lists: VecDeque<List>,
    /// Graphs that are not needed any more and may still run, each with the number of fetches before it was retired.
    retired: Vec<(u64, Owned<CUgraphExec>)>,
    /// Fetches so far.
    fetches: u64,
    /// Whether the stream was given anything since the last of them.
    behind: bool,
    graphs: bool,
    /// Lists do not run, but become graphs.
    rehearsing: bool,
}

struct List {
    words: Vec<u64>,
    /// `None` if the list could not be captured.
    graph: Option<Owned<CUgraphExec>>,
}

impl Queue {
    pub(crate) fn new(context: &Arc<Context>, graphs: bool) -> Result<Self> {
        Ok(Self {
            stream: staging::stream(context)?,
            staging: Staging::new(context)?,
            commands: Vec::new(),
            words: Vec::new(),
            args: Vec::new(),
            seen: VecDeque::new(),
            lists: VecDeque::new(),
            retired: Vec::new(),
            fetches: 0,
            behind: false,
            graphs,
            rehearsing: false,
        })
    }

    /// Queues a kernel, which is compiled.
    pub(crate) fn push(&mut self, kernel: &Kernel, launch: Launch, args: &[Arg]) {
        let function = kernel.function().expect("compiled");
        let Launch { grid, block, shared } = launch;
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        self.words.extend([
            function as u64,
            pair(grid[0], grid[1]),
            pair(grid[2], block[0]),
            pair(block[1], block[2]),
            pair(shared, args.len() as u32),
        ]);
        let first = self.args.len();
        for arg in args {
            self.args.push(self.words.len());
            match arg {
                Arg::Ptr(address) => self.words.push(*address),
                Arg::I32(value) => self.words.push(u64::from(value.cast_unsigned())),
                Arg::I64(value) => self.words.push(value.cast_unsigned()),
                Arg::F32(value) => self.words.push(u64::from(value.to_bits())),
                Arg::Bytes(bytes) => self.words.extend(bytes.chunks(8).map(|part| {
                    let mut word = [0; 8];
                    word[..part.len()].copy_from_slice(part);
                    u64::from_ne_bytes(word)
                })),
            }
        }
        self.commands.push(Command::Kernel { kernel: kernel.clone(), launch, args: first..self.args.len() });
    }

    /// Queues a call that `op` and `key` say everything about.
    pub(crate) fn push_call(&mut self, op: &'static str, key: &[u64], call: Call) {
        // Names are compared by their text: it is short, and a key of another operation may look alike.
        self.words.push(op.len() as u64 | (key.len() as u64) << 32);
        self.words.extend(op.bytes().map(u64::from));
        self.words.extend(key);
        self.commands.push(Command::Call(call));
    }

    /// Whether something queued has an address in the range among its arguments. An address within a buffer counts as the
    /// buffer's only if it is in the range: whoever overwrites a buffer passes its beginning.
    pub(crate) fn uses(&self, range: &Range<u64>) -> bool {
        self.words.iter().any(|word| range.contains(word))
    }

    /// Whether it is time to run.
    pub(crate) fn is_full(&self) -> bool {
        self.commands.len() >= LONGEST
    }

    /// Runs the list, or rehearses it.
    pub(crate) fn flush(&mut self, context: &Arc<Context>, counters: &Counters) -> Result<()> {
        if self.commands.is_empty() {
            return Ok(());
        }
        add(&counters.launches, self.commands.len());
        self.behind = true;
        let worthwhile = self.graphs && self.commands.len() >= WORTHWHILE;
        let result = match (self.rehearsing, worthwhile) {
            (true, true) => self.measure(context),
            (true, false) => Ok(()),
            (false, true) => self.run_remembered(context, counters),
            (false, false) => {
                add(&counters.lists, 1);
                self.run(context)
            }
        };
        self.forget();
        result
    }

    /// From now on lists are not run: what they would take is found out.
    pub(crate) fn begin_rehearsal(&mut self) {
        self.rehearsing = true;
    }

    /// Lists run again. The bytes that graphs of the lists since then took together, and gave back: what capturing them left
    /// behind (code that libraries loaded, what the driver keeps) is in use from now on.
    pub(crate) fn end_rehearsal(&mut self, context: &Context) -> Result<u64> {
        self.forget();
        self.rehearsing = false;
        // Not as long as graphs are on their way to the device.
        self.synchronize(context)?;
        let (before, _) = context.memory()?;
        self.lists.clear();
        let (after, _) = context.memory()?;
        Ok(after.saturating_sub(before) as u64)
    }

    /// Makes the list's graph as if it came again; not of more lists than are kept.
    fn measure(&mut self, context: &Arc<Context>) -> Result<()> {
        let kept = kept_beside(self.words.len(), self.lists.iter().map(|list| list.words.len()));
        if kept < self.lists.len() || self.lists.iter().any(|list| list.words == self.words) {
            return Ok(());
        }
        let graph = self.capture(context)?;
        self.lists.push_front(List { words: self.words.clone(), graph });
        Ok(())
    }

    /// Begins a new list.
    fn forget(&mut self) {
        self.commands.clear();
        self.words.clear();
        self.args.clear();
    }

    /// Runs the list in the best way that is known of it.
    fn run_remembered(&mut self, context: &Arc<Context>, counters: &Counters) -> Result<()> {
        let graph = match self.known(context, counters)? {
            Some(graph) => graph,
            None => {
                add(&counters.lists, 1);
                return self.run(context);
            }
        };
        add(&counters.replays, 1);
        // SAFETY: a graph of this context, made of the list at hand.
        context.check("step", unsafe { sys::cuGraphLaunch(graph, self.stream.get()) })
    }

    /// The list's graph, made if it was seen before.
    fn known(&mut self, context: &Arc<Context>, counters: &Counters) -> Result<Option<CUgraphExec>> {
        if let Some(at) = self.lists.iter().position(|list| list.words == self.words) {
            let list = self.lists.remove(at).expect("as found");
            let graph = list.graph.as_ref().map(Owned::get);
            self.lists.push_front(list);
            return Ok(graph);
        }
        let Some(at) = self.seen.iter().position(|words| *words == self.words) else {
            self.seen.truncate(kept_beside(self.words.len(), self.seen.iter().map(Vec::len)));
            self.seen.push_front(self.words.clone());
            return Ok(None);
        };
        let words = self.seen.remove(at).expect("as found");
        let made = self.capture(context)?;
        let graph = made.as_ref().map(Owned::get);
        add(&counters.captures, usize::from(graph.is_some()));
        let kept = kept_beside(words.len(), self.lists.iter().map(|list| list.words.len()));
        let retired = self.lists.drain(kept..).filter_map(|list| list.graph);
        self.retired.extend(retired.map(|graph| (self.fetches, graph)));
        self.lists.push_front(List { words, graph: made });
        Ok(graph)
    }

    /// The list as a graph; `None` if something in it cannot be captured.
    fn capture(&self, context: &Arc<Context>) -> Result<Option<Owned<CUgraphExec>>> {
        let (mut graph, mut ready) = (std::ptr::null_mut(), std::ptr::null_mut());
        // Another thread may load meanwhile, which is none of this stream's business.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream of this context, valid out pointers; every graph that is made is destroyed once.
        let (captured, code) = unsafe {
            context.check("capture", sys::cuStreamBeginCapture_v2(self.stream.get(), mode))?;
            let captured = self.run(context);
            // Also behind a failure: else the stream would stay in capture.
            let mut code = sys::cuStreamEndCapture(self.stream.get(), &raw mut graph);
            if code == CUresult::CUDA_SUCCESS && !graph.is_null() {
                if captured.is_ok() {
                    code = sys::cuGraphInstantiateWithFlags(&raw mut ready, graph, 0);
                }
                if code == CUresult::CUDA_SUCCESS && !ready.is_null() {
                    // So that its launches find the room that they need, or there is no graph.
                    code = sys::cuGraphUpload(ready, self.stream.get());
                }
                sys::cuGraphDestroy(graph);
            }
            (captured, code)
        };
        // SAFETY: made once; whoever drops it has waited for what runs it.
        let give_back = |graph| _ = unsafe { sys::cuGraphExecDestroy(graph) };
        let ready = (!ready.is_null()).then(|| Owned::new(context, ready, give_back));
        let failure = captured.and_then(|()| context.check("capture", code)).err();
        context.whole()?;
        let made = ready.filter(|_| failure.is_none());
        if made.is_none() {
            let reason = failure.map_or_else(String::new, |error| error.to_string());
            tracing::warn!(
                device = context.name,
                commands = self.commands.len(),
                reason,
                "a step runs without a graph"
            );
        }
        Ok(made)
    }

    /// Puts every command on the stream.
    fn run(&self, context: &Context) -> Result<()> {
        let mut pointers = Vec::new();
        for command in &self.commands {
            match command {
                Command::Call(call) => call(context, self.stream.get())?,
                Command::Kernel { kernel, launch, args } => {
                    let word = |at: &usize| (&raw const self.words[*at]).cast_mut().cast::<c_void>();
                    pointers.clear();
                    pointers.extend(self.args[args.clone()].iter().map(word));
                    kernel.launch(context, launch, &mut pointers, self.stream.get())?;
                }
            }
        }
        Ok(())
    }

    /// Copies to the device behind what the stream was given, ahead of what is queued.
    pub(crate) fn upload(&mut self, context: &Context, counters: &Counters, address: u64, bytes: &[u8]) -> Result<()> {
        self.behind = true;
        if self.staging.upload(context, self.stream.get(), address, bytes)? {
            add(&counters.waits, 1);
            // Ranks that bring nothing to the host wait nowhere else.
            self.retired.clear();
        }
        Ok(())
    }

    /// Begins a copy to the host; nothing is queued.
    pub(crate) fn fetch(&mut self, context: &Arc<Context>, address: u64, bytes: usize) -> Result<Fetch> {
        let arrival = self.staging.fetch(context, self.stream.get(), address, bytes)?;
        self.fetches += 1;
        self.behind = false;
        Ok(Fetch { arrival, number: self.fetches, uploaded: self.staging.uploaded() })
    }

    /// The stream has passed a fetch. Whether it has passed everything, and nothing is queued.
    pub(crate) fn fetched(&mut self, fetch: &Fetch) -> bool {
        self.staging.passed(fetch.uploaded);
        self.retired.retain(|(fetches, _)| *fetches >= fetch.number);
        fetch.number == self.fetches && !self.behind && self.commands.is_empty()
    }

    /// Copies to the host and waits; nothing is queued.
    pub(crate) fn read(&mut self, context: &Context, address: u64, out: &mut [u8]) -> Result<()> {
        self.staging.read(context, self.stream.get(), address, out)?;
        self.passed();
        Ok(())
    }

    /// Waits for the stream; nothing is queued.
    pub(crate) fn synchronize(&mut self, context: &Context) -> Result<()> {
        staging::synchronize(context, self.stream.get())?;
        self.passed();
        Ok(())
    }

    fn passed(&mut self) {
        self.staging.passed(self.staging.uploaded());
        self.retired.clear();
    }
}

/// A copy to the host, and what the stream was given before it.
pub(crate) struct Fetch {
    pub(crate) arrival: Arrival,
    number: u64,
    uploaded: u64,
}

/// How many lists, of so many words each, the latest first, are kept beside a new one.
fn kept_beside(new: usize, lists: impl Iterator<Item = usize>) -> usize {
    let words = lists.scan(new, |words, list| {
        *words += list;
        Some(*words)
    });
    words.take(LISTS - 1).take_while(|words| *words <= WORDS).count()
}
