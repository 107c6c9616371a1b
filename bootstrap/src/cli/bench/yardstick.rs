//! `nbdcrypt bench yardstick`: what moving the bytes costs, and nothing else. A thread a connection: receive a request,
//! pread or pwrite, send the reply. Blocking, no encryption, none of this project's server code.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result as IoResult, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use nbd_server::proto::wire::*;
use rustix::net::sockopt;

const SEND_BUFFER: usize = 4 << 20;
/// What a request may carry; no client here asks for more.
pub(super) const MAX_PAYLOAD: usize = 32 << 20;
const EINVAL: u32 = 22;
/// Room for the longer header, that of a structured reply with data: the chunk's, and the data's offset.
pub(super) const HEAD: usize = STRUCTURED_REPLY_LEN + 8;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file to serve, as it is.
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

fn serve(mut stream: UnixStream, file: &File) -> IoResult<()> {
    enlarge_send_buffer(&stream);
    let structured = handshake(&mut stream, file.metadata()?.len())?;
    // A reply's header, then its payload: one send. A shorter header ends where the payload begins.
    let mut buffer = vec![0; HEAD + (1 << 20)];
    loop {
        let mut request = [0; REQUEST_LEN];
        stream.read_exact(&mut request)?;
        let (kind, offset, len) = (be16(&request[6..]), be64(&request[16..]), be32(&request[24..]) as usize);
        if be32(&request) != NBD_REQUEST_MAGIC || len > MAX_PAYLOAD {
            return Err(Error::from(ErrorKind::InvalidData));
        }
        let whole = HEAD + len;
        if matches!(kind, NBD_CMD_READ | NBD_CMD_WRITE) && buffer.len() < whole {
            buffer.resize(whole, 0);
        }
        let (error, payload) = match kind {
            // One that fails ends the connection: this is measured, not relied on.
            NBD_CMD_READ => {
                file.read_exact_at(&mut buffer[HEAD..whole], offset)?;
                (0, len)
            }
            NBD_CMD_WRITE => {
                stream.read_exact(&mut buffer[HEAD..whole])?;
                let written = file.write_all_at(&buffer[HEAD..whole], offset);
                (if written.is_ok() { 0 } else { EINVAL }, 0)
            }
            NBD_CMD_FLUSH => (if file.sync_data().is_ok() { 0 } else { EINVAL }, 0),
            NBD_CMD_DISC => return Ok(()),
            _ => (EINVAL, 0),
        };
        let (head, start) = head(&request, structured, error, payload);
        buffer[..HEAD].copy_from_slice(&head);
        stream.write_all(&buffer[start..HEAD + payload])?;
    }
}

fn enlarge_send_buffer(stream: &UnixStream) {
    if sockopt::set_socket_send_buffer_size_force(stream, SEND_BUFFER).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(stream, SEND_BUFFER);
    }
}

/// A reply's header, which is what stands from the second part's place on: a payload of so many bytes follows.
pub(super) fn head(request: &[u8; REQUEST_LEN], structured: bool, error: u32, payload: usize) -> ([u8; HEAD], usize) {
    let mut head = [0; HEAD];
    let cookie = &request[8..16];
    if structured && be16(&request[6..]) == NBD_CMD_READ {
        head[..4].copy_from_slice(&NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes());
        head[4..6].copy_from_slice(&NBD_REPLY_FLAG_DONE.to_be_bytes());
        head[6..8].copy_from_slice(&NBD_REPLY_TYPE_OFFSET_DATA.to_be_bytes());
        head[8..16].copy_from_slice(cookie);
        head[16..20].copy_from_slice(&u32::try_from(8 + payload).unwrap_or(u32::MAX).to_be_bytes());
        head[20..].copy_from_slice(&request[16..24]);
        return (head, 0);
    }
    let start = HEAD - SIMPLE_REPLY_LEN;
    head[start..start + 4].copy_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
    head[start + 4..start + 8].copy_from_slice(&error.to_be_bytes());
    head[start + 8..].copy_from_slice(cookie);
    (head, start)
}

/// As little as fio's libnbd needs: `NBD_OPT_GO`, structured replies, since all others have them and they cost the client more
/// to receive, and no to everything else. Whether structured replies were agreed on.
pub(super) fn handshake(stream: &mut UnixStream, size: u64) -> IoResult<bool> {
    let mut structured = false;
    let mut greeting = NBDMAGIC.to_be_bytes().to_vec();
    greeting.extend(IHAVEOPT.to_be_bytes());
    greeting.extend((NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting)?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let (option, len) = (be32(&header[8..]), be32(&header[12..]) as usize);
        if header[..8] != IHAVEOPT.to_be_bytes() || len > 2 * MAX_STRING {
            return Err(Error::from(ErrorKind::InvalidData));
        }
        stream.read_exact(&mut vec![0; len])?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut bytes = NBD_REP_MAGIC.to_be_bytes().to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
            bytes.extend(data);
            stream.write_all(&bytes)
        };
        match option {
            NBD_OPT_GO => {
                let flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_CAN_MULTI_CONN;
                let info = [&NBD_INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
                reply(NBD_REP_INFO, &info)?;
                reply(NBD_REP_ACK, &[])?;
                return Ok(structured);
            }
            NBD_OPT_STRUCTURED_REPLY => {
                structured = true;
                reply(NBD_REP_ACK, &[])?;
            }
            NBD_OPT_ABORT => return Err(Error::from(ErrorKind::ConnectionAborted)),
            _ => reply(NBD_REP_ERR_UNSUP, &[])?,
        }
    }
}

pub(super) fn be16(bytes: &[u8]) -> u16 {
    bytes.first_chunk().map_or(0, |bytes| u16::from_be_bytes(*bytes))
}

pub(super) fn be32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

pub(super) fn be64(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}
