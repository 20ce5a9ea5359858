//! The report as `vllm bench serve` prints it.

use std::fmt;

use crate::Report;

const WIDTH: usize = 50;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:=^WIDTH$}", " Serving Benchmark Result ")?;
        let mut row = |name: &str, value: &dyn fmt::Display| writeln!(f, "{name:<40} {value:<10}");
        row("Successful requests:", &self.completed)?;
        row("Failed requests:", &self.errors.len())?;
        for (kind, count) in &self.error_kinds {
            row(&format!("  {kind}:"), count)?;
        }
        if self.unfinished > 0 {
            row("Stopped before they ended:", &self.unfinished)?;
        }
        if let Some(n) = self.max_concurrency {
            row("Maximum request concurrency:", &n)?;
        }
        row("Benchmark duration (s):", &rounded(self.duration.as_secs_f64()))?;
        row("Total input tokens:", &self.total_input_tokens)?;
        row("Total generated tokens:", &self.total_output_tokens)?;
        row("Tokens counted by:", &self.tokens_from())?;
        row("Request throughput (req/s):", &rounded(self.request_throughput))?;
        if let Some(goodput) = self.request_goodput {
            row("Request goodput (req/s):", &rounded(goodput))?;
        }
        row("Output token throughput (tok/s):", &rounded(self.output_throughput))?;
        row("Peak output token throughput (tok/s):", &rounded(self.max_output_tokens_per_s as f64))?;
        row("Peak concurrent requests:", &self.max_concurrent_requests)?;
        row("Total token throughput (tok/s):", &rounded(self.total_token_throughput))?;
        for (_, name, title, quantiles) in self.latencies() {
            writeln!(f, "{title:-^WIDTH$}")?;
            for (figure, ms) in quantiles.named().iter().filter(|(figure, _)| *figure != "std") {
                let figure = figure[..1].to_uppercase() + &figure[1..];
                writeln!(f, "{:<40} {:<10}", format!("{figure} {name} (ms):"), rounded(*ms))?;
            }
        }
        write!(f, "{:=^WIDTH$}", "")
    }
}

fn rounded(value: f64) -> String {
    format!("{value:.2}")
}
