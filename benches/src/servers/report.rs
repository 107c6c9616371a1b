//! Writes a comparison as text: tables, the machine, the bars, and the commands with which to repeat the comparison.

use std::fmt::Write;

use super::Client;
use super::bars::{self, Verdict};
use super::charts;
use super::contestant::Contestant;
use super::{Comparison, Section};

/// Writes the table of one workload.
pub(super) fn section(section: &Section) -> String {
    let client = match section.client {
        Client::Fio => "",
        Client::Lean => " (lean client)",
    };
    let mut out = format!(
        "\n### {}{client}\n\n| | MB/s | IOPS | nbdcrypt is faster by | p99 µs | server CPU s/GB | server cores | client cores \
         | limited by | peak RSS MiB |\n|---|--:|--:|--:|--:|--:|--:|--:|---|--:|\n",
        section.workload.name()
    );
    for turns in &section.results {
        let sample = &turns.median;
        let faster = bars::ratio(section, Contestant::Nbdcrypt, turns.contestant, |sample| Some(sample.mb_per_s));
        let faster = match turns.contestant {
            Contestant::Nbdcrypt => String::new(),
            _ => known(faster, 2),
        };
        let limit = sample.limit(section.workload.connections, bootstrap::bench::machine::cores()).name();
        let _ = writeln!(
            out,
            "| {} | {:.0} | {:.0} | {faster} | {:.0} | {} | {} | {:.2} | {limit} | {} |",
            turns.contestant.name(),
            sample.mb_per_s,
            sample.iops,
            sample.p99_us,
            known(sample.server_cpu_s_per_gb, 3),
            known(sample.server_cores, 2),
            sample.client_cores,
            known(sample.peak_rss_mib, 0),
        );
    }
    out
}

fn known(figure: Option<f64>, digits: usize) -> String {
    figure.map_or_else(|| "–".to_owned(), |figure| format!("{figure:.digits$}"))
}

/// Writes the bars, and which contestants are missing.
pub(super) fn closing(comparison: &Comparison) -> String {
    let mut out = String::from("\n### Bars\n\n| | bar | measured | null server | |\n|---|--:|--:|--:|---|\n");
    for bar in bars::all(comparison) {
        let sign = if bar.at_least { "≥" } else { "≤" };
        let verdict = match bar.verdict() {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::NotMeasured => "not measured",
        };
        let (measured, null) = (known(bar.measured, 2), known(bar.null, 2));
        let _ = writeln!(out, "| {} | {sign} {} | {measured} | {null} | {verdict} |", bar.what, bar.bar);
    }
    out += "\nThe column `null server` has the same ratio for a server without storage, which is about what the client allows on this \
            machine.\n";
    for note in notes(comparison) {
        let _ = writeln!(out, "\n{note}");
    }
    if !comparison.missing.is_empty() {
        out.push_str("\n### Missing\n\n");
        for missing in &comparison.missing {
            let _ = writeln!(out, "- {}: {}", missing.contestant.name(), missing.reason);
        }
    }
    out
}

/// Returns notes on cells that are empty, or whose figure covers less than a reader may expect.
fn notes(comparison: &Comparison) -> Vec<&'static str> {
    let dm_crypt = "dm-crypt's CPU, memory and limit are –: threads of the kernel do its work, and no process is charged \
                    for it.";
    let attached = "The CPU time of nbdcrypt on /dev/nbd is only that of its process: no process is charged for the work of the kernel's \
                    NBD client.";
    let notes = [(Contestant::DmCrypt, dm_crypt), (Contestant::AttachedNbd, attached)];
    notes.into_iter().filter(|(contestant, _)| comparison.has(*contestant)).map(|(_, note)| note).collect()
}

/// Returns how the clients reach the contestants.
fn reached(comparison: &Comparison) -> String {
    let devices: Vec<&str> = Contestant::ALL
        .into_iter()
        .filter(|one| one.is_device() && comparison.has(*one))
        .map(Contestant::name)
        .collect();
    if devices.is_empty() {
        return "unix socket".to_owned();
    }
    format!("unix socket; block device with direct I/O: {}", devices.join(", "))
}

/// Writes the whole report.
pub(super) fn markdown(comparison: &Comparison) -> String {
    let machine = &comparison.machine;
    let mut out = format!(
        "# Encrypted network block devices, compared\n\n{} cores of {}, {} GiB, Linux {}. Storage: {}. LUKS1, 512-byte \
         sectors, AES-256-XTS. Reached by {}. Medians of {} rounds of {} s; all take turns in each round, and each figure is from a \
         server that was just started. Ratios are medians of the ratios within each round.\n\n",
        machine.cores,
        machine.cpu,
        machine.memory_gib,
        machine.kernel,
        comparison.storage,
        reached(comparison),
        comparison.rounds,
        comparison.seconds
    );
    for (program, version) in &machine.versions {
        let _ = writeln!(out, "- {program}: {version}");
    }
    for name in charts::NAMES {
        let _ = writeln!(out, "\n![{name}]({name})");
    }
    for one in &comparison.sections {
        out += &section(one);
    }
    out += "\nThe yardstick has one blocking thread for each connection, uses pread and pwrite, and does not encrypt. The limit is the client if \
            its threads are busy for at least nine tenths of the time.\n";
    if let Some(peak) = comparison.peak_rss_mib {
        let _ = writeln!(
            out,
            "\nPeak memory of this server with 4 connections and 128 requests of 1 MiB on each: {peak:.0} MiB."
        );
    }
    out += &closing(comparison);
    out += "\n### To repeat it\n\n```sh\nnbdcrypt-bench servers --report DIR\n";
    for command in &comparison.commands {
        let _ = writeln!(out, "{command}");
    }
    out + "```\n"
}

#[cfg(test)]
mod tests {
    use super::super::Turns;
    use super::*;
    use bootstrap::bench::machine::Machine;
    use bootstrap::bench::sample::{Cost, Sample, Seen};
    use bootstrap::bench::workload::TYPICAL;

    fn comparison(field: &[Contestant]) -> Comparison {
        let seen = Seen { bytes: 1, requests: 1, seconds: 1.0, p99_us: 1.0, client_cpu: 0.1 };
        let sample = Sample::new(&seen, &Cost { server: None, peak_rss: None });
        let results =
            field.iter().map(|contestant| Turns { contestant: *contestant, median: sample, rounds: vec![sample] });
        Comparison {
            machine: Machine::with(&[]),
            storage: "memory".to_owned(),
            rounds: 1,
            seconds: 1.0,
            missing: Vec::new(),
            sections: vec![Section { client: Client::Fio, workload: TYPICAL[0], results: results.collect() }],
            peak_rss_mib: None,
            commands: Vec::new(),
        }
    }

    #[test]
    fn a_bar_for_a_rate_shows_the_null_servers_ratio() {
        let all = markdown(&comparison(&[Contestant::Nbdcrypt, Contestant::Null, Contestant::NbdkitLuks]));
        let line = all.lines().find(|line| line.contains("rate over nbdkit luks")).unwrap();
        assert_eq!(line, "| read 1 MiB, depth 16: rate over nbdkit luks | ≥ 4.5 | 1.00 | 1.00 | missed |");
        let without = markdown(&comparison(&[Contestant::Nbdcrypt, Contestant::NbdkitLuks]));
        assert!(without.contains("rate over nbdkit luks | ≥ 4.5 | 1.00 | – | missed |"), "{without}");
    }

    #[test]
    fn devices_are_reported_as_devices() {
        let servers = markdown(&comparison(&[Contestant::Nbdcrypt, Contestant::NbdkitLuks]));
        assert!(servers.contains("Reached by unix socket. "), "{servers}");
        assert!(!servers.contains("threads of the kernel") && !servers.contains("NBD client"), "{servers}");

        let all = markdown(&comparison(&[Contestant::Nbdcrypt, Contestant::DmCrypt, Contestant::AttachedNbd]));
        let header = "Reached by unix socket; block device with direct I/O: dm-crypt, nbdcrypt on /dev/nbd. ";
        for part in [header, "dm-crypt's CPU, memory and limit are –", "the kernel's NBD client"] {
            assert!(all.contains(part), "{part}: {all}");
        }
    }
}
