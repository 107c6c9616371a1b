//! The test kernel works wherever the checkout, the target folder and the folder for temporary files lie. This includes
//! /tmp, /run and /dev/shm, where the guest has empty filesystems of its own.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use harness::kernel::Kernel;

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux: run `make test`")]
fn the_guest_sees_the_checkout_below_tmp_run_and_shm() {
    for place in ["/tmp", "/run", "/dev/shm"].map(Path::new) {
        let checkout = tempfile::tempdir_in(place).unwrap();
        let program = checkout.path().join("program");
        std::fs::write(&program, "#!/bin/sh\necho it runs\n").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let kernel = Kernel::with_job_in(place).showing(checkout.path());
        let script = format!(
            "{program}; ! touch {dir}/new; test -w /tmp; test -w /run; test -w /dev/shm; echo kept > kept",
            program = program.display(),
            dir = checkout.path().display()
        );
        assert!(kernel.expect(&script).starts_with("it runs\n"), "{}", place.display());
        assert_eq!(std::fs::read_to_string(kernel.dir().join("kept")).unwrap(), "kept\n", "{}", place.display());
    }
}
