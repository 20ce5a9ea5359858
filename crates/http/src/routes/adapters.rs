//! `POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`, as vLLM has them. Both are about the generation that
//! serves; the next one has adapters of its own.

use axum::extract::{Request, State};

use crate::error::ApiError;
use crate::extract;
use crate::fields::Fields;
use crate::service::Service;

/// Loads an adapter from a folder of the server and serves it under a name.
pub(super) async fn load(State(service): State<Service>, request: Request) -> Result<String, ApiError> {
    service.open()?;
    let generation = service.serving()?;
    let mut fields = Fields::new(extract::json(request, service.config()).await?.object);
    let (name, path) = (text(&mut fields, "lora_name")?, text(&mut fields, "lora_path")?);
    let in_place = fields.bool("load_inplace")?.unwrap_or(false);
    fields.finish()?;
    generation.adapters.load(&generation.card, &name, path, in_place).await?;
    Ok(format!("Success: LoRA adapter '{name}' added successfully."))
}

/// Serves the adapter of a name no more. Requests that began with it finish with it.
pub(super) async fn unload(State(service): State<Service>, request: Request) -> Result<String, ApiError> {
    service.open()?;
    let generation = service.serving()?;
    let mut fields = Fields::new(extract::json(request, service.config()).await?.object);
    let name = text(&mut fields, "lora_name")?;
    fields.finish()?;
    generation.adapters.unload(&name)?;
    Ok(format!("Success: LoRA adapter '{name}' removed successfully."))
}

fn text(fields: &mut Fields, name: &str) -> Result<String, ApiError> {
    let value = fields.string(name)?.filter(|text| !text.is_empty());
    fields.required(name, value)
}
