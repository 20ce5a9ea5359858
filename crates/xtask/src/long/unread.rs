//! Clients that ask for a long stream and do not read it.

use anyhow::Result;
use baton_loadgen::LocalServer;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

/// Bytes that the client's own system takes.
const RECEIVED: u32 = 4096;

/// What asks for a long reply of large events.
pub fn question(tokens: u32, seed: u32) -> Value {
    json!({
        "messages": [{"role": "user", "content": "What is 1 + 1?"}], "max_tokens": tokens, "ignore_eos": true, "seed": seed,
        "logprobs": true, "top_logprobs": 20,
    })
}

/// A stream that is asked for, and of which nothing has been read.
pub async fn stream(server: &LocalServer, mut question: Value) -> Result<TcpStream> {
    question["stream"] = true.into();
    let body = question.to_string();
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(RECEIVED)?;
    let mut stream = socket.connect(server.address()).await?;
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).await?;
    Ok(stream)
}

/// The status, which is all that is read.
pub async fn status(stream: &mut TcpStream) -> Result<u16> {
    let mut line = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut line).await?;
    Ok(std::str::from_utf8(&line["HTTP/1.1 ".len()..])?.parse()?)
}
