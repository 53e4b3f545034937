use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};

use tempfile::TempDir;

use super::*;
use crate::{Channel, DialOptions, Endpoint};

struct Place {
    folder: TempDir,
    path: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stream");
        Self { folder, path }
    }

    fn dial(&self, offset: u64) -> Channel {
        let endpoint = Endpoint::File { path: self.path.clone(), offset };
        crate::dial(&endpoint, &DialOptions::default()).unwrap()
    }

    fn content(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }
}

#[test]
fn what_is_finished_stays_and_can_be_read_back() {
    let place = Place::new();
    let channel = place.dial(0);
    assert!(!channel.is_two_way() && channel.direct().is_none());
    channel.send_vectored(&mut [IoSlice::new(b"on"), IoSlice::new(b""), IoSlice::new(b"e two")]).unwrap();
    let file = channel.file().unwrap();
    assert_eq!(file.position(), 7);
    file.write_all_at(b"far", 100).unwrap();
    file.seek(50);
    channel.send_all(b"there").unwrap();
    channel.finish_sending().unwrap();
    assert_eq!(channel.bytes_sent(), 12);
    channel.closer().close();
    drop(channel);
    let content = place.content();
    assert_eq!(
        (&content[..7], &content[50..55], &content[100..]),
        (&b"one two"[..], &b"there"[..], &b"far"[..])
    );
    assert_eq!(fs::metadata(&place.path).unwrap().permissions().mode() & 0o777, 0o600);

    let file = FileStream::open(&place.path, 4).unwrap();
    let channel = Channel::of_file(file, "file:x".into());
    let mut bytes = [0; 3];
    channel.recv_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"two");
    channel.file().unwrap().seek(101);
    let mut rest = [0; 10];
    assert_eq!((channel.recv(&mut rest).unwrap(), channel.recv(&mut rest).unwrap()), (2, 0));
    assert!(channel.send_all(b"x").is_err());
    drop(channel);
    assert_eq!(place.content(), content);
}

#[test]
fn what_is_not_finished_is_gone() {
    let place = Place::new();
    for close in [false, true] {
        let channel = place.dial(0);
        channel.send_all(b"half").unwrap();
        if close {
            channel.closer().close();
            assert!(!place.path.exists(), "at once, though the channel is still held");
            assert_eq!(channel.send_all(b"more").unwrap_err().kind(), ErrorKind::ConnectionAborted);
            assert_eq!(channel.finish_sending().unwrap_err().kind(), ErrorKind::ConnectionAborted);
        }
        drop(channel);
        assert!(!place.path.exists());
    }
}

#[test]
fn only_the_stream_is_cut_off_and_only_the_own_file_is_removed() {
    let place = Place::new();
    fs::write(&place.path, b"head, and an older stream").unwrap();
    drop(place.dial(4));
    assert_eq!(place.content(), b"head");
    // Another has taken the name.
    let other = Place::new();
    let channel = other.dial(0);
    fs::remove_file(&other.path).unwrap();
    fs::write(&other.path, b"other").unwrap();
    drop(channel);
    assert_eq!(other.content(), b"other");
}

#[test]
fn a_file_that_was_there_is_its_owners_alone_and_a_link_is_not_followed() {
    let place = Place::new();
    fs::write(&place.path, b"head, and an older stream").unwrap();
    fs::set_permissions(&place.path, fs::Permissions::from_mode(0o664)).unwrap();
    let channel = place.dial(4);
    assert_eq!(fs::metadata(&place.path).unwrap().permissions().mode() & 0o777, 0o600);
    channel.finish_sending().unwrap();

    let link = place.folder.path().join("link");
    symlink(&place.path, &link).unwrap();
    let error = FileStream::create(&link, 0).unwrap_err().to_string();
    assert_eq!(error, "a symbolic link, expected a regular file");
    assert_eq!(place.content(), b"head");
}

#[test]
fn an_offset_past_the_end_leaves_a_hole_for_writing_and_is_wrong_for_reading() {
    let place = Place::new();
    let channel = place.dial(10);
    channel.send_all(b"x").unwrap();
    channel.finish_sending().unwrap();
    assert_eq!(place.content(), b"\0\0\0\0\0\0\0\0\0\0x");
    let error = FileStream::open(&place.path, 12).unwrap_err().to_string();
    assert_eq!(error, "offset 12, the file has 11 bytes");
    FileStream::open(&place.path, 11).unwrap();
}

#[test]
fn anything_but_a_regular_file_is_refused_without_a_wait() {
    let place = Place::new();
    let fifo = place.folder.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    symlink(&fifo, &place.path).unwrap();
    for (path, read, written) in [
        (place.folder.path(), "a directory", "a directory"),
        (&fifo, "a named pipe", "a named pipe"),
        (&place.path, "a named pipe", "a symbolic link"),
        (Path::new("/dev/zero"), "a device", "a device"),
    ] {
        for (opened, name) in [(FileStream::open(path, 0), read), (FileStream::create(path, 0), written)] {
            let error = opened.unwrap_err().to_string();
            assert_eq!(error, format!("{name}, expected a regular file"), "{}", path.display());
        }
    }
    assert_eq!(FileStream::open(&place.folder.path().join("no"), 0).unwrap_err().kind(), ErrorKind::NotFound);
    // No directory will come into being: there is nothing to try again.
    let endpoint = Endpoint::File { path: place.folder.path().join("no/file"), offset: 0 };
    let error = crate::dial(&endpoint, &DialOptions::default()).unwrap_err();
    assert!(error.to_string().starts_with("write to file:"), "{error}");
}

#[test]
fn descriptors_of_others_are_checked_and_their_files_kept() {
    let place = Place::new();
    fs::write(&place.path, b"head and more").unwrap();
    let open = |options: &mut OpenOptions| OwnedFd::from(options.open(&place.path).unwrap());
    let refused = |result: io::Result<Channel>, text: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    };
    let peer = || "fd:7".to_owned();
    let read_only = open(OpenOptions::new().read(true));
    refused(Channel::writing_to_file(read_only, 0, peer()), "for reading only");
    let write_only = open(OpenOptions::new().write(true));
    refused(Channel::reading_file(write_only, 0, peer()), "for writing only");
    let append = open(OpenOptions::new().append(true));
    refused(Channel::writing_to_file(append, 0, peer()), "for appending");
    let (pipe, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    refused(Channel::reading_file(pipe.into(), 0, peer()), "a socket, expected a regular file");
    assert_eq!(place.content(), b"head and more");

    let both = || open(OpenOptions::new().read(true).write(true));
    let channel = Channel::writing_to_file(both(), 4, peer()).unwrap();
    channel.send_all(b"er").unwrap();
    channel.finish_sending().unwrap();
    assert_eq!(place.content(), b"header");
    drop(Channel::writing_to_file(both(), 4, peer()).unwrap());
    assert_eq!(place.content(), b"head");
    let channel = Channel::reading_file(both(), 2, peer()).unwrap();
    let mut bytes = [0; 2];
    channel.recv_exact(&mut bytes).unwrap();
    assert_eq!((&bytes, channel.peer()), (b"ad", "fd:7"));
}
