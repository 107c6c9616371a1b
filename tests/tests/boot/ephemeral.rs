//! Disks that forget: the table in docs/operate.md, row by row.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use harness::nbdcrypt::told;
use rustix::process::{Signal, kill_process};

use super::machine::{MIB, Machine, wait_for, write_and_sync};

const DOCUMENT: &str = include_str!("../../../docs/operate.md");
/// Bytes of each disk.
const LEN: u64 = 24 * MIB;

/// The columns of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    /// `source = "ephemeral"`.
    Ephemeral = 1,
    /// `ephemeral = true`, and a key file.
    Replaceable = 2,
    /// A key file.
    Lasting = 3,
}

/// The rows of the table: what `up` finds, and what it then does.
fn rows(column: Column) -> Vec<(&'static str, &'static str)> {
    let table = DOCUMENT.split("| what `up` finds |").nth(1).unwrap().split("\n\n").next().unwrap();
    let cells = |line: &'static str| line.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>();
    table.lines().skip(2).map(cells).map(|cells| (cells[0], cells[column as usize])).collect()
}

/// The disks in the machine's folder.
type Disks = &'static [&'static str];
const ONE: Disks = &["disk"];
const TWO: Disks = &["a", "b"];

impl Machine {
    fn configure_as(&self, column: Column, disks: Disks, header: bool, key: &str) {
        let paths: Vec<_> = disks.iter().map(|name| format!("{:?}", self.path(name).display().to_string())).collect();
        let ephemeral = if column == Column::Lasting { "" } else { "ephemeral = true\n" };
        let header =
            if header { format!("header = {:?}\n", self.path("header").display().to_string()) } else { String::new() };
        let key = match column {
            Column::Ephemeral => "source = \"ephemeral\"".to_owned(),
            _ => format!("source = \"file\"\npath = {:?}\nrandom = true", self.path(key).display().to_string()),
        };
        self.configure(&format!(
            "[volume]\ndevices = [{}]\n{ephemeral}{header}[key]\n{key}\n[filesystem]\nmountpoint = {:?}\n",
            paths.join(", "),
            self.path("mnt").display().to_string()
        ));
    }

    fn blank(&self, names: &[&str]) {
        for name in names {
            File::create(self.path(name)).unwrap().set_len(LEN).unwrap();
        }
    }

    fn noise(&self, name: &str) {
        let mut random = File::open("/dev/urandom").unwrap().take(LEN);
        std::io::copy(&mut random, &mut File::create(self.path(name)).unwrap()).unwrap();
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        self.blank(&[name]);
        File::options().write(true).open(self.path(name)).unwrap().write_all_at(bytes, 0).unwrap();
    }

    /// Makes a volume on blank disks and takes it down.
    fn made(&self, column: Column, disks: Disks, header: bool) {
        self.blank(disks);
        self.configure_as(column, disks, header, "key");
        self.up();
        write_and_sync(&self.path("mnt/file"), b"here");
        self.down();
    }

    /// Prepares what a row says that `up` finds. Returns the disks and whether the header is detached.
    fn prepare(&self, row: &str, column: Column) -> (Disks, bool) {
        let of_array = if column == Column::Lasting { Column::Replaceable } else { column };
        let ext4 = || self.ext4();
        match row {
            "a blank disk" => self.blank(ONE),
            "what an interrupted start has left" => {
                self.noise("disk");
                self.write("disk", b"nbdcrypt: unfinished format\n");
            }
            "the mark of an ephemeral volume" => self.made(Column::Ephemeral, ONE, false),
            "noise: ciphertext without a header" => self.noise("disk"),
            "a volume with keyslots, and its key" => self.made(Column::Lasting, ONE, false),
            "a volume with keyslots, and another key" => {
                self.made(Column::Lasting, ONE, false);
                fs::write(self.path("other"), [b'x'; 40]).unwrap();
            }
            "a header that has lost its keyslots (`cryptsetup luksErase`)" => {
                self.made(Column::Lasting, ONE, false);
                self.shell("cryptsetup luksErase -q disk");
            }
            "a filesystem" => self.write("disk", &ext4()),
            "a partition table" => {
                let mut table = vec![0; 1024];
                table[512..520].copy_from_slice(b"EFI PART");
                self.write("disk", &table);
            }
            "plaintext without a signature" => self.write("disk", &b"name,amount\nEve,17\n".repeat(4096)),
            "a disk of an ephemeral volume's array, alone" => {
                self.made(of_array, TWO, false);
                fs::rename(self.path("b"), self.path("disk")).unwrap();
            }
            "a detached header is missing, the disk is blank" => return self.blank_with_header(None),
            "a detached header is missing, the disk reads as noise" => self.noise("disk"),
            "a detached header is missing, the disk has a filesystem" => self.write("disk", &ext4()),
            "a detached header is a mark, the disk is blank" => {
                return self.blank_with_header(Some(Column::Ephemeral));
            }
            "a detached header is a mark, the disk reads as noise" => self.made(Column::Ephemeral, ONE, true),
            "a detached header is a mark, the disk has a filesystem" => {
                self.made(Column::Ephemeral, ONE, true);
                self.write("disk", &ext4());
            }
            "a detached header has keyslots, the disk is blank" => {
                return self.blank_with_header(Some(Column::Lasting));
            }
            "a detached header has keyslots, the disk is not its disk" => {
                self.made(Column::Lasting, ONE, true);
                self.noise("disk");
            }
            "several blank disks" => self.blank(TWO),
            "the array of an ephemeral volume" => self.made(Column::Ephemeral, TWO, false),
            "an array with a volume with keyslots, and its key" => self.made(Column::Replaceable, TWO, false),
            "an ephemeral array of which half of the disks are blank" => {
                self.made(of_array, TWO, false);
                // The first disk has the volume's header, the other one has none.
                self.blank(&[if column == Column::Replaceable { "b" } else { "a" }]);
            }
            "an ephemeral array of which a disk reads as noise" => {
                self.made(of_array, TWO, false);
                self.noise("a");
            }
            "an ephemeral array, one disk of which was another ephemeral volume" => {
                self.made(Column::Ephemeral, ONE, false);
                self.made(of_array, TWO, false);
                fs::rename(self.path("disk"), self.path("a")).unwrap();
            }
            "an ephemeral array, and one disk has a filesystem" => {
                self.made(of_array, TWO, false);
                self.write("b", &ext4());
            }
            "an ephemeral array without one of its disks" => {
                self.blank(&["c"]);
                self.made(of_array, &["a", "b", "c"], false);
            }
            "disks of two ephemeral arrays" => {
                self.made(of_array, TWO, false);
                fs::rename(self.path("b"), self.path("kept")).unwrap();
                self.made(of_array, TWO, false);
                fs::rename(self.path("kept"), self.path("b")).unwrap();
            }
            "an array that is not ephemeral, half of the disks are blank" => {
                self.made(Column::Lasting, TWO, false);
                self.blank(&["b"]);
            }
            "several disks that read as noise" => TWO.iter().for_each(|disk| self.noise(disk)),
            other => panic!("no test prepares the row `{other}`"),
        }
        let disks = if self.path("a").exists() && !self.path("disk").exists() { TWO } else { ONE };
        (disks, row.starts_with("a detached header"))
    }

    fn blank_with_header(&self, header: Option<Column>) -> (Disks, bool) {
        if let Some(column) = header {
            self.made(column, ONE, true);
        }
        self.blank(ONE);
        (ONE, true)
    }
}

fn walk(column: Column) {
    let rows = rows(column);
    assert!(rows.len() >= 30, "{rows:?}");
    for (row, outcome) in rows {
        let machine = Machine::new();
        let (disks, header) = machine.prepare(row, column);
        let key = if machine.path("other").exists() { "other" } else { "key" };
        machine.configure_as(column, disks, header, key);
        let case = format!("{row}, {column:?}");
        if outcome == "refused" {
            let named = |said: &str| {
                disks.iter().chain(&["header"]).any(|name| said.contains(machine.path(name).to_str().unwrap()))
            };
            let before = machine.everything();
            let output = machine.on_config("up");
            assert_eq!(output.status.code(), Some(1), "{case}: {}", told(&output));
            assert!(named(&told(&output)), "{case}: {}", told(&output));
            assert!(machine.everything() == before, "{case}: something was changed: {}", told(&output));
            machine.assert_nothing_left();
            continue;
        }
        let output = machine.on_config("up");
        assert!(output.status.success(), "{case}: {}", told(&output));
        let made = match outcome {
            "new" => serde_json::json!("volume"),
            "a new filesystem" => serde_json::json!("filesystem"),
            "opened" => serde_json::Value::Null,
            other => panic!("{case}: `{other}` is no outcome"),
        };
        assert_eq!(machine.status()["made"], made, "{case}: {}", told(&output));
        assert_eq!(machine.path("mnt/file").exists(), outcome == "opened", "{case}");
        machine.down();
        machine.assert_nothing_left();
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and cryptsetup: run `make test`")]
fn the_table_holds_for_keys_in_memory() {
    walk(Column::Ephemeral);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and cryptsetup: run `make test`")]
fn the_table_holds_for_disks_that_may_be_lost() {
    walk(Column::Replaceable);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and cryptsetup: run `make test`")]
fn the_table_holds_for_volumes_that_last() {
    walk(Column::Lasting);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and cryptsetup: run `make test`")]
fn cryptsetup_shows_the_mark_and_each_start_replaces_it() {
    let machine = Machine::new();
    machine.blank(ONE);
    machine.configure_as(Column::Ephemeral, ONE, false, "key");
    let uuid = || {
        machine.shell("cryptsetup isLuks --type luks2 disk");
        let dump = harness::luks::run("cryptsetup", [Path::new("luksDump"), &machine.path("disk")]);
        let keyslots = dump.split("Keyslots:").nth(1).unwrap().split("Tokens:").next().unwrap();
        assert!(keyslots.trim().is_empty() && dump.contains("nbdcrypt ephemeral"), "{dump}");
        machine.shell("cryptsetup luksUUID disk")
    };
    let output = machine.on_config("up");
    assert!(output.status.success() && told(&output).contains("all data in it is lost"), "{}", told(&output));
    let first = uuid();
    let status = machine.status();
    assert_eq!((&status["made"], &status["volume"]["key-bits"]), (&"volume".into(), &512.into()), "{status}");
    assert_eq!(status["key"]["source"], "ephemeral", "{status}");
    write_and_sync(&machine.path("mnt/file"), b"here");
    // The server dies, and with it the key.
    kill_process(machine.server(), Signal::KILL).unwrap();
    assert!(wait_for(|| machine.status()["condition"] == "dead"));
    machine.up();
    assert!(uuid() != first && !machine.path("mnt/file").exists());
    machine.down();
    // Nothing opens it, and the errors say why.
    for (args, words) in [
        (&["key", "test", "--key-file", "key", "disk"][..], "the volume is ephemeral"),
        (&["serve", "--key-file", "key", "--socket", "socket", "disk"], "the volume is ephemeral"),
        (&["key", "verify", "scratch.toml"], "there is no secret to verify"),
        (&["provision", "scratch.toml"], "there is nothing to provision"),
        (&["policy", "scratch.toml"], "no policy is needed"),
    ] {
        let output = machine.command(args).current_dir(machine.folder.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", told(&output));
        assert!(told(&output).contains(words), "{args:?}: {}", told(&output));
    }
    let plan = told(&machine.on_config("plan"));
    let volume = "which holds the mark of an earlier ephemeral volume; its key exists in memory only";
    assert!(plan.contains("make a random key") && plan.contains(volume), "{plan}");
    machine.assert_nothing_left();
}
