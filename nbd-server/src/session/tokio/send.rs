//! The sending half: collects finished requests, and sends all of their replies with one call.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Poll, Waker};

use ::tokio::io::{AsyncWrite, AsyncWriteExt};

use super::{Connection, Finished, lock};

/// The maximum number of slices that one call sends. The header and the payload of a reply are one slice each.
const SLICES: usize = 64;

impl Connection {
    /// Puts a reply into the outbox. `wake` says whether to wake the sending half. Callers in the session's own task
    /// pass `false`: the sending half gets its turn anyway, and a wake would make the scheduler wake another thread.
    pub(super) fn finish(&self, finished: Finished, wake: bool) {
        let mut outbox = lock(&self.outbox);
        outbox.finished.push(finished);
        let waiting = if wake { outbox.waiting.take() } else { None };
        drop(outbox);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Waits for replies to send, and takes all of them. Returns `false` if no more will come.
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
        let mut outcome = Ok(());
        while self.finished(&mut replies).await {
            for group in replies.chunks(SLICES / 2) {
                let mut sent = 0;
                if outcome.is_ok() {
                    headers.clear();
                    outcome = send_group(&mut writer, group, &mut headers, &mut sent, &self.moved).await;
                    if outcome.is_ok() {
                        if let Some(link) = &self.link {
                            link.answered(group.iter().map(|finished| finished.reply.cookie()));
                        }
                        continue;
                    }
                    if self.link.is_some() {
                        // Shutting down makes the other end hang up, if it has not done so. Everything that the other
                        // end had sent is received and carried out first.
                        let _ = writer.shutdown().await;
                    }
                }
                match &self.link {
                    Some(link) => {
                        link.keep(unsent(group, sent));
                        // The replies that are not kept were sent.
                        link.answered(group.iter().map(|finished| finished.reply.cookie()));
                    }
                    None => return outcome,
                }
            }
            replies.clear();
        }
        outcome?;
        writer.shutdown().await
    }
}

/// Encodes the replies that were not sent completely. `sent` is how many bytes of all replies were sent.
pub(super) fn unsent(replies: &[Finished], mut sent: usize) -> Vec<Vec<u8>> {
    let mut unsent = Vec::new();
    for Finished { reply, reservation } in replies {
        let mut bytes = Vec::new();
        reply.encode(&mut bytes);
        if let Some(payload) = &reservation.payload {
            bytes.extend_from_slice(&payload.bytes[..reply.payload_len()]);
        }
        match sent.checked_sub(bytes.len()) {
            Some(rest) => sent = rest,
            None => {
                sent = 0;
                unsent.push(bytes);
            }
        }
    }
    unsent
}

/// Sends up to `SLICES / 2` replies with as few calls as the socket allows.
async fn send_group(
    writer: &mut (impl AsyncWrite + Unpin),
    replies: &[Finished],
    headers: &mut Vec<u8>,
    sent: &mut usize,
    moved: &AtomicU32,
) -> io::Result<()> {
    // The offset at which each reply's header ends.
    let mut ends = [0; SLICES / 2];
    for (Finished { reply, .. }, end) in replies.iter().zip(&mut ends) {
        reply.encode(headers);
        *end = headers.len();
    }
    let mut slices = [IoSlice::new(&[]); SLICES];
    let (mut count, mut start) = (0, 0);
    for (Finished { reply, reservation }, end) in replies.iter().zip(ends) {
        let Some(payload) = reservation.payload.as_ref().filter(|_| reply.payload_len() > 0) else { continue };
        // Headers of replies without payload go into the slice of the next header.
        slices[count] = IoSlice::new(&headers[start..end]);
        slices[count + 1] = IoSlice::new(&payload.bytes[..reply.payload_len()]);
        count += 2;
        start = end;
    }
    if start < headers.len() {
        slices[count] = IoSlice::new(&headers[start..]);
        count += 1;
    }
    write_all_vectored(writer, &mut slices[..count], sent, moved).await?;
    writer.flush().await
}

/// Sends all slices. Changes `moved` with each piece that the client takes.
async fn write_all_vectored(
    writer: &mut (impl AsyncWrite + Unpin),
    mut slices: &mut [IoSlice<'_>],
    sent: &mut usize,
    moved: &AtomicU32,
) -> io::Result<()> {
    while !slices.is_empty() {
        match writer.write_vectored(slices).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => {
                moved.fetch_add(1, Ordering::Relaxed);
                *sent += count;
                IoSlice::advance_slices(&mut slices, count);
            }
        }
    }
    Ok(())
}
