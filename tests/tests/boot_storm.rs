//! `nbdcrypt-bench storm`: real clients that KMS throttles, and the figures of docs/limits.md.

use std::fs;
use std::process::{Command, Output};

use harness::architecture::top;
use harness::nbdcrypt::{bench_binary, told};
use serde_json::Value;

const CLIENTS: u64 = 40;
const QUOTA: u64 = 10;

fn storm(arguments: &[&str]) -> Output {
    let output = Command::new(bench_binary()).arg("storm").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", told(&output));
    output
}

/// Every client is throttled at least once, because the server grants nothing before all have asked. What is checked holds on
/// a machine of any speed: a client may be late, but never early.
#[test]
fn throttled_clients_wait_and_all_get_the_secret() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(bench_binary());
    command.args(["storm", "--json", "--clients", &CLIENTS.to_string(), "--quota", &QUOTA.to_string()]);
    let output = command.env("TMPDIR", folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let (granted, throttled) = (found["real"]["granted"].as_u64(), found["real"]["throttled"].as_u64().unwrap());
    assert_eq!(granted, Some(CLIENTS), "{found}");
    // All but the last one to ask for the first time.
    assert!(throttled >= CLIENTS - 1, "{found}");
    // The first grants empty the bucket, and the others wait for its tokens.
    let last = found["real"]["last"].as_f64().unwrap();
    assert!(last >= (CLIENTS - QUOTA) as f64 / QUOTA as f64, "{found}");
    // A busy service is left alone for half a second to a second, then for twice as long, up to 5 s.
    let gaps = found["gaps"].as_array().unwrap();
    for (number, gap) in gaps.iter().enumerate() {
        let least = [0.5, 1.0, 2.0].get(number).unwrap_or(&2.5);
        assert!(gap[0].as_f64().unwrap() >= *least, "repetition {}: {found}", number + 1);
    }
    // The simulation of these clients grants as many requests.
    for simulated in found["simulated"].as_array().unwrap() {
        assert_eq!(simulated["granted"].as_u64(), Some(CLIENTS), "{found}");
        assert!(simulated["throttled"].as_u64().unwrap() >= CLIENTS - 1, "{found}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "something is left behind");
}

/// The rows of docs/limits.md are what the simulation prints. The largest fleets are left out, because they take a debug build
/// minutes.
#[test]
fn the_figures_in_the_documentation_are_the_simulations() {
    let page = fs::read_to_string(top().join("docs/limits.md")).unwrap();
    let section = page.split("\n## ").find(|section| section.starts_with("A fleet that boots at once")).unwrap();
    let mut checked = 0;
    for row in section.lines() {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [instances, quota, ..] = cells[..] else { continue };
        let number = |cell: &str| cell.replace(',', "").parse::<u32>();
        let (Ok(instances), Ok(quota)) = (number(instances), number(quota)) else { continue };
        if instances <= 10_000 {
            let output = storm(&["--instances", &instances.to_string(), "--quota", &quota.to_string()]);
            let printed = String::from_utf8(output.stdout).unwrap();
            assert!(printed.lines().any(|line| line == row), "docs/limits.md has\n{row}\nand not\n{printed}");
            checked += 1;
        }
    }
    assert!(checked >= 2, "{checked}");
}
