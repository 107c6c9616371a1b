//! Structured replies, metadata contexts and extended headers of the NBD protocol, tested on raw bytes with both kinds of
//! session. Quotations are from <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.

use std::io;
use std::sync::Arc;

use engine::sector::SectorSize;
use engine::store::{Access, Caching, FaultyStore, FileStore, MemoryStore, Operation};
use engine::volume::Volume;
use harness::nbd::{TestServer, be16, be32, encrypted, query, request_bytes};
use harness::nbd_chunks::{ChunkClient, contexts, extended_request_bytes, negotiated};
use nbd_server::proto::wire::*;
use nbd_server::proto::{ErrorCode, Headers, MAX_EXTENTS, MAX_PAYLOAD};
use nbd_server::{Export, SessionKind};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
/// More bytes than a 32-bit number can express.
const HUGE: u64 = 6 << 30;
const CHUNKS: [Headers; 2] = [Headers::Structured, Headers::Extended];
const HOLE: u64 = NBD_STATE_HOLE as u64;
const HOLE_OF_ZEROES: u64 = (NBD_STATE_HOLE | NBD_STATE_ZERO) as u64;

/// Makes a disk that is one large hole. It uses direct I/O if the filesystem allows it.
fn sparse(len: u64) -> Arc<FileStore> {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(len).unwrap();
    // The file's name may be removed: the store keeps the file open.
    Arc::new(FileStore::open(file.path(), Access::ReadWrite, Caching::Direct).unwrap())
}

fn plaintext(len: u64) -> Arc<Volume> {
    Arc::new(Volume::plaintext(sparse(len), SectorSize::B4096).unwrap())
}

/// Starts a server with one encrypted and one plaintext export. The second and the fifth mebibyte hold data, the rest is
/// holes.
fn server(session: SessionKind) -> TestServer {
    let cipher = Arc::new(encrypted(sparse(SIZE), SectorSize::B4096));
    let plain = plaintext(SIZE);
    for volume in [&cipher, &plain] {
        for place in [MIB, 4 * MIB] {
            volume.write(place, &mut vec![0x5a; 1 << 20]).unwrap();
        }
        volume.flush().unwrap();
    }
    TestServer::on(session, [Export::new("cipher", cipher), Export::new("plain", plain)])
}

fn einval(client: &mut ChunkClient, flags: u16, kind: u16, offset: u64, len: u64) {
    let error = client.ask(flags, kind, offset, len).error();
    assert_eq!(error.code, ErrorCode::Inval.code(), "command {kind} flags {flags:#x} at {offset}: {error:?}");
}

mod structured {
    use super::*;

    fn a_read_is_answered_with_one_final_data_chunk(session: SessionKind) {
        // "NBD_REPLY_TYPE_OFFSET_DATA (1) ... 64 bits: offset (unsigned) / length - 8 bytes: data"
        let server = server(session);
        for headers in CHUNKS {
            let mut client = ChunkClient::enter(&server, "cipher", headers);
            for (offset, len) in [(0, 4096), (12_345, 70_001), (MIB, MIB), (SIZE - 1, 1), (3, 2 * MIB)] {
                let data: Vec<u8> = (0..len).map(|n| ((n * 7 + offset) % 251).to_le_bytes()[0]).collect();
                assert!(client.write(0, offset, &data).is_done());
                // "NBD_CMD_FLAG_DF ... the server MUST send at most one content chunk in reply"
                for flags in [0, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_DF | NBD_CMD_FLAG_FUA] {
                    assert!(client.read(flags, offset, len) == data, "{headers:?} {offset} {len}");
                }
            }
        }
    }

    fn a_read_of_nothing_has_no_content(session: SessionKind) {
        let server = server(session);
        for headers in CHUNKS {
            let mut client = ChunkClient::enter(&server, "cipher", headers);
            for offset in [0, 77, SIZE] {
                let chunk = client.ask(0, NBD_CMD_READ, offset, 0);
                assert!(chunk.is_done() && !chunk.simple);
            }
        }
    }

    fn replies_without_data_are_simple_or_a_none_chunk(session: SessionKind) {
        // "If structured replies have been negotiated, a simple reply MAY be used as a reply to any request other than
        // NBD_CMD_READ, but only if the reply has no data payload". With extended headers it may never be used.
        // "NBD_REPLY_TYPE_NONE (0): length MUST be 0 ... This chunk type MUST always be used with the NBD_REPLY_FLAG_DONE"
        let server = server(session);
        for headers in CHUNKS {
            let mut client = ChunkClient::enter(&server, "plain", headers);
            assert!(client.write(NBD_CMD_FLAG_FUA, 5000, b"unaligned").is_done());
            let flushed = client.ask(0, NBD_CMD_FLUSH, 0, 0);
            assert!(flushed.is_done() && flushed.simple == (headers == Headers::Structured));
            assert!(client.ask(0, NBD_CMD_TRIM, 64 << 10, 128 << 10).is_done());
            assert!(client.ask(0, NBD_CMD_WRITE_ZEROES, 3 * MIB, MIB).is_done());
            assert!(client.ask(0, NBD_CMD_CACHE, 0, SIZE).is_done());
            assert_eq!(client.read(0, 5000, 9), b"unaligned");
        }
    }

    fn the_df_flag_is_offered_only_with_chunks(session: SessionKind) {
        // "MUST leave this flag clear if neither structured replies nor extended headers have been negotiated"
        let server = server(session);
        for (headers, expected) in
            [(Headers::Simple, 0), (Headers::Structured, NBD_FLAG_SEND_DF), (Headers::Extended, NBD_FLAG_SEND_DF)]
        {
            let replies = negotiated(&server, headers).option(NBD_OPT_GO, &query("cipher", &[]));
            assert_eq!(be16(&replies[0].data), NBD_INFO_EXPORT);
            assert_eq!(be16(&replies[0].data[10..]) & NBD_FLAG_SEND_DF, expected, "{headers:?}");
        }
        for headers in CHUNKS {
            // "This flag is only valid for NBD_CMD_READ."
            let mut client = ChunkClient::enter(&server, "cipher", headers);
            for kind in [NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS] {
                einval(&mut client, NBD_CMD_FLAG_DF, kind, 0, 4096);
            }
            assert_eq!(client.write(NBD_CMD_FLAG_DF, 0, &[1; 512]).error().code, ErrorCode::Inval.code());
            assert_eq!(client.read(0, 0, 1).len(), 1, "the payload was skipped");
        }
        let mut simple = server.connect();
        simple.enter("cipher");
        assert_eq!(simple.request(NBD_CMD_FLAG_DF, NBD_CMD_READ, 0, 512), ErrorCode::Inval.code());
    }

    fn an_error_past_the_end_names_the_ends_offset(session: SessionKind) {
        // "NBD_REPLY_TYPE_ERROR_OFFSET ... the offset MUST lie within the request's range"
        let server = server(session);
        for headers in CHUNKS {
            let mut client = ChunkClient::enter(&server, "cipher", headers);
            for (offset, len, at) in
                [(SIZE - 10, 20, Some(SIZE)), (SIZE, 1, Some(SIZE)), (2 * SIZE, 9, Some(2 * SIZE)), (u64::MAX, 9, None)]
            {
                for kind in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_BLOCK_STATUS] {
                    let error = client.ask(0, kind, offset, len).error();
                    assert_eq!((error.code, error.at), (ErrorCode::Inval.code(), at), "{kind} {offset}");
                }
                let error = client.ask(0, NBD_CMD_WRITE_ZEROES, offset, len).error();
                assert_eq!((error.code, error.at), (ErrorCode::NoSpc.code(), at));
                let error = client.write(0, offset, &vec![7; usize::try_from(len).unwrap()]).error();
                assert_eq!((error.code, error.at), (ErrorCode::NoSpc.code(), at));
            }
            assert_eq!(client.read(0, SIZE - 1, 1).len(), 1);
        }
    }

    fn a_read_above_the_payload_limit_fails_with_eoverflow(session: SessionKind) {
        // "the server is also permitted to reject large read requests up front with NBD_EOVERFLOW"
        let volume = encrypted(Arc::new(MemoryStore::zeroed(MAX_PAYLOAD as usize + 4096)), SectorSize::B512);
        let server = TestServer::on(session, [Export::new("", Arc::new(volume))]);
        for headers in CHUNKS {
            let mut client = ChunkClient::enter(&server, "", headers);
            for flags in [0, NBD_CMD_FLAG_DF] {
                let error = client.ask(flags, NBD_CMD_READ, 0, u64::from(MAX_PAYLOAD) + 1).error();
                assert_eq!(error.code, ErrorCode::Overflow.code(), "{headers:?}");
            }
            assert_eq!(client.read(NBD_CMD_FLAG_DF, 4096, MAX_PAYLOAD.into()).len(), MAX_PAYLOAD as usize);
        }
    }

    fn after_a_disk_error_the_next_read_is_served(session: SessionKind) {
        let store = FaultyStore::new(MemoryStore::zeroed(1 << 20), |operation| {
            matches!(operation, Operation::Read(at, len) if at + len > 512 << 10).then_some(io::ErrorKind::Other)
        });
        let volume = encrypted(Arc::new(store), SectorSize::B512);
        let server = TestServer::on(session, [Export::new("", Arc::new(volume))]);
        for headers in CHUNKS {
            let mut client = ChunkClient::enter(&server, "", headers);
            let error = client.ask(0, NBD_CMD_READ, 600 << 10, 4096).error();
            assert_eq!((error.code, error.at), (ErrorCode::Io.code(), None));
            assert_eq!(client.read(0, 0, 4096).len(), 4096);
        }
    }

    fn many_reads_at_once_are_each_answered_once(session: SessionKind) {
        let server = server(session);
        for headers in CHUNKS {
            let mut client = ChunkClient::enter(&server, "cipher", headers);
            for block in 0..64u8 {
                assert!(client.write(0, u64::from(block) * 4096, &[block; 4096]).is_done());
            }
            let mut waiting: Vec<(u64, u8)> = (0..64)
                .map(|block| (client.send_request(0, NBD_CMD_READ, u64::from(block) * 4096, 4096), block))
                .collect();
            while !waiting.is_empty() {
                let chunk = client.chunk();
                assert_eq!((chunk.flags, chunk.kind), (NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA));
                let place = waiting
                    .iter()
                    .position(|(cookie, _)| *cookie == chunk.cookie)
                    .expect("a reply to a request that is still unanswered");
                let (_, block) = waiting.swap_remove(place);
                assert!(chunk.payload[8..] == [block; 4096]);
            }
        }
    }

    harness::on_both_sessions! {
        a_read_is_answered_with_one_final_data_chunk,
        a_read_of_nothing_has_no_content,
        replies_without_data_are_simple_or_a_none_chunk,
        the_df_flag_is_offered_only_with_chunks,
        an_error_past_the_end_names_the_ends_offset,
        a_read_above_the_payload_limit_fails_with_eoverflow,
        after_a_disk_error_the_next_read_is_served,
        many_reads_at_once_are_each_answered_once,
    }
}

mod block_status {
    use super::*;

    fn only_plaintext_holes_are_reported_as_zeros(session: SessionKind) {
        // "NBD_STATE_HOLE (bit 0): if set, the block represents a hole ... NBD_STATE_ZERO (bit 1): if set, the block
        // contents read as all zeroes"
        let server = server(session);
        for headers in CHUNKS {
            for (export, hole) in [("cipher", HOLE), ("plain", HOLE_OF_ZEROES)] {
                let mut client = ChunkClient::enter(&server, export, headers);
                let expected = [(MIB, hole), (MIB, 0), (2 * MIB, hole), (MIB, 0), (3 * MIB, hole)];
                assert_eq!(client.status(0, 0, SIZE), expected, "{export} {headers:?}");
                // The content matches the status.
                let zeroes = client.read(0, 0, 4096) == [0; 4096];
                assert_eq!(zeroes, hole == HOLE_OF_ZEROES, "{export}");
                // "the server ... MUST NOT [describe] beyond the requested range" for all extents but the last; here there
                // is only the last.
                assert_eq!(client.status(0, MIB + 100, 50), [(50, 0)]);
                assert_eq!(client.status(0, MIB - 100, 200), [(100, hole), (100, 0)]);
                assert_eq!(client.status(0, SIZE - 1, 1), [(1, hole)]);
            }
        }
    }

    fn req_one_returns_one_extent_within_the_request(session: SessionKind) {
        // "the server MUST return at most one extent per metadata context ... MUST NOT exceed the requested length"
        let server = server(session);
        for headers in CHUNKS {
            let mut client = ChunkClient::enter(&server, "plain", headers);
            let one = NBD_CMD_FLAG_REQ_ONE;
            assert_eq!(client.status(one, MIB / 2, 2 * MIB), [(MIB / 2, HOLE_OF_ZEROES)]);
            assert_eq!(client.status(one, MIB, SIZE - MIB), [(MIB, 0)]);
            assert_eq!(client.status(one, 0, 4096), [(4096, HOLE_OF_ZEROES)]);
            for kind in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_CACHE] {
                einval(&mut client, one, kind, 0, 512);
            }
        }
    }

    fn trim_and_in_plaintext_write_zeroes_make_holes(session: SessionKind) {
        let server = server(session);
        for headers in CHUNKS {
            for (export, hole) in [("cipher", HOLE), ("plain", HOLE_OF_ZEROES)] {
                let mut client = ChunkClient::enter(&server, export, headers);
                assert!(client.write(0, MIB, &vec![1; 1 << 20]).is_done());
                // Blocks that are only partly trimmed keep all their data.
                assert!(client.ask(NBD_CMD_FLAG_FUA, NBD_CMD_TRIM, MIB + 4000, 128 << 10).is_done());
                let told = client.status(0, MIB, MIB);
                assert_eq!(told, [(4096, 0), (31 * 4096, hole), (MIB - 32 * 4096, 0)], "{export}");
                assert_eq!(client.read(0, MIB, 4096), [1; 4096]);
                assert!(client.write(0, MIB, &vec![2; 1 << 20]).is_done());
                assert_eq!(client.status(0, MIB, MIB), [(MIB, 0)]);
                assert!(client.ask(0, NBD_CMD_WRITE_ZEROES, MIB, MIB).is_done());
                let expected = if export == "plain" { HOLE_OF_ZEROES } else { 0 };
                assert_eq!(client.status(0, MIB, MIB), [(MIB, expected)], "{export}");
                assert!(client.read(0, MIB, MIB).iter().all(|byte| *byte == 0));
                // "NBD_CMD_FLAG_NO_HOLE ... the server MUST NOT ... create a hole"
                assert!(client.ask(NBD_CMD_FLAG_NO_HOLE, NBD_CMD_WRITE_ZEROES, MIB, MIB).is_done());
                assert_eq!(client.status(0, MIB, MIB), [(MIB, 0)], "{export}");
            }
        }
    }

    fn a_block_status_reply_has_a_bounded_number_of_extents(session: SessionKind) {
        let blocks = 3 * MAX_EXTENTS as u64;
        let volume = plaintext(blocks * 4096);
        for block in (0..blocks).step_by(2) {
            volume.write(block * 4096, &mut [1; 4096]).unwrap();
        }
        let server = TestServer::on(session, [Export::new("", volume)]);
        for headers in CHUNKS {
            let mut client = ChunkClient::enter(&server, "", headers);
            let (mut at, mut answers) = (0, Vec::new());
            while at < blocks * 4096 {
                let extents = client.status(0, at, blocks * 4096 - at);
                for (len, status) in &extents {
                    assert_eq!((*len, *status == 0), (4096, at / 4096 % 2 == 0), "at {at}");
                    at += len;
                }
                answers.push(extents.len());
            }
            assert_eq!(answers, [MAX_EXTENTS; 3]);
        }
    }

    fn block_status_needs_a_context_and_a_length(session: SessionKind) {
        // "If the client did not negotiate a metadata context ... the server SHOULD fail with NBD_EINVAL"
        let server = server(session);
        let mut simple = server.connect();
        simple.enter("plain");
        assert_eq!(simple.request(0, NBD_CMD_BLOCK_STATUS, 0, 4096), ErrorCode::Inval.code());
        for headers in CHUNKS {
            let mut client = ChunkClient::go(negotiated(&server, headers), "plain", headers);
            einval(&mut client, 0, NBD_CMD_BLOCK_STATUS, 0, 4096);
            assert_eq!(client.read(0, MIB, 3), [0x5a; 3]);
            let mut client = ChunkClient::enter(&server, "plain", headers);
            einval(&mut client, 0, NBD_CMD_BLOCK_STATUS, 0, 0);
            einval(&mut client, 0, NBD_CMD_BLOCK_STATUS, SIZE, 0);
            einval(&mut client, 0, NBD_CMD_BLOCK_STATUS, SIZE - 1, 2);
        }
    }

    fn an_export_without_discards_never_makes_a_hole(session: SessionKind) {
        let server = TestServer::on(session, [Export::new("", plaintext(SIZE)).without_discard()]);
        let replies = negotiated(&server, Headers::Structured).option(NBD_OPT_GO, &query("", &[]));
        let flags = be16(&replies[0].data[10..]);
        assert_eq!(flags & NBD_FLAG_SEND_TRIM, 0);
        assert_ne!(flags & NBD_FLAG_SEND_WRITE_ZEROES, 0);
        for headers in CHUNKS {
            let mut client = ChunkClient::enter(&server, "", headers);
            assert!(client.write(0, 0, &vec![3; 1 << 20]).is_done());
            einval(&mut client, 0, NBD_CMD_TRIM, 0, 4096);
            assert!(client.ask(0, NBD_CMD_WRITE_ZEROES, 4096, 64 << 10).is_done());
            assert_eq!(client.status(0, 0, MIB), [(MIB, 0)], "zeros are written");
            assert_eq!(client.read(0, 4095, (64 << 10) + 1)[1..], vec![0; 64 << 10]);
            let fast = client.ask(NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_WRITE_ZEROES, 0, 4096).error();
            assert_eq!(fast.code, ErrorCode::NotSup.code());
            assert_eq!(client.read(0, 0, 4096), [3; 4096]);
        }
    }

    fn cache_requests_change_nothing_and_check_their_range(session: SessionKind) {
        for caching in [Caching::Direct, Caching::PageCache] {
            let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            file.as_file().set_len(SIZE).unwrap();
            let store = FileStore::open(file.path(), Access::ReadWrite, caching).unwrap();
            let volume = Arc::new(encrypted(Arc::new(store), SectorSize::B4096));
            let server = TestServer::on(session, [Export::new("", volume).read_only()]);
            for headers in CHUNKS {
                let mut client = ChunkClient::enter(&server, "", headers);
                let before = client.read(0, 0, SIZE);
                for (offset, len) in [(0, SIZE), (1, 1), (SIZE, 0), (12_345, MIB)] {
                    assert!(client.ask(0, NBD_CMD_CACHE, offset, len).is_done());
                }
                assert!(client.read(0, 0, SIZE) == before);
                einval(&mut client, 0, NBD_CMD_CACHE, 1, SIZE);
                einval(&mut client, 0, NBD_CMD_CACHE, u64::MAX, 2);
                assert_eq!(client.status(0, 0, SIZE), [(SIZE, HOLE)], "read-ahead allocates nothing");
            }
        }
    }

    harness::on_both_sessions! {
        only_plaintext_holes_are_reported_as_zeros,
        req_one_returns_one_extent_within_the_request,
        trim_and_in_plaintext_write_zeroes_make_holes,
        a_block_status_reply_has_a_bounded_number_of_extents,
        block_status_needs_a_context_and_a_length,
        an_export_without_discards_never_makes_a_hole,
        cache_requests_change_nothing_and_check_their_range,
    }
}

mod extended {
    use super::*;

    fn huge(session: SessionKind) -> TestServer {
        let plain = Export::new("plain", plaintext(HUGE));
        let cipher = Export::new("cipher", Arc::new(encrypted(sparse(HUGE), SectorSize::B4096)));
        TestServer::on(session, [plain, cipher])
    }

    fn extents_longer_than_4_gib_are_reported_as_one(session: SessionKind) {
        // "NBD_REPLY_TYPE_BLOCK_STATUS_EXT (6) ... 64 bits, length of the extent"
        let server = huge(session);
        for (export, hole) in [("plain", HOLE_OF_ZEROES), ("cipher", HOLE)] {
            let mut client = ChunkClient::enter(&server, export, Headers::Extended);
            assert_eq!(client.status(0, 0, HUGE), [(HUGE, hole)]);
            assert!(client.write(0, 5 << 30, &[1; 4096]).is_done());
            assert_eq!(client.status(0, 0, HUGE), [(5 << 30, hole), (4096, 0), ((1 << 30) - 4096, hole)]);
            assert_eq!(client.status(NBD_CMD_FLAG_REQ_ONE, 1, HUGE - 1), [((5 << 30) - 1, hole)]);
        }
    }

    fn a_trim_longer_than_4_gib_frees_all_blocks(session: SessionKind) {
        let server = huge(session);
        for (export, hole) in [("plain", HOLE_OF_ZEROES), ("cipher", HOLE)] {
            let mut client = ChunkClient::enter(&server, export, Headers::Extended);
            for place in [0, 1 << 30, (4 << 30) + 8192, HUGE - 4096] {
                assert!(client.write(0, place, &[9; 4096]).is_done());
            }
            assert!(client.ask(NBD_CMD_FLAG_FUA, NBD_CMD_TRIM, 4096, HUGE - 8192).is_done());
            assert_eq!(client.status(0, 0, HUGE), [(4096, 0), (HUGE - 8192, hole), (4096, 0)], "{export}");
            assert_eq!((client.read(0, 0, 4096), client.read(0, HUGE - 4096, 4096)), (vec![9; 4096], vec![9; 4096]));
        }
    }

    fn more_than_4_gib_can_be_zeroed(session: SessionKind) {
        let server = huge(session);
        let mut client = ChunkClient::enter(&server, "plain", Headers::Extended);
        for flags in [0, NBD_CMD_FLAG_FAST_ZERO] {
            for place in [0, (1 << 32) - 4096, 1 << 32, HUGE - 4096] {
                assert!(client.write(0, place, &[9; 4096]).is_done());
            }
            assert!(client.ask(flags, NBD_CMD_WRITE_ZEROES, 0, HUGE).is_done());
            for place in [0, (1 << 32) - 4096, 1 << 32, HUGE - 4096] {
                assert_eq!(client.read(0, place, 4096), [0; 4096], "at {place}");
            }
            assert_eq!(client.status(0, 0, HUGE), [(HUGE, HOLE_OF_ZEROES)]);
        }
        assert!(client.ask(0, NBD_CMD_CACHE, 0, HUGE).is_done());
    }

    fn structured_replies_serve_ranges_up_to_32_bits_long(session: SessionKind) {
        let server = huge(session);
        let mut client = ChunkClient::enter(&server, "plain", Headers::Structured);
        let most = u64::from(u32::MAX);
        assert_eq!(client.status(0, 0, most), [(most, HOLE_OF_ZEROES)]);
        assert!(client.write(0, 5 << 30, &[1; 4096]).is_done());
        assert_eq!(
            client.status(0, 2 << 30, most),
            [(3 << 30, HOLE_OF_ZEROES), (4096, 0), ((1 << 30) - 4097, HOLE_OF_ZEROES)]
        );
        assert!(client.ask(0, NBD_CMD_TRIM, 2 << 30, most).is_done());
    }

    fn each_command_is_served_with_extended_headers(session: SessionKind) {
        let server = server(session);
        let mut client = ChunkClient::enter(&server, "cipher", Headers::Extended);
        let data: Vec<u8> = (0..300_000u32).map(|n| (n % 253).to_le_bytes()[0]).collect();
        for len in [1, 512, 4096, 65_536, 65_537, 300_000] {
            // "MUST set the flag". A client that does not set it, such as qemu 10, is served too.
            for flags in [NBD_CMD_FLAG_PAYLOAD_LEN, 0, NBD_CMD_FLAG_PAYLOAD_LEN | NBD_CMD_FLAG_FUA] {
                assert!(client.ask_with(flags, NBD_CMD_WRITE, 777, &data[..len]).is_done());
                assert!(client.read(0, 777, len as u64) == data[..len], "{len}");
            }
        }
        assert!(client.ask(0, NBD_CMD_FLUSH, 0, 0).is_done());
        client.send_request(0, NBD_CMD_DISC, 0, 0);
        assert!(client.raw.is_closed());
    }

    fn a_payload_for_another_command_is_skipped_and_refused(session: SessionKind) {
        // "the server MUST ... consume[] the payload" of a command that takes none, "and fail with NBD_EINVAL"
        let server = server(session);
        let mut client = ChunkClient::enter(&server, "cipher", Headers::Extended);
        let flag = NBD_CMD_FLAG_PAYLOAD_LEN;
        for kind in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS, 8, 999] {
            for len in [1, 12, 4096, 3 << 20] {
                let error = client.ask_with(flag, kind, 0, &vec![0xee; len]).error();
                assert_eq!(error.code, ErrorCode::Inval.code(), "command {kind} with {len} bytes");
            }
        }
        assert_eq!(client.ask_with(flag, NBD_CMD_FLUSH, 0, &[1; 8]).error().code, ErrorCode::Inval.code());
        assert!(client.write(0, 0, b"in sync").is_done());
        assert_eq!(client.read(0, 0, 7), b"in sync");
    }

    fn all_64_bits_of_a_length_are_checked(session: SessionKind) {
        let server = server(session);
        let mut client = ChunkClient::enter(&server, "plain", Headers::Extended);
        // If only 32 bits of these lengths counted, each range would be within the export.
        for len in [1 << 32, (1 << 32) + 512, u64::MAX, u64::MAX - 511, 1 << 63] {
            for kind in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_BLOCK_STATUS] {
                einval(&mut client, 0, kind, 512, len);
            }
            let error = client.ask(0, NBD_CMD_WRITE_ZEROES, 512, len).error();
            assert_eq!(error.code, ErrorCode::NoSpc.code());
        }
        assert_eq!(client.read(0, MIB, 512), [0x5a; 512], "the invalid requests changed nothing");
        for len in [1, 1 << 32] {
            einval(&mut client, 0, NBD_CMD_FLUSH, 0, len);
        }
    }

    fn a_payload_above_the_advertised_limit_is_disconnected(session: SessionKind) {
        // "A server SHOULD initiate hard disconnect if a client sets the NBD_CMD_FLAG_PAYLOAD_LEN flag and uses a length
        // larger than a server's advertised or default maximum payload length"
        let server = server(session);
        for len in [u64::from(MAX_PAYLOAD) + 1, 1 << 32, u64::MAX] {
            for kind in [NBD_CMD_WRITE, NBD_CMD_READ, 99] {
                let mut client = ChunkClient::enter(&server, "cipher", Headers::Extended);
                client.send_request(NBD_CMD_FLAG_PAYLOAD_LEN, kind, 0, len);
                assert!(client.raw.is_closed(), "command {kind} with {len}");
            }
        }
    }

    fn a_header_of_the_wrong_kind_is_disconnected(session: SessionKind) {
        let server = server(session);
        let mut client = ChunkClient::enter(&server, "cipher", Headers::Extended);
        client.raw.send(&[request_bytes(0, NBD_CMD_READ, 1, 0, 512), vec![0; 4]].concat());
        assert!(client.raw.is_closed(), "a compact request after extended headers");
        let mut client = ChunkClient::enter(&server, "cipher", Headers::Structured);
        client.raw.send(&extended_request_bytes(0, NBD_CMD_READ, 1, 0, 512));
        assert!(client.raw.is_closed(), "an extended request without extended headers");
    }

    harness::on_both_sessions! {
        extents_longer_than_4_gib_are_reported_as_one,
        a_trim_longer_than_4_gib_frees_all_blocks,
        more_than_4_gib_can_be_zeroed,
        structured_replies_serve_ranges_up_to_32_bits_long,
        each_command_is_served_with_extended_headers,
        a_payload_for_another_command_is_skipped_and_refused,
        all_64_bits_of_a_length_are_checked,
        a_payload_above_the_advertised_limit_is_disconnected,
        a_header_of_the_wrong_kind_is_disconnected,
    }
}

mod negotiation {
    use super::*;

    /// Sends the option and returns the types of the replies, and the numbers and names of the contexts.
    fn asked(server: &TestServer, headers: Headers, option: u32, data: &[u8]) -> (Vec<u32>, Vec<(u32, String)>) {
        let replies = negotiated(server, headers).option(option, data);
        let contexts = replies.iter().filter(|reply| reply.kind == NBD_REP_META_CONTEXT);
        let contexts = contexts.map(|reply| (be32(&reply.data), String::from_utf8(reply.data[4..].to_vec()).unwrap()));
        (replies.iter().map(|reply| reply.kind).collect(), contexts.collect())
    }

    fn contexts_are_listed_and_chosen_by_name(session: SessionKind) {
        let server = server(session);
        for headers in CHUNKS {
            // "In the absence of any query string, the server SHOULD return all contexts"; "base:" asks for all of its
            // namespace.
            for queries in [&[][..], &["base:"], &["base:allocation"], &["qemu:dirty-bitmap:b", "base:allocation"]] {
                let listed = asked(&server, headers, NBD_OPT_LIST_META_CONTEXT, &contexts("plain", queries));
                // "The metadata context ID in these replies is reserved and SHOULD be set to zero"
                let expected = (vec![NBD_REP_META_CONTEXT, NBD_REP_ACK], vec![(0, "base:allocation".to_owned())]);
                assert_eq!(listed, expected, "{queries:?}");
            }
            for queries in [&["base:allocations"][..], &["base:alloc"], &["Base:allocation"], &["x-corp:thing"]] {
                for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
                    let listed = asked(&server, headers, option, &contexts("plain", queries));
                    assert_eq!(listed, (vec![NBD_REP_ACK], vec![]), "{queries:?}");
                }
            }
            // An empty query list and a query for a namespace choose nothing.
            for queries in [&[][..], &["base:"]] {
                let set = asked(&server, headers, NBD_OPT_SET_META_CONTEXT, &contexts("plain", queries));
                assert_eq!(set, (vec![NBD_REP_ACK], vec![]), "{queries:?}");
            }
        }
    }

    fn a_bad_context_query_fails_and_clears_the_choice(session: SessionKind) {
        // "the selection ... replaces all previously-set metadata contexts (including when this command fails)"
        let server = server(session);
        let good = contexts("plain", &[BASE_ALLOCATION]);
        let too_long = format!("base:{}", "x".repeat(4092));
        let mut mistakes = vec![
            (contexts("nowhere", &[BASE_ALLOCATION]), NBD_REP_ERR_UNKNOWN),
            (contexts("plain", &["allocation"]), NBD_REP_ERR_INVALID),
            (contexts("plain", &[""]), NBD_REP_ERR_INVALID),
            (contexts("pl\0ain", &[BASE_ALLOCATION]), NBD_REP_ERR_INVALID),
            (contexts("plain", &[&too_long]), NBD_REP_ERR_TOO_BIG),
            (contexts(&"n".repeat(4097), &[]), NBD_REP_ERR_TOO_BIG),
            (contexts("plain", &["base:x"; 2000]), NBD_REP_ERR_TOO_BIG),
            ([good.clone(), vec![0]].concat(), NBD_REP_ERR_INVALID),
        ];
        // Also queries that are cut off at any byte, and a count that is higher than the number of queries.
        mistakes.extend((0..good.len()).map(|len| (good[..len].to_vec(), NBD_REP_ERR_INVALID)));
        let mut many = good.clone();
        many[9..13].copy_from_slice(&u32::MAX.to_be_bytes());
        mistakes.push((many, NBD_REP_ERR_INVALID));
        for headers in CHUNKS {
            for (data, expected) in &mistakes {
                let mut raw = negotiated(&server, headers);
                assert_eq!(raw.option(NBD_OPT_LIST_META_CONTEXT, data)[0].kind, *expected, "{:?}", data.get(..40));
                assert_eq!(raw.option(NBD_OPT_SET_META_CONTEXT, &good).len(), 2);
                assert_eq!(raw.option(NBD_OPT_SET_META_CONTEXT, data)[0].kind, *expected, "{:?}", data.get(..40));
                let mut client = ChunkClient::go(raw, "plain", headers);
                einval(&mut client, 0, NBD_CMD_BLOCK_STATUS, 0, 4096);
            }
        }
    }

    fn the_last_context_choice_counts_only_for_its_export(session: SessionKind) {
        let server = server(session);
        for headers in CHUNKS {
            for (last, counts) in [
                (contexts("plain", &[BASE_ALLOCATION]), true),
                (contexts("plain", &[BASE_ALLOCATION, "base:", "base:allocation"]), true),
                (contexts("plain", &["base:"]), false),
                (contexts("plain", &[]), false),
                // "MUST be for the same export" as the one that the client enters after that.
                (contexts("cipher", &[BASE_ALLOCATION]), false),
            ] {
                let mut raw = negotiated(&server, headers);
                raw.option(NBD_OPT_SET_META_CONTEXT, &contexts("plain", &[BASE_ALLOCATION]));
                raw.option(NBD_OPT_SET_META_CONTEXT, &last);
                // Listing contexts does not change the choice.
                raw.option(NBD_OPT_LIST_META_CONTEXT, &contexts("plain", &[]));
                let mut client = ChunkClient::go(raw, "plain", headers);
                if counts {
                    assert_eq!(client.status(0, 0, 4096), [(4096, HOLE_OF_ZEROES)]);
                } else {
                    einval(&mut client, 0, NBD_CMD_BLOCK_STATUS, 0, 4096);
                }
            }
        }
    }

    fn contexts_need_chunks_negotiated_first(session: SessionKind) {
        // "The client MUST have negotiated structured replies ... the server MUST reply with NBD_REP_ERR_INVALID"
        let server = server(session);
        for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
            let asked = asked(&server, Headers::Simple, option, &contexts("plain", &[BASE_ALLOCATION]));
            assert_eq!(asked.0, [NBD_REP_ERR_INVALID]);
        }
    }

    fn structured_replies_after_extended_headers_are_refused(session: SessionKind) {
        // "If ... extended headers [were] negotiated, the server SHOULD reply NBD_REP_ERR_EXT_HEADER_REQD"
        let server = server(session);
        let mut raw = negotiated(&server, Headers::Extended);
        assert_eq!(raw.option(NBD_OPT_STRUCTURED_REPLY, &[])[0].kind, NBD_REP_ERR_EXT_HEADER_REQD);
        // The extended headers are still in force.
        let mut client = ChunkClient::go(raw, "plain", Headers::Extended);
        assert_eq!(client.read(0, MIB, 4), [0x5a; 4]);
        // Extended headers may follow structured replies.
        let mut raw = negotiated(&server, Headers::Structured);
        assert_eq!(raw.option(NBD_OPT_EXTENDED_HEADERS, &[])[0].kind, NBD_REP_ACK);
        let mut client = ChunkClient::go(raw, "plain", Headers::Extended);
        assert_eq!(client.read(0, MIB, 4), [0x5a; 4]);
    }

    fn options_with_unexpected_data_negotiate_nothing(session: SessionKind) {
        let server = server(session);
        for option in [NBD_OPT_STRUCTURED_REPLY, NBD_OPT_EXTENDED_HEADERS] {
            for len in [1, 100_000] {
                let mut raw = negotiated(&server, Headers::Simple);
                assert_eq!(raw.option(option, &vec![0; len])[0].kind, NBD_REP_ERR_INVALID);
                raw.option(NBD_OPT_GO, &query("plain", &[]));
                assert_eq!(raw.read(MIB, 2), Ok(vec![0x5a; 2]), "replies are simple");
            }
        }
    }

    fn export_name_after_extended_headers_is_disconnected(session: SessionKind) {
        let server = server(session);
        let mut raw = negotiated(&server, Headers::Extended);
        raw.send_option(NBD_OPT_EXPORT_NAME, b"plain");
        assert!(raw.is_closed());
        let mut raw = negotiated(&server, Headers::Structured);
        raw.send_option(NBD_OPT_EXPORT_NAME, b"plain");
        assert_ne!(be16(&raw.receive(10)[8..]) & NBD_FLAG_SEND_DF, 0);
    }

    harness::on_both_sessions! {
        contexts_are_listed_and_chosen_by_name,
        a_bad_context_query_fails_and_clears_the_choice,
        the_last_context_choice_counts_only_for_its_export,
        contexts_need_chunks_negotiated_first,
        structured_replies_after_extended_headers_are_refused,
        options_with_unexpected_data_negotiate_nothing,
        export_name_after_extended_headers_is_disconnected,
    }
}
