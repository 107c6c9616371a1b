//! Encodes the replies to an option ("Option reply types").

use super::ExportInfo;
use crate::proto::MAX_PAYLOAD;
use crate::proto::reply::Headers;
use crate::proto::wire::*;

/// The replies to one option, which are added to the bytes to send.
pub(super) struct Replies<'a> {
    option: u32,
    /// The form of replies that was negotiated when the option came.
    headers: Headers,
    out: &'a mut Vec<u8>,
}

impl<'a> Replies<'a> {
    pub(super) fn new(option: u32, headers: Headers, out: &'a mut Vec<u8>) -> Self {
        Self { option, headers, out }
    }

    /// Adds `NBD_REP_ACK`, the last reply to an option that was carried out.
    pub(super) fn ack(&mut self) {
        self.reply(NBD_REP_ACK, &[]);
    }

    /// Adds an error, which is the only reply to an option that is refused.
    pub(super) fn error(&mut self, code: u32, message: &str) {
        self.reply(code, &[message.as_bytes()]);
    }

    /// Adds `NBD_REP_SERVER`: the name and description of an export.
    pub(super) fn server(&mut self, export: &ExportInfo) {
        // The names of exports have at most MAX_STRING bytes.
        let len = u32::try_from(export.name.len()).unwrap_or(u32::MAX).to_be_bytes();
        self.reply(NBD_REP_SERVER, &[&len, export.name.as_bytes(), export.description.as_bytes()]);
    }

    /// Adds `NBD_REP_INFO` with `NBD_INFO_EXPORT`: the size and the transmission flags of an export.
    pub(super) fn info_export(&mut self, export: &ExportInfo) {
        let flags = self.transmission_flags(export).to_be_bytes();
        self.info(NBD_INFO_EXPORT, &[&export.size.to_be_bytes(), &flags]);
    }

    /// Adds `NBD_REP_INFO` with `NBD_INFO_NAME` or `NBD_INFO_DESCRIPTION`.
    pub(super) fn info_text(&mut self, kind: u16, text: &str) {
        self.info(kind, &[text.as_bytes()]);
    }

    /// Adds `NBD_REP_INFO` with `NBD_INFO_BLOCK_SIZE`: the minimum, the preferred block size, and the maximum payload.
    pub(super) fn info_block_size(&mut self, export: &ExportInfo) {
        let (minimum, preferred) = (1u32.to_be_bytes(), export.preferred_block.to_be_bytes());
        self.info(NBD_INFO_BLOCK_SIZE, &[&minimum, &preferred, &MAX_PAYLOAD.to_be_bytes()]);
    }

    /// Adds `NBD_REP_META_CONTEXT`: a metadata context and its number.
    pub(super) fn meta_context(&mut self, number: u32, name: &str) {
        self.reply(NBD_REP_META_CONTEXT, &[&number.to_be_bytes(), name.as_bytes()]);
    }

    /// Adds the reply to `NBD_OPT_EXPORT_NAME`, which has no header.
    pub(super) fn size_and_flags(&mut self, export: &ExportInfo) {
        self.out.extend(export.size.to_be_bytes());
        self.out.extend(self.transmission_flags(export).to_be_bytes());
    }

    /// Adds the zeroes that end the reply to `NBD_OPT_EXPORT_NAME` unless the client does not want them.
    pub(super) fn zeroes(&mut self) {
        self.out.extend([0; 124]);
    }

    /// Returns the transmission flags of an export for a client with the negotiated headers.
    fn transmission_flags(&self, export: &ExportInfo) -> u16 {
        // "MUST leave this flag clear if neither structured replies nor extended headers have been negotiated"
        export.transmission_flags() | if self.headers == Headers::Simple { 0 } else { NBD_FLAG_SEND_DF }
    }

    fn info(&mut self, kind: u16, fields: &[&[u8]]) {
        let kind = kind.to_be_bytes();
        self.reply(NBD_REP_INFO, &[&[&kind[..]], fields].concat());
    }

    fn reply(&mut self, kind: u32, data: &[&[u8]]) {
        let len: usize = data.iter().map(|piece| piece.len()).sum();
        self.out.extend(NBD_REP_MAGIC.to_be_bytes());
        self.out.extend(self.option.to_be_bytes());
        self.out.extend(kind.to_be_bytes());
        // The data is at most two strings of MAX_STRING bytes and a few words.
        self.out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        for piece in data {
            self.out.extend(*piece);
        }
    }
}
