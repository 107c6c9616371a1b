//! The result as a table and as a chart.

use std::fmt::Write;

/// A line of the table, and a bar of the chart.
#[derive(Clone, Debug)]
pub struct Row {
    /// Who.
    pub name: String,
    /// GB/s, the median of the turns.
    pub rate: f64,
    /// GB/s, the best of the turns.
    pub best: f64,
    /// The rate over that of the AES rounds on registers of the same width, where that is known.
    pub of_limit: Option<f64>,
    /// How many times faster this project's widest path is; none in its own row.
    pub behind: Option<f64>,
}

/// What one case gave.
#[derive(Clone, Debug)]
pub struct Section {
    /// The case, in words.
    pub title: String,
    /// The rate of the AES rounds on the widest registers, if there are any, in GB/s.
    pub limit: Option<f64>,
    /// Everyone.
    pub rows: Vec<Row>,
}

/// The sections as Markdown tables.
pub fn table(sections: &[Section]) -> String {
    let mut out = String::new();
    for section in sections {
        let limit =
            section.limit.map(|limit| format!("; AES rounds on registers: {limit:.2} GB/s")).unwrap_or_default();
        let _ = writeln!(out, "### {}{limit}\n", section.title);
        let _ = writeln!(out, "| | GB/s | best | of its limit | nbdcrypt is faster by |\n|---|--:|--:|--:|--:|");
        for row in &section.rows {
            let of_limit = row.of_limit.map(|ratio| format!("{ratio:.3}")).unwrap_or_default();
            let behind = row.behind.map(|ratio| format!("{ratio:.2} x")).unwrap_or_default();
            let _ = writeln!(out, "| {} | {:.2} | {:.2} | {of_limit} | {behind} |", row.name, row.rate, row.best);
        }
        out.push('\n');
    }
    out
}

/// The sections as a bar chart in SVG, one panel below the other, to one scale, the limit as a dashed line.
pub fn chart(title: &str, sections: &[Section]) -> String {
    const WIDTH: f64 = 860.0;
    const LEFT: f64 = 190.0;
    const RIGHT: f64 = 80.0;
    const BAR: f64 = 22.0;
    const HEAD: f64 = 46.0;
    let most = sections
        .iter()
        .flat_map(|section| section.rows.iter().map(|row| row.rate).chain(section.limit))
        .fold(1e-9, f64::max);
    let x = |rate: f64| LEFT + rate / most * (WIDTH - LEFT - RIGHT);

    let mut body = String::new();
    let mut y = 60.0;
    for section in sections {
        let _ = writeln!(body, r#"<text x="20" y="{:.0}" class="head">{}</text>"#, y + 20.0, escaped(&section.title));
        let top = y + HEAD - 8.0;
        y += HEAD;
        for row in &section.rows {
            let class = if row.behind.is_none() { "ours" } else { "other" };
            let _ = writeln!(
                body,
                r#"<text x="{:.0}" y="{:.0}" text-anchor="end">{}</text><rect x="{LEFT}" y="{:.0}" width="{:.1}" height="{:.0}" class="{class}"/><text x="{:.1}" y="{:.0}">{:.1}</text>"#,
                LEFT - 8.0,
                y + BAR * 0.68,
                escaped(&row.name),
                y,
                x(row.rate) - LEFT,
                BAR - 6.0,
                x(row.rate) + 6.0,
                y + BAR * 0.68,
                row.rate,
            );
            y += BAR;
        }
        if let Some(limit) = section.limit {
            let _ = writeln!(
                body,
                r#"<line x1="{0:.1}" x2="{0:.1}" y1="{top:.0}" y2="{y:.0}" class="limit"/><text x="{0:.1}" y="{1:.0}" text-anchor="middle" class="small">AES issue limit {limit:.1}</text>"#,
                x(limit),
                top - 4.0,
            );
        }
        y += 18.0;
    }
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0} {y:.0}" font-family="sans-serif" font-size="13">
<style>text{{fill:#222}}.title{{font-size:17px;font-weight:bold}}.head{{font-weight:bold}}.small{{font-size:11px}}.ours{{fill:#2a7f62}}.other{{fill:#b8bec6}}.limit{{stroke:#c0392b;stroke-dasharray:5 4}}</style>
<rect width="100%" height="100%" fill="white"/>
<text x="20" y="32" class="title">{}</text>
{body}</svg>
"#,
        escaped(title)
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
