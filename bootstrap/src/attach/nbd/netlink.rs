//! Uses the generic netlink family `nbd` to give sockets to the kernel's NBD client and to disconnect them (the kernel's
//! `include/uapi/linux/nbd-netlink.h`). Its STATUS command is not used: `/sys/block/nbdN` shows more, and STATUS reports a
//! device as connected if it is only open.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use neli::consts::genl::{CtrlAttr, CtrlCmd};
use neli::consts::nl::{GenlId, NlmF};
use neli::consts::socket::NlFamily;
use neli::err::{DeError, SerError, SocketError};
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder};
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::socket::synchronous::NlSocketHandle;
use neli::types::{Buffer, GenlBuffer};
use neli::utils::Groups;
use neli::{Size, ToBytes};

const FAMILY_NAME: &str = "nbd";
const FAMILY_VERSION: u8 = 1;

const CMD_CONNECT: u8 = 1;
const CMD_DISCONNECT: u8 = 2;
const CMD_RECONFIGURE: u8 = 3;

const ATTR_INDEX: u16 = 1;
const ATTR_SIZE_BYTES: u16 = 2;
const ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const ATTR_TIMEOUT: u16 = 4;
const ATTR_SERVER_FLAGS: u16 = 5;
const ATTR_SOCKETS: u16 = 7;
const ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const ATTR_BACKEND_IDENTIFIER: u16 = 10;

const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

type Attributes = GenlBuffer<u16, Buffer>;
type Message = Genlmsghdr<u8, u16>;

/// The longest request timeout that the kernel accepts, in seconds: 24.8 days.
///
/// The driver multiplies the timeout by its clock rate (`HZ`, at most 1000) and keeps the product in an `unsigned int`. This
/// value is the largest whose product also fits a signed `int`.
pub(super) const LONGEST_REQUEST_TIMEOUT: u64 = (i32::MAX / 1000) as u64;

/// The parameters for connecting a device.
pub(super) struct Connect<'a> {
    /// The N of `/dev/nbdN`. `None` uses the first free device.
    pub(super) index: Option<u32>,
    /// The size in bytes, a multiple of the block size.
    pub(super) size: u64,
    /// The logical block size: a power of two from 512 to the page size.
    pub(super) block_size: u64,
    /// The transmission flags, as in a handshake. Kernels ignore flags that they do not know.
    pub(super) server_flags: u16,
    /// The content of `/sys/block/nbdN/backend`. Kernels before 5.14 ignore it.
    pub(super) identifier: &'a str,
    /// The seconds after which the kernel gives up a connection that has not answered a request, and sends the request again: 1
    /// to [`LONGEST_REQUEST_TIMEOUT`]. The timeout must be set. Otherwise the block layer's default of 30 s applies if there is
    /// more than one connection.
    pub(super) request_timeout: u64,
    /// The seconds for which a request waits for a fresh socket if no connection is left. Then it fails.
    pub(super) dead_connection_timeout: u64,
}

/// A socket to the kernel's nbd driver.
pub(super) struct Netlink {
    socket: NlSocketHandle,
    family: u16,
}

impl Netlink {
    /// Looks up the family. Returns `None` if the kernel does not have it, which means that the nbd driver is not loaded.
    pub(super) fn open() -> io::Result<Option<Self>> {
        let socket = NlSocketHandle::connect(NlFamily::Generic, None, Groups::empty()).map_err(socket_error)?;
        match resolve(&socket) {
            Ok(family) => Ok(Some(Self { socket, family })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Connects a device to the other ends of the sockets, each as a hardware queue, and returns the device's index. The
    /// kernel keeps the sockets open.
    ///
    /// # Errors
    /// The kernel's error: `ResourceBusy`, if the device is connected already.
    pub(super) fn connect(&self, connect: &Connect<'_>, sockets: &[BorrowedFd<'_>]) -> io::Result<u32> {
        let replies = self.request(CMD_CONNECT, connect.attributes(sockets)?)?;
        let reply = replies.first().ok_or_else(|| invalid("the kernel sent no reply to CONNECT"))?;
        reply.attrs().get_attr_handle().get_attr_payload_as(ATTR_INDEX).map_err(de_error)
    }

    /// Disconnects the device. The server sees this as a disconnecting client. Requests in flight fail. The device cannot
    /// be connected again until its last user closes it.
    ///
    /// # Errors
    /// The kernel's error. It is not an error if the device is not connected.
    pub(super) fn disconnect(&self, index: u32) -> io::Result<()> {
        match self.request(CMD_DISCONNECT, attributes([attribute(ATTR_INDEX, index)?])) {
            // There is no such device, or it is not connected.
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotFound) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Gives the kernel `socket` to replace a socket whose connection is dead. The kernel replaces the first dead socket. If no
    /// connection is dead, the kernel does not keep the socket, and this is not an error.
    ///
    /// # Errors
    /// `InvalidInput`, if the device is no longer connected, or is connected with another identifier. Otherwise the
    /// kernel's error, such as `OutOfMemory`.
    pub(super) fn replace_socket(&self, index: u32, identifier: &str, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.request(CMD_RECONFIGURE, reconfigure_attributes(index, identifier, socket)?).map(drop)
    }

    fn request(&self, command: u8, attributes: Attributes) -> io::Result<Vec<Message>> {
        exchange(&self.socket, self.family, command, FAMILY_VERSION, attributes)
    }
}

impl Connect<'_> {
    fn attributes(&self, sockets: &[BorrowedFd<'_>]) -> io::Result<Attributes> {
        let index = self.index.map(|index| attribute(ATTR_INDEX, index)).transpose()?;
        let rest = [
            attribute(ATTR_SIZE_BYTES, self.size)?,
            attribute(ATTR_BLOCK_SIZE_BYTES, self.block_size)?,
            attribute(ATTR_SERVER_FLAGS, u64::from(self.server_flags))?,
            attribute(ATTR_TIMEOUT, self.request_timeout)?,
            attribute(ATTR_DEAD_CONN_TIMEOUT, self.dead_connection_timeout)?,
            attribute(ATTR_BACKEND_IDENTIFIER, self.identifier)?,
            socket_list(sockets)?,
        ];
        Ok(attributes(index.into_iter().chain(rest)))
    }
}

fn reconfigure_attributes(index: u32, identifier: &str, socket: BorrowedFd<'_>) -> io::Result<Attributes> {
    Ok(attributes([
        attribute(ATTR_INDEX, index)?,
        attribute(ATTR_BACKEND_IDENTIFIER, identifier)?,
        socket_list(&[socket])?,
    ]))
}

fn socket_list(sockets: &[BorrowedFd<'_>]) -> io::Result<Nlattr<u16, Buffer>> {
    let mut list = nested(ATTR_SOCKETS)?;
    for socket in sockets {
        // A file descriptor is never negative.
        let socket = attribute(SOCK_FD, socket.as_raw_fd().cast_unsigned())?;
        let item = nested(SOCK_ITEM)?.nest(&socket).map_err(ser_error)?;
        list = list.nest(&item).map_err(ser_error)?;
    }
    Ok(list)
}

/// Returns the number that the kernel gave the family `nbd` when the driver was loaded.
fn resolve(socket: &NlSocketHandle) -> io::Result<u16> {
    let name = attribute(u16::from(CtrlAttr::FamilyName), FAMILY_NAME)?;
    let command = u8::from(CtrlCmd::Getfamily);
    let replies = exchange(socket, u16::from(GenlId::Ctrl), command, 2, attributes([name]))?;
    let reply = replies.first().ok_or(io::ErrorKind::NotFound)?;
    reply.attrs().get_attr_handle().get_attr_payload_as(u16::from(CtrlAttr::FamilyId)).map_err(de_error)
}

/// Sends a request and receives replies until it is acknowledged. The kernel replies before the send returns, so this
/// waits only for the command itself.
fn exchange(
    socket: &NlSocketHandle,
    family: u16,
    command: u8,
    version: u8,
    attributes: Attributes,
) -> io::Result<Vec<Message>> {
    let payload = GenlmsghdrBuilder::<u8, u16>::default()
        .cmd(command)
        .version(version)
        .attrs(attributes)
        .build()
        .map_err(|error| invalid(&error.to_string()))?;
    let message = NlmsghdrBuilder::default()
        .nl_type(family)
        .nl_flags(NlmF::REQUEST | NlmF::ACK)
        .nl_payload(NlPayload::Payload(payload))
        .build()
        .map_err(|error| invalid(&error.to_string()))?;
    socket.send(&message).map_err(socket_error)?;
    let mut replies = Vec::new();
    loop {
        let (messages, _groups) = socket.recv::<u16, Message>().map_err(socket_error)?;
        for message in messages {
            let message: Nlmsghdr<u16, Message> = message.map_err(socket_error)?;
            match message.nl_payload() {
                NlPayload::Payload(reply) => replies.push(reply.clone()),
                NlPayload::Ack(_) => return Ok(replies),
                NlPayload::Err(error) => return Err(io::Error::from_raw_os_error(error.error().saturating_neg())),
                NlPayload::DumpExtAck(_) | NlPayload::Empty => {}
            }
        }
    }
}

fn attribute<P: Size + ToBytes>(kind: u16, payload: P) -> io::Result<Nlattr<u16, Buffer>> {
    let kind = AttrTypeBuilder::default().nla_type(kind).build().map_err(|error| invalid(&error.to_string()))?;
    let built = NlattrBuilder::default().nla_type(kind).nla_payload(payload).build();
    built.map_err(|error| invalid(&error.to_string()))
}

fn nested(kind: u16) -> io::Result<Nlattr<u16, Buffer>> {
    attribute(kind, Buffer::new())
}

fn attributes(list: impl IntoIterator<Item = Nlattr<u16, Buffer>>) -> Attributes {
    list.into_iter().collect()
}

fn invalid(said: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, said.to_owned())
}

fn ser_error(error: SerError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn de_error(error: DeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Returns the operating system's error, if there is one inside.
fn socket_error(error: SocketError) -> io::Error {
    match error {
        SocketError::Io(error) => {
            error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
        }
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::os::fd::AsFd;

    use super::*;

    /// Encodes an attribute as `struct nlattr`: length, type and payload, padded to four bytes.
    fn wire(kind: u16, payload: &[u8]) -> Vec<u8> {
        let len = u16::try_from(4 + payload.len()).unwrap();
        let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn encoded(attributes: &Attributes) -> Vec<u8> {
        let mut cursor = Cursor::new(Vec::new());
        attributes.to_bytes(&mut cursor).unwrap();
        cursor.into_inner()
    }

    #[test]
    fn connect_is_laid_out_as_the_kernel_reads_it() {
        const NESTED: u16 = 1 << 15;
        let (one, two) = std::os::unix::net::UnixStream::pair().unwrap();
        let connect = Connect {
            index: Some(3),
            size: 1 << 33,
            block_size: 4096,
            server_flags: 0x12d,
            identifier: "ab",
            request_timeout: 90,
            dead_connection_timeout: 60,
        };
        let item = |socket: &std::os::unix::net::UnixStream| {
            wire(SOCK_ITEM | NESTED, &wire(SOCK_FD, &socket.as_raw_fd().to_ne_bytes()))
        };
        let expected = [
            wire(ATTR_INDEX, &3u32.to_ne_bytes()),
            wire(ATTR_SIZE_BYTES, &(1u64 << 33).to_ne_bytes()),
            wire(ATTR_BLOCK_SIZE_BYTES, &4096u64.to_ne_bytes()),
            wire(ATTR_SERVER_FLAGS, &0x12du64.to_ne_bytes()),
            wire(4, &90u64.to_ne_bytes()),
            wire(8, &60u64.to_ne_bytes()),
            wire(ATTR_BACKEND_IDENTIFIER, b"ab\0"),
            wire(ATTR_SOCKETS | NESTED, &[item(&one), item(&two)].concat()),
        ];
        assert_eq!(encoded(&connect.attributes(&[one.as_fd(), two.as_fd()]).unwrap()), expected.concat());
    }

    #[test]
    fn a_fresh_socket_is_sent_with_the_devices_identifier() {
        const NESTED: u16 = 1 << 15;
        let (one, _two) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket = wire(SOCK_ITEM | NESTED, &wire(SOCK_FD, &one.as_raw_fd().to_ne_bytes()));
        let expected = [
            wire(ATTR_INDEX, &3u32.to_ne_bytes()),
            wire(ATTR_BACKEND_IDENTIFIER, b"ab\0"),
            wire(ATTR_SOCKETS | NESTED, &socket),
        ];
        assert_eq!(encoded(&reconfigure_attributes(3, "ab", one.as_fd()).unwrap()), expected.concat());
    }

    #[test]
    fn the_longest_timeout_fits_the_kernels_integers() {
        const { assert!(LONGEST_REQUEST_TIMEOUT * 1000 <= i32::MAX as u64) };
        const { assert!(LONGEST_REQUEST_TIMEOUT > 24 * 24 * 3600) };
    }

    #[test]
    fn without_an_index_the_first_free_device_is_requested() {
        let connect = Connect {
            index: None,
            size: 512,
            block_size: 512,
            server_flags: 1,
            identifier: "",
            request_timeout: 1,
            dead_connection_timeout: 1,
        };
        let bytes = encoded(&connect.attributes(&[]).unwrap());
        assert!(bytes.starts_with(&wire(ATTR_SIZE_BYTES, &512u64.to_ne_bytes())));
    }

    #[test]
    fn only_a_known_family_is_found() {
        let socket = NlSocketHandle::connect(NlFamily::Generic, None, Groups::empty()).unwrap();
        let ask = |name: &str| {
            let name = attribute(u16::from(CtrlAttr::FamilyName), name).unwrap();
            exchange(&socket, u16::from(GenlId::Ctrl), u8::from(CtrlCmd::Getfamily), 2, attributes([name]))
        };
        assert_eq!(ask("nlctrl").unwrap().len(), 1);
        assert_eq!(ask("no-such-thing").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
