//! The bars: this project's targets for the server, and whether they were met.

use super::Client;
use super::contestant::Contestant;
use super::{Comparison, Section};
use bootstrap::bench::sample::Sample;
use bootstrap::bench::statistics::median;
use bootstrap::bench::workload::{Pattern, TYPICAL, Workload};

/// The lowest allowed ratio of this server's rate to the rate of nbdkit luks and of qemu-nbd LUKS, for each of
/// [`TYPICAL`].
const AGAINST_PEERS: [(f64, f64); 4] = [(4.5, 12.0), (4.0, 10.0), (1.8, 4.5), (3.0, 4.5)];
/// The lowest allowed ratio of this server's rate to the rate of its own plaintext export.
const OF_PLAINTEXT: f64 = 0.92;
/// The highest allowed peak memory in MiB.
const MEMORY: f64 = 256.0;

pub(super) struct Bar {
    pub(super) what: String,
    pub(super) bar: f64,
    pub(super) at_least: bool,
    pub(super) measured: Option<f64>,
    /// The same ratio for the null server, which is about the highest that the client can reach. Only bars for rates
    /// have it.
    pub(super) null: Option<f64>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Met,
    Missed,
    NotMeasured,
}

impl Bar {
    pub(super) fn verdict(&self) -> Verdict {
        match self.measured {
            None => Verdict::NotMeasured,
            Some(measured) if self.at_least && measured >= self.bar => Verdict::Met,
            Some(measured) if !self.at_least && measured <= self.bar => Verdict::Met,
            Some(_) => Verdict::Missed,
        }
    }
}

/// Returns the median, over the rounds, of the figure of `one` divided by the figure of `other`. Returns `None` if
/// either figure is missing.
pub(super) fn ratio(
    section: &Section,
    one: Contestant,
    other: Contestant,
    figure: impl Fn(&Sample) -> Option<f64>,
) -> Option<f64> {
    let (one, other) = (section.of(one)?, section.of(other)?);
    let ratios: Option<Vec<f64>> =
        one.rounds.iter().zip(&other.rounds).map(|(one, other)| Some(figure(one)? / figure(other)?)).collect();
    ratios.filter(|ratios| !ratios.is_empty()).map(median)
}

pub(super) fn all(comparison: &Comparison) -> Vec<Bar> {
    let find = |workload: Workload| {
        comparison.sections.iter().find(|section| section.client == Client::Fio && section.workload == workload)
    };
    let against = |workload: Workload, peer: Contestant, figure: fn(&Sample) -> Option<f64>| {
        find(workload).and_then(|section| ratio(section, Contestant::Nbdcrypt, peer, figure))
    };
    let rate = |sample: &Sample| Some(sample.mb_per_s);
    let cpu = |sample: &Sample| sample.server_cpu_s_per_gb;
    let p99 = |sample: &Sample| Some(sample.p99_us);
    let mut bars = Vec::new();
    let mut add = |what: String, bar: f64, at_least: bool, measured: Option<f64>, null: Option<f64>| {
        bars.push(Bar { what, bar, at_least, measured, null });
    };
    for (workload, (nbdkit, qemu)) in TYPICAL.into_iter().zip(AGAINST_PEERS) {
        let name = workload.name();
        for (peer, bar) in [
            (Contestant::NbdkitLuks, nbdkit),
            (Contestant::QemuNbdLuks, qemu),
            (Contestant::Yardstick, 1.0),
            (Contestant::NbdcryptPlaintext, OF_PLAINTEXT),
        ] {
            let [measured, null] = [Contestant::Nbdcrypt, Contestant::Null]
                .map(|one| find(workload).and_then(|section| ratio(section, one, peer, rate)));
            add(format!("{name}: rate over {}", peer.name()), bar, true, measured, null);
        }
        for peer in [Contestant::NbdkitLuks, Contestant::QemuNbdLuks] {
            add(format!("{name}: server CPU over {}", peer.name()), 1.0, false, against(workload, peer, cpu), None);
            add(format!("{name}: p99 over {}", peer.name()), 1.0, false, against(workload, peer, p99), None);
        }
        if matches!(workload.pattern, Pattern::RandomRead | Pattern::RandomWrite) {
            let yardstick = Contestant::Yardstick;
            add(
                format!("{name}: server CPU over {}", yardstick.name()),
                1.0,
                false,
                against(workload, yardstick, cpu),
                None,
            );
        }
        let several = comparison.sections.iter().find(|section| {
            section.client == Client::Fio
                && section.workload.connections > 1
                && section.workload.with(workload.connections) == workload
        });
        let median_of = |section: &Section| Some(section.of(Contestant::Nbdcrypt)?.median.mb_per_s);
        let gain = several.and_then(median_of).zip(find(workload).and_then(median_of));
        let gain = gain.map(|(several, one)| several / one);
        add(format!("{name}: rate of several connections over one"), 1.0, true, gain, None);
    }
    add(
        "resident, 4 connections, 128 requests of 1 MiB each (MiB)".to_owned(),
        MEMORY,
        false,
        comparison.peak_rss_mib,
        None,
    );
    bars
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_a_minimum_or_a_maximum() {
        let bar = |at_least, measured| Bar { what: String::new(), bar: 1.0, at_least, measured, null: None }.verdict();
        assert_eq!(bar(true, Some(1.1)), Verdict::Met);
        assert_eq!(bar(true, Some(0.9)), Verdict::Missed);
        assert_eq!(bar(false, Some(0.9)), Verdict::Met);
        assert_eq!(bar(false, Some(1.1)), Verdict::Missed);
        assert_eq!((bar(true, Some(f64::NAN)), bar(false, Some(f64::NAN))), (Verdict::Missed, Verdict::Missed));
        assert_eq!(bar(false, None), Verdict::NotMeasured);
    }
}
