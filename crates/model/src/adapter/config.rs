//! `adapter_config.json` as peft writes it: ranks and scales by module, and which modules there are.

use serde_json::{Map, Value, json};

use crate::config::{ConfigError, Fields, Pattern, json_object};

pub(super) const FILE: &str = "adapter_config.json";

/// Entries of `rank_pattern`, `alpha_pattern` and `target_modules`, at most: each is tried on every module.
const MAX_ENTRIES: usize = 1024;
/// Far above any rank in use.
const MAX_RANK: usize = 1 << 16;

/// Variants of LoRA that add something else than `scale · B (A x)`, or add it elsewhere.
const VARIANTS: [&str; 13] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
];

/// What the config says of the matrices beside it.
#[derive(Debug)]
pub(super) struct LoraConfig {
    rank: usize,
    alpha: f64,
    rank_patterns: Vec<(Pattern, f64)>,
    alpha_patterns: Vec<(Pattern, f64)>,
    /// Scales are `alpha / √rank` (arXiv 2312.03732) instead of `alpha / rank`.
    rslora: bool,
    pub(super) targets: Targets,
    /// Modules are in these layers only.
    layers: Option<Vec<usize>>,
    excluded: Option<Vec<String>>,
}

/// Which modules are adapted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Targets {
    /// Every linear layer but the head.
    All,
    /// Those of these names, which may lack components at the beginning.
    Names(Vec<String>),
    /// Those that a regular expression describes; it is not evaluated, the tensors decide.
    Regex,
}

impl LoraConfig {
    pub(super) fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        let map = json_object(FILE, json)?;
        let mut fields = Fields::new(&map, "");
        fields.only("peft_type", &[json!("LORA")]);
        fields.only("task_type", &[json!("CAUSAL_LM")]);
        fields.only("bias", &[json!("none")]);
        for variant in VARIANTS {
            // Lists and maps without entries say nothing, as `false` does.
            let says_nothing = |value: &Value| *value == json!([]) || *value == json!({});
            if !fields.get(variant).is_some_and(says_nothing) {
                fields.only(variant, &[json!(false)]);
            }
        }
        let what = "a number from 1e-6 to 1e6";
        let in_range = |alpha: f64| (1e-6..=1e6).contains(&alpha);
        let config = Self {
            rank: fields.size("r", 1..=MAX_RANK),
            alpha: fields.number("lora_alpha", what, in_range),
            rank_patterns: patterns(&mut fields, "rank_pattern", "an integer from 1 to 65536", |rank| {
                rank.fract() == 0.0 && (1.0..=MAX_RANK as f64).contains(&rank)
            }),
            alpha_patterns: patterns(&mut fields, "alpha_pattern", what, in_range),
            rslora: fields.flag("use_rslora", false),
            targets: targets(&mut fields),
            layers: layers(&mut fields),
            excluded: excluded(&mut fields),
        };
        if fields.reasons.is_empty() { Ok(config) } else { Err(ConfigError { file: FILE, reasons: fields.reasons }) }
    }

    /// Rank of the matrices of a module.
    pub(super) fn rank(&self, module: &str) -> usize {
        matching(&self.rank_patterns, module).map_or(self.rank, |rank| rank as usize)
    }

    /// Factor on what they give.
    pub(super) fn scale(&self, module: &str) -> f32 {
        let alpha = matching(&self.alpha_patterns, module).unwrap_or(self.alpha);
        let rank = self.rank(module) as f64;
        (alpha / if self.rslora { rank.sqrt() } else { rank }) as f32
    }

    /// Whether a linear layer of the model shall be adapted; `None` if only the tensors say.
    pub(super) fn selects(&self, module: &str) -> Option<bool> {
        let named = match &self.targets {
            Targets::All => true,
            Targets::Names(names) => names.iter().any(|name| ends_with(module, name)),
            Targets::Regex => return None,
        };
        let layer = || module.strip_prefix("model.layers.")?.split('.').next()?.parse().ok();
        let in_layers = self.layers.as_ref().is_none_or(|layers| layer().is_some_and(|l| layers.contains(&l)));
        let excluded = self.excluded.as_ref()?.iter().any(|name| ends_with(module, name));
        Some(named && in_layers && !excluded)
    }
}

/// Whether `name` is the module's, or its last components.
pub(super) fn ends_with(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The value of the first pattern that matches, as in peft.
fn matching(patterns: &[(Pattern, f64)], module: &str) -> Option<f64> {
    let module = format!(".{module}");
    patterns.iter().find(|(pattern, _)| pattern.matches(&module)).map(|(_, value)| *value)
}

/// A map from patterns to numbers, in its order. A pattern is what peft makes of it: a regular expression for the
/// last components of a name, `(.*\.)?(pattern)$`, here on names with a dot in front.
fn patterns(fields: &mut Fields<'_>, name: &str, what: &str, accept: impl Fn(f64) -> bool) -> Vec<(Pattern, f64)> {
    let empty = Map::new();
    let map = match fields.get(name) {
        None => &empty,
        Some(Value::Object(map)) if map.len() <= MAX_ENTRIES => map,
        Some(_) => {
            fields.refuse(format!("{name} is not an object of at most {MAX_ENTRIES} entries"));
            &empty
        }
    };
    let mut patterns = Vec::new();
    for (key, value) in map {
        let anchored = match key.strip_prefix('^') {
            Some(rest) => format!("\\.{rest}$"),
            None => format!(".*\\.{key}$"),
        };
        match (Pattern::regex(&anchored), value.as_f64().filter(|value| accept(*value))) {
            (Ok(pattern), Some(value)) => patterns.push((pattern, value)),
            (Err(reason), _) => fields.refuse(format!("{name}: {reason}")),
            (_, None) => fields.refuse(format!("{name} has a value that is not {what}")),
        }
    }
    patterns
}

fn targets(fields: &mut Fields<'_>) -> Targets {
    match fields.get("target_modules") {
        Some(Value::String(all)) if all == "all-linear" => Targets::All,
        Some(Value::String(_)) => Targets::Regex,
        Some(value) => match names(value) {
            Some(names) => Targets::Names(names),
            None => {
                fields.refuse(format!(
                    "target_modules is not \"all-linear\", a regular expression, or a list of 1 to {MAX_ENTRIES} names"
                ));
                Targets::All
            }
        },
        None => {
            fields.refuse("target_modules is missing");
            Targets::All
        }
    }
}

/// `exclude_modules`; `None` if it is a regular expression.
fn excluded(fields: &mut Fields<'_>) -> Option<Vec<String>> {
    match fields.get("exclude_modules") {
        None => Some(Vec::new()),
        Some(Value::String(_)) => None,
        Some(Value::Array(list)) if list.is_empty() => Some(Vec::new()),
        Some(value) => {
            let names = names(value);
            if names.is_none() {
                fields.refuse(format!("exclude_modules is not a list of at most {MAX_ENTRIES} names"));
            }
            names
        }
    }
}

fn names(value: &Value) -> Option<Vec<String>> {
    let list = value.as_array().filter(|list| (1..=MAX_ENTRIES).contains(&list.len()))?;
    list.iter().map(|name| name.as_str().filter(|name| !name.is_empty()).map(str::to_owned)).collect()
}

/// `layers_to_transform`: one number or several.
fn layers(fields: &mut Fields<'_>) -> Option<Vec<usize>> {
    let value = fields.get("layers_to_transform")?;
    let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    let layers = match value {
        Value::Array(list) if list.is_empty() => return None,
        Value::Array(list) => list.iter().map(number).collect(),
        one => number(one).map(|n| vec![n]),
    };
    if layers.is_none() {
        fields.refuse("layers_to_transform is not a layer's number or a list of them");
    }
    layers
}
