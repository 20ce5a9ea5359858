//! The plots of a report, as SVG images that fetch nothing.

use std::error::Error;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::Column;
use crate::words::plain;

const SIZE: (u32, u32) = (640, 320);
const COLOURS: [RGBColor; 4] =
    [RGBColor(0x1f, 0x77, 0xb4), RGBColor(0xd6, 0x27, 0x28), RGBColor(0x2c, 0xa0, 0x2c), RGBColor(0x94, 0x67, 0xbd)];

/// Powers of ten between which differences are drawn; what is beyond is drawn at the edge.
const EXPONENTS: (f64, f64) = (-8.0, 2.0);

/// Cases that have a bar.
const MAX_BARS: usize = 64;
/// Characters of a name beside its bar.
const MAX_NAME: usize = 24;

/// Sizes of text: 1.24 to a pixel.
const CAPTION: u32 = 18;
const LABEL: (&str, u32) = ("sans-serif", 15);

type Drawn = Result<(), Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// |Δ logprob| by position, the largest as a line, the mean as a thin one.
pub(crate) fn by_position(columns: &[Column]) -> String {
    svg(SIZE, |area| {
        let positions = columns.iter().flat_map(|column| &column.numerics.by_position);
        let last = positions.map(|at| at.position).max().unwrap_or_default();
        let mut chart = ChartBuilder::on(area)
            .caption("|Δ logprob| by position: largest (thick) and mean (thin)", CAPTION)
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..f64::from(last.max(1)), EXPONENTS.0..EXPONENTS.1)?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc("position").x_label_formatter(&|x| format!("{x:.0}")).y_label_formatter(&|y| format!("1e{y:.0}"));
        mesh.light_line_style(TRANSPARENT).label_style(LABEL).draw()?;
        for (index, column) in columns.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let at = |value: fn(&crate::ByPosition) -> f64| {
                let points = column.numerics.by_position.iter();
                points.map(move |at| (f64::from(at.position), exponent(value(at)))).collect::<Vec<_>>()
            };
            chart.draw_series(LineSeries::new(at(|at| at.mean), colour.mix(0.6).stroke_width(1)))?;
            chart
                .draw_series(LineSeries::new(at(|at| at.max), colour.stroke_width(2)))?
                .label(plain(&column.device.to_string()))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        }
        let mut legend = chart.configure_series_labels();
        legend.position(SeriesLabelPosition::UpperRight).label_font(LABEL);
        legend.background_style(WHITE.mix(0.8)).border_style(TRANSPARENT).draw()?;
        Ok(())
    })
}

/// How many log-probabilities differ by how much.
pub(crate) fn histogram(columns: &[Column]) -> String {
    svg(SIZE, |area| {
        let buckets = columns.iter().flat_map(|column| &column.numerics.histogram);
        let most = buckets.map(|bucket| bucket.count).max().unwrap_or_default().max(1);
        let first = columns.iter().flat_map(|column| column.numerics.histogram.first()).map(|b| b.exponent).min();
        let last = columns.iter().flat_map(|column| column.numerics.histogram.last()).map(|b| b.exponent).max();
        let (first, last) = (f64::from(first.unwrap_or(-1)), f64::from(last.unwrap_or(0) + 1));
        let mut chart = ChartBuilder::on(area)
            .caption("Log-probabilities by |Δ logprob|", CAPTION)
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(56)
            .build_cartesian_2d(first..last, 0.0..most as f64 * 1.05)?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc("|Δ logprob| in nats; the first bar has all smaller ones").disable_x_mesh();
        mesh.x_label_formatter(&|x| format!("1e{x:.0}")).y_label_formatter(&|y| format!("{y:.0}"));
        mesh.light_line_style(TRANSPARENT).label_style(LABEL).draw()?;
        let width = 0.9 / columns.len().max(1) as f64;
        for (index, column) in columns.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let bars = column.numerics.histogram.iter().map(|bucket| {
                let left = f64::from(bucket.exponent) + 0.05 + width * index as f64;
                Rectangle::new([(left, 0.0), (left + width, bucket.count as f64)], colour.filled())
            });
            let series = chart.draw_series(bars)?;
            series
                .label(plain(&column.device.to_string()))
                .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 16, y + 4)], colour.filled()));
        }
        let mut legend = chart.configure_series_labels();
        legend.position(SeriesLabelPosition::UpperRight).label_font(LABEL);
        legend.background_style(WHITE.mix(0.8)).border_style(TRANSPARENT).draw()?;
        Ok(())
    })
}

/// The part of each greedy answer that a device gives before it first differs.
pub(crate) fn greedy(columns: &[Column]) -> String {
    let cases: Vec<&str> =
        columns.first().into_iter().flat_map(|column| &column.numerics.greedy).map(|g| &*g.case).collect();
    let (shown, more) = (cases.len().min(MAX_BARS), cases.len().saturating_sub(MAX_BARS));
    let height = 72 + 16 * shown.max(1) as u32;
    svg((SIZE.0, height), |area| {
        let title = match more {
            0 => "Greedy tokens before the first that differs".to_owned(),
            more => format!("Greedy tokens before the first that differs ({more} cases not shown)"),
        };
        let mut chart = ChartBuilder::on(area)
            .caption(title, CAPTION)
            .margin(8)
            .margin_right(24)
            .x_label_area_size(24)
            .y_label_area_size(176)
            .build_cartesian_2d(0.0..1.0, shown.max(1) as f64..0.0)?;
        let mut mesh = chart.configure_mesh();
        mesh.disable_y_mesh().y_labels(0).x_label_formatter(&|x| format!("{:.0} %", 100.0 * x));
        mesh.light_line_style(TRANSPARENT).label_style(LABEL).draw()?;
        let right = Pos::new(HPos::Right, VPos::Center);
        for (row, case) in cases.iter().take(shown).enumerate() {
            let (x, y) = chart.backend_coord(&(0.0, row as f64 + 0.5));
            let style = LABEL.into_text_style(area).pos(right);
            area.draw_text(&shortened(case), &style, (x - 8, y))?;
        }
        let width = 0.8 / columns.len() as f64;
        for (index, column) in columns.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let bars = cases.iter().take(shown).enumerate().filter_map(|(row, case)| {
                let greedy = column.numerics.greedy.iter().find(|greedy| greedy.case == *case)?;
                let part = if greedy.of == 0 { 1.0 } else { greedy.agreed as f64 / greedy.of as f64 };
                let top = row as f64 + 0.1 + width * index as f64;
                Some(Rectangle::new([(0.0, top), (part, top + width)], colour.filled()))
            });
            chart.draw_series(bars)?;
        }
        Ok(())
    })
}

fn shortened(name: &str) -> String {
    let name = plain(name);
    if name.chars().count() <= MAX_NAME { name } else { name.chars().take(MAX_NAME - 1).chain(['…']).collect() }
}

fn exponent(difference: f64) -> f64 {
    difference.log10().clamp(EXPONENTS.0, EXPONENTS.1) // of zero: the least there is
}

/// An image, or, if it cannot be drawn, nothing.
fn svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> String {
    let mut image = String::new();
    let area = SVGBackend::with_string(&mut image, size).into_drawing_area();
    let drawn = area.fill(&WHITE).map_err(Into::into).and_then(|()| draw(&area)).and_then(|()| Ok(area.present()?));
    drop(area);
    if drawn.is_err() {
        image.clear();
    }
    image
}
