//! Criterion's statistics for this project's own paths. They compare one commit with another. To compare with other
//! libraries or with the hardware's limit, use `nbdcrypt-bench xts`, in which all of them take turns in one run.

#![allow(missing_docs, reason = "criterion's macros generate undocumented items")]

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::buffer::AlignedBuffer;
use engine::sector::{Lba512, SectorSize};
use nbdcrypt_benches::xts::{Contestant, Op, ours};

fn xts(criterion: &mut Criterion) {
    for mut contestant in ours() {
        for op in [Op::Encrypt, Op::Decrypt] {
            let mut group = criterion.benchmark_group(format!("xts/{}/{}", contestant.path(), op.name()));
            for sector_size in [SectorSize::B512, SectorSize::B4096] {
                for buffer in [4 << 10, 64 << 10, 1 << 20] {
                    group.throughput(Throughput::Bytes(u64::try_from(buffer).unwrap_or(u64::MAX)));
                    let mut data = AlignedBuffer::zeroed(buffer);
                    let id = BenchmarkId::new(format!("{sector_size}-byte sectors"), format!("{} KiB", buffer >> 10));
                    group.bench_function(id, |bencher| {
                        bencher.iter(|| contestant.run(op, sector_size, Lba512(0), &mut data));
                    });
                }
            }
            group.finish();
        }
    }
}

/// Three seconds for each of the fifty benchmarks. That is enough for a median of a thousand calls, and takes three
/// minutes in all.
fn brief() -> Criterion {
    Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2))
}

criterion_group! { name = benches; config = brief(); targets = xts }
criterion_main!(benches);
