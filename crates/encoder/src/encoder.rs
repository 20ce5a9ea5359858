//! [`Encoder`]: a loaded model, from token ids to embeddings or scores.

use candle_core::{Device, Tensor};

use crate::config::{self, Architecture, Config, Family, ScoreActivation, Task};
use crate::error::{LoadError, RunError, SubmitError};
use crate::network::Network;
use crate::pooling::{Pooling, SentenceConfig, normalize};
use crate::source::Source;
use crate::weights;

/// Elements that the attention weights of one text may have, unless a longer context is asked for: a layer keeps them for all
/// heads at once, several times over. 16 heads give a context of 4096.
const ATTENTION_ELEMENTS: usize = 1 << 28;

/// How an encoder shall be loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Longest text in tokens; `None` for the model's own, as far as its attention fits into a GiB.
    pub max_model_len: Option<usize>,
    /// One vector of many; `None` for the checkpoint's own way, or the mean where it states none.
    pub pooling: Option<Pooling>,
}

/// What an encoder takes and gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncoderSpec {
    /// Which model.
    pub architecture: Architecture,
    /// Token ids are below it.
    pub vocab_size: usize,
    /// Types of tokens are below it.
    pub type_vocab_size: usize,
    /// Tokens of the longest text or pair.
    pub max_model_len: usize,
    /// Components of an embedding.
    pub width: usize,
    /// How embeddings are made of the tokens' vectors.
    pub pooling: Pooling,
    /// Whether the checkpoint or the operator states the pooling.
    pub pooling_stated: bool,
    /// Whether embeddings have the length 1.
    pub normalized: bool,
    /// Bytes of weights as kept.
    pub weight_bytes: u64,
}

/// What an encoder reads: a text, or a pair.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Input {
    /// Token ids, special tokens included.
    pub ids: Vec<u32>,
    /// Which text of a pair each token is of. Of the length of `ids`.
    pub type_ids: Vec<u32>,
}

/// See the head of the file.
pub struct Encoder {
    spec: EncoderSpec,
    pad_token_id: u32,
    heads: usize,
    score_activation: ScoreActivation,
    network: Network,
}

impl Encoder {
    /// Loads a checkpoint.
    ///
    /// # Errors
    /// Files that cannot be read, a config or tensors that are refused, each with every reason.
    pub fn load(source: &dyn Source, options: &LoadOptions) -> Result<Self, LoadError> {
        let file = |reason| LoadError::File { file: config::FILE.into(), reason };
        let json = source.read(config::FILE).map_err(file)?.ok_or_else(|| file("it is missing".into()))?;
        let config = Config::parse(&json)?;
        // Scores are made of the first token, whatever else a checkpoint states.
        let sentence = match config.architecture.task {
            Task::Embed => SentenceConfig::read(source)?,
            Task::Score => SentenceConfig::default(),
        };
        let max_model_len = context(&config, &sentence, options)?;
        if config.architecture.task == Task::Score && options.pooling.is_some() {
            return Err(LoadError::Unsupported { reason: "a model that scores pairs has no pooling to choose".into() });
        }
        let weights = weights::load(source, &config)?;
        let network = Network::new(&config, &weights)?;
        let spec = EncoderSpec {
            architecture: config.architecture,
            vocab_size: config.vocab_size,
            type_vocab_size: config.type_vocab_size,
            max_model_len,
            width: config.hidden_size,
            pooling: options.pooling.or(sentence.pooling).unwrap_or(Pooling::Mean),
            pooling_stated: options.pooling.or(sentence.pooling).is_some(),
            normalized: sentence.normalize.unwrap_or(true),
            weight_bytes: weights.bytes,
        };
        let (heads, score_activation) = (config.num_heads, config.score_activation);
        Ok(Self { spec, pad_token_id: config.pad_token_id, heads, score_activation, network })
    }

    /// What it takes and gives.
    pub fn spec(&self) -> &EncoderSpec {
        &self.spec
    }

    /// Attention heads.
    pub(crate) fn heads(&self) -> usize {
        self.heads
    }

    /// Whether inputs can be computed.
    ///
    /// # Errors
    /// The first that cannot, and why.
    pub fn check(&self, inputs: &[Input]) -> Result<(), SubmitError> {
        let EncoderSpec { vocab_size, type_vocab_size, max_model_len, .. } = self.spec;
        for (index, Input { ids, type_ids }) in inputs.iter().enumerate() {
            if ids.is_empty() || ids.len() != type_ids.len() {
                return Err(SubmitError::Empty { index });
            }
            if ids.len() > max_model_len {
                return Err(SubmitError::TooLong { index, tokens: ids.len(), context: max_model_len });
            }
            let known = |ids: &[u32], size: usize| ids.iter().all(|&id| (id as usize) < size);
            let types = self.spec.architecture.family == Family::Roberta || known(type_ids, type_vocab_size);
            if !known(ids, vocab_size) || !types {
                return Err(SubmitError::TokenOutOfRange { index, vocab: vocab_size });
            }
        }
        Ok(())
    }

    /// Computes inputs that [`check`](Self::check) has found good, at least one: an embedding each, or a score as its only
    /// element.
    ///
    /// # Errors
    /// [`RunError::Failed`] for all of them; [`RunError::NonFinite`] for one.
    pub fn run(&self, batch: &[&Input]) -> Result<Vec<Result<Vec<f32>, RunError>>, RunError> {
        let outputs = self.compute(batch).map_err(|_| RunError::Failed)?;
        let finite = |output: Vec<f32>| match output.iter().all(|x| x.is_finite()) {
            true => Ok(output),
            false => Err(RunError::NonFinite),
        };
        Ok(outputs.into_iter().map(finite).collect())
    }

    fn compute(&self, batch: &[&Input]) -> candle_core::Result<Vec<Vec<f32>>> {
        let tokens = batch.iter().map(|input| input.ids.len()).max().unwrap_or(0);
        let shape = (batch.len(), tokens);
        let padded = |row: &dyn Fn(&Input) -> Vec<u32>, padding: u32| {
            let rows = batch.iter().flat_map(|input| {
                let mut row = row(input);
                row.resize(tokens, padding);
                row
            });
            Tensor::from_vec(rows.collect::<Vec<u32>>(), shape, &Device::Cpu)
        };
        let ids = padded(&|input| input.ids.clone(), self.pad_token_id)?;
        let type_ids = match self.spec.architecture.family {
            Family::Bert => padded(&|input| input.type_ids.clone(), 0)?,
            // All of one type, whatever the tokenizer says.
            Family::Roberta => padded(&|_| Vec::new(), 0)?,
        };
        let mask = padded(&|input| vec![1; input.ids.len()], 0)?;
        let hidden = self.network.hidden(&ids, &type_ids, &mask)?;
        if let Some(scores) = self.network.scores(&hidden)? {
            return Ok(scores.into_iter().map(|score| vec![self.score(score)]).collect());
        }
        let (width, hidden) = (self.spec.width, hidden.flatten_all()?.to_vec1::<f32>()?);
        let rows = hidden.chunks_exact(tokens * width).zip(batch);
        let embed = |(rows, input): (&[f32], &&Input)| {
            let mut embedding = self.spec.pooling.pool(&rows[..input.ids.len() * width], width);
            if self.spec.normalized {
                normalize(&mut embedding);
            }
            embedding
        };
        Ok(rows.map(embed).collect())
    }

    fn score(&self, score: f32) -> f32 {
        match self.score_activation {
            ScoreActivation::Identity => score,
            ScoreActivation::Sigmoid => 1.0 / (1.0 + (-score).exp()),
        }
    }
}

/// Tokens of the longest text.
fn context(config: &Config, sentence: &SentenceConfig, options: &LoadOptions) -> Result<usize, LoadError> {
    let positions = config.positions();
    match options.max_model_len {
        Some(asked) if (1..=positions).contains(&asked) => Ok(asked),
        Some(asked) => Err(LoadError::Unsupported {
            reason: format!("a context of {asked} tokens; this model takes 1 to {positions}"),
        }),
        None => {
            let fits = (ATTENTION_ELEMENTS / config.num_heads).isqrt();
            Ok(positions.min(sentence.max_tokens.unwrap_or(positions)).min(fits))
        }
    }
}
