//! `nbdcrypt-bench yardstick`: a server that only moves bytes, to show how much time this takes. For each connection, a
//! thread receives a request, reads or writes the file, and sends the reply. Its calls block, and it does not encrypt.
//! It shares only the protocol with the server that is measured.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use nbd_server::proto::handshake::Next;
use nbd_server::proto::{
    Answer, Command, ErrorCode, ExpectRequest, ExportInfo, Handshake, Received, Request, TlsPolicy,
};
use nbd_server::server::enlarge_send_buffer;

/// The arguments of `nbdcrypt-bench yardstick`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file to serve.
    file: PathBuf,
    /// Listen on a unix socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(&args.file);
    let file = Arc::new(file.with_context(|| args.file.display().to_string())?);
    let listener = UnixListener::bind(&args.socket).with_context(|| args.socket.display().to_string())?;
    for stream in listener.incoming() {
        let (stream, file) = (stream?, Arc::clone(&file));
        thread::spawn(move || serve(stream, &file));
    }
    Ok(())
}

fn serve(mut stream: UnixStream, file: &File) -> Result<()> {
    enlarge_send_buffer(&stream);
    let Some(mut expect) = handshake(&mut stream, file.metadata()?.len())? else { return Ok(()) };
    // A reply's header and payload, which are sent with one call.
    let mut reply = Vec::new();
    let mut payload = Vec::new();
    let mut header = [0; nbd_server::proto::wire::REQUEST_LEN];
    loop {
        stream.read_exact(&mut header)?;
        let (request, next) = match expect.handle(&header)? {
            Received::Request(request, next) => (request, next),
            Received::Payload(arriving) => {
                payload.resize(arriving.len(), 0);
                stream.read_exact(&mut payload)?;
                arriving.received()
            }
            Received::Disconnect => return Ok(()),
            Received::Refused(..) | Received::Skip(..) => bail!("the client sent a request that cannot be served"),
        };
        expect = next;
        carry_out(request, file, &payload, &mut reply)?;
        stream.write_all(&reply)?;
    }
}

/// Carries out one request and writes the whole reply to `reply`.
fn carry_out(request: Request, file: &File, payload: &[u8], reply: &mut Vec<u8>) -> Result<()> {
    let command = *request.command();
    let done = match command {
        // The data is appended to the header below.
        Command::Read(_) => true,
        Command::Write { range, .. } => file.write_all_at(payload, range.offset).is_ok(),
        Command::Flush => file.sync_data().is_ok(),
        _ => false,
    };
    let outcome = if done { Ok(Answer::Done) } else { Err(ErrorCode::Inval) };
    reply.clear();
    request.finish(outcome).encode(reply);
    if let Command::Read(range) = command {
        let start = reply.len();
        reply.resize(start + command.payload_len(), 0);
        // A failed read ends the connection. That is enough for a server that is only measured.
        file.read_exact_at(&mut reply[start..], range.offset)?;
    }
    Ok(())
}

/// Negotiates as a server with one export of `size` bytes. Returns `None` if the client leaves.
pub(super) fn handshake(stream: &mut UnixStream, size: u64) -> Result<Option<ExpectRequest>> {
    let export = ExportInfo {
        name: String::new(),
        description: String::new(),
        size,
        read_only: false,
        discards: false,
        preferred_block: 4096,
    };
    let exports = std::slice::from_ref(&export);
    let (mut out, mut bytes) = (Vec::new(), Vec::new());
    let mut handshake = Handshake::greeting(TlsPolicy::Off, &mut out);
    loop {
        stream.write_all(&out)?;
        out.clear();
        bytes.resize(handshake.wanted(), 0);
        stream.read_exact(&mut bytes)?;
        match handshake.handle(&bytes, exports, &mut out)? {
            Next::Continue(next) => handshake = next,
            Next::Transmission(negotiated) => {
                stream.write_all(&out)?;
                return Ok(Some(ExpectRequest::new(&export, &negotiated)));
            }
            Next::Aborted => return Ok(None),
            Next::StartTls(_) => bail!("TLS was negotiated without being offered"),
        }
    }
}
