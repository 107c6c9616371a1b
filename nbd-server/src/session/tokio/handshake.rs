//! The handshake, on any stream.

use std::io;

use ::tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::export::{Export, Exports};
use crate::proto::handshake::{Next, TlsPolicy};
use crate::proto::{Handshake, Negotiated};
use crate::session::SessionError;
use crate::shutdown::Shutdown;

/// What came of a handshake, as far as it went on one stream.
pub(crate) enum Haggled {
    /// The client chose this export.
    Chosen(Export, Negotiated),
    /// The client took its leave, or the server has to.
    Left,
    /// TLS is to begin with the next byte of the stream, of which nothing was read ahead.
    StartTls(Handshake),
}

/// Greets a client and takes it through the handshake.
///
/// # Errors
/// [`SessionError`]; the connection is of no more use.
pub(crate) async fn greet<S>(
    stream: &mut S,
    tls: TlsPolicy,
    exports: &Exports,
    shutdown: &mut Shutdown,
) -> Result<Haggled, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut out = Vec::new();
    let handshake = Handshake::greeting(tls, &mut out);
    send(stream, &mut out).await?;
    haggle(stream, handshake, exports, shutdown).await
}

/// Takes a client through the rest of a handshake.
///
/// # Errors
/// [`SessionError`]; the connection is of no more use.
pub(crate) async fn haggle<S>(
    stream: &mut S,
    mut handshake: Handshake,
    exports: &Exports,
    shutdown: &mut Shutdown,
) -> Result<Haggled, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut out = Vec::new();
    loop {
        // Exactly as much as belongs to the handshake: what follows is the business of another layer. Were anything read
        // ahead of NBD_OPT_STARTTLS, what someone put into the plaintext could count as said under TLS.
        let mut bytes = vec![0; handshake.wanted()];
        ::tokio::select! {
            biased;
            read = stream.read_exact(&mut bytes) => read?,
            // The client is between two messages, or too slow to be waited for.
            () = shutdown.requested() => return Ok(Haggled::Left),
        };
        match handshake.handle(&bytes, exports.infos(), &mut out) {
            Ok(Next::Continue(next)) => {
                send(stream, &mut out).await?;
                handshake = next;
            }
            Ok(Next::Transmission(negotiated)) => {
                send(stream, &mut out).await?;
                let export = exports.all().get(negotiated.export).cloned();
                return Ok(export.map_or(Haggled::Left, |export| Haggled::Chosen(export, negotiated)));
            }
            Ok(Next::StartTls(next)) => {
                send(stream, &mut out).await?;
                return Ok(Haggled::StartTls(next));
            }
            Ok(Next::Aborted) => {
                // The client may be gone already; the document tells us to bear with it.
                let _ = send(stream, &mut out).await;
                return Ok(Haggled::Left);
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
