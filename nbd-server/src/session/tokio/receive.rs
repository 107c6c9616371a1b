//! The receiving half: parses requests from the bytes that have arrived, and hands them over in batches.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use ::tokio::io::AsyncRead;
use ::tokio::time::{Instant, timeout, timeout_at};

use super::intake::Intake;
use super::{Connection, Finished, Job, Reservation, Task, cost};
use crate::proto::{ExpectRequest, ExpectSkipped, Received, Reply, Request};
use crate::session::outcome::count_refused;
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
                self.note_progress();
                self.pass().await;
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
                    let (reservation, room) = self.admit(request.command().payload_len(), workers, &mut batch).await;
                    match room {
                        Ok(()) => batch.push(Task::new(request, reservation)),
                        Err(error) => self.refuse_for(request, reservation, error).await,
                    }
                    next
                }
                Ok(Received::Payload(expect)) => {
                    let (mut reservation, room) = self.admit(expect.len(), workers, &mut batch).await;
                    if let Err(error) = room {
                        let (request, skip) = expect.refuse();
                        self.refuse_for(request, reservation, error).await;
                        self.skip(skip, &mut intake, &mut reader, workers, &mut batch).await?
                    } else {
                        if let Some(buffer) = &mut reservation.payload {
                            let bytes = &mut buffer.bytes;
                            let mut at = intake.move_to(bytes);
                            while at < bytes.len() {
                                self.submit(workers, &mut batch).await;
                                at += intake.receive(&mut reader, &mut bytes[at..]).await?;
                                self.note_progress();
                                self.pass().await;
                            }
                        }
                        let (request, next) = expect.received();
                        batch.push(Task::new(request, reservation));
                        next
                    }
                }
                Ok(Received::Refused(reply, next)) => {
                    self.refuse(reply, workers, &mut batch).await;
                    next
                }
                Ok(Received::Skip(reply, skip)) => {
                    self.refuse(reply, workers, &mut batch).await;
                    self.skip(skip, &mut intake, &mut reader, workers, &mut batch).await?
                }
                Ok(Received::Disconnect) => {
                    self.link.iter().for_each(|link| link.leave());
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

    /// Waits until the link allows the session to begin what it received last.
    async fn pass(&self) {
        if let Some(link) = &self.link {
            link.pass().await;
        }
    }

    /// Receives and drops the rest of a payload whose request was refused.
    async fn skip(
        &self,
        mut skip: ExpectSkipped,
        intake: &mut Intake,
        reader: &mut (impl AsyncRead + Unpin),
        workers: &Workers<Work>,
        batch: &mut Vec<Task>,
    ) -> Result<ExpectRequest, SessionError> {
        loop {
            let discarded = intake.discard(skip.left());
            match skip.skipped(discarded) {
                Ok(next) => return Ok(next),
                Err(more) => skip = more,
            }
            self.submit(workers, batch).await;
            if intake.fill(reader).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            self.note_progress();
            self.pass().await;
        }
    }

    /// Waits for more bytes from the client, or for the shutdown.
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

    /// Reserves budget and a buffer for a request with a payload of `len` bytes. Waits until the budget has room. If
    /// there is no memory for the buffer, returns the error and a reservation without a buffer.
    async fn admit(
        self: &Arc<Self>,
        len: usize,
        workers: &Workers<Work>,
        batch: &mut Vec<Task>,
    ) -> (Reservation, io::Result<()>) {
        let cost = cost(len);
        let permit = match self.budget.try_acquire_many(cost) {
            Ok(permit) => Some(permit),
            Err(_) => {
                // Perhaps only the requests in this batch can free budget, so they are submitted first.
                self.submit(workers, batch).await;
                // The semaphore is never closed.
                self.budget.acquire_many(cost).await.ok()
            }
        };
        // The reservation gives the permits back when it is dropped. So the permits themselves are forgotten here.
        permit.into_iter().for_each(|permit| permit.forget());
        self.reserve(len)
    }

    /// Reserves a buffer for a request that has its share of the budget already.
    pub(super) fn reserve(self: &Arc<Self>, len: usize) -> (Reservation, io::Result<()>) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let mut reservation = Reservation { connection: Arc::clone(self), payload: None, cost: cost(len) };
        let room = (len > 0).then(|| self.buffers().take(len)).transpose().map(|payload| reservation.payload = payload);
        (reservation, room)
    }

    /// Answers a request with an error, because there is no memory for its payload.
    async fn refuse_for(self: &Arc<Self>, request: Request, reservation: Reservation, error: io::Error) {
        let task = Task { request, outcome: Err(error.into()), reservation, submitted: None };
        self.finish(task.finish(std::time::Instant::now()), false);
        self.let_send().await;
    }

    /// Sends a reply to a request that is not carried out.
    async fn refuse(self: &Arc<Self>, reply: Reply, workers: &Workers<Work>, batch: &mut Vec<Task>) {
        count_refused(&self.export, &reply);
        let (reservation, _) = self.admit(0, workers, batch).await;
        self.finish(Finished { reply, reservation }, false);
        self.let_send().await;
    }

    /// Carries out the batch. If the disk lies in memory and all requests are small, the session carries out the
    /// requests itself, since waking a worker would take longer. Otherwise the workers carry them out. The session
    /// never waits for a real disk, however quick the disk was before, because this thread also serves other
    /// connections.
    async fn submit(&self, workers: &Workers<Work>, batch: &mut Vec<Task>) {
        if batch.is_empty() {
            return;
        }
        let submitted = Some(std::time::Instant::now());
        batch.iter_mut().for_each(|task| task.submitted = submitted);
        if !self.resident || batch.iter().any(|task| !task.is_small()) {
            workers.submit(batch.drain(..).map(|task| Work::Tokio(Job::new(self, task))));
            return;
        }
        batch.iter_mut().for_each(Task::carry_out);
        // One reading of the clock for all of them: their replies are sent together.
        let now = std::time::Instant::now();
        for task in batch.drain(..) {
            self.finish(task.finish(now), false);
        }
        self.let_send().await;
    }

    /// Yields until the sending half has had its turn.
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

/// Why the wait for more bytes ended.
enum More {
    Bytes,
    Shutdown,
    /// The client hung up.
    End,
    /// The client had time to finish after the shutdown, and this time is over.
    Enough,
}

impl More {
    fn after(read: usize) -> Self {
        if read == 0 { Self::End } else { Self::Bytes }
    }
}
