//! What the NBD specification says a server MUST or SHOULD do, one test for each sentence, over a socket. Quotations are from
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use engine::sector::SectorSize;
use engine::store::{FaultyStore, MemoryStore, Operation};
use engine::volume::Volume;
use harness::nbd::{RawClient, TestServer, be16, be32, be64, encrypted, option_bytes, query, request_bytes};
use nbd_server::proto::wire::*;
use nbd_server::proto::{ErrorCode, MAX_PAYLOAD};
use nbd_server::{Export, SessionKind};

const SIZE: u64 = 40 << 20;
const FIXED: u32 = NBD_FLAG_C_FIXED_NEWSTYLE;
const BOTH: u32 = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES;
const EINVAL: u32 = ErrorCode::Inval as u32;

fn volume() -> Arc<Volume> {
    Arc::new(encrypted(Arc::new(MemoryStore::zeroed(40 << 20)), SectorSize::B512))
}

/// Starts a server with an export `disk` and a read-only export `fixed`.
fn server() -> TestServer {
    server_on(SessionKind::Auto)
}

fn server_on(session: SessionKind) -> TestServer {
    TestServer::on(
        session,
        [Export::new("disk", volume()).described("the disk of the tests"), Export::new("fixed", volume()).read_only()],
    )
}

fn negotiated(server: &TestServer) -> RawClient<UnixStream> {
    let mut client = server.connect();
    client.start_handshake(BOTH);
    client
}

fn infos(client: &mut RawClient<UnixStream>, option: u32, name: &str, asked: &[u16]) -> Vec<(u16, Vec<u8>)> {
    let mut replies = client.option(option, &query(name, asked));
    assert_eq!(replies.pop().unwrap().kind, NBD_REP_ACK);
    assert!(replies.iter().all(|reply| reply.kind == NBD_REP_INFO && reply.option == option));
    replies.into_iter().map(|reply| (be16(&reply.data), reply.data[2..].to_vec())).collect()
}

mod handshake {
    use super::*;

    #[test]
    fn only_defined_handshake_flags_are_set() {
        // "NBD_FLAG_FIXED_NEWSTYLE; MUST be set by servers that support the fixed newstyle protocol ... The server MUST
        // NOT set any other flags"
        let flags = server().connect().greeting();
        assert_eq!(flags, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    }

    #[test]
    fn an_unknown_client_flag_must_close_the_connection() {
        // "the server MUST drop the TCP connection if the client sets an unknown flag"
        let server = server();
        for flag in 2..32 {
            let mut client = server.connect();
            client.start_handshake(FIXED | 1 << flag);
            assert!(client.is_closed(), "bit {flag}");
        }
    }

    #[test]
    fn an_option_without_its_magic_closes_the_connection() {
        let server = server();
        let mut client = negotiated(&server);
        client.send(&[0x55; 16]);
        assert!(client.is_closed());
    }

    #[test]
    fn export_name_is_answered_with_size_flags_and_124_zeros() {
        let server = server();
        let mut client = server.connect();
        client.start_handshake(FIXED);
        client.send_option(NBD_OPT_EXPORT_NAME, b"disk");
        let reply = client.receive(134);
        assert_eq!(be64(&reply), SIZE);
        assert_ne!(be16(&reply[8..]) & NBD_FLAG_HAS_FLAGS, 0);
        assert!(reply[10..].iter().all(|byte| *byte == 0));
        assert_eq!(client.flush(), 0, "the transmission phase has begun");
    }

    #[test]
    fn the_124_zeros_are_left_out_if_both_agreed() {
        // "the server MUST NOT send the 124 bytes of zero"
        let server = server();
        let mut client = server.connect();
        client.start_handshake(BOTH);
        client.send_option(NBD_OPT_EXPORT_NAME, b"disk");
        assert_eq!(be64(&client.receive(10)), SIZE);
        assert_eq!(client.flush(), 0, "the next bytes must be a reply");
    }

    #[test]
    fn export_name_of_an_unknown_export_must_terminate_the_session() {
        // "If the chosen export does not exist ..., the server MUST terminate the session."
        let server = server();
        let mut client = negotiated(&server);
        client.send_option(NBD_OPT_EXPORT_NAME, b"nowhere");
        assert!(client.is_closed());
    }

    #[test]
    fn the_empty_name_is_the_default_export() {
        // "A special, "empty", name ... is reserved for a "default" export"
        let server = server();
        let mut client = negotiated(&server);
        let told = infos(&mut client, NBD_OPT_INFO, "", &[NBD_INFO_NAME]);
        assert!(told.contains(&(NBD_INFO_NAME, b"disk".to_vec())));
    }

    #[test]
    fn abort_must_be_acknowledged_whatever_data_it_carries() {
        // "The server MUST reply with NBD_REP_ACK ... a server SHOULD ignore any data sent by the client"
        let server = server();
        for data in [vec![], vec![1], vec![9; 100_000]] {
            let mut client = negotiated(&server);
            let replies = client.option(NBD_OPT_ABORT, &data);
            assert_eq!(replies.iter().map(|reply| reply.kind).collect::<Vec<_>>(), [NBD_REP_ACK]);
            assert!(client.is_closed());
        }
    }

    #[test]
    fn list_names_each_export_and_is_then_acknowledged() {
        let server = server();
        let mut replies = negotiated(&server).option(NBD_OPT_LIST, &[]);
        assert_eq!(replies.pop().unwrap().kind, NBD_REP_ACK);
        let names: Vec<_> = replies
            .iter()
            .map(|reply| {
                assert_eq!((reply.kind, reply.option), (NBD_REP_SERVER, NBD_OPT_LIST));
                // "MUST be no larger than the reply packet header length - 4"
                let (name, description) = reply.data[4..].split_at(be32(&reply.data) as usize);
                (name.to_vec(), description.to_vec())
            })
            .collect();
        assert_eq!(names, [(b"disk".to_vec(), b"the disk of the tests".to_vec()), (b"fixed".to_vec(), vec![])]);
    }

    #[test]
    fn list_with_data_is_invalid() {
        // "the server SHOULD reject a request that includes data with NBD_REP_ERR_INVALID"
        let server = server();
        for data in [vec![0], vec![0; 50_000]] {
            let mut client = negotiated(&server);
            assert_eq!(client.option(NBD_OPT_LIST, &data)[0].kind, NBD_REP_ERR_INVALID);
            assert_eq!(client.option(NBD_OPT_LIST, &[]).len(), 3, "the handshake goes on");
        }
    }

    #[test]
    fn an_unknown_option_is_unsupported_and_its_data_is_skipped() {
        // "The presence of the option length in every option allows the server to skip any options ... that it does not
        // understand."
        let server = server();
        let mut client = negotiated(&server);
        for (option, len) in [(4, 0), (0x1234, 1), (u32::MAX, 300_000), (77, 16 * 1024 + 1)] {
            let replies = client.option(option, &vec![0xee; len]);
            assert_eq!(replies.len(), 1);
            assert_eq!((replies[0].option, replies[0].kind), (option, NBD_REP_ERR_UNSUP));
        }
        client.option(NBD_OPT_GO, &query("disk", &[]));
        assert_eq!(client.flush(), 0);
    }

    #[test]
    fn starttls_must_be_refused_without_demanding_tls() {
        // "If the server receives NBD_OPT_STARTTLS it MUST respond with NBD_REP_ERR_POLICY ... NBD_REP_ERR_UNSUP ... The
        // server MUST NOT respond to any option request with NBD_REP_ERR_TLS_REQD."
        let server = server();
        let replies = negotiated(&server).option(NBD_OPT_STARTTLS, &[]);
        assert_eq!(replies[0].kind, NBD_REP_ERR_POLICY);
    }

    #[test]
    fn info_and_go_send_size_and_flags_before_the_ack() {
        // "The server MUST send an NBD_INFO_EXPORT information type at some point before sending an NBD_REP_ACK ...
        // length MUST be 12"
        let server = server();
        for option in [NBD_OPT_INFO, NBD_OPT_GO] {
            let mut client = negotiated(&server);
            let told = infos(&mut client, option, "disk", &[]);
            let export = &told.iter().find(|(kind, _)| *kind == NBD_INFO_EXPORT).unwrap().1;
            assert_eq!(export.len(), 10);
            assert_eq!(be64(export), SIZE);
        }
    }

    #[test]
    fn unknown_information_requests_must_be_ignored() {
        // "The server MUST ignore any information requests it does not understand."
        let server = server();
        let mut client = negotiated(&server);
        let told = infos(&mut client, NBD_OPT_GO, "disk", &[999, NBD_INFO_DESCRIPTION, 0xffff]);
        assert!(told.contains(&(NBD_INFO_DESCRIPTION, b"the disk of the tests".to_vec())));
        assert!(told.iter().all(|(kind, _)| *kind <= NBD_INFO_BLOCK_SIZE));
    }

    #[test]
    fn go_must_reply_with_the_same_information_as_info() {
        // "the server MUST reply with the same set of information"
        let server = server();
        let mut client = negotiated(&server);
        let asked = [NBD_INFO_BLOCK_SIZE, NBD_INFO_NAME, NBD_INFO_DESCRIPTION];
        let info = infos(&mut client, NBD_OPT_INFO, "disk", &asked);
        assert_eq!(infos(&mut client, NBD_OPT_GO, "disk", &asked), info);
    }

    #[test]
    fn go_never_sends_the_124_zeros() {
        // "The server MUST NOT send any zero padding bytes after the NBD_REP_ACK data, whether or not the client
        // negotiated the NBD_FLAG_C_NO_ZEROES flag."
        let server = server();
        for flags in [FIXED, BOTH] {
            let mut client = server.connect();
            client.start_handshake(flags);
            client.option(NBD_OPT_GO, &query("disk", &[]));
            assert_eq!(client.flush(), 0, "the next bytes must be a reply");
        }
    }

    #[test]
    fn go_to_an_unknown_export_does_not_end_the_handshake() {
        // "NBD_REP_ERR_UNKNOWN: The chosen export does not exist ... the server SHOULD NOT send NBD_REP_INFO replies."
        let server = server();
        let mut client = negotiated(&server);
        for option in [NBD_OPT_INFO, NBD_OPT_GO] {
            let replies = client.option(option, &query("nowhere", &[NBD_INFO_BLOCK_SIZE]));
            assert_eq!(replies.iter().map(|reply| reply.kind).collect::<Vec<_>>(), [NBD_REP_ERR_UNKNOWN]);
        }
        infos(&mut client, NBD_OPT_GO, "disk", &[]);
        assert_eq!(client.flush(), 0);
    }

    #[test]
    fn a_name_longer_than_its_option_is_invalid() {
        // "32 bits, length of name (unsigned); MUST be no larger than the option data length - 6"
        let server = server();
        let mut client = negotiated(&server);
        let mut data = query("disk", &[]);
        for len in [5u32, 6, 4096, u32::MAX] {
            data[..4].copy_from_slice(&len.to_be_bytes());
            assert_eq!(client.option(NBD_OPT_GO, &data)[0].kind, NBD_REP_ERR_INVALID, "{len}");
        }
        for len in 0..10 {
            assert_eq!(client.option(NBD_OPT_INFO, &query("disk", &[])[..len])[0].kind, NBD_REP_ERR_INVALID);
        }
    }

    #[test]
    fn strings_have_at_most_4096_bytes_and_no_nul() {
        // "MUST NOT contain NUL characters ... and MUST be no longer than 4096 bytes"
        let server = server();
        let mut client = negotiated(&server);
        assert_eq!(client.option(NBD_OPT_GO, &query("di\0sk", &[]))[0].kind, NBD_REP_ERR_INVALID);
        assert_eq!(client.option(NBD_OPT_GO, &query(&"x".repeat(4096), &[]))[0].kind, NBD_REP_ERR_UNKNOWN);
        assert_eq!(client.option(NBD_OPT_GO, &query(&"x".repeat(4097), &[]))[0].kind, NBD_REP_ERR_TOO_BIG);
        assert_eq!(client.option(NBD_OPT_GO, &query(&"x".repeat(60_000), &[]))[0].kind, NBD_REP_ERR_TOO_BIG);
    }

    #[test]
    fn block_sizes_must_be_ascending_powers_of_two() {
        // "this value MUST be a power of 2, MUST NOT be larger than 2^16"; "MUST be a power of 2 at least as large as the
        // maximum of the minimum block size and 2^9"; "MUST be at least as large as the preferred block size, and SHOULD
        // be at least 2^20"
        let server = server();
        let told = infos(&mut negotiated(&server), NBD_OPT_INFO, "disk", &[NBD_INFO_BLOCK_SIZE]);
        let sizes = &told.iter().find(|(kind, _)| *kind == NBD_INFO_BLOCK_SIZE).unwrap().1;
        assert_eq!(sizes.len(), 12);
        let (minimum, preferred, maximum) = (be32(sizes), be32(&sizes[4..]), be32(&sizes[8..]));
        assert!(minimum.is_power_of_two() && minimum <= 1 << 16);
        assert!(preferred.is_power_of_two() && preferred >= minimum.max(512));
        assert!(maximum >= preferred && maximum >= 1 << 20);
    }

    #[test]
    fn transmission_flags_must_match_what_the_export_supports() {
        // "NBD_FLAG_HAS_FLAGS: MUST always be 1"; "MUST leave this flag [SEND_DF] clear if structured replies have not
        // been negotiated"; SEND_FAST_ZERO "MUST [be] 0 if NBD_FLAG_SEND_WRITE_ZEROES is not set"
        let server = server();
        let mut client = negotiated(&server);
        let mut flags = |name| be16(&infos(&mut client, NBD_OPT_INFO, name, &[])[0].1[8..]);
        let (disk, fixed) = (flags("disk"), flags("fixed"));
        for flags in [disk, fixed] {
            assert_ne!(flags & NBD_FLAG_HAS_FLAGS, 0);
            assert_eq!(flags & (1 << 7), 0, "SEND_DF");
            assert!(flags & NBD_FLAG_SEND_FAST_ZERO == 0 || flags & NBD_FLAG_SEND_WRITE_ZEROES != 0);
        }
        assert_eq!((disk & NBD_FLAG_READ_ONLY, fixed & NBD_FLAG_READ_ONLY), (0, NBD_FLAG_READ_ONLY));
    }

    #[test]
    fn a_client_that_sends_options_without_end_is_disconnected() {
        // "if a server believes a client's behaviour constitutes a denial of service, it MAY initiate a hard disconnect"
        let server = server();
        let mut client = negotiated(&server);
        for _ in 0..128 {
            assert_eq!(client.option(NBD_OPT_LIST, &[]).len(), 3);
        }
        client.send_option(NBD_OPT_LIST, &[]);
        assert!(client.is_closed());
    }

    #[test]
    fn an_option_that_announces_gigabytes_is_disconnected() {
        let server = server();
        let mut client = negotiated(&server);
        let mut header = option_bytes(0x77, &[]);
        header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
        client.send(&header);
        assert!(client.is_closed());
    }

    #[test]
    fn a_client_without_fixed_newstyle_is_served_too() {
        // "Servers MAY choose to honour fixed newstyle from clients that didn't set this bit"
        let server = server();
        let mut client = server.connect();
        client.start_handshake(0);
        client.send_option(NBD_OPT_EXPORT_NAME, b"disk");
        client.receive(134);
        assert_eq!(client.flush(), 0);
    }
}

mod transmission {
    use super::*;

    fn client(server: &TestServer, export: &str) -> RawClient<UnixStream> {
        let mut client = server.connect();
        client.enter(export);
        client
    }

    fn a_reply_must_carry_its_requests_cookie(session: SessionKind) {
        // "the server MUST use the same value for cookie as was sent by the client"
        let server = server_on(session);
        let mut client = client(&server, "disk");
        for cookie in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
            client.send(&request_bytes(0, NBD_CMD_FLUSH, cookie, 0, 0));
            assert_eq!(client.reply().cookie, cookie);
        }
    }

    fn without_negotiation_every_reply_must_be_simple(session: SessionKind) {
        // "without client negotiation, the server MUST use only simple replies"
        let server = server_on(session);
        let mut client = client(&server, "disk");
        assert_eq!(client.write(0, 0, b"plain"), 0);
        assert_eq!(client.read(0, 5), Ok(b"plain".to_vec()));
        assert_eq!(client.read(SIZE, 5), Err(EINVAL), "an error must have no payload");
        assert_eq!(client.flush(), 0);
    }

    fn many_requests_at_once_are_each_answered_once(session: SessionKind) {
        // "Replies need not be sent in the same order as requests"
        let server = server_on(session);
        let mut client = client(&server, "disk");
        for block in 0..100u64 {
            assert_eq!(client.write(0, block * 4096, &[u8::try_from(block).unwrap(); 4096]), 0);
        }
        let requests: Vec<u8> =
            (0..100u64).flat_map(|block| request_bytes(0, NBD_CMD_READ, block, block * 4096, 4096)).collect();
        client.send(&requests);
        let mut seen = [false; 100];
        for _ in 0..100 {
            let reply = client.reply();
            assert_eq!(reply.error, 0);
            let block = usize::try_from(reply.cookie).unwrap();
            assert!(!std::mem::replace(&mut seen[block], true), "a request was answered twice");
            let expected = u8::try_from(block).unwrap();
            assert!(client.receive(4096).iter().all(|byte| *byte == expected));
        }
    }

    fn writes_to_a_read_only_export_must_fail(session: SessionKind) {
        // "If this flag is set, the server MUST error subsequent write operations"; "SHOULD return NBD_EPERM"
        let server = server_on(session);
        let mut client = client(&server, "fixed");
        let perm = ErrorCode::Perm.code();
        assert_eq!(client.write(0, 0, &[1; 512]), perm);
        assert_eq!(client.request(0, NBD_CMD_TRIM, 0, 512), perm);
        assert_eq!(client.request(0, NBD_CMD_WRITE_ZEROES, 0, 512), perm);
        assert!(client.read(0, 512).is_ok());
        assert_eq!(client.flush(), 0);
    }

    fn requests_past_the_end_fail_with_enospc_or_einval(session: SessionKind) {
        // "The server SHOULD return NBD_ENOSPC if it receives a write request including one or more sectors beyond the
        // size of the device ... NBD_EINVAL if it receives a read or trim request"
        let server = server_on(session);
        let mut client = client(&server, "disk");
        let nospc = ErrorCode::NoSpc.code();
        for (offset, len) in [(SIZE - 511, 512), (SIZE, 1), (u64::MAX, 1), (u64::MAX - 511, 512), (1 << 63, 4096)] {
            assert_eq!(client.write(0, offset, &vec![0; len as usize]), nospc);
            assert_eq!(client.request(0, NBD_CMD_WRITE_ZEROES, offset, len), nospc);
            assert_eq!(client.read(offset, len), Err(EINVAL));
            assert_eq!(client.request(0, NBD_CMD_TRIM, offset, len), EINVAL);
            assert_eq!(client.request(0, NBD_CMD_CACHE, offset, len), EINVAL);
        }
        assert_eq!(client.write(0, SIZE - 512, &[1; 512]), 0, "the last sector can be written");
    }

    fn unknown_commands_and_flags_are_invalid(session: SessionKind) {
        // "The server SHOULD return NBD_EINVAL if it receives an unknown command ... an unknown command flag ... a flag
        // not explicitly documented as applicable to the given request."
        let server = server_on(session);
        let mut client = client(&server, "disk");
        for command in [7, 8, 9, 255, u16::MAX] {
            assert_eq!(client.request(0, command, 0, 512), EINVAL, "command {command}");
        }
        for flag in 1..16u16 {
            for command in [NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES] {
                let len = if command == NBD_CMD_FLUSH { 0 } else { 512 };
                let known = command == NBD_CMD_WRITE_ZEROES && [1, 4].contains(&flag);
                if !known {
                    assert_eq!(client.request(1 << flag, command, 0, len), EINVAL, "command {command} bit {flag}");
                }
            }
            assert_eq!(client.write(1 << flag, 0, &[0; 512]), EINVAL, "bit {flag}, with a payload");
        }
        assert_eq!(client.flush(), 0);
    }

    fn fua_must_be_accepted_with_every_command(session: SessionKind) {
        // "the server MUST accept all commands with this bit set (even by ignoring the bit)"
        let server = server_on(session);
        let mut client = client(&server, "disk");
        let fua = NBD_CMD_FLAG_FUA;
        assert_eq!(client.write(fua, 0, &[1; 512]), 0);
        for command in [NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES] {
            assert_eq!(client.request(fua, command, 0, 512), 0);
        }
        assert_eq!(client.request(fua, NBD_CMD_FLUSH, 0, 0), 0);
        assert_eq!(client.request(fua, NBD_CMD_READ, 0, 512), 0);
        client.receive(512);
    }

    fn the_offset_and_length_of_a_flush_must_be_zero(session: SessionKind) {
        // "For a flush request, length and offset are reserved, and MUST be set to all-zero."
        let server = server_on(session);
        let mut client = client(&server, "disk");
        assert_eq!(client.request(0, NBD_CMD_FLUSH, 512, 0), EINVAL);
        assert_eq!(client.request(0, NBD_CMD_FLUSH, 0, 512), EINVAL);
    }

    fn requests_of_length_zero_do_not_disconnect(session: SessionKind) {
        // "the behavior of a server on such a request is unspecified although the server SHOULD NOT disconnect"
        let server = server_on(session);
        let mut client = client(&server, "disk");
        client.request(0, NBD_CMD_READ, 0, 0);
        client.write(0, 0, &[]);
        for command in [NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_CACHE] {
            client.request(0, command, SIZE, 0);
        }
        assert_eq!(client.flush(), 0);
    }

    fn payloads_are_served_up_to_32_mib(session: SessionKind) {
        // "any payload not exceeding 2^25 (33,554,432) bytes SHOULD NOT be considered a denial of service attack"
        let server = server_on(session);
        let mut client = client(&server, "disk");
        let data: Vec<u8> = (0..MAX_PAYLOAD).map(|n| (n / 512).to_le_bytes()[0]).collect();
        assert_eq!(client.write(0, 4096, &data), 0);
        assert!(client.read(4096, MAX_PAYLOAD) == Ok(data));
        assert_eq!(client.read(0, MAX_PAYLOAD + 1), Err(EINVAL));
        assert_eq!(client.write(0, 0, &vec![7; MAX_PAYLOAD as usize + 1]), EINVAL);
        assert_ne!(client.read(0, 512), Ok(vec![7; 512]), "nothing was written and the connection still works");
    }

    fn a_payload_of_gigabytes_is_disconnected(session: SessionKind) {
        let server = server_on(session);
        let mut client = client(&server, "disk");
        client.send_request(0, NBD_CMD_WRITE, 0, u32::MAX);
        assert!(client.is_closed());
    }

    fn a_request_without_its_magic_is_disconnected(session: SessionKind) {
        let server = server_on(session);
        let mut client = client(&server, "disk");
        client.send(&[0x25; REQUEST_LEN]);
        assert!(client.is_closed());
    }

    fn trims_and_write_zeroes_may_exceed_the_payload_limit(session: SessionKind) {
        // "the client MAY request an effect length larger than the maximum payload size; the server SHOULD NOT disconnect"
        let server = server_on(session);
        let mut client = client(&server, "disk");
        let all = u32::try_from(SIZE).unwrap();
        assert_eq!(client.write(0, SIZE - 512, &[1; 512]), 0);
        assert_eq!(client.request(0, NBD_CMD_WRITE_ZEROES, 0, all), 0);
        assert_eq!(client.read(SIZE - 512, 512), Ok(vec![0; 512]));
        assert_eq!(client.request(0, NBD_CMD_TRIM, 0, all), 0);
    }

    fn written_zeros_must_read_back_as_zeros(session: SessionKind) {
        // "it MUST ensure that the data reads back as zero"; NO_HOLE "MUST [be] support[ed]"
        let server = server_on(session);
        let mut client = client(&server, "disk");
        for flags in [0, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_FUA] {
            assert_eq!(client.write(0, 0, &[0xff; 8192]), 0);
            assert_eq!(client.request(flags, NBD_CMD_WRITE_ZEROES, 1000, 5000), 0);
            let mut expected = vec![0xff; 8192];
            expected[1000..6000].fill(0);
            assert_eq!(client.read(0, 8192), Ok(expected), "flags {flags}");
        }
    }

    fn fast_zero_must_fail_quickly_if_it_is_not_fast(session: SessionKind) {
        // "MUST fail quickly with NBD_ENOTSUP unless the request can be serviced in less time than a corresponding
        // NBD_CMD_WRITE, and SHOULD NOT alter the contents"; without the flag "the server MUST NOT fail with NBD_ENOTSUP"
        let server = server_on(session);
        let mut client = client(&server, "disk");
        assert_eq!(client.write(0, 0, &[0xff; 4096]), 0);
        let fast = NBD_CMD_FLAG_FAST_ZERO;
        for flags in [fast, fast | NBD_CMD_FLAG_NO_HOLE, fast | NBD_CMD_FLAG_FUA] {
            assert_eq!(client.request(flags, NBD_CMD_WRITE_ZEROES, 0, 4096), ErrorCode::NotSup.code());
        }
        assert_eq!(client.read(0, 4096), Ok(vec![0xff; 4096]));
        assert_eq!(client.request(0, NBD_CMD_WRITE_ZEROES, 0, 4096), 0);
    }

    fn fast_zero_succeeds_if_it_is_fast(session: SessionKind) {
        let store = Arc::new(MemoryStore::from(vec![0xff; 1 << 20]));
        let server = TestServer::of(session, Volume::plaintext(store, SectorSize::B512).unwrap());
        let mut client = server.client();
        assert_eq!(client.request(NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_WRITE_ZEROES, 512, 1024), 0);
        let mut expected = vec![0xff; 2048];
        expected[512..1536].fill(0);
        assert_eq!(client.read(0, 2048), Ok(expected));
        // The server must write zeros that begin or end within a sector. It must also write them if no hole is allowed.
        let not_fast = ErrorCode::NotSup.code();
        assert_eq!(client.request(NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_WRITE_ZEROES, 100, 1024), not_fast);
        let no_hole = NBD_CMD_FLAG_FAST_ZERO | NBD_CMD_FLAG_NO_HOLE;
        assert_eq!(client.request(no_hole, NBD_CMD_WRITE_ZEROES, 0, 1024), not_fast);
    }

    fn a_disconnect_waits_for_outstanding_replies_and_gets_none(session: SessionKind) {
        // "The server MUST handle all outstanding requests ... and close the TCP session ... There is no reply to an
        // NBD_CMD_DISC."
        let server = server_on(session);
        let mut client = client(&server, "disk");
        let mut bytes = Vec::new();
        for cookie in 0..50 {
            bytes.extend(request_bytes(0, NBD_CMD_WRITE, cookie, cookie * 512, 512));
            bytes.extend([3; 512]);
        }
        bytes.extend(request_bytes(0, NBD_CMD_DISC, 999, 0, 0));
        client.send(&bytes);
        let mut cookies: Vec<u64> = (0..50).map(|_| client.reply().cookie).collect();
        cookies.sort_unstable();
        assert!(cookies.into_iter().eq(0..50));
        assert!(client.is_closed());
        let mut other = self::client(&server, "disk");
        assert_eq!(other.read(0, 50 * 512), Ok(vec![3; 50 * 512]));
    }

    fn caching_has_no_effect_on_what_is_read(session: SessionKind) {
        // "there MUST NOT be any difference in semantics compared to if the client had not used this command"
        let server = server_on(session);
        let mut client = client(&server, "disk");
        assert_eq!(client.write(0, 5000, b"cached"), 0);
        assert_eq!(client.request(0, NBD_CMD_CACHE, 0, 1 << 20), 0);
        assert_eq!(client.read(5000, 6), Ok(b"cached".to_vec()));
    }

    harness::on_both_sessions! {
        a_reply_must_carry_its_requests_cookie,
        without_negotiation_every_reply_must_be_simple,
        many_requests_at_once_are_each_answered_once,
        writes_to_a_read_only_export_must_fail,
        requests_past_the_end_fail_with_enospc_or_einval,
        unknown_commands_and_flags_are_invalid,
        fua_must_be_accepted_with_every_command,
        the_offset_and_length_of_a_flush_must_be_zero,
        requests_of_length_zero_do_not_disconnect,
        payloads_are_served_up_to_32_mib,
        a_payload_of_gigabytes_is_disconnected,
        a_request_without_its_magic_is_disconnected,
        trims_and_write_zeroes_may_exceed_the_payload_limit,
        written_zeros_must_read_back_as_zeros,
        fast_zero_must_fail_quickly_if_it_is_not_fast,
        fast_zero_succeeds_if_it_is_fast,
        a_disconnect_waits_for_outstanding_replies_and_gets_none,
        caching_has_no_effect_on_what_is_read,
    }
}

mod durability {
    use super::*;

    type Log = Arc<Mutex<Vec<Operation>>>;

    /// Starts a server whose disk logs the operations that reach it. Writes and flushes fail where `fail` says so.
    fn server(
        session: SessionKind,
        fail: impl Fn(Operation) -> Option<io::ErrorKind> + Send + Sync + 'static,
    ) -> (TestServer, Log) {
        let log = Log::default();
        let noted = Arc::clone(&log);
        let store = FaultyStore::new(MemoryStore::zeroed(1 << 20), move |operation| {
            noted.lock().unwrap().push(operation);
            fail(operation)
        });
        (TestServer::of(session, encrypted(Arc::new(store), SectorSize::B512)), log)
    }

    fn flushed_after_last_write(log: &Log) -> bool {
        let log = log.lock().unwrap();
        let last = |wanted: fn(&Operation) -> bool| log.iter().rposition(wanted);
        last(|operation| *operation == Operation::Flush)
            > last(|operation| matches!(operation, Operation::Write(..) | Operation::Discard(..)))
    }

    fn a_flush_must_cover_writes_already_answered(session: SessionKind) {
        // "The server MUST NOT send a successful reply header for this request before all write requests for which a reply
        // has already been sent to the client have reached permanent storage"
        let (server, log) = server(session, |_| None);
        let mut client = server.client();
        assert_eq!(client.write(0, 0, &[1; 4096]), 0);
        assert!(!flushed_after_last_write(&log), "a write without FUA is not flushed");
        assert_eq!(client.flush(), 0);
        assert!(flushed_after_last_write(&log));
    }

    fn a_flush_must_cover_writes_of_other_connections(session: SessionKind) {
        // "the effects of NBD_CMD_FLUSH and NBD_CMD_FLAG_FUA MUST be visible across all connections"
        let (server, log) = server(session, |_| None);
        let (mut one, mut other) = (server.client(), server.client());
        assert_eq!(one.write(0, 0, &[1; 4096]), 0);
        assert_eq!(other.flush(), 0);
        assert!(flushed_after_last_write(&log));
        assert_eq!(other.read(0, 4096), Ok(vec![1; 4096]));
    }

    fn fua_must_be_answered_after_the_data_is_durable(session: SessionKind) {
        // "A server MUST NOT reply to a command that has NBD_CMD_FLAG_FUA set ... until the data (if any) written by that
        // command is persisted to non-volatile storage."
        let (server, log) = server(session, |_| None);
        let mut client = server.client();
        assert_eq!(client.write(NBD_CMD_FLAG_FUA, 100, &[1; 5000]), 0);
        assert!(flushed_after_last_write(&log));
        for command in [NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES] {
            assert_eq!(client.request(NBD_CMD_FLAG_FUA, command, 0, 4096), 0);
            assert!(flushed_after_last_write(&log));
        }
    }

    fn a_failed_flush_must_be_reported(session: SessionKind) {
        let (server, _) = server(session, |operation| (operation == Operation::Flush).then_some(io::ErrorKind::Other));
        let mut client = server.client();
        assert_eq!(client.flush(), ErrorCode::Io.code());
        assert_eq!(client.write(NBD_CMD_FLAG_FUA, 0, &[1; 512]), ErrorCode::Io.code());
        assert_eq!(client.write(0, 0, &[1; 512]), 0);
    }

    fn a_full_disk_is_reported_as_enospc(session: SessionKind) {
        // "It also SHOULD map the EDQUOT and EFBIG errors to NBD_ENOSPC."
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded, io::ErrorKind::FileTooLarge] {
            let (server, _) =
                server(session, move |operation| matches!(operation, Operation::Write(..)).then_some(kind));
            assert_eq!(server.client().write(0, 0, &[1; 512]), ErrorCode::NoSpc.code(), "{kind}");
        }
    }

    harness::on_both_sessions! {
        a_flush_must_cover_writes_already_answered,
        a_flush_must_cover_writes_of_other_connections,
        fua_must_be_answered_after_the_data_is_durable,
        a_failed_flush_must_be_reported,
        a_full_disk_is_reported_as_enospc,
    }
}
