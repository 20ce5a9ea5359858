//! A folder of files through the whole of loading, and if it is loaded, through one step.

use std::path::Path;
use std::sync::Arc;

use baton_device::Reference;
use baton_model::{
    Files, GgufTokenizer, KvCacheSize, LoadOptions, Runner, SampleRequest, SequenceStep, StepPlan, Tokens, load,
};

/// A checkpoint is refused with a reason, or it is loaded and its rows are read; true if it was loaded.
pub fn run(path: &Path) -> bool {
    let Ok(files) = Files::at(path) else { return false };
    let _ = GgufTokenizer::read(&files);
    let options = LoadOptions {
        max_model_len: Some(2),
        max_step_tokens: 2,
        max_step_sequences: 1,
        kv_cache: KvCacheSize::AtMost(16 << 20),
        ..LoadOptions::default()
    };
    match load(Reference::new(), &files, &options) {
        Ok((mut runner, _)) => {
            let last = runner.spec().vocab_size as u32 - 1;
            let tokens = Tokens::Known(vec![0, last]);
            let sample =
                SampleRequest { params: Arc::default(), position: 0, history: Vec::new(), prompt_len: 2, masks: None };
            let step = SequenceStep {
                id: 1,
                num_computed: 0,
                tokens,
                draft: Vec::new(),
                block_table: vec![0],
                passing_table: vec![0],
                sample: Some(sample),
                propose: 0,
                scores: Vec::new(),
                adapter: None,
            };
            runner.step(&StepPlan::new(vec![step])).expect("a step within the limits");
            true
        }
        Err(error) => {
            assert!(error.to_string().len() < 64 << 10, "a refusal is a message, not a file");
            false
        }
    }
}
