//! Real clients against a real HTTP server: `nbdcrypt key verify`, which fetches a secret from S3 and KMS as `up` does, many
//! times at once. Their requests are compared with the simulation of the same clients.

mod server;

use std::fs::{self, File};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bootstrap::bench::interrupt;
use serde::Serialize;

use super::bucket::TokenBucket;
use super::fleet::{Boot, Scenario, simulate};
use super::policy::Policy;
use server::{Asked, Server};

/// How long a client retries. It is long enough for a slow machine: no client fails because of the time that it takes to start
/// all of them.
const RETRY_FOR: Duration = Duration::from_secs(1800);
/// Simulations with as many seeds, since one run of the real clients is only one throw of the dice.
const SEEDS: u64 = 25;

/// The real clients beside the simulated ones.
#[derive(Debug, Serialize)]
pub(super) struct Comparison {
    clients: usize,
    quota: NonZeroU32,
    real: Run,
    /// The smallest, the middle and the largest figures of the simulation.
    simulated: [Run; 3],
    /// The shortest and the longest time from a client's throttled request to its next one, in seconds: for the first repetition,
    /// the second, and so on. The first numbers are the pauses, if no client was late.
    gaps: Vec<[f64; 2]>,
}

/// One storm.
#[derive(Clone, Copy, Debug, Serialize)]
struct Run {
    /// Requests to KMS that were granted: one a client.
    granted: usize,
    /// Requests to KMS that were throttled.
    throttled: usize,
    /// Seconds from the moment at which every client had asked to the last granted request.
    last: f64,
}

/// Runs the clients and simulates them. Takes about `clients / quota` seconds.
///
/// # Errors
/// Fails if a client fails, or if nbdcrypt cannot be started.
pub(super) fn compare(clients: NonZeroU32, quota: NonZeroU32, nbdcrypt: &Path) -> Result<Comparison> {
    interrupt::catch()?;
    let clients = usize::try_from(clients.get())?;
    let server = Server::start(clients, quota)?;
    let stage = Stage::new(&server.endpoint())?;
    run_clients(clients, &stage, nbdcrypt)?;
    let asked = server.asked();
    let Some(opened) = asked.iter().filter_map(|asked| asked.first()).map(|first| first.at).max() else {
        bail!("no client asked for a secret")
    };
    let requests = || asked.iter().flatten();
    let granted = requests().filter(|asked| asked.is_granted);
    let last = granted.clone().map(|asked| asked.at).max().unwrap_or(opened);
    let granted = granted.count();
    let real = Run { granted, throttled: requests().count() - granted, last: (last - opened).as_secs_f64() };
    Ok(Comparison { clients, quota, real, simulated: simulated(&asked, quota, opened), gaps: gaps(&asked) })
}

/// Simulates clients whose first requests arrive as those of the real ones did.
fn simulated(asked: &[Vec<Asked>], quota: NonZeroU32, opened: Duration) -> [Run; 3] {
    let arrivals: Vec<_> = asked.iter().filter_map(|asked| Some(asked.first()?.at)).collect();
    let mut runs: Vec<_> = (0..SEEDS)
        .map(|seed| {
            let scenario = Scenario {
                arrivals: &arrivals,
                boot: Boot::Token,
                kms: TokenBucket::full(quota, opened),
                s3: TokenBucket::full(NonZeroU32::MAX, Duration::ZERO),
                // Signing a request and starting a connection to this machine takes a few milliseconds.
                latency: Duration::from_millis(5),
                retry_for: RETRY_FOR,
                policy: Policy::Nbdcrypt,
                seed,
            };
            let outcome = simulate(&scenario, |_, _, _| ());
            let last = outcome.last.saturating_sub(opened + scenario.latency).as_secs_f64();
            Run { granted: outcome.granted, throttled: outcome.throttled, last }
        })
        .collect();
    // Requests and seconds are sorted each for itself.
    runs.sort_by_key(|run| run.throttled);
    let mut lasts: Vec<_> = runs.iter().map(|run| run.last).collect();
    lasts.sort_by(f64::total_cmp);
    [0, runs.len() / 2, runs.len() - 1].map(|rank| Run { last: lasts[rank], ..runs[rank] })
}

/// Returns the shortest and the longest gap before each client's first repetition, second repetition, and so on.
fn gaps(asked: &[Vec<Asked>]) -> Vec<[f64; 2]> {
    let repetitions = asked.iter().map(|asked| asked.len().saturating_sub(1)).max().unwrap_or(0);
    (0..repetitions)
        .map(|number| {
            let gaps = asked.iter().filter_map(|asked| {
                let [before, after] = asked.get(number..number + 2)? else { return None };
                Some((after.at - before.at).as_secs_f64())
            });
            gaps.fold([f64::INFINITY, 0.0], |[least, most], gap| [least.min(gap), most.max(gap)])
        })
        .collect()
}

impl Comparison {
    /// Returns the table.
    pub(super) fn table(&self) -> String {
        let Self { clients, quota, real, simulated: [least, middle, most], gaps } = self;
        let mut text = format!(
            "{clients} clients, {quota} requests a second\n\n\
             | | real | simulated, {SEEDS} seeds: middle | smallest | largest |\n|---|--:|--:|--:|--:|\n\
             | throttled requests | {} | {} | {} | {} |\n\
             | seconds to the last answer | {:.1} | {:.1} | {:.1} | {:.1} |\n\n\
             | repetition | shortest gap | longest gap |\n|--:|--:|--:|\n",
            real.throttled,
            middle.throttled,
            least.throttled,
            most.throttled,
            real.last,
            middle.last,
            least.last,
            most.last,
        );
        for (number, [least, most]) in gaps.iter().enumerate() {
            text.push_str(&format!("| {} | {least:.2} s | {most:.2} s |\n", number + 1));
        }
        text
    }
}

/// Starts all clients, and waits until each has its secret.
fn run_clients(count: usize, stage: &Stage, nbdcrypt: &Path) -> Result<()> {
    let mut clients = Clients(Vec::with_capacity(count));
    for number in 0..count {
        interrupt::check()?;
        let mut command = Command::new(nbdcrypt);
        command
            .args(["--run-dir", "run", "key", "verify", "storm.toml"])
            .current_dir(&stage.dir)
            .env_clear()
            .env("HOME", &stage.dir)
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("AWS_ACCESS_KEY_ID", format!("CLIENT{number:06}"))
            .env("AWS_SECRET_ACCESS_KEY", "not-a-secret")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stage.log(number)?);
        clients.0.push(command.spawn().with_context(|| format!("cannot start {}", nbdcrypt.display()))?);
    }
    let mut running: Vec<_> = clients.0.iter_mut().enumerate().collect();
    while !running.is_empty() {
        interrupt::check()?;
        let mut still = Vec::new();
        for (number, client) in running {
            match client.try_wait().context("cannot wait for a client")? {
                None => still.push((number, client)),
                Some(status) if status.success() => {}
                Some(status) => {
                    let log = fs::read_to_string(stage.log_path(number)).unwrap_or_default();
                    bail!("client {number} got no secret ({status}): {}", log.lines().last().unwrap_or_default());
                }
            }
        }
        running = still;
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The clients. Those that still run are killed on drop.
struct Clients(Vec<Child>);

impl Drop for Clients {
    fn drop(&mut self) {
        for client in &mut self.0 {
            let _ = client.kill();
            let _ = client.wait();
        }
    }
}

/// A directory with the clients' configuration, which is removed on drop.
struct Stage {
    dir: PathBuf,
}

impl Stage {
    fn new(endpoint: &str) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("nbdcrypt-storm-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let stage = Self { dir };
        File::create(stage.dir.join("disk"))?.set_len(32 << 20)?;
        let config = format!(
            "[volume]\ndevices = [\"{}\"]\ntype = \"plain\"\n\
             [key]\nsource = \"aws\"\nobject = \"s3://storm/key\"\nkms-key = \"{}\"\nregion = \"eu-central-1\"\n\
             endpoint-url = \"{endpoint}\"\nretry-for = \"{}s\"\n",
            stage.dir.join("disk").display(),
            server::KEY,
            RETRY_FOR.as_secs(),
        );
        fs::write(stage.dir.join("storm.toml"), config)?;
        Ok(stage)
    }

    fn log_path(&self, client: usize) -> PathBuf {
        self.dir.join(format!("{client}.log"))
    }

    fn log(&self, client: usize) -> Result<File> {
        let path = self.log_path(client);
        File::create(&path).with_context(|| format!("cannot make {}", path.display()))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}
