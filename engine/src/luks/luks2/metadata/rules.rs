//! The rules that connect the objects of a header, as cryptsetup checks them.

use super::field::Field;
use super::{Digest, MAX_KEYSLOTS_SIZE, Metadata, Unnamed};
use crate::luks::LuksError;
use crate::luks::luks2::header::{BINARY_LEN, BinaryHeader};

/// The versions of online reencryption that cryptsetup knows.
const KNOWN_REENCRYPTIONS: [&str; 3] = ["online-reencrypt", "online-reencrypt-v2", "online-reencrypt-v3"];

impl Metadata {
    /// Checks that the objects fit together: references, areas and requirements.
    pub(super) fn check(
        &self,
        root: &Field<'_>,
        header: &BinaryHeader,
        unnamed: &Unnamed<'_>,
    ) -> Result<(), LuksError> {
        self.check_references(root)?;
        self.check_unnamed(unnamed)?;
        self.check_keyslots(root)?;
        self.check_segments(root)?;
        self.check_areas(root, header)
    }

    fn check_references(&self, root: &Field<'_>) -> Result<(), LuksError> {
        let exist = |field: Field<'_>, wanted: &[u32], exists: &dyn Fn(&u32) -> bool| {
            let missing = wanted.iter().find(|id| !exists(id));
            missing.map_or(Ok(()), |id| Err(field.corrupt(format!("a list with {id}, which does not exist"))))
        };
        for (id, digest) in &self.digests {
            let field = root.get("digests").get(&id.to_string());
            exist(field.get("keyslots"), &digest.keyslots, &|id| self.keyslots.contains_key(id))?;
            exist(field.get("segments"), &digest.segments, &|id| self.segments.contains_key(id))?;
        }
        for (id, token) in &self.tokens {
            let field = root.get("tokens").get(&id.to_string()).get("keyslots");
            exist(field, &token.keyslots, &|id| self.keyslots.contains_key(id))?;
        }
        Ok(())
    }

    /// Checks the [`Unnamed`] objects. They are allowed as long as the volume does not need them.
    fn check_unnamed(&self, unnamed: &Unnamed<'_>) -> Result<(), LuksError> {
        for (field, digest) in &unnamed.digests {
            if !digest.keyslots.is_empty() || !digest.segments.is_empty() {
                return Err(field.corrupt("a name that is not a number"));
            }
        }
        for (field, token) in &unnamed.tokens {
            if let Some(id) = token.keyslots.iter().find(|id| !self.keyslots.contains_key(id)) {
                return Err(field.get("keyslots").corrupt(format!("a list with {id}, which does not exist")));
            }
        }
        Ok(())
    }

    /// Checks that each `luks2` keyslot belongs to exactly one digest, and that there is at most one keyslot for reencryption.
    /// Such a keyslot is allowed only together with the requirement for reencryption.
    fn check_keyslots(&self, root: &Field<'_>) -> Result<(), LuksError> {
        for (id, _) in self.keyslots.iter().filter(|(_, slot)| slot.kind == "luks2") {
            let digests = self.digests.values().filter(|digest| digest.keyslots.contains(id)).count();
            if digests != 1 {
                let found = format!("in {digests} digests, not in exactly one");
                return Err(root.get("keyslots").get(&id.to_string()).corrupt(found));
            }
        }
        self.check_reencryption(root)
    }

    /// Checks that an online reencryption has one requirement, one keyslot and two backup segments.
    fn check_reencryption(&self, root: &Field<'_>) -> Result<(), LuksError> {
        let requirements = root.get("config").get("requirements").get("mandatory");
        let mut wanted = self.config.requirements.iter().filter(|name| names_reencryption(name));
        let requirement = wanted.next();
        if let Some(another) = wanted.next() {
            return Err(requirements.corrupt(format!("a list with {another} beside another reencryption")));
        }
        let mut keyslots = self.keyslots.iter().filter(|(_, slot)| slot.kind == "reencrypt").map(|(id, _)| id);
        let keyslot = keyslots.next();
        if let Some(id) = if requirement.is_some() { keyslots.next() } else { keyslot } {
            let found = "for a reencryption that the requirements do not name, or not the only one for it";
            return Err(root.get("keyslots").get(&id.to_string()).corrupt(found));
        }
        // cryptsetup does not know what belongs to a later version.
        if !requirement.is_some_and(|name| KNOWN_REENCRYPTIONS.contains(&name.as_str())) {
            return Ok(());
        }
        if keyslot.is_none() {
            return Err(root.get("keyslots").corrupt("without a keyslot for the reencryption in the requirements"));
        }
        for flag in ["backup-previous", "backup-final"] {
            if !self.segments.values().any(|segment| segment.flags.iter().any(|it| it == flag)) {
                let found = format!("without a segment with the flag {flag}, which a reencryption needs");
                return Err(root.get("segments").corrupt(found));
            }
        }
        Ok(())
    }

    /// Checks that segments are numbered from 0 without a gap, and that backups come last. Also checks that the segments in
    /// use do not overlap, and that each encrypted segment has a digest.
    fn check_segments(&self, root: &Field<'_>) -> Result<(), LuksError> {
        let all = root.get("segments");
        if self.segments.is_empty() {
            return Err(all.corrupt("empty"));
        }
        let gap = self.segments.keys().zip(0..).find(|(id, expected)| *id != expected);
        if let Some((_, missing)) = gap {
            return Err(all.corrupt(format!("without segment {missing}, although there are higher numbers")));
        }
        let in_use = self.segments.values().take_while(|segment| !segment.is_backup()).count();
        if in_use == 0 {
            return Err(all.corrupt("without a segment that holds data"));
        }
        for (id, segment) in &self.segments {
            let field = all.get(&id.to_string());
            // No truncation: there are at most 32 segments.
            if *id as usize >= in_use && !segment.is_backup() {
                return Err(field.corrupt("in use, but follows a segment that is kept as a backup"));
            }
            if segment.kind != "crypt" {
                continue;
            }
            match self.digest_of_segment(*id) {
                None => {
                    return Err(LuksError::corrupt("digests", format!("without a digest for segment {id}")));
                }
                Some((_, Digest { pbkdf2: Some(Err(fault)), .. })) if !segment.is_backup() => return Err(fault.error()),
                Some(_) => {}
            }
        }
        let mut areas: Vec<(u64, Option<u64>, u32)> =
            self.segments.iter().take(in_use).map(|(id, segment)| (segment.offset, segment.size, *id)).collect();
        for (_, size, id) in &areas {
            if size.is_none() && *id as usize + 1 != in_use {
                return Err(all.get(&id.to_string()).get("size").corrupt("dynamic, but another segment follows"));
            }
        }
        areas.sort_unstable();
        for pair in areas.windows(2) {
            let [(offset, size, _), (next, _, id)] = pair else { continue };
            if size.and_then(|size| offset.checked_add(size)).is_none_or(|end| end > *next) {
                return Err(all.get(&id.to_string()).corrupt(format!("at {next}, within another segment")));
            }
        }
        Ok(())
    }

    /// Checks that key material lies after both headers, in the keyslots area and before the data, and that areas do not
    /// overlap.
    fn check_areas(&self, root: &Field<'_>, header: &BinaryHeader) -> Result<(), LuksError> {
        let config = root.get("config");
        if self.config.json_size != header.header_size - BINARY_LEN as u64 {
            return Err(config.get("json_size").corrupt(self.config.json_size.to_string()));
        }
        let size = self.config.keyslots_size;
        if size > MAX_KEYSLOTS_SIZE || !size.is_multiple_of(4096) {
            return Err(config.get("keyslots_size").corrupt(size.to_string()));
        }
        let start = 2 * header.header_size;
        let data = self.segments.values().filter(|segment| !segment.is_backup()).map(|segment| segment.offset).min();
        // If the data begins at the first byte, it is on another disk. Otherwise the rule holds even for a detached header, as
        // in cryptsetup: if that header were restored to the data disk later, it would overwrite data.
        if let Some(offset) = data.filter(|offset| *offset != 0 && *offset < start + size) {
            let found = format!("{offset}, before the end of the keyslots area at {}", start + size);
            return Err(LuksError::corrupt("segments offset", found));
        }
        let mut areas: Vec<(u64, u64, u32)> =
            self.keyslots.iter().map(|(id, slot)| (slot.area.offset, slot.area.size, *id)).collect();
        areas.sort_unstable();
        let mut free_from = start;
        for (offset, len, id) in areas {
            let field = root.get("keyslots").get(&id.to_string()).get("area");
            let end = offset.checked_add(len).filter(|end| len > 0 && *end <= start + size);
            let Some(end) = end.filter(|_| offset >= free_from) else {
                let found =
                    format!("{len} bytes at {offset}, outside the keyslots area or within another keyslot's area");
                return Err(field.corrupt(found));
            };
            free_from = end;
        }
        Ok(())
    }
}

/// Returns whether a requirement is an online reencryption of any version, such as `online-reencrypt-v2`.
fn names_reencryption(requirement: &str) -> bool {
    let version = requirement.strip_prefix("online-reencrypt-v");
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    requirement == "online-reencrypt" || version.is_some_and(is_number)
}
