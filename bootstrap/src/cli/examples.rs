//! The examples at the end of each `--help`. A test parses every one of them.

pub(super) const NBDCRYPT: &str = "\
Examples:
  sudo nbdcrypt demo                                       # try it
  nbdcrypt format --key-file key --size 2G disk.luks
  nbdcrypt serve --key-file key --socket /run/disk.sock disk.luks
  nbdcrypt up /etc/nbdcrypt/scratch.toml                   # a mounted filesystem
More: nbdcrypt COMMAND --help";

pub(super) const DEMO: &str = "\
Examples:
  sudo nbdcrypt demo                                # needs root, and nothing else";

pub(super) const PROVISION: &str = "\
Examples:
  nbdcrypt provision /etc/nbdcrypt/scratch.toml            # make the secret and store it, once
  nbdcrypt provision --replace /etc/nbdcrypt/scratch.toml  # its old volumes are lost";

pub(super) const UP: &str = "\
Examples:
  nbdcrypt plan /etc/nbdcrypt/scratch.toml                 # look first
  nbdcrypt up /etc/nbdcrypt/scratch.toml
  nbdcrypt up --foreground /etc/nbdcrypt/scratch.toml      # under systemd, or to watch";

pub(super) const DOWN: &str = "\
Examples:
  nbdcrypt down scratch                                    # by its name, see `nbdcrypt status`
  nbdcrypt down /etc/nbdcrypt/scratch.toml";

pub(super) const PLAN: &str = "\
Examples:
  nbdcrypt plan /etc/nbdcrypt/scratch.toml
  nbdcrypt plan --json /etc/nbdcrypt/scratch.toml";

pub(super) const POLICY: &str = "\
Examples:
  nbdcrypt policy /etc/nbdcrypt/scratch.toml
  nbdcrypt policy --role web --account 123456789012 /etc/nbdcrypt/scratch.toml
  nbdcrypt policy --terraform /etc/nbdcrypt/scratch.toml
  nbdcrypt policy --cloudformation /etc/nbdcrypt/scratch.toml";

pub(super) const STATUS: &str = "\
Examples:
  nbdcrypt status                                          # all volumes
  nbdcrypt status scratch
  nbdcrypt status --json";

pub(super) const DEVICES: &str = "\
Examples:
  sudo nbdcrypt devices
  sudo nbdcrypt devices --json";

pub(super) const DOCTOR: &str = "\
Examples:
  sudo nbdcrypt doctor                                     # this machine
  sudo nbdcrypt doctor /etc/nbdcrypt/scratch.toml          # and what the configuration needs
  sudo nbdcrypt doctor --json /etc/nbdcrypt/scratch.toml";

pub(super) const FORMAT: &str = "\
Examples:
  nbdcrypt format /dev/nvme1n1                             # a blank disk; asks for a passphrase
  nbdcrypt format --key-file key --size 2G disk.luks       # a new file
  nbdcrypt format --type luks1 --key-file key --size 2G disk.luks # for QEMU, nbdkit
  nbdcrypt format --key-file key --header disk.header /dev/nvme1n1 # header apart
  nbdcrypt format --key-file key --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/nvme1n1
                                                           # a random key: opens at once";

pub(super) const SERVE: &str = "\
Examples:
  nbdcrypt serve --key-file key --socket /run/disk.sock disk.luks
  nbdcrypt serve --listen localhost:10809 /dev/nvme1n1     # asks for the passphrase
  nbdcrypt serve --key-file key --socket /run/disks.sock a.luks b.luks # two exports
  nbdcrypt serve --key-file key --listen :10809 --tls require --tls-verify-peer \\
      --tls-certificates /etc/pki/nbdcrypt disk.luks       # to other machines
  nbdcrypt serve --type plain --key-file raw --socket /run/disk.sock /dev/nvme1n1
  nbdcrypt serve --key-file key disk.luks --run 'nbdcopy $uri disk.img'
  nbdcrypt serve --key-file key --socket /run/disk.sock --print-uri --exit-with-parent disk.luks
  nbdcopy -- [ nbdcrypt serve --key-file key disk.luks ] disk.img # socket activation
The address that it prints is what clients take: nbdinfo 'nbd+unix:///?socket=/run/disk.sock'";

pub(super) const DUMP: &str = "\
Examples:
  nbdcrypt dump /dev/nvme1n1
  nbdcrypt dump --json disk.luks
  nbdcrypt dump --header disk.header /dev/nvme1n1";

pub(super) const KEY: &str = "\
Examples:
  nbdcrypt key list /dev/nvme1n1
  nbdcrypt key add /dev/nvme1n1
  nbdcrypt key remove --key-slot 1 /dev/nvme1n1
More: nbdcrypt key COMMAND --help";

pub(super) const KEY_LIST: &str = "\
Examples:
  nbdcrypt key list /dev/nvme1n1
  nbdcrypt key list --json disk.luks";

pub(super) const KEY_ADD: &str = "\
Examples:
  nbdcrypt key add /dev/nvme1n1                            # asks for an old and a new key
  nbdcrypt key add --key-file key --new-key-file recovery disk.luks
  nbdcrypt key add --config /etc/nbdcrypt/scratch.toml --new-key-file recovery /dev/nvme1n1";

pub(super) const KEY_CHANGE: &str = "\
Examples:
  nbdcrypt key change /dev/nvme1n1
  nbdcrypt key change --key-file old --new-key-file new --key-slot 0 disk.luks";

pub(super) const KEY_REWRAP: &str = "\
Examples:
  nbdcrypt key rewrap --config /etc/nbdcrypt/scratch.toml /dev/nvme1n1
  nbdcrypt key rewrap --config /etc/nbdcrypt/scratch.toml --new-kms-key alias/another /dev/nvme1n1";

pub(super) const KEY_REMOVE: &str = "\
Examples:
  nbdcrypt key test /dev/nvme1n1                           # first: which keyslot is it?
  nbdcrypt key remove /dev/nvme1n1                         # the key that is typed
  nbdcrypt key remove --key-slot 1 /dev/nvme1n1            # asks for a key that stays
  nbdcrypt key remove --key-slot 1 --key-file stays disk.luks";

pub(super) const KEY_TEST: &str = "\
Examples:
  nbdcrypt key test /dev/nvme1n1
  nbdcrypt key test --key-slot 1 --key-file recovery disk.luks
  nbdcrypt key test --config /etc/nbdcrypt/scratch.toml --json /dev/nvme1n1";

pub(super) const KEY_VERIFY: &str = "\
Examples:
  nbdcrypt key verify /etc/nbdcrypt/scratch.toml
  nbdcrypt key verify --json /etc/nbdcrypt/scratch.toml";

pub(super) const KEY_PRIORITY: &str = "\
Examples:
  nbdcrypt key priority --key-slot 1 /dev/nvme1n1 prefer
  nbdcrypt key priority --key-slot 1 /dev/nvme1n1 normal";

pub(super) const TOKEN: &str = "\
Examples:
  nbdcrypt token list /dev/nvme1n1
  nbdcrypt token import --json-file token.json disk.luks
  nbdcrypt token export --token-id 0 disk.luks
  nbdcrypt token remove --token-id 0 disk.luks";

pub(super) const HEADER: &str = "\
Examples:
  nbdcrypt header backup /dev/nvme1n1 nvme1n1.header
  nbdcrypt header restore /dev/nvme1n1 nvme1n1.header
  nbdcrypt header repair /dev/nvme1n1
  nbdcrypt header set --label scratch /dev/nvme1n1";

pub(super) const BENCH: &str = "\
Examples:
  nbdcrypt bench xts                                       # the cipher
  nbdcrypt bench device                                    # the server, in memory
  nbdcrypt bench device --quick --json";
