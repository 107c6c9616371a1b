//! What a client asks of a server: which requests, how large, and how many at once.

use serde::Serialize;

/// The operation and the order of the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Reads in sequence.
    Read,
    /// Writes in sequence.
    Write,
    /// Reads of random blocks.
    RandomRead,
    /// Writes of random blocks.
    RandomWrite,
}

impl Pattern {
    /// All four patterns.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::RandomRead, Self::RandomWrite];

    /// Returns the pattern's name, for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::RandomRead => "random read",
            Self::RandomWrite => "random write",
        }
    }

    /// Returns the value for fio's `--rw=`.
    pub fn for_fio(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::RandomRead => "randread",
            Self::RandomWrite => "randwrite",
        }
    }

    /// Returns whether the pattern writes.
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::RandomWrite)
    }

    /// Returns whether the blocks are in random order.
    pub fn is_random(self) -> bool {
        matches!(self, Self::RandomRead | Self::RandomWrite)
    }
}

/// A sequence of requests, of which `depth` are in flight at once on each connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// The operation and the order of the blocks.
    pub pattern: Pattern,
    /// Bytes of each request.
    pub block: u32,
    /// Requests in flight at once, on each connection.
    pub depth: u32,
    /// The number of connections. Each connection uses its own part of the region.
    pub connections: u32,
}

impl Workload {
    /// Returns a name such as `random read 4 KiB, depth 32`. It contains the number of connections if that is not 1.
    pub fn name(&self) -> String {
        let several = match self.connections {
            1 => String::new(),
            n => format!(", {n} connections"),
        };
        format!("{} {}, depth {}{several}", self.pattern.name(), size(self.block), self.depth)
    }

    /// Returns the same workload on another number of connections.
    pub fn with(self, connections: u32) -> Self {
        Self { connections, ..self }
    }
}

/// Returns a block size in KiB or MiB, for tables.
pub fn size(bytes: u32) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes >> 10) } else { format!("{} MiB", bytes >> 20) }
}

/// The four workloads of the comparison: large sequential requests and small random ones.
pub const TYPICAL: [Workload; 4] = [
    Workload { pattern: Pattern::Read, block: 1 << 20, depth: 16, connections: 1 },
    Workload { pattern: Pattern::Write, block: 1 << 20, depth: 16, connections: 1 },
    Workload { pattern: Pattern::RandomRead, block: 4 << 10, depth: 32, connections: 1 },
    Workload { pattern: Pattern::RandomWrite, block: 4 << 10, depth: 32, connections: 1 },
];
