//! What the encoders compute is what Hugging Face transformers computes from the same files.

mod common;

use baton_encoder::{Encoder, Input, LoadOptions, Pooling};
use common::{Checkpoint, difference, golden, input, normalized, vector};

/// Vectors of these models have components of about 1.
const TOLERANCE: f32 = 1e-5;

fn all(encoder: &Encoder, inputs: &[Input]) -> Vec<Vec<f32>> {
    encoder.check(inputs).unwrap();
    let batch: Vec<&Input> = inputs.iter().collect();
    encoder.run(&batch).unwrap().into_iter().map(Result::unwrap).collect()
}

#[test]
fn embeddings_equal_those_of_transformers_for_every_way_to_pool() {
    for (case, own, normalizes) in [("bert", Pooling::Mean, true), ("xlm-roberta", Pooling::Cls, false)] {
        let checkpoint = Checkpoint::case(case);
        for asked in [None, Some(Pooling::Mean), Some(Pooling::Cls), Some(Pooling::Max), Some(Pooling::Last)] {
            let options = LoadOptions { pooling: asked, max_model_len: Some(40) };
            let encoder = checkpoint.load(&options).unwrap();
            let spec = encoder.spec();
            assert_eq!((spec.pooling, spec.normalized), (asked.unwrap_or(own), normalizes), "{case}");
            for entry in golden(case) {
                let expected = vector(&entry[spec.pooling.name()]);
                let expected = if normalizes { normalized(&expected) } else { expected };
                let embedding = all(&encoder, &[input(&entry)]).remove(0);
                let off = difference(&embedding, &expected);
                assert!(off < TOLERANCE, "{case}, {}, {}: {off}", spec.pooling.name(), entry["text"]);
            }
        }
    }
}

#[test]
fn scores_equal_those_of_transformers_behind_the_activation_that_the_checkpoint_states() {
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    let states = |case: &str, own: fn(f32) -> f32| {
        let encoder = Checkpoint::case(case).load(&LoadOptions::default()).unwrap();
        for entry in golden(case) {
            let score = all(&encoder, &[input(&entry)]).remove(0);
            let expected = own(entry["logit"].as_f64().unwrap() as f32);
            assert_eq!(score.len(), 1);
            assert!((score[0] - expected).abs() < TOLERANCE, "{case}, {}: {score:?} for {expected}", entry["text"]);
        }
    };
    states("bert-score", |logit| logit);
    states("xlm-roberta-score", sigmoid);
}

#[test]
fn batch_mates_change_no_more_than_rounding() {
    for case in ["bert", "bert-score", "xlm-roberta", "xlm-roberta-score"] {
        let encoder = Checkpoint::case(case).load(&LoadOptions { max_model_len: Some(40), pooling: None }).unwrap();
        let inputs: Vec<Input> = golden(case).iter().map(input).collect();
        let together = all(&encoder, &inputs);
        for (i, together) in together.iter().enumerate() {
            let alone = all(&encoder, &inputs[i..=i]).remove(0);
            let off = difference(&alone, together);
            assert!(off < TOLERANCE, "{case}, text {i}: {off}");
        }
    }
}

#[test]
fn a_checkpoint_that_states_no_pooling_has_the_mean_and_one_that_states_a_length_keeps_to_it() {
    let mut bare = Checkpoint::case("bert");
    let stated = bare.load(&LoadOptions::default()).unwrap();
    assert_eq!((stated.spec().max_model_len, stated.spec().pooling_stated), (24, true));
    bare.files.retain(|name, _| name == "config.json");
    let bare = bare.load(&LoadOptions::default()).unwrap();
    let spec = bare.spec();
    assert_eq!((spec.pooling, spec.pooling_stated, spec.normalized), (Pooling::Mean, false, true));
    assert_eq!(spec.max_model_len, 40);
    // Positions of this family begin behind the padding token.
    assert_eq!(Checkpoint::case("xlm-roberta").load(&LoadOptions::default()).unwrap().spec().max_model_len, 40);
}

/// MiniLM as sentence-transformers publishes it: its folder and that of its golden values are named by environment.
/// `cargo xtask long minilm` fetches the one and runs this.
#[test]
fn minilm_embeds_as_sentence_transformers_does() {
    let folder = |name: &str| std::env::var_os(name).map(std::path::PathBuf::from);
    let (Some(model), Some(golden)) = (folder("BATON_MINILM"), folder("BATON_MINILM_GOLDEN")) else {
        eprintln!("skipped: BATON_MINILM and BATON_MINILM_GOLDEN name no folders");
        return;
    };
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(golden.join("golden.json")).unwrap()).unwrap();
    let tensors = std::fs::read(golden.join("golden.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&tensors).unwrap();
    let embeddings = tensors.tensor("embeddings").unwrap();
    let floats: Vec<f32> =
        embeddings.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    let mut tokenizer = tokenizers::Tokenizer::from_file(model.join("tokenizer.json")).unwrap();
    // Its file pads every text to 128 tokens.
    tokenizer.with_padding(None).with_truncation(None).unwrap();
    let encoder = Checkpoint::at(&model).load(&LoadOptions::default()).unwrap();
    let inputs: Vec<Input> = json["sentences"].as_array().unwrap().iter().map(input).collect();
    let together = all(&encoder, &inputs);
    for ((i, input), expected) in inputs.iter().enumerate().zip(floats.chunks_exact(384)) {
        let text = json["sentences"][i]["text"].as_str().unwrap();
        let ids = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert!(ids == input.ids || input.ids.len() == 256, "{text}");
        for embedding in [&together[i], &all(&encoder, std::slice::from_ref(input))[0]] {
            let off = difference(embedding, expected);
            assert!(off < TOLERANCE, "{text}: {off}");
        }
    }
}
