//! `nbdcrypt devices` on the machine of the test. The tests beside `volume::candidate` simulate machines with other
//! disks.

use std::process::Command;

use harness::nbdcrypt::{binary, copy_binary, told};
use serde_json::Value;

/// Every disk is listed with the same members, and a user other than root is told what only root sees.
#[test]
fn every_disk_of_this_machine_is_listed() {
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let copy = folder.path().join("nbdcrypt");
    copy_binary(&copy);
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&copy);
    for (mut command, is_root) in [(Command::new(binary()), true), (nobody, false)] {
        let output = command.args(["devices", "--json"]).output().unwrap();
        assert!(output.status.success(), "{}", told(&output));
        let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
        for row in rows.as_array().unwrap() {
            for member in ["model", "serial", "size", "read_only", "by_id", "holds", "blank", "used_by", "kind"] {
                assert!(row.get(member).is_some(), "{member} is missing: {row}");
            }
            assert!(row["device"].as_str().unwrap().starts_with("/dev/"), "{row}");
            assert!(!row["why"].as_str().unwrap().is_empty(), "{row}");
            let answers: &[&str] = if is_root { &["yes", "if-named", "no", "unknown"] } else { &["no", "unknown"] };
            assert!(answers.contains(&row["up"].as_str().unwrap()), "{row}");
        }
    }
    let listed = Command::new(binary()).arg("devices").output().unwrap();
    assert!(listed.status.success() && !listed.stdout.is_empty(), "{}", told(&listed));
}
