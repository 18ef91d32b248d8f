//! Two ends of one stream inside a process, for tests and the simulator.

use std::io;
use std::os::unix::net::UnixStream;

use super::Stream;

/// Two connected ends.
///
/// # Errors
/// If the process has no descriptor left.
pub fn pair() -> io::Result<(Box<dyn Stream>, Box<dyn Stream>)> {
    let (one, other) = UnixStream::pair()?;
    Ok((Box::new(one), Box::new(other)))
}
