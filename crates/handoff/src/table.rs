//! A report as plain text: facts, checks, and the figures of all devices beside each other.

use std::fmt::{self, Formatter};

use crate::report::{Column, Comparison, Report};
use crate::words::{count, figure, plain};
use crate::{Finding, Numerics, Verdict};

/// Details shown of one check; the JSON has all.
const MAX_DETAILS: usize = 8;

pub(crate) fn write(report: &Report, f: &mut Formatter<'_>) -> fmt::Result {
    for (name, value) in facts(report) {
        writeln!(f, "{name:<12} {}", plain(&value))?;
    }
    writeln!(f)?;
    for check in report.checks() {
        writeln!(f, "{:<14} {}", check.name, check.verdict)?;
        for detail in check.details.iter().take(MAX_DETAILS) {
            writeln!(f, "    {}", plain(detail))?;
        }
        if let Some(more) = check.details.len().checked_sub(MAX_DETAILS).filter(|&more| more > 0) {
            writeln!(f, "    and {more} more")?;
        }
    }
    if !report.devices().is_empty() {
        writeln!(f)?;
        grid(&devices(report.devices()), f)?;
    }
    if let Some(comparison) = report.comparison() {
        writeln!(f)?;
        grid(&compared(comparison), f)?;
    }
    writeln!(f, "\n{}", report.verdict())
}

/// What the bundle says of itself, as name and value.
pub(crate) fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
    if let Some(bundle) = report.bundle() {
        facts.push(("model", bundle.name.clone()));
        facts.push(("generation", bundle.generation.to_string()));
        facts.extend(bundle.license.clone().map(|license| ("license", license)));
        if !bundle.lineage.is_empty() {
            facts.push(("lineage", serde_json::Value::Object(bundle.lineage.clone()).to_string()));
        }
        let trained = &bundle.trained;
        let by = [&trained.quantization, &trained.framework, &trained.commit].into_iter().flatten().cloned();
        facts.push(("trained", std::iter::once(trained.dtype.clone()).chain(by).collect::<Vec<_>>().join(", ")));
        let computed = &bundle.computed;
        let by = [&computed.framework, &computed.device].into_iter().flatten().cloned();
        facts.push(("computed", std::iter::once(computed.dtype.clone()).chain(by).collect::<Vec<_>>().join(", ")));
        facts.push(("golden", count(bundle.cases, "case")));
    }
    facts.extend(report.signature().map(|words| ("signature", words.to_owned())));
    facts
}

/// A title and a cell for each item.
fn row<T>(title: &str, items: &[T], cell: impl Fn(&T) -> String) -> Vec<String> {
    std::iter::once(title.to_owned()).chain(items.iter().map(cell)).collect()
}

/// A row per figure, a column per device; the first row and the first cell of each are titles.
pub(crate) fn devices(columns: &[Column]) -> Vec<Vec<String>> {
    let mut rows = vec![
        row("", columns, |column| column.device.to_string()),
        row("formats", columns, |column| column.device.formats.clone()),
    ];
    for (index, finding) in columns[0].findings.iter().enumerate() {
        let of = |column: &Column| column.findings.get(index).map_or_else(String::new, cell);
        rows.push(row(&finding.measure.to_string(), columns, of));
    }
    rows.extend(counts(&columns.iter().map(|column| &column.numerics).collect::<Vec<_>>()));
    rows
}

/// The columns of a comparison.
pub(crate) fn compared(comparison: &Comparison) -> Vec<Vec<String>> {
    let Comparison { from, to, a, b, between } = comparison;
    let sides = [a, b, between];
    let mut rows = vec![
        vec![String::new(), from.clone(), to.clone(), format!("{to} against {from}")],
        row("max |Δ logprob|", &sides, |n| figure(n.max_abs_logprob_diff)),
        row("mean |Δ logprob|", &sides, |n| figure(n.mean_abs_logprob_diff)),
        row("p99 |Δ logprob| of likely", &sides, |n| figure(n.likely.p99)),
        row("KL", &sides, |n| figure(n.kl)),
        row("perplexity ratio", &sides, |n| figure(n.perplexity.ratio)),
        row("top-1 agreement", &sides, |n| n.top1.agreement().map_or_else(|| "-".into(), figure)),
    ];
    rows.extend(counts(&sides));
    rows
}

/// Figures that nothing is demanded of.
fn counts(columns: &[&Numerics]) -> [Vec<String>; 5] {
    [
        row("largest |Δ| at", columns, |n| match &n.largest {
            Some(largest) => format!("{}, position {}", largest.case, largest.position),
            None => "-".into(),
        }),
        row("top-1 positions", columns, |n| format!("{} of {}", n.top1.considered, n.positions)),
        row("greedy tokens", columns, |n| {
            let (agreed, of) = n.greedy_total();
            format!("{agreed} of {of}")
        }),
        row("perplexity", columns, |n| format!("{} for {}", figure(n.perplexity.device), figure(n.perplexity.trainer))),
        row("cases", columns, |n| format!("{} compared, {} skipped", n.cases, n.skipped.len())),
    ]
}

/// `0.123 of 0.6 pass`.
fn cell(finding: &Finding) -> String {
    let allowed = figure(finding.allowed);
    match finding.measured {
        None => Verdict::Skipped.to_string(),
        Some(measured) => format!("{} of {allowed} {}", figure(measured), finding.verdict),
    }
}

/// Aligned columns, two spaces apart.
fn grid(rows: &[Vec<String>], f: &mut Formatter<'_>) -> fmt::Result {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| plain(cell)).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}
