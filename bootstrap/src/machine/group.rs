//! The groups of this machine.

use rustix::fs::Gid;

/// Finds a group by its name, or else by its number.
///
/// # Errors
/// Says why there is no such group, or why the groups could not be read.
pub fn find(text: &str) -> Result<Gid, String> {
    let found = nix::unistd::Group::from_name(text).map_err(|error| format!("the groups were not read: {error}"))?;
    match (found, text.parse::<u32>()) {
        (Some(group), _) => Ok(Gid::from_raw(group.gid.as_raw())),
        // `u32::MAX` means "no change" to chown(2).
        (None, Ok(number)) if number != u32::MAX => Ok(Gid::from_raw(number)),
        _ => Err("there is no such group (`getent group` lists the groups)".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_a_name_or_a_number() {
        assert_eq!((find("root"), find("4242")), (Ok(Gid::from_raw(0)), Ok(Gid::from_raw(4242))));
        for wrong in ["", "no such group", "-1", "4294967295", "4294967296"] {
            assert!(find(wrong).unwrap_err().contains("getent group"), "{wrong}");
        }
    }
}
