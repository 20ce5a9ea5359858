//! The bundled model on a device, against the golden cases of its bundle, as `baton verify` judges them.

use baton_device::{Caps, Op, Requirements};
use baton_handoff::{Report as Verified, Verdict};
use baton_model::Files;
use serde_json::{Value, json};

use super::Found;
use crate::{bundled, handoff::verify};

/// Its name among the cases.
pub const NAME: &str = "model-abacus";

/// Verifies the model that is inside this binary on a device that offers `caps`.
pub fn judge(device: &str, caps: &Caps) -> Found {
    let needs = Requirements { ops: [Op::LatentAttention, Op::FusedMoe].into(), ..Requirements::default() };
    let refusals = caps.refusals(&needs);
    if !refusals.is_empty() {
        return Found::new(Verdict::Skipped, refusals);
    }
    match verify::on_device(bundled::NAME, &Files::Embedded(bundled::FILES), device) {
        Ok(verified) => {
            Found { figures: Some(figures(&verified)), ..Found::new(verified.verdict(), verified.reasons()) }
        }
        Err(error) => Found::new(Verdict::Fail, vec![format!("{error:#}")]),
    }
}

/// What was measured, in each precision.
fn figures(verified: &Verified) -> Value {
    let column = |column: &baton_handoff::Column| {
        let (numerics, device) = (&column.numerics, &column.device);
        let (agreed, of) = numerics.greedy_total();
        json!({
            "isa": device.isa,
            "formats": device.formats,
            "precision": device.precision,
            "verdict": column.verdict(),
            "cases": numerics.cases,
            "positions": numerics.positions,
            "max_abs_logprob_diff": numerics.max_abs_logprob_diff,
            "mean_abs_logprob_diff": numerics.mean_abs_logprob_diff,
            "kl": numerics.kl,
            "top1": {"agreed": numerics.top1.agreed, "of": numerics.top1.considered},
            "greedy": {"agreed": agreed, "of": of},
        })
    };
    let checks = verified.checks().iter().filter(|check| check.verdict != Verdict::NotRun);
    let checks: serde_json::Map<_, _> = checks.map(|check| (check.name.to_string(), json!(check.verdict))).collect();
    json!({"checks": checks, "columns": verified.devices().iter().map(column).collect::<Vec<_>>()})
}
