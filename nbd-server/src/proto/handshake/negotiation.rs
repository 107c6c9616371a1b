//! What client and server have agreed on so far, and the answer to each option.

use super::option::{ContextQuery, ExportQuery, OptionError, OptionRequest};
use super::replies::Replies;
use super::states::{ExpectOption, ExpectTls};
use super::{ExportInfo, HandshakeError, Negotiated, Next, TlsPolicy};
use crate::proto::reply::Headers;
use crate::proto::wire::*;

/// What client and server have agreed on so far.
#[derive(Debug)]
pub(super) struct Negotiation {
    channel: Channel,
    headers: Headers,
    /// The export for which `base:allocation` was selected.
    allocation: Option<usize>,
    /// Whether the reply to `NBD_OPT_EXPORT_NAME` ends without zeroes.
    no_zeroes: bool,
    /// The number of options that the client has sent.
    options: u32,
}

/// The connection that the negotiation runs over.
#[derive(Debug, PartialEq, Eq)]
enum Channel {
    Plaintext(TlsPolicy),
    Tls,
}

impl Negotiation {
    /// Begins a negotiation in plaintext.
    pub(super) fn new(tls: TlsPolicy, no_zeroes: bool) -> Self {
        let headers = Headers::default();
        Self { channel: Channel::Plaintext(tls), headers, allocation: None, no_zeroes, options: 0 }
    }

    /// Begins a negotiation under TLS with a client that sent `options` options before TLS.
    pub(super) fn under_tls(no_zeroes: bool, options: u32) -> Self {
        Self { channel: Channel::Tls, headers: Headers::default(), allocation: None, no_zeroes, options }
    }

    /// Counts an option. Returns the number of options so far.
    pub(super) fn count_option(&mut self) -> u32 {
        self.options += 1;
        self.options
    }

    /// Returns whether the client must negotiate TLS first.
    pub(super) fn insists_on_tls(&self) -> bool {
        self.channel == Channel::Plaintext(TlsPolicy::Required)
    }

    /// Answers the option number `option`. `request` is what it asks for, or why it is refused.
    pub(super) fn answer(
        mut self,
        option: u32,
        request: Result<OptionRequest<'_>, OptionError>,
        exports: &[ExportInfo],
        out: &mut Vec<u8>,
    ) -> Result<Next, HandshakeError> {
        if option == NBD_OPT_SET_META_CONTEXT {
            // "replaces all previously-set metadata contexts (including when this command fails)"
            self.allocation = None;
        }
        let replies = Replies::new(option, self.headers, out);
        match request {
            Ok(OptionRequest::Abort) => Ok(abort(replies)),
            Ok(OptionRequest::StartTls) => Ok(self.start_tls(replies)),
            // This covers every other option, known or not, valid or not.
            _ if self.insists_on_tls() && option != NBD_OPT_STARTTLS => Ok(self.require_tls(replies)),
            Ok(OptionRequest::ExportName(name)) => self.export_name(name, exports, replies),
            Ok(OptionRequest::List) => Ok(self.list(exports, replies)),
            Ok(OptionRequest::Info(query)) => Ok(self.info(&query, exports, replies)),
            Ok(OptionRequest::Go(query)) => Ok(self.go(&query, exports, replies)),
            Ok(OptionRequest::StructuredReply) => Ok(self.structured_reply(replies)),
            Ok(OptionRequest::ExtendedHeaders) => Ok(self.extended_headers(replies)),
            Ok(OptionRequest::ListMetaContext(query)) => Ok(self.list_meta_context(&query, exports, replies)),
            Ok(OptionRequest::SetMetaContext(query)) => Ok(self.set_meta_context(&query, exports, replies)),
            // The reply to this option cannot report an error.
            Err(_) if option == NBD_OPT_EXPORT_NAME => Err(HandshakeError::NoSuchExport),
            Err(error) => Ok(self.refuse(error, replies)),
        }
    }

    /// Answers `NBD_OPT_STARTTLS`.
    fn start_tls(self, mut replies: Replies<'_>) -> Next {
        match self.channel {
            Channel::Tls => replies.error(NBD_REP_ERR_INVALID, "TLS is already in use"),
            Channel::Plaintext(TlsPolicy::Off) => {
                replies.error(NBD_REP_ERR_POLICY, "this server is configured without TLS");
            }
            Channel::Plaintext(TlsPolicy::Offered | TlsPolicy::Required) => {
                replies.ack();
                return Next::StartTls(ExpectTls { no_zeroes: self.no_zeroes, options: self.options });
            }
        }
        self.next_option()
    }

    /// Answers any option that must wait until `NBD_OPT_STARTTLS` was sent.
    fn require_tls(self, mut replies: Replies<'_>) -> Next {
        replies.error(NBD_REP_ERR_TLS_REQD, "this server requires TLS");
        self.next_option()
    }

    /// Answers `NBD_OPT_EXPORT_NAME`.
    fn export_name(self, name: &str, exports: &[ExportInfo], mut replies: Replies<'_>) -> Result<Next, HandshakeError> {
        if self.headers == Headers::Extended {
            return Err(HandshakeError::ExportNameWithExtendedHeaders);
        }
        let export = find(exports, name).ok_or(HandshakeError::NoSuchExport)?;
        replies.size_and_flags(&exports[export]);
        if !self.no_zeroes {
            replies.zeroes();
        }
        Ok(self.chosen(export))
    }

    /// Answers `NBD_OPT_LIST`.
    fn list(self, exports: &[ExportInfo], mut replies: Replies<'_>) -> Next {
        for export in exports {
            replies.server(export);
        }
        replies.ack();
        self.next_option()
    }

    /// Answers `NBD_OPT_INFO`.
    fn info(self, query: &ExportQuery<'_>, exports: &[ExportInfo], mut replies: Replies<'_>) -> Next {
        describe(query, exports, &mut replies);
        self.next_option()
    }

    /// Answers `NBD_OPT_GO`.
    fn go(self, query: &ExportQuery<'_>, exports: &[ExportInfo], mut replies: Replies<'_>) -> Next {
        match describe(query, exports, &mut replies) {
            Some(export) => self.chosen(export),
            None => self.next_option(),
        }
    }

    /// Answers `NBD_OPT_STRUCTURED_REPLY`.
    fn structured_reply(mut self, mut replies: Replies<'_>) -> Next {
        if self.headers == Headers::Extended {
            replies.error(NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are negotiated and take precedence");
        } else {
            replies.ack();
            self.headers = Headers::Structured;
        }
        self.next_option()
    }

    /// Answers `NBD_OPT_EXTENDED_HEADERS`.
    fn extended_headers(mut self, mut replies: Replies<'_>) -> Next {
        replies.ack();
        self.headers = Headers::Extended;
        self.next_option()
    }

    /// Answers `NBD_OPT_LIST_META_CONTEXT`.
    fn list_meta_context(self, query: &ContextQuery<'_>, exports: &[ExportInfo], mut replies: Replies<'_>) -> Next {
        if self.export_with_contexts(query, exports, &mut replies).is_some() {
            if query.is_empty || query.all_of_base || query.allocation {
                // "The metadata context ID in these replies is reserved and SHOULD be set to zero"
                replies.meta_context(0, BASE_ALLOCATION);
            }
            replies.ack();
        }
        self.next_option()
    }

    /// Answers `NBD_OPT_SET_META_CONTEXT`.
    fn set_meta_context(mut self, query: &ContextQuery<'_>, exports: &[ExportInfo], mut replies: Replies<'_>) -> Next {
        if let Some(export) = self.export_with_contexts(query, exports, &mut replies) {
            if query.allocation {
                replies.meta_context(ALLOCATION_CONTEXT, BASE_ALLOCATION);
                self.allocation = Some(export);
            }
            replies.ack();
        }
        self.next_option()
    }

    /// Returns the index of the export whose metadata contexts are asked for, or adds the error to the replies.
    fn export_with_contexts(
        &self,
        query: &ContextQuery<'_>,
        exports: &[ExportInfo],
        replies: &mut Replies<'_>,
    ) -> Option<usize> {
        if self.headers == Headers::Simple {
            replies.error(NBD_REP_ERR_INVALID, "metadata contexts need structured replies; negotiate those first");
            return None;
        }
        find_or_refuse(exports, query.name, replies)
    }

    /// Answers any option that is unknown or not valid.
    fn refuse(self, error: OptionError, mut replies: Replies<'_>) -> Next {
        let (code, message) = match error {
            OptionError::Unknown => (NBD_REP_ERR_UNSUP, "this server does not know the option"),
            OptionError::Invalid(why) => (NBD_REP_ERR_INVALID, why),
            OptionError::TooBig(why) => (NBD_REP_ERR_TOO_BIG, why),
        };
        replies.error(code, message);
        self.next_option()
    }

    /// Ends the negotiation with the choice of an export.
    fn chosen(self, export: usize) -> Next {
        let Self { headers, allocation, .. } = self;
        Next::Transmission(Negotiated { export, headers, allocation: allocation == Some(export) })
    }

    fn next_option(self) -> Next {
        Next::Continue(ExpectOption { negotiation: self }.into())
    }
}

/// `NBD_OPT_ABORT`.
fn abort(mut replies: Replies<'_>) -> Next {
    replies.ack();
    Next::Aborted
}

/// Adds all replies to `NBD_OPT_INFO` or `NBD_OPT_GO`. Returns the index of the export if it exists.
fn describe(query: &ExportQuery<'_>, exports: &[ExportInfo], replies: &mut Replies<'_>) -> Option<usize> {
    let index = find_or_refuse(exports, query.name, replies)?;
    let export = &exports[index];
    replies.info_export(export);
    if query.asks_for(NBD_INFO_NAME) {
        replies.info_text(NBD_INFO_NAME, &export.name);
    }
    if query.asks_for(NBD_INFO_DESCRIPTION) && !export.description.is_empty() {
        replies.info_text(NBD_INFO_DESCRIPTION, &export.description);
    }
    if query.asks_for(NBD_INFO_BLOCK_SIZE) {
        replies.info_block_size(export);
    }
    replies.ack();
    Some(index)
}

/// Returns the index of the export with this name, or adds the error to the replies.
fn find_or_refuse(exports: &[ExportInfo], name: &str, replies: &mut Replies<'_>) -> Option<usize> {
    let found = find(exports, name);
    if found.is_none() {
        replies.error(NBD_REP_ERR_UNKNOWN, "there is no export with this name");
    }
    found
}

/// Returns the index of the export with this name. The empty name stands for the first export, unless an export has that name.
fn find(exports: &[ExportInfo], name: &str) -> Option<usize> {
    exports.iter().position(|export| export.name == name).or((name.is_empty() && !exports.is_empty()).then_some(0))
}
