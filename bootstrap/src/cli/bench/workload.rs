//! What a client asks of a server: which requests, how large, and how many at once.

use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Pattern {
    Read,
    Write,
    RandomRead,
    RandomWrite,
}

impl Pattern {
    pub(super) const ALL: [Self; 4] = [Self::Read, Self::Write, Self::RandomRead, Self::RandomWrite];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::RandomRead => "random read",
            Self::RandomWrite => "random write",
        }
    }

    /// The word after fio's `--rw=`.
    pub(super) fn for_fio(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::RandomRead => "randread",
            Self::RandomWrite => "randwrite",
        }
    }

    pub(super) fn writes(self) -> bool {
        matches!(self, Self::Write | Self::RandomWrite)
    }

    pub(super) fn is_random(self) -> bool {
        matches!(self, Self::RandomRead | Self::RandomWrite)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Workload {
    pub(super) pattern: Pattern,
    /// Bytes of a request.
    pub(super) block: u32,
    /// Requests under way at once, on each connection.
    pub(super) depth: u32,
    pub(super) connections: u32,
}

impl Workload {
    /// `random read 4 KiB, depth 32`; with more than one connection, these too.
    pub(super) fn name(&self) -> String {
        let several = match self.connections {
            1 => String::new(),
            n => format!(", {n} connections"),
        };
        format!("{} {}, depth {}{several}", self.pattern.name(), size(self.block), self.depth)
    }

    pub(super) fn with(self, connections: u32) -> Self {
        Self { connections, ..self }
    }
}

pub(super) fn size(bytes: u32) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes >> 10) } else { format!("{} MiB", bytes >> 20) }
}

/// The four that the comparison is about: large requests in sequence, small ones at random.
pub(super) const TYPICAL: [Workload; 4] = [
    Workload { pattern: Pattern::Read, block: 1 << 20, depth: 16, connections: 1 },
    Workload { pattern: Pattern::Write, block: 1 << 20, depth: 16, connections: 1 },
    Workload { pattern: Pattern::RandomRead, block: 4 << 10, depth: 32, connections: 1 },
    Workload { pattern: Pattern::RandomWrite, block: 4 << 10, depth: 32, connections: 1 },
];
