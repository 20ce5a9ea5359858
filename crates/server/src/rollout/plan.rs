//! What is asked of a rollout: a checkpoint, the stages of traffic on its way to serving, and the rules that end it.
//!
//! Invariant: a plan that exists can be followed to its end. What contradicts itself is refused by the name of the field.

use std::path::PathBuf;

use baton_http::Traffic;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Stages of a plan, at most.
const MAX_STAGES: usize = 100;
/// Bytes of a name.
const MAX_NAME: usize = 256;

/// A checked plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// A folder or GGUF file of the server.
    pub model: PathBuf,
    /// What people call this generation; clients go on using the names that are served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// In their order. None: the candidate stands without traffic until it is commanded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<Stage>,
    /// What follows the last stage: by default the promotion, if there are stages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promote: Option<Promotion>,
    #[serde(default)]
    pub rules: Rules,
}

/// Who promotes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Promotion {
    /// The end of the last stage.
    Auto,
    /// A command.
    Manual,
}

/// A kind of traffic until both of its ends are reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "StageFields", into = "StageFields")]
pub struct Stage {
    pub traffic: Traffic,
    /// Answers compared, of shadow traffic; requests answered, of a share.
    pub requests: u64,
    pub seconds: u64,
}

/// A stage as JSON has it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StageFields {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shadow: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    share: Option<f64>,
    #[serde(default, skip_serializing_if = "is_zero")]
    requests: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    seconds: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl TryFrom<StageFields> for Stage {
    type Error = String;

    fn try_from(fields: StageFields) -> Result<Self, String> {
        let StageFields { shadow, share, requests, seconds } = fields;
        let (name, traffic, part) = match (shadow, share) {
            (Some(part), None) => ("shadow", Traffic::Shadow(part), part),
            (None, Some(part)) => ("share", Traffic::Share(part), part),
            _ => return Err("a stage has either `shadow` or `share`".into()),
        };
        if !(part > 0.0 && part <= 1.0) {
            return Err(format!("`{name}` of a stage is above 0 and at most 1"));
        }
        if requests == 0 && seconds == 0 {
            return Err("a stage ends after its `requests`, its `seconds` or both".into());
        }
        Ok(Self { traffic, requests, seconds })
    }
}

impl From<Stage> for StageFields {
    fn from(Stage { traffic, requests, seconds }: Stage) -> Self {
        let (shadow, share) = match traffic {
            Traffic::Shadow(part) => (Some(part), None),
            Traffic::Share(part) => (None, Some(part)),
            Traffic::None => (None, None),
        };
        Self { shadow, share, requests, seconds }
    }
}

/// What a candidate must keep; one that does not is rolled back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rules {
    /// Part of its requests, unseen ones included, that it may fail by its own fault. `null`: any.
    pub max_error_rate: Option<f64>,
    /// Its median time to the first token, and per token after, over those of the generation that serves.
    pub max_latency_ratio: Option<f64>,
    /// Part of the tokens that must be those the client got, up to the first difference of each answer.
    pub min_shadow_agreement: Option<f64>,
    /// Largest difference of a log-probability from the trainer's, in nats.
    pub max_parity_logprob_diff: Option<f64>,
    /// Mean KL divergence from the trainer, in nats.
    pub max_parity_kl: Option<f64>,
    /// Part of the positions with the trainer's best token.
    pub min_parity_top1: Option<f64>,
    /// Whether a single answer of NaN or infinite logits ends the rollout.
    pub nan_logits: bool,
    /// Requests from which on rates, ratios and agreement are judged.
    pub min_requests: u64,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            max_error_rate: Some(0.01),
            max_latency_ratio: None,
            min_shadow_agreement: None,
            max_parity_logprob_diff: None,
            max_parity_kl: None,
            min_parity_top1: None,
            nan_logits: true,
            min_requests: 20,
        }
    }
}

/// A field that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{param}: {reason}")]
pub struct PlanError {
    pub param: String,
    /// Why, and what could be used.
    pub reason: String,
}

impl PlanError {
    pub fn new(param: &str, reason: impl Into<String>) -> Self {
        Self { param: param.to_owned(), reason: reason.into() }
    }
}

impl Plan {
    /// Reads and checks what JSON says.
    pub fn parse(body: Map<String, Value>) -> Result<Self, PlanError> {
        let plan: Self = serde_json::from_value(body.into()).map_err(|error| {
            // The messages of unknown and missing fields, and ours, have the name between backquotes.
            let text = error.to_string();
            PlanError::new(text.split('`').nth(1).unwrap_or("plan"), text.clone())
        })?;
        plan.check()?;
        Ok(plan)
    }

    fn check(&self) -> Result<(), PlanError> {
        if self.model.as_os_str().is_empty() {
            return Err(PlanError::new("model", "a folder or .gguf file of the server is taken"));
        }
        if self.name.as_ref().is_some_and(|name| name.is_empty() || name.len() > MAX_NAME) {
            return Err(PlanError::new("name", format!("1 to {MAX_NAME} bytes are taken")));
        }
        if self.stages.len() > MAX_STAGES {
            return Err(PlanError::new("stages", format!("at most {MAX_STAGES} are taken")));
        }
        if self.stages.is_empty() && self.promote == Some(Promotion::Auto) {
            return Err(PlanError::new("promote", "`auto` follows the last stage, and there are no stages"));
        }
        let rules = &self.rules;
        let within = |name: &str, value: Option<f64>, accepted: &str, holds: fn(f64) -> bool| match value {
            Some(value) if !holds(value) => Err(PlanError::new(name, format!("{accepted} is taken"))),
            _ => Ok(()),
        };
        let part = |name, value| within(name, value, "0 to 1", |x| (0.0..=1.0).contains(&x));
        let nats = |name, value| within(name, value, "a number from 0", |x| x >= 0.0 && x.is_finite());
        part("max_error_rate", rules.max_error_rate)?;
        part("min_shadow_agreement", rules.min_shadow_agreement)?;
        part("min_parity_top1", rules.min_parity_top1)?;
        nats("max_parity_logprob_diff", rules.max_parity_logprob_diff)?;
        nats("max_parity_kl", rules.max_parity_kl)?;
        within("max_latency_ratio", rules.max_latency_ratio, "a number above 0", |x| x > 0.0 && x.is_finite())?;
        if rules.min_requests == 0 {
            return Err(PlanError::new("min_requests", "a number from 1 is taken"));
        }
        let shadowed = self.stages.iter().any(|stage| matches!(stage.traffic, Traffic::Shadow(_)));
        if rules.min_shadow_agreement.is_some() && !self.stages.is_empty() && !shadowed {
            return Err(PlanError::new("min_shadow_agreement", "no stage has shadow traffic, which it is measured on"));
        }
        Ok(())
    }

    /// Whether the end of the last stage promotes.
    pub fn promotes(&self) -> bool {
        !self.stages.is_empty() && self.promote != Some(Promotion::Manual)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(plan: Value) -> Result<Plan, PlanError> {
        let Value::Object(body) = plan else { panic!("an object") };
        Plan::parse(body)
    }

    #[test]
    fn a_plan_is_read_with_defaults_and_written_as_it_was_read() {
        let plan = parse(json!({
            "model": "/b",
            "stages": [{"shadow": 0.1, "requests": 100}, {"share": 0.5, "requests": 5, "seconds": 60}],
            "rules": {"max_latency_ratio": 1.5, "max_error_rate": null},
        }))
        .unwrap();
        assert_eq!(plan.stages[1], Stage { traffic: Traffic::Share(0.5), requests: 5, seconds: 60 });
        assert_eq!((plan.rules.max_error_rate, plan.rules.nan_logits, plan.rules.min_requests), (None, true, 20));
        assert!(plan.promotes() && !parse(json!({"model": "/b"})).unwrap().promotes());
        assert_eq!(parse(serde_json::to_value(&plan).unwrap()).unwrap(), plan);
    }

    #[test]
    fn what_cannot_be_followed_is_refused_by_name() {
        let stages = |stage: Value| json!({"model": "/b", "stages": [stage]});
        let rules = |rules: Value| json!({"model": "/b", "stages": [{"share": 1, "seconds": 1}], "rules": rules});
        for (plan, name) in [
            (json!({}), "model"),
            (json!({"model": ""}), "model"),
            (json!({"model": "/b", "frobnicate": 1}), "frobnicate"),
            (json!({"model": "/b", "name": ""}), "name"),
            (json!({"model": "/b", "promote": "auto"}), "promote"),
            (json!({"model": "/b", "promote": "never"}), "never"),
            (stages(json!({"requests": 3})), "shadow"),
            (stages(json!({"shadow": 0.1, "share": 0.1, "requests": 3})), "shadow"),
            (stages(json!({"share": 0, "requests": 3})), "share"),
            (stages(json!({"share": 1.5, "requests": 3})), "share"),
            (stages(json!({"share": 0.5})), "requests"),
            (stages(json!({"share": 0.5, "requests": 3, "minutes": 3})), "minutes"),
            (rules(json!({"max_error_rate": 2})), "max_error_rate"),
            (rules(json!({"max_latency_ratio": 0})), "max_latency_ratio"),
            (rules(json!({"min_shadow_agreement": 0.9})), "min_shadow_agreement"),
            (rules(json!({"max_parity_kl": -1})), "max_parity_kl"),
            (rules(json!({"min_requests": 0})), "min_requests"),
            (rules(json!({"speed": 0})), "speed"),
        ] {
            let error = parse(plan.clone()).unwrap_err();
            assert!(error.param == name || error.reason.contains(&format!("`{name}`")), "{plan}: {error:?}");
        }
    }
}
