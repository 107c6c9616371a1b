//! Reads both sides of a conversation according to the NBD specification, and finds mistakes of the server. This module shares
//! only the constants and the field reader with the server, and no decisions.

use super::reader::{Reader, Truncated};
use super::reply::Headers;
use super::transcript::{End, ReplyPosition, Transcript};
use super::wire::*;

/// The result of the handshake as a client understands it.
#[derive(Debug, Clone, Copy, Default)]
struct Agreed {
    headers: Headers,
    /// The number of the metadata context that was selected last.
    context: Option<u32>,
    size: u64,
    flags: u16,
}

/// A request as the client sent it.
#[derive(Debug, Clone, Copy)]
struct Asked {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u64,
}

impl Asked {
    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }
}

/// Checks everything that the server sent.
///
/// # Errors
/// A description of the first mistake.
pub(super) fn judge(transcript: &Transcript) -> Result<(), String> {
    let transmission = transcript.replies.first().map_or(transcript.sent.len(), |position| position.at);
    let mut client = Reader::new(&transcript.heard);
    let mut server = Reader::new(&transcript.sent[..transmission]);
    let agreed = handshake(&mut client, &mut server, &transcript.end)?;
    if !server.is_empty() {
        return Err(format!("{} unrequested bytes before the first reply", server.left()));
    }
    match agreed {
        Some(agreed) => requests(&agreed, client, transcript),
        None if transcript.replies.is_empty() => Ok(()),
        None => Err("replies to requests without a transmission phase".to_owned()),
    }
}

/// Returns the result of the handshake if transmission began.
fn handshake(client: &mut Reader<'_>, server: &mut Reader<'_>, end: &End) -> Result<Option<Agreed>, String> {
    let greeting = |_| "the greeting is too short".to_owned();
    if server.u64().map_err(greeting)? != NBDMAGIC || server.u64().map_err(greeting)? != IHAVEOPT {
        return Err("no greeting".to_owned());
    }
    server.u16().map_err(greeting)?;
    let Ok(client_flags) = client.u32() else { return Ok(None) };
    let mut agreed = Agreed::default();
    loop {
        let (Ok(IHAVEOPT), Ok(option), Ok(len)) = (client.u64(), client.u32(), client.u32()) else { return Ok(None) };
        // An incomplete option has no reply yet. If the server disconnected the client, this was the last option.
        let Ok(_) = client.bytes(len as usize) else { return Ok(None) };
        if server.is_empty() {
            return match end {
                End::Handshake(_) if client.is_empty() => Ok(None),
                _ => Err(format!("no reply to option {option}")),
            };
        }
        let wrong = |why: &str| format!("option {option}: {why}");
        if option == NBD_OPT_EXPORT_NAME {
            let short = |_| wrong("the size and flags of the export are too short");
            agreed.size = server.u64().map_err(short)?;
            agreed.flags = server.u16().map_err(short)?;
            if client_flags & NBD_FLAG_C_NO_ZEROES == 0
                && server.bytes(124).map_err(short)?.iter().any(|byte| *byte != 0)
            {
                return Err(wrong("no zeroes after the flags of the export"));
            }
            return Ok(Some(agreed));
        }
        let replies = option_replies(option, server).map_err(wrong)?;
        if option == NBD_OPT_SET_META_CONTEXT {
            // "replaces all previously-set metadata contexts (including when this command fails)"
            agreed.context = replies.context.filter(|_| replies.done);
        }
        if !replies.done {
            continue;
        }
        match option {
            NBD_OPT_STRUCTURED_REPLY => agreed.headers = Headers::Structured,
            NBD_OPT_EXTENDED_HEADERS => agreed.headers = Headers::Extended,
            NBD_OPT_STARTTLS => agreed = Agreed::default(),
            NBD_OPT_ABORT => return Ok(None),
            NBD_OPT_GO => {
                (agreed.size, agreed.flags) =
                    replies.export.ok_or_else(|| wrong("NBD_REP_ACK without NBD_INFO_EXPORT"))?;
                let fragments = agreed.flags & NBD_FLAG_SEND_DF != 0;
                if fragments != (agreed.headers != Headers::Simple) {
                    return Err(wrong("NBD_FLAG_SEND_DF must be set exactly if replies come in chunks"));
                }
                return Ok(Some(agreed));
            }
            NBD_OPT_INFO if replies.export.is_none() => return Err(wrong("NBD_REP_ACK without NBD_INFO_EXPORT")),
            _ => {}
        }
    }
}

/// The replies to one option.
#[derive(Default)]
struct OptionReplies {
    /// Whether they ended with `NBD_REP_ACK`.
    done: bool,
    /// The size and the transmission flags.
    export: Option<(u64, u16)>,
    context: Option<u32>,
}

/// Reads all replies to one option, up to `NBD_REP_ACK` or an error ("Option reply types").
fn option_replies(option: u32, server: &mut Reader<'_>) -> Result<OptionReplies, &'static str> {
    let short = |_: Truncated| "replies that end with neither NBD_REP_ACK nor an error";
    let field = |_: Truncated| "a reply too short for its type";
    let mut replies = OptionReplies::default();
    loop {
        if server.u64().map_err(short)? != NBD_REP_MAGIC {
            return Err("a wrong magic number of an option reply");
        }
        if server.u32().map_err(short)? != option {
            return Err("a reply to another option");
        }
        let (kind, len) = (server.u32().map_err(short)?, server.u32().map_err(short)?);
        let data = server.bytes(len as usize).map_err(short)?;
        let mut reader = Reader::new(data);
        match kind {
            NBD_REP_ACK if data.is_empty() => return Ok(OptionReplies { done: true, ..replies }),
            NBD_REP_SERVER if option == NBD_OPT_LIST => {
                let name = reader.u32().map_err(field)?;
                text(reader.bytes(name as usize).map_err(field)?)?;
                text(reader.rest())?;
            }
            NBD_REP_INFO if matches!(option, NBD_OPT_INFO | NBD_OPT_GO) => match reader.u16().map_err(field)? {
                NBD_INFO_EXPORT if data.len() == 12 && replies.export.is_none() => {
                    replies.export = Some((reader.u64().map_err(field)?, reader.u16().map_err(field)?));
                }
                NBD_INFO_BLOCK_SIZE if data.len() == 14 => {}
                NBD_INFO_NAME | NBD_INFO_DESCRIPTION => text(reader.rest())?,
                _ => return Err("information of an unknown type, of a wrong length, or twice"),
            },
            NBD_REP_META_CONTEXT if matches!(option, NBD_OPT_LIST_META_CONTEXT | NBD_OPT_SET_META_CONTEXT) => {
                let number = reader.u32().map_err(field)?;
                text(reader.rest())?;
                if replies.context.replace(number).is_some() {
                    return Err("more than one context");
                }
            }
            NBD_REP_ERR_UNSUP..=NBD_REP_ERR_EXT_HEADER_REQD => {
                text(data)?;
                return Ok(replies);
            }
            _ => return Err("a reply of an unknown type, of another option's type, or NBD_REP_ACK with data"),
        }
    }
}

/// Checks a string ("Conventions").
fn text(bytes: &[u8]) -> Result<(), &'static str> {
    let good = bytes.len() <= MAX_STRING && !bytes.contains(&0) && std::str::from_utf8(bytes).is_ok();
    if good { Ok(()) } else { Err("a string that contains NUL, is not UTF-8, or is too long") }
}

/// Checks that each request has its reply, in order. The transcript's server finishes one request before it takes the next.
fn requests(agreed: &Agreed, mut client: Reader<'_>, transcript: &Transcript) -> Result<(), String> {
    let ends = transcript.replies.iter().skip(1).map(|position| position.at).chain([transcript.sent.len()]);
    let mut replies = transcript.replies.iter().zip(ends);
    for number in 0.. {
        let Some(asked) = request(agreed.headers, &mut client) else { break };
        if asked.kind == NBD_CMD_DISC {
            break;
        }
        let announced = agreed.headers == Headers::Extended && asked.has(NBD_CMD_FLAG_PAYLOAD_LEN);
        let payload = if announced || asked.kind == NBD_CMD_WRITE { asked.len } else { 0 };
        let whole = usize::try_from(payload).is_ok_and(|payload| client.bytes(payload).is_ok());
        let Some((position, end)) = replies.next() else {
            if whole {
                return Err(format!("no reply to request {number}: {asked:x?}"));
            }
            break;
        };
        let bytes = &transcript.sent[position.at..end];
        let wrong = |why: &str| {
            format!("reply {number}: {why}: {asked:x?}, {} bytes of payload after {bytes:02x?}", position.payload)
        };
        let done = reply(agreed, &asked, bytes, position).map_err(wrong)?;
        if done {
            check_success(agreed, &asked).map_err(wrong)?;
        }
        if !whole {
            if done {
                return Err(wrong("success before the payload arrived"));
            }
            break;
        }
    }
    match replies.count() {
        0 => Ok(()),
        more => Err(format!("{more} unrequested replies")),
    }
}

/// Takes the next request header. Returns `None` if the client sent no further header, or an invalid one.
fn request(headers: Headers, client: &mut Reader<'_>) -> Option<Asked> {
    let extended = headers == Headers::Extended;
    let magic = if extended { NBD_EXTENDED_REQUEST_MAGIC } else { NBD_REQUEST_MAGIC };
    if client.u32() != Ok(magic) {
        return None;
    }
    Some(Asked {
        flags: client.u16().ok()?,
        kind: client.u16().ok()?,
        cookie: client.u64().ok()?,
        offset: client.u64().ok()?,
        len: if extended { client.u64().ok()? } else { client.u32().ok()?.into() },
    })
}

/// Checks that the request may succeed.
fn check_success(agreed: &Agreed, asked: &Asked) -> Result<(), &'static str> {
    let writes = matches!(asked.kind, NBD_CMD_WRITE | NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES);
    if asked.kind > NBD_CMD_BLOCK_STATUS {
        Err("success of an unknown command")
    } else if asked.kind != NBD_CMD_FLUSH && asked.end().is_none_or(|end| end > agreed.size) {
        Err("success past the end of the export")
    } else if writes && agreed.flags & NBD_FLAG_READ_ONLY != 0 {
        Err("a read-only export was changed")
    } else {
        Ok(())
    }
}

/// Reads the complete reply to one request as a client would. Returns whether it reports success.
fn reply(agreed: &Agreed, asked: &Asked, bytes: &[u8], position: &ReplyPosition) -> Result<bool, &'static str> {
    let mut reader = Reader::new(bytes);
    let payload = position.payload as u64;
    let short = |_: Truncated| "the reply is too short";
    let magic = reader.u32().map_err(short)?;
    let is_simple = magic == NBD_SIMPLE_REPLY_MAGIC;
    let has_content = matches!(asked.kind, NBD_CMD_READ | NBD_CMD_BLOCK_STATUS);
    let agreed_on = match agreed.headers {
        Headers::Simple => is_simple,
        // "a simple reply MAY be used as a reply to any request other than NBD_CMD_READ". This server sends one for
        // success.
        Headers::Structured => magic == NBD_STRUCTURED_REPLY_MAGIC || is_simple && !has_content,
        Headers::Extended => magic == NBD_EXTENDED_REPLY_MAGIC,
    };
    if !agreed_on {
        return Err("not the negotiated kind of reply");
    }
    if is_simple {
        let error = reader.u32().map_err(short)?;
        if reader.u64().map_err(short)? != asked.cookie {
            return Err("another request's cookie");
        }
        let read = if error == 0 && asked.kind == NBD_CMD_READ { asked.len } else { 0 };
        if !reader.is_empty() || payload != read {
            return Err("a wrong number of bytes after the header");
        }
        return if error == 0 { Ok(true) } else { check_error(error, asked).map(|()| false) };
    }

    let (flags, kind) = (reader.u16().map_err(short)?, reader.u16().map_err(short)?);
    if reader.u64().map_err(short)? != asked.cookie {
        return Err("another request's cookie");
    }
    let extended = agreed.headers == Headers::Extended;
    if extended && reader.u64().map_err(short)? != asked.offset {
        return Err("another request's offset");
    }
    let len = if extended { reader.u64().map_err(short)? } else { reader.u32().map_err(short)?.into() };
    // The NBD specification allows several chunks. This server sends one.
    if flags != NBD_REPLY_FLAG_DONE {
        return Err("the first chunk is not the last");
    }
    if len != reader.left() as u64 + payload {
        return Err("its length is wrong");
    }
    if kind != NBD_REPLY_TYPE_OFFSET_DATA && payload > 0 {
        return Err("data in a chunk of a type without data");
    }
    let mut done = true;
    match kind {
        NBD_REPLY_TYPE_NONE => {
            if asked.kind == NBD_CMD_BLOCK_STATUS || asked.kind == NBD_CMD_READ && asked.len > 0 {
                return Err("success without the content that was asked for");
            }
        }
        NBD_REPLY_TYPE_OFFSET_DATA if asked.kind == NBD_CMD_READ => {
            if reader.u64().map_err(short)? != asked.offset || payload != asked.len || payload == 0 {
                return Err("not the data that was asked for");
            }
        }
        NBD_REPLY_TYPE_BLOCK_STATUS | NBD_REPLY_TYPE_BLOCK_STATUS_EXT
            if asked.kind == NBD_CMD_BLOCK_STATUS && extended == (kind == NBD_REPLY_TYPE_BLOCK_STATUS_EXT) =>
        {
            if Some(reader.u32().map_err(short)?) != agreed.context {
                return Err("the status of a context that was not selected");
            }
            let size = if extended { 16 } else { 8 };
            let count = if extended { reader.u32().map_err(short)? as usize } else { reader.left() / size };
            if reader.left() != count.saturating_mul(size) {
                return Err("a wrong number of extents");
            }
            check_extents(asked, extended, count, &mut reader)?;
        }
        NBD_REPLY_TYPE_ERROR | NBD_REPLY_TYPE_ERROR_OFFSET => {
            done = false;
            check_error(reader.u32().map_err(short)?, asked)?;
            let message = reader.u16().map_err(short)?;
            text(reader.bytes(usize::from(message)).map_err(short)?)?;
            if kind == NBD_REPLY_TYPE_ERROR_OFFSET {
                let at = reader.u64().map_err(short)?;
                if asked.kind == NBD_CMD_FLUSH || at.checked_sub(asked.offset).is_none_or(|at| at >= asked.len) {
                    return Err("an error at an offset outside the request");
                }
            }
        }
        _ => return Err("a chunk of a type that is unknown or wrong for the request"),
    }
    if reader.is_empty() { Ok(done) } else { Err("excess bytes after the reply") }
}

/// Checks the extents of a reply. The NBD specification lets the last extent reach past the request unless `NBD_CMD_FLAG_REQ_ONE`
/// is set. This server's extents never do.
fn check_extents(asked: &Asked, extended: bool, count: usize, reader: &mut Reader<'_>) -> Result<(), &'static str> {
    if count == 0 || count > 1 && asked.has(NBD_CMD_FLAG_REQ_ONE) {
        return Err("no extents, or several although one was asked for");
    }
    let mut left = asked.len;
    for _ in 0..count {
        let mut word = || if extended { reader.u64() } else { reader.u32().map(u64::from) };
        let (Ok(len), Ok(status)) = (word(), word()) else { return Err("the reply is too short") };
        if len == 0 {
            return Err("an empty extent");
        }
        if status & !u64::from(NBD_STATE_HOLE | NBD_STATE_ZERO) != 0 {
            return Err("a status flag that base:allocation does not define");
        }
        left = left.checked_sub(len).ok_or("extents past the end of the request")?;
    }
    Ok(())
}

/// Checks that the request may have this error ("Error values").
fn check_error(code: u32, asked: &Asked) -> Result<(), &'static str> {
    match code {
        // NBD_EPERM, NBD_EIO, NBD_ENOMEM, NBD_EINVAL, NBD_ENOSPC, NBD_ESHUTDOWN.
        1 | 5 | 12 | 22 | 28 | 108 => Ok(()),
        // "SHOULD NOT return NBD_EOVERFLOW except as documented in response to NBD_CMD_READ [...], or when a command without
        // payload requests a length larger than an advertised maximum payload length"
        75 if asked.kind == NBD_CMD_WRITE => Err("NBD_EOVERFLOW for a write"),
        75 => Ok(()),
        // "SHOULD NOT return NBD_ENOTSUP except as documented in response to NBD_CMD_WRITE_ZEROES"
        95 if asked.kind == NBD_CMD_WRITE_ZEROES && asked.has(NBD_CMD_FLAG_FAST_ZERO) => Ok(()),
        95 => Err("NBD_ENOTSUP for a request other than fast zeroes"),
        _ => Err("an error that the document does not define"),
    }
}
