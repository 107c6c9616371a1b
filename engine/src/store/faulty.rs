//! A disk that fails on demand, so that tests can see the effect of an I/O error.

use std::io;

use super::{Allocation, BlockStore};

/// A call to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `read_at`, with its offset and length in bytes.
    Read(u64, u64),
    /// `write_at`, with its offset and length in bytes.
    Write(u64, u64),
    /// `flush`.
    Flush,
    /// `discard`, with its offset and length in bytes.
    Discard(u64, u64),
}

type Fault = dyn Fn(Operation) -> Option<io::ErrorKind> + Send + Sync;

/// Before each operation, asks a function whether this operation fails. Operations that do not fail go to the inner
/// store.
pub struct FaultyStore<S> {
    inner: S,
    fault: Box<Fault>,
}

impl<S: BlockStore> FaultyStore<S> {
    /// Wraps `inner`. If `fault` returns an error kind for an operation, the operation fails with it and does nothing else.
    pub fn new(inner: S, fault: impl Fn(Operation) -> Option<io::ErrorKind> + Send + Sync + 'static) -> Self {
        Self { inner, fault: Box::new(fault) }
    }

    /// Returns the inner store.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn check(&self, operation: Operation) -> io::Result<()> {
        match (self.fault)(operation) {
            Some(kind) => Err(io::Error::new(kind, format!("injected fault at {operation:?}"))),
            None => Ok(()),
        }
    }
}

impl<S: BlockStore> BlockStore for FaultyStore<S> {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn alignment(&self) -> usize {
        self.inner.alignment()
    }

    fn discards_quickly(&self) -> bool {
        self.inner.discards_quickly()
    }

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(Operation::Read(offset, data.len() as u64))?;
        self.inner.read_at(data, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check(Operation::Write(offset, data.len() as u64))?;
        self.inner.write_at(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.check(Operation::Flush)?;
        self.inner.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(Operation::Discard(offset, len))?;
        self.inner.discard(offset, len)
    }

    fn allocation(&self, offset: u64) -> io::Result<Allocation> {
        self.inner.allocation(offset)
    }

    fn will_read(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.will_read(offset, len)
    }
}
