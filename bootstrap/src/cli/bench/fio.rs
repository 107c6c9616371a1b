//! fio as the client: its nbd engine, a thread a connection; or libaio, on a block device.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::contestant::installed;
use super::interrupt;
use super::sample::Seen;
use super::stage::Region;
use super::subject::Target;
use super::workload::Workload;

const POLL: Duration = Duration::from_millis(10);

/// Fails, with what to do, unless fio is there and has its nbd engine.
pub(super) fn require() -> Result<()> {
    ensure!(installed("fio"), "fio is not installed, and it is what drives the server: apt-get install fio");
    let output = Command::new("fio").arg("--enghelp").output().context("fio --enghelp")?;
    let engines = String::from_utf8_lossy(&output.stdout);
    ensure!(
        engines.lines().any(|line| line.trim() == "nbd"),
        "this fio has no nbd engine (fio --enghelp): install one built with libnbd, as Debian's is"
    );
    Ok(())
}

/// What is typed, for one workload.
pub(super) fn arguments(target: Target<'_>, workload: &Workload, region: Region, runtime: Duration) -> Vec<String> {
    let share = region.len / u64::from(workload.connections) / u64::from(workload.block) * u64::from(workload.block);
    let engine = match target {
        Target::Socket(socket) => {
            vec!["--ioengine=nbd".to_owned(), format!("--uri=nbd+unix:///?socket={}", socket.display())]
        }
        // What the page cache holds is no work of the device's.
        Target::Device(device) => vec![
            "--ioengine=libaio".to_owned(),
            "--direct=1".to_owned(),
            // A colon would begin another name.
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
        // Each connection has its own part.
        format!("--offset_increment={share}"),
        "--norandommap".to_owned(),
        "--time_based".to_owned(),
        format!("--runtime={}ms", runtime.as_millis()),
        "--output-format=json".to_owned(),
    ];
    [job, engine].concat()
}

/// Runs it to its end.
pub(super) fn drive(target: Target<'_>, workload: &Workload, region: Region, runtime: Duration) -> Result<Seen> {
    let mut child = Command::new("fio")
        .args(arguments(target, workload, region, runtime))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("could not start fio")?;
    let stdout = child.stdout.take().context("fio's output")?;
    let reader = thread::spawn(move || std::io::read_to_string(stdout));
    let stderr = child.stderr.take().context("fio's errors")?;
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
    seen(&output, workload).with_context(|| format!("fio's answer: {}", said.trim()))
}

/// What fio's JSON says of the workload.
fn seen(output: &str, workload: &Workload) -> Result<Seen> {
    // Notes may stand before it.
    let json: Value = serde_json::from_str(output.find('{').map_or("", |at| &output[at..]))?;
    let job = &json["jobs"][0];
    ensure!(job["error"].as_u64() == Some(0), "error {}", job["error"]);
    let side = &job[if workload.pattern.writes() { "write" } else { "read" }];
    let number = |value: &Value, what: &str| value.as_f64().with_context(|| format!("no {what}"));
    // In percent of the jobs' time. What fio does besides, before and after, is not the server's to wait for.
    let busy = number(&job["usr_cpu"], "usr_cpu")? + number(&job["sys_cpu"], "sys_cpu")?;
    let seen = Seen {
        bytes: side["io_bytes"].as_u64().context("no io_bytes")?,
        requests: side["total_ios"].as_u64().context("no total_ios")?,
        seconds: number(&side["runtime"], "runtime")? / 1e3,
        p99_us: number(&side["clat_ns"]["percentile"]["99.000000"], "99th percentile")? / 1e3,
        client_cpu: busy / 100.0 * number(&job["job_runtime"], "job_runtime")? / 1e3,
    };
    ensure!(seen.requests > 0 && seen.seconds > 0.0, "not one request was done");
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::workload::TYPICAL;
    use super::*;

    #[test]
    fn the_answer_is_found_behind_notes() {
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
    fn a_device_is_read_past_the_page_cache() {
        let region = Region { start: 0, len: 10 << 20 };
        let device = Target::Device(Path::new("/dev/a:b"));
        let typed = arguments(device, &TYPICAL[0], region, Duration::from_secs(2));
        for argument in ["--direct=1", "--ioengine=libaio", "--filename=/dev/a\\:b"] {
            assert!(typed.iter().any(|typed| typed == argument), "{argument}: {typed:?}");
        }
        assert!(!typed.iter().any(|typed| typed.starts_with("--uri")), "{typed:?}");
    }
}
