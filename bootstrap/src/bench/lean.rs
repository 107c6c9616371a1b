//! A client that does less than fio, so that the server becomes the limit. It keeps many requests in flight and only
//! counts the replies. Each connection has a thread. All data that is read goes to one buffer, and no code reads it.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nbd_server::proto::wire::*;

use super::interrupt;
use super::sample::Seen;
use super::stage::Region;
use super::workload::Workload;

const BUFFER: usize = 256 << 10;
/// The client gives up on a server that sends nothing for this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the workload on the server behind `socket` for about `runtime`, and returns what the client measured.
///
/// # Errors
/// Fails if the connection breaks or stalls, or if the server sends an error or an invalid reply.
pub fn drive(socket: &Path, workload: &Workload, region: Region, runtime: Duration) -> Result<Seen> {
    interrupt::check()?;
    let share = region.len / u64::from(workload.connections);
    let payload = vec![0xda; if workload.pattern.writes() { workload.block as usize } else { 0 }];
    let clients = (0..workload.connections).map(|_| Client::connect(socket)).collect::<Result<Vec<_>>>()?;
    let started = Instant::now();
    let parts: Vec<Result<Part>> = thread::scope(|scope| {
        let payload = payload.as_slice();
        let threads: Vec<_> = clients
            .into_iter()
            .zip(0..)
            .map(|(mut client, n)| {
                let part = Region { start: region.start + n * share, len: share };
                scope.spawn(move || client.run(workload, part, payload, started, runtime))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("the lean client panicked"))).collect()
    });
    let seconds = started.elapsed().as_secs_f64();
    let (mut requests, mut client_cpu, mut latencies) = (0, 0.0, Vec::new());
    for part in parts {
        let Part { done, cpu_seconds, mut took } = part?;
        requests += done;
        client_cpu += cpu_seconds;
        latencies.append(&mut took);
    }
    ensure!(requests > 0, "the server answered no request");
    latencies.sort_unstable();
    let p99 = latencies.get(latencies.len() * 99 / 100).copied().unwrap_or(0);
    Ok(Seen { bytes: requests * u64::from(workload.block), requests, seconds, p99_us: p99 as f64 / 1e3, client_cpu })
}

/// The result of one connection.
struct Part {
    /// Requests that were answered.
    done: u64,
    /// CPU time of the connection's thread.
    cpu_seconds: f64,
    /// The latency of each request, in nanoseconds.
    took: Vec<u64>,
}

/// Returns the CPU time that this thread has used so far.
fn thread_cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

struct Client {
    stream: UnixStream,
}

impl Client {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        nbd_server::server::enlarge_send_buffer(&stream);
        let mut client = Self { stream };
        client.handshake().context("the NBD handshake failed")?;
        Ok(client)
    }

    fn handshake(&mut self) -> Result<()> {
        self.stream.read_exact(&mut [0; 18])?;
        let mut bytes = (NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES).to_be_bytes().to_vec();
        bytes.extend(IHAVEOPT.to_be_bytes());
        bytes.extend(NBD_OPT_GO.to_be_bytes());
        // The default export has an empty name. No information is requested.
        bytes.extend([0, 0, 0, 6, 0, 0, 0, 0, 0, 0]);
        self.stream.write_all(&bytes)?;
        loop {
            let mut header = [0; 20];
            self.stream.read_exact(&mut header)?;
            let (kind, len) = (be32(&header[12..]), be32(&header[16..]) as usize);
            ensure!(len <= 1 << 16, "the server sent an option reply of {len} bytes");
            self.stream.read_exact(&mut vec![0; len])?;
            match kind {
                NBD_REP_ACK => return Ok(()),
                NBD_REP_INFO => {}
                other => bail!("the server answered {other:#x} to NBD_OPT_GO"),
            }
        }
    }

    /// Runs the workload until its time is over and every request is answered.
    fn run(
        &mut self,
        workload: &Workload,
        region: Region,
        payload: &[u8],
        started: Instant,
        runtime: Duration,
    ) -> Result<Part> {
        let writes = workload.pattern.writes();
        let block = workload.block as usize;
        let mut offsets = Offsets::new(workload, region);
        let mut replies = Replies { payload: if writes { 0 } else { block }, skip: 0, header: VecDeque::new() };
        let mut out = Vec::new();
        let mut buffer = vec![0; BUFFER];
        let (mut in_flight, mut done, mut took) = (0, 0, Vec::new());
        loop {
            let now = started.elapsed();
            // Each connection sends requests at least once, even if its thread starts late.
            if now < runtime || done == 0 && in_flight == 0 {
                out.clear();
                // The cookie is the time of sending.
                let sent = u64::try_from(now.as_nanos())?;
                for _ in in_flight..workload.depth {
                    out.extend(NBD_REQUEST_MAGIC.to_be_bytes());
                    out.extend(0_u16.to_be_bytes());
                    out.extend(if writes { NBD_CMD_WRITE } else { NBD_CMD_READ }.to_be_bytes());
                    out.extend(sent.to_be_bytes());
                    out.extend(offsets.next().to_be_bytes());
                    out.extend(workload.block.to_be_bytes());
                    // A large payload is sent directly, without a copy to `out`.
                    if block <= 64 << 10 {
                        out.extend(payload);
                    } else if writes {
                        self.stream.write_all(&out)?;
                        self.stream.write_all(payload)?;
                        out.clear();
                    }
                }
                self.stream.write_all(&out)?;
                in_flight = workload.depth;
            } else if in_flight == 0 {
                let mut last = NBD_REQUEST_MAGIC.to_be_bytes().to_vec();
                last.extend([0, 0]);
                last.extend(NBD_CMD_DISC.to_be_bytes());
                last.extend([0; 20]);
                self.stream.write_all(&last)?;
                return Ok(Part { done, cpu_seconds: thread_cpu_seconds(), took });
            }
            let len = self.stream.read(&mut buffer).context("the server sent no reply")?;
            ensure!(len > 0, "the server closed the connection");
            let now = u64::try_from(started.elapsed().as_nanos())?;
            replies.take(&buffer[..len], |sent| {
                in_flight -= 1;
                done += 1;
                took.push(now.saturating_sub(sent));
            })?;
        }
    }
}

/// Computes the offset of each request.
struct Offsets {
    region: Region,
    block: u64,
    random: bool,
    state: u64,
}

impl Offsets {
    fn new(workload: &Workload, region: Region) -> Self {
        Self { region, block: workload.block.into(), random: workload.pattern.is_random(), state: region.start }
    }

    fn next(&mut self) -> u64 {
        let blocks = (self.region.len / self.block).max(1);
        let block = if self.random {
            // Knuth's MMIX generator. Its high bits are the random ones.
            self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.state >> 24) % blocks
        } else {
            let next = (self.state - self.region.start) / self.block;
            self.state = self.region.start + (next + 1) % blocks * self.block;
            next
        };
        self.region.start + block * self.block
    }
}

/// Parses simple replies, however the stream is cut.
struct Replies {
    /// Bytes that follow each header.
    payload: usize,
    /// Payload bytes that are still to come.
    skip: usize,
    /// The first bytes of a header that is not complete yet, or a complete header whose payload is still to come.
    header: VecDeque<u8>,
}

impl Replies {
    /// Parses `bytes`. Calls `whole` with the cookie of each reply that they complete.
    fn take(&mut self, mut bytes: &[u8], mut whole: impl FnMut(u64)) -> Result<()> {
        while !bytes.is_empty() {
            if self.header.len() < SIMPLE_REPLY_LEN {
                let now = bytes.len().min(SIMPLE_REPLY_LEN - self.header.len());
                self.header.extend(&bytes[..now]);
                bytes = &bytes[now..];
                if self.header.len() < SIMPLE_REPLY_LEN {
                    return Ok(());
                }
                let header = self.header.make_contiguous();
                ensure!(be32(header) == NBD_SIMPLE_REPLY_MAGIC, "the server sent something that is not a simple reply");
                ensure!(be32(&header[4..]) == 0, "the server replied with error {}", be32(&header[4..]));
                self.skip = self.payload;
            }
            let now = bytes.len().min(self.skip);
            self.skip -= now;
            bytes = &bytes[now..];
            if self.skip == 0 {
                whole(be64(&self.header.make_contiguous()[8..]));
                self.header.clear();
            }
        }
        Ok(())
    }
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::super::workload::TYPICAL;
    use super::*;

    #[test]
    fn replies_are_counted_wherever_the_stream_is_cut() {
        let mut stream = Vec::new();
        for cookie in 1..=3_u64 {
            stream.extend(NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
            stream.extend([0; 4]);
            stream.extend(cookie.to_be_bytes());
            stream.extend([0xab; 5]);
        }
        for cut in 1..stream.len() {
            let mut replies = Replies { payload: 5, skip: 0, header: VecDeque::new() };
            let mut cookies = Vec::new();
            for piece in stream.chunks(cut) {
                replies.take(piece, |cookie| cookies.push(cookie)).unwrap();
            }
            assert_eq!(cookies, [1, 2, 3], "cut every {cut} bytes");
        }
    }

    #[test]
    fn an_error_reply_is_an_error() {
        let mut reply = NBD_SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        reply.extend(22_u32.to_be_bytes());
        reply.extend([0; 8]);
        let mut replies = Replies { payload: 0, skip: 0, header: VecDeque::new() };
        assert!(replies.take(&reply, |_| ()).unwrap_err().to_string().contains("22"));
    }

    #[test]
    fn every_offset_lies_in_the_region_on_a_block() {
        let region = Region { start: 1 << 24, len: 5 << 20 };
        for workload in TYPICAL {
            let mut offsets = Offsets::new(&workload, region);
            for _ in 0..100 {
                let at = offsets.next();
                assert!(at >= region.start && at + u64::from(workload.block) <= region.start + region.len);
                assert_eq!((at - region.start) % u64::from(workload.block), 0);
            }
        }
    }
}
