//! What the tests share: the goldens' prompts, and one face for a model of ours and one of candle's.

#![allow(dead_code)] // each test file uses its part

use std::path::{Path, PathBuf};

use baton_device::{DType, Reference};
use baton_model::{Files, KvCacheSize, LoadOptions, ModelRunner, Runner, SequenceStep, StepPlan, Tokens, load};
use candle_core::{Device, Tensor};
use serde_json::Value;

/// On logits, absolute, between two computations in float32.
pub const TOLERANCE: f32 = 1e-3;

/// Tokens after a prompt that are fed one at a time.
const DECODED: usize = 4;

/// Takes tokens and the position of the first of them, keeps the context, gives the logits after the last.
pub type Feed = Box<dyn FnMut(&[u32], usize) -> Vec<f32>>;

pub fn golden(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/golden").join(case)
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

/// A prompt, and tokens that follow it.
pub struct Text {
    pub name: String,
    pub prompt: Vec<u32>,
    pub continuation: Vec<u32>,
}

/// The texts of a golden, prompts of at most so many tokens with the continuations that transformers chose.
pub fn texts(case: &str, longest: usize) -> Vec<Text> {
    let ids = |v: &Value| -> Vec<u32> { serde_json::from_value(v.clone()).unwrap() };
    let text = |prompt: &Value| Text {
        name: prompt["name"].as_str().unwrap().into(),
        prompt: ids(&prompt["ids"]),
        continuation: ids(&prompt["greedy_ids"])[..DECODED].to_vec(),
    };
    let mut texts: Vec<Text> =
        json(&golden(case).join("golden.json"))["prompts"].as_array().unwrap().iter().map(text).collect();
    texts.retain(|t| t.prompt.len() <= longest);
    assert!(texts.iter().any(|t| t.prompt.len() >= longest / 2));
    texts
}

/// Our model on the reference backend with weights in float32, or in the blocks of a GGUF file.
pub fn ours(path: &Path) -> Feed {
    let files = Files::at(path).unwrap();
    let dtype = (!matches!(files, Files::Gguf(_))).then_some(DType::F32);
    let options = LoadOptions {
        dtype,
        max_model_len: Some(400),
        max_step_tokens: 400,
        max_step_sequences: 1,
        kv_cache: KvCacheSize::AtMost(1 << 28),
        ..LoadOptions::default()
    };
    let loaded = load(Reference::new(), &files, &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut runner: ModelRunner<Reference> = loaded.0;
    let block_table: Vec<u32> = (0..runner.spec().num_blocks as u32).collect();
    Box::new(move |tokens, num_computed| {
        let sequence = SequenceStep {
            adapter: None,
            id: 1,
            num_computed,
            tokens: Tokens::Known(tokens.to_vec()),
            draft: Vec::new(),
            block_table: block_table.clone(),
            passing_table: Vec::new(),
            sample: None,
            propose: 0,
            scores: Vec::new(),
        };
        let logits = runner.logits(&StepPlan::new(vec![sequence])).unwrap();
        logits[logits.len() - runner.spec().vocab_size..].to_vec()
    })
}

/// A model of candle's, given as its function from `[1, tokens]` and a position to logits.
pub fn candle(mut forward: impl FnMut(&Tensor, usize) -> candle_core::Result<Tensor> + 'static) -> Feed {
    Box::new(move |tokens, position| {
        let tokens = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let logits = forward(&tokens, position).unwrap_or_else(|e| panic!("candle: {e}"));
        logits.flatten_all().unwrap().to_vec1().unwrap()
    })
}

/// How the judge is given a context.
#[derive(Clone, Copy, PartialEq)]
pub enum Feeding {
    /// As ours: the prompt, then token by token on top of what is cached.
    Cached,
    /// The whole context again for every token.
    Afresh,
    /// One token at a time from the first on.
    ByToken,
}

/// How far logits are apart.
pub struct Difference {
    /// The largest difference.
    pub worst: f32,
    /// The root of the mean square of the differences, over that of the logits.
    pub relative: f32,
}

/// Compares the logits after each text's prompt and after each token of its continuation.
pub fn compare(mut ours: Feed, mut judge: impl FnMut() -> Feed, feeding: Feeding, texts: &[Text]) -> Difference {
    let (mut worst, mut differences, mut logits) = (0f32, 0f32, 0f32);
    for text in texts {
        let all = [text.prompt.as_slice(), &text.continuation].concat();
        let mut kept = judge();
        let mut start = 0;
        for end in text.prompt.len()..=all.len() {
            let actual = ours(&all[start..end], start);
            let expected = match feeding {
                Feeding::Cached => kept(&all[start..end], start),
                Feeding::Afresh => judge()(&all[..end], 0),
                Feeding::ByToken => (start..end).map(|i| kept(&all[i..=i], i)).last().unwrap(),
            };
            assert_eq!(actual.len(), expected.len());
            for (a, e) in actual.iter().zip(&expected) {
                assert!(a.is_finite() && e.is_finite(), "{}: {a} and {e}", text.name);
                worst = worst.max((a - e).abs());
                differences += (a - e) * (a - e);
                logits += e * e;
            }
            start = end;
        }
    }
    Difference { worst, relative: (differences / logits).sqrt() }
}
