//! Damaged, hostile and unsuitable checkpoints: each is a typed error that names the cause, none a
//! panic, none a silently different model.

use std::fs;

use crate::common::checkpoint::{Copy, Tensor, find, probe, sharded, with_header};
use crate::common::{Rng, folder, options, options_of};
use baton_device::{BlockFormat, DType, Reference, WeightFormat};
use baton_model::{Files, KvCacheSize, LoadError, LoadOptions, Passing, load};
use serde_json::json;

#[test]
fn a_missing_folder_is_named() {
    let error = Files::folder("/no/such/folder").unwrap_err().to_string();
    assert!(error.contains("/no/such/folder"), "{error}");
    let file = folder("qwen3").join("config.json");
    assert!(Files::folder(file).unwrap_err().to_string().contains("it is a file"));
}

#[test]
fn missing_and_empty_files_are_named() {
    let copy = Copy::of("qwen3");
    copy.write("model.safetensors", b"");
    copy.assert_refused(&["model.safetensors is empty"]);
    fs::remove_file(copy.path().join("model.safetensors")).unwrap();
    copy.assert_refused(&["no weight file"]);
    copy.write("config.json", b"");
    copy.assert_refused(&["config.json is empty"]);
    fs::remove_file(copy.path().join("config.json")).unwrap();
    copy.assert_refused(&["config.json is missing"]);
}

#[test]
fn formats_that_are_not_read_are_named() {
    for (name, wanted) in [
        ("pytorch_model.bin", "pickle"),
        ("consolidated.00.pth", "pickle"),
        ("model-Q4.gguf", "GGUF"),
        ("model-00001-of-00002.safetensors", "without model.safetensors.index.json"),
    ] {
        let copy = Copy::of("qwen3");
        fs::rename(copy.path().join("model.safetensors"), copy.path().join(name)).unwrap();
        copy.assert_refused(&[name, wanted]);
    }
}

#[test]
fn a_file_cut_anywhere_is_damaged() {
    let copy = Copy::of("qwen3");
    let whole = copy.read("model.safetensors");
    let cuts = (0..whole.len()).step_by(4096).chain([1, 7, 8, 9, whole.len() - 1]);
    for cut in cuts {
        copy.write("model.safetensors", &whole[..cut]);
        let message = copy.refusal();
        assert!(message.contains("truncated") || message.contains("empty"), "cut at {cut}: {message}");
    }
}

#[test]
fn a_flipped_header_bit_is_an_error_or_changes_nothing() {
    let copy = Copy::of("llama-256");
    let whole = copy.read("model.safetensors");
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let expected = probe(copy.load().unwrap());
    let mut rng = Rng(1);
    let mut refused = 0;
    // Every bit of the length, and a sample of the others.
    for bit in (0..64).chain((0..600).map(|_| rng.below(header * 8))) {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        copy.write("model.safetensors", &damaged);
        match copy.load() {
            Ok(loaded) => assert!(probe(loaded) == expected, "bit {bit}: another model"),
            Err(LoadError::Checkpoint(_)) => refused += 1,
            Err(error) => panic!("bit {bit}: {error}"),
        }
    }
    assert!(refused > 600, "only {refused} of 664 were refused");
}

#[test]
fn ranges_that_do_not_tile_the_file_are_refused() {
    let entry =
        |from: usize, to: usize| json!({"dtype": "F32", "shape": [(to - from) / 4], "data_offsets": [from, to]});
    let copy = Copy::of("qwen3");
    for (header, bytes, wanted) in [
        (json!({"a": entry(0, 16), "b": entry(8, 24)}), 24, "overlaps"),
        (json!({"a": entry(0, 16), "b": entry(20, 24)}), 24, "hole"),
        (json!({"a": entry(4, 16)}), 16, "hole"),
        (json!({"a": entry(0, 16)}), 20, "4 bytes follow"),
        (json!({"a": entry(0, 0)}), 0, "no elements"),
        (json!({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}), 16, "not what F32 [3] takes"),
        (json!({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}), 16, "16..0"),
        (json!({"a": {"dtype": "F32", "shape": [1u64 << 62, 8], "data_offsets": [0, 16]}}), 16, "takes"),
        (json!({"a": {"dtype": "F32", "shape": [4], "data_offsets": [u64::MAX - 15, u64::MAX]}}), 16, "takes"),
        (json!({"a": {"dtype": "Q7", "shape": [4], "data_offsets": [0, 16]}}), 16, "unknown dtype"),
        (json!({"a": {"dtype": "U8", "shape": [1, 1, 1, 1, 1, 1, 1, 1, 1], "data_offsets": [0, 1]}}), 1, "dimensions"),
        (json!({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}), 1, "not valid"),
        (json!({"a\nb": entry(0, 16)}), 16, "not printable"),
        (json!([]), 0, "not valid"),
    ] {
        copy.write("model.safetensors", &with_header(header.to_string().as_bytes(), &vec![0; bytes]));
        copy.assert_refused(&["model.safetensors is damaged", wanted]);
    }
    for name in ["a", "__metadata__"] {
        let deep = format!("{{\"{name}\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        copy.write("model.safetensors", &with_header(deep.as_bytes(), &[]));
        assert!(matches!(copy.load(), Err(LoadError::Checkpoint(_))), "{name}");
    }
    copy.write("model.safetensors", &[&(1u64 << 40).to_le_bytes()[..], &[0; 64]].concat());
    copy.assert_refused(&["at most"]);
}

#[test]
fn a_repeated_name_is_refused() {
    let copy = Copy::of("qwen3");
    copy.edit_weights(|tensors| {
        let twice = find(tensors, "model.norm.weight").clone();
        tensors.push(twice);
    });
    copy.assert_refused(&["model.norm.weight occurs twice"]);
}

#[test]
fn every_wrong_tensor_is_named_at_once() {
    let copy = Copy::of("deepseek-v3");
    copy.edit_weights(|tensors| {
        tensors.retain(|t| t.name != "model.layers.1.mlp.gate.weight");
        find(tensors, "model.norm.weight").shape = vec![2, 48];
        let ids = find(tensors, "model.layers.0.input_layernorm.weight");
        (ids.dtype, ids.data) = ("I64".into(), vec![0; 96 * 8]);
        let surplus = find(tensors, "lm_head.weight").clone();
        tensors.push(Tensor { name: "model.layers.0.mlp.surplus.weight".into(), ..surplus });
    });
    copy.assert_refused(&[
        "model.layers.1.mlp.gate.weight is missing",
        "model.norm.weight has shape [2, 48], the config asks for [96]",
        "model.layers.0.input_layernorm.weight has dtype I64",
        "model.layers.0.mlp.surplus.weight is not part of this model",
    ]);
}

#[test]
fn a_long_list_of_reasons_is_cut() {
    let copy = Copy::of("deepseek-v3");
    copy.edit_config(|c| drop(c.insert("n_routed_experts".into(), json!(4096))));
    let message = copy.refusal();
    assert!(message.len() < 5000 && message.contains("more"), "{} bytes", message.len());
}

#[test]
fn harmless_extras_are_ignored() {
    for (case, name) in [
        ("deepseek-v3", "model.layers.7.enorm.weight"),
        ("qwen3", "lm_head.weight"),
        ("qwen3", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ] {
        let copy = Copy::of(case);
        let expected = probe(copy.load().unwrap());
        copy.edit_weights(|tensors| {
            tensors.push(Tensor { name: name.into(), dtype: "I64".into(), shape: vec![1], data: vec![7; 8] });
        });
        assert!(probe(copy.load().unwrap()) == expected, "{name}");
    }
}

#[test]
fn a_weight_that_is_not_finite_is_named() {
    // NaN and infinity in bf16 and f16.
    for (case, bits) in [("qwen3", 0x7fc0u16), ("qwen3", 0xff80), ("qwen2-untied", 0x7e00), ("qwen2-untied", 0x7c00)] {
        let copy = Copy::of(case);
        copy.edit_weights(|tensors| {
            let tensor = find(tensors, "model.layers.1.mlp.up_proj.weight");
            tensor.data[2 * 777..][..2].copy_from_slice(&bits.to_le_bytes());
        });
        copy.assert_refused(&["model.layers.1.mlp.up_proj.weight", "at element 777"]);
    }
}

#[test]
fn shards_make_the_same_model_with_the_same_digest() {
    let (single, shards) = (Copy::of("deepseek-v3").load().unwrap(), sharded("deepseek-v3").load().unwrap());
    assert_eq!(single.1.digest, shards.1.digest);
    assert!(probe(single) == probe(shards));
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    let norm = "model.norm.weight";
    sharded("qwen3").edit_index(|m| drop(m.remove(norm))).assert_refused(&[norm, "not in the index"]);
    sharded("qwen3")
        .edit_index(|m| drop(m.insert(norm.into(), json!("a.safetensors"))))
        .assert_refused(&[norm, "is in b.safetensors, not in a.safetensors"]);
    sharded("qwen3")
        .edit_index(|m| drop(m.insert("ghost".into(), json!("a.safetensors"))))
        .assert_refused(&["ghost is not in a.safetensors"]);
    sharded("qwen3")
        .edit_index(|m| drop(m.insert("ghost".into(), json!("c.safetensors"))))
        .assert_refused(&["c.safetensors is missing"]);
    let copy = sharded("qwen3");
    copy.write("model.safetensors.index.json", br#"{"weight_map": {"a": "x", "a": "y"}}"#);
    copy.assert_refused(&["a occurs twice"]);
    copy.write("model.safetensors.index.json", b"{\"weight_map\": []}");
    copy.assert_refused(&["index"]);
    copy.write("model.safetensors", &copy.read("a.safetensors"));
    copy.write("model.safetensors.index.json", b"{\"weight_map\": {}}");
    copy.assert_refused(&["either could be meant"]);
}

#[test]
fn a_shard_outside_the_folder_is_refused() {
    for name in ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "a\0b"] {
        let copy = sharded("qwen3");
        copy.edit_index(|m| drop(m.insert("model.norm.weight".into(), json!(name))));
        copy.assert_refused(&["is not a plain file name"]);
    }
}

#[cfg(unix)]
#[test]
fn a_file_that_is_none_is_refused_without_opening_it() {
    let copy = Copy::of("qwen3");
    fs::remove_file(copy.path().join("model.safetensors")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", copy.path().join("model.safetensors")).unwrap();
    copy.assert_refused(&["not a regular file"]);
}

#[test]
fn a_digest_covers_config_and_weights() {
    let copy = Copy::of("qwen3");
    let digest = |copy: &Copy| copy.load().unwrap().1.digest;
    let original = digest(&copy);
    assert_eq!(original.len(), 64);
    copy.edit_weights(|tensors| {
        let last = find(tensors, "model.norm.weight").data.last_mut().unwrap();
        *last ^= 0x80;
    });
    let other_weight = digest(&copy);
    copy.edit_config(|c| drop(c.insert("rope_theta".into(), json!(2e6))));
    assert!(original != other_weight && other_weight != digest(&copy));
}

#[test]
fn a_cache_too_small_for_one_sequence_is_refused_with_the_arithmetic() {
    let files = Files::folder(folder("qwen3")).unwrap();
    // 3 layers, keys and values of 2 heads of 32, f32, blocks of 8 tokens.
    let block_bytes = 3 * 2 * 2 * 32 * 4 * 8;
    let with = |kv_cache| load(Reference::new(), &files, &LoadOptions { kv_cache, ..options() });
    let enough = block_bytes * 50;
    for size in [KvCacheSize::AtMost(enough - 1), KvCacheSize::Bytes(enough - 1)] {
        let message = with(size).err().unwrap().to_string();
        for wanted in ["400 tokens", "50 cache blocks", "12288 bytes", "614400 bytes", "49 blocks"] {
            assert!(message.contains(wanted), "{wanted} not in: {message}");
        }
    }
    for (size, blocks) in [
        (KvCacheSize::AtMost(enough), 50),
        (KvCacheSize::AtMost(u64::MAX), 50 * 8),
        (KvCacheSize::Bytes(enough * 20), 1000),
    ] {
        let (runner, report) = with(size).unwrap();
        let spec = baton_model::Runner::spec(&runner).clone();
        assert_eq!((spec.num_blocks, report.kv_bytes), (blocks, block_bytes * blocks as u64));
    }
}

#[test]
fn what_passes_comes_first_and_a_cache_too_small_for_it_is_refused_with_the_arithmetic() {
    let files = Files::folder(folder("deepseek-v4")).unwrap();
    let with = |kv_cache| {
        let options = LoadOptions { kv_cache, ..options_of("deepseek-v4") };
        load(Reference::new(), &files, &options)
    };
    let (runner, whole) = with(KvCacheSize::AtMost(u64::MAX)).unwrap();
    let spec = baton_model::Runner::spec(&runner).clone();
    let passing = spec.passing.unwrap();
    assert_eq!(passing.reach, 23, "a window of 24");
    let fewest = Passing::fewest(23, spec.block_size, spec.max_step_sequences, spec.max_step_tokens);
    assert!(passing.num_blocks > fewest && whole.passing_bytes > 0 && whole.kv_bytes > whole.passing_bytes);
    // As many bytes give as many blocks again; those of one context are the fewest.
    let kept_bytes = (whole.kv_bytes - whole.passing_bytes) / spec.num_blocks as u64;
    let enough = whole.passing_bytes + kept_bytes * spec.max_model_len.div_ceil(spec.block_size) as u64;
    for bytes in [whole.kv_bytes, enough] {
        let (runner, report) = with(KvCacheSize::Bytes(bytes)).unwrap();
        assert_eq!((report.kv_bytes, report.passing_bytes), (bytes, whole.passing_bytes));
        assert_eq!(baton_model::Runner::spec(&runner).passing, Some(passing));
    }
    for bytes in [enough - 1, whole.passing_bytes - 1, 0] {
        let message = with(KvCacheSize::Bytes(bytes)).err().unwrap().to_string();
        let beside = format!("beside {} bytes", whole.passing_bytes);
        for wanted in ["440 tokens", &beside, "up to 8 sequences", "fewer sequences in a step"] {
            assert!(message.contains(wanted), "{wanted} not in: {message}");
        }
    }
}

#[test]
fn options_that_do_not_suit_the_model_are_refused_together() {
    let files = Files::folder(folder("deepseek-v3")).unwrap();
    let bad = LoadOptions { max_model_len: Some(1025), max_step_tokens: 4, ..options() };
    let message = load(Reference::new(), &files, &bad).err().unwrap().to_string();
    assert!(message.contains("1 to 1024") && message.contains("4 tokens per step for 8"), "{message}");
    let odd = LoadOptions { quantization: Some(BlockFormat::Q8_0.into()), ..options() };
    let message = load(Reference::new(), &files, &odd).err().unwrap().to_string();
    assert!(message.contains("37 tensors") && message.contains("q_b_proj.weight has 48"), "{message}");
}

#[test]
fn changes_of_precision_are_recorded_and_small() {
    let files = Files::folder(folder("qwen3")).unwrap();
    let with = |dtype, quantization| {
        let options = LoadOptions { dtype, quantization, ..options() };
        load(Reference::new(), &files, &options).unwrap()
    };
    let exact = with(None, None);
    assert!(exact.1.conversions.is_empty());
    assert_eq!((exact.1.stored_dtype, &exact.1.weight_formats), (DType::BF16, &[WeightFormat::BF16].into()));
    let widened = with(Some(DType::F32), None);
    assert!(widened.1.conversions.is_empty() && widened.1.weight_bytes > exact.1.weight_bytes);

    let quantized = with(None, Some(BlockFormat::Q8_0.into()));
    // Seven linear layers each of three layers; embedding (also the head) and norms stay.
    assert_eq!(quantized.1.conversions.len(), 3 * 7);
    assert!(quantized.1.weight_bytes < exact.1.weight_bytes);
    for conversion in &quantized.1.conversions {
        assert_eq!((conversion.from.as_str(), conversion.to), ("bf16", WeightFormat::Ggml(BlockFormat::Q8_0)));
        assert!(conversion.bytes_after < conversion.bytes_before);
        assert!(0.0 < conversion.mean_abs_error && conversion.mean_abs_error < conversion.max_abs_error);
    }
    let expected = probe(exact);
    assert!(probe(widened) == expected);
    let worst = probe(quantized).iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // About 3% of the logits' deviation of 3 is usual for eight bits.
    assert!(0.0 < worst && worst < 0.6, "{worst}");
}

#[test]
fn an_embedded_checkpoint_is_the_one_on_disk() {
    let read = |name: &str| -> &'static [u8] { fs::read(folder("llama-256").join(name)).unwrap().leak() };
    let files: [(&str, &[u8]); 2] =
        [("config.json", read("config.json")), ("model.safetensors", read("model.safetensors"))];
    let embedded = load(Reference::new(), &Files::Embedded(Vec::from(files).leak()), &options()).unwrap();
    let disk = Copy::of("llama-256").load().unwrap();
    assert_eq!(embedded.1.digest, disk.1.digest);
    // Without a generation config, the config's own end token counts.
    assert_eq!(embedded.1.generation_config.eos_token_ids, [510]);
    assert_eq!(disk.1.generation_config.eos_token_ids, [507, 511, 510]);
    assert!(probe(embedded) == probe(disk));
}
