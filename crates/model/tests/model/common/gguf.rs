//! Golden checkpoints written as GGUF files, by `models/golden/gguf/layouts.json`.

use std::collections::BTreeMap;
use std::fs;

use baton_device::{BlockFormat, DType};
use half::{bf16, f16};
use serde_json::{Map, Value};

use super::checkpoint::read_tensors;
use super::{folder, json};

/// A file on its way to disk.
#[derive(Clone)]
pub struct GgufFile {
    /// Keys with the number of their type and their bytes.
    pub keys: BTreeMap<String, (u32, Vec<u8>)>,
    pub tensors: Vec<GgufTensor>,
}

#[derive(Clone)]
pub struct GgufTensor {
    pub name: String,
    /// Outermost first.
    pub shape: Vec<usize>,
    pub dtype: DType,
    pub data: Vec<u8>,
}

/// A float tensor.
struct Floats {
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// The layouts by name.
pub fn layouts() -> Map<String, Value> {
    json(folder("gguf/layouts.json")).as_object().unwrap().clone()
}

impl GgufFile {
    /// Writes the checkpoint of a layout; `stored` gives the type of each tensor by name and shape.
    pub fn of(layout: &Value, stored: impl Fn(&str, &[usize]) -> DType) -> Self {
        let source = tensors_of(layout["from"].as_str().unwrap());
        let keys = layout["keys"].as_object().unwrap().iter().map(|(key, value)| (key.clone(), key_value(value)));
        let tensors = layout["tensors"].as_array().unwrap().iter().map(|entry| {
            let part = |i: usize| entry[i].as_str().unwrap();
            let Floats { shape, values } = made(&source, part(1), part(2));
            let dtype = stored(part(0), &shape);
            let data = narrowed(dtype, &values);
            GgufTensor { name: part(0).to_owned(), shape, dtype, data }
        });
        Self { keys: keys.collect(), tensors: tensors.collect() }
    }

    pub fn set(&mut self, key: &str, value: (u32, Vec<u8>)) {
        self.keys.insert(key.into(), value);
    }

    pub fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// The same with every block widened to f32.
    pub fn widened(mut self) -> Self {
        for tensor in &mut self.tensors {
            if let DType::Ggml(format) = tensor.dtype {
                let mut values = vec![0.0; tensor.shape.iter().product()];
                format.dequantize(&tensor.data, &mut values);
                (tensor.dtype, tensor.data) = (DType::F32, narrowed(DType::F32, &values));
            }
        }
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = [b"GGUF".as_slice(), &3u32.to_le_bytes()].concat();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, (kind, value)) in &self.keys {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut data: Vec<u8> = Vec::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            out.extend(text(&tensor.name));
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
            out.extend(type_number(tensor.dtype).to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        [out, data].concat()
    }
}

pub fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

pub fn u32_value(value: u32) -> (u32, Vec<u8>) {
    (4, value.to_le_bytes().to_vec())
}

fn key_value(entry: &Value) -> (u32, Vec<u8>) {
    match entry[0].as_str().unwrap() {
        "u32" => u32_value(entry[1].as_u64().unwrap() as u32),
        "f32" => (6, (entry[1].as_f64().unwrap() as f32).to_le_bytes().to_vec()),
        "bool" => (7, vec![u8::from(entry[1].as_bool().unwrap())]),
        "str" => (8, text(entry[1].as_str().unwrap())),
        other => panic!("a key of type {other}"),
    }
}

fn type_number(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 30,
        DType::Ggml(BlockFormat::Q4_0) => 2,
        DType::Ggml(BlockFormat::Q8_0) => 8,
        other => panic!("{other} is not written"),
    }
}

/// All tensors of a golden checkpoint.
fn tensors_of(case: &str) -> BTreeMap<String, Floats> {
    let files = fs::read_dir(folder(case)).unwrap().map(|e| e.unwrap().path());
    let weights = files.filter(|p| {
        let name = p.file_name().unwrap().to_str().unwrap();
        name.starts_with("model") && name.ends_with(".safetensors")
    });
    let tensors = weights.flat_map(|path| read_tensors(&fs::read(path).unwrap()));
    let floats = tensors.map(|t| {
        let values = match t.dtype.as_str() {
            "F32" => t.data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            "F16" => t.data.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            "BF16" => t.data.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            other => panic!("{} is {other}", t.name),
        };
        (t.name, Floats { shape: t.shape, values })
    });
    floats.collect()
}

/// A tensor of the file, made as a layout says.
fn made(source: &BTreeMap<String, Floats>, how: &str, name: &str) -> Floats {
    let mut words = how.split(':');
    let what = words.next().unwrap();
    let numbers: Vec<usize> = words.map(|n| n.parse().unwrap()).collect();
    if what == "stack" {
        let each = (0..numbers[0]).map(|expert| &source[&name.replace('*', &expert.to_string())]);
        let shape = [&numbers[..1], &source[&name.replace('*', "0")].shape].concat();
        return Floats { shape, values: each.flat_map(|t| t.values.iter().copied()).collect() };
    }
    let Floats { shape, values } = &source[name];
    let cols = values.len() / shape[0];
    let row = |r: usize| values[r * cols..(r + 1) * cols].iter().copied();
    let (shape, values) = match what {
        "plain" => (shape.clone(), values.clone()),
        "plus-one" => (shape.clone(), values.iter().map(|v| v + 1.0).collect()),
        "permute" => {
            let height = shape[0] / numbers[0];
            let from = |r: usize| r / height * height + r % 2 * (height / 2) + r % height / 2;
            (shape.clone(), (0..shape[0]).flat_map(|r| row(from(r))).collect())
        }
        "latent-key" => {
            let [heads, nope, v] = numbers[..] else { panic!("{how}") };
            let element = |h: usize, c: usize, n: usize| values[(h * (nope + v) + n) * cols + c];
            let all = (0..heads).flat_map(|h| (0..cols).map(move |c| (h, c)));
            let values = all.flat_map(|(h, c)| (0..nope).map(move |n| element(h, c, n))).collect();
            (vec![heads, cols, nope], values)
        }
        "latent-value" => {
            let [heads, nope, v] = numbers[..] else { panic!("{how}") };
            let rows = (0..heads).flat_map(|h| (0..v).map(move |r| h * (nope + v) + nope + r));
            (vec![heads, v, cols], rows.flat_map(row).collect())
        }
        other => panic!("no way called {other}"),
    };
    Floats { shape, values }
}

/// Values as a type stores them; of blocks the plainest quantisation.
fn narrowed(dtype: DType, values: &[f32]) -> Vec<u8> {
    let block = |values: &[f32]| <[f32; 32]>::try_from(values).unwrap();
    match dtype {
        DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        DType::Ggml(BlockFormat::Q8_0) => values.chunks(32).flat_map(|b| q8_0(&block(b))).collect(),
        DType::Ggml(BlockFormat::Q4_0) => values.chunks(32).flat_map(|b| q4_0(&block(b))).collect(),
        other => panic!("{other} is not written"),
    }
}

fn q8_0(block: &[f32; 32]) -> Vec<u8> {
    let scale = f16::from_f32(block.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0);
    let quant =
        |v: &f32| if scale.to_f32() > 0.0 { (v / scale.to_f32()).round().clamp(-127.0, 127.0) as i8 } else { 0 };
    [&scale.to_le_bytes()[..], &block.iter().map(|v| quant(v) as u8).collect::<Vec<_>>()].concat()
}

/// Element i in the lower half of byte i, element 16 + i in the upper.
fn q4_0(block: &[f32; 32]) -> Vec<u8> {
    let largest = block.iter().copied().fold(0.0f32, |m, v| if v.abs() > m.abs() { v } else { m });
    let scale = f16::from_f32(largest / -8.0);
    let quant = |v: f32| if scale.to_f32() == 0.0 { 8 } else { (v / scale.to_f32() + 8.5).clamp(0.0, 15.0) as u8 };
    let packed = (0..16).map(|i| quant(block[i]) | quant(block[i + 16]) << 4);
    [&scale.to_le_bytes()[..], &packed.collect::<Vec<_>>()].concat()
}
