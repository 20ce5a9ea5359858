//! Copies of golden checkpoints that a test may change, tensor by tensor.

use std::fs;
use std::path::Path;

use baton_device::Reference;
use baton_model::{Files, LoadError, LoadOptions, LoadReport, ModelRunner, load};
use half::bf16;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{all_logits, folder, options_of};

pub type Loaded = (ModelRunner<Reference>, LoadReport);

/// A copy of a golden checkpoint that a test may damage.
pub struct Copy {
    folder: TempDir,
    options: LoadOptions,
}

impl Copy {
    pub fn of(case: &str) -> Self {
        let copy = Self { folder: tempfile::tempdir().unwrap(), options: options_of(case) };
        for name in ["config.json", "generation_config.json", "model.safetensors"] {
            // A generation config may be missing.
            if let Ok(content) = fs::read(folder(case).join(name)) {
                copy.write(name, &content);
            }
        }
        copy
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn write(&self, name: &str, content: &[u8]) {
        fs::write(self.path().join(name), content).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path().join(name)).unwrap()
    }

    pub fn edit_config(&self, edit: impl FnOnce(&mut Map<String, Value>)) -> &Self {
        let mut config: Value = serde_json::from_slice(&self.read("config.json")).unwrap();
        edit(config.as_object_mut().unwrap());
        self.write("config.json", &serde_json::to_vec(&config).unwrap());
        self
    }

    /// Replaces the weights by tensors edited as (name, dtype, shape, bytes).
    pub fn edit_weights(&self, edit: impl FnOnce(&mut Vec<Tensor>)) -> &Self {
        let mut tensors = read_tensors(&self.read("model.safetensors"));
        edit(&mut tensors);
        self.write("model.safetensors", &write_tensors(&tensors));
        self
    }

    pub fn load(&self) -> Result<Loaded, LoadError> {
        load(Reference::new(), &Files::folder(self.path()).unwrap(), &self.options)
    }

    /// The message with which loading fails.
    pub fn refusal(&self) -> String {
        match self.load() {
            Ok(_) => panic!("it was loaded"),
            Err(error) => error.to_string(),
        }
    }

    #[track_caller]
    pub fn assert_refused(&self, wanted: &[&str]) {
        let message = self.refusal();
        assert!(wanted.iter().all(|w| message.contains(w)), "{wanted:?} not in: {message}");
    }
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

pub fn read_tensors(file: &[u8]) -> Vec<Tensor> {
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&file[8..8 + len]).unwrap();
    let tensor = |(name, entry): (String, Value)| {
        let range: (usize, usize) = serde_json::from_value(entry["data_offsets"].clone()).unwrap();
        Tensor {
            name,
            dtype: entry["dtype"].as_str().unwrap().into(),
            shape: serde_json::from_value(entry["shape"].clone()).unwrap(),
            data: file[8 + len..][range.0..range.1].to_vec(),
        }
    };
    header.into_iter().filter(|(name, _)| name != "__metadata__").map(tensor).collect()
}

pub fn write_tensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for t in tensors {
        let start = data.len();
        data.extend_from_slice(&t.data);
        let entry = json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [start, data.len()]});
        entries.push(format!("{}:{entry}", Value::from(t.name.as_str())));
    }
    with_header(format!("{{{}}}", entries.join(",")).as_bytes(), &data)
}

pub fn with_header(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

pub fn find<'a>(tensors: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|t| t.name == name).unwrap()
}

/// What a loaded model computes for a few tokens, to tell identical from different.
pub fn probe((mut runner, _): Loaded) -> Vec<f32> {
    all_logits(&mut runner, &[1, 2, 3, 4, 5])
}

/// Splits a golden checkpoint into two shards cut inside a layer, with an index.
pub fn sharded(case: &str) -> Copy {
    let copy = Copy::of(case);
    let tensors = read_tensors(&copy.read("model.safetensors"));
    fs::remove_file(copy.path().join("model.safetensors")).unwrap();
    let (first, second) = tensors.split_at(tensors.len() * 2 / 5);
    copy.write("a.safetensors", &write_tensors(first));
    copy.write("b.safetensors", &write_tensors(second));
    let names = first.iter().map(|t| (t, "a.safetensors")).chain(second.iter().map(|t| (t, "b.safetensors")));
    let map: Map<String, Value> = names.map(|(t, shard)| (t.name.clone(), json!(shard))).collect();
    copy.write_index(&map);
    copy
}

impl Copy {
    pub fn write_index(&self, map: &Map<String, Value>) {
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        self.write("model.safetensors.index.json", index.to_string().as_bytes());
    }

    pub fn edit_index(&self, edit: impl FnOnce(&mut Map<String, Value>)) -> &Self {
        let mut index: Value = serde_json::from_slice(&self.read("model.safetensors.index.json")).unwrap();
        let map = index["weight_map"].as_object_mut().unwrap();
        edit(map);
        let map = map.clone();
        self.write_index(&map);
        self
    }
}

/// A checkpoint in which token 7, and nothing else, makes the first layer's queries overflow.
pub fn poisoned_by_token_7() -> Copy {
    let copy = Copy::of("llama-rope3");
    copy.edit_weights(|tensors| {
        let put = |t: &mut Tensor, row: usize, value: bf16| {
            t.data[2 * row * t.shape[1]..][..2].copy_from_slice(&value.to_le_bytes());
        };
        let embedding = find(tensors, "model.embed_tokens.weight");
        (0..512).for_each(|row| put(embedding, row, if row == 7 { bf16::ONE } else { bf16::ZERO }));
        let query = find(tensors, "model.layers.0.self_attn.q_proj.weight");
        (0..128).for_each(|row| put(query, row, bf16::MAX));
    });
    copy
}
