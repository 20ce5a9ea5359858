//! What an output is asked to be, compiled for the model that is to write it.

use std::sync::Arc;

use baton_grammar::{Grammar, GrammarError, Spec, Thinking};

use crate::error::ApiError;
use crate::generation::Generation;
use crate::openai::params::Params;
use crate::openai::structured::Structured;
use crate::service::Service;

/// The field of a form that is made of allowed tools.
pub(super) const ALLOWED: &str = "tool_choice";

/// The grammar of a request's outputs; `None` if they may be anything. `thinking`: the model may think before.
pub(crate) async fn compile(
    service: &Service,
    generation: &Arc<Generation>,
    params: &Params,
    structured: Option<Structured>,
    thinking: Option<Thinking>,
) -> Result<Option<Arc<dyn Grammar>>, ApiError> {
    let bounded = thinking.as_ref().is_some_and(|thinking| thinking.budget.is_some());
    if structured.is_none() && !bounded {
        return Ok(None);
    }
    if let (Some(structured), true) = (&structured, params.ignore_eos) {
        let message = format!("ignore_eos cannot be combined with {}: what has a form has an end", structured.field);
        return Err(ApiError::invalid("ignore_eos", message));
    }
    let generation = Arc::clone(generation);
    let work = move || {
        let (spec, field) = structured.map_or((Spec::Any, String::new()), |asked| (asked.spec, asked.field));
        generation.compiler().compile(&spec, thinking).map_err(|error| refusal(&field, &error))
    };
    service.grammar_work(work).await.map(Some)
}

fn refusal(field: &str, error: &GrammarError) -> ApiError {
    match error {
        // Where some of the tools are allowed only, their numbers are others.
        GrammarError::Tool { index, reason } if field != ALLOWED => {
            ApiError::invalid(&format!("tools[{index}].function.parameters"), reason.to_string())
        }
        error => ApiError::invalid(field, error.to_string()),
    }
}
