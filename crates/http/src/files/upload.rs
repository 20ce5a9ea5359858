//! Receiving a file: from a form to the disk, piece by piece.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::Request;

use crate::error::ApiError;
use crate::extract;
use crate::fields::integer;
use crate::files::multipart::Multipart;
use crate::files::{FileInfo, FileObject, Files, now};
use crate::keys::Owner;
use crate::service::Service;
use crate::store;

/// What a form has besides the file, in bytes.
const FORM_BYTES: u64 = 64 << 10;
/// Pieces are gathered to so many bytes before they are written.
const WRITE_BYTES: usize = 1 << 20;
/// Longest text of a field and longest name of a file, in bytes.
const MAX_TEXT_BYTES: usize = 256;
/// Seconds that a file may be asked to be kept: from an hour to thirty days, as OpenAI has it.
const EXPIRY: std::ops::RangeInclusive<i64> = 3600..=2_592_000;

/// The one purpose that files have here.
const BATCH: &str = "batch";

/// Receives the file of a form.
pub(crate) async fn receive(service: &Service, owner: Owner, request: Request) -> Result<FileObject, ApiError> {
    let store = service.store()?.clone();
    let files = store.files().clone();
    let limit = files.limits.file_bytes;
    let (parts, body) = request.into_parts();
    if extract::announced(&parts.headers).is_some_and(|length| length > limit + FORM_BYTES) {
        extract::refuse_body(&parts.headers, body);
        return Err(ApiError::request_too_large(limit as usize));
    }
    service.disk_work(move || store.files().sweep(|id| store.batches().uses(id))).await?;
    files.check_count(owner)?;
    let mut form = Multipart::new(&parts.headers, body, limit + FORM_BYTES, service.config().body_timeout)?;
    let received = read(service, &files, &mut form).await;
    let (upload, filename, expires_after) = match received {
        Ok(received) => received,
        Err(error) => {
            extract::refuse_body(&parts.headers, form.into_rest());
            return Err(error);
        }
    };
    let created_at = now();
    let info = FileInfo {
        bytes: upload.bytes,
        created_at,
        expires_at: expires_after.map(|seconds| created_at + seconds),
        filename,
        purpose: BATCH.to_owned(),
    };
    service.disk_work(move || upload.publish(owner, info)).await
}

/// The whole form: the file, its name, and for how many seconds it is to be kept.
async fn read(
    service: &Service,
    files: &Arc<Files>,
    form: &mut Multipart,
) -> Result<(Upload, String, Option<u64>), ApiError> {
    let (mut file, mut purpose, mut anchor, mut seconds) = (None, None, None, None);
    while let Some(part) = form.next().await? {
        let text = match part.name.as_str() {
            "file" if file.is_none() => {
                let filename = part.filename.unwrap_or_else(|| "file".to_owned());
                if !(1..=MAX_TEXT_BYTES).contains(&filename.len()) || filename.contains(char::is_control) {
                    let accepted = format!("a file with a name of 1 to {MAX_TEXT_BYTES} bytes");
                    return Err(ApiError::out_of_range("file", accepted));
                }
                file = Some((write(service, files, form).await?, filename));
                continue;
            }
            "purpose" => &mut purpose,
            "expires_after[anchor]" => &mut anchor,
            "expires_after[seconds]" => &mut seconds,
            "file" => return Err(ApiError::invalid("file", "file must be given once")),
            other => return Err(ApiError::unknown_parameter(other)),
        };
        *text = Some(form.text(&part.name, MAX_TEXT_BYTES).await?);
    }
    match purpose.as_deref() {
        Some(BATCH) => {}
        Some(_) => return Err(ApiError::out_of_range("purpose", "batch; files serve nothing else here")),
        None => return Err(ApiError::missing("purpose")),
    }
    let expires_after = expiry(anchor.as_deref(), seconds.as_deref())?;
    let (upload, filename) = file.ok_or_else(|| ApiError::missing("file"))?;
    if upload.bytes == 0 {
        return Err(ApiError::out_of_range("file", "a file that is not empty"));
    }
    Ok((upload, filename, expires_after))
}

fn expiry(anchor: Option<&str>, seconds: Option<&str>) -> Result<Option<u64>, ApiError> {
    let Some(seconds) = seconds else {
        return anchor.map_or(Ok(None), |_| Err(ApiError::missing("expires_after[seconds]")));
    };
    if anchor != Some("created_at") {
        return Err(ApiError::out_of_range("expires_after[anchor]", "created_at"));
    }
    let seconds: i64 = seconds.parse().map_err(|_| ApiError::wrong_type("expires_after[seconds]", "an integer"))?;
    integer("expires_after[seconds]", &seconds.into(), EXPIRY).map(|seconds| Some(seconds as u64))
}

async fn write(service: &Service, files: &Arc<Files>, form: &mut Multipart) -> Result<Upload, ApiError> {
    let limit = files.limits.file_bytes;
    let begin = files.clone();
    let mut upload = service.disk_work(move || Upload::begin(begin)).await?;
    let mut piece = Vec::new();
    loop {
        let chunk = form.chunk().await?;
        let ended = chunk.is_none();
        piece.extend(chunk.unwrap_or_default());
        if ended || piece.len() >= WRITE_BYTES {
            if upload.bytes + piece.len() as u64 > limit {
                return Err(ApiError::request_too_large(limit as usize));
            }
            let full = "the file does not fit beside those that are kept; delete some first";
            files.reserve(piece.len() as u64).map_err(|_| ApiError::storage_full(full))?;
            upload.bytes += piece.len() as u64;
            let bytes = std::mem::take(&mut piece);
            upload = service.disk_work(move || upload.append(&bytes)).await?;
        }
        if ended {
            return Ok(upload);
        }
    }
}

/// A file that does not exist yet: dropped, it never does.
struct Upload {
    files: Arc<Files>,
    id: String,
    part: PathBuf,
    file: File,
    /// Written, or about to be.
    bytes: u64,
    complete: bool,
}

impl Upload {
    fn begin(files: Arc<Files>) -> io::Result<Self> {
        let id = files.new_id();
        let part = files.folder.beside(&id, "part");
        let file = store::create(&part)?;
        Ok(Self { files, id, part, file, bytes: 0, complete: false })
    }

    fn append(mut self, bytes: &[u8]) -> io::Result<Self> {
        self.file.write_all(bytes)?;
        Ok(self)
    }

    fn publish(mut self, owner: Owner, info: FileInfo) -> io::Result<FileObject> {
        self.file.sync_all()?;
        fs::rename(&self.part, self.files.data(&self.id))?;
        self.complete = true;
        let object = FileObject::new(&self.id, &info);
        self.files.publish(&self.id, owner, info)?;
        Ok(object)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.complete {
            // An unlink does not wait for the disk; what it misses, the next start finds.
            let _ = fs::remove_file(&self.part);
            self.files.release(self.bytes);
        }
    }
}
