//! The bytes of a file as a reply, read as the client takes them: a slow client holds no thread.

use std::fs::File;
use std::future::Future;
use std::io::{self, Read};
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::HttpBody;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::task::{JoinHandle, spawn_blocking};

/// Bytes read at once.
const CHUNK_BYTES: u64 = 256 << 10;

/// The rest of a file.
pub(crate) struct Download {
    left: u64,
    step: Step,
}

enum Step {
    Idle(File),
    Reading(JoinHandle<io::Result<(File, Vec<u8>)>>),
    Ended,
}

impl Download {
    /// This many bytes of a file.
    pub fn new(file: File, bytes: u64) -> Self {
        Self { left: bytes, step: Step::Idle(file) }
    }
}

impl HttpBody for Download {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = &mut *self;
        loop {
            match std::mem::replace(&mut this.step, Step::Ended) {
                Step::Idle(_) if this.left == 0 => return Poll::Ready(None),
                Step::Idle(mut file) => {
                    let wanted = this.left.min(CHUNK_BYTES);
                    this.step = Step::Reading(spawn_blocking(move || {
                        let mut bytes = Vec::with_capacity(wanted as usize);
                        Read::by_ref(&mut file).take(wanted).read_to_end(&mut bytes)?;
                        Ok((file, bytes))
                    }));
                }
                Step::Reading(mut reading) => {
                    let Poll::Ready(read) = Pin::new(&mut reading).poll(cx) else {
                        this.step = Step::Reading(reading);
                        return Poll::Pending;
                    };
                    let (file, bytes) = match read.map_err(io::Error::other).flatten() {
                        Ok((_, bytes)) if bytes.is_empty() => return Poll::Ready(Some(Err(cut_short()))),
                        Ok(read) => read,
                        Err(error) => return Poll::Ready(Some(Err(error))),
                    };
                    this.left -= bytes.len() as u64;
                    this.step = Step::Idle(file);
                    return Poll::Ready(Some(Ok(Frame::data(bytes.into()))));
                }
                Step::Ended => return Poll::Ready(None),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than its record says")
}
