//! Checkpoints of `tests/data` as sources, with changes to them.
#![allow(dead_code)] // each test uses part of it

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use baton_encoder::{Encoder, Input, LoadError, LoadOptions, Source, TensorInfo};
use safetensors::SafeTensors;
use serde_json::Value;

/// A checkpoint in memory, to be changed.
#[derive(Clone, Default)]
pub struct Checkpoint {
    pub files: BTreeMap<String, Vec<u8>>,
    pub tensors: BTreeMap<String, (String, Vec<usize>, Vec<u8>)>,
}

impl Checkpoint {
    /// A folder's.
    pub fn at(folder: &Path) -> Self {
        let read = |name: &str| std::fs::read(folder.join(name)).ok().map(|bytes| (name.to_owned(), bytes));
        let names = ["config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"];
        let weights = std::fs::read(folder.join("model.safetensors")).expect("the weights");
        let parsed = SafeTensors::deserialize(&weights).expect("the weights are safetensors");
        let tensor = |(name, view): (&str, safetensors::tensor::TensorView)| {
            (name.to_owned(), (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec()))
        };
        let tensors = parsed.iter().map(tensor).collect();
        Self { files: names.into_iter().filter_map(read).collect(), tensors }
    }

    /// One of the project's own.
    pub fn case(name: &str) -> Self {
        Self::at(&data(name))
    }

    /// Changes a JSON file, which is made if there is none.
    pub fn edit(mut self, file: &str, change: impl FnOnce(&mut Value)) -> Self {
        let mut json = self.files.get(file).map_or(Value::Null, |bytes| serde_json::from_slice(bytes).unwrap());
        change(&mut json);
        self.files.insert(file.into(), serde_json::to_vec(&json).unwrap());
        self
    }

    pub fn load(&self, options: &LoadOptions) -> Result<Encoder, LoadError> {
        Encoder::load(self, options)
    }

    /// Why it is refused.
    #[track_caller]
    pub fn refusal(&self) -> String {
        self.load(&LoadOptions::default()).err().expect("it is refused").to_string()
    }
}

impl Source for Checkpoint {
    fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, String> {
        Ok(self.files.get(name).map(|bytes| bytes.clone().into()))
    }

    fn tensors(&self) -> Vec<TensorInfo> {
        let info = |(name, (dtype, shape, _)): (&String, &(String, Vec<usize>, Vec<u8>))| TensorInfo {
            name: name.clone(),
            dtype: dtype.clone(),
            shape: shape.clone(),
        };
        self.tensors.iter().map(info).collect()
    }

    fn tensor(&self, name: &str, visit: &mut dyn FnMut(&[u8])) -> Result<(), String> {
        visit(&self.tensors[name].2);
        Ok(())
    }
}

pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

pub fn golden(name: &str) -> Vec<Value> {
    let json = std::fs::read(data(name).join("golden.json")).unwrap();
    serde_json::from_slice::<Value>(&json).unwrap()["texts"].as_array().unwrap().clone()
}

/// What transformers gave the model.
pub fn input(entry: &Value) -> Input {
    let ids = |key: &str| -> Option<Vec<u32>> {
        Some(entry[key].as_array()?.iter().map(|id| id.as_u64().unwrap() as u32).collect())
    };
    let ids_ = ids("ids").unwrap();
    Input { type_ids: ids("type_ids").unwrap_or_else(|| vec![0; ids_.len()]), ids: ids_ }
}

/// A vector of the golden values.
pub fn vector(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

pub fn normalized(vector: &[f32]) -> Vec<f32> {
    let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    vector.iter().map(|x| x / length).collect()
}

/// The largest difference of two vectors.
#[track_caller]
pub fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
