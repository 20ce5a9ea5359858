//! What is known of a batch, and how it is shown.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::files::now;
use crate::openai::metadata;

/// Endpoints that a batch may ask.
pub(crate) const ENDPOINTS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"];

/// The one window that there is, and how long it is.
const WINDOW: &str = "24h";
const WINDOW_SECONDS: u64 = 24 * 3600;
/// Seconds that results may be asked to be kept, as OpenAI has it.
const EXPIRY: std::ops::RangeInclusive<i64> = 3600..=2_592_000;

/// Where a batch stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Status {
    Validating,
    Failed,
    InProgress,
    Finalizing,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

impl Status {
    /// Nothing happens any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }
}

/// Lines by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub total: u64,
    pub completed: u64,
    pub failed: u64,
}

/// Why a batch failed, perhaps by one of its lines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BatchError {
    pub code: String,
    pub message: String,
    pub param: Option<String>,
    /// Counted from 1.
    pub line: Option<u64>,
}

/// Seconds since 1970.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Times {
    pub in_progress_at: Option<u64>,
    pub finalizing_at: Option<u64>,
    pub completed_at: Option<u64>,
    pub failed_at: Option<u64>,
    pub expired_at: Option<u64>,
    pub cancelling_at: Option<u64>,
    pub cancelled_at: Option<u64>,
}

/// A batch as its record has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Batch {
    pub endpoint: String,
    pub input_file_id: String,
    pub metadata: Option<Map<String, Value>>,
    /// Seconds that the results are kept, if not for ever.
    pub results_expire_after: Option<u64>,
    pub status: Status,
    pub created_at: u64,
    pub expires_at: u64,
    pub times: Times,
    pub errors: Vec<BatchError>,
    /// The files of results, shown once there is something in them.
    pub output_file_id: String,
    pub error_file_id: String,
    /// While it runs: those of the last start.
    pub counts: Counts,
}

/// What a client asks for.
pub(crate) struct NewBatch {
    pub endpoint: &'static str,
    pub input_file_id: String,
    metadata: Option<Map<String, Value>>,
    results_expire_after: Option<u64>,
}

impl NewBatch {
    /// Reads the request.
    pub fn read(body: Map<String, Value>) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body);
        let input_file_id = fields.string("input_file_id")?;
        let input_file_id = fields.required("input_file_id", input_file_id)?;
        let endpoint = fields.string("endpoint")?;
        let endpoint = fields.required("endpoint", endpoint)?;
        let known = ENDPOINTS.into_iter().find(|known| *known == endpoint);
        let endpoint = known.ok_or_else(|| ApiError::out_of_range("endpoint", ENDPOINTS.join(" or ")))?;
        let window = fields.string("completion_window")?;
        if fields.required("completion_window", window)? != WINDOW {
            return Err(ApiError::out_of_range("completion_window", WINDOW));
        }
        let metadata = metadata::read(&mut fields)?;
        let results_expire_after = expiry(&mut fields)?;
        fields.finish()?;
        Ok(Self { endpoint, input_file_id, metadata, results_expire_after })
    }

    /// The batch that it becomes.
    pub fn batch(self, output_file_id: String, error_file_id: String) -> Batch {
        let created_at = now();
        Batch {
            endpoint: self.endpoint.to_owned(),
            input_file_id: self.input_file_id,
            metadata: self.metadata,
            results_expire_after: self.results_expire_after,
            status: Status::Validating,
            created_at,
            expires_at: created_at + WINDOW_SECONDS,
            times: Times::default(),
            errors: Vec::new(),
            output_file_id,
            error_file_id,
            counts: Counts::default(),
        }
    }
}

fn expiry(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(mut expiry) = fields.object("output_expires_after")? else { return Ok(None) };
    let anchor = expiry.string("anchor")?;
    if expiry.required("anchor", anchor)? != "created_at" {
        return Err(ApiError::out_of_range("output_expires_after.anchor", "created_at"));
    }
    let seconds = expiry.integer("seconds", EXPIRY)?;
    let seconds = expiry.required("seconds", seconds)?;
    expiry.finish()?;
    Ok(Some(seconds as u64))
}

/// A batch as OpenAI shows it.
#[derive(Debug, Serialize)]
pub(crate) struct BatchObject {
    pub id: String,
    object: &'static str,
    endpoint: String,
    errors: Option<Errors>,
    input_file_id: String,
    completion_window: &'static str,
    pub status: Status,
    output_file_id: Option<String>,
    error_file_id: Option<String>,
    created_at: u64,
    in_progress_at: Option<u64>,
    expires_at: u64,
    finalizing_at: Option<u64>,
    completed_at: Option<u64>,
    failed_at: Option<u64>,
    expired_at: Option<u64>,
    cancelling_at: Option<u64>,
    cancelled_at: Option<u64>,
    request_counts: Counts,
    metadata: Option<Map<String, Value>>,
}

#[derive(Debug, Serialize)]
struct Errors {
    object: &'static str,
    data: Vec<BatchError>,
}

impl Batch {
    /// As it is shown.
    pub fn object(&self, id: &str) -> BatchObject {
        let Self { endpoint, input_file_id, metadata, status, created_at, expires_at, times, counts, .. } =
            self.clone();
        let ended = |file: &String, lines: u64| (status.is_final() && lines > 0).then(|| file.clone());
        BatchObject {
            id: id.to_owned(),
            object: "batch",
            endpoint,
            errors: (!self.errors.is_empty()).then(|| Errors { object: "list", data: self.errors.clone() }),
            input_file_id,
            completion_window: WINDOW,
            status,
            output_file_id: ended(&self.output_file_id, counts.completed),
            error_file_id: ended(&self.error_file_id, counts.failed),
            created_at,
            in_progress_at: times.in_progress_at,
            expires_at,
            finalizing_at: times.finalizing_at,
            completed_at: times.completed_at,
            failed_at: times.failed_at,
            expired_at: times.expired_at,
            cancelling_at: times.cancelling_at,
            cancelled_at: times.cancelled_at,
            request_counts: counts,
            metadata,
        }
    }

    /// The batch is in this state from now on.
    pub fn enter(&mut self, status: Status) {
        let times = &mut self.times;
        let at = match status {
            Status::Validating => return,
            Status::Failed => &mut times.failed_at,
            Status::InProgress => &mut times.in_progress_at,
            Status::Finalizing => &mut times.finalizing_at,
            Status::Completed => &mut times.completed_at,
            Status::Expired => &mut times.expired_at,
            Status::Cancelling => &mut times.cancelling_at,
            Status::Cancelled => &mut times.cancelled_at,
        };
        // A state that is entered again after a restart began before it.
        at.get_or_insert_with(now);
        self.status = status;
    }
}
