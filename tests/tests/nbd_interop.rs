//! Other projects' NBD clients, each with an encrypted volume on a unix socket.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use engine::sector::SectorSize;
use engine::store::{Access, Caching, FileStore, MemoryStore};
use engine::volume::Volume;
use harness::luks::try_run;
use harness::nbd::{TestServer, connect, encrypted};
use harness::nbdcrypt::told;
use nbd_server::{Export, SessionKind};

const SIZE: u64 = 64 << 20;

/// Starts a server with volumes in files, one with direct I/O and one without, and a volume in memory.
fn server_on(session: SessionKind) -> TestServer {
    let memory = Arc::new(MemoryStore::zeroed(16 << 20));
    let memory = Export::new("memory", Arc::new(encrypted(memory, SectorSize::B512)));
    TestServer::on(session, [file_export("disk", Caching::Direct), memory.described("a disk in memory").read_only()])
}

fn file_export(name: &str, caching: Caching) -> Export {
    // The target folder lies on a real disk, unlike tmpfs, which is memory.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(SIZE).unwrap();
    // The file's name may be removed: the store keeps the file open.
    let store = FileStore::open(file.path(), Access::ReadWrite, caching).unwrap();
    let volume = Arc::new(encrypted(Arc::new(store), SectorSize::B4096));
    // Unwritten sectors would read as noise, and clients may differ in what they skip.
    volume.write_zeroes(0, SIZE, false).unwrap();
    Export::new(name, volume).described("a disk in a file")
}

/// Runs a program and returns its standard output.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {program}: {error}; `make test` installs it"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout
}

/// Makes a file of the disk's size, with different data and holes all over.
fn image(directory: &Path) -> PathBuf {
    let path = directory.join("image");
    let mut file = File::create(&path).unwrap();
    file.set_len(SIZE).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for megabyte in (0..SIZE >> 20).filter(|megabyte| megabyte % 5 != 3) {
        let data: Vec<u8> = (0..1 << 17)
            .flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            })
            .collect();
        file.seek(SeekFrom::Start(megabyte << 20)).unwrap();
        file.write_all(&data).unwrap();
    }
    path
}

fn same(one: &Path, other: &Path) -> bool {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    File::open(one).unwrap().read_to_end(&mut a).unwrap();
    File::open(other).unwrap().read_to_end(&mut b).unwrap();
    a == b
}

fn nbdinfo_shows_the_exports_correctly(session: SessionKind) {
    let server = server_on(session);
    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &server.uri("disk")])).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], SIZE);
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_preferred"], 4096);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    for (flag, expected) in [
        ("is_read_only", false),
        ("is_rotational", false),
        ("can_flush", true),
        ("can_fua", true),
        ("can_trim", true),
        ("can_zero", true),
        ("can_fast_zero", true),
        ("can_cache", true),
        ("can_multi_conn", true),
    ] {
        assert_eq!(export[flag], expected, "{flag}");
    }
    let list: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", &["--json", "--list", &server.uri("")])).unwrap();
    let exports = list["exports"].as_array().unwrap();
    let told: Vec<_> =
        exports.iter().map(|export| (export["export-name"].clone(), export["description"].clone())).collect();
    assert_eq!(
        told,
        [("disk".into(), "a disk in a file".into()), ("memory".into(), "a disk in memory".into())]
            as [(serde_json::Value, serde_json::Value); 2]
    );
    assert_eq!(exports[1]["is_read_only"], true);
    assert_eq!(exports[1]["can_trim"], false);
}

fn nbdcopy_copies_both_ways_over_several_connections(session: SessionKind) {
    let server = server_on(session);
    let image = image(server.directory());
    let back = server.directory().join("back");
    for options in
        [&["--threads=4", "--connections=4", "--requests=64"][..], &["--connections=1"], &["--request-size=33554432"]]
    {
        let uri = server.uri("disk");
        run("nbdcopy", &[options, &["--flush", image.to_str().unwrap(), &uri]].concat());
        run("nbdcopy", &[options, &[&uri, back.to_str().unwrap()]].concat());
        assert!(same(&image, &back), "{options:?}");
        std::fs::remove_file(&back).unwrap();
    }
}

fn qemu_io_reads_back_the_patterns_it_wrote(session: SessionKind) {
    let server = server_on(session);
    let out = run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 0x11 0 1M",
            "-c",
            "write -P 0x22 -f 4097 511",
            "-c",
            "aio_write -P 0x33 1M 2M",
            "-c",
            "aio_write -P 0x44 3M 2M",
            "-c",
            "aio_flush",
            "-c",
            "write -z 64k 128k",
            "-c",
            "write -z -u 512k 4k",
            "-c",
            "discard 6M 1M",
            "-c",
            "flush",
            "-c",
            "read -P 0x11 0 4097",
            "-c",
            "read -P 0x22 4097 511",
            "-c",
            "read -P 0x11 4608 60928",
            "-c",
            "read -P 0 64k 128k",
            "-c",
            "read -P 0 512k 4k",
            "-c",
            "read -P 0x33 1M 2M",
            "-c",
            "read -P 0x44 3M 2M",
            &server.uri("disk"),
        ],
    );
    // qemu-io exits with success even if a pattern differs.
    assert!(!out.contains("Pattern verification failed") && !out.contains("failed:"), "{out}");
    assert_eq!(out.matches("read ").count(), 7, "{out}");
}

fn qemu_img_converts_compares_and_benches(session: SessionKind) {
    let server = server_on(session);
    let uri = server.uri("disk");
    let image = image(server.directory());
    let image = image.to_str().unwrap();
    let info: serde_json::Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", &uri])).unwrap();
    assert_eq!(info["virtual-size"], SIZE);
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", image, &uri]);
    assert!(run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image, &uri]).contains("identical"));
    let copy = server.directory().join("copy.qcow2");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, copy.to_str().unwrap()]);
    assert!(run("qemu-img", &["compare", image, copy.to_str().unwrap()]).contains("identical"));
    run("qemu-img", &["bench", "-f", "raw", "-c", "5000", "-d", "64", &uri]);
    let writes = ["bench", "-f", "raw", "-w", "-c", "5000", "-d", "64", "--flush-interval=100", "--pattern=7", &uri];
    run("qemu-img", &writes);
}

/// qemu supports extended headers from 8.2 on. libnbd supports them from 1.18 on, which Debian 12 does not ship.
fn qemu_zeroes_6_gib_with_one_request_and_extended_headers(session: SessionKind) {
    const HUGE: u64 = 6 << 30;
    let huge = || {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.as_file().set_len(HUGE).unwrap();
        Arc::new(FileStore::open(file.path(), Access::ReadWrite, Caching::Direct).unwrap())
    };
    let plain = Export::new("plain", Arc::new(Volume::plaintext(huge(), SectorSize::B4096).unwrap()));
    let server =
        TestServer::on(session, [plain, Export::new("cipher", Arc::new(encrypted(huge(), SectorSize::B4096)))]);
    let qemu_io = |export: &str, commands: &[&str]| {
        let uri = server.uri(export);
        let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
        let output =
            try_run("qemu-io", [&["-T", "nbd_*", "-d", "unmap", "-f", "raw"], &commands[..], &[&uri]].concat());
        let said = told(&output);
        assert!(output.status.success() && !said.contains("failed"), "{said}");
        assert!(said.contains("Received option reply 11 (extended headers), type 1 (ack)"), "{said}");
        said
    };
    let lengths = |export| {
        let told = run("qemu-img", &["map", "--output=json", "-f", "raw", &server.uri(export)]);
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let told = told.as_array().unwrap().iter();
        told.map(|extent| (extent["length"].as_u64().unwrap(), extent["data"] == true)).collect::<Vec<_>>()
    };
    for export in ["plain", "cipher"] {
        let write = ["write -P 7 1G 64k", "write -P 8 5G 64k", "read -P 7 1G 64k", "read -P 8 5G 64k", "map"];
        let said = qemu_io(export, &write);
        assert!(said.contains(".from = 5368709120, .len = 65536"), "{said}");
        assert!(said.contains(".from = 0, .len = 6442450944, .cookie = 1, .flags = 0x8, .type = 7 (block"), "{said}");
        let data = (64 << 10, true);
        let holes = [1 << 30, (4 << 30) - (64 << 10), (1 << 30) - (64 << 10)].map(|len| (len, false));
        assert_eq!(lengths(export), [holes[0], data, holes[1], data, holes[2]], "{export}");
    }
    // `-n` is NBD_CMD_FLAG_FAST_ZERO, which only a plaintext disk supports.
    let said = qemu_io("plain", &["write -z -u -n 0 6G", "read -P 0 1G 64k", "read -P 0 5G 64k"]);
    assert!(
        said.contains(".from = 0, .len = 6442450944, .cookie = 1, .flags = 0x11, .type = 6 (write zeroes)"),
        "{said}"
    );
    assert_eq!(said.matches("(write zeroes)").count(), 1, "{said}");
    assert_eq!(lengths("plain"), [(HUGE, false)]);
}

fn fio_verifies_what_it_wrote(session: SessionKind) {
    let server = server_on(session);
    let uri = format!("--uri={}", server.uri("disk"));
    for job in [
        &["--rw=randrw", "--bs=4k", "--iodepth=32"][..],
        &["--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned", "--iodepth=16", "--verify_async=1"],
        &["--rw=write", "--bs=1m", "--iodepth=16"],
        &["--rw=randtrim", "--bs=64k", "--iodepth=8"],
    ] {
        let always = ["--name=verify", "--ioengine=nbd", &uri, "--size=64M", "--io_size=48M", "--randseed=7"];
        let verify: &[&str] = if job[0].contains("trim") {
            &[]
        } else {
            &["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--do_verify=1"]
        };
        run("fio", &[&always[..], verify, job].concat());
    }
}

fn libnbd_in_python_finds_the_promised_features(session: SessionKind) {
    let script = r#"
import errno, nbd, sys
h = nbd.NBD()
h.set_strict_mode(0)              # Let the server say no.
h.connect_uri(sys.argv[1])
size = h.get_size()
assert h.get_protocol() == "newstyle-fixed", h.get_protocol()
assert h.can_multi_conn() and h.can_fua() and h.can_flush() and h.can_zero() and h.can_trim()
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20

def fails(number, call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        assert error.errnum == number, (error, number)
    else:
        raise AssertionError("%r of %r did not fail" % (call, args))

fails(errno.ENOSPC, h.pwrite, b"x" * 512, size)
fails(errno.EINVAL, h.pread, 512, size - 511)
fails(errno.EINVAL, h.trim, 512, size)
fails(errno.ENOTSUP, h.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO)
fails(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_REQ_ONE)

h.pwrite(b"unaligned" * 1000, 12345, nbd.CMD_FLAG_FUA)
assert h.pread(9000, 12345) == b"unaligned" * 1000
h.zero(5000, 12400, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(5000, 12400) == bytes(5000)
h.flush()

# A read that must not be fragmented is one chunk, however long it is.
assert h.get_structured_replies_negotiated() and h.can_df()
for offset, count in [(0, 32 << 20), (12345, 5 << 20), (size - 1, 1)]:
    chunks = []
    def chunk(data, at, status, error):
        chunks.append((at, len(data), status, error.value))
    data = h.pread_structured(count, offset, chunk, nbd.CMD_FLAG_DF)
    assert chunks == [(offset, count, nbd.READ_DATA, 0)], chunks
    assert data == h.pread(count, offset)

# Many requests at once: each is answered once, in any order.
done = []
buffers = [nbd.Buffer.from_bytearray(bytearray([n]) * 4096) for n in range(64)]
for n, buffer in enumerate(buffers):
    h.aio_pwrite(buffer, n * 4096, completion=lambda error, n=n: done.append((n, error.value)) or 1)
while len(done) < 64:
    h.poll(-1)
assert sorted(done) == [(n, 0) for n in range(64)], done
for n in range(64):
    assert h.pread(4096, n * 4096) == bytes([n]) * 4096
h.shutdown()

names = []
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(sys.argv[2])
h.opt_list(lambda name, description: names.append(name))
assert names == ["disk", "memory"], names
h.set_export_name("nowhere")
fails(errno.ENOENT, h.opt_go)     # The handshake goes on.
h.set_export_name("memory")
h.opt_go()
assert h.is_read_only()
h.set_strict_mode(0)
fails(errno.EPERM, h.pwrite, b"x" * 512, 0)
h.shutdown()
print("all well")
"#;
    let server = server_on(session);
    // This is Debian's own Python, because the module libnbd is a Debian package.
    let out = run("/usr/bin/python3", &["-c", script, &server.uri("disk"), server.socket().to_str().unwrap()]);
    assert_eq!(out, "all well\n");
}

fn the_crate_nbd_reads_and_writes(session: SessionKind) {
    let server = TestServer::on(session, [file_export("disk", Caching::PageCache)]);
    let mut stream = connect(&server.socket());
    let export = nbd::client::handshake(&mut stream, b"disk").unwrap();
    assert_eq!(export.size, SIZE);
    let mut client = nbd::client::NbdClient::new(stream, &export);
    client.seek(SeekFrom::Start(100_001)).unwrap();
    client.write_all(b"sent by a client with only NBD_OPT_EXPORT_NAME").unwrap();
    client.flush().unwrap();
    client.seek(SeekFrom::Start(100_001)).unwrap();
    let mut back = [0; 46];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"sent by a client with only NBD_OPT_EXPORT_NAME");
    assert!(nbd::client::handshake(&mut connect(&server.socket()), b"nowhere").is_err());
}

harness::on_both_sessions! {
    #[cfg_attr(not(feature = "interop"), ignore = "needs libnbd's nbdinfo: run `make test`")]
    nbdinfo_shows_the_exports_correctly,
    #[cfg_attr(not(feature = "interop"), ignore = "needs libnbd's nbdcopy: run `make test`")]
    nbdcopy_copies_both_ways_over_several_connections,
    #[cfg_attr(not(feature = "interop"), ignore = "needs qemu-io: run `make test`")]
    qemu_io_reads_back_the_patterns_it_wrote,
    #[cfg_attr(not(feature = "interop"), ignore = "needs qemu-img: run `make test`")]
    qemu_img_converts_compares_and_benches,
    #[cfg_attr(not(feature = "interop"), ignore = "needs qemu-io, 8.2 or later: run `make test`")]
    qemu_zeroes_6_gib_with_one_request_and_extended_headers,
    #[cfg_attr(not(feature = "interop"), ignore = "needs fio with its nbd engine: run `make test`")]
    fio_verifies_what_it_wrote,
    #[cfg_attr(not(feature = "interop"), ignore = "needs python3-libnbd: run `make test`")]
    libnbd_in_python_finds_the_promised_features,
    the_crate_nbd_reads_and_writes,
}
