//! A comparison as bar charts in SVG, one for large requests and one for small.

use std::fmt::Write;

use super::compare::{Comparison, Section};
use super::contestant::Contestant;
use super::device::Client;
use super::sample::Sample;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 90.0;
const BAR: f64 = 22.0;

/// Each chart's file name and content.
pub(super) fn all(comparison: &Comparison) -> Vec<(String, String)> {
    let of =
        |small: bool| comparison.sections.iter().filter(move |section| (section.workload.block < 1 << 20) == small);
    vec![
        ("large.svg".to_owned(), chart("Large requests, MB/s", of(false), |sample| sample.mb_per_s)),
        ("small.svg".to_owned(), chart("Small requests, thousand a second", of(true), |sample| sample.iops / 1e3)),
    ]
}

/// One panel a section, one below the other, all to one scale.
fn chart<'a>(
    title: &str,
    sections: impl Iterator<Item = &'a Section> + Clone,
    figure: impl Fn(&Sample) -> f64,
) -> String {
    let figures = sections.clone().flat_map(|section| section.results.iter().map(|turns| figure(&turns.median)));
    let most = figures.fold(1e-9, f64::max);
    let mut body = String::new();
    let mut y = 56.0;
    for section in sections {
        let client = if section.client == Client::Lean { " (lean client)" } else { "" };
        let _ = writeln!(
            body,
            r#"<text x="20" y="{:.0}" class="head">{}{client}</text>"#,
            y + 16.0,
            section.workload.name()
        );
        y += 26.0;
        for turns in &section.results {
            let value = figure(&turns.median);
            let class = if turns.contestant == Contestant::Nbdcrypt { "ours" } else { "other" };
            let width = value / most * (WIDTH - LEFT - RIGHT);
            let base = y + BAR * 0.68;
            let _ = writeln!(
                body,
                r#"<text x="{:.0}" y="{base:.0}" text-anchor="end">{}</text><rect x="{LEFT}" y="{y:.0}" width="{width:.1}" height="{:.0}" class="{class}"/><text x="{:.1}" y="{base:.0}">{value:.0}</text>"#,
                LEFT - 8.0,
                turns.contestant.name(),
                BAR - 6.0,
                LEFT + width + 6.0,
            );
            y += BAR;
        }
        y += 16.0;
    }
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0} {y:.0}" font-family="sans-serif" font-size="13">
<style>text{{fill:#222}}.title{{font-size:17px;font-weight:bold}}.head{{font-weight:bold}}.ours{{fill:#2a7f62}}.other{{fill:#b8bec6}}</style>
<rect width="100%" height="100%" fill="white"/>
<text x="20" y="32" class="title">{title}</text>
{body}</svg>
"#
    )
}
