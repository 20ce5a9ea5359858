//! Metrics that the engine counts, as of its last step.

use std::time::{SystemTime, UNIX_EPOCH};

use baton_engine::{BlockStats, EngineStats, RunSpec, StepTokens};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};

use crate::adapters::AdapterGauges;
use crate::metrics::families::{Labelled, Values, family};

/// The engine's metrics under these labels, and those of adapters if there can be any.
pub(super) fn families(
    labels: &Labelled,
    stats: &EngineStats,
    spec: &RunSpec,
    adapters: Option<AdapterGauges>,
) -> Vec<MetricFamily> {
    let gauge = |name: &str, help: &str, value: f64| labels.gauge(name, help, value);
    let gauges = |name: &str, help: &str, values: &Values<f64>| labels.gauges(name, help, values);
    let counter = |name: &str, help: &str, value: u64| labels.counter(name, help, value);
    let counters = |name: &str, help: &str, values: &Values<u64>| labels.counters(name, help, values);
    let (waiting, blocks) = (stats.waiting as f64, &stats.blocks);
    let (block_size, num_blocks) = (spec.block_size.to_string(), spec.num_blocks.to_string());
    let cache = [("block_size", block_size.as_str()), ("num_gpu_blocks", num_blocks.as_str())];
    let states = |name: &str, help: &str, blocks: &BlockStats| {
        let of = |state| [("state", state)];
        let [used, cached, free] = ["used", "cached", "free"].map(of);
        gauges(name, help, &[(&used, blocks.used as f64), (&cached, blocks.cached as f64), (&free, blocks.free as f64)])
    };
    let device = &stats.device_failures;
    let step_seconds = stats.step_under_way.unwrap_or_default().as_secs_f64();
    let mut families = vec![
        gauge("vllm:num_requests_running", "Sequences in the batch.", stats.running as f64),
        gauge("vllm:num_requests_waiting", "Sequences that wait.", waiting),
        gauges(
            "vllm:num_requests_waiting_by_reason",
            "Sequences that wait, by reason.",
            &[(&[("reason", "capacity")], waiting), (&[("reason", "deferred")], 0.0)],
        ),
        gauge("vllm:kv_cache_usage_perc", "Part of the cache held by running sequences, 1 is all.", blocks.usage()),
        counter("vllm:num_preemptions_total", "Sequences that lost their cache blocks.", stats.preemptions),
        counter("vllm:prompt_tokens_total", "Prompt tokens computed.", stats.prompt_tokens_computed),
        counter("vllm:generation_tokens_total", "Tokens generated.", stats.generated_tokens),
        counter("vllm:prompt_tokens_cached_total", "Prompt tokens served from the cache.", stats.prefix_hit_tokens),
        counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up.", stats.prefix_query_tokens),
        counter("vllm:prefix_cache_hits_total", "Prompt tokens found.", stats.prefix_hit_tokens),
        family(
            "vllm:iteration_tokens_total",
            "Tokens computed per step.",
            MetricType::HISTOGRAM,
            vec![step_tokens(labels.with(&[]), &stats.step_tokens)],
        ),
        counter("baton_steps_ahead_total", "Steps begun before the one before them had ended.", stats.steps_ahead),
        gauges("vllm:cache_config_info", "Settings of the cache, as labels.", &[(&cache, 1.0)]),
        gauge("baton_engine_alive", "1 while the engine takes steps.", f64::from(u8::from(stats.alive))),
        gauge(
            "baton_engine_rebuilding",
            "1 while the model is loaded again after its device failed.",
            f64::from(u8::from(stats.rebuilding)),
        ),
        gauge("baton_step_under_way_seconds", "How long the step under way has been running.", step_seconds),
        states("baton_kv_blocks", "Cache blocks, by state.", blocks),
        counter("baton_dropped_events_total", "Events whose client had left.", stats.dropped_events),
        gauge(
            "baton_background_requests",
            "Replays of golden cases that wait for idle steps.",
            stats.background as f64,
        ),
        counter(
            "baton_non_finite_logits_total",
            "Sequences that ended because the model computed NaN or infinity.",
            stats.finished.non_finite_logits,
        ),
        counter("baton_failed_steps_total", "Steps that failed as a whole.", stats.failed_steps),
        counters(
            "baton_device_failures_total",
            "Failures of the device, by what could be asked of it from then on.",
            &[
                (&[("class", "failed")], device.failed),
                (&[("class", "out_of_memory")], device.out_of_memory),
                (&[("class", "poisoned")], device.poisoned),
                (&[("class", "lost")], device.lost),
                (&[("class", "hung")], device.hung),
            ],
        ),
        counter("baton_rebuilds_total", "Times the model was loaded again after its device failed.", stats.rebuilds),
    ];
    if let Some(blocks) = &stats.passing_blocks {
        let help = "Blocks for the last tokens of sequences, by state.";
        families.push(states("baton_passing_blocks", help, blocks));
    }
    if let Some(drafts) = &stats.speculation {
        let positions: Vec<String> = (0..drafts.accepted_by_position.len()).map(|i| i.to_string()).collect();
        let labelled: Vec<[(&str, &str); 1]> =
            positions.iter().map(|position| [("position", position.as_str())]).collect();
        let by_position: Vec<(&[(&str, &str)], u64)> = labelled
            .iter()
            .zip(&drafts.accepted_by_position)
            .map(|(label, &count)| (label.as_slice(), count))
            .collect();
        families.extend([
            counter("vllm:spec_decode_num_drafts_total", "Drafts computed, of one or more tokens.", drafts.drafts),
            counter("vllm:spec_decode_num_draft_tokens_total", "Tokens of drafts.", drafts.draft_tokens),
            counter(
                "vllm:spec_decode_num_accepted_tokens_total",
                "Tokens of drafts that became output.",
                drafts.accepted_tokens,
            ),
            counters(
                "vllm:spec_decode_num_accepted_tokens_per_pos_total",
                "Tokens of drafts that became output, by place in the draft.",
                &by_position,
            ),
        ]);
    }
    if let Some(AdapterGauges { max, loaded, running, waiting }) = adapters {
        let max = max.to_string();
        let info = [
            ("max_lora", max.as_str()),
            ("running_lora_adapters", running.as_str()),
            ("waiting_lora_adapters", waiting.as_str()),
        ];
        // As in vLLM, the value is the time; readers take the newest.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        families.push(gauges("vllm:lora_requests_info", "Adapters in use, as labels.", &[(&info, now)]));
        families.push(gauge("baton_lora_adapters", "Adapters that are served.", loaded as f64));
    }
    families
}

fn step_tokens(labels: Vec<LabelPair>, steps: &StepTokens) -> Metric {
    let mut cumulative = 0;
    // The last bucket is the one without bound, which the exposition adds itself.
    let finite = steps.buckets.iter().take(steps.buckets.len() - 1).enumerate();
    let buckets = finite.map(|(exponent, count)| {
        cumulative += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(f64::from(1_u32 << exponent));
        bucket.set_cumulative_count(cumulative);
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_sum(steps.sum as f64);
    histogram.set_sample_count(steps.count);
    let mut metric = Metric::from_label(labels);
    metric.set_histogram(histogram);
    metric
}
