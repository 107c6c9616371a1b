//! Draws a comparison as two bar charts, one for large requests and one for small ones.

use anyhow::Result;
use bootstrap::bench::sample::Sample;

use super::contestant::Contestant;
use super::{Client, Comparison};
use crate::chart::{self, Bar, Panel};

/// The file names of the charts.
pub(super) const NAMES: [&str; 2] = ["large.svg", "small.svg"];

/// Returns the file name and the content of each chart.
pub(super) fn all(comparison: &Comparison) -> Result<Vec<(String, String)>> {
    let panels = |small: bool, figure: fn(&Sample) -> f64| -> Vec<Panel> {
        let sections = comparison.sections.iter().filter(move |section| (section.workload.block < 1 << 20) == small);
        let panel = sections.map(|section| Panel {
            title: match section.client {
                Client::Fio => section.workload.name(),
                Client::Lean => format!("{} (lean client)", section.workload.name()),
            },
            bars: section
                .results
                .iter()
                .map(|turns| Bar {
                    name: turns.contestant.name().to_owned(),
                    value: figure(&turns.median),
                    is_ours: turns.contestant == Contestant::Nbdcrypt,
                })
                .collect(),
            limit: None,
        });
        panel.collect()
    };
    let large = chart::svg("Large requests, MB/s", &panels(false, |sample| sample.mb_per_s), 0)?;
    let small = chart::svg("Small requests, thousands per second", &panels(true, |sample| sample.iops / 1e3), 0)?;
    Ok(NAMES.iter().map(|name| (*name).to_owned()).zip([large, small]).collect())
}
