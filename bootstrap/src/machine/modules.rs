//! Loads kernel modules.

use std::path::Path;

use crate::machine::programs;
use crate::machine::root::Root;

/// Loads a kernel module, unless the file `sign` shows that the module is loaded. Fails with a message if `sign` does
/// not exist afterwards.
pub(crate) fn load_module(name: &str, sign: &Path) -> Result<(), String> {
    if sign.exists() {
        return Ok(());
    }
    let said = programs::run("modprobe", &[name.as_ref()], programs::QUICK).err();
    if sign.exists() {
        return Ok(());
    }
    if let Some(node) = missing_node(Path::new("/sys/class/misc"), sign) {
        return Err(node);
    }
    Err(said.map_or_else(|| format!("modprobe {name} changed nothing"), |error| error.to_string()))
}

/// Whether the running kernel has a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The driver is loaded, or is a part of the kernel itself.
    Loaded,
    /// The driver is a module that can be loaded.
    Loadable,
    /// The kernel does not have the driver.
    Absent,
}

/// Returns whether the running kernel has the driver `module`. Loads nothing.
pub fn driver(root: &Root, module: &str) -> Driver {
    let kernel = root.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    // Modules may be compressed: nbd.ko, nbd.ko.xz.
    let file = format!("/{module}.ko");
    let lists = |list: &str| {
        let text = root.text(Path::new("/lib/modules").join(&kernel).join(list)).unwrap_or_default();
        let mut paths = text.lines().map(|line| line.split(':').next().unwrap_or_default());
        paths.any(|path| path.ends_with(&file) || path.contains(&format!("{file}.")))
    };
    match root.has(Path::new("/sys/module").join(module)) || lists("modules.builtin") {
        true => Driver::Loaded,
        false if lists("modules.dep") => Driver::Loadable,
        false => Driver::Absent,
    }
}

/// Returns how to make a driver's device node, if the kernel has the driver but `/dev` lacks the node. This is the case in
/// many containers.
pub(crate) fn missing_node(sys: &Path, node: &Path) -> Option<String> {
    let number = std::fs::read_to_string(sys.join(node.file_name()?).join("dev")).ok()?;
    let (major, minor) = number.trim().split_once(':')?;
    Some(format!("the kernel has it; make the node: mknod -m 600 {} c {major} {minor}", node.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_node_gets_the_numbers_of_its_driver() {
        let sys = tempfile::tempdir().unwrap();
        std::fs::create_dir(sys.path().join("fuse")).unwrap();
        std::fs::write(sys.path().join("fuse/dev"), "10:229\n").unwrap();
        let said = missing_node(sys.path(), Path::new("/dev/fuse")).unwrap();
        assert!(said.ends_with("mknod -m 600 /dev/fuse c 10 229"), "{said}");
        assert_eq!(missing_node(sys.path(), Path::new("/dev/loop-control")), None);
    }
}
