//! The NBD protocol as values: bytes in, requests out; replies in, bytes out. This module does no input or output, never waits
//! and imports nothing else of this project. So a fuzzer can drive it, and any session can move its bytes.
//!
//! Names and section titles are taken from the NBD specification,
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.
//!
//! ```text
//!   Handshake ── wants n bytes ──► handle(bytes) ──► bytes to send, and the next Handshake
//!       │
//!       └─► Negotiated ─► ExpectRequest ── header ──► Request, and what the stream holds next
//!                              ▲                         │
//!                              └── payload, received     └─► finish(outcome) ─► Reply ─► bytes to send
//!                                  by the session
//! ```
//!
//! A state says how many bytes it wants next, and the step that takes them consumes the state. So a session never reads more
//! than a state asks for, and a failed state cannot be entered again. A request is answered once, because [`Request::finish`]
//! consumes it.
//!
//! # Example
//! A client chooses the default export and reads 512 bytes. There is no socket: the caller moves the bytes.
//!
//! ```
//! use nbd_server::proto::handshake::Next;
//! use nbd_server::proto::{Answer, Command, ExpectRequest, ExportInfo, Handshake, Range, Received, TlsPolicy};
//!
//! let exports = [ExportInfo {
//!     name: String::new(),
//!     description: String::new(),
//!     size: 1 << 20,
//!     read_only: false,
//!     discards: true,
//!     preferred_block: 4096,
//! }];
//!
//! // The client's flags, then NBD_OPT_GO with an empty name and no information requests.
//! let mut client: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";
//! let mut sent = Vec::new();
//! let mut handshake = Handshake::greeting(TlsPolicy::Off, &mut sent);
//! let negotiated = loop {
//!     let (bytes, rest) = client.split_at(handshake.wanted());
//!     client = rest;
//!     match handshake.handle(bytes, &exports, &mut sent)? {
//!         Next::Continue(next) => handshake = next,
//!         Next::Transmission(negotiated) => break negotiated,
//!         Next::StartTls(_) | Next::Aborted => unreachable!("the client did not ask for this"),
//!     }
//! };
//!
//! // NBD_CMD_READ of 512 bytes at offset 4096. The client chose the cookie, which the reply repeats.
//! let header = b"\x25\x60\x95\x13\0\0\0\0a cookie\0\0\0\0\0\0\x10\0\0\0\x02\0";
//! let expect = ExpectRequest::new(&exports[negotiated.export], &negotiated);
//! let Received::Request(request, _next) = expect.handle(header)? else { unreachable!("a read has no payload") };
//! assert_eq!(request.command(), &Command::Read(Range { offset: 4096, len: 512 }));
//!
//! // The caller reads the disk, and sends the reply and then the 512 bytes.
//! let reply = request.finish(Ok(Answer::Done));
//! sent.clear();
//! reply.encode(&mut sent);
//! assert_eq!(sent, b"\x67\x44\x66\x98\0\0\0\0a cookie");
//! assert_eq!(reply.payload_len(), 512);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod handshake;
mod ledger;
mod reader;
#[cfg(any(test, feature = "referee"))]
mod referee;
pub mod reply;
pub mod request;
#[cfg(any(test, feature = "referee"))]
pub mod transcript;
pub mod transmission;
pub mod wire;

pub use handshake::{ExportInfo, Handshake, HandshakeError, Negotiated, TlsPolicy};
pub use ledger::Ledger;
pub use reply::{Answer, ErrorCode, Extent, Headers, Reply};
pub use request::{Command, Range, Request};
pub use transmission::{ExpectPayload, ExpectRequest, ExpectSkipped, Received, TransmissionError};

/// The longest payload of one request or reply in bytes: 2²⁵. The NBD specification ("Size constraints") requires a server to
/// accept at least this much. The server advertises it as the maximum payload size.
pub const MAX_PAYLOAD: u32 = 1 << 25;

/// The maximum number of extents in one reply to `NBD_CMD_BLOCK_STATUS`. These extents take 16 KiB. The client asks again for the
/// rest.
pub const MAX_EXTENTS: usize = 1024;

/// The longest payload that is skipped, in bytes. A write longer than [`MAX_PAYLOAD`] is refused and its payload skipped. A
/// client that announces more than this is considered hostile and disconnected.
pub const MAX_SKIPPED: u32 = MAX_PAYLOAD * 2;
