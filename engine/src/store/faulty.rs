//! A disk that fails when told to: the one way tests have to see what an I/O error does.

use std::io;

use super::{Allocation, BlockStore};

/// What the store is asked to do.
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

/// Asks a function before each operation whether it shall fail, and hands the others on to the store within.
pub struct FaultyStore<S> {
    inner: S,
    fault: Box<Fault>,
}

impl<S: BlockStore> FaultyStore<S> {
    /// Wraps `inner`; an operation for which `fault` names an error kind fails with it and reaches nothing.
    pub fn new(inner: S, fault: impl Fn(Operation) -> Option<io::ErrorKind> + Send + Sync + 'static) -> Self {
        Self { inner, fault: Box::new(fault) }
    }

    /// The store within.
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
