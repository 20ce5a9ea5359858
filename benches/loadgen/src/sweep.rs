//! Runs at several concurrencies side by side: a CSV, and one HTML page with plots that fetches nothing.

use serde_json::Value;

use crate::{
    Report,
    plot::{self, escaped},
};

/// One line per report, columns named as in its JSON, those that are no number or text left out.
pub fn csv(reports: &[Report]) -> String {
    let rows: Vec<_> = reports.iter().map(Report::json).collect();
    let Some(first) = rows.first() else { return String::new() };
    let columns: Vec<&String> = first.iter().filter(|(_, v)| !v.is_object()).map(|(name, _)| name).collect();
    let mut text = columns.iter().map(|c| c.as_str()).collect::<Vec<_>>().join(",") + "\n";
    for row in &rows {
        let cells: Vec<String> = columns.iter().map(|c| row.get(*c).map_or(String::new(), cell)).collect();
        text += &(cells.join(",") + "\n");
    }
    text
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
        other => other.to_string(),
    }
}

/// A page of plots against concurrency, and the figures as a table. `title` is what was measured.
pub fn html(title: &str, reports: &[Report]) -> String {
    let x: Vec<String> = reports.iter().map(|r| r.max_concurrency.map_or("-".into(), |n| n.to_string())).collect();
    let y = |of: fn(&Report) -> f64| reports.iter().map(of).collect::<Vec<f64>>();
    let plot = |title, x: &[String], lines: &[(&str, Vec<f64>)]| plot::svg(title, "concurrency", x, lines);
    let plots = [
        plot(
            "Token throughput (tok/s)",
            &x,
            &[("output", y(|r| r.output_throughput)), ("total", y(|r| r.total_token_throughput))],
        ),
        plot("Request throughput (req/s)", &x, &[("requests", y(|r| r.request_throughput))]),
        plot("Time to first token (ms)", &x, &[("median", y(|r| r.ttft.median_ms)), ("p99", y(|r| r.ttft.p99_ms))]),
        plot("Inter-token latency (ms)", &x, &[("median", y(|r| r.itl.median_ms)), ("p99", y(|r| r.itl.p99_ms))]),
        plot("Time per output token (ms)", &x, &[("median", y(|r| r.tpot.median_ms)), ("p99", y(|r| r.tpot.p99_ms))]),
        plot("End-to-end latency (ms)", &x, &[("median", y(|r| r.e2el.median_ms)), ("p99", y(|r| r.e2el.p99_ms))]),
    ];
    let title = escaped(title);
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\n\
         <style>body{{font:14px sans-serif;margin:2em}}svg{{margin:.5em}}td,th{{padding:.2em .8em;text-align:right}}\
         </style>\n<h1>{title}</h1>\n{}{}</html>\n",
        plots.concat(),
        table(reports)
    )
}

fn table(reports: &[Report]) -> String {
    let mut text = String::from(
        "<table><tr><th>concurrency<th>completed<th>failed<th>req/s<th>output tok/s<th>total tok/s\
         <th>mean TTFT ms<th>p99 TTFT ms<th>mean TPOT ms<th>p99 ITL ms<th>mean E2EL ms\n",
    );
    for r in reports {
        let concurrency = r.max_concurrency.map_or("-".into(), |n| n.to_string());
        text += &format!("<tr><td>{concurrency}<td>{}<td>{}", r.completed, r.errors.len());
        let figures = [r.request_throughput, r.output_throughput, r.total_token_throughput, r.ttft.mean_ms];
        for figure in figures.into_iter().chain([r.ttft.p99_ms, r.tpot.mean_ms, r.itl.p99_ms, r.e2el.mean_ms]) {
            text += &format!("<td>{figure:.2}");
        }
        text.push('\n');
    }
    text + "</table>\n"
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Objectives, Run};

    fn report(concurrency: usize) -> Report {
        let run = Run { calls: Vec::new(), unfinished: 0, duration: Duration::from_secs(1) };
        Report::new(run, Some(concurrency), Objectives::default())
    }

    #[test]
    fn a_csv_has_a_line_per_report_and_as_many_cells_as_columns() {
        let text = csv(&[report(1), report(4)]);
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split(',').collect()).collect();
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|l| l.len() == lines[0].len()), "{text}");
        assert_eq!((lines[0][0], lines[1][0], lines[2][0]), ("max_concurrency", "1", "4"));
    }

    #[test]
    fn a_page_escapes_what_it_is_told_and_survives_empty_runs() {
        let page = html("<script>", &[report(1)]);
        assert!(!page.contains("<script>") && page.contains("&lt;script&gt;"));
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
        assert_eq!(page.matches("<svg").count(), 6);
    }
}
