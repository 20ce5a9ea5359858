//! The inputs of the fuzz targets `request` and `upload`, kept in `crates/fuzz/corpus`.

#[path = "../../../fuzz/inputs/parts.rs"]
mod parts;
#[path = "../../../fuzz/inputs/replay.rs"]
mod replay;
#[path = "../../../fuzz/inputs/request.rs"]
mod request;
#[path = "../../../fuzz/inputs/service.rs"]
mod service;
#[path = "../../../fuzz/inputs/upload.rs"]
mod upload;

#[test]
fn bodies_of_requests_never_panic() {
    replay::replay("request", request::run);
}

#[test]
fn uploads_and_lines_of_batches_never_panic() {
    replay::replay("upload", upload::run);
}
