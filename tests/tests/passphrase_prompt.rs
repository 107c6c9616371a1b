//! Passphrases typed at a terminal: nbdcrypt asks for them if no file is named, and does not show them.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use harness::luks::{Workbench, unlock};
use harness::nbdcrypt;

const QUICK: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

/// nbdcrypt at a terminal of its own, which script(1) provides.
struct Session {
    script: Child,
    seen: String,
}

impl Session {
    fn start(bench: &Workbench, arguments: &[&str]) -> Self {
        let command = format!("{} {}", nbdcrypt::binary().display(), arguments.join(" "));
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--flush", "--command", &command, "/dev/null"]);
        script.current_dir(bench.path(".")).stdin(Stdio::piped()).stdout(Stdio::piped());
        Self { script: script.spawn().expect("script(1), of util-linux, is installed"), seen: String::new() }
    }

    /// Waits for the question and types the answer.
    fn answer(&mut self, question: &str, keys: &str) {
        let from = self.seen.len();
        let stdout = self.script.stdout.as_mut().unwrap();
        while !self.seen[from..].ends_with(question) {
            let mut byte = [0];
            assert_eq!(stdout.read(&mut byte).unwrap(), 1, "{question:?} was not asked: {}", self.seen);
            self.seen.push(char::from(byte[0]));
        }
        let stdin = self.script.stdin.as_mut().unwrap();
        stdin.write_all(keys.as_bytes()).unwrap();
        stdin.flush().unwrap();
    }

    /// Returns whether nbdcrypt succeeded, and everything that the terminal showed.
    fn end(mut self) -> (bool, String) {
        self.script.stdout.as_mut().unwrap().read_to_string(&mut self.seen).unwrap();
        (self.script.wait().unwrap().success(), std::mem::take(&mut self.seen))
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs script, cryptsetup: run `make test`")]
fn typed_passphrases_format_a_volume_and_manage_its_keys() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 20 << 20);
    let mut format = Session::start(&bench, &[&["format", "disk"], &QUICK[..]].concat());
    format.answer("New passphrase of disk: ", "first seX\x7fcret\r");
    format.answer("The same again: ", "first secret\r");
    let (done, shown) = format.end();
    assert!(done && !shown.contains("secret") && !shown.contains("sex"), "{shown}");
    assert_eq!(unlock(&disk, b"first secret").unwrap().keyslot, 0);

    let mut add = Session::start(&bench, &[&["key", "add", "disk"], &QUICK[..]].concat());
    add.answer("Passphrase of disk: ", "first secret\r");
    add.answer("New passphrase of disk: ", "second secret\r");
    add.answer("The same again: ", "second secret\r");
    let (done, shown) = add.end();
    assert!(done && shown.contains("keyslot 1") && !shown.contains("secret"), "{shown}");
    std::fs::write(bench.path("second"), "second secret").unwrap();
    assert!(bench.cryptsetup_opens("disk", "1", "second"));

    let mut change = Session::start(&bench, &[&["key", "change", "disk", "--key-file", "second"], &QUICK[..]].concat());
    change.answer("New passphrase of disk: ", "third secret\r");
    change.answer("The same again: ", "third secret\r");
    assert!(change.end().0);
    assert_eq!(unlock(&disk, b"third secret").unwrap().keyslot, 1);
    std::fs::write(bench.path("third"), "third secret").unwrap();

    let mut test = Session::start(&bench, &["key", "test", "disk"]);
    test.answer("Passphrase of disk: ", "third secret\r");
    let (done, shown) = test.end();
    assert!(done && shown.contains("the passphrase opens keyslot 1") && !shown.contains("secret"), "{shown}");
    // The keyslot's own passphrase is not enough: it opens no keyslot that remains.
    let question = "Passphrase of another keyslot of disk, which stays: ";
    for (typed, removed) in [("first secret\r", false), ("third secret\r", true)] {
        let mut kill = Session::start(&bench, &["key", "remove", "disk", "--key-slot", "0"]);
        kill.answer(question, typed);
        assert_eq!(kill.end().0, removed, "{typed:?}");
        assert_eq!(unlock(&disk, b"first secret").is_err(), removed);
    }
    bench.nbdcrypt(&[&["key", "add", "disk", "--key-file", "third", "--new-key-file", "second"], &QUICK[..]].concat());

    let mut remove = Session::start(&bench, &["key", "remove", "disk"]);
    remove.answer("Passphrase of disk: ", "third secret\r");
    assert!(remove.end().0);
    assert!(unlock(&disk, b"third secret").is_err());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs script: run `make test`")]
fn differing_empty_and_interrupted_answers_change_nothing() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 20 << 20);
    for (answers, words) in [
        (&["one secret\r", "another secret\r"][..], "not the same"),
        (&["\r"], "no passphrase was typed"),
        (&["half a sec\x03"], "interrupted"),
    ] {
        let mut format = Session::start(&bench, &[&["format", "disk"], &QUICK[..]].concat());
        for (question, answer) in ["New passphrase of disk: ", "The same again: "].into_iter().zip(answers) {
            format.answer(question, answer);
        }
        let (done, shown) = format.end();
        assert!(!done && shown.contains(words), "{shown}");
        assert!(std::fs::read(&disk).unwrap().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn without_a_terminal_the_error_names_the_option() {
    let bench = Workbench::new();
    bench.disk("disk", 20 << 20);
    bench.nbdcrypt(&[&["format", "disk", "--key-file", "key"], &QUICK[..]].concat());
    for (arguments, words) in [
        (&["key", "remove", "disk"][..], "no --key-file was given"),
        (&["key", "add", "disk", "--key-file", "key"], "no --new-key-file was given"),
        (&["serve", "disk", "--socket", "socket"], "no --key-file was given"),
        (&["key", "add", "disk", "--key-file", "-", "--new-key-file", "-"], "not to both"),
        (&["key", "change", "disk", "--key-file", "-", "--new-key-file", "-"], "not to both"),
    ] {
        let told = bench.refusal(arguments);
        assert!(told.contains(words), "{arguments:?}: {told}");
    }
}
