//! Linux's own md RAID 0 and mdadm, and this program's arrays: each reads what the other makes and writes.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use engine::layout::ZoneLayout;
use engine::raid::{Array, NewArray, StripedStore, read_member, write_member};
use engine::store::{Access, BlockStore, Caching, FileStore};
use harness::kernel::Kernel;

/// `attach NAME...` makes a loop device of each file, `detach` ends them, and `assemble NAME...` starts the array of them.
const FUNCTIONS: &str = r#"
modprobe -a loop md-mod raid0
test -e /dev/md0 || mknod /dev/md0 b 9 0
attach() { loops=(); for file in "$@"; do loops+=("$(losetup --find --show "$file")"); done; }
detach() { mdadm --quiet --stop /dev/md0; losetup -d "${loops[@]}"; sync; }
assemble() { attach "$@"; mdadm --quiet --assemble --run /dev/md0 "${loops[@]}"; }
# `create NAME SIZES OPTIONS` makes an array of files with these sizes, and fills it with noise.
create() {
  files=()
  for size in $2; do file=$1.${#files[@]}; truncate -s "$size" "$file"; files+=("$file"); done
  attach "${files[@]}"
  mdadm --quiet --create /dev/md0 --run --metadata=1.2 --level=0 --raid-devices=${#files[@]} $3 "${loops[@]}"
  head -c "$(blockdev --getsize64 /dev/md0)" /dev/urandom > $1.data
  cp $1.data /dev/md0
  detach
}
"#;

/// The arrays of the tests: a name, the members' sizes in MiB, and mdadm's options.
const ARRAYS: [(&str, &[u64], &str); 5] = [
    ("two", &[24, 24], ""),
    ("eight", &[12, 12, 12, 12, 12, 12, 12, 12], "--chunk=64"),
    ("zones", &[24, 12, 18], "--chunk=64 --layout=original"),
    ("alternate", &[24, 12, 18, 18], "--chunk=4 --layout=alternate"),
    ("one", &[24], "--force"),
];

/// Opens the array of these disks, which are given last role first.
fn open(dir: &Path, name: &str, count: usize) -> (Array, StripedStore) {
    let disk = |n: usize| {
        let file = dir.join(format!("{name}.{n}"));
        Arc::new(FileStore::open(&file, Access::ReadWrite, Caching::PageCache).unwrap()) as Arc<dyn BlockStore>
    };
    let disks: Vec<_> = (0..count).rev().map(disk).collect();
    StripedStore::open(&disks).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn read(store: &StripedStore) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(store.len()).unwrap()];
    store.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Returns bytes that are the same nowhere in the array.
fn pattern(store: &StripedStore, seed: u64) -> Vec<u8> {
    (0..store.len() / 8).flat_map(|word| (word << 8 | seed).to_le_bytes()).collect()
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and mdadm: run `make test`")]
fn arrays_of_mdadm_work_with_both() {
    let kernel = Kernel::new();
    let sizes = |sizes: &[u64]| sizes.iter().map(|size| format!("{size}M")).collect::<Vec<_>>().join(" ");
    let create: String = ARRAYS
        .iter()
        .map(|(name, members, options)| format!("create {name} '{}' '{options}'\n", sizes(members)))
        .collect();
    kernel.expect(&format!("{FUNCTIONS}{create}"));
    let mut check = String::new();
    for (name, members, _) in ARRAYS {
        let (array, store) = open(kernel.dir(), name, members.len());
        assert_eq!(array.disks, (0..members.len()).rev().collect::<Vec<_>>());
        let theirs = fs::read(kernel.dir().join(format!("{name}.data"))).unwrap();
        assert!(read(&store) == theirs, "{name}");
        let ours = pattern(&store, 1);
        store.write_at(&ours, 0).unwrap();
        store.flush().unwrap();
        fs::write(kernel.dir().join(format!("{name}.data")), ours).unwrap();
        // The members are reordered.
        let files: Vec<_> = (0..members.len()).rev().map(|n| format!("{name}.{n}")).collect();
        check += &format!("assemble {}; cmp {name}.data /dev/md0; detach\n", files.join(" "));
    }
    kernel.expect(&format!("{FUNCTIONS}{check}"));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and mdadm: run `make test`")]
fn arrays_made_here_are_assembled_by_mdadm() {
    let kernel = Kernel::new();
    let mut script = String::new();
    for ((name, members, _), id) in ARRAYS.into_iter().zip(1u128..) {
        let disks: Vec<u64> = members.iter().map(|mib| (mib << 20) + 512).collect();
        for (n, size) in disks.iter().enumerate() {
            fs::File::create(kernel.dir().join(format!("{name}.{n}"))).unwrap().set_len(*size).unwrap();
        }
        let new = NewArray {
            uuid: uuid::Uuid::from_u128(id << 64 | 0xabc),
            name: format!("host:{name}"),
            now: 1_800_000_000,
            chunk: 64 << 10,
            members: disks.iter().zip(100..).map(|(size, id)| (*size, uuid::Uuid::from_u128(id))).collect(),
        };
        for (n, superblock) in new.superblocks().unwrap().iter().enumerate() {
            let file = kernel.dir().join(format!("{name}.{n}"));
            write_member(&FileStore::open(&file, Access::ReadWrite, Caching::PageCache).unwrap(), superblock).unwrap();
        }
        let (_, store) = open(kernel.dir(), name, members.len());
        assert_eq!(store.map().has_several_zones(), members.iter().any(|size| *size != members[0]));
        let ours = pattern(&store, 2);
        store.write_at(&ours, 0).unwrap();
        store.flush().unwrap();
        fs::write(kernel.dir().join(format!("{name}.data")), &ours).unwrap();
        let files: Vec<_> = (0..members.len()).map(|n| format!("{name}.{n}")).collect();
        script += &format!(
            "assemble {files}; cmp {name}.data /dev/md0
             mdadm --examine \"${{loops[0]}}\" > examined
             grep 'Checksum : .* correct' examined; grep 'Name : host:{name}' examined
             mdadm --detail /dev/md0 | grep -F 'State : clean'
             tr '\\000-\\377' '\\001-\\377\\000' < {name}.data > {name}.theirs; cp {name}.theirs /dev/md0; detach\n",
            files = files.join(" "),
        );
    }
    kernel.expect(&format!("{FUNCTIONS}{script}"));
    for (name, members, _) in ARRAYS {
        let (_, store) = open(kernel.dir(), name, members.len());
        assert!(read(&store) == fs::read(kernel.dir().join(format!("{name}.theirs"))).unwrap(), "{name}");
        let layout = (members.iter().any(|size| *size != members[0])).then_some(ZoneLayout::Original);
        let file = kernel.dir().join(format!("{name}.0"));
        let disk = FileStore::open(&file, Access::ReadOnly, Caching::PageCache).unwrap();
        assert_eq!(read_member(&disk).unwrap().superblock.unwrap().layout, layout);
    }
}
