//! Serves a disk on a unix socket until interrupted: `serve SOCKET (FILE | MEGABYTES) [plain] [workers]`. Encrypted with
//! a fixed key, so for trying out and measuring alone; `nbdcrypt serve` is the real thing.

use std::path::Path;
use std::sync::Arc;

use engine::key::VolumeKey;
use engine::luks::Segment;
use engine::sector::{Lba512, SectorSize};
use engine::store::{Access, BlockStore, Caching, FileStore, MemoryStore};
use engine::volume::Volume;
use nbd_server::{Export, Exports, Server, Settings};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, disk, options @ ..] = arguments.as_slice() else {
        return Err("usage: serve SOCKET (FILE | MEGABYTES) [plain] [WORKERS]".into());
    };
    let store: Arc<dyn BlockStore> = match disk.parse::<usize>() {
        Ok(megabytes) => Arc::new(MemoryStore::zeroed(megabytes << 20)),
        Err(_) => Arc::new(FileStore::open(Path::new(disk), Access::ReadWrite, Caching::Direct)?),
    };
    let sector_size = SectorSize::B512;
    let volume = if options.iter().any(|option| option == "plain") {
        Volume::plaintext(store, sector_size)?
    } else {
        let segment = Segment { offset: 0, len: store.len(), sector_size, iv_start: Lba512(0) };
        Volume::encrypted(store, segment, &VolumeKey::new((0..64).collect())?)?
    };
    let workers = options.iter().find_map(|option| option.parse().ok()).unwrap_or(Settings::default().workers);
    let server =
        Server::new(Exports::new([Export::new("", Arc::new(volume))])?, Settings { workers, ..Settings::default() })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let _ = std::fs::remove_file(socket);
    runtime.block_on(async {
        let (_running, shutdown) = nbd_server::shutdown();
        server.run(tokio::net::UnixListener::bind(socket)?, shutdown).await
    })?;
    Ok(())
}
