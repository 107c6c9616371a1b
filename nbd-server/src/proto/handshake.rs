//! The handshake: fixed newstyle negotiation, from the first word to the choice of an export.
//!
//! ```text
//!   S: NBDMAGIC IHAVEOPT flags                 Handshake::greeting
//!   C: flags                                   ExpectClientFlags
//!   C: IHAVEOPT option length                  ExpectOption      ◄─┐
//!   C: data                                    ExpectOptionData    │  or SkipOptionData
//!   S: replies                                                   ──┘  until GO or EXPORT_NAME
//! ```
//! After `NBD_OPT_STARTTLS` was acknowledged, the same goes on under TLS, from `ExpectOption`, with all options forgotten.

use super::MAX_PAYLOAD;
use super::option::{CARRIES_NO_DATA, ContextQuery, ExportQuery, OptionError, OptionRequest};
use super::reader::{Reader, Truncated};
use super::reply::Headers;
use super::wire::*;

/// The longest option data that is taken in, in bytes: a name and some thousand information requests.
const MAX_OPTION_DATA: usize = 16 * 1024;
/// Longer data is skipped up to so many bytes; a client that announces more is cut off.
const MAX_SKIPPED_DATA: usize = 1 << 20;
/// How much of skipped data is asked for at a time, in bytes.
const SKIP_CHUNK: usize = 4096;
/// Options in one handshake. nbdinfo and qemu send about ten; a client that sends more than this never gets done.
const MAX_OPTIONS: u32 = 128;

/// What the handshake tells a client of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name clients ask for; the empty name asks for the default export, the first of the list if none is so named.
    pub name: String,
    /// A line for people; empty for none.
    pub description: String,
    /// The size in bytes.
    pub size: u64,
    /// Whether writes, trims and zeroes are refused.
    pub read_only: bool,
    /// Whether space may be given back to the disk; without it, trims are refused.
    pub discards: bool,
    /// The block size, in bytes, from which on aligned requests are served without reading first: a power of two, at
    /// least 512.
    pub preferred_block: u32,
}

impl ExportInfo {
    /// The transmission flags: what can be asked of the export where nothing further was negotiated.
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

/// What a server does about TLS ("TLS support"): NOTLS, SELECTIVETLS without an export that is TLS-only, or FORCEDTLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsPolicy {
    /// There is none; a client that asks for it is told so.
    #[default]
    Off,
    /// Clients may ask for it. Someone between client and server can keep them from it unnoticed, unless the client
    /// insists.
    Offered,
    /// A client is told of nothing and let into nothing before it.
    Required,
}

/// What the handshake settled. The default is what a client has that came without one: the first export, nothing more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Which of the exports was chosen: its place in the list that the handshake was given.
    pub export: usize,
    /// How requests and replies look.
    pub headers: Headers,
    /// `base:allocation` was selected: `NBD_CMD_BLOCK_STATUS` is served.
    pub allocation: bool,
}

/// Why a client is cut off in the middle of the handshake. The document lets a server do so where "mandatory
/// conditions" are broken, and has it do so where no error can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Client flags that nobody defined, or that the server did not offer.
    #[error("the client set unknown flags: {0:#010x}")]
    ClientFlags(u32),
    /// An option that does not begin with `IHAVEOPT`.
    #[error("the client sent {0:#018x} where an option begins with IHAVEOPT")]
    Magic(u64),
    /// `NBD_OPT_EXPORT_NAME` for an export that is not there; that option has no way to say so.
    #[error("the client asked by NBD_OPT_EXPORT_NAME for an export that does not exist")]
    NoSuchExport,
    /// `NBD_OPT_EXPORT_NAME` without TLS where it is required; that option has no way to say so.
    #[error("the client asked by NBD_OPT_EXPORT_NAME for an export without TLS, which is required")]
    TlsRequired,
    /// `NBD_OPT_EXPORT_NAME` where the client had negotiated extended headers.
    #[error("the client sent NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS")]
    ExportNameWithExtendedHeaders,
    /// Option data longer than anything sensible.
    #[error("the client announced an option of {0} bytes")]
    OptionTooLong(u32),
    /// Haggling without end.
    #[error("the client sent more than {MAX_OPTIONS} options")]
    TooManyOptions,
    /// The session handed over another number of bytes than was asked for.
    #[error("the session handed over {found} bytes where the handshake wanted {wanted}")]
    WrongLength {
        /// What [`Handshake::wanted`] had said.
        wanted: usize,
        /// What came.
        found: usize,
    },
}

impl From<Truncated> for HandshakeError {
    fn from(_: Truncated) -> Self {
        Self::WrongLength { wanted: 1, found: 0 }
    }
}

/// A handshake that waits for the client. It knows how many bytes come next and is consumed by the step they make.
#[derive(Debug)]
pub struct Handshake {
    expect: Expect,
    client: Client,
    tls: Channel,
    shutting_down: bool,
}

/// What carries the conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    Plaintext(TlsPolicy),
    Tls,
}

/// What comes after a step.
#[derive(Debug)]
pub enum Next {
    /// More haggling.
    Continue(Handshake),
    /// An export was chosen; what the client sends from now on are requests.
    Transmission(Negotiated),
    /// TLS was agreed on. Send what there is to send; then the TLS handshake begins with the very next byte that the
    /// client sends, and this handshake goes on under TLS.
    ///
    /// # Contract
    /// What the session received of the client in plaintext is never given to a handshake that goes on under TLS: not a
    /// byte beyond [`Handshake::wanted`] may have been taken from the stream, or it must be part of the TLS handshake.
    StartTls(Handshake),
    /// The client took its leave. Send what there is to send and close.
    Aborted,
}

/// What was learned of the client so far.
#[derive(Debug, Clone, Copy, Default)]
struct Client {
    headers: Headers,
    /// The export for which `base:allocation` was selected.
    allocation: Option<usize>,
    no_zeroes: bool,
    options: u32,
}

#[derive(Debug, Clone, Copy)]
enum Expect {
    ClientFlags,
    Option,
    OptionData { option: u32, len: usize },
    SkipOptionData { option: u32, left: usize },
}

impl Handshake {
    /// Begins a handshake: what the server says first is added to `out`.
    pub fn greeting(tls: TlsPolicy, out: &mut Vec<u8>) -> Self {
        out.extend(NBDMAGIC.to_be_bytes());
        out.extend(IHAVEOPT.to_be_bytes());
        out.extend((NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES).to_be_bytes());
        Self {
            expect: Expect::ClientFlags,
            client: Client::default(),
            tls: Channel::Plaintext(tls),
            shutting_down: false,
        }
    }

    /// How many bytes the next step takes: at least one, at most some thousands.
    pub fn wanted(&self) -> usize {
        match self.expect {
            Expect::ClientFlags => 4,
            Expect::Option => 16,
            Expect::OptionData { len, .. } => len,
            Expect::SkipOptionData { left, .. } => left.min(SKIP_CHUNK),
        }
    }

    /// Whether nothing is told or agreed on before TLS.
    fn insists_on_tls(&self) -> bool {
        self.tls == Channel::Plaintext(TlsPolicy::Required)
    }

    /// Answers every further option but `NBD_OPT_ABORT` with `NBD_REP_ERR_SHUTDOWN`.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// Takes the next [`Handshake::wanted`] bytes from the client. What is to be sent is added to `out`, and must be sent
    /// whatever comes back, an error included.
    ///
    /// # Errors
    /// [`HandshakeError`]: close the connection.
    pub fn handle(self, bytes: &[u8], exports: &[ExportInfo], out: &mut Vec<u8>) -> Result<Next, HandshakeError> {
        if bytes.len() != self.wanted() {
            return Err(HandshakeError::WrongLength { wanted: self.wanted(), found: bytes.len() });
        }
        match self.expect {
            Expect::ClientFlags => self.client_flags(bytes),
            Expect::Option => self.option_header(bytes, exports, out),
            Expect::OptionData { option, .. } => self.option(option, bytes, exports, out),
            Expect::SkipOptionData { option, left } => {
                let left = left - bytes.len();
                if left > 0 {
                    return Ok(self.then(Expect::SkipOptionData { option, left }));
                }
                self.refuse_unread(option, out)
            }
        }
    }

    fn client_flags(mut self, bytes: &[u8]) -> Result<Next, HandshakeError> {
        let flags = Reader::new(bytes).u32()?;
        if flags & !(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES) != 0 {
            return Err(HandshakeError::ClientFlags(flags));
        }
        self.client.no_zeroes = flags & NBD_FLAG_C_NO_ZEROES != 0;
        Ok(self.then(Expect::Option))
    }

    fn option_header(
        mut self,
        bytes: &[u8],
        exports: &[ExportInfo],
        out: &mut Vec<u8>,
    ) -> Result<Next, HandshakeError> {
        let mut reader = Reader::new(bytes);
        let magic = reader.u64()?;
        if magic != IHAVEOPT {
            return Err(HandshakeError::Magic(magic));
        }
        let (option, announced) = (reader.u32()?, reader.u32()?);
        self.client.options += 1;
        if self.client.options > MAX_OPTIONS {
            return Err(HandshakeError::TooManyOptions);
        }
        let len = usize::try_from(announced).map_err(|_| HandshakeError::OptionTooLong(announced))?;
        if option == NBD_OPT_EXPORT_NAME && self.insists_on_tls() {
            return Err(HandshakeError::TlsRequired);
        }
        match len {
            0 => self.option(option, &[], exports, out),
            // No data is held for options whose data means nothing here.
            1..=MAX_OPTION_DATA if OptionRequest::is_known(option) => Ok(self.then(Expect::OptionData { option, len })),
            1..=MAX_SKIPPED_DATA if option != NBD_OPT_EXPORT_NAME => {
                Ok(self.then(Expect::SkipOptionData { option, left: len }))
            }
            _ => Err(HandshakeError::OptionTooLong(announced)),
        }
    }

    fn option(
        mut self,
        option: u32,
        data: &[u8],
        exports: &[ExportInfo],
        out: &mut Vec<u8>,
    ) -> Result<Next, HandshakeError> {
        if option == NBD_OPT_SET_META_CONTEXT {
            // "replaces all previously-set metadata contexts (including when this command fails)"
            self.client.allocation = None;
        }
        let mut replies = Replies { option, headers: self.client.headers, out };
        let request = match OptionRequest::parse(option, data) {
            Ok(OptionRequest::Abort) => {
                replies.ack();
                return Ok(Next::Aborted);
            }
            // No error can be told in reply to this one.
            Ok(OptionRequest::ExportName(_)) | Err(_) if option == NBD_OPT_EXPORT_NAME && self.shutting_down => {
                return Err(HandshakeError::NoSuchExport);
            }
            _ if self.shutting_down => {
                replies.error(NBD_REP_ERR_SHUTDOWN, "the server is shutting down");
                return Ok(self.then(Expect::Option));
            }
            Ok(OptionRequest::StartTls) => return Ok(self.start_tls(replies)),
            // Whatever it is, known or not, well formed or not.
            _ if self.insists_on_tls() && option != NBD_OPT_STARTTLS => return self.refuse_unread(option, out),
            Err(_) if option == NBD_OPT_EXPORT_NAME => return Err(HandshakeError::NoSuchExport),
            Err(OptionError::Unknown) => return self.refuse_unread(option, out),
            Err(OptionError::Invalid(why)) => {
                replies.error(NBD_REP_ERR_INVALID, why);
                return Ok(self.then(Expect::Option));
            }
            Err(OptionError::TooBig(why)) => {
                replies.error(NBD_REP_ERR_TOO_BIG, why);
                return Ok(self.then(Expect::Option));
            }
            Ok(request) => request,
        };
        match request {
            OptionRequest::ExportName(_) if self.client.headers == Headers::Extended => {
                Err(HandshakeError::ExportNameWithExtendedHeaders)
            }
            OptionRequest::ExportName(name) => {
                let export = find(exports, name).ok_or(HandshakeError::NoSuchExport)?;
                let info = &exports[export];
                out.extend(info.size.to_be_bytes());
                out.extend(flags_under(info, self.client.headers).to_be_bytes());
                if !self.client.no_zeroes {
                    out.extend([0; 124]);
                }
                Ok(Next::Transmission(self.negotiated(export)))
            }
            // Seen to above.
            OptionRequest::Abort | OptionRequest::StartTls => Ok(Next::Aborted),
            OptionRequest::List => {
                for export in exports {
                    replies.server(export);
                }
                replies.ack();
                Ok(self.then(Expect::Option))
            }
            OptionRequest::Info(query) => {
                replies.export(&query, exports);
                Ok(self.then(Expect::Option))
            }
            OptionRequest::Go(query) => match replies.export(&query, exports) {
                Some(export) => Ok(Next::Transmission(self.negotiated(export))),
                None => Ok(self.then(Expect::Option)),
            },
            OptionRequest::StructuredReply if self.client.headers == Headers::Extended => {
                replies.error(NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are negotiated, which go before");
                Ok(self.then(Expect::Option))
            }
            OptionRequest::StructuredReply => {
                replies.ack();
                self.client.headers = Headers::Structured;
                Ok(self.then(Expect::Option))
            }
            OptionRequest::ExtendedHeaders => {
                replies.ack();
                self.client.headers = Headers::Extended;
                Ok(self.then(Expect::Option))
            }
            OptionRequest::ListMetaContext(query) => {
                let wanted = query.is_empty || query.all_of_base || query.allocation;
                // "The metadata context ID in these replies is reserved and SHOULD be set to zero"
                replies.contexts(&query, wanted.then_some(0), exports);
                Ok(self.then(Expect::Option))
            }
            OptionRequest::SetMetaContext(query) => {
                let selected = query.allocation.then_some(ALLOCATION_CONTEXT);
                self.client.allocation = replies.contexts(&query, selected, exports).filter(|_| query.allocation);
                Ok(self.then(Expect::Option))
            }
        }
    }

    /// Answers `NBD_OPT_STARTTLS`.
    fn start_tls(mut self, mut replies: Replies<'_>) -> Next {
        match self.tls {
            Channel::Tls => replies.error(NBD_REP_ERR_INVALID, "TLS is there already"),
            Channel::Plaintext(TlsPolicy::Off) => {
                replies.error(NBD_REP_ERR_POLICY, "this server is set up without TLS");
            }
            Channel::Plaintext(TlsPolicy::Offered | TlsPolicy::Required) => {
                replies.ack();
                // "the server MUST NOT preserve any negotiation state": someone else may have negotiated it. The client
                // flags are no option, and a client under TLS can't send them again; the count is a bound.
                let Client { no_zeroes, options, .. } = self.client;
                self.client = Client { no_zeroes, options, ..Client::default() };
                self.tls = Channel::Tls;
                self.expect = Expect::Option;
                return Next::StartTls(self);
            }
        }
        self.then(Expect::Option)
    }

    /// What is settled once the export is chosen.
    fn negotiated(&self, export: usize) -> Negotiated {
        Negotiated { export, headers: self.client.headers, allocation: self.client.allocation == Some(export) }
    }

    /// Answers an option whose data was not looked at.
    fn refuse_unread(mut self, option: u32, out: &mut Vec<u8>) -> Result<Next, HandshakeError> {
        if option == NBD_OPT_SET_META_CONTEXT {
            self.client.allocation = None;
        }
        let mut replies = Replies { option, headers: self.client.headers, out };
        match option {
            NBD_OPT_ABORT => {
                replies.ack();
                return Ok(Next::Aborted);
            }
            _ if self.shutting_down => replies.error(NBD_REP_ERR_SHUTDOWN, "the server is shutting down"),
            _ if self.insists_on_tls() && option != NBD_OPT_STARTTLS => {
                replies.error(NBD_REP_ERR_TLS_REQD, "this server speaks of its exports under TLS alone");
            }
            _ if OptionRequest::is_bare(option) => replies.error(NBD_REP_ERR_INVALID, CARRIES_NO_DATA),
            _ if OptionRequest::is_known(option) => {
                replies.error(NBD_REP_ERR_TOO_BIG, "the option's data is too long");
            }
            _ => replies.error(NBD_REP_ERR_UNSUP, "this server does not know the option"),
        }
        Ok(self.then(Expect::Option))
    }

    fn then(mut self, expect: Expect) -> Next {
        self.expect = expect;
        Next::Continue(self)
    }
}

/// The place of the export of that name; the empty name stands for the first export where none is so named.
fn find(exports: &[ExportInfo], name: &str) -> Option<usize> {
    exports.iter().position(|export| export.name == name).or((name.is_empty() && !exports.is_empty()).then_some(0))
}

/// The transmission flags of an export for a client with these headers.
fn flags_under(export: &ExportInfo, headers: Headers) -> u16 {
    // "MUST leave this flag clear if neither structured replies nor extended headers have been negotiated"
    export.transmission_flags() | if headers == Headers::Simple { 0 } else { NBD_FLAG_SEND_DF }
}

/// Writes the replies to one option.
struct Replies<'a> {
    option: u32,
    headers: Headers,
    out: &'a mut Vec<u8>,
}

impl Replies<'_> {
    fn ack(&mut self) {
        self.reply(NBD_REP_ACK, &[]);
    }

    fn error(&mut self, code: u32, message: &str) {
        self.reply(code, &[message.as_bytes()]);
    }

    fn server(&mut self, export: &ExportInfo) {
        // The catalogue's names are at most MAX_STRING long.
        let len = u32::try_from(export.name.len()).unwrap_or(u32::MAX).to_be_bytes();
        self.reply(NBD_REP_SERVER, &[&len, export.name.as_bytes(), export.description.as_bytes()]);
    }

    /// Answers `NBD_OPT_INFO` or `NBD_OPT_GO`; gives the export's place if there is one.
    fn export(&mut self, query: &ExportQuery<'_>, exports: &[ExportInfo]) -> Option<usize> {
        let Some(place) = find(exports, query.name) else {
            self.error(NBD_REP_ERR_UNKNOWN, "there is no export of that name");
            return None;
        };
        let export = &exports[place];
        let info = |kind: u16| kind.to_be_bytes();
        let flags = flags_under(export, self.headers).to_be_bytes();
        self.reply(NBD_REP_INFO, &[&info(NBD_INFO_EXPORT), &export.size.to_be_bytes(), &flags]);
        if query.asks_for(NBD_INFO_NAME) {
            self.reply(NBD_REP_INFO, &[&info(NBD_INFO_NAME), export.name.as_bytes()]);
        }
        if query.asks_for(NBD_INFO_DESCRIPTION) && !export.description.is_empty() {
            self.reply(NBD_REP_INFO, &[&info(NBD_INFO_DESCRIPTION), export.description.as_bytes()]);
        }
        if query.asks_for(NBD_INFO_BLOCK_SIZE) {
            let (minimum, preferred) = (1u32.to_be_bytes(), export.preferred_block.to_be_bytes());
            let sizes: [&[u8]; 4] = [&info(NBD_INFO_BLOCK_SIZE), &minimum, &preferred, &MAX_PAYLOAD.to_be_bytes()];
            self.reply(NBD_REP_INFO, &sizes);
        }
        self.ack();
        Some(place)
    }

    /// Answers `NBD_OPT_LIST_META_CONTEXT` or `NBD_OPT_SET_META_CONTEXT`, with `base:allocation` under this number if there
    /// is one; gives the export's place if that went well.
    fn contexts(&mut self, query: &ContextQuery<'_>, allocation: Option<u32>, exports: &[ExportInfo]) -> Option<usize> {
        if self.headers == Headers::Simple {
            self.error(NBD_REP_ERR_INVALID, "metadata contexts need structured replies: negotiate these first");
            return None;
        }
        let Some(place) = find(exports, query.name) else {
            self.error(NBD_REP_ERR_UNKNOWN, "there is no export of that name");
            return None;
        };
        if let Some(number) = allocation {
            self.reply(NBD_REP_META_CONTEXT, &[&number.to_be_bytes(), BASE_ALLOCATION.as_bytes()]);
        }
        self.ack();
        Some(place)
    }

    fn reply(&mut self, kind: u32, data: &[&[u8]]) {
        let len: usize = data.iter().map(|piece| piece.len()).sum();
        self.out.extend(NBD_REP_MAGIC.to_be_bytes());
        self.out.extend(self.option.to_be_bytes());
        self.out.extend(kind.to_be_bytes());
        // At most two strings of MAX_STRING and a few words.
        self.out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        for piece in data {
            self.out.extend(*piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::transcript::{End, GOOD_HANDSHAKE, Transcript, example_exports};
    use super::*;

    fn option(option: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        bytes
    }

    /// What a server with this policy replies to the options, in turn; and how it ended.
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
    fn without_tls_the_option_is_refused_and_nothing_else() {
        let (replies, end) = replies(TlsPolicy::Off, &[option(NBD_OPT_STARTTLS, &[]), option(NBD_OPT_LIST, &[])]);
        assert_eq!(replies[0], (NBD_OPT_STARTTLS, NBD_REP_ERR_POLICY));
        assert_eq!(replies[1], (NBD_OPT_LIST, NBD_REP_SERVER));
        assert_eq!(end, End::Waiting);
    }

    #[test]
    fn where_tls_is_required_every_option_waits_for_it() {
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
    fn tls_begins_once_and_carries_no_data() {
        for policy in [TlsPolicy::Offered, TlsPolicy::Required] {
            let twice = [option(NBD_OPT_STARTTLS, &[0]), option(NBD_OPT_STARTTLS, &[]), option(NBD_OPT_STARTTLS, &[])];
            let (replies, _) = replies(policy, &twice);
            let kinds: Vec<u32> = replies.iter().map(|(_, kind)| *kind).collect();
            assert_eq!(kinds, [NBD_REP_ERR_INVALID, NBD_REP_ACK, NBD_REP_ERR_INVALID]);
        }
    }

    #[test]
    fn where_tls_is_offered_a_client_may_do_without() {
        let transcript = Transcript::with_tls(TlsPolicy::Offered, &example_exports(), [GOOD_HANDSHAKE]);
        assert_eq!(transcript, Transcript::of(&example_exports(), [GOOD_HANDSHAKE]));
    }
}
