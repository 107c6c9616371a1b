//! A whole conversation without a connection: what a client that sends given bytes is told, and what it asked for. For
//! tests and fuzzers, which ask whether any bytes, cut anywhere, do harm.

use super::handshake::{ExportInfo, Handshake, HandshakeError, Next};
use super::transmission::{ExpectRequest, Received, TransmissionError};
use super::{Command, ErrorCode};

/// What came of a client's bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    /// All that the server said. A read that was asked for is answered with success and zeroes, left out here.
    pub sent: Vec<u8>,
    /// The requests to be carried out, in order.
    pub commands: Vec<Command>,
    /// The payloads of the writes among them, one after the other.
    pub payload: Vec<u8>,
    /// How the conversation ended.
    pub end: End,
}

/// How a conversation ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum End {
    /// It did not: the server waits for more.
    #[default]
    Waiting,
    /// The client took its leave.
    Disconnected,
    /// The client was cut off during the handshake.
    Handshake(HandshakeError),
    /// The client was cut off in transmission.
    Transmission(TransmissionError),
}

enum State {
    Handshake(Handshake),
    Transmission(ExpectRequest),
    Skip(super::ExpectSkipped),
    Payload(super::ExpectPayload),
    Ended,
}

impl Transcript {
    /// Plays the client's bytes, which arrive in these pieces, to a server of these exports. Each write, trim and so on
    /// succeeds.
    pub fn of<'a>(exports: &[ExportInfo], pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut transcript = Self::default();
        let mut state = State::Handshake(Handshake::greeting(&mut transcript.sent));
        let mut held = Vec::new();
        for piece in pieces {
            held.extend_from_slice(piece);
            let mut at = 0;
            loop {
                let wanted = match &state {
                    State::Handshake(handshake) => handshake.wanted(),
                    State::Transmission(expect) => expect.header_len(),
                    State::Skip(expect) => expect.left().min((held.len() - at).max(1)),
                    State::Payload(expect) => expect.len(),
                    State::Ended => return transcript,
                };
                let Some(bytes) = held.get(at..at + wanted) else { break };
                state = transcript.step(state, bytes, exports);
                at += wanted;
            }
            held.drain(..at);
        }
        transcript
    }

    fn step(&mut self, state: State, bytes: &[u8], exports: &[ExportInfo]) -> State {
        match state {
            State::Handshake(handshake) => match handshake.handle(bytes, exports, &mut self.sent) {
                Ok(Next::Continue(next)) => State::Handshake(next),
                Ok(Next::Transmission(negotiated)) => {
                    State::Transmission(ExpectRequest::new(&exports[negotiated.export]))
                }
                Ok(Next::Aborted) => self.ended(End::Disconnected),
                Err(error) => self.ended(End::Handshake(error)),
            },
            State::Transmission(expect) => match expect.handle(bytes) {
                Ok(Received::Request(request, next)) => {
                    self.carry_out(request);
                    State::Transmission(next)
                }
                Ok(Received::Payload(expect)) => State::Payload(expect),
                Ok(Received::Refused(reply, next)) => {
                    reply.encode(&mut self.sent);
                    State::Transmission(next)
                }
                Ok(Received::Skip(reply, next)) => {
                    reply.encode(&mut self.sent);
                    State::Skip(next)
                }
                Ok(Received::Disconnect) => self.ended(End::Disconnected),
                Err(error) => self.ended(End::Transmission(error)),
            },
            State::Payload(expect) => {
                self.payload.extend_from_slice(bytes);
                let (request, next) = expect.received();
                self.carry_out(request);
                State::Transmission(next)
            }
            State::Skip(expect) => match expect.skipped(bytes.len()) {
                Ok(next) => State::Transmission(next),
                Err(more) => State::Skip(more),
            },
            State::Ended => State::Ended,
        }
    }

    fn carry_out(&mut self, request: super::Request) {
        let command = *request.command();
        self.commands.push(command);
        let outcome = match command {
            Command::WriteZeroes { fast: true, .. } => Err(ErrorCode::NotSup),
            _ => Ok(()),
        };
        request.finish(outcome).encode(&mut self.sent);
    }

    fn ended(&mut self, end: End) -> State {
        self.end = end;
        State::Ended
    }
}
