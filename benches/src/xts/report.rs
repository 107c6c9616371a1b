//! Writes the results as a table and as a chart.

use std::fmt::Write;

use anyhow::Result;

use crate::chart::{self, Bar, Panel};

/// One line of the table, which is also one bar of the chart.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// The contestant's name.
    pub(super) name: String,
    /// The median rate of the turns, in GB/s.
    pub(super) rate: f64,
    /// The best rate of the turns, in GB/s.
    pub(super) best: f64,
    /// The rate divided by the rate of the AES rounds on registers of the same width, if that is known.
    pub(super) of_limit: Option<f64>,
    /// How many times faster this project's widest path is, or `None` in that path's own row.
    pub(super) behind: Option<f64>,
}

/// The results of one case.
#[derive(Clone, Debug)]
pub(super) struct Section {
    /// A description of the case.
    pub(super) title: String,
    /// The rate of the AES rounds on the widest registers, if there are any, in GB/s.
    pub(super) limit: Option<f64>,
    /// One row for each contestant.
    pub(super) rows: Vec<Row>,
}

/// Writes the sections as Markdown tables.
pub(super) fn table(sections: &[Section]) -> String {
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

/// Draws the sections as a bar chart in SVG, with the limit as a line.
///
/// # Errors
/// Fails if the plotting library does.
pub(super) fn chart(title: &str, sections: &[Section]) -> Result<String> {
    let panels: Vec<Panel> = sections
        .iter()
        .map(|section| Panel {
            title: section.title.clone(),
            bars: section
                .rows
                .iter()
                .map(|row| Bar { name: row.name.clone(), value: row.rate, is_ours: row.behind.is_none() })
                .collect(),
            limit: section.limit,
        })
        .collect();
    chart::svg(title, &panels, 1)
}
