//! A raw client that negotiates structured replies or extended headers, so that replies come in chunks.

use std::os::unix::net::UnixStream;

use nbd_server::proto::Headers;
use nbd_server::proto::wire::*;

use crate::nbd::{RawClient, TestServer, be16, be32, be64, query, request_bytes};

/// One reply chunk, or a simple reply without an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Whether this was a simple reply.
    pub simple: bool,
    /// `NBD_REPLY_FLAG_DONE` or 0.
    pub flags: u16,
    /// The chunk's type.
    pub kind: u16,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset, which only extended headers repeat.
    pub offset: Option<u64>,
    /// What follows the header.
    pub payload: Vec<u8>,
}

/// The content of an error chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkError {
    /// The error code.
    pub code: u32,
    /// The message for people.
    pub message: String,
    /// The offset in the export at which the error occurred, if the chunk has one.
    pub at: Option<u64>,
}

impl Chunk {
    /// Returns whether this chunk only ends the reply.
    pub fn is_done(&self) -> bool {
        self.flags == NBD_REPLY_FLAG_DONE && self.kind == NBD_REPLY_TYPE_NONE && self.payload.is_empty()
    }

    /// Parses an error chunk.
    ///
    /// # Panics
    /// If this is not an error chunk, or its lengths do not add up.
    #[track_caller]
    pub fn error(&self) -> ChunkError {
        let has_offset = match self.kind {
            NBD_REPLY_TYPE_ERROR => false,
            NBD_REPLY_TYPE_ERROR_OFFSET => true,
            _ => panic!("not an error chunk: {self:?}"),
        };
        let (message, tail) = self.payload[6..].split_at(be16(&self.payload[4..]).into());
        assert_eq!(tail.len(), if has_offset { 8 } else { 0 }, "{self:?}");
        let message = String::from_utf8(message.to_vec()).expect("messages are UTF-8");
        assert!(!message.is_empty() && !message.contains('\0'));
        ChunkError { code: be32(&self.payload), message, at: has_offset.then(|| be64(tail)) }
    }

    /// Parses the extents, each as length and status.
    ///
    /// # Panics
    /// If this is not a block status chunk.
    #[track_caller]
    pub fn extents(&self) -> Vec<(u64, u64)> {
        assert_eq!(be32(&self.payload), ALLOCATION_CONTEXT);
        match self.kind {
            NBD_REPLY_TYPE_BLOCK_STATUS => {
                let extents = self.payload[4..].chunks_exact(8);
                assert!(extents.remainder().is_empty());
                extents.map(|extent| (be32(extent).into(), be32(&extent[4..]).into())).collect()
            }
            NBD_REPLY_TYPE_BLOCK_STATUS_EXT => {
                let extents = self.payload[8..].chunks_exact(16);
                assert!(extents.remainder().is_empty());
                assert_eq!(extents.len(), be32(&self.payload[4..]) as usize, "the chunk's count of extents");
                extents.map(|extent| (be64(extent), be64(&extent[8..]))).collect()
            }
            _ => panic!("not a block status chunk: {self:?}"),
        }
    }
}

/// A client in the transmission phase that negotiated structured replies or extended headers.
pub struct ChunkClient {
    /// The raw client, for bytes that this client would not send.
    pub raw: RawClient<UnixStream>,
    /// The headers that were negotiated; never [`Headers::Simple`].
    pub headers: Headers,
    cookie: u64,
}

impl ChunkClient {
    /// Connects, negotiates the headers and `base:allocation`, and enters transmission with the export.
    ///
    /// # Panics
    /// If the server refuses any of it.
    pub fn enter(server: &TestServer, export: &str, headers: Headers) -> Self {
        let mut raw = negotiated(server, headers);
        let replies = raw.option(NBD_OPT_SET_META_CONTEXT, &contexts(export, &[BASE_ALLOCATION]));
        assert_eq!(replies.iter().map(|reply| reply.kind).collect::<Vec<_>>(), [NBD_REP_META_CONTEXT, NBD_REP_ACK]);
        assert_eq!(be32(&replies[0].data), ALLOCATION_CONTEXT);
        Self::go(raw, export, headers)
    }

    /// Enters transmission with the export. The headers are negotiated already.
    ///
    /// # Panics
    /// If the server refuses.
    pub fn go(mut raw: RawClient<UnixStream>, export: &str, headers: Headers) -> Self {
        let replies = raw.option(NBD_OPT_GO, &query(export, &[]));
        assert_eq!(replies.last().map(|reply| reply.kind), Some(NBD_REP_ACK), "{replies:?}");
        Self { raw, headers, cookie: 0 }
    }

    /// Sends a request's header and returns its cookie.
    ///
    /// # Panics
    /// If the length does not fit the header.
    pub fn send_request(&mut self, flags: u16, kind: u16, offset: u64, len: u64) -> u64 {
        self.cookie += 0x0101_0101_0101;
        let bytes = match self.headers {
            Headers::Extended => extended_request_bytes(flags, kind, self.cookie, offset, len),
            _ => request_bytes(flags, kind, self.cookie, offset, u32::try_from(len).expect("the length has 32 bits")),
        };
        self.raw.send(&bytes);
        self.cookie
    }

    /// Receives a chunk.
    ///
    /// # Panics
    /// If the server sends anything else.
    #[track_caller]
    pub fn chunk(&mut self) -> Chunk {
        let extended = self.headers == Headers::Extended;
        let mut header = self.raw.receive(SIMPLE_REPLY_LEN);
        if self.headers == Headers::Structured && be32(&header) == NBD_SIMPLE_REPLY_MAGIC {
            assert_eq!(be32(&header[4..]), 0, "errors come in chunks");
            let (flags, cookie) = (NBD_REPLY_FLAG_DONE, be64(&header[8..]));
            return Chunk { simple: true, flags, kind: NBD_REPLY_TYPE_NONE, cookie, offset: None, payload: Vec::new() };
        }
        let len = if extended { EXTENDED_REPLY_LEN } else { STRUCTURED_REPLY_LEN };
        header.extend(self.raw.receive(len - SIMPLE_REPLY_LEN));
        let magic = if extended { NBD_EXTENDED_REPLY_MAGIC } else { NBD_STRUCTURED_REPLY_MAGIC };
        assert_eq!(be32(&header), magic);
        let (offset, len) = match extended {
            true => (Some(be64(&header[16..])), be64(&header[24..])),
            false => (None, be32(&header[16..]).into()),
        };
        let payload = self.raw.receive(usize::try_from(len).expect("the chunk fits into memory"));
        let (flags, kind, cookie) = (be16(&header[4..]), be16(&header[6..]), be64(&header[8..]));
        Chunk { simple: false, flags, kind, cookie, offset, payload }
    }

    /// Receives the reply to the last request sent. The reply must be one chunk.
    ///
    /// # Panics
    /// If the chunk replies to another request or is not the last chunk.
    #[track_caller]
    pub fn answer(&mut self, offset: u64) -> Chunk {
        let chunk = self.chunk();
        assert_eq!((chunk.cookie, chunk.flags), (self.cookie, NBD_REPLY_FLAG_DONE), "{chunk:?}");
        assert_eq!(chunk.offset, (self.headers == Headers::Extended).then_some(offset));
        chunk
    }

    /// Sends a request without payload and receives its reply.
    #[track_caller]
    pub fn ask(&mut self, flags: u16, kind: u16, offset: u64, len: u64) -> Chunk {
        self.send_request(flags, kind, offset, len);
        self.answer(offset)
    }

    /// Sends a request of any command with a payload, and receives its reply.
    #[track_caller]
    pub fn ask_with(&mut self, flags: u16, kind: u16, offset: u64, payload: &[u8]) -> Chunk {
        self.send_request(flags, kind, offset, payload.len() as u64);
        self.raw.send(payload);
        self.answer(offset)
    }

    /// Writes `data`, in the form that the negotiated headers require.
    #[track_caller]
    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> Chunk {
        let announced = if self.headers == Headers::Extended { NBD_CMD_FLAG_PAYLOAD_LEN } else { 0 };
        self.ask_with(flags | announced, NBD_CMD_WRITE, offset, data)
    }

    /// Reads `len` bytes, at least one. The reply must be one data chunk.
    ///
    /// # Panics
    /// If the reply is anything else.
    #[track_caller]
    pub fn read(&mut self, flags: u16, offset: u64, len: u64) -> Vec<u8> {
        let chunk = self.ask(flags, NBD_CMD_READ, offset, len);
        assert_eq!(chunk.kind, NBD_REPLY_TYPE_OFFSET_DATA, "{:?}", chunk.payload.get(..100));
        assert_eq!(be64(&chunk.payload), offset);
        chunk.payload[8..].to_vec()
    }

    /// Returns the allocation status of a range, as length and status of each extent.
    #[track_caller]
    pub fn status(&mut self, flags: u16, offset: u64, len: u64) -> Vec<(u64, u64)> {
        let chunk = self.ask(flags, NBD_CMD_BLOCK_STATUS, offset, len);
        let extended = self.headers == Headers::Extended;
        let expected = if extended { NBD_REPLY_TYPE_BLOCK_STATUS_EXT } else { NBD_REPLY_TYPE_BLOCK_STATUS };
        assert_eq!(chunk.kind, expected, "{chunk:?}");
        chunk.extents()
    }
}

/// Connects and negotiates the headers. The handshake goes on after that.
///
/// # Panics
/// If the server refuses them.
pub fn negotiated(server: &TestServer, headers: Headers) -> RawClient<UnixStream> {
    let mut raw = server.connect();
    raw.start_handshake(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES);
    let option = match headers {
        Headers::Simple => return raw,
        Headers::Structured => NBD_OPT_STRUCTURED_REPLY,
        Headers::Extended => NBD_OPT_EXTENDED_HEADERS,
    };
    assert_eq!(raw.option(option, &[])[0].kind, NBD_REP_ACK);
    raw
}

/// Returns the data of `NBD_OPT_LIST_META_CONTEXT` or `NBD_OPT_SET_META_CONTEXT`.
pub fn contexts(export: &str, queries: &[&str]) -> Vec<u8> {
    let len = |len: usize| u32::try_from(len).expect("the length has 32 bits").to_be_bytes();
    let mut data = [&len(export.len()), export.as_bytes(), &len(queries.len())].concat();
    for query in queries {
        data.extend(len(query.len()));
        data.extend(query.as_bytes());
    }
    data
}

/// Returns an extended request's header.
pub fn extended_request_bytes(flags: u16, kind: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = NBD_EXTENDED_REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}
