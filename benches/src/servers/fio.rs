//! fio as the client. It uses its nbd engine with one thread for each connection, or libaio on a block device.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::contestant::installed;
use super::subject::Target;
use bootstrap::bench::interrupt;
use bootstrap::bench::sample::Seen;
use bootstrap::bench::stage::Region;
use bootstrap::bench::workload::Workload;

const POLL: Duration = Duration::from_millis(10);

/// Fails unless fio is installed and has its nbd engine. The error says what to do.
pub(super) fn require() -> Result<()> {
    ensure!(
        installed("fio"),
        "fio is not installed, but it is needed as the client: {}",
        bootstrap::machine::packages::hint("fio")
    );
    let output = Command::new("fio").arg("--enghelp").output().context("cannot run `fio --enghelp`")?;
    let engines = String::from_utf8_lossy(&output.stdout);
    ensure!(
        engines.lines().any(|line| line.trim() == "nbd"),
        "this fio has no nbd engine (see `fio --enghelp`): install a fio that was built with libnbd, such as Debian's"
    );
    Ok(())
}

/// Returns fio's arguments for one workload.
pub(super) fn arguments(target: Target<'_>, workload: &Workload, region: Region, runtime: Duration) -> Vec<String> {
    let share = region.len / u64::from(workload.connections) / u64::from(workload.block) * u64::from(workload.block);
    let engine = match target {
        Target::Socket(socket) => {
            vec!["--ioengine=nbd".to_owned(), format!("--uri=nbd+unix:///?socket={}", socket.display())]
        }
        // Direct I/O, because otherwise the page cache would answer requests instead of the device.
        Target::Device(device) => vec![
            "--ioengine=libaio".to_owned(),
            "--direct=1".to_owned(),
            // fio would take an unescaped colon for the start of another file name.
            format!("--filename={}", device.display().to_string().replace(':', "\\:")),
        ],
    };
    let job = vec![
        "--name=bench".to_owned(),
        format!("--rw={}", workload.pattern.for_fio()),
        format!("--bs={}", workload.block),
        format!("--iodepth={}", workload.depth),
        "--thread".to_owned(),
        format!("--numjobs={}", workload.connections),
        "--group_reporting".to_owned(),
        format!("--offset={}", region.start),
        format!("--size={share}"),
        // Each connection has its own part of the region.
        format!("--offset_increment={share}"),
        "--norandommap".to_owned(),
        "--time_based".to_owned(),
        format!("--runtime={}ms", runtime.as_millis()),
        "--output-format=json".to_owned(),
    ];
    [job, engine].concat()
}

/// Runs fio to its end and returns what it measured.
pub(super) fn drive(target: Target<'_>, workload: &Workload, region: Region, runtime: Duration) -> Result<Seen> {
    let mut child = Command::new("fio")
        .args(arguments(target, workload, region, runtime))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start fio")?;
    let stdout = child.stdout.take().context("fio's output is not piped")?;
    let reader = thread::spawn(move || std::io::read_to_string(stdout));
    let stderr = child.stderr.take().context("fio's error output is not piped")?;
    let complaints = thread::spawn(move || std::io::read_to_string(stderr));
    let status = loop {
        if let Err(error) = interrupt::check() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        match child.try_wait()? {
            Some(status) => break status,
            None => thread::sleep(POLL),
        }
    };
    let output = reader.join().unwrap_or_else(|_| Ok(String::new()))?;
    let said = complaints.join().unwrap_or_else(|_| Ok(String::new()))?;
    if !status.success() {
        bail!("fio failed ({status}): {}", said.trim().replace('\n', "; "));
    }
    seen(&output, workload).with_context(|| format!("cannot use fio's output (its messages: {})", said.trim()))
}

/// Parses fio's JSON.
fn seen(output: &str, workload: &Workload) -> Result<Seen> {
    // fio may print notes before the JSON.
    let json: Value = serde_json::from_str(output.find('{').map_or("", |at| &output[at..]))?;
    let job = &json["jobs"][0];
    ensure!(job["error"].as_u64() == Some(0), "fio reports error {}", job["error"]);
    let side = &job[if workload.pattern.writes() { "write" } else { "read" }];
    let number = |value: &Value, what: &str| value.as_f64().with_context(|| format!("fio's JSON has no {what}"));
    // CPU time in percent of the jobs' time. fio's work before and after the jobs does not count.
    let busy = number(&job["usr_cpu"], "usr_cpu")? + number(&job["sys_cpu"], "sys_cpu")?;
    let seen = Seen {
        bytes: side["io_bytes"].as_u64().context("fio's JSON has no io_bytes")?,
        requests: side["total_ios"].as_u64().context("fio's JSON has no total_ios")?,
        seconds: number(&side["runtime"], "runtime")? / 1e3,
        p99_us: number(&side["clat_ns"]["percentile"]["99.000000"], "99th percentile")? / 1e3,
        client_cpu: busy / 100.0 * number(&job["job_runtime"], "job_runtime")? / 1e3,
    };
    ensure!(seen.requests > 0 && seen.seconds > 0.0, "fio completed no request");
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use bootstrap::bench::workload::TYPICAL;

    #[test]
    fn the_json_is_found_after_notes() {
        let answer = r#"fio: a note
            {"jobs": [{"error": 0, "usr_cpu": 20, "sys_cpu": 60, "job_runtime": 500, "read": {"io_bytes": 0, "total_ios": 0, "runtime": 0},
             "write": {"io_bytes": 8192, "total_ios": 2, "runtime": 500,
                       "clat_ns": {"percentile": {"99.000000": 1500}}}}]}"#;
        let seen_of = |workload| seen(answer, workload);
        let written = seen_of(&TYPICAL[1]).unwrap();
        assert_eq!((written.bytes, written.requests, written.seconds, written.p99_us), (8192, 2, 0.5, 1.5));
        assert!((written.client_cpu - 0.4).abs() < 1e-9);
        assert!(seen_of(&TYPICAL[0]).is_err(), "nothing was read");
        assert!(seen("no JSON", &TYPICAL[0]).is_err());
    }

    #[test]
    fn connections_share_the_region_in_whole_blocks() {
        let region = Region { start: 1 << 24, len: 10 << 20 };
        let typed = arguments(Target::Socket(Path::new("/s")), &TYPICAL[0].with(4), region, Duration::from_secs(2));
        for argument in ["--size=2097152", "--offset_increment=2097152", "--offset=16777216", "--runtime=2000ms"] {
            assert!(typed.iter().any(|typed| typed == argument), "{argument}: {typed:?}");
        }
    }

    #[test]
    fn a_device_is_driven_with_direct_io() {
        let region = Region { start: 0, len: 10 << 20 };
        let device = Target::Device(Path::new("/dev/a:b"));
        let typed = arguments(device, &TYPICAL[0], region, Duration::from_secs(2));
        for argument in ["--direct=1", "--ioengine=libaio", "--filename=/dev/a\\:b"] {
            assert!(typed.iter().any(|typed| typed == argument), "{argument}: {typed:?}");
        }
        assert!(!typed.iter().any(|typed| typed.starts_with("--uri")), "{typed:?}");
    }
}
