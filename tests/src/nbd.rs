//! A server in the test's own process, and a raw client that sends exactly the bytes that a test wants.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use engine::key::VolumeKey;
use engine::layout::Segment;
use engine::sector::{Lba512, SectorSize};
use engine::store::BlockStore;
use engine::volume::Volume;
use nbd_server::proto::wire::*;
use nbd_server::{Export, Exports, Server, SessionKind, Settings, Trigger};
use tempfile::TempDir;

/// Makes two tests of each function that takes a [`SessionKind`], one for each kind of session. Attributes stand before the
/// name.
#[macro_export]
macro_rules! on_both_sessions {
    ($($(#[$attribute:meta])* $name:ident),* $(,)?) => {
        mod by_io_uring {
            $(#[test] $(#[$attribute])* fn $name() { super::$name(nbd_server::SessionKind::IoUring); })*
        }
        mod by_tokio {
            $(#[test] $(#[$attribute])* fn $name() { super::$name(nbd_server::SessionKind::Tokio); })*
        }
    };
}

/// The longest time that a client waits for an answer. After that, the test fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server on a unix socket in a directory of its own. Dropping it stops the server.
pub struct TestServer {
    server: Server,
    directory: TempDir,
    trigger: Option<Trigger>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl TestServer {
    /// Serves the exports with the usual settings through this kind of session.
    pub fn on(session: SessionKind, exports: impl IntoIterator<Item = Export>) -> Self {
        Self::with_settings(exports, Settings { workers: 4, session, ..Settings::default() })
    }

    /// Serves one volume as the default export through this kind of session.
    pub fn of(session: SessionKind, volume: Volume) -> Self {
        Self::on(session, [Export::new("", Arc::new(volume))])
    }

    /// Serves the exports.
    ///
    /// # Panics
    /// If the server does not start. All helpers here panic if a test cannot go on.
    pub fn with_settings(exports: impl IntoIterator<Item = Export>, settings: Settings) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let exports = Exports::new(exports).expect("the exports' names differ");
        let server = Server::new(exports, settings).expect("the server's threads start");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("the runtime starts");
        // The socket is bound before the thread starts, so that clients need not wait for it.
        let listener = {
            let _entered = runtime.enter();
            tokio::net::UnixListener::bind(directory.path().join("nbd.sock")).expect("the socket can be bound")
        };
        let (trigger, shutdown) = nbd_server::shutdown();
        let thread = {
            let server = server.clone();
            std::thread::spawn(move || runtime.block_on(server.run(listener, shutdown)))
        };
        Self { server, directory, trigger: Some(trigger), thread: Some(thread) }
    }

    /// Returns the socket's path.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }

    /// Returns the URI of the export with this name, as NBD clients take it.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// Returns the server's directory, which is removed with the server.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Returns the server itself.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Connects to the server. The greeting is not read yet.
    pub fn connect(&self) -> RawClient<UnixStream> {
        RawClient::new(connect(&self.socket()))
    }

    /// Connects to the server and negotiates the default export, up to the transmission phase.
    pub fn client(&self) -> RawClient<UnixStream> {
        let mut client = self.connect();
        client.enter("");
        client
    }

    /// Tells the server to stop, and does not wait.
    pub fn stop(&self) {
        self.trigger.iter().for_each(Trigger::stop);
    }

    /// Waits for the server to end.
    pub fn join(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        drop(self.trigger.take());
        self.thread.take().map_or(Ok(()), |thread| thread.join().expect("the server does not panic"))
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Returns a volume over all of `store`, encrypted with a fixed key.
pub fn encrypted(store: Arc<dyn BlockStore>, sector_size: SectorSize) -> Volume {
    let segment = Segment { offset: 0, len: store.len(), sector_size, iv_start: Lba512(0) };
    let key = VolumeKey::new((0..64).collect()).expect("64 different bytes are a key");
    Volume::encrypted(store, segment, &key).expect("the segment fits the store")
}

/// The server's reply to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that this replies to.
    pub option: u32,
    /// The reply type.
    pub kind: u32,
    /// The reply's data.
    pub data: Vec<u8>,
}

/// The server's reply to a request, without payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// The request's cookie.
    pub cookie: u64,
    /// The error, or 0.
    pub error: u32,
}

/// A client that sends what the test tells it to, right or wrong.
pub struct RawClient<S> {
    /// The connection.
    pub stream: S,
    cookie: u64,
}

impl<S: Read + Write> RawClient<S> {
    /// Makes a client of a new connection. The greeting is not read yet.
    pub fn new(stream: S) -> Self {
        Self { stream, cookie: 0 }
    }

    /// Sends bytes.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server accepts what the client sends");
    }

    /// Receives `len` bytes.
    pub fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    /// Receives until the server closes the connection.
    pub fn receive_rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self.stream.read_to_end(&mut bytes) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("the server did not close the connection: {error}"),
        }
        bytes
    }

    /// Returns whether the server closes the connection without sending anything more.
    pub fn is_closed(&mut self) -> bool {
        self.receive_rest().is_empty()
    }

    /// Receives the server's greeting and returns the handshake flags.
    pub fn greeting(&mut self) -> u16 {
        let bytes = self.receive(18);
        assert_eq!(bytes[..8], NBDMAGIC.to_be_bytes());
        assert_eq!(bytes[8..16], IHAVEOPT.to_be_bytes());
        be16(&bytes[16..])
    }

    /// Receives the greeting and sends these client flags.
    pub fn start_handshake(&mut self, flags: u32) -> &mut Self {
        self.greeting();
        self.send(&flags.to_be_bytes());
        self
    }

    /// Does the whole handshake, with `NBD_OPT_GO`.
    pub fn enter(&mut self, export: &str) {
        self.start_handshake(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES);
        let replies = self.option(NBD_OPT_GO, &query(export, &[]));
        assert_eq!(replies.last().map(|reply| reply.kind), Some(NBD_REP_ACK), "{replies:?}");
    }

    /// Sends an option.
    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        self.send(&option_bytes(option, data));
    }

    /// Sends an option and receives all replies to it.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.send_option(option, data);
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply();
            let last = reply.kind == NBD_REP_ACK || reply.kind >= 1 << 31;
            replies.push(reply);
            if last {
                return replies;
            }
        }
    }

    /// Receives one reply to an option.
    pub fn option_reply(&mut self) -> OptionReply {
        let header = self.receive(20);
        assert_eq!(header[..8], NBD_REP_MAGIC.to_be_bytes());
        let data = self.receive(be32(&header[16..]) as usize);
        OptionReply { option: be32(&header[8..]), kind: be32(&header[12..]), data }
    }

    /// Sends a request's header and returns its cookie.
    pub fn send_request(&mut self, flags: u16, kind: u16, offset: u64, len: u32) -> u64 {
        self.cookie += 0x0101_0101_0101;
        let cookie = self.cookie;
        self.send(&request_bytes(flags, kind, cookie, offset, len));
        cookie
    }

    /// Receives a simple reply's header.
    pub fn reply(&mut self) -> SimpleReply {
        let header = self.receive(SIMPLE_REPLY_LEN);
        assert_eq!(be32(&header), NBD_SIMPLE_REPLY_MAGIC);
        SimpleReply { error: be32(&header[4..]), cookie: be64(&header[8..]) }
    }

    /// Sends a request without payload in either direction and returns the reply's error.
    pub fn request(&mut self, flags: u16, kind: u16, offset: u64, len: u32) -> u32 {
        let cookie = self.send_request(flags, kind, offset, len);
        let reply = self.reply();
        assert_eq!(reply.cookie, cookie);
        reply.error
    }

    /// Reads `len` bytes at `offset`.
    ///
    /// # Errors
    /// The error code of the server's reply.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        match self.request(0, NBD_CMD_READ, offset, len) {
            0 => Ok(self.receive(len as usize)),
            error => Err(error),
        }
    }

    /// Writes `data` at `offset` and returns the reply's error.
    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let len = u32::try_from(data.len()).expect("a payload's length has 32 bits");
        let cookie = self.send_request(flags, NBD_CMD_WRITE, offset, len);
        self.send(data);
        let reply = self.reply();
        assert_eq!(reply.cookie, cookie);
        reply.error
    }

    /// Flushes and returns the reply's error.
    pub fn flush(&mut self) -> u32 {
        self.request(0, NBD_CMD_FLUSH, 0, 0)
    }
}

/// Connects to a unix socket, with timeouts for reads and writes.
pub fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("the timeout can be set");
    stream.set_write_timeout(Some(PATIENCE)).expect("the timeout can be set");
    stream
}

/// Returns the data of `NBD_OPT_INFO` or `NBD_OPT_GO`.
pub fn query(export: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(export.len()).expect("a name's length has 32 bits").to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend(u16::try_from(infos.len()).expect("the count of requests has 16 bits").to_be_bytes());
    data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    data
}

/// Returns an option's header and data.
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).expect("an option's length has 32 bits").to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Returns a request's header.
pub fn request_bytes(flags: u16, kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = NBD_REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// Reads a big-endian 16-bit number from the start of `bytes`.
pub fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(*bytes.first_chunk().expect("two bytes"))
}

/// Reads a big-endian 32-bit number from the start of `bytes`.
pub fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(*bytes.first_chunk().expect("four bytes"))
}

/// Reads a big-endian 64-bit number from the start of `bytes`.
pub fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(*bytes.first_chunk().expect("eight bytes"))
}
