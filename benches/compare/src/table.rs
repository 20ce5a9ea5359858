//! From the figures of all rounds to ratios, a CSV file, and a plot of throughput over streams.

use std::fmt::Write;

use anyhow::{Context, Result, ensure};
use baton_loadgen::{median, plot};

use crate::programs::Program;
use crate::regimes::DECODE;

/// A figure of one round.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub round: usize,
    pub program: String,
    pub regime: String,
    pub figure: String,
    pub value: f64,
}

const HEAD: &str = "round,program,regime,figure,value";

/// One line per figure; no text has quotes.
pub fn csv(rows: &[Row]) -> String {
    let mut text = format!("{HEAD}\n");
    for Row { round, program, regime, figure, value } in rows {
        let _ = writeln!(text, "{round},{program},\"{regime}\",{figure},{value}");
    }
    text
}

/// Reads what [`csv`] wrote.
pub fn parse(text: &str) -> Result<Vec<Row>> {
    let mut lines = text.lines();
    ensure!(lines.next() == Some(HEAD), "the first line is not {HEAD}");
    let row = |line: &str| -> Option<Row> {
        let (before, rest) = line.split_once(",\"")?;
        let (regime, rest) = rest.split_once("\",")?;
        let (round, program) = before.split_once(',')?;
        let (figure, value) = rest.split_once(',')?;
        Some(Row {
            round: round.parse().ok()?,
            program: program.into(),
            regime: regime.into(),
            figure: figure.into(),
            value: value.parse().ok()?,
        })
    };
    lines.map(|line| row(line).with_context(|| format!("not a line of {HEAD}: {line}"))).collect()
}

/// Regimes and figures in the order in which they came, with each program's values by round.
fn figures(rows: &[Row]) -> Vec<(&str, &str, [Vec<f64>; 2])> {
    let mut all: Vec<(&str, &str, [Vec<f64>; 2])> = Vec::new();
    for row in rows {
        let Some(program) = Program::ALL.iter().position(|p| p.name() == row.program) else { continue };
        let key = (row.regime.as_str(), row.figure.as_str());
        let at = all.iter().position(|(regime, figure, _)| (*regime, *figure) == key).unwrap_or_else(|| {
            all.push((key.0, key.1, Default::default()));
            all.len() - 1
        });
        all[at].2[program].push(row.value);
    }
    all
}

/// Both programs' medians, and the median of the rounds' ratios with the least and largest.
pub fn markdown(rows: &[Row]) -> String {
    let [ours, theirs] = Program::ALL.map(Program::name);
    let mut text = format!(
        "| regime | figure | {ours} | {theirs} | {ours} / {theirs} | least – most |\n|---|---|---|---|---|---|\n"
    );
    for (regime, figure, [ours, theirs]) in figures(rows) {
        let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a / b).collect();
        if ratios.is_empty() {
            continue;
        }
        let (least, most) = ratios.iter().fold((f64::MAX, 0.0), |(l, m): (f64, f64), &r| (l.min(r), m.max(r)));
        let [ours, theirs, ratio] = [&ours, &theirs, &ratios].map(|values| median(values));
        let _ = writeln!(
            text,
            "| {regime} | {figure} | {ours:.1} | {theirs:.1} | **{ratio:.2}** | {least:.2} – {most:.2} |"
        );
    }
    text
}

/// Decode throughput of both over the number of streams, as an SVG image.
pub fn svg(rows: &[Row]) -> Result<String> {
    let mut points: Vec<(usize, [f64; 2])> = Vec::new();
    for (regime, _, values) in figures(rows).into_iter().filter(|(_, figure, _)| *figure == DECODE) {
        let streams = regime.split_once(" stream").and_then(|(n, _)| n.parse().ok());
        if let Some(streams) = streams.filter(|_| values.iter().all(|v| !v.is_empty())) {
            points.push((streams, values.each_ref().map(|v| median(v))));
        }
    }
    ensure!(!points.is_empty(), "no {DECODE} of both programs");
    points.sort_by_key(|p| p.0);
    let x: Vec<String> = points.iter().map(|p| p.0.to_string()).collect();
    let lines = [0, 1].map(|i| (Program::ALL[i].name(), points.iter().map(|p| p.1[i]).collect::<Vec<f64>>()));
    Ok(plot::svg("Decoding (tok/s, all streams together)", "streams", &x, &lines))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Row> {
        let row = |round, program: Program, streams: usize, value| Row {
            round,
            program: program.name().into(),
            regime: format!("{streams} streams"),
            figure: DECODE.into(),
            value,
        };
        let mut rows = Vec::new();
        for (round, (ours, theirs)) in [(20.0, 10.0), (33.0, 11.0), (12.0, 12.0)].into_iter().enumerate() {
            for streams in [8, 1] {
                rows.push(row(round, Program::Baton, streams, ours));
                rows.push(row(round, Program::Peer, streams, theirs));
            }
        }
        rows
    }

    #[test]
    fn a_ratio_is_the_median_of_the_rounds_own() {
        let text = markdown(&rows());
        let line = format!("| 8 streams | {DECODE} | 20.0 | 11.0 | **2.00** | 1.00 – 3.00 |");
        assert!(text.contains(&line), "{text}");
    }

    #[test]
    fn what_is_written_is_read_back_and_plotted() {
        let read = parse(&csv(&rows())).unwrap();
        assert_eq!(read, rows());
        let image = svg(&read).unwrap();
        assert!(image.starts_with("<svg xmlns=") && image.matches("<polyline").count() == 2, "{image}");
        assert!(image.find(">1<").unwrap() < image.find(">8<").unwrap(), "{image}");
        assert!(parse("a,b\n").is_err() && parse(&format!("{HEAD}\n1,2")).is_err() && svg(&[]).is_err());
    }
}
