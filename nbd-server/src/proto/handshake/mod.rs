//! The handshake: fixed newstyle negotiation, from the server's first word to the choice of an export.
//!
//! ```text
//!   S: NBDMAGIC IHAVEOPT flags                 Handshake::greeting
//!   C: flags                                   ExpectClientFlags
//!   C: IHAVEOPT option length                  ExpectOption      ◄─┐
//!   C: data                                    ExpectOptionData    │  or SkipOptionData
//!   S: replies                                 Negotiation       ──┘  until GO or EXPORT_NAME
//!      TLS handshake                           ExpectTls              after STARTTLS, then ExpectOption
//! ```
//! Each state is a type, named for what it expects. Its step consumes it, so a state that failed cannot be entered
//! again. A state passes what was negotiated so far, the `Negotiation`, to the next state. Only [`ExpectTls`] does not:
//! once TLS begins, all earlier options are forgotten.

mod negotiation;
mod option;
mod replies;
mod states;

use super::reader::Truncated;
use super::reply::Headers;
use super::wire::*;

pub use states::ExpectTls;
use states::{ExpectClientFlags, ExpectOption, ExpectOptionData, MAX_OPTIONS, SkipOptionData};

/// What the handshake tells a client about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name that clients ask for. The empty name stands for the first export of the list, unless an export has the empty
    /// name.
    pub name: String,
    /// A description for people. It is empty if there is none.
    pub description: String,
    /// The size in bytes.
    pub size: u64,
    /// Whether writes, trims and zeroes are refused.
    pub read_only: bool,
    /// Whether space may be given back to the disk. If not, trims are refused.
    pub discards: bool,
    /// The preferred block size in bytes, a power of two of at least 512. Requests that are aligned to it are written without a
    /// read first.
    pub preferred_block: u32,
}

impl ExportInfo {
    /// Returns the transmission flags: what a client may ask of the export if nothing else was negotiated.
    pub fn transmission_flags(&self) -> u16 {
        let always = NBD_FLAG_HAS_FLAGS
            | NBD_FLAG_SEND_FLUSH
            | NBD_FLAG_SEND_FUA
            | NBD_FLAG_CAN_MULTI_CONN
            | NBD_FLAG_SEND_CACHE;
        let trim = if self.discards { NBD_FLAG_SEND_TRIM } else { 0 };
        let writing = NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO | trim;
        always | if self.read_only { NBD_FLAG_READ_ONLY } else { writing }
    }
}

/// The server's mode ("TLS support"): NOTLS, SELECTIVETLS without an export that requires TLS, or FORCEDTLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsPolicy {
    /// There is no TLS. A client that asks for it gets an error.
    #[default]
    Off,
    /// Clients may use TLS. An attacker between client and server can prevent this unnoticed, unless the client insists on TLS.
    Offered,
    /// A client gets no information and no access before TLS.
    Required,
}

/// The result of the handshake. The default is for a client without a handshake: the first export and no options.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// The chosen export: its index in the list that the handshake was given.
    pub export: usize,
    /// The form of requests and replies.
    pub headers: Headers,
    /// Whether `base:allocation` was selected, so that `NBD_CMD_BLOCK_STATUS` is served.
    pub allocation: bool,
}

/// Why a client is disconnected during the handshake. The NBD specification allows this if the client breaks "mandatory
/// conditions", and requires it where no error can be reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Client flags that are undefined, or that the server did not offer.
    #[error("the client set unknown flags: {0:#010x}")]
    ClientFlags(u32),
    /// An option that does not begin with `IHAVEOPT`.
    #[error("the client sent {0:#018x} instead of IHAVEOPT at the start of an option")]
    Magic(u64),
    /// `NBD_OPT_EXPORT_NAME` for an export that does not exist. This option cannot report an error.
    #[error("the client asked for an export that does not exist, with NBD_OPT_EXPORT_NAME, which has no error reply")]
    NoSuchExport,
    /// `NBD_OPT_EXPORT_NAME` without TLS although TLS is required. This option cannot report an error.
    #[error(
        "the client asked for an export without TLS, which is required, with NBD_OPT_EXPORT_NAME, which has no error reply"
    )]
    TlsRequired,
    /// `NBD_OPT_EXPORT_NAME` after extended headers were negotiated.
    #[error("the client sent NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS")]
    ExportNameWithExtendedHeaders,
    /// Option data that is too long to be skipped.
    #[error("the client announced an option of {0} bytes, which is too long")]
    OptionTooLong(u32),
    /// A negotiation that does not end.
    #[error("the client sent more than {MAX_OPTIONS} options")]
    TooManyOptions,
    /// The session passed another number of bytes than the handshake wants.
    #[error("the session passed {found} bytes, but the handshake wants {wanted}")]
    WrongLength {
        /// The number that [`Handshake::wanted`] returned.
        wanted: usize,
        /// The number that the session passed.
        found: usize,
    },
}

impl From<Truncated> for HandshakeError {
    fn from(_: Truncated) -> Self {
        Self::WrongLength { wanted: 1, found: 0 }
    }
}

/// A handshake that waits for the client. It knows how many bytes it wants next. The step that takes these bytes
/// consumes the handshake.
#[derive(Debug)]
pub struct Handshake(State);

/// What the handshake waits for.
#[derive(Debug)]
enum State {
    ClientFlags(ExpectClientFlags),
    Option(ExpectOption),
    OptionData(ExpectOptionData),
    SkipOptionData(SkipOptionData),
}

/// The result of a step.
#[derive(Debug)]
pub enum Next {
    /// The negotiation continues.
    Continue(Handshake),
    /// An export was chosen. From now on the client sends requests.
    Transmission(Negotiated),
    /// TLS was negotiated. Send the pending bytes. The TLS handshake then begins with the next byte that the client sends.
    StartTls(ExpectTls),
    /// The client ended the session. Send the pending bytes and close the connection.
    Aborted,
}

impl Handshake {
    /// Begins a handshake. Adds the server's first message to `out`.
    pub fn greeting(tls: TlsPolicy, out: &mut Vec<u8>) -> Self {
        out.extend(NBDMAGIC.to_be_bytes());
        out.extend(IHAVEOPT.to_be_bytes());
        out.extend((NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES).to_be_bytes());
        Self(State::ClientFlags(ExpectClientFlags { tls }))
    }

    /// Returns the number of bytes that the next step takes: at least one, at most 16 KiB.
    pub fn wanted(&self) -> usize {
        match &self.0 {
            State::ClientFlags(_) => ExpectClientFlags::WANTED,
            State::Option(_) => ExpectOption::WANTED,
            State::OptionData(expect) => expect.wanted(),
            State::SkipOptionData(skip) => skip.wanted(),
        }
    }

    /// Takes the next [`Handshake::wanted`] bytes from the client. Adds the reply to `out`. The session must send it even if
    /// this returns an error.
    ///
    /// # Errors
    /// [`HandshakeError`] if the client must be disconnected.
    pub fn handle(self, bytes: &[u8], exports: &[ExportInfo], out: &mut Vec<u8>) -> Result<Next, HandshakeError> {
        if bytes.len() != self.wanted() {
            return Err(HandshakeError::WrongLength { wanted: self.wanted(), found: bytes.len() });
        }
        match self.0 {
            State::ClientFlags(expect) => expect.handle(bytes),
            State::Option(expect) => expect.handle(bytes, exports, out),
            State::OptionData(expect) => expect.handle(bytes, exports, out),
            State::SkipOptionData(skip) => skip.handle(bytes, exports, out),
        }
    }
}

impl From<ExpectOption> for Handshake {
    fn from(expect: ExpectOption) -> Self {
        Self(State::Option(expect))
    }
}

impl From<ExpectOptionData> for Handshake {
    fn from(expect: ExpectOptionData) -> Self {
        Self(State::OptionData(expect))
    }
}

impl From<SkipOptionData> for Handshake {
    fn from(skip: SkipOptionData) -> Self {
        Self(State::SkipOptionData(skip))
    }
}

#[cfg(test)]
mod tests {
    use super::super::transcript::{End, GOOD_HANDSHAKE, Transcript, example_exports};
    use super::states::MAX_OPTION_DATA;
    use super::*;

    fn option(option: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        bytes
    }

    /// Returns the replies of a server with this policy to the options, in order, and how the conversation ended.
    fn replies(tls: TlsPolicy, options: &[Vec<u8>]) -> (Vec<(u32, u32)>, End) {
        let bytes = [vec![0, 0, 0, 3], options.concat()].concat();
        let transcript = Transcript::with_tls(tls, &example_exports(), [bytes.as_slice()]);
        let mut sent = &transcript.sent[18..];
        let mut replies = Vec::new();
        while let Some((header, rest)) = sent.split_first_chunk::<20>() {
            let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
            replies.push((word(8), word(12)));
            sent = &rest[word(16) as usize..];
        }
        (replies, transcript.end)
    }

    #[test]
    fn a_server_without_tls_refuses_only_starttls() {
        let (replies, end) = replies(TlsPolicy::Off, &[option(NBD_OPT_STARTTLS, &[]), option(NBD_OPT_LIST, &[])]);
        assert_eq!(replies[0], (NBD_OPT_STARTTLS, NBD_REP_ERR_POLICY));
        assert_eq!(replies[1], (NBD_OPT_LIST, NBD_REP_SERVER));
        assert_eq!(end, End::Waiting);
    }

    #[test]
    fn required_tls_comes_before_every_option() {
        let long = vec![0; MAX_OPTION_DATA + 1];
        for (kind, data) in [
            (NBD_OPT_LIST, &[][..]),
            (NBD_OPT_LIST, &[1]),
            (NBD_OPT_INFO, &[0; 6]),
            (NBD_OPT_INFO, &[0; 5]),
            (NBD_OPT_GO, &[0; 6]),
            (NBD_OPT_GO, &long),
            (NBD_OPT_STRUCTURED_REPLY, &[]),
            (4711, &[]),
            (4711, &long),
        ] {
            let asked = [option(kind, data), option(NBD_OPT_STARTTLS, &[]), option(NBD_OPT_LIST, &[])];
            let (replies, _) = replies(TlsPolicy::Required, &asked);
            let expected = [(kind, NBD_REP_ERR_TLS_REQD), (NBD_OPT_STARTTLS, NBD_REP_ACK)];
            assert_eq!(replies[..2], expected, "{kind} {}", data.len());
            assert_eq!(replies[2], (NBD_OPT_LIST, NBD_REP_SERVER));
        }
        let (said, end) = replies(TlsPolicy::Required, &[option(NBD_OPT_ABORT, &[])]);
        assert_eq!((said, end), (vec![(NBD_OPT_ABORT, NBD_REP_ACK)], End::Disconnected));
        for name in [&b""[..], b"disk", b"nowhere"] {
            let (said, end) = replies(TlsPolicy::Required, &[option(NBD_OPT_EXPORT_NAME, name)]);
            assert_eq!((said, end), (vec![], End::Handshake(HandshakeError::TlsRequired)));
        }
    }

    #[test]
    fn starttls_works_once_and_carries_no_data() {
        for policy in [TlsPolicy::Offered, TlsPolicy::Required] {
            let twice = [option(NBD_OPT_STARTTLS, &[0]), option(NBD_OPT_STARTTLS, &[]), option(NBD_OPT_STARTTLS, &[])];
            let (replies, _) = replies(policy, &twice);
            let kinds: Vec<u32> = replies.iter().map(|(_, kind)| *kind).collect();
            assert_eq!(kinds, [NBD_REP_ERR_INVALID, NBD_REP_ACK, NBD_REP_ERR_INVALID]);
        }
    }

    #[test]
    fn under_tls_only_the_limit_of_options_is_remembered() {
        let query = b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation";
        let structured = || option(NBD_OPT_STRUCTURED_REPLY, &[]);
        let (said, _) = replies(
            TlsPolicy::Offered,
            &[structured(), option(NBD_OPT_STARTTLS, &[]), option(NBD_OPT_SET_META_CONTEXT, query)],
        );
        let refused = (NBD_OPT_SET_META_CONTEXT, NBD_REP_ERR_INVALID);
        assert_eq!(said[1..], [(NBD_OPT_STARTTLS, NBD_REP_ACK), refused], "structured replies are forgotten");

        let mut options = vec![structured(); MAX_OPTIONS as usize - 1];
        options.extend([option(NBD_OPT_STARTTLS, &[]), structured()]);
        let (said, end) = replies(TlsPolicy::Offered, &options);
        assert_eq!((said.len(), end), (MAX_OPTIONS as usize, End::Handshake(HandshakeError::TooManyOptions)));
    }

    #[test]
    fn a_client_need_not_use_offered_tls() {
        let transcript = Transcript::with_tls(TlsPolicy::Offered, &example_exports(), [GOOD_HANDSHAKE]);
        assert_eq!(transcript, Transcript::of(&example_exports(), [GOOD_HANDSHAKE]));
    }
}
