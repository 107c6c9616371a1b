//! `nbdcrypt-bench storm`: what happens if a whole fleet boots at once. KMS grants an account only so many requests a second
//! in a Region, so most of the fleet is throttled, and its retries decide when the last instance is up.
//!
//! `fleet` simulates the instances, with the pauses that nbdcrypt makes (`policy`). `real` starts real clients instead,
//! and compares them with the simulation.

mod bucket;
mod fleet;
mod policy;
mod random;
mod real;

use std::num::NonZeroU32;
use std::time::Duration;

use anyhow::Result;
use bootstrap::config::parse_duration;
use serde::Serialize;

use bucket::TokenBucket;
use fleet::{Boot, Scenario, arrivals, simulate};
use policy::Policy;

use crate::servers::nbdcrypt;

/// The time from a request to its answer, within a Region.
const LATENCY: Duration = Duration::from_millis(20);

/// Simulate a fleet that boots at once, and is throttled.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Sizes of the fleet.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = numbers([1_000, 10_000, 100_000]))]
    instances: Vec<NonZeroU32>,
    /// Requests a second that KMS grants. The defaults are the default quotas of AWS's Regions, present and former, and a
    /// small remainder of them.
    #[arg(long, value_name = "RATE", value_delimiter = ',', default_values_t = numbers([100, 1_000, 5_500, 10_000, 20_000, 100_000]))]
    quota: Vec<NonZeroU32>,
    /// Requests a second that S3 grants.
    #[arg(long, value_name = "RATE", default_value_t = number(5_500))]
    s3_quota: NonZeroU32,
    /// What an instance asks for.
    #[arg(long, value_enum, default_value_t = Boot::Token)]
    boot: Boot,
    /// The time within which all instances send their first request, such as 60s.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = time)]
    within: Duration,
    /// How long an instance retries.
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = time)]
    retry_for: Duration,
    /// Chooses the lengths of the pauses. Equal seeds give equal figures.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Start N real clients instead, for a server with the first --quota, and compare them with the simulation.
    #[arg(long, value_name = "N", conflicts_with_all = ["instances", "s3_quota", "boot", "within", "retry_for", "seed"])]
    clients: Option<NonZeroU32>,
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
}

/// One row of the table.
#[derive(Debug, Serialize)]
struct Row {
    instances: NonZeroU32,
    quota: NonZeroU32,
    /// Seconds before which no policy can have mounted all of them.
    bound: f64,
    policies: Vec<Figures>,
}

/// What one policy does.
#[derive(Debug, Serialize)]
struct Figures {
    policy: Policy,
    /// Seconds to the last mount.
    last: f64,
    /// Requests to AWS.
    requests: usize,
    /// Instances that gave up.
    failed: usize,
}

/// Simulates, or starts the clients, and prints the table.
///
/// # Errors
/// Fails if a client fails, or if nbdcrypt cannot be started.
pub fn run(args: &Args) -> Result<()> {
    if let Some(clients) = args.clients {
        let quota = args.quota.first().copied().unwrap_or(clients);
        let comparison = real::compare(clients, quota, &nbdcrypt()?)?;
        match args.json {
            true => println!("{}", serde_json::to_string_pretty(&comparison)?),
            false => print!("{}", comparison.table()),
        }
        return Ok(());
    }
    let rows = args.instances.iter().flat_map(|instances| args.quota.iter().map(move |quota| (*instances, *quota)));
    let rows = rows.map(|(instances, quota)| row(args, instances, quota));
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows.collect::<Vec<_>>())?);
        return Ok(());
    }
    println!("Seconds to the last mount, and requests for each instance.\n");
    let names: Vec<_> = Policy::ALL.map(|policy| format!(" {} |", policy.name())).into();
    println!("| instances | quota | at least |{}", names.concat());
    println!("|--:|--:|--:|{}", "--:|".repeat(names.len()));
    for row in rows {
        let cells: Vec<_> = row.policies.iter().map(|figures| figures.cell(row.instances)).collect();
        println!("| {} | {} | {:.1} s |{}", grouped(row.instances), grouped(row.quota), row.bound, cells.concat());
    }
    Ok(())
}

/// Simulates one fleet with each policy.
fn row(args: &Args, instances: NonZeroU32, quota: NonZeroU32) -> Row {
    let arrivals = arrivals(instances.get(), args.within, args.seed);
    let policies = Policy::ALL.map(|policy| {
        let scenario = Scenario {
            arrivals: &arrivals,
            boot: args.boot,
            kms: TokenBucket::full(quota, Duration::ZERO),
            s3: TokenBucket::full(args.s3_quota, Duration::ZERO),
            latency: LATENCY,
            retry_for: args.retry_for,
            policy,
            seed: args.seed,
        };
        let outcome = simulate(&scenario, |_, _, _| ());
        Figures { policy, last: outcome.last.as_secs_f64(), requests: outcome.requests(), failed: outcome.failed }
    });
    Row { instances, quota, bound: bound(args, instances, quota), policies: policies.into() }
}

/// Returns the seconds before which the last instance cannot have all of its answers: a service grants one second's requests at
/// once, and the others at the rate of its quota.
fn bound(args: &Args, instances: NonZeroU32, quota: NonZeroU32) -> f64 {
    let after = |requests: usize, quota: NonZeroU32| {
        (requests as f64 * f64::from(instances.get()) / f64::from(quota.get()) - 1.0).max(0.0)
    };
    let (kms, all) = (args.boot.kms_requests(), args.boot.requests().len());
    after(kms, quota).max(after(all - kms, args.s3_quota)) + all as f64 * LATENCY.as_secs_f64()
}

impl Figures {
    fn cell(&self, instances: NonZeroU32) -> String {
        let each = self.requests as f64 / f64::from(instances.get());
        let failed = match self.failed {
            0 => String::new(),
            failed => format!(", {failed} failed"),
        };
        format!(" {:.1} s, {each:.1}{failed} |", self.last)
    }
}

/// Returns the number with a comma between its thousands.
fn grouped(number: NonZeroU32) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn numbers<const N: usize>(numbers: [u32; N]) -> [NonZeroU32; N] {
    numbers.map(number)
}

/// Returns the number, or 1 for 0.
fn number(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN)
}

fn time(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "a time is a number with s, m or h, such as 90s".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        for (digits, text) in [(7, "7"), (123, "123"), (1_000, "1,000"), (45_678, "45,678"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number(digits)), text);
        }
    }
}
