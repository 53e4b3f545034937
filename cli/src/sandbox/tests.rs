//! What is forbidden is tried, on threads that end with their restrictions.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::process::Command;

use super::*;

/// Runs `tries` on a thread with the restrictions. False, with a word of it, on a kernel without
/// them.
fn restricted(sandbox: &Sandbox, tries: impl FnOnce() + Send) -> bool {
    std::thread::scope(|scope| {
        let within = || {
            let status = sandbox.restrict_files().unwrap();
            seccompiler::apply_filter(&filter().unwrap()).unwrap();
            if sandbox.files && status == RulesetStatus::NotEnforced {
                eprintln!("skipped: this kernel has no Landlock");
                return false;
            }
            tries();
            true
        };
        std::thread::Builder::new().spawn_scoped(scope, within).unwrap().join().unwrap()
    })
}

fn denied<T>(tried: io::Result<T>) -> bool {
    tried.err().is_some_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("secret"), "of another guest").unwrap();
    folder
}

#[test]
fn a_receiver_fills_and_names_its_checkpoint_and_sees_no_other_file() {
    let folder = folder();
    let (partial, target) = (folder.path().join(".out.partial"), folder.path().join("out"));
    fs::create_dir(&partial).unwrap();
    restricted(&Sandbox::new().filling(&partial), || {
        fs::create_dir(partial.join("ram")).unwrap();
        fs::write(partial.join("ram/00.img"), "page").unwrap();
        fs::rename(&partial, &target).unwrap();
        File::open(folder.path()).unwrap().sync_all().unwrap();
        assert_eq!(fs::read(target.join("ram/00.img")).unwrap(), b"page");
        fs::remove_dir_all(&target).unwrap();

        assert!(denied(fs::read(folder.path().join("secret"))));
        assert!(denied(fs::write(folder.path().join("secret"), "")));
        assert!(denied(fs::remove_file(folder.path().join("secret"))));
        assert!(denied(File::create(folder.path().join("new"))));
        assert!(denied(fs::read_dir(std::env::current_dir().unwrap())));
    });
}

#[test]
fn a_file_is_read_or_written_as_it_is_meant() {
    let folder = folder();
    let (old, new) = (folder.path().join("old"), folder.path().join("new"));
    fs::write(&old, "stream").unwrap();
    restricted(&Sandbox::new().reading(&old), || {
        assert_eq!(fs::read(&old).unwrap(), b"stream");
        assert!(denied(OpenOptions::new().write(true).open(&old)));
        assert!(denied(fs::read(folder.path().join("secret"))));
    });
    let uri = format!("file:{}", new.display()).parse().unwrap();
    restricted(&Sandbox::new().dialling(&uri), || {
        fs::write(&new, "stream").unwrap();
        OpenOptions::new().write(true).open(&new).unwrap().set_len(3).unwrap();
        fs::remove_file(&new).unwrap();
        assert!(denied(fs::create_dir(folder.path().join("folder"))));
    });
}

#[test]
fn a_receiver_listens_and_does_not_connect() {
    let folder = folder();
    let socket = folder.path().join("socket");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let there = listener.local_addr().unwrap();
    let unix: Endpoint = format!("unix:{}", socket.display()).parse().unwrap();
    restricted(&Sandbox::new().listening(&unix), || {
        UnixListener::bind(&socket).unwrap();
        fs::remove_file(&socket).unwrap();
        TcpListener::bind("127.0.0.1:0").unwrap();
        // Kernels before 6.7 cannot forbid it.
        assert!(
            TcpStream::connect(there).is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
                || kernel_is_before_6_7()
        );
    });
    restricted(&Sandbox::new().dialling(&"tcp:127.0.0.1:1".parse().unwrap()), || {
        TcpStream::connect(there).unwrap();
    });
}

fn kernel_is_before_6_7() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) < (Some(6), Some(7))
}

#[test]
fn programs_rights_and_other_processes_are_out_of_reach() {
    restricted(&Sandbox::new().all_files(), || {
        assert!(denied(Command::new("/bin/true").status()), "a program was started");
        for call in refused() {
            assert_eq!(try_call(call), Some(libc::EPERM), "system call {call}");
        }
        assert_eq!(socket(libc::AF_PACKET), Some(libc::EPERM));
        assert_eq!(try_call(libc::SYS_process_vm_writev), Some(libc::EPERM));
        for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
            assert_ne!(socket(family), Some(libc::EPERM), "family {family}");
        }
    });
}

#[expect(unsafe_code, reason = "no library makes a system call that is refused")]
fn try_call(call: libc::c_long) -> Option<i32> {
    // SAFETY: every call is refused before the kernel looks at the arguments, which are null and 0,
    // and none of these calls does anything with such.
    let result = unsafe { libc::syscall(call, 0, 0, 0, 0, 0, 0) };
    (result < 0).then(|| io::Error::last_os_error().raw_os_error()).flatten()
}

#[expect(unsafe_code, reason = "the standard library has no sockets of other families")]
fn socket(family: i32) -> Option<i32> {
    // SAFETY: it makes a descriptor, of which nothing but the number is known here.
    let socket = unsafe { libc::socket(family, libc::SOCK_STREAM, 0) };
    (socket < 0).then(|| io::Error::last_os_error().raw_os_error()).flatten()
}

#[test]
fn what_is_not_there_and_names_without_a_folder_need_no_rule() {
    let nowhere = Path::new("/no/such/folder/file");
    assert!(Sandbox::new().reading(nowhere).writing(nowhere).rules.len() > 2);
    assert_eq!(parent(Path::new("out")), Path::new("."));
    restricted(&Sandbox::new().reading(nowhere).filling(Path::new("out")), || {
        assert_eq!(fs::read(nowhere).unwrap_err().kind(), ErrorKind::NotFound);
    });
}

#[test]
fn a_command_has_no_sandbox_that_its_children_would_inherit() {
    for uri in ["exec:cat", "exec:gzip -dc < file"] {
        assert!(Sandbox::new().listening(&uri.parse().unwrap()).commands);
        assert!(Sandbox::new().dialling(&uri.parse().unwrap()).commands);
    }
    assert!(!Sandbox::new().dialling(&"tcp:localhost:1".parse().unwrap()).commands);
}
