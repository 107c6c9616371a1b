//! The handshake, on any stream that tokio can read and write.

use std::io;

use ::tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::export::{Export, Exports};
use crate::proto::handshake::{ExpectTls, Next, TlsPolicy};
use crate::proto::{Handshake, Negotiated};
use crate::session::SessionError;
use crate::shutdown::Shutdown;

/// How a handshake ended on one stream.
pub(crate) enum HandshakeEnd {
    /// The client chose this export.
    Chosen(Export, Negotiated),
    /// The client left, or the server is shutting down.
    Left,
    /// The client asked for TLS. TLS begins with the next byte of the stream; nothing of it was read ahead.
    StartTls(ExpectTls),
}

/// Greets a client and takes it through the handshake.
///
/// # Errors
/// [`SessionError`] if the handshake failed. The connection can then no longer be used.
pub(crate) async fn greet<S>(
    stream: &mut S,
    tls: TlsPolicy,
    exports: &Exports,
    shutdown: &mut Shutdown,
) -> Result<HandshakeEnd, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut out = Vec::new();
    let handshake = Handshake::greeting(tls, &mut out);
    send(stream, &mut out).await?;
    negotiate(stream, handshake, exports, shutdown).await
}

/// Takes a client through the rest of a handshake.
///
/// # Errors
/// [`SessionError`] if the handshake failed. The connection can then no longer be used.
pub(crate) async fn negotiate<S>(
    stream: &mut S,
    mut handshake: Handshake,
    exports: &Exports,
    shutdown: &mut Shutdown,
) -> Result<HandshakeEnd, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut out = Vec::new();
    loop {
        // Reads only the bytes of the handshake, since another layer reads what follows. If bytes after
        // NBD_OPT_STARTTLS were read ahead, an attacker could insert plaintext that counts as sent under TLS.
        let mut bytes = vec![0; handshake.wanted()];
        ::tokio::select! {
            biased;
            read = stream.read_exact(&mut bytes) => read?,
            // The client is between two messages, or it is too slow to wait for.
            () = shutdown.requested() => return Ok(HandshakeEnd::Left),
        };
        match handshake.handle(&bytes, exports.infos(), &mut out) {
            Ok(Next::Continue(next)) => {
                send(stream, &mut out).await?;
                handshake = next;
            }
            Ok(Next::Transmission(negotiated)) => {
                send(stream, &mut out).await?;
                let export = exports.all().get(negotiated.export).cloned();
                return Ok(export.map_or(HandshakeEnd::Left, |export| HandshakeEnd::Chosen(export, negotiated)));
            }
            Ok(Next::StartTls(expect)) => {
                send(stream, &mut out).await?;
                return Ok(HandshakeEnd::StartTls(expect));
            }
            Ok(Next::Aborted) => {
                // The client may be gone already. The NBD specification says that the server must tolerate this.
                let _ = send(stream, &mut out).await;
                return Ok(HandshakeEnd::Left);
            }
            Err(error) => {
                let _ = send(stream, &mut out).await;
                return Err(error.into());
            }
        }
    }
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, out: &mut Vec<u8>) -> io::Result<()> {
    stream.write_all(out).await?;
    out.clear();
    stream.flush().await
}
