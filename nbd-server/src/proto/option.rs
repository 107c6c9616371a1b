//! What a client asks for during option haggling, parsed whole or not at all.

use super::reader::{Reader, Truncated};
use super::wire::*;

/// What a client is told that sent data with an option that has none.
pub(super) const CARRIES_NO_DATA: &str = "the option carries no data";

/// An option and its data, as sent, that means something.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum OptionRequest<'a> {
    ExportName(&'a str),
    Abort,
    List,
    StartTls,
    Info(ExportQuery<'a>),
    Go(ExportQuery<'a>),
    StructuredReply,
    ExtendedHeaders,
    ListMetaContext(ContextQuery<'a>),
    SetMetaContext(ContextQuery<'a>),
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ExportQuery<'a> {
    pub(super) name: &'a str,
    /// Pairs of bytes, each an `NBD_INFO` type.
    requests: &'a [u8],
}

impl ExportQuery<'_> {
    /// Whether the client asked for this piece of information by name.
    pub(super) fn asks_for(&self, info: u16) -> bool {
        self.requests.chunks_exact(2).any(|pair| pair == info.to_be_bytes())
    }
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`, as far as it means something here.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ContextQuery<'a> {
    pub(super) name: &'a str,
    /// Nothing in particular was asked for.
    pub(super) is_empty: bool,
    /// `base:`, which lists all of the namespace and selects none of it.
    pub(super) all_of_base: bool,
    /// `base:allocation`.
    pub(super) allocation: bool,
}

/// Why an option means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OptionError {
    /// This server does not know the option.
    Unknown,
    /// It is malformed, in this way.
    Invalid(&'static str),
    /// A string in it is longer than the document allows.
    TooBig(&'static str),
}

impl From<Truncated> for OptionError {
    fn from(_: Truncated) -> Self {
        Self::Invalid("a length in the option reaches past the option's end")
    }
}

impl<'a> OptionRequest<'a> {
    /// What `option` with `data` asks for.
    pub(super) fn parse(option: u32, data: &'a [u8]) -> Result<Self, OptionError> {
        match option {
            NBD_OPT_EXPORT_NAME => Ok(Self::ExportName(name(data)?)),
            // "a server SHOULD ignore any data sent by the client rather than rejecting the request"
            NBD_OPT_ABORT => Ok(Self::Abort),
            _ if Self::is_bare(option) && !data.is_empty() => Err(OptionError::Invalid(CARRIES_NO_DATA)),
            NBD_OPT_LIST => Ok(Self::List),
            NBD_OPT_STARTTLS => Ok(Self::StartTls),
            NBD_OPT_STRUCTURED_REPLY => Ok(Self::StructuredReply),
            NBD_OPT_EXTENDED_HEADERS => Ok(Self::ExtendedHeaders),
            NBD_OPT_LIST_META_CONTEXT => Ok(Self::ListMetaContext(ContextQuery::parse(data)?)),
            NBD_OPT_SET_META_CONTEXT => Ok(Self::SetMetaContext(ContextQuery::parse(data)?)),
            NBD_OPT_INFO => Ok(Self::Info(ExportQuery::parse(data)?)),
            NBD_OPT_GO => Ok(Self::Go(ExportQuery::parse(data)?)),
            _ => Err(OptionError::Unknown),
        }
    }

    /// Whether this server knows the option, however its data is.
    pub(super) fn is_known(option: u32) -> bool {
        let haggling = matches!(option, NBD_OPT_LIST_META_CONTEXT | NBD_OPT_SET_META_CONTEXT);
        let choosing = matches!(option, NBD_OPT_EXPORT_NAME | NBD_OPT_ABORT | NBD_OPT_INFO | NBD_OPT_GO);
        Self::is_bare(option) || haggling || choosing
    }

    /// Whether the option must not carry data.
    pub(super) fn is_bare(option: u32) -> bool {
        matches!(option, NBD_OPT_LIST | NBD_OPT_STARTTLS | NBD_OPT_STRUCTURED_REPLY | NBD_OPT_EXTENDED_HEADERS)
    }
}

impl<'a> ExportQuery<'a> {
    fn parse(data: &'a [u8]) -> Result<Self, OptionError> {
        let mut reader = Reader::new(data);
        let name = name(string(&mut reader)?)?;
        let count = usize::from(reader.u16()?);
        let requests = reader.bytes(count * 2)?;
        if !reader.is_empty() {
            return Err(OptionError::Invalid("the option is longer than its fields"));
        }
        Ok(Self { name, requests })
    }
}

impl<'a> ContextQuery<'a> {
    fn parse(data: &'a [u8]) -> Result<Self, OptionError> {
        let mut reader = Reader::new(data);
        let name = name(string(&mut reader)?)?;
        let count = reader.u32()?;
        let mut query = Self { name, is_empty: count == 0, all_of_base: false, allocation: false };
        // As many as there are bytes for, whatever the count claims.
        for _ in 0..count {
            let asked = string(&mut reader)?;
            if asked.len() > MAX_STRING {
                return Err(OptionError::TooBig("a query has at most 4096 bytes"));
            }
            if !asked.contains(&b':') {
                return Err(OptionError::Invalid("a query begins with a namespace and a colon"));
            }
            // "the server MUST ignore query strings belonging to an unknown namespace", and unknown leaf-names of this one.
            query.all_of_base |= asked == BASE_NAMESPACE.as_bytes();
            query.allocation |= asked == BASE_ALLOCATION.as_bytes();
        }
        if !reader.is_empty() {
            return Err(OptionError::Invalid("the option is longer than its fields"));
        }
        Ok(query)
    }
}

/// A length of 32 bits and so many bytes.
fn string<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], Truncated> {
    let len = usize::try_from(reader.u32()?).map_err(|_| Truncated)?;
    reader.bytes(len)
}

/// A string as "Conventions" has it: UTF-8, no NUL, at most [`MAX_STRING`] bytes.
fn name(bytes: &[u8]) -> Result<&str, OptionError> {
    if bytes.len() > MAX_STRING {
        return Err(OptionError::TooBig("an export's name has at most 4096 bytes"));
    }
    if bytes.contains(&0) {
        return Err(OptionError::Invalid("an export's name contains no NUL"));
    }
    std::str::from_utf8(bytes).map_err(|_| OptionError::Invalid("an export's name is UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &[u8], infos: &[u16]) -> Vec<u8> {
        let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
        data.extend(name);
        data.extend(u16::try_from(infos.len()).unwrap().to_be_bytes());
        data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
        data
    }

    #[test]
    fn a_query_names_an_export_and_what_is_asked_of_it() {
        let data = query("größe".as_bytes(), &[NBD_INFO_BLOCK_SIZE, 77]);
        let Ok(OptionRequest::Go(query)) = OptionRequest::parse(NBD_OPT_GO, &data) else { panic!("no query") };
        assert_eq!(query.name, "größe");
        assert!(query.asks_for(NBD_INFO_BLOCK_SIZE) && query.asks_for(77) && !query.asks_for(NBD_INFO_NAME));
    }

    #[test]
    fn a_query_cut_anywhere_or_with_bytes_left_over_is_invalid() {
        let data = query(b"disk", &[1, 2, 3]);
        for len in 0..data.len() {
            let parsed = OptionRequest::parse(NBD_OPT_INFO, &data[..len]);
            assert!(matches!(parsed, Err(OptionError::Invalid(_))), "{len}: {parsed:?}");
        }
        let longer = [data, vec![0]].concat();
        assert!(matches!(OptionRequest::parse(NBD_OPT_INFO, &longer), Err(OptionError::Invalid(_))));
    }

    #[test]
    fn a_name_is_utf8_without_nul_and_at_most_4096_bytes_long() {
        for (name, good) in [
            (&b""[..], true),
            (b"a\0b", false),
            (b"\xff", false),
            (&[b'n'; MAX_STRING], true),
            (&[b'n'; MAX_STRING + 1], false),
        ] {
            assert_eq!(OptionRequest::parse(NBD_OPT_GO, &query(name, &[])).is_ok(), good);
            assert_eq!(OptionRequest::parse(NBD_OPT_EXPORT_NAME, name).is_ok(), good);
        }
    }

    #[test]
    fn what_is_parsed_is_known_and_the_rest_is_not() {
        for option in 0..64 {
            assert_eq!(
                OptionRequest::parse(option, &[]) == Err(OptionError::Unknown),
                !OptionRequest::is_known(option)
            );
        }
    }
}
