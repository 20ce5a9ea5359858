//! Generations, and the rollout of a new one: seen and commanded by admins.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Request, State};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::extract;
use crate::generation::Generation;
use crate::generations::{All, Role, Traffic};
use crate::rollout::{COMMANDS, RolloutControl, RolloutRefusal};
use crate::service::Service;

/// All generations that are alive, those included that only finish what they began.
pub(super) async fn generations(State(service): State<Service>) -> Json<Value> {
    let All { generations, traffic, .. } = service.generations().all();
    let data: Vec<_> = generations.iter().map(|(role, generation)| object(*role, generation)).collect();
    let traffic = traffic.map(|traffic| match traffic {
        Traffic::None => json!({"kind": "none"}),
        Traffic::Shadow(share) => json!({"kind": "shadow", "share": share}),
        Traffic::Share(share) => json!({"kind": "share", "share": share}),
    });
    Json(json!({"object": "list", "data": data, "candidate_traffic": traffic}))
}

fn object(role: Role, generation: &Generation) -> Value {
    let (card, handoff, stats) = (&generation.card, generation.handoff.get(), generation.engine.stats());
    json!({
        "object": "generation",
        "generation": card.generation,
        "role": role.name(),
        "since": generation.since(),
        "names": card.names,
        "system_fingerprint": card.system_fingerprint,
        "handoff": {
            "state": handoff.admission.state(),
            "reason": handoff.admission.reason(),
            "required": handoff.required,
        },
        "alive": stats.alive,
        "requests_in_flight": generation.in_flight(),
        "kv_blocks": {
            "total": stats.blocks.total,
            "used": stats.blocks.used,
            "cached": stats.blocks.cached,
            "free": stats.blocks.free,
        },
    })
}

/// Where the rollout stands.
pub(super) async fn status(State(service): State<Service>) -> Result<Json<Value>, ApiError> {
    let control = control(&service)?;
    let status = tokio::task::spawn_blocking(move || control.status()).await;
    status.map(Json).map_err(|_| ApiError::internal())
}

/// Begins a rollout.
pub(super) async fn start(State(service): State<Service>, request: Request) -> Result<Json<Value>, ApiError> {
    obey(&service, "start", request).await
}

/// Commands the rollout that has begun.
pub(super) async fn command(
    State(service): State<Service>,
    Path(command): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let known = COMMANDS.into_iter().find(|known| *known == command).ok_or_else(ApiError::route_not_found)?;
    obey(&service, known, request).await
}

async fn obey(service: &Service, command: &'static str, request: Request) -> Result<Json<Value>, ApiError> {
    service.open()?;
    let control = control(service)?;
    let mut body = extract::json(request, service.config()).await?.object;
    body.retain(|_, value| !value.is_null());
    // A command that has begun is carried out, even if the client leaves.
    let obeyed = tokio::task::spawn_blocking(move || control.command(command, body)).await;
    obeyed.map_err(|_| ApiError::internal())?.map(Json).map_err(|refusal| match refusal {
        RolloutRefusal::Invalid { param, reason } => ApiError::invalid(&param, reason),
        RolloutRefusal::Conflict(reason) => ApiError::conflict(&reason),
        RolloutRefusal::Unavailable(reason) => ApiError::not_configured(&reason),
        RolloutRefusal::Failed(reason) => ApiError::rollout_failed(&reason),
    })
}

fn control(service: &Service) -> Result<Arc<dyn RolloutControl>, ApiError> {
    let none = || ApiError::not_configured("this server makes no rollouts; start it with --state-dir");
    service.rollout().cloned().ok_or_else(none)
}
