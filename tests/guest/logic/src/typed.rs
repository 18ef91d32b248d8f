//! What is typed on the serial port: a byte `q`, or a line `stop`, asks the guest to end.

const STOP: &[u8] = b"stop";

/// The line that is being typed.
#[derive(Clone, Debug, Default)]
pub struct Typed {
    /// Bytes of [`STOP`] so far.
    matched: usize,
    /// Something else was typed in this line.
    is_other: bool,
}

impl Typed {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a byte; whether it completes the wish to end.
    pub fn byte(&mut self, byte: u8) -> bool {
        if byte == b'\n' || byte == b'\r' {
            let Self { matched, is_other } = core::mem::take(self);
            return matched == STOP.len() && !is_other;
        }
        match STOP.get(self.matched) {
            Some(wanted) if *wanted == byte => self.matched += 1,
            _ => self.is_other = true,
        }
        byte == b'q'
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(text: &str) -> bool {
        let mut typed = Typed::new();
        text.bytes().fold(false, |asked, byte| asked | typed.byte(byte))
    }

    #[test]
    fn a_line_that_says_stop_or_a_byte_q() {
        for text in ["q", "xq", "stop\n", "stop\r\n", "\nstop\n", "stopp\nstop\n"] {
            assert!(asks(text), "{text:?}");
        }
    }

    #[test]
    fn nothing_else() {
        for text in ["", "\n", "stop", "sto\n", "stopp\n", " stop\n", "xstop\n", "st\nop\n"] {
            assert!(!asks(text), "{text:?}");
        }
    }
}
