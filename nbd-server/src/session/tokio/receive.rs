//! The receiving half: requests are parsed out of what arrived, and handed over as many at a time as came together.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use ::tokio::io::AsyncRead;
use ::tokio::time::{Instant, timeout, timeout_at};

use super::intake::Intake;
use super::{Connection, Finished, Place, Task, cost};
use crate::proto::{ExpectRequest, Received, Reply};
use crate::session::workers::Workers;
use crate::session::{DEAF, IDLE, QUIET, SessionError, Work};
use crate::shutdown::Shutdown;

impl Connection {
    pub(super) async fn receive(
        self: &Arc<Self>,
        mut reader: impl AsyncRead + Unpin,
        workers: &Workers<Work>,
        mut shutdown: Shutdown,
    ) -> Result<(), SessionError> {
        let mut intake = Intake::new();
        let mut batch = Vec::new();
        let mut expect = ExpectRequest::new(self.export.info(), &self.negotiated);
        let mut deaf_at = None;
        loop {
            while intake.len() < expect.header_len() {
                self.submit(workers, &mut batch).await;
                let more = self.more(&mut intake, &mut reader, &mut shutdown, &mut deaf_at).await?;
                if deaf_at.is_some() {
                    expect.shut_down();
                }
                self.has_moved();
                match more {
                    More::Bytes | More::Shutdown => {}
                    More::End if intake.len() == 0 => return Ok(()),
                    More::End => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                    More::Enough => return Ok(()),
                }
            }
            let header = intake.take(expect.header_len());
            expect = match expect.handle(header) {
                Ok(Received::Request(request, next)) => {
                    let place = self.admit(request.command().payload_len(), workers, &mut batch).await;
                    batch.push(Task { request, place });
                    next
                }
                Ok(Received::Payload(expect)) => {
                    let mut place = self.admit(expect.len(), workers, &mut batch).await;
                    if let Some(buffer) = &mut place.payload {
                        let bytes = &mut buffer.bytes;
                        let mut at = intake.move_to(bytes);
                        while at < bytes.len() {
                            self.submit(workers, &mut batch).await;
                            at += intake.receive(&mut reader, &mut bytes[at..]).await?;
                            self.has_moved();
                        }
                    }
                    let (request, next) = expect.received();
                    batch.push(Task { request, place });
                    next
                }
                Ok(Received::Refused(reply, next)) => {
                    self.refuse(reply, workers, &mut batch).await;
                    next
                }
                Ok(Received::Skip(reply, mut skip)) => {
                    self.refuse(reply, workers, &mut batch).await;
                    loop {
                        let discarded = intake.discard(skip.left());
                        match skip.skipped(discarded) {
                            Ok(next) => break next,
                            Err(more) => skip = more,
                        }
                        self.submit(workers, &mut batch).await;
                        if intake.fill(&mut reader).await? == 0 {
                            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                        }
                        self.has_moved();
                    }
                }
                Ok(Received::Disconnect) => {
                    self.submit(workers, &mut batch).await;
                    return Ok(());
                }
                Err(error) => {
                    self.submit(workers, &mut batch).await;
                    return Err(error.into());
                }
            }
        }
    }

    /// Waits for more of the client, or for the shutdown.
    async fn more(
        &self,
        intake: &mut Intake,
        reader: &mut (impl AsyncRead + Unpin),
        shutdown: &mut Shutdown,
        deaf_at: &mut Option<Instant>,
    ) -> Result<More, SessionError> {
        if let Some(deaf_at) = *deaf_at {
            let until = deaf_at.min(Instant::now() + QUIET);
            return match timeout_at(until, intake.fill(reader)).await {
                Ok(read) => Ok(More::after(read?)),
                Err(_) => Ok(More::Enough),
            };
        }
        ::tokio::select! {
            biased;
            read = self.fill(intake, reader) => Ok(More::after(read?)),
            () = shutdown.requested() => {
                *deaf_at = Some(Instant::now() + DEAF);
                Ok(More::Shutdown)
            }
        }
    }

    pub(super) async fn fill(&self, intake: &mut Intake, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
        if self.in_flight.load(Ordering::Relaxed) == 0 && self.buffers().is_large() {
            match timeout(IDLE, intake.fill(reader)).await {
                Ok(read) => return read,
                Err(_) => self.buffers().shrink(),
            }
        }
        intake.fill(reader).await
    }

    /// Waits until there is room for a request with so much payload, and gives it a buffer.
    async fn admit(self: &Arc<Self>, len: usize, workers: &Workers<Work>, batch: &mut Vec<Task>) -> Place {
        let cost = cost(len);
        let permit = match self.budget.try_acquire_many(cost) {
            Ok(permit) => Some(permit),
            Err(_) => {
                // What is to be waited for may be in the batch.
                self.submit(workers, batch).await;
                // The semaphore is never closed.
                self.budget.acquire_many(cost).await.ok()
            }
        };
        // Given back with the place.
        permit.into_iter().for_each(|permit| permit.forget());
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let payload = (len > 0).then(|| self.buffers().take(len));
        Place { connection: Arc::clone(self), payload, cost }
    }

    /// Sends a reply that needs nobody's work.
    async fn refuse(self: &Arc<Self>, reply: Reply, workers: &Workers<Work>, batch: &mut Vec<Task>) {
        self.export.statistics().answered();
        self.export.statistics().failed();
        let place = self.admit(0, workers, batch).await;
        self.finish(Finished { reply, place }, false);
        self.let_send().await;
    }

    /// Has the batch carried out: here, where that takes no longer than waking a worker would, or by the workers. A disk
    /// that is no memory is never waited for here, however quick it was: this thread has other connections to serve.
    async fn submit(&self, workers: &Workers<Work>, batch: &mut Vec<Task>) {
        if batch.is_empty() {
            return;
        }
        if !self.resident || batch.iter().any(|task| !task.is_small()) {
            self.with_workers.fetch_add(batch.len(), Ordering::Relaxed);
            workers.submit(batch.drain(..).map(Work::Task));
            return;
        }
        batch.drain(..).for_each(|task| self.finish(task.carry_out(), false));
        self.let_send().await;
    }

    /// Lets the sending half have its turn.
    async fn let_send(&self) {
        let mut begun = false;
        poll_fn(|_| {
            if std::mem::replace(&mut begun, true) {
                return Poll::Ready(());
            }
            self.yielded.store(true, Ordering::Relaxed);
            Poll::Pending
        })
        .await;
    }
}

/// What came of waiting for more.
enum More {
    Bytes,
    Shutdown,
    /// The client hung up.
    End,
    /// The client was given time after the shutdown.
    Enough,
}

impl More {
    fn after(read: usize) -> Self {
        if read == 0 { Self::End } else { Self::Bytes }
    }
}
