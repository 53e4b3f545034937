//! Bulk copies out of and into memory that may change meanwhile, of which no slice may exist.

use std::io::{self, ErrorKind};

use super::Channel;
use crate::channel::stream::Stream;

/// Bytes that are copied at a time where the channel has no better buffer of its own: 64 KiB.
const PIECE: usize = 64 << 10;

impl Channel {
    /// Sends `len` bytes that `fill` writes, in order, in pieces of any size. With TLS they are
    /// encrypted and sent from where it writes them.
    ///
    /// For memory of which no slice may exist, when [`direct`](Self::direct) gives `None`.
    ///
    /// # Errors
    /// As [`send_all`](Self::send_all).
    pub fn send_filled(&self, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> io::Result<()> {
        let mut left = len;
        let Stream::Tls(tls) = &self.link.stream else {
            let mut piece = vec![0; PIECE.min(len)];
            while left > 0 {
                let (piece, _) = piece.split_at_mut(left.min(PIECE));
                fill(piece);
                self.send_all(piece)?;
                left -= piece.len();
            }
            return Ok(());
        };
        while left > 0 {
            let sent = tls.send_filled(left, fill).map_err(|error| self.explain(error))?;
            self.note_direct_sent(sent as u64);
            left -= sent;
        }
        Ok(())
    }

    /// Receives `len` bytes and shows them to `take`, in order, in pieces of any size. With TLS
    /// they are shown where they were opened.
    ///
    /// # Errors
    /// As [`recv_exact`](Self::recv_exact).
    pub fn recv_each(&self, len: usize, take: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let mut left = len;
        let Stream::Tls(tls) = &self.link.stream else { return self.recv_pieces(len, take) };
        let first = self.pushed_back.left().min(left);
        self.recv_pieces(first, take)?;
        left -= first;
        while left > 0 {
            let shown = &mut |data: &[u8]| {
                take(data);
                data.len()
            };
            match tls.recv_with(left, shown) {
                Ok(0) => {
                    self.check_end()?;
                    return Err(super::ended(len - left, len));
                }
                Ok(received) => {
                    self.note_direct_received(received as u64);
                    left -= received;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.explain(error)),
            }
        }
        Ok(())
    }

    fn recv_pieces(&self, len: usize, take: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let (mut piece, mut left) = (vec![0; PIECE.min(len)], len);
        while left > 0 {
            let (piece, _) = piece.split_at_mut(left.min(PIECE));
            self.recv_exact(piece)?;
            take(piece);
            left -= piece.len();
        }
        Ok(())
    }
}
