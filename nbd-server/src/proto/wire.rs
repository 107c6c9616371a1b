//! The constants of the protocol, under the names that the NBD specification uses.

/// `NBDMAGIC`, the first bytes that a server sends.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: the second word that a server sends, and the first word of every option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// First word of every reply to an option.
pub const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flag: the server speaks fixed newstyle.
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the server can leave out the zeroes after `NBD_OPT_EXPORT_NAME`.
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag: the client speaks fixed newstyle.
pub const NBD_FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: the client does not want the zeroes.
pub const NBD_FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Transmission flag: always set.
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: writes are refused.
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: `NBD_CMD_FLUSH` is served.
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: `NBD_CMD_FLAG_FUA` is served.
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: `NBD_CMD_TRIM` is served.
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: `NBD_CMD_WRITE_ZEROES` is served.
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: `NBD_CMD_FLAG_DF` is served. It is set only if replies come in chunks.
pub const NBD_FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: a flush on one connection covers all writes that were answered on any connection.
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: `NBD_CMD_CACHE` is served.
pub const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: `NBD_CMD_FLAG_FAST_ZERO` is served.
pub const NBD_FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

/// Option: choose an export and enter transmission. The server cannot report an error.
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// Option: end the session.
pub const NBD_OPT_ABORT: u32 = 2;
/// Option: list the exports.
pub const NBD_OPT_LIST: u32 = 3;
/// Option: continue under TLS.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Option: describe an export.
pub const NBD_OPT_INFO: u32 = 6;
/// Option: describe an export and enter transmission.
pub const NBD_OPT_GO: u32 = 7;
/// Option: use structured replies.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: list the metadata contexts.
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: select metadata contexts.
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
/// Option: use extended headers.
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

/// Option reply: done.
pub const NBD_REP_ACK: u32 = 1;
/// Option reply: one export of the list.
pub const NBD_REP_SERVER: u32 = 2;
/// Option reply: one piece of information about an export.
pub const NBD_REP_INFO: u32 = 3;
/// Option reply: one metadata context.
pub const NBD_REP_META_CONTEXT: u32 = 4;
/// Option error: the server does not know the option.
pub const NBD_REP_ERR_UNSUP: u32 = (1 << 31) + 1;
/// Option error: the server knows the option but is configured to refuse it.
pub const NBD_REP_ERR_POLICY: u32 = (1 << 31) + 2;
/// Option error: the option is malformed.
pub const NBD_REP_ERR_INVALID: u32 = (1 << 31) + 3;
/// Option error: only `NBD_OPT_STARTTLS` and `NBD_OPT_ABORT` are allowed before TLS.
pub const NBD_REP_ERR_TLS_REQD: u32 = (1 << 31) + 5;
/// Option error: the export does not exist.
pub const NBD_REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
/// Option error: the request is too large to process.
pub const NBD_REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;
/// Option error: extended headers have been negotiated and cannot be given up.
pub const NBD_REP_ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;

/// Information: size and transmission flags.
pub const NBD_INFO_EXPORT: u16 = 0;
/// Information: the canonical name.
pub const NBD_INFO_NAME: u16 = 1;
/// Information: a description for people.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// Information: minimum and preferred block size, maximum payload size.
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// First word of a request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// First word of an extended request.
pub const NBD_EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First word of a structured reply chunk.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First word of an extended reply chunk.
pub const NBD_EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of a request's header.
pub const REQUEST_LEN: usize = 28;
/// Bytes of an extended request's header.
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// Bytes of a simple reply's header.
pub const SIMPLE_REPLY_LEN: usize = 16;

/// Bytes of a structured reply chunk's header.
pub const STRUCTURED_REPLY_LEN: usize = 20;
/// Bytes of an extended reply chunk's header.
pub const EXTENDED_REPLY_LEN: usize = 32;

/// Command: read.
pub const NBD_CMD_READ: u16 = 0;
/// Command: write.
pub const NBD_CMD_WRITE: u16 = 1;
/// Command: disconnect.
pub const NBD_CMD_DISC: u16 = 2;
/// Command: make all answered writes durable.
pub const NBD_CMD_FLUSH: u16 = 3;
/// Command: the range is no longer needed.
pub const NBD_CMD_TRIM: u16 = 4;
/// Command: the range will be read soon.
pub const NBD_CMD_CACHE: u16 = 5;
/// Command: make the range read as zeroes.
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;
/// Command: tell which parts of the range are allocated.
pub const NBD_CMD_BLOCK_STATUS: u16 = 7;

/// Command flag: answer when the data is durable.
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag: write zeroes without making a hole.
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag: answer with at most one content chunk.
pub const NBD_CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag: answer with one extent.
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag: write zeroes only if this is faster than a normal write.
pub const NBD_CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Command flag of extended requests: the length is the length of a payload, which follows the header.
pub const NBD_CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Reply flag: this is the last chunk of the reply.
pub const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;
/// Chunk: no content.
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
/// Chunk: an offset and the bytes at that offset.
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Chunk: extents of a metadata context.
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Chunk: extents of a metadata context, with 64-bit lengths.
pub const NBD_REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
/// Chunk: an error.
pub const NBD_REPLY_TYPE_ERROR: u16 = (1 << 15) + 1;
/// Chunk: an error and the offset at which it occurred.
pub const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = (1 << 15) + 2;

/// The namespace of the metadata contexts that the NBD specification defines.
pub const BASE_NAMESPACE: &str = "base:";
/// The metadata context that tells what is allocated.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The number that this server gives to [`BASE_ALLOCATION`].
pub const ALLOCATION_CONTEXT: u32 = 1;
/// Allocation status: nothing is allocated.
pub const NBD_STATE_HOLE: u32 = 1 << 0;
/// Allocation status: the extent reads as zeroes.
pub const NBD_STATE_ZERO: u32 = 1 << 1;

/// The maximum number of bytes in a string ("Conventions").
pub const MAX_STRING: usize = 4096;
