//! Tests of the packages: what `make packages` left in target/packages is installed, used and removed in a clean Debian.
//! `make test-packages` makes the packages and the clean Debian first.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use harness::architecture::top;
use harness::nbdcrypt::told;

/// The newest glibc that Amazon Linux 2023 has.
const NEWEST_GLIBC: (u32, u32) = (2, 34);

fn packages() -> PathBuf {
    top().join("target/packages")
}

/// Returns the one file in target/packages whose name ends like this.
fn package(end: &str) -> PathBuf {
    let all = fs::read_dir(packages()).expect("`make packages` was run");
    let mut found = all.map(|entry| entry.unwrap().path()).filter(|path| path.to_str().unwrap().ends_with(end));
    let package = found.next().unwrap_or_else(|| panic!("target/packages has no *{end}: run `make packages`"));
    assert_eq!(found.next(), None, "two packages end with {end}");
    package
}

/// Returns the programs that the packages hold.
fn programs() -> [PathBuf; 2] {
    ["nbdcrypt", "nbdcrypt-bench"].map(|name| packages().join("deb/usr/bin").join(name))
}

/// Runs a bash script, which must succeed, and returns what it wrote to standard output.
#[track_caller]
fn bash(script: &str, arguments: &[&Path]) -> String {
    let output = bash_output(script, arguments);
    assert!(output.status.success(), "{}", told(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn bash_output(script: &str, arguments: &[&Path]) -> Output {
    let mut bash = Command::new("bash");
    bash.args(["-euo", "pipefail", "-c", script, "bash"]).args(arguments).env("LC_ALL", "C.UTF-8");
    bash.output().expect("bash can be started")
}

/// A copy of the clean Debian, which a test may change.
struct Root {
    dir: tempfile::TempDir,
}

impl Root {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "only root can change into another root: run this as root");
        let clean = top().join("target/clean-root");
        assert!(clean.exists(), "there is no clean Debian: run tests/packages");
        let dir = tempfile::Builder::new().prefix("root-").tempdir_in(top().join("target")).unwrap();
        bash("cp -a \"$1/.\" \"$2\"", &[&clean, dir.path()]);
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Copies a package into the root, as /NAME.
    fn give(&self, package: &Path) {
        fs::copy(package, self.path().join(package.file_name().unwrap())).unwrap();
    }

    /// Runs a bash script in the root. Its processes and mounts end with it.
    fn output(&self, script: &str) -> Output {
        // The new mount namespace has a copy of every mount. A copy of another test's filesystem would keep its device in use.
        let enter = "awk -v own=\"$1\" '$5 ~ \"^/(tmp|run|dev/shm)/.*\" && index($5, own) != 1 { print $5 }' /proc/self/mountinfo |
                tac | while read -r copy; do umount -l \"$copy\" || true; done
            mount -t proc proc \"$1/proc\"; mount --rbind /dev \"$1/dev\"; mount --rbind /sys \"$1/sys\"
            mount -t tmpfs tmpfs \"$1/run\"
            exec chroot \"$1\" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \\
                DEBIAN_FRONTEND=noninteractive AWS_EC2_METADATA_DISABLED=true bash -euo pipefail -c \"$2\"";
        let mut inside = Command::new("unshare");
        inside.args(["--mount", "--pid", "--fork", "--kill-child", "bash", "-euc", enter, "bash"]);
        inside.arg(self.path()).arg(script).output().expect("unshare can be started")
    }

    /// Runs a bash script in the root, which must succeed, and returns all that it wrote to standard output.
    #[track_caller]
    fn run(&self, script: &str) -> String {
        let output = self.output(script);
        assert!(output.status.success(), "{script}\n{}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Returns the paths of all files and folders on the root filesystem, without the databases, logs and caches of package
    /// managers, and without /tmp and /root.
    fn files(&self) -> BTreeSet<String> {
        let list = self.run(
            "find / -xdev \\( -path /var/lib/dpkg -o -path /var/lib/rpm -o -path /var/lib/apt -o -path /var/log \
             -o -path /var/cache -o -path /tmp -o -path /root -o -name '*.deb' -o -name '*.rpm' \\) -prune -o -print",
        );
        list.lines().map(str::to_owned).collect()
    }
}

/// Returns the paths that the `.deb` and the `.rpm` install, without what only one kind has: licences, and zsh's folder.
fn installed(list: &str) -> BTreeSet<String> {
    let only_in_one = ["copyright", "changelog", "CHANGELOG", "/licenses/", "/lintian/", "/zsh/"];
    let path = |line: &str| line.trim_start_matches('.').trim_end_matches('/').to_owned();
    let paths = list.lines().map(path).filter(|path| !path.is_empty());
    paths.filter(|path| !only_in_one.iter().any(|part| path.contains(part))).collect()
}

#[test]
fn both_packages_hold_the_same_files() {
    let of_deb = bash("dpkg-deb --fsys-tarfile \"$1\" | tar -t | grep -v '/$'", &[&package(".deb")]);
    let of_rpm = bash("rpm -qpl \"$1\"", &[&package(".rpm")]);
    let (of_deb, of_rpm) = (installed(&of_deb), installed(&of_rpm));
    assert_eq!(of_deb, of_rpm);
    for path in ["/usr/bin/nbdcrypt", "/usr/bin/nbdcrypt-bench", "/etc/nbdcrypt/nbdcrypt.toml.example"] {
        assert!(of_deb.contains(path), "{path}");
    }
    for unit in fs::read_dir(top().join("packaging/systemd")).unwrap() {
        let name = unit.unwrap().file_name().into_string().unwrap();
        assert!(of_deb.iter().any(|path| path.ends_with(&format!("/{name}"))), "{name}");
    }
}

/// Amazon Linux 2023 runs the programs: they use no symbol of a newer glibc, and no library that is not part of it.
#[test]
fn programs_run_with_an_old_glibc() {
    for program in programs() {
        let symbols = bash("objdump -T \"$1\" | grep -o 'GLIBC_[0-9.]*' | sort -u", &[&program]);
        let versions = symbols.lines().map(|line| {
            let mut numbers = line["GLIBC_".len()..].split('.').map(|number| number.parse().unwrap());
            (numbers.next().unwrap(), numbers.next().unwrap_or(0))
        });
        let newest: (u32, u32) = versions.max().expect("the program uses the C library");
        assert!(newest <= NEWEST_GLIBC, "{} needs glibc {newest:?}", program.display());
        let libraries = bash("objdump -p \"$1\" | awk '$1 == \"NEEDED\" { print $2 }'", &[&program]);
        for library in libraries.lines() {
            let known = ["libc.so.6", "libm.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"];
            assert!(known.contains(&library), "{} needs {library}", program.display());
        }
    }
}

/// The programs carry no debug information and no path of the machine that built them. The debug files are beside them.
#[test]
fn programs_are_stripped_and_debug_files_lie_beside() {
    let debug = bash("tar -tf \"$1\"", &[&package("-debug.tar.xz")]);
    for program in programs() {
        let sections = bash("readelf -SW \"$1\"", &[&program]);
        assert!(!sections.contains(".debug_info") && !sections.contains(".symtab"), "{sections}");
        let id = bash("readelf -n \"$1\" | sed -n 's/.*Build ID: //p'", &[&program]);
        let file = format!(".build-id/{}/{}.debug", &id[..2], id[2..].trim());
        assert!(debug.contains(&file), "{file} is not among {debug}");
        let bytes = fs::read(&program).unwrap();
        for path in [top().to_str().unwrap(), "/.cargo/registry"] {
            let at = bytes.windows(path.len()).position(|window| window == path.as_bytes());
            assert_eq!(at, None, "{} contains {path}", program.display());
        }
    }
}

#[test]
fn man_pages_pass_mandocs_lint() {
    let pages = bash("find \"$1\" -name '*.[15].gz' | sort", &[&packages().join("deb/usr/share/man")]);
    assert!(pages.lines().count() > 30, "{pages}");
    for page in pages.lines() {
        // The pages have no date, so that the same source gives the same page. clap_mangen and roff leave empty paragraphs.
        let lint = bash("zcat \"$1\" | mandoc -T lint -W warning 2>&1 || true", &[Path::new(page)]);
        let said: Vec<_> =
            lint.lines().filter(|line| !line.contains("missing date") && !line.contains("paragraph macro")).collect();
        assert!(said.is_empty(), "{page}:\n{lint}");
    }
}

/// Each shell completes a command and an option, and offers no hidden command.
#[test]
fn completions_complete_in_each_shell() {
    let share = packages().join("deb/usr/share");
    let bash_says = bash(
        "source \"$1/bash-completion/completions/nbdcrypt\"
         COMP_WORDS=(nbdcrypt pro); COMP_CWORD=1; _nbdcrypt nbdcrypt pro nbdcrypt; echo \"${COMPREPLY[@]}\"
         COMP_WORDS=(nbdcrypt up --for); COMP_CWORD=2; _nbdcrypt nbdcrypt --for up; echo \"${COMPREPLY[@]}\"",
        &[&share],
    );
    assert_eq!(bash_says, "provision\n--foreground\n");
    let fish_says = bash(
        "fish --no-config -c \"source '$1/fish/vendor_completions.d/nbdcrypt.fish'
         complete -C 'nbdcrypt prov'; complete -C 'nbdcrypt up --fore'\"",
        &[&share],
    );
    assert!(fish_says.contains("provision") && fish_says.contains("--foreground"), "{fish_says}");
    bash("zsh -n \"$1/zsh/vendor-completions/_nbdcrypt\"", &[&share]);
    for shell in ["bash-completion/completions/nbdcrypt", "fish/vendor_completions.d/nbdcrypt.fish"] {
        let script = fs::read_to_string(share.join(shell)).unwrap();
        assert!(!script.contains("ask-aws"), "{shell} offers a hidden command");
    }
}

#[test]
fn the_deb_is_installed_used_and_removed() {
    let root = Root::new();
    root.give(&package(".deb"));
    let before = root.files();
    root.run("dpkg --install /*.deb");
    let version = root.run("nbdcrypt --version; nbdcrypt-bench --version");
    assert_eq!(version, format!("nbdcrypt {0}\nnbdcrypt-bench {0}\n", env!("CARGO_PKG_VERSION")));
    root.run("zcat /usr/share/man/man1/nbdcrypt-up.1.gz > /tmp/page.1; man -l /tmp/page.1 | grep foreground >&2");
    // The unit of a volume, as systemd reads it.
    root.run(
        "for unit in /usr/lib/systemd/system/nbdcrypt*; do
             name=${unit##*/}; systemd-analyze verify --man=no \"${name/@./@scratch.}\"
         done",
    );
    // Someone enables a volume and writes its configuration.
    root.run(
        "systemctl enable nbdcrypt@scratch.service nbdcrypt-serve@data.socket; echo mine > /etc/nbdcrypt/scratch.toml",
    );
    root.run("dpkg --remove nbdcrypt");
    root.run("test -e /etc/nbdcrypt/nbdcrypt.toml.example; ! test -e /usr/bin/nbdcrypt");
    root.run("dpkg --purge nbdcrypt");
    let mut left = root.files();
    // What the package did not bring may be a key or a header, so it stays.
    for path in ["/etc/nbdcrypt", "/etc/nbdcrypt/scratch.toml"] {
        assert!(left.remove(path), "{path} is gone");
    }
    assert_eq!(left.difference(&before).collect::<Vec<_>>(), [""; 0]);
    assert_eq!(before.difference(&left).collect::<Vec<_>>(), [""; 0]);
    // If the user left nothing, the folder goes too.
    root.run("rm -r /etc/nbdcrypt; dpkg --install /*.deb; dpkg --purge nbdcrypt; ! test -e /etc/nbdcrypt");
}

/// Installs the package anew under a mounted volume, then tries to remove it. Only `nbdcrypt down` takes the volume down.
#[test]
fn packages_leave_a_volume_that_is_up_alone() {
    let up = "
        printf '[volume]\\ndevices = [\"/root/disk\"]\\nsize = \"64M\"\\n[key]\\nsource = \"file\"\\n' > /etc/nbdcrypt/try.toml
        printf 'path = \"/root/key\"\\nrandom = true\\n[attach]\\nmethod = \"fuse\"\\n' >> /etc/nbdcrypt/try.toml
        printf '[filesystem]\\nmountpoint = \"/mnt/try\"\\nprotect-mountpoint = false\\n' >> /etc/nbdcrypt/try.toml
        (umask 077; head -c 32 /dev/urandom > /root/key)
        trap 'nbdcrypt down try || true' EXIT
        nbdcrypt up /etc/nbdcrypt/try.toml
        echo kept > /mnt/try/file";
    let down = "
        test \"$(cat /mnt/try/file)\" = kept; mountpoint -q /mnt/try
        nbdcrypt down try
        trap - EXIT";
    for (give, install, remove) in [
        (".deb", "dpkg --install /*.deb", "dpkg --remove nbdcrypt"),
        (".rpm", "rpm --nodeps --replacepkgs --replacefiles -i /*.rpm", "rpm -e nbdcrypt"),
    ] {
        let root = Root::new();
        root.give(&package(give));
        if give == ".rpm" {
            add_rpm(&root);
        }
        let said = root.run(&format!(
            "{install}{up}\n{install}\nif {remove} 2>/root/said; then echo gone; fi; cat /root/said{down}\n{remove}"
        ));
        assert!(!said.lines().any(|line| line == "gone"), "{said}");
        assert!(said.contains("is not removed, because these volumes are up") && said.contains("/mnt/try"), "{said}");
        root.run("! test -e /usr/bin/nbdcrypt");
    }
}

/// Copies this machine's rpm, with the libraries that it needs, into the clean Debian.
fn add_rpm(root: &Root) {
    bash(
        "for file in $(command -v rpm) $(ldd \"$(command -v rpm)\" | grep -o '/[^ ]*') $(find /usr/lib/*/rpm-plugins -type f); do
             install -D \"$file\" \"$1$(realpath -s \"$file\")\"
         done
         cp -a /usr/lib/rpm \"$1/usr/lib/\"; mkdir -p \"$1/var/lib/rpm\"",
        &[root.path()],
    );
}

#[test]
fn the_rpm_is_installed_used_and_removed() {
    let rpm = package(".rpm");
    let root = Root::new();
    // Every distribution with rpm has these folders.
    root.run("mkdir -p /usr/share/fish/vendor_completions.d /usr/share/licenses /usr/share/zsh/site-functions");
    let before = root.files();
    let needs = bash("rpm -qp --requires \"$1\"", &[&rpm]);
    assert!(needs.contains("libc.so.6(GLIBC_2.34)(64bit)") && needs.contains("util-linux"), "{needs}");
    assert!(bash("rpm -qp --configfiles \"$1\"", &[&rpm]).contains("/etc/nbdcrypt/nbdcrypt.toml.example"));
    // The clean Debian has no database of rpm, which would know the libraries.
    bash("rpm --root \"$1\" --nodeps -i \"$2\"", &[root.path(), &rpm]);
    assert_eq!(root.run("nbdcrypt --version"), format!("nbdcrypt {}\n", env!("CARGO_PKG_VERSION")));
    bash("rpm --root \"$1\" -V --nodeps nbdcrypt", &[root.path()]);
    root.run(
        "systemctl enable nbdcrypt@scratch.service nbdcrypt-serve@data.socket; echo mine > /etc/nbdcrypt/scratch.toml",
    );
    bash("rpm --root \"$1\" -e nbdcrypt", &[root.path()]);
    let mut left = root.files();
    for path in ["/etc/nbdcrypt", "/etc/nbdcrypt/scratch.toml"] {
        assert!(left.remove(path), "{path} is gone");
    }
    let is_of_rpm = |path: &&String| path.contains("rpm");
    let left: Vec<_> = left.difference(&before).filter(|path| !is_of_rpm(path)).collect();
    assert_eq!(left, [""; 0]);
}

/// `make install` and `make uninstall`, once with the default folders and once with others, into a folder for each.
#[test]
fn make_install_and_uninstall_leave_nothing() {
    for (prefix, etc) in [("", ""), ("PREFIX=/opt/nbdcrypt", "SYSCONFDIR=/opt/nbdcrypt/etc")] {
        let dir = tempfile::tempdir().unwrap();
        // Somebody else's folders and files stay.
        bash("mkdir -p \"$1/usr/local/share/man\" \"$1/opt/other\"; touch \"$1/opt/other/file\"", &[dir.path()]);
        let before = bash("find \"$1\" | sort", &[dir.path()]);
        let make = |what: &str| {
            let script = format!("make -s -C \"$2\" {what} DESTDIR=\"$1\" {prefix} {etc}");
            bash(&script, &[dir.path(), top()])
        };
        make("install");
        let folder = if prefix.is_empty() { "usr/local" } else { "opt/nbdcrypt" };
        bash(&format!("\"$1/{folder}/bin/nbdcrypt\" --version"), &[dir.path()]);
        if !prefix.is_empty() {
            let unit = format!("grep -rq '^ExecStart=@\\?/{folder}/bin/nbdcrypt ' \"$1/{folder}/lib/systemd/system\"");
            bash(&unit, &[dir.path()]);
        }
        // A second installation changes nothing, and one removal still removes everything.
        make("install");
        make("uninstall");
        assert_eq!(bash("find \"$1\" | sort", &[dir.path()]), before);
    }
}

#[test]
fn lintian_has_no_complaint() {
    let said = bash_output(
        "lintian --allow-root --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs \"$1\" 2>&1",
        &[&package(".deb")],
    );
    assert!(said.status.success(), "{}", told(&said));
}

/// Every library in the programs has its licence in the packages, and so has Rust's standard library.
#[test]
fn the_packages_hold_the_licences_of_the_libraries() {
    let folder = packages().join("deb/usr/share/doc/nbdcrypt/licences");
    let list = fs::read_to_string(folder.join("libraries.txt")).unwrap();
    assert!(fs::read_to_string(folder.join("rust-library.html")).unwrap().contains("The Rust Standard Library"));
    let in_programs = bash(
        "cd \"$1\"; cargo tree --locked -p nbdcrypt -p nbdcrypt-benches -e normal,no-proc-macro --prefix none -f '{p}' |
         sed -n '/ (\\//d; s/^\\([^ ]*\\) v\\([^ ]*\\).*/\\1 \\2/p' | sort -u",
        &[top()],
    );
    assert!(in_programs.lines().count() > 100, "{in_programs}");
    for library in in_programs.lines() {
        assert!(list.contains(&format!("\n\n{library}\n")), "{library}");
    }
}

/// The list of libraries is SPDX, and names what is in the programs and not what only builds or tests them.
#[test]
fn the_sbom_names_the_libraries() {
    let text = fs::read_to_string(package(".spdx.json")).unwrap();
    let sbom: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(sbom["spdxVersion"], "SPDX-2.3");
    let packages = sbom["packages"].as_array().unwrap();
    let has = |name: &str| packages.iter().any(|package| package["name"] == name);
    for name in ["nbdcrypt", "aes", "rustls", "aws-sdk-kms", "io-uring"] {
        assert!(has(name), "{name}");
    }
    assert!(!has("criterion") && !has("proptest"));
}
