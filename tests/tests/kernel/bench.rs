//! `nbdcrypt bench compare` where the kernel has dm-crypt and network block devices: it measures them, and leaves none.

use std::time::Duration;

use harness::kernel::Kernel;
use harness::nbdcrypt::binary;
use serde_json::Value;

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and fio: run `make test`")]
fn the_kernels_own_devices_are_measured_beside_the_servers() {
    let kernel = Kernel::new().patient(Duration::from_secs(600));
    // Of the peers, the kernel's alone: a program that is not to be found takes no turn.
    let script = format!(
        r#"
        modprobe -a nbd loop dm-crypt
        mkdir programs images
        for program in fio cryptsetup; do ln -s "$(command -v $program)" programs; done
        PATH=$PWD/programs {} bench compare --quick --rounds 1 --runtime 0.2 --size 64M --dir /dev/shm --json --report report > answer
        echo loops: $(losetup --list --noheadings | wc -l)
        echo mappings: $(ls /dev/mapper | grep -vx control | wc -l)
        echo attached: $(ls /sys/block/nbd*/pid 2> /dev/null | wc -l)
        echo left: $(ls /dev/shm /tmp | grep -c nbdcrypt-bench)
        "#,
        binary().display()
    );
    let output = kernel.expect(&script);
    assert_eq!(output, "loops: 0\nmappings: 0\nattached: 0\nleft: 0\n");
    let answer: Value = serde_json::from_slice(&std::fs::read(kernel.dir().join("answer")).unwrap()).unwrap();
    let sections = answer["sections"].as_array().unwrap();
    assert_eq!(sections.len(), 4, "{answer:#}");
    for section in sections {
        let median = |contestant: &str| {
            let results = section["results"].as_array().unwrap();
            let turns = results.iter().find(|turns| turns["contestant"] == contestant);
            turns.unwrap_or_else(|| panic!("no {contestant}: {answer:#}"))["median"].clone()
        };
        for contestant in ["nbdcrypt", "dm-crypt", "attached-nbd"] {
            let sample = median(contestant);
            for figure in ["mb_per_s", "iops", "p99_us"] {
                assert!(sample[figure].as_f64().is_some_and(|value| value > 0.0), "{contestant}, {figure}: {sample}");
            }
        }
        // What the kernel's threads do is on nobody's account; what this server does, is.
        assert!(median("dm-crypt")["server_cpu_s_per_gb"].is_null());
        assert!(median("attached-nbd")["server_cpu_s_per_gb"].is_number());
    }
    let report = std::fs::read_to_string(kernel.dir().join("report/compare.md")).unwrap();
    for row in ["| dm-crypt |", "| nbdcrypt on /dev/nbd |", "cryptsetup open", "--filename=DEVICE"] {
        assert!(report.contains(row), "{row}: {report}");
    }
}
