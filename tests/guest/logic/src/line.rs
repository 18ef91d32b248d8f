//! A line of text in a fixed buffer: it is put together first and sent in one piece.

use core::fmt;

/// What does not fit is cut off.
pub struct Line<const SIZE: usize> {
    bytes: [u8; SIZE],
    length: usize,
}

impl<const SIZE: usize> Line<SIZE> {
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: [0; SIZE], length: 0 }
    }

    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

impl<const SIZE: usize> Default for Line<SIZE> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const SIZE: usize> fmt::Write for Line<SIZE> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            let Some(place) = self.bytes.get_mut(self.length) else { return Ok(()) };
            *place = byte;
            self.length += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    #[test]
    fn a_long_line_is_cut() {
        let mut line = Line::<8>::new();
        write!(line, "abc {}", 123_456).unwrap();
        assert_eq!(line.bytes(), b"abc 1234");
    }
}
