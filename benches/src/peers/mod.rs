//! The others, each used the fastest way that its interface offers for sectors with tweaks of their own: contexts with
//! the key made once, and one initialisation with the tweak and one update a sector.

mod aws_lc;
mod openssl;
mod xts_mode;

use engine::sector::{Lba512, SectorSize};

use crate::Contestant;

/// Everyone, in the order of the tables.
pub(crate) fn all() -> Vec<Box<dyn Contestant>> {
    vec![Box::new(aws_lc::AwsLc::new()), Box::new(openssl::OpenSsl::new()), Box::new(xts_mode::XtsMode::new())]
}

/// The sectors of a run, each with its tweak.
fn sectors(size: SectorSize, first: Lba512, data: &mut [u8]) -> impl Iterator<Item = ([u8; 16], &mut [u8])> {
    let mut lba = first;
    data.chunks_exact_mut(size.bytes()).map(move |sector| {
        let tweak = u128::from(lba.0).to_le_bytes();
        lba = lba.advanced_by(size.lba_step());
        (tweak, sector)
    })
}
