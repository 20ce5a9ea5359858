//! What is asked: synthetic prompts of given token lengths, or prompts of a file.
//!
//! Token lengths are exact where the server takes token ids. Elsewhere a prompt is words, as many as
//! give about that many tokens by the server's own usage.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Client, Planned};

/// Ids that any vocabulary has as ordinary tokens: past special tokens and single bytes, below the smallest sizes in use.
const ORDINARY_IDS: std::ops::Range<u32> = 300..1000;

/// Words that are one token in most vocabularies.
const WORDS: &[&str] = &[
    "the", "and", "that", "with", "from", "this", "have", "will", "your", "about", "more", "when", "time", "there",
    "which", "people", "other", "first", "after", "world", "years", "where", "between", "under", "place", "number",
    "water", "house", "small", "large", "every", "light", "point", "night", "story", "group",
];

/// Which route is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`; a prompt is one user message.
    Chat,
}

impl Endpoint {
    /// Its path.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// A prompt as a request or a file gives it.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Prompt {
    /// Text, which the server tokenises.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

/// One thing to ask.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What.
    pub prompt: Prompt,
    /// Its length in tokens, 0 where only the server can tell.
    pub prompt_len: u64,
    /// Tokens to generate at most.
    pub output_len: u32,
    /// When it arrives, if the file says.
    pub at: Option<Duration>,
}

impl Request {
    /// The call that asks it of `model`, with `extra` fields in the body.
    pub fn planned(&self, endpoint: Endpoint, model: &str, at: Duration, extra: &[(&str, Value)]) -> Planned {
        let mut body = json!({"model": model, "max_tokens": self.output_len});
        match endpoint {
            Endpoint::Completions => body["prompt"] = json!(self.prompt),
            Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": self.prompt}]),
        }
        for (name, value) in extra {
            body[*name] = value.clone();
        }
        Planned { at, body, prompt_len: self.prompt_len }
    }
}

/// How a prompt of so many tokens is written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
    /// As token ids, exactly that many.
    Ids,
    /// As words, of which each is about this many tokens.
    Text {
        /// Tokens of the server's vocabulary per word.
        tokens_per_word: f64,
    },
}

impl Form {
    /// What `endpoint` takes: token ids if it answers a small request made of them, else words, measured by two small
    /// requests. A server that refuses all of these is left to the run, which counts its errors.
    pub async fn ask(client: &Client, endpoint: Endpoint, model: &str) -> Self {
        let tokens = async |prompt: Prompt| {
            let request = Request { prompt, prompt_len: 0, output_len: 1, at: None };
            let body = request.planned(endpoint, model, Duration::ZERO, &[]).body;
            client.whole(endpoint.path(), &body).await.ok().map(|reply| reply.prompt_tokens)
        };
        let ids = Self::Ids.write(&mut StdRng::seed_from_u64(u64::MAX), 16);
        if endpoint == Endpoint::Completions && tokens(ids).await.is_some() {
            return Self::Ids;
        }
        // The difference of two lengths leaves out what a chat template adds.
        let words = |times: usize| Prompt::Text(vec![WORDS.join(" "); times].join(" "));
        let tokens_per_word = match (tokens(words(1)).await, tokens(words(2)).await) {
            (Some(once), Some(twice)) if twice > once => (twice - once) as f64 / WORDS.len() as f64,
            _ => 1.0,
        };
        Self::Text { tokens_per_word }
    }

    /// As the result names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ids => "token ids",
            Self::Text { .. } => "text of about that many tokens",
        }
    }

    /// A random prompt of `n` tokens.
    fn write(self, rng: &mut StdRng, n: usize) -> Prompt {
        match self {
            Self::Ids => Prompt::Ids((0..n).map(|_| rng.random_range(ORDINARY_IDS)).collect()),
            Self::Text { tokens_per_word } => {
                let words = (n as f64 / tokens_per_word).round() as usize;
                let words: Vec<_> = (0..words).map(|_| WORDS[rng.random_range(0..WORDS.len())]).collect();
                Prompt::Text(words.join(" "))
            }
        }
    }
}

/// Random prompts that share a prefix; named as in `vllm bench serve`.
#[derive(Debug, Clone, Copy)]
pub struct Random {
    /// Tokens of each prompt after the prefix.
    pub input_len: usize,
    /// Tokens to generate.
    pub output_len: u32,
    /// Tokens that all prompts begin with.
    pub prefix_len: usize,
    /// Decides the tokens.
    pub seed: u64,
}

impl Random {
    /// `n` prompts. The prefix depends on the seed alone, each prompt on the seed and its place.
    pub fn requests(&self, n: usize, form: Form) -> Vec<Request> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let prefix = form.write(&mut rng, self.prefix_len);
        let request = |_| Request {
            prompt: join(&prefix, form.write(&mut rng, self.input_len)),
            prompt_len: (self.prefix_len + self.input_len) as u64,
            output_len: self.output_len,
            at: None,
        };
        (0..n).map(request).collect()
    }
}

fn join(prefix: &Prompt, rest: Prompt) -> Prompt {
    match (prefix, rest) {
        (Prompt::Ids(a), Prompt::Ids(b)) => Prompt::Ids([a.as_slice(), &b].concat()),
        (Prompt::Text(a), Prompt::Text(b)) if !a.is_empty() => Prompt::Text(format!("{a} {b}")),
        (_, rest) => rest,
    }
}

/// A line of a workload file.
#[derive(Deserialize)]
struct Line {
    prompt: Prompt,
    #[serde(alias = "output_tokens")]
    output_len: Option<u32>,
    timestamp: Option<f64>,
}

/// The requests of a file of JSON lines, `{"prompt": text or ids, "output_len": n, "timestamp": seconds}`. Without
/// `output_len`, `output_len` of the call holds. Timestamps count from the first, must not fall, and are on every
/// line or none.
pub fn read_requests(file: &Path, output_len: u32) -> Result<Vec<Request>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    parse_requests(&text, output_len).with_context(|| file.display().to_string())
}

fn parse_requests(text: &str, default_output_len: u32) -> Result<Vec<Request>> {
    let mut requests: Vec<Request> = Vec::new();
    let mut first = None;
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("line {}", i + 1);
        let Line { prompt, output_len, timestamp } = serde_json::from_str(line)
            .with_context(|| format!("{}: expected {{\"prompt\": text or ids, \"output_len\": n}}", place()))?;
        let at = match timestamp {
            None => None,
            Some(t) => {
                let after = t - *first.get_or_insert(t);
                Some(Duration::try_from_secs_f64(after).ok().filter(|d| d.as_secs() < 1 << 30))
                    .map(|d| d.with_context(|| format!("{}: a timestamp before the first, or years after it", place())))
                    .transpose()?
            }
        };
        let output_len = output_len.unwrap_or(default_output_len);
        ensure!(output_len > 0, "{}: output_len must be at least 1", place());
        if let Some(last) = requests.last() {
            ensure!(last.at.is_some() == at.is_some(), "{}: timestamps are on every line or none", place());
            ensure!(last.at <= at, "{}: timestamps must not fall", place());
        }
        let prompt_len = match &prompt {
            Prompt::Ids(ids) => ids.len() as u64,
            Prompt::Text(_) => 0,
        };
        requests.push(Request { prompt, prompt_len, output_len, at });
    }
    ensure!(!requests.is_empty(), "no request in it");
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANDOM: Random = Random { input_len: 20, output_len: 8, prefix_len: 10, seed: 3 };

    #[test]
    fn random_prompts_have_their_length_share_their_prefix_and_repeat() {
        let requests = RANDOM.requests(5, Form::Ids);
        let ids = |r: &Request| match &r.prompt {
            Prompt::Ids(ids) => ids.clone(),
            Prompt::Text(text) => panic!("{text}"),
        };
        for (i, request) in requests.iter().enumerate() {
            assert_eq!((ids(request).len(), request.prompt_len), (30, 30));
            assert_eq!(ids(request)[..10], ids(&requests[0])[..10]);
            assert!(i == 0 || ids(request)[10..] != ids(&requests[0])[10..]);
        }
        assert_eq!(requests, RANDOM.requests(5, Form::Ids));
        assert_ne!(requests, Random { seed: 4, ..RANDOM }.requests(5, Form::Ids));
    }

    #[test]
    fn text_prompts_have_as_many_words_as_give_the_tokens() {
        let request = &RANDOM.requests(1, Form::Text { tokens_per_word: 2.0 })[0];
        let Prompt::Text(text) = &request.prompt else { panic!("{request:?}") };
        assert_eq!(text.split(' ').count(), 15);
    }

    #[test]
    fn a_file_gives_prompts_lengths_and_times() {
        let text =
            "{\"prompt\": \"a\", \"output_len\": 3, \"timestamp\": 5.5}\n\n{\"prompt\": [1, 2], \"timestamp\": 6}\n";
        let requests = parse_requests(text, 9).unwrap();
        assert_eq!(requests.iter().map(|r| (r.prompt_len, r.output_len)).collect::<Vec<_>>(), [(0, 3), (2, 9)]);
        assert_eq!(requests[1].at, Some(Duration::from_millis(500)));
    }

    #[test]
    fn a_file_that_cannot_be_replayed_says_which_line() {
        for (text, expected) in [
            ("", "no request"),
            ("{\"prompt\": \"a\"}\n{\"prompt\": 1}", "line 2: expected"),
            ("{\"prompt\": \"a\", \"output_len\": 0}", "line 1: output_len"),
            ("{\"prompt\": \"a\", \"timestamp\": 1}\n{\"prompt\": \"a\"}", "line 2: timestamps are on"),
            ("{\"prompt\": \"a\", \"timestamp\": 1}\n{\"prompt\": \"a\", \"timestamp\": 0}", "line 2: a timestamp"),
            ("{\"prompt\": \"a\", \"timestamp\": 0}\n{\"prompt\": \"a\", \"timestamp\": 1e300}", "line 2: a timestamp"),
        ] {
            let error = format!("{:#}", parse_requests(text, 9).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}
