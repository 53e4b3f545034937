//! Numbers of the kernel's requests.

/// `_IOC` of linux/ioctl.h. Direction 1: the kernel reads the argument of `len` bytes; 2: it writes
/// it; 3: both.
pub(crate) const fn request(direction: u32, kind: u8, number: u32, len: usize) -> libc::Ioctl {
    assert!(direction < 4 && number < 1 << 8 && len < 1 << 14);
    #[expect(clippy::cast_possible_truncation, reason = "checked above")]
    let len = len as u32;
    (direction << 30 | len << 16 | (kind as u32) << 8 | number) as libc::Ioctl
}
