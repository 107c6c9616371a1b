//! The sending half: collects what was carried out, and sends all of it with one call.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Poll, Waker};

use ::tokio::io::{AsyncWrite, AsyncWriteExt};

use super::{Connection, Finished, lock};

/// Replies sent with one call: header and payload of each are one slice.
const SLICES: usize = 64;

impl Connection {
    /// Puts a reply into the outbox. The sending half is woken where it does not get its turn anyway: a wake from
    /// within its own task would have the scheduler rouse another thread for nothing.
    pub(super) fn finish(&self, finished: Finished, wake: bool) {
        let mut outbox = lock(&self.outbox);
        outbox.finished.push(finished);
        let waiting = if wake { outbox.waiting.take() } else { None };
        drop(outbox);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Waits for replies to send and takes all there are; `false` when there is none left to come.
    pub(super) async fn finished(&self, replies: &mut Vec<Finished>) -> bool {
        poll_fn(|context| {
            let mut outbox = lock(&self.outbox);
            if !outbox.finished.is_empty() {
                std::mem::swap(&mut outbox.finished, replies);
                return Poll::Ready(true);
            }
            if self.received_all.load(Ordering::Acquire) && self.in_flight.load(Ordering::Acquire) == 0 {
                return Poll::Ready(false);
            }
            outbox.waiting = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    pub(super) async fn send(&self, mut writer: impl AsyncWrite + Unpin) -> io::Result<()> {
        let mut replies = Vec::new();
        let mut headers = Vec::new();
        while self.finished(&mut replies).await {
            for group in replies.chunks(SLICES / 2) {
                headers.clear();
                send_group(&mut writer, group, &mut headers, &self.moved).await?;
            }
            replies.clear();
        }
        writer.shutdown().await
    }
}

/// Sends up to `SLICES / 2` replies with as few calls as the socket allows.
async fn send_group(
    writer: &mut (impl AsyncWrite + Unpin),
    replies: &[Finished],
    headers: &mut Vec<u8>,
    moved: &AtomicU32,
) -> io::Result<()> {
    // Where each reply's header ends.
    let mut ends = [0; SLICES / 2];
    for (Finished { reply, .. }, end) in replies.iter().zip(&mut ends) {
        reply.encode(headers);
        *end = headers.len();
    }
    let mut slices = [IoSlice::new(&[]); SLICES];
    let (mut count, mut start) = (0, 0);
    for (Finished { reply, place }, end) in replies.iter().zip(ends) {
        let Some(payload) = place.payload.as_ref().filter(|_| reply.payload_len() > 0) else { continue };
        // Headers without payload go along with the next one.
        slices[count] = IoSlice::new(&headers[start..end]);
        slices[count + 1] = IoSlice::new(&payload.bytes[..reply.payload_len()]);
        count += 2;
        start = end;
    }
    if start < headers.len() {
        slices[count] = IoSlice::new(&headers[start..]);
        count += 1;
    }
    write_all_vectored(writer, &mut slices[..count], moved).await?;
    writer.flush().await
}

/// Sends it all, and lets `moved` change with each piece that the client took.
async fn write_all_vectored(
    writer: &mut (impl AsyncWrite + Unpin),
    mut slices: &mut [IoSlice<'_>],
    moved: &AtomicU32,
) -> io::Result<()> {
    while !slices.is_empty() {
        match writer.write_vectored(slices).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => {
                moved.fetch_add(1, Ordering::Relaxed);
                IoSlice::advance_slices(&mut slices, count);
            }
        }
    }
    Ok(())
}
