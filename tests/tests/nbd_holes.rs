//! Tests holes with the programs that make them and ask for them. The exports are plaintext and encrypted, on tmpfs and in
//! a file on a disk, with both kinds of session.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use engine::sector::SectorSize;
use engine::store::{Access, BlockStore, BusErrorsCaught, Caching, FileStore};
use engine::volume::Volume;
use harness::luks::run;
use harness::nbd::{TestServer, encrypted};
use nbd_server::{Export, SessionKind};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
const BLOCK: u64 = 4096;
const EXPORTS: [&str; 4] = ["plain-memory", "plain-file", "cipher-memory", "cipher-file"];

/// What block status says about an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Data,
    /// A hole whose content is undefined.
    Hole,
    HoleOfZeroes,
}
use State::{Data, Hole, HoleOfZeroes};

impl State {
    fn told(hole: bool, zero: bool) -> Self {
        match (hole, zero) {
            (false, false) => Data,
            (true, false) => Hole,
            (true, true) => HoleOfZeroes,
            (false, true) => panic!("the server reports allocated zeros, which it never should"),
        }
    }
}

/// The length and state of each extent, in order.
type Map = Vec<(u64, State)>;

/// Makes a sparse file. On tmpfs the store maps it, as nbdcrypt does. Elsewhere the store uses direct I/O.
fn sparse(place: &Path) -> Arc<FileStore> {
    let file = tempfile::NamedTempFile::new_in(place).unwrap();
    file.as_file().set_len(SIZE).unwrap();
    // The file's name may be removed: the store keeps the file open.
    let store = FileStore::open(file.path(), Access::ReadWrite, Caching::Direct).unwrap();
    Arc::new(store.mapped(BusErrorsCaught::new().unwrap()))
}

/// Starts a server with each of [`EXPORTS`]. Each is one large hole.
fn server(session: SessionKind) -> TestServer {
    TestServer::on(
        session,
        EXPORTS.map(|name| {
            let place = if name.ends_with("memory") { "/dev/shm" } else { env!("CARGO_TARGET_TMPDIR") };
            let store = sparse(Path::new(place));
            assert_eq!(store.is_mapped(), name.ends_with("memory"));
            let volume = match name.starts_with("plain") {
                true => Volume::plaintext(store, SectorSize::B4096).unwrap(),
                false => encrypted(store, SectorSize::B4096),
            };
            Export::new(name, Arc::new(volume))
        }),
    )
}

/// Runs these qemu-io commands one after the other.
fn qemu_io(uri: &str, commands: &[&str]) {
    let mut arguments = vec!["-f", "raw", "-d", "unmap"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(uri);
    let said = run("qemu-io", &arguments);
    // qemu-io exits with success even if a request failed.
    assert!(!said.contains("failed") && said.matches(" ops; ").count() == commands.len(), "{commands:?}: {said}");
}

/// Returns the map that `nbdinfo --map` prints.
fn nbdinfo_map(uri: &str) -> Map {
    let told: serde_json::Value = serde_json::from_str(&run("nbdinfo", ["--map", "--json", uri])).unwrap();
    let told = told.as_array().unwrap().iter();
    let mut end = 0;
    let told = told.map(|extent| {
        assert_eq!(extent["offset"], end);
        let (len, flags) = (extent["length"].as_u64().unwrap(), extent["type"].as_u64().unwrap());
        end += len;
        (len, State::told(flags & 1 != 0, flags & 2 != 0))
    });
    told.collect()
}

/// Returns the map that `qemu-img map` prints.
fn qemu_img_map(uri: &str) -> Map {
    let told = run("qemu-img", ["map", "--output=json", "-f", "raw", uri]);
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    let told = told.as_array().unwrap().iter();
    let mut end = 0;
    let told = told.map(|extent| {
        assert_eq!(extent["start"], end);
        let len = extent["length"].as_u64().unwrap();
        end += len;
        (len, State::told(extent["data"] == false, extent["zero"] == true))
    });
    told.collect()
}

/// Checks the holes that trims and zero writes leave.
fn nbdinfo_and_qemu_img_map_the_same_holes(session: SessionKind) {
    let server = server(session);
    for name in EXPORTS {
        let uri = server.uri(name);
        // In an encrypted export, the content of a hole is undefined, and zeros are written as data.
        let is_plain = name.starts_with("plain");
        let (hole, zeroes) = if is_plain { (HoleOfZeroes, HoleOfZeroes) } else { (Hole, Data) };
        let map = |expected: &[(u64, State)], when: &str| {
            let mut joined = Map::new();
            for (len, state) in expected {
                match joined.last_mut() {
                    Some((last, same)) if same == state => *last += len,
                    _ => joined.push((*len, *state)),
                }
            }
            assert_eq!(nbdinfo_map(&uri), joined, "{name}, {when}");
            assert_eq!(qemu_img_map(&uri), joined, "{name}, {when}");
        };
        map(&[(SIZE, hole)], "new");
        qemu_io(&uri, &["write -P 0x5a 0 8M"]);
        map(&[(SIZE, Data)], "written");
        qemu_io(&uri, &["discard 1M 1M", "write -z -u 3M 1M", "write -z 5M 1M", "discard 6295456 128k"]);
        let rest = 2 * MIB - 32 * BLOCK;
        // Only whole blocks of a trimmed range become holes. Zeros are written as data if no hole is allowed.
        let trimmed = [
            (MIB, Data),
            (MIB, hole),
            (MIB, Data),
            (MIB, zeroes),
            (2 * MIB + BLOCK, Data),
            (31 * BLOCK, hole),
            (rest, Data),
        ];
        map(&trimmed, "with holes");
        qemu_io(&uri, &["read -P 0 3M 1M", "read -P 0 5M 1M", "read -P 0x5a 6M 4k", "read -P 0x5a 6422528 1534k"]);
        if is_plain {
            qemu_io(&uri, &["read -P 0 1M 1M", "read -P 0 6295552 124k"]);
        }
        qemu_io(&uri, &["write -P 0x33 1536k 64k", "write -P 0x33 3145729 1"]);
        let written = [
            (MIB, Data),
            (MIB / 2, hole),
            (16 * BLOCK, Data),
            (MIB / 2 - 16 * BLOCK, hole),
            (MIB + BLOCK, Data),
            (MIB - BLOCK, zeroes),
            (2 * MIB + BLOCK, Data),
            (31 * BLOCK, hole),
            (rest, Data),
        ];
        map(&written, "written to again");
    }
}

/// Copies in and out over four connections are equal, and plaintext exports keep their holes.
fn nbdcopy_keeps_the_data_and_the_holes_of_plaintext(session: SessionKind) {
    let server = server(session);
    let path = |name: &str| server.directory().join(name).to_str().unwrap().to_owned();
    let (image, copied, converted) = (path("image"), path("copied"), path("converted"));
    // Two ranges of data. The second one begins and ends within a block.
    let file = fs::File::create(&image).unwrap();
    file.set_len(SIZE).unwrap();
    let data: Vec<u8> = (0..MIB).map(|at| (at % 251).to_le_bytes()[0] | 1).collect();
    file.write_all_at(&data, MIB).unwrap();
    file.write_all_at(&data[..300_001], 4 * MIB + 777).unwrap();
    let image_bytes = fs::read(&image).unwrap();
    for (name, export) in EXPORTS.into_iter().zip(server.server().exports().all()) {
        let uri = server.uri(name);
        let is_plain = name.starts_with("plain");
        let read_all = || {
            let mut client = server.connect();
            client.enter(name);
            client.read(0, u32::try_from(SIZE).unwrap()).unwrap()
        };
        let connected = || export.statistics().snapshot().connections_total;
        qemu_io(&uri, &["write -P 0x5a 0 8M"]);

        let before = connected();
        run("nbdcopy", ["--threads=4", "--connections=4", "--request-size=65536", &image, &uri]);
        assert_eq!(connected() - before, 4, "nbdcopy opens four connections because of NBD_FLAG_CAN_MULTI_CONN");
        assert!(read_all() == image_bytes, "{name}");
        let holes: u64 = nbdinfo_map(&uri).iter().filter(|(_, state)| *state == HoleOfZeroes).map(|(len, _)| len).sum();
        let data_blocks = MIB + 74 * BLOCK;
        assert_eq!(if is_plain { SIZE - data_blocks } else { 0 }, holes, "{name}");

        // A hole of an encrypted export does not read as zeros. It is copied as data.
        qemu_io(&uri, &["discard 1536k 2M"]);
        let now = read_all();
        assert!(now != image_bytes, "{name}");
        for file in [&copied, &converted] {
            let before = connected();
            match file == &copied {
                true => run("nbdcopy", ["--threads=4", "--connections=4", "--request-size=65536", &uri, file]),
                false => run("qemu-img", ["convert", "-f", "raw", "-O", "raw", "-m", "16", "-W", &uri, file]),
            };
            assert!(file == &converted || connected() - before == 4);
            assert!(fs::read(file).unwrap() == now, "{name}: {file}");
            let kept = fs::metadata(file).unwrap().blocks() * 512;
            assert!(if is_plain { kept < 2 * MIB } else { kept > 2 * MIB }, "{name}: {file} takes {kept} bytes");
            fs::remove_file(file).unwrap();
        }
    }
}

harness::on_both_sessions! {
    #[cfg_attr(not(feature = "interop"), ignore = "needs nbdinfo, qemu-img and qemu-io: run `make test`")]
    nbdinfo_and_qemu_img_map_the_same_holes,
    #[cfg_attr(not(feature = "interop"), ignore = "needs nbdcopy, nbdinfo, qemu-img and qemu-io: run `make test`")]
    nbdcopy_keeps_the_data_and_the_holes_of_plaintext,
}
