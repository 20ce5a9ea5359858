//! Rotary frequencies: the plain ones and the published ways to stretch them over longer contexts.
//!
//! Formulas as in Hugging Face transformers (`modeling_rope_utils.py`), which follow the papers:
//! yarn is arXiv 2309.00071; llama3 is the scaling of Llama 3.1.

use std::f64::consts::PI;

use serde_json::{Map, Value, json};

use super::fields::Fields;

/// Rotary embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Rotated columns of a head; even.
    pub dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Each divided by its own (GGUF's `rope_freqs.weight`).
    Divided {
        /// The divisors, one per pair.
        factors: Vec<f32>,
    },
    /// Low frequencies divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Wavelengths above `original_max_positions / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_positions / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of the pre-training, in tokens.
        original_max_positions: usize,
    },
    /// Low frequencies divided by `factor`, high ones kept, blended along the dimension.
    Yarn {
        /// The divisor.
        factor: f64,
        /// Pairs that turn more often than this over the original context are kept.
        beta_fast: f64,
        /// Pairs that turn less often are divided.
        beta_slow: f64,
        /// Context of the pre-training, in tokens.
        original_max_positions: usize,
        /// Factor on cosine and sine.
        attention_factor: f64,
        /// DeepSeek's factor on the softmax scale, `mscale(factor, mscale_all_dim)²`; 1 elsewhere.
        softmax_factor: f64,
    },
}

impl RopeConfig {
    /// Radians per position of each pair.
    pub fn inv_freq(&self) -> Vec<f32> {
        let pairs = self.dim / 2;
        // transformers takes the power in f32; so do we, to agree to the last bits that matter far out.
        let plain = |i: usize| 1.0 / (self.theta as f32).powf((2 * i) as f32 / self.dim as f32);
        let stretch: Box<dyn Fn(usize) -> f32> = match self.scaling {
            RopeScaling::Divided { ref factors } => Box::new(move |i| plain(i) / factors[i]),
            RopeScaling::None => Box::new(plain),
            RopeScaling::Linear { factor } => Box::new(move |i| plain(i) / factor as f32),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                Box::new(move |i| {
                    let frequency = f64::from(plain(i));
                    let turns = original_max_positions as f64 * frequency / (2.0 * PI);
                    let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    (frequency * (kept + (1.0 - kept) / factor)) as f32
                })
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_positions, .. } => {
                // The pair that turns `turns` times over the original context, as a real number.
                let pair = |turns: f64| {
                    let base = original_max_positions as f64 / (turns * 2.0 * PI);
                    self.dim as f64 * base.ln() / (2.0 * self.theta.ln())
                };
                let low = pair(beta_fast).floor().max(0.0);
                let high = pair(beta_slow).ceil().min(self.dim as f64 - 1.0);
                let width = if low == high { 0.001 } else { high - low };
                Box::new(move |i| {
                    let divided = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    let frequency = f64::from(plain(i));
                    (frequency * (1.0 - divided) + frequency / factor * divided) as f32
                })
            }
        };
        (0..pairs).map(stretch).collect()
    }

    /// Factor on cosine and sine.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Factor on the softmax scale (DeepSeek).
    pub fn softmax_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { softmax_factor, .. } => softmax_factor as f32,
            _ => 1.0,
        }
    }
}

/// yarn's factor for the growth of attention entropy with the context: `0.1 m ln(s) + 1`.
fn mscale(scale: f64, m: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 }
}

const THETA: &str = "a number above 1";
const OLD: &str = "rope_scaling";
const NEW: &str = "rope_parameters";
/// Of an object: how messages name it, and what they put before its fields.
type Name = (&'static str, &'static str);

fn theta(fields: &mut Fields<'_>, name: &str) -> Option<f64> {
    fields.optional_number(name, THETA, |v| v > 1.0 && v < 1e12)
}

/// Reads `rope_theta` and `rope_scaling`, or the newer `rope_parameters` that holds both.
pub(super) fn parse(fields: &mut Fields<'_>, dim: usize, max_positions: usize, default_theta: f64) -> RopeConfig {
    let theta = theta(fields, "rope_theta").unwrap_or(default_theta);
    let (name, value) = object(fields);
    parse_object(fields, name, value, (dim, 1.0), max_positions, theta)
}

/// The one object of either style, with its name and its path.
fn object<'a>(fields: &Fields<'a>) -> (Name, Option<&'a Value>) {
    match fields.get(NEW) {
        Some(value) => ((NEW, "rope_parameters."), Some(value)),
        None => ((OLD, "rope_scaling."), fields.get(OLD)),
    }
}

/// Gemma 3: the rotary embeddings of layers with full attention and of those with a window. Older
/// configs have a base for each and scale only the first; newer ones have an object for each.
pub(super) fn parse_two(fields: &mut Fields<'_>, dim: usize, max_positions: usize) -> [RopeConfig; 2] {
    let theta_of_windows = theta(fields, "rope_local_base_freq").unwrap_or(1e4);
    let parts = fields.get(NEW).map(|both| [both.get("full_attention"), both.get("sliding_attention")]);
    let Some([Some(full), Some(windowed)]) = parts else {
        let full = parse(fields, dim, max_positions, 1e6);
        return [full, RopeConfig { dim, theta: theta_of_windows, scaling: RopeScaling::None }];
    };
    let names = [
        ("rope_parameters.full_attention", "rope_parameters.full_attention."),
        ("rope_parameters.sliding_attention", "rope_parameters.sliding_attention."),
    ];
    [
        parse_object(fields, names[0], Some(full), (dim, 1.0), max_positions, 1e6),
        parse_object(fields, names[1], Some(windowed), (dim, 1.0), max_positions, theta_of_windows),
    ]
}

/// DeepSeek-V4: the rotary embeddings of layers that pool nothing and of those that pool, of which `share` of a head is rotated.
/// Published configs have a base for each and stretch only the second; newer ones have an object for each. yarn's factors on
/// cosine, sine and softmax are no part of the model.
pub(super) fn parse_pooling(fields: &mut Fields<'_>, dim: usize, share: f64, max_positions: usize) -> [RopeConfig; 2] {
    let thetas = [("rope_theta", 1e4), ("compress_rope_theta", 1.6e5)];
    let thetas = thetas.map(|(name, default)| theta(fields, name).unwrap_or(default));
    let parts = fields.get(NEW).and_then(|both| Some([both.get("main")?, both.get("compress")?]));
    let objects = match parts {
        Some([main, compress]) => [
            (("rope_parameters.main", "rope_parameters.main."), Some(main)),
            (("rope_parameters.compress", "rope_parameters.compress."), Some(compress)),
        ],
        None => [((OLD, "rope_scaling."), None), object(fields)],
    };
    for (is_pooling, ((_, path), value)) in [false, true].into_iter().zip(objects) {
        let Some(Value::Object(map)) = value else { continue };
        let mut own = Fields::new(map, path);
        if !is_pooling {
            ["rope_type", "type"].iter().for_each(|name| own.only(name, &[json!("default")]));
        }
        if parts.is_none() && own.get("rope_theta").is_some() {
            own.refuse(format!("{path}rope_theta could be of either kind of layers"));
        }
        own.only("attention_factor", &[json!(1), json!(1.0)]);
        for name in ["mscale", "mscale_all_dim"] {
            if own.get(name).is_some() {
                own.refuse(format!("{path}{name} is no part of DeepSeek-V4"));
            }
        }
        fields.reasons.append(&mut own.reasons);
    }
    let [(main, first), (compress, second)] = objects;
    let plain = parse_object(fields, main, first, (dim, share), max_positions, thetas[0]);
    let mut pooling = parse_object(fields, compress, second, (dim, share), max_positions, thetas[1]);
    if let RopeScaling::Yarn { attention_factor, .. } = &mut pooling.scaling {
        *attention_factor = 1.0;
    }
    [plain, pooling]
}

/// One object of either style, if there is one, for `dim` columns, which are that share of a head.
fn parse_object(
    fields: &mut Fields<'_>,
    (name, path): Name,
    value: Option<&Value>,
    (dim, share): (usize, f64),
    max_positions: usize,
    default_theta: f64,
) -> RopeConfig {
    let empty = Map::new();
    let map = match value {
        None => &empty,
        Some(Value::Object(map)) => map,
        Some(_) => {
            fields.refuse(format!("{name} is not an object"));
            &empty
        }
    };
    let mut inner = Fields::new(map, path);
    let theta = theta(&mut inner, "rope_theta").unwrap_or(default_theta);
    inner.optional_number("partial_rotary_factor", &share.to_string(), |v| (v - share).abs() < 1e-6);
    let scaling = scaling(&mut inner, value.is_some(), max_positions);
    fields.reasons.append(&mut inner.reasons);
    RopeConfig { dim, theta, scaling }
}

fn scaling(fields: &mut Fields<'_>, present: bool, max_positions: usize) -> RopeScaling {
    const FACTOR: &str = "a number from 1 to 10000";
    let name = if fields.get("rope_type").is_some() { "rope_type" } else { "type" };
    let positive = |v: f64| v > 0.0 && v < 1e6;
    let factor = |fields: &mut Fields<'_>| fields.number("factor", FACTOR, |v| (1.0..=1e4).contains(&v));
    match fields.text(name) {
        Some("default") => RopeScaling::None,
        None if !present => RopeScaling::None,
        None => {
            fields.refuse("the rope scaling names no rope_type; supported: default, linear, llama3, yarn");
            RopeScaling::None
        }
        Some("linear") => RopeScaling::Linear { factor: factor(fields) },
        Some("llama3") => {
            let low_freq_factor = fields.number("low_freq_factor", "a positive number", positive);
            let high_freq_factor = fields.number("high_freq_factor", "a positive number", positive);
            if fields.reasons.is_empty() && low_freq_factor >= high_freq_factor {
                fields.refuse("rope scaling llama3 needs low_freq_factor below high_freq_factor");
            }
            RopeScaling::Llama3 {
                factor: factor(fields),
                low_freq_factor,
                high_freq_factor,
                original_max_positions: fields.size("original_max_position_embeddings", 1..=max_positions),
            }
        }
        Some("yarn") => {
            let factor = factor(fields);
            let number = |fields: &mut Fields<'_>, name| {
                let value = fields.optional_number(name, "a number from 0 on", |v| (0.0..1e6).contains(&v));
                value.filter(|v| *v > 0.0) // 0 means none
            };
            let (m, m_all) = (number(fields, "mscale"), number(fields, "mscale_all_dim"));
            let attention_factor = number(fields, "attention_factor").unwrap_or(match (m, m_all) {
                (Some(m), Some(all)) => mscale(factor, m) / mscale(factor, all),
                _ => mscale(factor, 1.0),
            });
            let original = fields.optional_size("original_max_position_embeddings", 1..=1 << 24);
            RopeScaling::Yarn {
                factor,
                beta_fast: number_or(fields, "beta_fast", 32.0),
                beta_slow: number_or(fields, "beta_slow", 1.0),
                original_max_positions: original.unwrap_or(max_positions),
                attention_factor,
                softmax_factor: m_all.map_or(1.0, |all| mscale(factor, all).powi(2)),
            }
        }
        Some(_) => {
            fields.only(name, &[json!("default"), json!("linear"), json!("llama3"), json!("yarn")]);
            RopeScaling::None
        }
    }
}

fn number_or(fields: &mut Fields<'_>, name: &str, default: f64) -> f64 {
    fields.optional_number(name, "a positive number", |v| v > 0.0 && v < 1e6).unwrap_or(default)
}
