//! Line plots as SVG images that fetch nothing.

/// Size in pixels, and what axes and labels take on each side.
const SIZE: (f64, f64) = (520.0, 300.0);
const MARGIN: f64 = 56.0;
const COLOURS: &[&str] = &["#1f77b4", "#d62728", "#2ca02c"];

/// Lines over `x`, whose labels stand at equal distances: what is swept doubles.
pub fn svg(title: &str, x_title: &str, x: &[String], lines: &[(&str, Vec<f64>)]) -> String {
    let (width, height) = SIZE;
    let top = ceiling(lines.iter().flat_map(|(_, y)| y.iter().copied()).fold(0.0, f64::max));
    let at_x = |i: usize| MARGIN + (width - 2.0 * MARGIN) * (i as f64 + 0.5) / x.len().max(1) as f64;
    let at_y = |y: f64| height - MARGIN - (height - 2.0 * MARGIN) * y / top;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let text = |x: f64, y: f64, anchor: &str, colour: &str, text: &str| {
        let text = escaped(text);
        format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>\n")
    };
    svg += &text(width / 2.0, 20.0, "middle", "black", title);
    svg += &text(width / 2.0, height - 12.0, "middle", "black", x_title);
    for step in 0..=4 {
        let value = top * f64::from(step) / 4.0;
        let (left, right, y) = (MARGIN, width - MARGIN, at_y(value));
        svg += &format!("<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ddd\"/>\n");
        svg += &text(MARGIN - 6.0, y + 4.0, "end", "black", &format!("{value}"));
    }
    for (i, label) in x.iter().enumerate() {
        svg += &text(at_x(i), height - MARGIN + 16.0, "middle", "black", label);
    }
    for (n, (name, y)) in lines.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let points: Vec<String> =
            y.iter().enumerate().map(|(i, y)| format!("{:.1},{:.1}", at_x(i), at_y(*y))).collect();
        let points = points.join(" ");
        svg += &format!("<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n");
        for (i, y) in y.iter().enumerate() {
            let (x, y) = (at_x(i), at_y(*y));
            svg += &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>\n");
        }
        svg += &text(MARGIN + 8.0, MARGIN + 14.0 * n as f64, "start", colour, name);
    }
    svg + "</svg>\n"
}

/// The least 1, 2, 4 or 8 times a power of ten that is not below `y`: quarters of it are short numbers.
fn ceiling(y: f64) -> f64 {
    if !(y.is_finite() && y > 0.0) {
        return 1.0;
    }
    let unit = 10f64.powf(y.log10().floor());
    [1.0, 2.0, 4.0, 8.0].into_iter().map(|n| n * unit).find(|top| *top >= y).unwrap_or(10.0 * unit)
}

/// Text in HTML and SVG.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_axis_holds_its_line_and_is_not_far_above_it(y in 1e-6..1e9f64) {
            let top = ceiling(y);
            prop_assert!(top >= y * (1.0 - 1e-12) && top < 2.5 * y, "{y} {top}");
        }
    }
}
