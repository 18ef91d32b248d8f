//! Redis' serialization protocol, version 2, as far as a client and an append-only file need it:
//! <https://redis.io/docs/latest/develop/reference/protocol-spec/>.

use std::io::{BufRead, Read};

use anyhow::{Context, Result, bail, ensure};

/// Longest line, longest string, and most members of an array that are taken from a peer.
const LINE_BYTES_MAX: u64 = 4096;
const STRING_BYTES_MAX: usize = 1 << 20;
const MEMBERS_MAX: usize = 1024;

#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`
    Status(String),
    /// `-ERR …`
    Error(String),
    /// A string, or the nil for a key that is not there.
    Bulk(Option<Vec<u8>>),
    /// An array of strings.
    Array(Vec<Option<Vec<u8>>>),
}

/// A command and its arguments on the wire.
pub fn command(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

/// Reads one reply. `None` at an end where a reply could begin.
pub fn read(from: &mut impl BufRead) -> Result<Option<Reply>> {
    if from.fill_buf()?.is_empty() {
        return Ok(None);
    }
    let line = line(from)?;
    let Some((kind, rest)) = line.split_at_checked(1) else { bail!("An empty line") };
    Ok(Some(match kind {
        "+" => Reply::Status(rest.to_owned()),
        "-" => Reply::Error(rest.to_owned()),
        "$" => Reply::Bulk(string(from, rest)?),
        "*" => {
            let members: usize = rest.parse().with_context(|| format!("An array of '{rest}'"))?;
            ensure!(members <= MEMBERS_MAX, "An array of {members} members");
            let mut array = Vec::with_capacity(members);
            for _ in 0..members {
                let head = self::line(from)?;
                let length =
                    head.strip_prefix('$').with_context(|| format!("A member '{head}'"))?;
                array.push(string(from, length)?);
            }
            Reply::Array(array)
        }
        _ => bail!("A reply that begins with '{}'", line.escape_debug()),
    }))
}

fn line(from: &mut impl BufRead) -> Result<String> {
    let mut line = Vec::new();
    from.take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
    let text = line.strip_suffix(b"\r\n").context("A line without an end")?;
    Ok(String::from_utf8_lossy(text).into_owned())
}

fn string(from: &mut impl Read, length: &str) -> Result<Option<Vec<u8>>> {
    if length == "-1" {
        return Ok(None);
    }
    let length: usize = length.parse().with_context(|| format!("A string of '{length}' bytes"))?;
    ensure!(length <= STRING_BYTES_MAX, "A string of {length} bytes");
    let mut bytes = vec![0; length + 2];
    from.read_exact(&mut bytes).context("A string without an end")?;
    ensure!(bytes.ends_with(b"\r\n"), "A string that is longer than it says");
    bytes.truncate(length);
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read_to_their_end() {
        let mut wire: &[u8] = b"+OK\r\n-ERR no\r\n$2\r\na\n\r\n$-1\r\n*2\r\n$1\r\nx\r\n$-1\r\n";
        let mut next = || read(&mut wire).unwrap();
        assert_eq!(next(), Some(Reply::Status("OK".into())));
        assert_eq!(next(), Some(Reply::Error("ERR no".into())));
        assert_eq!(next(), Some(Reply::Bulk(Some(b"a\n".to_vec()))));
        assert_eq!(next(), Some(Reply::Bulk(None)));
        assert_eq!(next(), Some(Reply::Array(vec![Some(b"x".to_vec()), None])));
        assert_eq!(next(), None);
    }

    #[test]
    fn a_command_is_an_array_of_strings() {
        let wire = command(&[b"SET", b"k", b""]);
        let words = ["SET", "k", ""].map(|word| Some(word.as_bytes().to_vec()));
        assert_eq!(read(&mut wire.as_slice()).unwrap(), Some(Reply::Array(words.to_vec())));
    }

    #[test]
    fn damaged_replies_are_errors() {
        for wire in [
            "+OK",
            "\r\n",
            "?\r\n",
            "$x\r\n",
            "$3\r\nab",
            "$1\r\nab\r\n",
            "$-2\r\n",
            "*1\r\n",
            "*1\r\n+OK\r\n",
            "*-5\r\n",
            "$99999999999\r\n",
            "*99999999\r\n",
        ] {
            assert!(read(&mut wire.as_bytes()).is_err(), "{wire:?}");
        }
    }
}
