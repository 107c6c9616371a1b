//! The states of the handshake. Each state is named for what it expects from the client. The step that takes those
//! bytes consumes the state.

use super::negotiation::Negotiation;
use super::option::OptionRequest;
use super::{ExportInfo, Handshake, HandshakeError, Next, TlsPolicy};
use crate::proto::reader::{Reader, Truncated};
use crate::proto::wire::*;

/// The longest option data that is accepted, in bytes: a name and several thousand information requests.
pub(super) const MAX_OPTION_DATA: usize = 16 * 1024;
/// The longest option data that is skipped, in bytes. A client that announces more is disconnected.
const MAX_SKIPPED_DATA: usize = 1 << 20;
/// Bytes of skipped data that are taken at a time.
const SKIP_CHUNK: usize = 4096;
/// The maximum number of options in one handshake. nbdinfo and qemu send about ten.
pub(super) const MAX_OPTIONS: u32 = 128;

/// Expects the client's flags, which answer the server's greeting.
#[derive(Debug)]
pub(super) struct ExpectClientFlags {
    pub(super) tls: TlsPolicy,
}

impl ExpectClientFlags {
    pub(super) const WANTED: usize = 4;

    pub(super) fn handle(self, bytes: &[u8]) -> Result<Next, HandshakeError> {
        let flags = Reader::new(bytes).u32()?;
        if flags & !(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES) != 0 {
            return Err(HandshakeError::ClientFlags(flags));
        }
        let negotiation = Negotiation::new(self.tls, flags & NBD_FLAG_C_NO_ZEROES != 0);
        Ok(Next::Continue(ExpectOption { negotiation }.into()))
    }
}

/// Expects the header of an option: what the client wants, and how many bytes of data follow.
#[derive(Debug)]
pub(super) struct ExpectOption {
    pub(super) negotiation: Negotiation,
}

impl ExpectOption {
    pub(super) const WANTED: usize = 16;

    pub(super) fn handle(
        self,
        bytes: &[u8],
        exports: &[ExportInfo],
        out: &mut Vec<u8>,
    ) -> Result<Next, HandshakeError> {
        let Self { mut negotiation } = self;
        let OptionHeader { magic, option, len: announced } = OptionHeader::parse(bytes)?;
        if magic != IHAVEOPT {
            return Err(HandshakeError::Magic(magic));
        }
        if negotiation.count_option() > MAX_OPTIONS {
            return Err(HandshakeError::TooManyOptions);
        }
        if option == NBD_OPT_EXPORT_NAME && negotiation.insists_on_tls() {
            return Err(HandshakeError::TlsRequired);
        }
        let len = usize::try_from(announced).map_err(|_| HandshakeError::OptionTooLong(announced))?;
        match len {
            0 => negotiation.answer(option, OptionRequest::parse(option, &[]), exports, out),
            // The data of an unknown option is not kept.
            1..=MAX_OPTION_DATA if OptionRequest::is_known(option) => {
                Ok(Next::Continue(ExpectOptionData { option, len, negotiation }.into()))
            }
            1..=MAX_SKIPPED_DATA if option != NBD_OPT_EXPORT_NAME => {
                Ok(Next::Continue(SkipOptionData { option, left: len, negotiation }.into()))
            }
            _ => Err(HandshakeError::OptionTooLong(announced)),
        }
    }
}

/// The fields of an option's header.
struct OptionHeader {
    magic: u64,
    option: u32,
    len: u32,
}

impl OptionHeader {
    fn parse(bytes: &[u8]) -> Result<Self, Truncated> {
        let mut reader = Reader::new(bytes);
        Ok(Self { magic: reader.u64()?, option: reader.u32()?, len: reader.u32()? })
    }
}

/// Expects the data of an option that this server knows.
#[derive(Debug)]
pub(super) struct ExpectOptionData {
    option: u32,
    len: usize,
    negotiation: Negotiation,
}

impl ExpectOptionData {
    pub(super) fn wanted(&self) -> usize {
        self.len
    }

    pub(super) fn handle(self, data: &[u8], exports: &[ExportInfo], out: &mut Vec<u8>) -> Result<Next, HandshakeError> {
        let Self { option, negotiation, .. } = self;
        negotiation.answer(option, OptionRequest::parse(option, data), exports, out)
    }
}

/// Expects the data of an option that is unknown or too long. Takes the data piece by piece and keeps none of it.
#[derive(Debug)]
pub(super) struct SkipOptionData {
    option: u32,
    left: usize,
    negotiation: Negotiation,
}

impl SkipOptionData {
    pub(super) fn wanted(&self) -> usize {
        self.left.min(SKIP_CHUNK)
    }

    pub(super) fn handle(
        self,
        skipped: &[u8],
        exports: &[ExportInfo],
        out: &mut Vec<u8>,
    ) -> Result<Next, HandshakeError> {
        let Self { option, left, negotiation } = self;
        match left - skipped.len() {
            0 => negotiation.answer(option, OptionRequest::without_its_data(option), exports, out),
            left => Ok(Next::Continue(Self { option, left, negotiation }.into())),
        }
    }
}

/// Expects that TLS begins. The client's next bytes belong to the TLS handshake, not to the NBD handshake.
///
/// "the server MUST NOT preserve any negotiation state", because an attacker may have negotiated it. So this state
/// keeps only two values that are not negotiation state: a flag that the client cannot send again under TLS, and the
/// number of options, which is limited.
///
/// # Contract
/// The handshake that continues under TLS must never get bytes that the session received in plaintext. So the session must not
/// have taken more than [`Handshake::wanted`] bytes from the stream, or must pass the excess to the TLS handshake.
#[derive(Debug)]
#[must_use = "TLS comes next in the stream"]
pub struct ExpectTls {
    pub(super) no_zeroes: bool,
    pub(super) options: u32,
}

impl ExpectTls {
    /// Says that the session has completed the TLS handshake. Returns the handshake that continues under TLS, where the client
    /// may send options again.
    pub fn established(self) -> Handshake {
        let negotiation = Negotiation::under_tls(self.no_zeroes, self.options);
        ExpectOption { negotiation }.into()
    }
}
