//! A report as one page that fetches nothing and runs nothing.
//!
//! Invariant: all text goes through [`escaped`]: names, licences and lineage are whatever a bundle says.

use crate::report::Report;
use crate::words::plain;
use crate::{Verdict, plots, table};

const HEAD: &str = "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n";

const STYLE: &str = "<style>\n\
body { font-family: sans-serif; max-width: 64em; margin: 2em auto; padding: 0 1em; color: #222; }\n\
table { border-collapse: collapse; margin: 1em 0; }\n\
th, td { text-align: left; vertical-align: top; padding: 0.25em 1em 0.25em 0; border-bottom: 1px solid #ddd; \
overflow-wrap: anywhere; }\n\
ul { margin: 0; padding-left: 1.2em; }\n\
.pass { color: #2ca02c; } .fail { color: #d62728; font-weight: bold; } .none { color: #777; }\n\
</style>\n";

/// The page.
pub fn html(report: &Report) -> String {
    let name = report.bundle().map_or_else(|| "hand-off".to_owned(), |bundle| escaped(&bundle.name));
    let mut page = String::from(HEAD);
    page += &format!("<title>{name}: {}</title>\n{STYLE}</head>\n<body>\n", escaped(&report.verdict().to_string()));
    page += &format!("<h1>{name}: {}</h1>\n", verdict(report.verdict()));

    let facts = table::facts(report);
    let facts: Vec<Vec<String>> = facts.iter().map(|(name, value)| vec![escaped(name), escaped(value)]).collect();
    page += &rows(&facts);

    page += "<h2>Checks</h2>\n";
    let check =
        |check: &crate::Check| vec![escaped(&check.name.to_string()), verdict(check.verdict), list(&check.details)];
    page += &rows(&report.checks().iter().map(check).collect::<Vec<_>>());

    let columns = report.devices();
    if !columns.is_empty() {
        page += &format!("<h2>Numerics</h2>\n{}", grid(&table::devices(columns)));
        page += &plots::by_position(columns);
        page += &plots::histogram(columns);
        page += &plots::greedy(columns);
    }
    if let Some(comparison) = report.comparison() {
        page += &format!("<h2>Comparison</h2>\n{}", grid(&table::compared(comparison)));
    }
    page + "</body>\n</html>\n"
}

/// A table of cells whose text is escaped here.
fn grid(cells: &[Vec<String>]) -> String {
    rows(&cells.iter().map(|row| row.iter().map(|cell| escaped(cell)).collect()).collect::<Vec<_>>())
}

/// A table of cells that are HTML; the first of a row is its title.
fn rows(rows: &[Vec<String>]) -> String {
    let mut table = String::from("<table>\n");
    for row in rows {
        table += "<tr>";
        for (index, cell) in row.iter().enumerate() {
            let tag = if index == 0 { "th" } else { "td" };
            table += &format!("<{tag}>{cell}</{tag}>");
        }
        table += "</tr>\n";
    }
    table + "</table>\n"
}

fn list(details: &[String]) -> String {
    let items: String = details.iter().map(|detail| format!("<li>{}</li>", escaped(detail))).collect();
    if items.is_empty() { items } else { format!("<ul>{items}</ul>") }
}

fn verdict(verdict: Verdict) -> String {
    let class = match verdict {
        Verdict::Pass => "pass",
        Verdict::Fail => "fail",
        Verdict::Skipped | Verdict::NotRun => "none",
    };
    format!("<span class=\"{class}\">{verdict}</span>")
}

/// Text in HTML.
fn escaped(text: &str) -> String {
    let escape = |c: char| match c {
        '&' => "&amp;".to_owned(),
        '<' => "&lt;".to_owned(),
        '>' => "&gt;".to_owned(),
        '"' => "&quot;".to_owned(),
        '\'' => "&#39;".to_owned(),
        _ => c.to_string(),
    };
    plain(text).chars().map(escape).collect()
}
