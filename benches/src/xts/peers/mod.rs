//! The other libraries. Each library is used in the fastest way that its interface offers for sectors with their own
//! tweaks. The key is set up once. Each sector takes one initialisation with the tweak, and one update.

mod aws_lc;
mod openssl;
mod xts_mode;

use engine::sector::{Lba512, SectorSize};

use crate::xts::Contestant;

/// Returns all of them, in the order of the tables.
pub(super) fn all() -> Vec<Box<dyn Contestant>> {
    vec![Box::new(aws_lc::AwsLc::new()), Box::new(openssl::OpenSsl::new()), Box::new(xts_mode::XtsMode::new())]
}

/// Returns the sectors of a run, each with its tweak.
fn sectors(size: SectorSize, first: Lba512, data: &mut [u8]) -> impl Iterator<Item = ([u8; 16], &mut [u8])> {
    let mut lba = first;
    data.chunks_exact_mut(size.bytes()).map(move |sector| {
        let tweak = u128::from(lba.0).to_le_bytes();
        lba = lba.advanced_by(size.lba_step());
        (tweak, sector)
    })
}
