//! `quantization_config`: how a checkpoint's matrices are stored, by module name.
//!
//! Methods: `fp8` (DeepSeek-V3's blocks; DeepSeek-V4's, with experts in four bits; scales per tensor), `compressed-tensors`,
//! `gptq`, `awq`, and `ggml`, which is our own ([`crate::quantize`]). Only weights count: activations stay f32, whatever the
//! config asks for, and [`QuantizationConfig`] says so.

use baton_device::BlockFormat;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::Architecture;
use super::fields::Fields;
use super::pattern::Pattern;
use crate::quant::{Awq, Blocks, Codes, Encoding, FLOATS, Gptq, Mxfp4, Packed, Scaled};

const METHODS: [&str; 5] = ["fp8", "compressed-tensors", "gptq", "awq", GGML];
const GGML: &str = "ggml";
const HEAD: &str = "lm_head";
const EXPERT_DTYPE: &str = "expert_dtype";
/// What the modules of routed experts have in their names.
const EXPERTS: &str = "experts";
/// Largest group or block edge.
const MAX_GROUP: usize = 1 << 20;

/// How the weights of a checkpoint are quantised.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QuantizationConfig {
    /// The config's `quant_method`.
    pub method: String,
    /// What the config asks for activations, which are computed in f32 here.
    pub activations: Option<String>,
    #[serde(skip)]
    groups: Vec<Group>,
    /// Modules that are stored as floats.
    #[serde(skip)]
    ignored: Vec<Pattern>,
    /// Whether a module is stored as floats, and in which of its groups it is, is told by the type of its weight (DeepSeek-V4).
    #[serde(skip)]
    by_type: bool,
}

/// Modules that are stored alike.
#[derive(Debug, Clone, PartialEq)]
struct Group {
    encoding: Encoding,
    /// `None` for every linear module.
    targets: Option<Vec<Pattern>>,
}

impl QuantizationConfig {
    /// How the weight of a linear module is stored; `None` for as floats. `stored` is the type of the tensor that the weight
    /// would be, if it is there.
    pub(crate) fn encoding(&self, module: &str, stored: Option<&str>) -> Option<&Encoding> {
        if self.ignored.iter().any(|p| p.matches(module)) {
            return None;
        }
        let named = |g: &&Group| g.targets.as_ref().is_some_and(|t| t.iter().any(|p| p.matches(module)));
        let mut groups: Vec<&Group> = self.groups.iter().filter(named).collect();
        if groups.is_empty() {
            groups.extend(self.groups.iter().filter(|g| g.targets.is_none()));
        }
        let first = groups.first()?;
        if !self.by_type {
            return Some(&first.encoding);
        }
        let stored = stored.filter(|stored| !FLOATS.contains(stored))?;
        // One of another type is refused by what the first would be.
        let group = groups.iter().find(|g| g.encoding.stores_weights_as(stored)).unwrap_or(first);
        Some(&group.encoding)
    }
}

/// The config's quantisation, if it has one; reasons for refusal go to `fields`.
pub(super) fn parse(fields: &mut Fields<'_>, architecture: Architecture) -> Option<QuantizationConfig> {
    let value = fields.get("quantization_config")?;
    let Some(map) = value.as_object() else {
        fields.refuse("quantization_config is not an object");
        return None;
    };
    let mut own = Fields::new(map, "quantization_config.");
    let method = own.text("quant_method").unwrap_or_default();
    let by_type = architecture == Architecture::DeepseekV4 && method == "fp8";
    let parsed = match method {
        "fp8" if by_type => {
            // The release has it beside this object, later files in it.
            if let (Some(inner), Some(outer)) = (own.get(EXPERT_DTYPE), fields.get(EXPERT_DTYPE))
                && inner != outer
            {
                fields.refuse(format!("{EXPERT_DTYPE} and quantization_config.{EXPERT_DTYPE} differ"));
            }
            let place = if own.get(EXPERT_DTYPE).is_some() { &mut own } else { &mut *fields };
            place.only(EXPERT_DTYPE, &[json!("fp4"), json!("fp8")]);
            let experts = place.text(EXPERT_DTYPE);
            deepseek_v4(&mut own, experts)
        }
        "fp8" => fp8(&mut own),
        "compressed-tensors" => compressed_tensors(&mut own),
        "gptq" => gptq(&mut own),
        "awq" => awq(&mut own),
        GGML => ggml(&mut own),
        _ => {
            let name: String = method.chars().take(40).collect();
            own.refuse(format!(
                "quantization_config.quant_method {name:?} is not supported; supported: {}",
                METHODS.join(", ")
            ));
            None
        }
    };
    fields.reasons.append(&mut own.reasons);
    parsed.map(|(groups, ignored, activations)| QuantizationConfig {
        method: method.to_owned(),
        activations,
        groups,
        ignored,
        by_type,
    })
}

type Parsed = Option<(Vec<Group>, Vec<Pattern>, Option<String>)>;

fn everywhere(encoding: Encoding) -> Vec<Group> {
    vec![Group { encoding, targets: None }]
}

fn fp8(fields: &mut Fields<'_>) -> Parsed {
    let (scaled, activations) = fp8_bytes(fields);
    Some((everywhere(Encoding::Scaled(scaled)), not_converted(fields), Some(activations.into())))
}

/// With what is asked for activations.
fn fp8_bytes(fields: &mut Fields<'_>) -> (Scaled, &'static str) {
    let codes = match fields.text("fmt").unwrap_or("e4m3") {
        "e4m3" => Codes::E4M3,
        "e5m2" => Codes::E5M2,
        _ => {
            fields.only("fmt", &[json!("e4m3"), json!("e5m2")]);
            Codes::E4M3
        }
    };
    fields.only("activation_scheme", &[json!("dynamic"), json!("static")]);
    let fixed = fields.text("activation_scheme") == Some("static");
    let block = block(fields, "weight_block_size");
    let scaled = Scaled {
        codes,
        block: block.unwrap_or([0, 0]),
        scales: if block.is_some() { "weight_scale_inv" } else { "weight_scale" },
        zero_points: false,
        input_scale: fixed,
        partial: true,
    };
    (scaled, if fixed { "fp8, fixed scales" } else { "fp8" })
}

/// Scaled bytes as in DeepSeek-V3, with scales under another name; routed experts may be in four bits instead.
fn deepseek_v4(fields: &mut Fields<'_>, experts: Option<&str>) -> Parsed {
    let (scaled, activations) = fp8_bytes(fields);
    let bytes = Encoding::Scaled(Scaled { scales: "scale", ..scaled });
    let of_experts = match experts {
        Some("fp4") => vec![Encoding::Mxfp4(Mxfp4::DEEPSEEK)],
        Some(_) => vec![bytes.clone()],
        None => vec![bytes.clone(), Encoding::Mxfp4(Mxfp4::DEEPSEEK)],
    };
    let targets = vec![Pattern::Part(EXPERTS.into())];
    let of_experts = of_experts.into_iter().map(|encoding| Group { encoding, targets: Some(targets.clone()) });
    Some((of_experts.chain(everywhere(bytes)).collect(), not_converted(fields), Some(activations.into())))
}

/// Rows and columns of a block, if there are blocks.
fn block(fields: &mut Fields<'_>, name: &str) -> Option<[usize; 2]> {
    let value = fields.get(name)?;
    let edge = |v: &Value| v.as_u64().map(|v| v as usize).filter(|v| (1..=MAX_GROUP).contains(v));
    let edges: Option<Vec<usize>> = value.as_array().and_then(|list| list.iter().map(edge).collect());
    match edges.as_deref() {
        Some(&[rows, cols]) => Some([rows, cols]),
        _ => {
            fields.refuse(format!("quantization_config.{name} is not a pair of integers from 1 to {MAX_GROUP}"));
            None
        }
    }
}

/// `modules_to_not_convert`; without it, all but the head are quantised.
fn not_converted(fields: &mut Fields<'_>) -> Vec<Pattern> {
    let mut modules = names(fields, "modules_to_not_convert").unwrap_or_default();
    modules.push(HEAD.into());
    modules.into_iter().map(Pattern::Part).collect()
}

/// A list of strings.
fn names(fields: &mut Fields<'_>, name: &str) -> Option<Vec<String>> {
    let value = fields.get(name)?;
    let list = value.as_array().and_then(|l| l.iter().map(|v| v.as_str().map(str::to_owned)).collect());
    if list.is_none() {
        fields.refuse(format!("quantization_config.{name} is not a list of names"));
    }
    list
}

/// Columns of a group; 0 where the config says -1, for all.
fn group_size(fields: &mut Fields<'_>, name: &str) -> usize {
    if fields.get(name).and_then(Value::as_i64) == Some(-1) { 0 } else { fields.size(name, 1..=MAX_GROUP) }
}

fn gptq(fields: &mut Fields<'_>) -> Parsed {
    fields.only("bits", &[json!(4), json!(8)]);
    fields.only("checkpoint_format", &[json!("gptq"), json!("gptq_v2")]);
    fields.only("pack_dtype", &[json!("int32")]);
    fields.only("is_marlin_format", &[json!(false)]);
    fields.only("dynamic", &[json!({})]);
    fields.only("modules_in_block_to_quantize", &[json!([])]);
    let encoding = Encoding::Gptq(Gptq {
        bits: fields.size("bits", 1..=32),
        group: group_size(fields, "group_size"),
        desc_act: fields.flag("desc_act", false),
        zeros_less_one: fields.text("checkpoint_format") != Some("gptq_v2"),
    });
    let ignored = if fields.flag("lm_head", false) { Vec::new() } else { vec![Pattern::Part(HEAD.into())] };
    Some((everywhere(encoding), ignored, None))
}

fn awq(fields: &mut Fields<'_>) -> Parsed {
    // Old files name these `w_bit` and `q_group_size`.
    let either = |fields: &Fields<'_>, new: &'static str, old| if fields.get(new).is_some() { new } else { old };
    let bits = either(fields, "bits", "w_bit");
    fields.size(bits, 1..=32);
    fields.only(bits, &[json!(4)]);
    fields.only("version", &[json!("gemm"), json!("GEMM")]);
    fields.only("zero_point", &[json!(true)]);
    let group = either(fields, "group_size", "q_group_size");
    let group = group_size(fields, group);
    Some((everywhere(Encoding::Awq(Awq { group })), not_converted(fields), None))
}

/// The `quantization_config` of linear modules in blocks of `format`, and of [`BlockFormat::made_for`] where these do not
/// divide the rows; modules with a name of `floats` in theirs are left as they are.
pub(crate) fn of_blocks(format: BlockFormat, floats: &[&str]) -> Value {
    let fallback = format.made_for(BlockFormat::Q8_0.elements());
    json!({
        "quant_method": GGML,
        "format": format.name(),
        "fallback": fallback.name(),
        "modules_to_not_convert": floats,
    })
}

fn ggml(fields: &mut Fields<'_>) -> Parsed {
    let names_of_formats = BlockFormat::ALL.map(|format| json!(format.name()));
    let mut format = |name| {
        fields.only(name, &names_of_formats);
        let stated = fields.text(name);
        if stated.is_none() {
            fields.refuse(format!("quantization_config.{name} is missing"));
        }
        BlockFormat::ALL.into_iter().find(|format| Some(format.name()) == stated)
    };
    let (format, fallback) = (format("format"), format("fallback"));
    let floats = names(fields, "modules_to_not_convert").unwrap_or_default();
    let blocks = Blocks { format: format?, fallback: fallback? };
    Some((everywhere(Encoding::Blocks(blocks)), floats.into_iter().map(Pattern::Part).collect(), None))
}

fn compressed_tensors(fields: &mut Fields<'_>) -> Parsed {
    fields.only("quantization_status", &[json!("compressed")]);
    fields.only("kv_cache_scheme", &[]);
    fields.only("transform_config", &[json!({})]);
    fields.only("sparsity_config", &[json!({}), json!({"format": "dense"})]);
    let format = fields.text("format");
    let Some(list) = fields.get("config_groups").and_then(Value::as_object).filter(|g| !g.is_empty()) else {
        fields.refuse("quantization_config.config_groups is not an object with a group");
        return None;
    };
    let mut activations = Vec::new();
    let mut groups = Vec::new();
    for group in list.values() {
        let Some(map) = group.as_object() else {
            fields.refuse("quantization_config.config_groups holds something else than groups");
            continue;
        };
        let mut own = Fields::new(map, "quantization_config.config_groups.*.");
        if let Some(inputs) = own.get("input_activations") {
            let asked = format!("{}{}", inputs["type"].as_str().unwrap_or("int"), inputs["num_bits"]);
            let text = if inputs["dynamic"] == json!(false) { format!("{asked}, fixed scales") } else { asked };
            if !activations.contains(&text) {
                activations.push(text);
            }
        }
        own.only("output_activations", &[]);
        let targets = targets(&mut own);
        let group_format = own.text("format").or(format).unwrap_or_default();
        if let Some(encoding) = group_encoding(&mut own, group_format) {
            groups.push(Group { encoding, targets });
        }
        fields.reasons.append(&mut own.reasons);
    }
    let ignored = names(fields, "ignore").unwrap_or_default();
    let ignored = patterns(fields, &ignored);
    Some((groups, ignored, (!activations.is_empty()).then(|| activations.join("; "))))
}

/// The modules of a group; `None` for every linear one.
fn targets(fields: &mut Fields<'_>) -> Option<Vec<Pattern>> {
    let targets = names(fields, "targets").unwrap_or_default();
    if targets.iter().any(|t| t == "Linear") { None } else { Some(patterns(fields, &targets)) }
}

fn patterns(fields: &mut Fields<'_>, names: &[String]) -> Vec<Pattern> {
    let mut parse = |name: &String| match Pattern::parse(name) {
        Ok(pattern) => Some(pattern),
        Err(reason) => {
            fields.refuse(format!("quantization_config: {reason}"));
            None
        }
    };
    names.iter().filter_map(&mut parse).collect()
}

/// How the weights of one group are stored.
fn group_encoding(fields: &mut Fields<'_>, format: &str) -> Option<Encoding> {
    let Some(map) = fields.get("weights").and_then(Value::as_object) else {
        fields.refuse("quantization_config.config_groups has a group without weights");
        return None;
    };
    let input_scale = fields.get("input_activations").is_some_and(|a| a["dynamic"] == json!(false));
    let mut own = Fields::new(map, "quantization_config.config_groups.*.weights.");
    let encoding = weights(&mut own, map, format, input_scale);
    fields.reasons.append(&mut own.reasons);
    encoding
}

fn weights(fields: &mut Fields<'_>, map: &Map<String, Value>, format: &str, input_scale: bool) -> Option<Encoding> {
    let is_float = fields.text("type").unwrap_or("int") == "float";
    let (types, bits): (&str, &[Value]) = match format {
        "int-quantized" => ("int", &[json!(8)]),
        "float-quantized" => ("float", &[json!(8)]),
        "naive-quantized" => (if is_float { "float" } else { "int" }, &[json!(8)]),
        "pack-quantized" => ("int", &[json!(4), json!(8)]),
        "mxfp4-pack-quantized" => ("float", &[json!(4)]),
        _ => {
            let format: String = format.chars().take(40).collect();
            fields.refuse(format!(
                "quantization_config.format {format:?} is not supported; supported: int-quantized, float-quantized, \
                 naive-quantized, pack-quantized, mxfp4-pack-quantized"
            ));
            return None;
        }
    };
    fields.only("type", &[json!(types)]);
    let num_bits = fields.size("num_bits", 1..=32);
    fields.only("num_bits", bits);
    let strategy = fields.text("strategy").unwrap_or(if map.contains_key("group_size") { "group" } else { "tensor" });
    let block = match strategy {
        "tensor" => [0, 0],
        "channel" => [1, 0],
        "group" => [1, group_size(fields, "group_size")],
        "block" => block(fields, "block_structure")?,
        _ => {
            fields.only("strategy", &[json!("tensor"), json!("channel"), json!("group"), json!("block")]);
            return None;
        }
    };
    let zero_points = !fields.flag("symmetric", true);
    fields.only("actorder", &[json!("static"), json!("weight"), json!("group"), json!("dynamic"), json!(false)]);
    let ordered = ["group", "dynamic"].map(Value::from).contains(map.get("actorder").unwrap_or(&Value::Null));
    match format {
        "mxfp4-pack-quantized" => {
            fields.only("group_size", &[json!(32)]);
            fields.only("symmetric", &[json!(true)]);
            Some(Encoding::Mxfp4(Mxfp4::COMPRESSED_TENSORS))
        }
        "pack-quantized" => {
            fields.only("strategy", &[json!("tensor"), json!("channel"), json!("group")]);
            let (bits, group, per_tensor) = (num_bits, block[1], block == [0, 0]);
            if per_tensor && zero_points {
                fields.refuse("quantization_config: packed zero points of whole tensors are not supported");
            }
            Some(Encoding::Packed(Packed { bits, group, per_tensor, zero_points, ordered }))
        }
        _ => {
            if ordered {
                fields.refuse("quantization_config: actorder by group is supported in pack-quantized only");
            }
            if is_float && zero_points {
                fields.refuse("quantization_config: float weights with zero points are not supported");
            }
            let codes = if is_float { Codes::E4M3 } else { Codes::I8 };
            let partial = strategy == "block";
            Some(Encoding::Scaled(Scaled { codes, block, scales: "weight_scale", zero_points, input_scale, partial }))
        }
    }
}
