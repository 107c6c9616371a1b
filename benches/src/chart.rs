//! Horizontal bar charts in SVG. The panels lie one below another and have the same scale.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// The width of the chart. All of these sizes are in pixels.
const WIDTH: u32 = 860;
const TITLE: u32 = 48;
const PANEL_TITLE: u32 = 30;
const BAR: u32 = 24;
const NAMES: u32 = 190;
const VALUES: i32 = 80;

const OURS: RGBColor = RGBColor(0x2a, 0x7f, 0x62);
const OTHERS: RGBColor = RGBColor(0xb8, 0xbe, 0xc6);
const LIMIT: RGBColor = RGBColor(0xc0, 0x39, 0x2b);

/// The part of a chart that shows one case.
#[derive(Clone, Debug)]
pub struct Panel {
    /// A description of the case.
    pub title: String,
    /// A bar for each contestant, from top to bottom.
    pub bars: Vec<Bar>,
    /// A value that nothing can exceed, drawn as a line.
    pub limit: Option<f64>,
}

/// One bar: a contestant's figure.
#[derive(Clone, Debug)]
pub struct Bar {
    /// The contestant.
    pub name: String,
    /// The figure, at least 0.
    pub value: f64,
    /// Whether the contestant is this project's own, which has its own colour.
    pub is_ours: bool,
}

/// Draws the panels as one SVG document. Values have `decimals` digits after the point.
///
/// # Errors
/// Fails if the plotting library does.
pub fn svg(title: &str, panels: &[Panel], decimals: usize) -> Result<String> {
    let height_of = |panel: &Panel| PANEL_TITLE + BAR * u32::try_from(panel.bars.len()).unwrap_or(0) + 14;
    let height = TITLE + panels.iter().map(height_of).sum::<u32>();
    let values = panels.iter().flat_map(|panel| panel.bars.iter().map(|bar| bar.value).chain(panel.limit));
    let most = values.filter(|value| value.is_finite()).fold(1e-9, f64::max);
    let mut document = String::new();
    draw(&mut document, title, panels, decimals, height, most, height_of)
        .map_err(|error| anyhow!("cannot draw the chart: {error}"))?;
    Ok(document)
}

fn draw(
    document: &mut String,
    title: &str,
    panels: &[Panel],
    decimals: usize,
    height: u32,
    most: f64,
    height_of: impl Fn(&Panel) -> u32,
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(document, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    area.draw(&Text::new(title.to_owned(), (20, 14), ("sans-serif", 17)))?;
    let (_, mut rest) = area.split_vertically(TITLE);
    for panel in panels {
        let (drawn, below) = rest.split_vertically(height_of(panel));
        rest = below;
        let count = panel.bars.len();
        let mut chart = ChartBuilder::on(&drawn)
            .caption(&panel.title, ("sans-serif", 14))
            .set_label_area_size(LabelAreaPosition::Left, NAMES)
            .margin_right(VALUES)
            .margin_bottom(6)
            .build_cartesian_2d(0.0..most, (0..count).into_segmented())?;
        // Rows count from the bottom, but the first bar stands at the top.
        let name = |row: &SegmentValue<usize>| match row {
            SegmentValue::CenterOf(row) => {
                count.checked_sub(row + 1).and_then(|at| panel.bars.get(at)).map(|bar| bar.name.clone())
            }
            _ => None,
        };
        chart
            .configure_mesh()
            .disable_mesh()
            .disable_x_axis()
            .y_labels(count)
            .y_label_formatter(&|row| name(row).unwrap_or_default())
            .label_style(("sans-serif", 13))
            .draw()?;
        chart.draw_series(panel.bars.iter().enumerate().map(|(at, bar)| {
            let row = count - 1 - at;
            let color = if bar.is_ours { OURS } else { OTHERS };
            let corners = [(0.0, SegmentValue::Exact(row)), (bar.value, SegmentValue::Exact(row + 1))];
            let mut rectangle = Rectangle::new(corners, color.filled());
            rectangle.set_margin(3, 3, 0, 0);
            rectangle
        }))?;
        chart.draw_series(panel.bars.iter().enumerate().map(|(at, bar)| {
            let label = Text::new(format!("{:.decimals$}", bar.value), (6, -7), ("sans-serif", 13));
            EmptyElement::at((bar.value, SegmentValue::CenterOf(count - 1 - at))) + label
        }))?;
        if let Some(limit) = panel.limit {
            let ends = [(limit, SegmentValue::Exact(0)), (limit, SegmentValue::Exact(count))];
            // plotters' dashed lines call hypotf, whose newest version needs glibc 2.35.
            chart.draw_series([PathElement::new(ends, LIMIT)])?;
        }
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_has_every_name_and_value() {
        let bar = |name: &str, value| Bar { name: name.to_owned(), value, is_ours: name == "ours" };
        let panel = |title: &str| Panel {
            title: title.to_owned(),
            bars: vec![bar("ours", 30.25), bar("a < b", 10.5)],
            limit: Some(38.0),
        };
        let svg = svg("GB/s", &[panel("encrypt"), panel("decrypt")], 1).unwrap();
        assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for text in ["GB/s", "encrypt", "decrypt", "ours", "a &lt; b", "30.2", "10.5"] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
    }
}
