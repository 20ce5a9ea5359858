//! Checkpoints of any supported architecture and size with random weights and a made-up tokenizer: what
//! they answer means nothing, what they cost to load and to run is real.
//!
//! Every value is a hash of (seed, tensor name, index), so that a seed gives the same files anywhere.

mod gguf;
mod tokenizer;

use std::{fs, ops::Range, path::PathBuf, thread};

use anyhow::{Context, Result, ensure};
use baton_device::{BlockFormat, DType};
use baton_model::{ModelConfig, NewCheckpoint, NewTensor, tensor_shapes};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use tokenizer::Vocab;

/// Standard deviation of the weights.
const SIGMA: f32 = 0.02;
/// Elements that a thread makes at once: whole blocks of any format.
const SHARE: usize = 1 << 17;

/// Known shapes, each a config without token ids.
const SHAPES: [(&str, &str); 10] = [
    ("qwen2-0.5b", include_str!("../../shapes/qwen2-0.5b.json")),
    ("qwen2-1.5b", include_str!("../../shapes/qwen2-1.5b.json")),
    ("qwen2-7b", include_str!("../../shapes/qwen2-7b.json")),
    ("qwen3-30b-a3b", include_str!("../../shapes/qwen3-30b-a3b.json")),
    ("r1-qwen-1.5b", include_str!("../../shapes/r1-qwen-1.5b.json")),
    ("qwen3-moe-1b-active", include_str!("../../shapes/qwen3-moe-1b-active.json")),
    ("deepseek-v3-tiny", include_str!("../../shapes/deepseek-v3-tiny.json")),
    ("deepseek-v3-long", include_str!("../../shapes/deepseek-v3-long.json")),
    ("deepseek-v32-long", include_str!("../../shapes/deepseek-v32-long.json")),
    ("deepseek-v4-long", include_str!("../../shapes/deepseek-v4-long.json")),
];

/// Arguments of the chore.
#[derive(clap::Args)]
pub struct Args {
    /// Shape of a known model: qwen2-0.5b, qwen2-1.5b, qwen2-7b, qwen3-30b-a3b (61 GB), r1-qwen-1.5b, qwen3-moe-1b-active (7 GiB), deepseek-v3-tiny; deepseek-v3-long, deepseek-v32-long and deepseek-v4-long: four layers with attention of published width, for long contexts
    #[arg(long, value_name = "NAME", required_unless_present = "config", conflicts_with = "config")]
    shape: Option<String>,
    /// A config.json instead; a quantisation that it states and its token ids are not taken over
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Layers, in place of the shape's
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Folder to write, which must not exist; or, where the name ends in .gguf, a GGUF file
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Type of the weights; blocks (q8_0, q4_0, q4_k) in GGUF files alone, of all matrices alike
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: Dtype,
    /// Equal seeds give equal files
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8,
    #[value(name = "q4_0")]
    Q4,
    #[value(name = "q4_k")]
    Q4K,
}

impl Dtype {
    fn stored(self) -> DType {
        match self {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::Bf16 => DType::BF16,
            Dtype::Q8 => DType::Ggml(BlockFormat::Q8_0),
            Dtype::Q4 => DType::Ggml(BlockFormat::Q4_0),
            Dtype::Q4K => DType::Ggml(BlockFormat::Q4_K),
        }
    }

    /// Its name in configs.
    fn in_config(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 | Dtype::Q8 | Dtype::Q4 | Dtype::Q4K => "bfloat16",
        }
    }
}

/// Runs the chore.
pub fn main(args: &Args) -> Result<()> {
    let text = match (&args.shape, &args.config) {
        (_, Some(file)) => fs::read_to_string(file).with_context(|| file.display().to_string())?,
        (Some(name), None) => shape(name)?.to_owned(),
        (None, None) => unreachable!("clap asks for one of them"),
    };
    let bar = ProgressBar::no_length();
    bar.set_style(ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left")?);
    write(&text, args, &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    Ok(())
}

/// Writes a folder in bf16: of a known shape, or else of a config.
pub fn folder(shape_or_config: &str, out: PathBuf) -> Result<()> {
    let known = SHAPES.iter().find(|(name, _)| *name == shape_or_config).map(|(_, config)| *config);
    let args = Args { shape: None, config: None, layers: None, out, dtype: Dtype::Bf16, seed: 0 };
    write(known.unwrap_or(shape_or_config), &args, &|_, _| ())
}

fn shape(name: &str) -> Result<&'static str> {
    let names = SHAPES.map(|s| s.0).join(", ");
    Ok(SHAPES.iter().find(|s| s.0 == name).with_context(|| format!("there is no shape {name}; there are {names}"))?.1)
}

fn write(config: &str, args: &Args, progress: &dyn Fn(u64, u64)) -> Result<()> {
    let mut config: Map<String, Value> = serde_json::from_str(config).context("the config")?;
    let vocab = Vocab::new(config.get("vocab_size").and_then(Value::as_u64).unwrap_or_default())?;
    if let Some(layers) = args.layers {
        config.insert("num_hidden_layers".into(), layers.into());
    }
    config.remove("quantization_config");
    config.remove("dtype");
    config.insert("torch_dtype".into(), args.dtype.in_config().into());
    config.insert("bos_token_id".into(), Value::Null);
    config.insert("pad_token_id".into(), Value::Null);
    config.insert("eos_token_id".into(), vocab.end_id().into());
    let json = serde_json::to_vec_pretty(&config)?;
    let parsed = ModelConfig::parse(&json)?;
    let weights = Weights { seed: args.seed, norm: 1.0 - parsed.norm_offset };
    let dtype = args.dtype.stored();
    if args.out.extension().is_some_and(|e| e == "gguf") {
        let tensors = gguf::tensors(&parsed, dtype)?;
        return gguf::write(&args.out, (&parsed, &config), &vocab, &tensors, progress, |tensor, write| {
            let mut parts = tensor.parts.iter();
            parts.try_for_each(|name| weights.write(name, tensor.part_elements(), tensor.dtype, write))
        });
    }
    ensure!(dtype.block() == 1, "{dtype} is written to GGUF files; of a folder `baton quantize` makes one in blocks");
    let tensors: Vec<NewTensor> =
        tensor_shapes(&parsed).into_iter().map(|(name, shape)| NewTensor::new(name, &shape, dtype)).collect();
    let folder = NewCheckpoint::create(&args.out, tensors)?;
    folder.write_file("config.json", &json)?;
    let note = json!({"random weights": {"seed": args.seed, "sigma": SIGMA}});
    folder.write_file("random_model.json", note.to_string().as_bytes())?;
    let tokenizer = tokenizer::files(&vocab)?;
    folder.write_file("tokenizer.json", &tokenizer.tokenizer)?;
    folder.write_file("tokenizer_config.json", &tokenizer.config)?;
    folder.write_tensors(progress, |tensor, write| {
        weights.write(tensor.name(), (tensor.bytes() / dtype.bytes(1) as u64) as usize, dtype, write)
    })?;
    Ok(())
}

/// The values of a checkpoint.
struct Weights {
    seed: u64,
    /// Every value of a norm, with which it changes nothing.
    norm: f32,
}

impl Weights {
    /// Writes a tensor of the Hugging Face checkpoint, made on all cores.
    fn write<E>(
        &self,
        name: &str,
        elements: usize,
        dtype: DType,
        write: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let key = key(self.seed, name);
        let norm = name.ends_with("norm.weight").then_some(self.norm);
        let make = |range: Range<usize>| match norm {
            Some(norm) => encode(dtype, range.map(|_| norm)),
            None => encode(dtype, range.map(|i| normal(key, i as u64) * SIGMA)),
        };
        let cores = thread::available_parallelism().map_or(1, usize::from);
        for start in (0..elements).step_by(SHARE * cores) {
            let end = elements.min(start + SHARE * cores);
            let parts: Vec<Vec<u8>> = thread::scope(|scope| {
                let ranges = (start..end).step_by(SHARE).map(|from| from..end.min(from + SHARE));
                let workers: Vec<_> = ranges.map(|range| scope.spawn(|| make(range))).collect();
                workers.into_iter().map(|worker| worker.join().expect("it does not panic")).collect()
            });
            parts.iter().try_for_each(|part| write(part))?;
        }
        Ok(())
    }
}

/// Values in a type, little-endian; bf16 rounds to nearest even.
fn encode(dtype: DType, values: impl Iterator<Item = f32>) -> Vec<u8> {
    match dtype {
        DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
        DType::F16 => values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
        DType::BF16 => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        DType::Ggml(format) => format.quantize(&values.collect::<Vec<_>>()),
    }
}

/// The key of a tensor: FNV-1a of its name over the seed's hash.
fn key(seed: u64, name: &str) -> u64 {
    name.bytes().fold(mix(seed), |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// splitmix64's finaliser.
fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Of mean 0 and variance 1, near normal: the sum of four uniform numbers of 16 bits.
fn normal(key: u64, index: u64) -> f32 {
    let bits = mix(key ^ mix(index));
    let sum: u32 = (0..4).map(|i| (bits >> (16 * i) & 0xffff) as u32).sum();
    // The sum's mean is 2·65535, its variance (2³² - 1) / 3.
    (sum as f32 - 131_070.0) * (3f32.sqrt() / 65_536.0)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use baton_device::Reference;
    use baton_model::{Files, LoadOptions, SequenceStep, StepPlan, Tokens, load};

    use super::*;

    fn args(out: &Path, seed: u64) -> Args {
        Args { shape: None, config: None, layers: None, out: out.to_owned(), dtype: Dtype::Bf16, seed }
    }

    #[test]
    fn values_have_the_moments_of_a_normal_distribution() {
        let values: Vec<f64> = (0..200_000).map(|i| f64::from(normal(key(1, "a"), i))).collect();
        let moment = |power: i32| values.iter().map(|v| v.powi(power)).sum::<f64>() / values.len() as f64;
        assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.01 && moment(3).abs() < 0.03);
    }

    #[test]
    fn every_shape_is_one_that_can_be_served() {
        for (name, text) in SHAPES {
            let config = ModelConfig::parse(text.as_bytes()).unwrap_or_else(|e| panic!("{name}: {e}"));
            let parameters: usize = tensor_shapes(&config).iter().map(|t| t.1.iter().product::<usize>()).sum();
            let known = match name {
                "qwen2-0.5b" => 494_032_768,
                "qwen2-1.5b" => 1_543_714_304,
                "qwen2-7b" => 7_615_616_512,
                "qwen3-30b-a3b" => 30_532_122_624,
                "r1-qwen-1.5b" => 1_777_088_000,
                _ => parameters,
            };
            assert_eq!(parameters, known, "{name}");
        }
    }

    #[test]
    fn a_seed_gives_the_same_checkpoint_and_another_one_another() {
        let temp = tempfile::tempdir().unwrap();
        let mut config: Value = serde_json::from_str(shape("deepseek-v3-tiny").unwrap()).unwrap();
        config["n_routed_experts"] = json!(8);
        config["vocab_size"] = json!(300);
        let files = [("a", 3), ("b", 3), ("c", 4)].map(|(name, seed)| {
            let out = temp.path().join(name);
            write(&config.to_string(), &Args { layers: Some(2), ..args(&out, seed) }, &|_, _| {}).unwrap();
            fs::read(out.join("model.safetensors")).unwrap()
        });
        assert!(files[0] == files[1] && files[0] != files[2]);
        let error = write(&config.to_string(), &args(&temp.path().join("d.gguf"), 0), &|_, _| {}).unwrap_err();
        assert!(error.to_string().contains("DeepseekV3ForCausalLM"), "{error}");
        let small = r#"{"vocab_size": 258}"#;
        let error = write(small, &args(&temp.path().join("d"), 0), &|_, _| {}).unwrap_err().to_string();
        assert!(error.contains("at least 259"), "{error}");
        assert!(shape("gpt-9").unwrap_err().to_string().contains("qwen2-0.5b"));
    }

    #[test]
    fn a_gguf_file_is_the_folder_to_the_last_bit() {
        let temp = tempfile::tempdir().unwrap();
        let logits = |path: &Path| {
            let options = LoadOptions { max_model_len: Some(16), ..LoadOptions::default() };
            let (mut runner, _) = load(Reference::new(), &Files::at(path).unwrap(), &options).unwrap();
            let tokens = Tokens::Known(vec![7, 300, 21]);
            let sequence = SequenceStep {
                id: 0,
                num_computed: 0,
                tokens,
                draft: Vec::new(),
                block_table: vec![0],
                passing_table: Vec::new(),
                adapter: None,
                sample: None,
                propose: 0,
                scores: Vec::new(),
            };
            runner.logits(&StepPlan::new(vec![sequence])).unwrap()
        };
        for name in ["qwen2-0.5b", "r1-qwen-1.5b", "qwen3-moe-1b-active"] {
            let mut config: Value = serde_json::from_str(shape(name).unwrap()).unwrap();
            for (field, value) in [
                ("vocab_size", 320),
                ("hidden_size", 64),
                ("intermediate_size", 96),
                ("num_hidden_layers", 2),
                ("num_attention_heads", 4),
                ("num_key_value_heads", 2),
                ("moe_intermediate_size", 32),
                ("num_experts", 12),
                ("head_dim", 24),
                ("max_position_embeddings", 64),
            ] {
                if config.get(field).is_some() {
                    config[field] = json!(value);
                }
            }
            let [folder, file] = ["", ".gguf"].map(|ending| {
                let out = temp.path().join(format!("{name}{ending}"));
                write(&config.to_string(), &Args { dtype: Dtype::F32, ..args(&out, 5) }, &|_, _| {}).unwrap();
                logits(&out)
            });
            assert!(folder.iter().all(|x| x.is_finite()) && folder == file, "{name}");
        }
    }
}
