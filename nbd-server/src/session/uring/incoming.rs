//! The buffer that receives a large payload.

use engine::volume::Encrypting;

use crate::session::buffers::Buffer;

/// The buffer of a payload that has arrived in part.
pub(super) enum Incoming {
    /// The payload stays as the client sends it.
    Plain(Buffer),
    /// The payload is encrypted while it arrives. This saves time: the client continues to send meanwhile, and the part
    /// that has arrived is still in the CPU's cache. The payload must cover whole blocks. Payloads are not encrypted
    /// here if another thread will have the time to do so.
    Encrypting(Encrypting<Buffer>),
}

impl Incoming {
    /// Returns the part of the buffer that is still to be received, if the first `filled` bytes have arrived.
    pub(super) fn rest(&mut self, filled: usize) -> &mut [u8] {
        match self {
            Self::Plain(buffer) => &mut buffer.bytes[filled..],
            Self::Encrypting(encrypting) => encrypting.plaintext_from(filled),
        }
    }
}
