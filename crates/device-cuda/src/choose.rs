//! Tokens chosen from logits, and where the next step finds them.
//!
//! Invariant: chosen tokens stay where they are on the device until the next are chosen, so a step that begins with them waits for
//! nobody; and it is the same launches as one that begins with tokens of the host. Of several ranks the first chooses, and the
//! others have its tokens in their own place.

use std::f64::consts::LOG2_E;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use baton_device::{Draw, Result, Rows, TokenId, TokenIds};

use crate::gpu::{Arg, Gpu, Launch};
use crate::program::{Kernel, Source};
use crate::queue::Fetch;
use crate::ranks::Place;
use crate::staging::Slot;
use crate::tensor::{DataType, Tensor};

/// Logits that a thread takes at once: `STEP` of `kernels/choose.cu`.
const STEP: usize = 8;
/// Bytes of a place for tokens or draws at first.
const USUAL: usize = 16 << 10;
/// Marks an id that is the row of a chosen token: `CHOSEN` of `kernels/linear.cu`.
const CHOSEN: u32 = 1 << 31;

/// Tokens chosen from the rows of a step, at its end.
pub struct Chosen {
    /// Which choice of all it was.
    number: u64,
    rows: usize,
    /// Tokens are below it.
    limit: usize,
    /// Their way to the host.
    fetch: Fetch,
}

/// Tokens as a kernel takes them.
pub(crate) struct Ids {
    /// An id, or the row of a chosen one.
    pub(crate) words: Vec<u32>,
    /// They are below it.
    pub(crate) limit: usize,
}

/// Chooses tokens.
pub(crate) struct Chooser {
    gpu: Arc<Gpu>,
    draws: Slot,
    tokens: Slot,
    /// Choices so far.
    choices: AtomicU64,
}

impl Chooser {
    pub(crate) fn new(gpu: &Arc<Gpu>, activations: DataType) -> Result<Self> {
        let (draws, tokens) = (gpu.slot(USUAL, "draws")?, gpu.slot(USUAL, "chosen tokens")?);
        let chooser = Self { gpu: gpu.clone(), draws, tokens, choices: AtomicU64::new(0) };
        // Of logits in f32, which a head in f32 gives, it is compiled when it is met.
        chooser.kernel(activations)?;
        Ok(chooser)
    }

    fn kernel(&self, logits: DataType) -> Result<Kernel> {
        self.gpu.kernel(Source::Choose, format!("choose<{}>", logits.name()))
    }

    /// Queues the choice among so many columns, and begins to bring it to the host: with that all that is queued runs. With a
    /// place among ranks the tokens are those of the first, which alone brings logits.
    pub(crate) fn choose(
        &self,
        logits: Option<&Tensor>,
        limit: usize,
        draws: &[Draw],
        place: Option<&Place>,
    ) -> Result<Chosen> {
        let rows = draws.len();
        if rows == 0 {
            return self.choose_nothing();
        }
        let tokens = self.gpu.reserve(&self.tokens, rows * size_of::<i32>())?;
        if let Some(logits) = logits {
            assert_eq!((logits.rows(), logits.cols()), (rows, limit), "a draw for each row");
            self.launch(logits, draws, tokens)?;
        }
        if let Some(place) = place {
            place.broadcast(&self.gpu, tokens, rows)?;
        }
        // What was there is overwritten from now on.
        let number = self.choices.fetch_add(1, Ordering::Relaxed) + 1;
        let fetch = self.gpu.fetch(tokens, rows * size_of::<i32>())?;
        Ok(Chosen { number, rows, limit, fetch })
    }

    /// The end of a step that chooses nothing.
    pub(crate) fn choose_nothing(&self) -> Result<Chosen> {
        let fetch = self.gpu.fetch(self.tokens()?, 0)?;
        Ok(Chosen { number: self.choices.load(Ordering::Relaxed), rows: 0, limit: 0, fetch })
    }

    fn launch(&self, logits: &Tensor, draws: &[Draw], tokens: u64) -> Result<()> {
        let (rows, limit) = (logits.rows(), logits.cols());
        let draws = self.gpu.upload(&self.draws, &draws.iter().flat_map(encode).collect::<Vec<_>>())?;
        let threads = limit.div_ceil(STEP).next_multiple_of(32).min(1024);
        let launch = Launch { grid: [rows as u32, 1, 1], block: [threads as u32, 1, 1], shared: 0 };
        let args = [logits.address(), draws, tokens].map(Arg::Ptr);
        let args = [&args[..], &[Arg::I32(limit as i32)]].concat();
        self.gpu.launch(&self.kernel(logits.dtype())?, launch, &args)
    }

    /// Waits for tokens, replacing what `out` held.
    pub(crate) fn read(&self, chosen: &Chosen, out: &mut Vec<Option<u32>>) -> Result<()> {
        let mut bytes = vec![0; chosen.rows * size_of::<i32>()];
        self.gpu.finish(&chosen.fetch, &mut bytes)?;
        out.clear();
        // -1 for a row that is not finite.
        out.extend(bytes.as_chunks().0.iter().map(|token| u32::try_from(i32::from_ne_bytes(*token)).ok()));
        Ok(())
    }

    /// Where the tokens chosen last are.
    pub(crate) fn tokens(&self) -> Result<u64> {
        self.gpu.reserve(&self.tokens, 0)
    }

    /// The tokens of a step; chosen ones are those that were chosen last.
    pub(crate) fn ids(&self, ids: TokenIds<'_, Chosen>) -> Ids {
        match ids {
            TokenIds::Known(ids) => {
                let limit = ids.iter().max().map_or(0, |id| *id as usize + 1);
                Ids { words: ids.to_vec(), limit }
            }
            TokenIds::Chosen { tokens, ids } => {
                assert_eq!(
                    tokens.number,
                    self.choices.load(Ordering::Relaxed),
                    "only what was chosen last is still there"
                );
                let mut limit = tokens.limit;
                let word = |id: &TokenId| match *id {
                    TokenId::Known(id) => {
                        limit = limit.max(id as usize + 1);
                        id
                    }
                    TokenId::Chosen(row) => {
                        assert!((row as usize) < tokens.rows, "row {row} of {}", tokens.rows);
                        CHOSEN | row
                    }
                };
                Ids { words: ids.iter().map(word).collect(), limit }
            }
        }
    }
}

/// A draw as the kernel takes it.
fn encode(draw: &Draw) -> Vec<u8> {
    let Draw { temperature, top_k, top_p, min_p, uniform } = *draw;
    let largest = draw.takes_the_largest();
    let temperature = f64::from(temperature);
    // In units of 2^-64. The least of them that are lost decide nothing: masses are below 2^60.
    let share = |x: f64| (x * 2f64.powi(64)) as u64;
    let top_p = if top_p < 1.0 { share(f64::from(top_p)) } else { u64::MAX };
    let reach = if min_p > 1.0 {
        // Nothing is left, and so the first of the largest alone.
        f64::INFINITY
    } else if min_p > 0.0 && temperature.is_finite() {
        temperature * f64::from(min_p).ln()
    } else {
        f64::NEG_INFINITY
    };
    let exact = LOG2_E / temperature;
    let scale = (exact as f32).min(f32::MAX);
    let rest = if exact <= f64::from(f32::MAX) { (exact - f64::from(scale)) as f32 } else { 0.0 };
    let top_k = i32::try_from(top_k).unwrap_or(i32::MAX);
    let mut bytes = Vec::with_capacity(40);
    bytes.extend(share(uniform).to_ne_bytes());
    bytes.extend(top_p.to_ne_bytes());
    bytes.extend(reach.to_ne_bytes());
    bytes.extend([scale, rest].iter().flat_map(|x| x.to_ne_bytes()));
    bytes.extend([top_k, i32::from(largest)].iter().flat_map(|x| x.to_ne_bytes()));
    bytes
}
