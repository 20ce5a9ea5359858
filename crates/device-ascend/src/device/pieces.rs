//! Collecting calls, and what becomes of a piece when it ends. The design stands in [`crate::graphs`].
//!
//! Invariant: whatever is given to the stream, by whichever function, is behind all calls that were collected before.

use std::sync::{Arc, OnceLock};

use super::Device;
use crate::abi::Graph;
use crate::abi::codes::Class;
use crate::abi::consts::{capture_mode, memcpy_kind};
use crate::abi::runtime::GraphFunctions;
use crate::error::AscendError;
use crate::graphs::{Call, Graphs, LEAST_CALLS, MOST_CALLS, MOST_GRAPHS, Met, Piece};

/// What a device has for it.
pub(crate) struct Pieces {
    /// The operation whose calls are being collected.
    collecting: Option<&'static str>,
    calls: Piece,
    /// What is being done with a piece that has ended, whose scratch memory the pool does not know to be in use.
    ending: Option<Ending>,
    graphs: Graphs<Piece, Graph>,
    functions: Option<GraphFunctions>,
    /// Why no graph is made, once there is a reason.
    objection: Arc<OnceLock<String>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Issue,
    Capture,
}

impl Pieces {
    pub(crate) fn new(functions: Option<GraphFunctions>, objection: Arc<OnceLock<String>>) -> Self {
        if functions.is_none() {
            // Where there was one before, that is the reason.
            let _ = objection.set("the runtime has no functions for them".into());
        }
        let graphs = Graphs::new(MOST_GRAPHS);
        Self { collecting: None, calls: Vec::new(), ending: None, graphs, functions, objection }
    }

    /// Whether something is collected.
    pub(crate) fn is_pending(&self) -> bool {
        !self.calls.is_empty()
    }

    /// Whether a piece is being issued.
    pub(super) fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    pub(super) fn is_capturing(&self) -> bool {
        self.ending == Some(Ending::Capture)
    }

    /// Forgets what was collected: the step that it belongs to has failed.
    pub(crate) fn forget(&mut self) {
        (self.collecting, self.calls) = (None, Vec::new());
    }

    /// Of use: a graph may be made, or there is one.
    fn are_of_use(&self) -> bool {
        self.objection.get().is_none() || !self.graphs.is_empty()
    }

    /// No graph is made any more.
    fn stop(&mut self, error: &AscendError) {
        let _ = self.objection.set(error.to_string());
    }

    /// Nothing counts as met, so that calls bring a workspace that suffices before they are captured.
    pub(super) fn start_anew(&mut self) {
        self.graphs.forget();
    }

    /// No graph is run any more.
    pub(super) fn retire_graphs(&mut self) {
        self.graphs.retire_all();
    }

    /// Destroys graphs that are not used any more; nothing runs.
    pub(super) fn destroy_retired(&mut self) {
        for graph in self.graphs.take_retired() {
            let functions = self.functions.expect("a graph was made");
            // SAFETY: it was made here and is used no more. A failure leaves nothing that could be done.
            let _ = unsafe { (functions.destroy)(graph) };
        }
    }
}

impl Device {
    /// Runs the work of an operation, collecting its calls where that is of use.
    pub(crate) fn collect<T>(
        &mut self,
        op: &'static str,
        work: impl FnOnce(&mut Self) -> Result<T, AscendError>,
    ) -> Result<T, AscendError> {
        self.pieces.collecting = self.pieces.are_of_use().then_some(op);
        let result = work(self);
        self.pieces.collecting = None;
        result
    }

    /// Runs `work` with nothing collected, for calls that are never the same again or whose effect outlives a failed step.
    pub(crate) fn at_once<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, AscendError>,
    ) -> Result<T, AscendError> {
        let collecting = self.pieces.collecting.take();
        let result = work(self);
        self.pieces.collecting = collecting;
        result
    }

    /// Collects a call, or issues it behind what was collected.
    pub(crate) fn run(&mut self, call: Call) -> Result<(), AscendError> {
        match self.pieces.collecting {
            Some(op) => {
                self.pieces.calls.push((op, call));
                if self.pieces.calls.len() < MOST_CALLS { Ok(()) } else { self.end_piece() }
            }
            None => {
                self.end_piece()?;
                self.issue(&call)
            }
        }
    }

    /// Gives what was collected to the stream. What fails is told with the operation that it belongs to; the rest of the piece
    /// is dropped.
    pub(crate) fn end_piece(&mut self) -> Result<(), AscendError> {
        if self.pieces.calls.is_empty() {
            return Ok(());
        }
        let piece = std::mem::take(&mut self.pieces.calls);
        self.pieces.ending = Some(Ending::Issue);
        let result = self.run_piece(piece);
        self.pieces.ending = None;
        if let Err(error) = &result
            && error.class() == Class::Memory
        {
            // Without pieces there may be room: what they use is not free meanwhile.
            self.pieces.stop(error);
            self.pieces.retire_graphs();
        }
        result
    }

    fn run_piece(&mut self, piece: Piece) -> Result<(), AscendError> {
        if piece.len() < LEAST_CALLS {
            return self.issue_all(&piece);
        }
        match self.pieces.graphs.meet(&piece, self.workspace) {
            Met::Graph(graph) => self.run_graph(graph),
            Met::Again if self.pieces.objection.get().is_none() => match self.capture(&piece) {
                Ok(graph) => {
                    self.pieces.graphs.keep(piece, self.workspace, graph);
                    self.run_graph(graph)
                }
                Err(error) if error.class().is_final() => Err(error),
                Err(error) => {
                    self.issue_all(&piece)?;
                    // The calls are sound: it was the capture.
                    self.pieces.stop(&error);
                    Ok(())
                }
            },
            Met::First(hash) => {
                self.issue_all(&piece)?;
                self.pieces.graphs.remember(hash);
                Ok(())
            }
            Met::Again => self.issue_all(&piece),
        }
    }

    fn issue_all(&mut self, piece: &Piece) -> Result<(), AscendError> {
        piece.iter().try_for_each(|(op, call)| {
            self.issue(call).map_err(|error| AscendError::Collected { op, error: Box::new(error) })
        })
    }

    /// Records the calls of a piece instead of running them. Whatever fails, the stream is as it was.
    fn capture(&mut self, piece: &Piece) -> Result<Graph, AscendError> {
        let functions = self.pieces.functions.expect("without them there is an objection");
        // SAFETY: our own stream.
        let code = unsafe { (functions.capture_begin)(self.stream, capture_mode::THREAD_LOCAL) };
        self.check("aclmdlRICaptureBegin", code)?;
        self.pieces.ending = Some(Ending::Capture);
        let issued = self.issue_all(piece);
        self.pieces.ending = Some(Ending::Issue);
        let mut graph = Graph::NULL;
        // SAFETY: our own stream; a valid out pointer.
        let mut end = || unsafe { (functions.capture_end)(self.stream, &raw mut graph) };
        let code = end();
        let ended = self.check("aclmdlRICaptureEnd", code);
        if ended.is_err() {
            // Should the refused call have left the capture open, nothing would run any more; should it not, this does nothing.
            end();
        }
        match issued.and(ended) {
            Ok(()) => Ok(graph),
            Err(error) => {
                if graph != Graph::NULL {
                    // SAFETY: made just now and never run.
                    let _ = unsafe { (functions.destroy)(graph) };
                }
                Err(error)
            }
        }
    }

    /// Queues a graph. One that the device refuses is not tried again, nor is another.
    fn run_graph(&mut self, graph: Graph) -> Result<(), AscendError> {
        let functions = self.pieces.functions.expect("a graph was made");
        // SAFETY: a graph that was not destroyed, and our own stream.
        let code = unsafe { (functions.execute)(graph, self.stream) };
        self.check("aclmdlRIExecuteAsync", code).inspect_err(|error| {
            self.pieces.stop(error);
            self.pieces.retire_graphs();
        })
    }

    /// Gives a call to the stream.
    fn issue(&mut self, call: &Call) -> Result<(), AscendError> {
        let runtime = &self.acl.runtime;
        match *call {
            Call::Operator(name, ref values) => name.issue(self, values),
            Call::Copy { from, to, bytes } => {
                let kind = memcpy_kind::DEVICE_TO_DEVICE;
                // SAFETY: both ranges are blocks of whoever made the call.
                let code =
                    unsafe { (runtime.memcpy_async)(to.as_ptr(), bytes, from.as_ptr(), bytes, kind, self.stream) };
                self.check("aclrtMemcpyAsync", code)
            }
            Call::Clear { at, bytes } => {
                // SAFETY: the range is a block of whoever made the call.
                let code = unsafe { (runtime.memset_async)(at.as_ptr(), bytes, 0, bytes, self.stream) };
                self.check("aclrtMemsetAsync", code)
            }
        }
    }
}
