//! `nbdcrypt bench null`: a server with nothing behind it. What is written is dropped, what is read is zeros that the CPU's
//! cache holds, and requests gather while the client reads its replies. So a client is as fast with it as the client allows.

use std::fs;
use std::io::{ErrorKind, IoSlice, Result as IoResult, Write};
use std::num::NonZeroU64;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nbd_server::proto::wire::*;
use nbd_server::server::enlarge_send_buffer;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::yardstick::{HEAD, MAX_PAYLOAD, be16, be32, handshake, head};

const INTAKE: usize = 256 << 10;
/// Requests that are answered at once, at most: two slices each, of which the kernel takes 1024 (`UIO_MAXIOV`).
const BATCH: usize = 256;
/// With requests of more bytes, client and server have enough to do.
const SMALL: usize = 8 << 10;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file whose size the export has.
    file: PathBuf,
    /// Listen on a unix socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// How long small requests gather, in microseconds. fio with depth 32 is fastest with 20 to 40.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 40, value_parser = clap::value_parser!(u64).range(0..=1_000_000))]
    pause: u64,
    /// Never wait, look again.
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

fn serve(mut stream: UnixStream, size: u64, pause: Duration, spin: bool) -> IoResult<()> {
    enlarge_send_buffer(&stream);
    // A sleep is 50 µs longer otherwise.
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?;
    let structured = handshake(&mut stream, size)?;
    let mut intake = vec![0; INTAKE];
    let mut zeros = Vec::new();
    // How much of the intake is filled; a write's payload that is still to come, in bytes, and the reply that is due then.
    let (mut filled, mut skip, mut due) = (0, 0, None);
    loop {
        let count = receive(&stream, &mut intake[filled..], spin)?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        let mut at = 0;
        loop {
            let mut replies = Vec::with_capacity(BATCH);
            let mut moved = 0;
            while replies.len() < BATCH {
                let skipped = skip.min(filled - at);
                at += skipped;
                skip -= skipped;
                if skip > 0 {
                    break;
                }
                if let Some((reply, len)) = due.take() {
                    moved += len;
                    replies.push((reply, 0));
                    continue;
                }
                let Some(request) = intake[at..filled].first_chunk::<REQUEST_LEN>() else { break };
                at += REQUEST_LEN;
                let (kind, len) = (be16(&request[6..]), be32(&request[24..]) as usize);
                if be32(request) != NBD_REQUEST_MAGIC || len > MAX_PAYLOAD {
                    return Err(ErrorKind::InvalidData.into());
                }
                let payload = if kind == NBD_CMD_READ { len } else { 0 };
                let reply = head(request, structured, 0, payload);
                match kind {
                    NBD_CMD_DISC => return Ok(()),
                    NBD_CMD_WRITE => (skip, due) = (len, Some((reply, len))),
                    _ => {
                        moved += payload;
                        replies.push((reply, payload));
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
            send(&mut stream, &replies, &zeros)?;
            if moved <= replies.len() * SMALL {
                // A sleep of nothing is none.
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

/// Sends headers, each with so many zeros after it.
fn send(stream: &mut UnixStream, replies: &[(([u8; HEAD], usize), usize)], zeros: &[u8]) -> IoResult<()> {
    let mut slices: Vec<IoSlice<'_>> = replies
        .iter()
        .flat_map(|((head, start), payload)| [IoSlice::new(&head[*start..]), IoSlice::new(&zeros[..*payload])])
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

    use super::super::yardstick::be64;
    use super::*;

    /// More requests than are answered at once, cut anywhere: each is answered once, in order, a write when its payload is there.
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
            // The export's size, in a reply of 20 + 12 bytes, and the end of it, in 20.
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
