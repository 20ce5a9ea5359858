//! Metrics of an encoder, as it counts them.

use prometheus::proto::MetricFamily;

use crate::encoder::{Encoder, EncoderStats};
use crate::metrics::families::Labelled;
use crate::metrics::labels;

/// The encoder's metrics, with the labels that a generation's would have.
pub(super) fn families(encoder: &Encoder) -> Vec<MetricFamily> {
    let labels = labels(&encoder.card.names[0], encoder.card.label());
    let labels = Labelled(&labels);
    let EncoderStats { requests, waiting_tokens, inputs, tokens, batches, failed, alive } = encoder.engine.stats();
    vec![
        labels.gauge("vllm:num_requests_waiting", "Requests without a result yet.", requests as f64),
        labels.counter("vllm:prompt_tokens_total", "Prompt tokens computed.", tokens),
        labels.gauge("baton_engine_alive", "1 while requests are taken up.", f64::from(u8::from(alive))),
        labels.gauge("baton_encoder_waiting_tokens", "Tokens of inputs that wait.", waiting_tokens as f64),
        labels.counter("baton_encoder_inputs_total", "Texts and pairs computed.", inputs),
        labels.counter("baton_encoder_batches_total", "Batches that they were computed in.", batches),
        labels.counter("baton_encoder_failed_requests_total", "Requests that failed in the computation.", failed),
    ]
}
