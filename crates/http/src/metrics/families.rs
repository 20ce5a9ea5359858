//! Metric families made at scrape time, from values that are kept elsewhere.

use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};

/// Samples of a family, each with the labels that tell it from the others.
pub(super) type Values<'a, T> = [(&'a [(&'a str, &'a str)], T)];

/// Makes families under these labels.
pub(super) struct Labelled<'a>(pub &'a [(&'static str, String)]);

impl Labelled<'_> {
    /// The labels, and more.
    pub fn with(&self, more: &[(&str, &str)]) -> Vec<LabelPair> {
        let given = self.0.iter().map(|(name, value)| (*name, value.as_str()));
        given.chain(more.iter().copied()).map(|(name, value)| label(name, value)).collect()
    }

    /// Gauges, one per set of labels.
    pub fn gauges(&self, name: &str, help: &str, values: &Values<f64>) -> MetricFamily {
        let metrics = values.iter().map(|(more, value)| gauge(self.with(more), *value)).collect();
        family(name, help, MetricType::GAUGE, metrics)
    }

    /// A gauge.
    pub fn gauge(&self, name: &str, help: &str, value: f64) -> MetricFamily {
        self.gauges(name, help, &[(&[], value)])
    }

    /// Counters, one per set of labels.
    pub fn counters(&self, name: &str, help: &str, values: &Values<u64>) -> MetricFamily {
        let metrics = values.iter().map(|(more, value)| counter(self.with(more), *value)).collect();
        family(name, help, MetricType::COUNTER, metrics)
    }

    /// A counter.
    pub fn counter(&self, name: &str, help: &str, value: u64) -> MetricFamily {
        self.counters(name, help, &[(&[], value)])
    }
}

fn label(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

/// A family of these metrics.
pub(super) fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn gauge(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::from_label(labels);
    metric.set_gauge(gauge);
    metric
}

fn counter(labels: Vec<LabelPair>, value: u64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value as f64);
    let mut metric = Metric::from_label(labels);
    metric.set_counter(counter);
    metric
}
