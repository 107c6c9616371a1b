//! `nbdcrypt-bench null`: a server without storage. It drops what is written, and answers reads with zeros from the
//! CPU's cache. It lets requests gather while the client reads its replies. So a client reaches its highest possible
//! rate.

use std::fs;
use std::io::{IoSlice, Result as IoResult, Write};
use std::num::NonZeroU64;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nbd_server::proto::{Answer, Received, Request};
use nbd_server::server::enlarge_send_buffer;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::yardstick::handshake;

const INTAKE: usize = 256 << 10;
/// The maximum number of requests answered with one call. Each request takes two slices, and the kernel accepts 1024
/// slices (`UIO_MAXIOV`).
const BATCH: usize = 256;
/// The server pauses only after requests of at most this many bytes. With larger requests, a pause saves nothing,
/// because client and server are busy all the time.
const SMALL: usize = 8 << 10;

/// The arguments of `nbdcrypt-bench null`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file that gives the export its size.
    file: PathBuf,
    /// Listen on a unix socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// How long small requests gather, in microseconds. fio with depth 32 is fastest with 20 to 40.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 40, value_parser = clap::value_parser!(u64).range(0..=1_000_000))]
    pause: u64,
    /// Poll the socket instead of waiting for it.
    #[arg(long)]
    spin: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let size = fs::metadata(&args.file).with_context(|| args.file.display().to_string())?.len();
    let listener = UnixListener::bind(&args.socket).with_context(|| args.socket.display().to_string())?;
    for stream in listener.incoming() {
        let (stream, pause, spin) = (stream?, Duration::from_micros(args.pause), args.spin);
        thread::spawn(move || serve(stream, size, pause, spin));
    }
    Ok(())
}

fn serve(mut stream: UnixStream, size: u64, pause: Duration, spin: bool) -> Result<()> {
    enlarge_send_buffer(&stream);
    // Without this, a sleep takes 50 µs longer.
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?;
    let Some(mut expect) = handshake(&mut stream, size)? else { return Ok(()) };
    let mut intake = vec![0; INTAKE];
    let mut zeros = Vec::new();
    // `filled` bytes of the intake are in use. `skip` bytes of a write's payload are still to come, and `due` is its
    // request.
    let (mut filled, mut skip, mut due) = (0, 0, None);
    loop {
        let count = receive(&stream, &mut intake[filled..], spin)?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        let mut at = 0;
        loop {
            // The headers lie one after another. Each entry of `replies` says where a header ends and how many zeros
            // follow it.
            let (mut headers, mut replies) = (Vec::new(), Vec::with_capacity(BATCH));
            let mut answer = |request: Request, headers: &mut Vec<u8>| {
                let reply = request.finish(Ok(Answer::Done));
                reply.encode(headers);
                replies.push((headers.len(), reply.payload_len()));
                replies.len()
            };
            let (mut answered, mut moved) = (0, 0);
            while answered < BATCH {
                let skipped = skip.min(filled - at);
                at += skipped;
                skip -= skipped;
                if skip > 0 {
                    break;
                }
                if let Some(request) = due.take() {
                    answered = answer(request, &mut headers);
                    continue;
                }
                let Some(header) = intake[at..filled].get(..expect.header_len()) else { break };
                at += header.len();
                match expect.handle(header)? {
                    Received::Request(request, next) => {
                        moved += request.command().payload_len();
                        answered = answer(request, &mut headers);
                        expect = next;
                    }
                    Received::Payload(payload) => {
                        moved += payload.len();
                        skip = payload.len();
                        let (request, next) = payload.received();
                        due = Some(request);
                        expect = next;
                    }
                    Received::Disconnect => return Ok(()),
                    Received::Refused(..) | Received::Skip(..) => {
                        bail!("the client sent a request that cannot be served")
                    }
                }
            }
            if replies.is_empty() {
                break;
            }
            let largest = replies.iter().map(|(_, payload)| *payload).max().unwrap_or(0);
            if zeros.len() < largest {
                zeros.resize(largest, 0);
            }
            send(&mut stream, &headers, &replies, &zeros)?;
            if moved <= replies.len() * SMALL {
                // A sleep of zero returns at once.
                thread::sleep(pause);
            }
        }
        intake.copy_within(at..filled, 0);
        filled -= at;
    }
}

fn receive(stream: &UnixStream, into: &mut [u8], spin: bool) -> IoResult<usize> {
    let flags = if spin { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
    loop {
        match rustix::net::recv(stream, &mut *into, flags) {
            Err(Errno::AGAIN) if spin => std::hint::spin_loop(),
            received => return Ok(received?.0),
        }
    }
}

/// Sends replies. Each entry of `replies` says where a header ends and how many zeros follow it.
fn send(stream: &mut UnixStream, headers: &[u8], replies: &[(usize, usize)], zeros: &[u8]) -> IoResult<()> {
    let starts = std::iter::once(0).chain(replies.iter().map(|(end, _)| *end));
    let mut slices: Vec<IoSlice<'_>> = starts
        .zip(replies)
        .flat_map(|(start, (end, payload))| [IoSlice::new(&headers[start..*end]), IoSlice::new(&zeros[..*payload])])
        .collect();
    let mut left = slices.as_mut_slice();
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        let count = stream.write_vectored(left)?;
        IoSlice::advance_slices(&mut left, count);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nbd_server::proto::wire::*;

    use super::*;

    fn be32(bytes: &[u8]) -> u32 {
        u32::from_be_bytes(bytes[..4].try_into().unwrap())
    }

    fn be64(bytes: &[u8]) -> u64 {
        u64::from_be_bytes(bytes[..8].try_into().unwrap())
    }

    /// Sends more requests than one call answers, cut at different places. Each request must be answered once and in
    /// order, and a write only after its payload.
    #[test]
    fn each_request_is_answered_wherever_the_stream_is_cut() {
        for cut in [1, 27, 4099, usize::MAX] {
            let (mut client, server) = UnixStream::pair().unwrap();
            let serving = thread::spawn(move || serve(server, 1 << 30, Duration::ZERO, false));
            client.read_exact(&mut [0; 18]).unwrap();
            let mut handshake = (NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES).to_be_bytes().to_vec();
            handshake.extend(IHAVEOPT.to_be_bytes());
            handshake.extend(NBD_OPT_GO.to_be_bytes());
            handshake.extend([0, 0, 0, 6, 0, 0, 0, 0, 0, 0]);
            client.write_all(&handshake).unwrap();
            // The reply with the export's size has 20 + 12 bytes, and the acknowledgement has 20.
            client.read_exact(&mut [0; 52]).unwrap();

            let requests: Vec<(u16, usize)> =
                (0..3 * BATCH)
                    .map(|number| {
                        if number % 2 == 0 {
                            (NBD_CMD_READ, number % 5 * 100)
                        } else {
                            (NBD_CMD_WRITE, number % 7 * 100)
                        }
                    })
                    .collect();
            let mut stream = Vec::new();
            for (cookie, (kind, len)) in (0_u64..).zip(&requests) {
                stream.extend(NBD_REQUEST_MAGIC.to_be_bytes());
                stream.extend([0, 0]);
                stream.extend(kind.to_be_bytes());
                stream.extend(cookie.to_be_bytes());
                stream.extend([0; 8]);
                stream.extend(u32::try_from(*len).unwrap().to_be_bytes());
                if *kind == NBD_CMD_WRITE {
                    stream.extend(vec![0x25; *len]);
                }
            }
            let mut sender = client.try_clone().unwrap();
            let sending = thread::spawn(move || {
                for piece in stream.chunks(cut.min(stream.len())) {
                    sender.write_all(piece).unwrap();
                }
            });
            for (cookie, (kind, len)) in (0_u64..).zip(&requests) {
                let mut reply = vec![0xff; SIMPLE_REPLY_LEN + if *kind == NBD_CMD_READ { *len } else { 0 }];
                client.read_exact(&mut reply).unwrap();
                assert_eq!((be32(&reply), be32(&reply[4..])), (NBD_SIMPLE_REPLY_MAGIC, 0));
                assert_eq!(be64(&reply[8..]), cookie, "cut every {cut} bytes");
                assert!(reply[SIMPLE_REPLY_LEN..].iter().all(|byte| *byte == 0));
            }
            sending.join().unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            serving.join().unwrap().unwrap();
        }
    }
}
