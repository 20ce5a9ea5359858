//! GGUF files: the value of every block format that candle has, bit for bit, and whole models from one file,
//! by candle's own reader and kernels. Files that the goldens lack are written here, by candle.
//!
//! Candle 0.11.1 does not know IQ4_NL and IQ4_XS, nor `rope_freqs.weight`.

mod common;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use baton_device::BlockFormat;
use candle_core::Device::Cpu;
use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_transformers::models::{quantized_llama, quantized_qwen2, quantized_qwen3};
use common::{Feed, Feeding, TOLERANCE, Text, candle, compare, golden, json, ours, texts};

/// On logits, root mean square over root mean square, where candle's kernels round activations to 8 bits and ours
/// do not.
const ACTIVATIONS: f32 = 0.05;

const FORMATS: [(BlockFormat, GgmlDType); 10] = [
    (BlockFormat::Q4_0, GgmlDType::Q4_0),
    (BlockFormat::Q4_1, GgmlDType::Q4_1),
    (BlockFormat::Q5_0, GgmlDType::Q5_0),
    (BlockFormat::Q5_1, GgmlDType::Q5_1),
    (BlockFormat::Q8_0, GgmlDType::Q8_0),
    (BlockFormat::Q2_K, GgmlDType::Q2K),
    (BlockFormat::Q3_K, GgmlDType::Q3K),
    (BlockFormat::Q4_K, GgmlDType::Q4K),
    (BlockFormat::Q5_K, GgmlDType::Q5K),
    (BlockFormat::Q6_K, GgmlDType::Q6K),
];

/// Bytes as random as a splitmix64 makes them, with finite scales.
fn random_blocks(format: BlockFormat, count: usize) -> Vec<u8> {
    let mut state = format as u64;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as u8
    };
    let mut blocks: Vec<u8> = (0..count * format.bytes()).map(|_| next()).collect();
    for block in blocks.chunks_exact_mut(format.bytes()) {
        for &offset in format.scale_offsets() {
            block[offset + 1] &= !0x40; // an f16 below 2
        }
    }
    blocks
}

#[test]
fn values_of_blocks_are_equal_bit_for_bit() {
    const BLOCKS: usize = 500;
    for (format, theirs) in FORMATS {
        let blocks = random_blocks(format, BLOCKS);
        let mut actual = vec![0f32; BLOCKS * format.elements()];
        format.dequantize(&blocks, &mut actual);
        let storage = QStorage::from_data(Cow::Borrowed(&blocks), &Cpu, theirs).unwrap();
        let tensor = QTensor::new(storage, (BLOCKS, format.elements())).unwrap();
        let expected = tensor.dequantize(&Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(expected.iter().any(|v| v.abs() > 1.0), "{format}");
        let differing = actual.iter().zip(&expected).filter(|(a, e)| a.to_bits() != e.to_bits()).count();
        assert_eq!(differing, 0, "{format}: values that differ, of {}", actual.len());
    }
}

/// A file in memory.
struct Model {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, QTensor>,
}

impl Model {
    fn read(path: &Path) -> Self {
        let mut file = File::open(path).unwrap();
        let content = Content::read(&mut file).unwrap();
        let names = content.tensor_infos.keys();
        let tensors = names.map(|name| (name.clone(), content.tensor(&mut file, name, &Cpu).unwrap())).collect();
        Self { metadata: content.metadata.into_iter().collect(), tensors }
    }

    fn golden(name: &str) -> Self {
        Self::read(&golden("gguf").join(name).with_extension("gguf"))
    }

    fn write(&self, path: &Path) {
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }

    /// The same values, each matrix in another format.
    fn with_matrices(&self, dtype: GgmlDType) -> Self {
        let convert = |(name, tensor): (&String, &QTensor)| {
            let dtype = if tensor.rank() == 2 { dtype } else { GgmlDType::F32 };
            let values = tensor.dequantize(&Cpu).unwrap();
            (name.clone(), QTensor::quantize(&values, dtype).unwrap())
        };
        Self { metadata: self.metadata.clone(), tensors: self.tensors.iter().map(convert).collect() }
    }

    fn judge(&self) -> Feed {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("judge.gguf");
        self.write(&path);
        let mut file = File::open(&path).unwrap();
        let content = Content::read(&mut file).unwrap();
        macro_rules! model {
            ($module:ident) => {{
                let mut model = $module::ModelWeights::from_gguf(content, &mut file, &Cpu).unwrap();
                candle(move |tokens, position| model.forward(tokens, position))
            }};
        }
        match self.metadata["general.architecture"].to_string().unwrap().as_str() {
            "llama" => model!(quantized_llama),
            "qwen2" => model!(quantized_qwen2),
            "qwen3" => model!(quantized_qwen3),
            other => panic!("{other}"),
        }
    }
}

/// Compares our reading of the file with candle's, first with the values of the blocks, then with its kernels.
#[track_caller]
fn assert_agrees(model: &Model, texts: &[Text], what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    model.write(&path);
    let difference = |judge: &Model| compare(ours(&path), || judge.judge(), Feeding::Cached, texts);
    let values = difference(&model.with_matrices(GgmlDType::F32)).worst;
    assert!(values <= TOLERANCE, "{what}: off by {values}");
    let blocks = difference(model).relative;
    assert!(blocks <= ACTIVATIONS, "{what}: off by {blocks} with candle's kernels");
}

#[test]
fn llama_in_q4_0() {
    let mut model = Model::golden("llama-rope3-Q4_0");
    let texts = texts("llama-rope3", 200);
    let with_factors = ours(&golden("gguf/llama-rope3-Q4_0.gguf"));
    let off = compare(with_factors, || model.judge(), Feeding::Cached, &texts).relative;
    assert!(off > 2.0 * ACTIVATIONS, "candle now knows rope factors, or this cannot fail: off by {off}");
    assert!(model.tensors.remove("rope_freqs.weight").is_some());
    assert_agrees(&model, &texts, "Q4_0");
}

#[test]
fn llama_in_q4_k_and_q6_k() {
    assert_agrees(&Model::golden("llama-256-Q4_K_M"), &texts("llama-256", 200), "Q4_K_M");
}

#[test]
fn qwen2_in_q8_0() {
    assert_agrees(&Model::golden("qwen2-tied-Q8_0"), &texts("qwen2-tied", 200), "Q8_0");
}

/// The file that converting `models/golden/qwen3` would give.
fn qwen3() -> Model {
    let folder = golden("qwen3");
    let config = json(&folder.join("config.json"));
    let size = |key: &str| Value::U32(config[key].as_u64().unwrap().try_into().unwrap());
    let number = |key: &str| Value::F32(config[key].as_f64().unwrap() as f32);
    let metadata = [
        ("general.architecture", Value::String("qwen3".into())),
        ("general.dtype", Value::U32(0)), // candle's own: computes rope in f32
        ("qwen3.block_count", size("num_hidden_layers")),
        ("qwen3.context_length", size("max_position_embeddings")),
        ("qwen3.embedding_length", size("hidden_size")),
        ("qwen3.feed_forward_length", size("intermediate_size")),
        ("qwen3.attention.head_count", size("num_attention_heads")),
        ("qwen3.attention.head_count_kv", size("num_key_value_heads")),
        ("qwen3.attention.key_length", size("head_dim")),
        ("qwen3.attention.layer_norm_rms_epsilon", number("rms_norm_eps")),
        ("qwen3.rope.freq_base", number("rope_theta")),
    ];
    let name = |name: &str| {
        let pairs = [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("model.layers", "blk"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ];
        pairs.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
    };
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Cpu).unwrap();
    let tensors = tensors.into_iter().map(|(n, t)| (name(&n), QTensor::quantize(&t, GgmlDType::F32).unwrap()));
    Model { metadata: metadata.map(|(k, v)| (k.to_owned(), v)).into(), tensors: tensors.collect() }
}

#[test]
fn qwen3_in_q4_0() {
    assert_agrees(&qwen3().with_matrices(GgmlDType::Q4_0), &texts("qwen3", 200), "Q4_0");
}

#[test]
fn every_format_in_a_file_that_candle_quantised() {
    let model = Model::golden("llama-256-Q4_K_M");
    for (format, dtype) in FORMATS {
        assert_agrees(&model.with_matrices(dtype), &texts("llama-256", 40), format.name());
    }
}
