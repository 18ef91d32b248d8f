//! SIGTERM and SIGINT end the VMM gracefully.

use crossbeam_channel::Sender;
use nix::sys::signal::{SigSet, Signal};

use super::{Error, Notice};

fn ours() -> SigSet {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set
}

/// Blocks both signals in this thread, and so in all that it starts later. A thread that is older
/// would take the signal and die of it, the process with it: call this before any is started.
///
/// # Errors
/// The system refuses the mask.
pub fn block() -> Result<(), Error> {
    ours().thread_block().map_err(Error::Signals)
}

/// Turns the blocked signals into notices.
pub(super) fn watch(notices: Sender<Notice>) -> Result<(), Error> {
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while ours().wait().is_ok() {
                if notices.send(Notice::Terminate).is_err() {
                    return;
                }
            }
        })
        .map_err(Error::Thread)?;
    Ok(())
}
