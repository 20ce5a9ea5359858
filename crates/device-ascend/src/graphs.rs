//! Graphs: pieces of a step that were met before are given to the device as one.
//!
//! A *piece* are the calls between two things that no graph holds: attention with its lengths from the host, a sum over ranks,
//! a copy from or to the host, a wait. In steady decode these are the operators from behind one attention to before the next.
//! The calls of an operation of few rows are not issued when it is made; they are collected, as plain data, until the piece
//! ends. Then the piece is looked up:
//!
//! - met for the first time, it is issued call by call;
//! - for the second time, it is captured instead of issued, and the graph is run;
//! - from then on the graph is run: none of its calls goes through phase 1 and no object is made for it.
//!
//! What decides is the whole piece: every operator with all shapes, strides, types, addresses and numbers. A graph is of one
//! workspace besides, and goes when that moves.
//! A graph holds nothing else from the host, so it does what the calls would do. Addresses stay right by themselves: an
//! operation takes its scratch memory from the pool whenever it is made, collected or not, so what a piece names is the
//! piece's own now, and if a block has gone to somebody else meanwhile, the piece names another one and is another piece. The
//! pool hands out the smallest block that fits, so equal steps name equal blocks.
//!
//! What must hold, and where:
//!
//! - Everything that reaches the stream by another way than a collected call ends the piece first, so order is kept
//!   (`device/pieces.rs`). Blocks that collected calls use may hence go back to the pool at once, as ever.
//! - The workspace belongs to all calls. If it grows while a piece is issued, it grows into memory that was not in the pool
//!   when the piece was collected, and no segment is given back to the device meanwhile. While a piece is captured it does not
//!   grow: the calls asked for as much before; and when it is given back, nothing counts as met any more.
//! - A piece is of one thread: before work of another, and before any call that is answered, it ends. So a failure
//!   is the thread's whose work failed, in the operation that made the call (`owner.rs`).
//! - A graph is destroyed only when the stream has been waited for since it was last run.
//! - When segments go back to the device, all graphs go.
//!
//! A capture that fails is the last: the piece is issued, graphs that are there go on, and [`forms`] says why. There are none
//! where operators are composed or waited for one by one, on a chip that is not known to have them, and where the runtime lacks
//! a function.
//!
//! UNCONFIRMED on hardware: how many streams and how much memory a graph takes (207008 when they run out); that phase 1 may
//! run while a capture goes on (other users of CANN do it); that a capture that forbids this thread unsafe calls is not
//! disturbed by what operators do inside; that a graph may be queued again before its last run has ended (107037 says that
//! something of the kind is refused).
//!
//! [`forms`]: crate::AscendBackend::forms

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use crate::abi::operators::{OperatorName, Value};
use crate::chip::Chip;
use crate::object::Address;

/// The most rows of an operation whose calls are collected: what decode has. This and the next two are reasoned, not measured:
/// larger ones are seldom met twice and cost the device more than the host.
pub(crate) const MOST_ROWS: usize = 256;
/// Calls of a piece that are worth a graph.
pub(crate) const LEAST_CALLS: usize = 4;
/// The most calls of a piece; with more it ends, so that the device does not wait for long.
pub(crate) const MOST_CALLS: usize = 128;
/// The most graphs: each takes a stream at least, of which these chips have 1984 for everybody.
pub(crate) const MOST_GRAPHS: usize = 1024;
/// Pieces that are remembered as met once.
const MOST_SEEN: usize = 1 << 14;

/// Why there are none on a chip.
pub(crate) fn objection(chip: Chip) -> Option<String> {
    // Its documents name them only lately, and its streams are half as many.
    (chip == Chip::P310).then(|| format!("{chip} is not known to have them"))
}

/// What goes to the stream.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) enum Call {
    Operator(OperatorName, Vec<Value>),
    /// Between blocks of the device.
    Copy {
        from: Address,
        to: Address,
        bytes: usize,
    },
    /// With zero bytes.
    Clear {
        at: Address,
        bytes: usize,
    },
}

/// Calls that follow each other, each with the operation of the seam that made it.
pub(crate) type Piece = Vec<(&'static str, Call)>;

/// Where a device's workspace lies, and its bytes.
pub(crate) type Workspace = Option<(Address, usize)>;

/// What is known of a piece.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Met<G> {
    /// Nothing; its hash, to be remembered when it went well.
    First(u64),
    /// It was met, and has no graph.
    Again,
    Graph(G),
}

/// A graph that may be run.
struct Kept<G> {
    graph: G,
    /// On which it was captured.
    workspace: Workspace,
    /// When it was last asked for.
    used: u64,
}

/// Graphs by what they do. `K` are pieces, `G` handles of graphs.
pub(crate) struct Graphs<K, G> {
    hasher: RandomState,
    /// Pieces that were met, by hash: if two share one, a graph is made a step early.
    seen: HashSet<u64>,
    kept: HashMap<K, Kept<G>>,
    clock: u64,
    most: usize,
    /// Not to be used any more, but perhaps running.
    retired: Vec<G>,
}

impl<K: Eq + std::hash::Hash, G: Copy> Graphs<K, G> {
    /// Keeps at most so many.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            hasher: RandomState::new(),
            seen: HashSet::new(),
            kept: HashMap::new(),
            clock: 0,
            most,
            retired: Vec::new(),
        }
    }

    /// Looks a piece up, to be run on a workspace.
    pub(crate) fn meet(&mut self, piece: &K, workspace: Workspace) -> Met<G> {
        self.clock += 1;
        match self.kept.get_mut(piece) {
            Some(kept) if kept.workspace == workspace => {
                kept.used = self.clock;
                return Met::Graph(kept.graph);
            }
            // It would use memory that is no workspace any more.
            Some(_) => self.retired.extend(self.kept.remove(piece).map(|kept| kept.graph)),
            None => {}
        }
        let hash = self.hasher.hash_one(piece);
        if self.seen.contains(&hash) { Met::Again } else { Met::First(hash) }
    }

    /// Remembers that a piece was issued well: its calls have asked for all the workspace that they need.
    pub(crate) fn remember(&mut self, hash: u64) {
        if self.seen.len() == MOST_SEEN {
            self.seen.clear();
        }
        self.seen.insert(hash);
    }

    /// Keeps the graph of a piece, in the place of the one that was not asked for longest if there are too many.
    pub(crate) fn keep(&mut self, piece: K, workspace: Workspace, graph: G) {
        if self.kept.len() >= self.most {
            let oldest = self.kept.values().map(|kept| kept.used).min().expect("there are some");
            self.retired.extend(self.kept.extract_if(|_, kept| kept.used == oldest).map(|(_, kept)| kept.graph));
        }
        self.kept.insert(piece, Kept { graph, workspace, used: self.clock });
    }

    /// Nothing was met, and no graph is used any more.
    pub(crate) fn forget(&mut self) {
        self.seen.clear();
        self.retire_all();
    }

    /// None is used any more.
    pub(crate) fn retire_all(&mut self) {
        self.retired.extend(self.kept.drain().map(|(_, kept)| kept.graph));
    }

    /// Those that may be destroyed when nothing runs.
    pub(crate) fn take_retired(&mut self) -> Vec<G> {
        std::mem::take(&mut self.retired)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKSPACE: Workspace = Some((Address(4096), 512));

    /// Meets a piece for the first time, and remembers it.
    fn meet_first<K: Eq + std::hash::Hash>(graphs: &mut Graphs<K, u32>, piece: &K) {
        let Met::First(hash) = graphs.meet(piece, None) else { panic!("it was met") };
        graphs.remember(hash);
    }

    #[test]
    fn a_piece_has_a_graph_from_its_second_time_on_and_the_one_that_is_not_asked_for_goes() {
        let mut graphs = Graphs::new(2);
        for piece in 0..2 {
            assert!(matches!(graphs.meet(&piece, None), Met::First(_)), "one that failed was not met");
            meet_first(&mut graphs, &piece);
            assert_eq!(graphs.meet(&piece, WORKSPACE), Met::Again, "the first time brought the workspace");
            graphs.keep(piece, WORKSPACE, piece + 10);
        }
        assert_eq!(graphs.meet(&0, WORKSPACE), Met::Graph(10));
        meet_first(&mut graphs, &2);
        graphs.keep(2, WORKSPACE, 12);
        assert_eq!(graphs.take_retired(), [11], "the other was asked for since");
        let met = [0, 1, 2].map(|piece| graphs.meet(&piece, WORKSPACE));
        assert_eq!(met, [Met::Graph(10), Met::Again, Met::Graph(12)]);
        graphs.retire_all();
        let mut retired = graphs.take_retired();
        retired.sort_unstable();
        assert_eq!((retired, graphs.is_empty()), (vec![10, 12], true));
    }

    #[test]
    fn pieces_that_differ_in_an_address_alone_are_two_and_a_graph_is_of_one_workspace() {
        let piece = |at: usize| vec![("write", Call::Clear { at: Address(at), bytes: 8 })];
        let mut graphs: Graphs<Piece, u32> = Graphs::new(2);
        meet_first(&mut graphs, &piece(512));
        graphs.keep(piece(512), WORKSPACE, 1);
        meet_first(&mut graphs, &piece(1024));
        assert_eq!(graphs.meet(&piece(512), WORKSPACE), Met::Graph(1));
        for moved in [Some((Address(8192), 512)), Some((Address(4096), 1024)), None] {
            assert_eq!(graphs.meet(&piece(512), moved), Met::Again);
            assert_eq!(graphs.take_retired(), [1]);
            graphs.keep(piece(512), WORKSPACE, 1);
        }
    }
}
