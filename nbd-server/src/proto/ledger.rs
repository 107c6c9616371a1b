//! A record of the requests that were received and not answered.

use super::ErrorCode;
use super::reply::{Body, Headers, Reply};
use super::transmission::Header;
use super::wire::{NBD_CMD_DISC, REQUEST_LEN, SIMPLE_REPLY_LEN};

/// Follows a stream of compact requests, and records the cookies of the requests that wait for their simple replies.
///
/// This is for a client that waits for every answer and does not ask again when its connection ends, such as the
/// kernel's NBD client. The session that serves the stream may fail at any moment. The ledger is independent of the
/// session, so other code can answer the requests that a failed session leaves.
///
/// A request counts once it was received completely, including its payload. If the stream ends in the middle of a
/// request, the client knows that this request was not received.
#[derive(Debug, Default)]
pub struct Ledger {
    owed: Vec<u64>,
    position: Position,
}

/// The position in the stream.
#[derive(Debug)]
enum Position {
    /// In a header. `len` bytes of it were received.
    Header { bytes: [u8; REQUEST_LEN], len: usize },
    /// In the payload of a write.
    Payload { cookie: u64, left: u64, is_answered: bool },
    /// The client has left, or the stream is invalid.
    Ended,
}

impl Default for Position {
    fn default() -> Self {
        Self::Header { bytes: [0; REQUEST_LEN], len: 0 }
    }
}

impl Ledger {
    /// Records the next bytes of the stream.
    pub fn received(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match &mut self.position {
                Position::Header { bytes: header, len } => {
                    let count = bytes.len().min(REQUEST_LEN - *len);
                    let (taken, rest) = bytes.split_at(count);
                    header[*len..*len + count].copy_from_slice(taken);
                    *len += count;
                    bytes = rest;
                    if *len == REQUEST_LEN {
                        let header = Header::parse(Headers::Simple, header);
                        self.position = self.after(header.ok());
                    }
                }
                Position::Payload { left, .. } => {
                    let count = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    self.received_payload(count);
                    bytes = &bytes[count..];
                }
                Position::Ended => return,
            }
        }
    }

    /// Records that the next `count` bytes of the stream were received. All of them belong to a payload.
    pub fn received_payload(&mut self, count: usize) {
        let Position::Payload { cookie, left, is_answered } = &mut self.position else { return };
        *left = left.saturating_sub(count as u64);
        if *left == 0 {
            if !*is_answered {
                self.owed.push(*cookie);
            }
            self.position = Position::default();
        }
    }

    /// Records that a request is answered: its reply was sent, or is kept to be sent.
    pub fn answered(&mut self, cookie: u64) {
        // Replies come roughly in the order of the requests, so the search is short.
        if let Some(index) = self.owed.iter().position(|owed| *owed == cookie) {
            self.owed.remove(index);
        } else if let Position::Payload { cookie: arriving, is_answered, .. } = &mut self.position {
            // A refused write is answered before its payload is received.
            *is_answered |= *arriving == cookie;
        }
    }

    /// Records that a simple reply was sent, or is kept to be sent. `reply` begins with its header.
    pub fn answered_by(&mut self, reply: &[u8]) {
        if let Some(cookie) = reply.get(SIMPLE_REPLY_LEN - 8..SIMPLE_REPLY_LEN).and_then(|bytes| bytes.try_into().ok())
        {
            self.answered(u64::from_be_bytes(cookie));
        }
    }

    /// Answers all requests in the ledger with an error. Returns the bytes of each reply.
    pub fn fail_owed(&mut self, code: ErrorCode) -> Vec<Vec<u8>> {
        let reply = |cookie| {
            let asked = super::reply::Asked { headers: Headers::Simple, cookie, offset: 0 };
            let mut bytes = Vec::new();
            Reply::new(asked, Body::Error(code.into())).encode(&mut bytes);
            bytes
        };
        self.owed.drain(..).map(reply).collect()
    }

    fn after(&mut self, header: Option<Header>) -> Position {
        match header {
            Some(header) if header.kind != NBD_CMD_DISC => match header.payload() {
                0 => {
                    self.owed.push(header.cookie);
                    Position::default()
                }
                left => Position::Payload { cookie: header.cookie, left, is_answered: false },
            },
            _ => Position::Ended,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::*;
    use super::*;

    fn request(kind: u16, cookie: u64, len: u32) -> Vec<u8> {
        let mut bytes = NBD_REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(0u64.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes
    }

    #[test]
    fn unanswered_requests_are_owed_however_the_stream_is_cut() {
        let stream = [
            request(NBD_CMD_READ, 1, 4096),
            request(NBD_CMD_WRITE, 2, 5000),
            vec![0x25; 5000],
            request(NBD_CMD_FLUSH, 3, 0),
            request(NBD_CMD_WRITE, 4, 0),
            request(NBD_CMD_WRITE, 5, 100),
            vec![0; 99],
        ]
        .concat();
        for piece in [1, 7, 28, 29, 4096, usize::MAX] {
            let mut ledger = Ledger::default();
            stream.chunks(piece.min(stream.len())).for_each(|bytes| ledger.received(bytes));
            ledger.answered(3);
            assert_eq!(ledger.owed, [1, 2, 4], "{piece}");
            ledger.received(&[0]);
            assert_eq!(ledger.owed, [1, 2, 4, 5]);
        }
    }

    #[test]
    fn a_write_refused_before_its_payload_came_is_not_owed() {
        let mut ledger = Ledger::default();
        ledger.received(&request(NBD_CMD_WRITE, 1, 100));
        ledger.answered(1);
        ledger.received_payload(60);
        ledger.received(&[&[0; 40][..], &request(NBD_CMD_READ, 2, 512)].concat());
        assert_eq!(ledger.owed, [2]);
    }

    #[test]
    fn what_is_owed_is_answered_once_with_an_error() {
        let mut ledger = Ledger::default();
        ledger.received(&[request(NBD_CMD_READ, 7, 4096), request(NBD_CMD_READ, 8, 4096)].concat());
        let replies = ledger.fail_owed(ErrorCode::Io);
        let expected = |cookie: u64| {
            [&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &5u32.to_be_bytes(), &cookie.to_be_bytes()].concat()
        };
        assert_eq!(replies, [expected(7), expected(8)]);
        assert!(ledger.fail_owed(ErrorCode::Io).is_empty());
        ledger.received(&request(NBD_CMD_READ, 9, 4096));
        ledger.answered_by(&expected(9));
        assert!(ledger.fail_owed(ErrorCode::Io).is_empty());
    }

    #[test]
    fn nothing_is_owed_after_a_disconnect_or_an_invalid_header() {
        for end in [request(NBD_CMD_DISC, 0, 0), vec![0; REQUEST_LEN]] {
            let mut ledger = Ledger::default();
            ledger.received(&[request(NBD_CMD_READ, 1, 512), end, request(NBD_CMD_READ, 2, 512)].concat());
            assert_eq!(ledger.owed, [1]);
        }
    }
}
