//! The options that a client sends during negotiation. An option is parsed completely or not at all.

use crate::proto::reader::{Reader, Truncated};
use crate::proto::wire::*;

/// The message for a client that sent data with an option that must not carry data.
const CARRIES_NO_DATA: &str = "this option carries no data";

/// A valid option and its data.
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
    /// The requested `NBD_INFO` types, two bytes each.
    requests: &'a [u8],
}

impl ExportQuery<'_> {
    /// Returns whether the client asked for this type of information.
    pub(super) fn asks_for(&self, info: u16) -> bool {
        self.requests.chunks_exact(2).any(|pair| pair == info.to_be_bytes())
    }
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`, reduced to what this server supports.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ContextQuery<'a> {
    pub(super) name: &'a str,
    /// Whether the client sent no query.
    pub(super) is_empty: bool,
    /// Whether `base:` is among the queries. It lists the whole namespace but selects nothing.
    pub(super) all_of_base: bool,
    /// Whether `base:allocation` is among the queries.
    pub(super) allocation: bool,
}

/// Why an option is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OptionError {
    /// This server does not know the option.
    Unknown,
    /// The option is malformed, for this reason.
    Invalid(&'static str),
    /// A string of the option is longer than the NBD specification allows.
    TooBig(&'static str),
}

impl From<Truncated> for OptionError {
    fn from(_: Truncated) -> Self {
        Self::Invalid("a length in the option reaches past the end of the option")
    }
}

impl<'a> OptionRequest<'a> {
    /// Parses the option number `option` with its data.
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

    /// Parses the option number `option`, whose data was skipped. Only an option that ignores its data is valid.
    pub(super) fn without_its_data(option: u32) -> Result<Self, OptionError> {
        match option {
            NBD_OPT_ABORT => Ok(Self::Abort),
            _ if Self::is_bare(option) => Err(OptionError::Invalid(CARRIES_NO_DATA)),
            _ if Self::is_known(option) => Err(OptionError::TooBig("the option's data is too long")),
            _ => Err(OptionError::Unknown),
        }
    }

    /// Returns whether this server knows the option. The option's data may be invalid.
    pub(super) fn is_known(option: u32) -> bool {
        let contexts = matches!(option, NBD_OPT_LIST_META_CONTEXT | NBD_OPT_SET_META_CONTEXT);
        let exports = matches!(option, NBD_OPT_EXPORT_NAME | NBD_OPT_ABORT | NBD_OPT_INFO | NBD_OPT_GO);
        Self::is_bare(option) || contexts || exports
    }

    /// Returns whether the option must not carry data.
    fn is_bare(option: u32) -> bool {
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
        // A false count does no harm: the loop ends with an error when the data is used up.
        for _ in 0..count {
            let asked = string(&mut reader)?;
            if asked.len() > MAX_STRING {
                return Err(OptionError::TooBig("a query has at most 4096 bytes"));
            }
            if !asked.contains(&b':') {
                return Err(OptionError::Invalid("a query must begin with a namespace and a colon"));
            }
            // "the server MUST ignore query strings belonging to an unknown namespace". It also ignores unknown leaf-names of
            // `base:`.
            query.all_of_base |= asked == BASE_NAMESPACE.as_bytes();
            query.allocation |= asked == BASE_ALLOCATION.as_bytes();
        }
        if !reader.is_empty() {
            return Err(OptionError::Invalid("the option is longer than its fields"));
        }
        Ok(query)
    }
}

/// Takes a string: a 32-bit length and that many bytes.
fn string<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], Truncated> {
    let len = usize::try_from(reader.u32()?).map_err(|_| Truncated)?;
    reader.bytes(len)
}

/// Checks a string as the NBD specification requires ("Conventions"): UTF-8, no NUL, at most [`MAX_STRING`] bytes.
fn name(bytes: &[u8]) -> Result<&str, OptionError> {
    if bytes.len() > MAX_STRING {
        return Err(OptionError::TooBig("the name of an export has at most 4096 bytes"));
    }
    if bytes.contains(&0) {
        return Err(OptionError::Invalid("the name of an export must not contain NUL"));
    }
    std::str::from_utf8(bytes).map_err(|_| OptionError::Invalid("the name of an export must be UTF-8"))
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
    fn a_query_names_an_export_and_the_information_wanted() {
        let data = query("größe".as_bytes(), &[NBD_INFO_BLOCK_SIZE, 77]);
        let Ok(OptionRequest::Go(query)) = OptionRequest::parse(NBD_OPT_GO, &data) else { panic!("no query") };
        assert_eq!(query.name, "größe");
        assert!(query.asks_for(NBD_INFO_BLOCK_SIZE) && query.asks_for(77) && !query.asks_for(NBD_INFO_NAME));
    }

    #[test]
    fn a_truncated_query_or_one_with_excess_bytes_is_invalid() {
        let data = query(b"disk", &[1, 2, 3]);
        for len in 0..data.len() {
            let parsed = OptionRequest::parse(NBD_OPT_INFO, &data[..len]);
            assert!(matches!(parsed, Err(OptionError::Invalid(_))), "{len}: {parsed:?}");
        }
        let longer = [data, vec![0]].concat();
        assert!(matches!(OptionRequest::parse(NBD_OPT_INFO, &longer), Err(OptionError::Invalid(_))));
    }

    #[test]
    fn names_are_utf8_without_nul_and_at_most_4096_bytes() {
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
    fn every_known_option_is_parsed_and_no_other() {
        for option in 0..64 {
            assert_eq!(
                OptionRequest::parse(option, &[]) == Err(OptionError::Unknown),
                !OptionRequest::is_known(option)
            );
        }
    }
}
