/// Appends a counted string: one length byte, then the bytes. Names in this crate are at most 255
/// bytes long.
pub(crate) fn put_cstr8(out: &mut Vec<u8>, text: &str) {
    debug_assert!(text.len() <= 255, "{} bytes in a counted string", text.len());
    let len = u8::try_from(text.len()).unwrap_or(u8::MAX);
    out.push(len);
    out.extend(text.bytes().take(usize::from(len)));
}

/// Appends a be16 length and the bytes that `body` appends.
pub(crate) fn put_counted16(out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend([0; 2]);
    body(out);
    let len = out.len() - at - 2;
    debug_assert!(len <= usize::from(u16::MAX), "{len} bytes in a be16-counted message");
    let len = u16::try_from(len).unwrap_or(u16::MAX);
    if let Some(field) = out.get_mut(at..at + 2) {
        field.copy_from_slice(&len.to_be_bytes());
    }
}
