//! How the vectors of a text's tokens become one: what sentence-transformers writes beside a checkpoint, and the arithmetic.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::LoadError;
use crate::source::Source;

const MODULES: &str = "modules.json";
const SENTENCE: &str = "sentence_bert_config.json";

/// One vector of many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first token's.
    Cls,
    /// The largest value of each component.
    Max,
    /// The last token's.
    Last,
}

impl Pooling {
    /// All, with their names.
    pub const ALL: [(&'static str, Self); 4] =
        [("mean", Self::Mean), ("cls", Self::Cls), ("max", Self::Max), ("last", Self::Last)];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, pooling)| *pooling == self).expect("all are named").0
    }

    /// Of rows of `width`, at least one.
    pub(crate) fn pool(self, rows: &[f32], width: usize) -> Vec<f32> {
        let mut rows = rows.chunks_exact(width);
        match self {
            Self::Cls => rows.next().expect("a text has tokens").to_vec(),
            Self::Last => rows.next_back().expect("a text has tokens").to_vec(),
            Self::Max => {
                let first = rows.next().expect("a text has tokens").to_vec();
                rows.fold(first, |most, row| most.iter().zip(row).map(|(a, b)| a.max(*b)).collect())
            }
            Self::Mean => {
                let (mut sums, count) = (vec![0.0_f64; width], rows.len() as f64);
                rows.for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x)));
                sums.into_iter().map(|sum| (sum / count) as f32).collect()
            }
        }
    }
}

/// Scales a vector to the length 1, unless it is zero.
pub(crate) fn normalize(vector: &mut [f32]) {
    let squares: f64 = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    let length = squares.sqrt().max(1e-12);
    vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
}

/// What stands beside a checkpoint.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SentenceConfig {
    /// Nothing is stated if there is no list of modules.
    pub pooling: Option<Pooling>,
    pub normalize: Option<bool>,
    /// Tokens of the longest text that the model was made for.
    pub max_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct Module {
    r#type: String,
    #[serde(default)]
    path: String,
}

impl SentenceConfig {
    /// Reads the files of sentence-transformers, as far as there are any.
    pub fn read(source: &dyn Source) -> Result<Self, LoadError> {
        let max_tokens = max_tokens(source)?;
        let Some(bytes) = read(source, MODULES)? else { return Ok(Self { max_tokens, ..Self::default() }) };
        let modules: Vec<Module> = serde_json::from_slice(&bytes)
            .map_err(|e| LoadError::config(MODULES, format!("it is no list of modules: {e}")))?;
        let kind = |module: &Module| module.r#type.rsplit('.').next().unwrap_or_default().to_owned();
        let kinds: Vec<String> = modules.iter().map(kind).collect();
        let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
        let normalize = match kinds[..] {
            ["Transformer", "Pooling"] => false,
            ["Transformer", "Pooling", "Normalize"] => true,
            _ => {
                let reason = "the modules must be Transformer, Pooling and perhaps Normalize, in this order";
                return Err(LoadError::config(MODULES, reason));
            }
        };
        let pooling = pooling(source, &modules[1].path)?;
        Ok(Self { pooling: Some(pooling), normalize: Some(normalize), max_tokens })
    }
}

fn read(source: &dyn Source, file: &str) -> Result<Option<Vec<u8>>, LoadError> {
    let bytes = source.read(file).map_err(|reason| LoadError::File { file: file.into(), reason })?;
    Ok(bytes.map(Into::into))
}

fn object(file: &str, bytes: &[u8]) -> Result<Map<String, Value>, LoadError> {
    serde_json::from_slice(bytes).map_err(|e| LoadError::config(file, format!("it is no JSON object: {e}")))
}

fn max_tokens(source: &dyn Source) -> Result<Option<usize>, LoadError> {
    let Some(bytes) = read(source, SENTENCE)? else { return Ok(None) };
    let fields = object(SENTENCE, &bytes)?;
    if fields.get("do_lower_case").is_some_and(|value| value == true) {
        let reason = "do_lower_case is not supported; the tokenizer's own normaliser lowers case";
        return Err(LoadError::config(SENTENCE, reason));
    }
    match fields.get("max_seq_length").filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(value) => match value.as_u64().filter(|&n| n > 0) {
            Some(n) => Ok(Some(usize::try_from(n).unwrap_or(usize::MAX))),
            None => Err(LoadError::config(SENTENCE, "max_seq_length must be a whole number above 0")),
        },
    }
}

fn pooling(source: &dyn Source, folder: &str) -> Result<Pooling, LoadError> {
    let folder = folder.trim_end_matches('/');
    let plain = !folder.is_empty() && folder != "." && folder != ".." && !folder.contains(['/', '\\', '\0']);
    if !plain || folder.len() > 64 {
        return Err(LoadError::config(MODULES, "the path of Pooling must be a plain folder name"));
    }
    let file = format!("{folder}/config.json");
    let missing = || LoadError::File { file: file.clone(), reason: format!("it is missing, and {MODULES} names it") };
    let fields = object(&file, &read(source, &file)?.ok_or_else(missing)?)?;
    let accepted = "exactly one of mean, cls, max and last token must be the way to pool";
    // The older form has a switch for each way, the newer one a name.
    let switches = [
        ("pooling_mode_mean_tokens", Some(Pooling::Mean)),
        ("pooling_mode_cls_token", Some(Pooling::Cls)),
        ("pooling_mode_max_tokens", Some(Pooling::Max)),
        ("pooling_mode_lasttoken", Some(Pooling::Last)),
        ("pooling_mode_mean_sqrt_len_tokens", None),
        ("pooling_mode_weightedmean_tokens", None),
    ];
    let on = |name: &str| fields.get(name).is_some_and(|value| value == true);
    let chosen: Vec<Option<Pooling>> = switches.iter().filter(|(name, _)| on(name)).map(|(_, way)| *way).collect();
    let named = fields.get("pooling_mode").and_then(Value::as_str).map(|name| match name {
        "lasttoken" => Some(Pooling::Last),
        name => Pooling::ALL.iter().find(|(known, _)| *known == name).map(|(_, way)| *way),
    });
    match (chosen.as_slice(), named) {
        (&[Some(way)], None) | ([], Some(Some(way))) => Ok(way),
        _ => Err(LoadError::config(&file, accepted)),
    }
}
