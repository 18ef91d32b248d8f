//! The size of the terminal that this process was started on.

#![allow(unsafe_code, reason = "TIOCGWINSZ has no safe wrapper")]

use std::os::fd::AsRawFd;

use nix::pty::Winsize;

nix::ioctl_read_bad!(tiocgwinsz, libc::TIOCGWINSZ, Winsize);

/// Characters of a terminal; zeroes where it has no size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowSize {
    pub cols: u16,
    pub rows: u16,
}

/// The size of standard input, if that is a terminal.
pub(super) fn of_stdin() -> Option<WindowSize> {
    let mut size = Winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel writes a `struct winsize` to where `size` is.
    unsafe { tiocgwinsz(std::io::stdin().as_raw_fd(), &raw mut size) }.ok()?;
    Some(WindowSize { cols: size.ws_col, rows: size.ws_row })
}
