//! The second thread of a data connection during a copy straight into the image: it writes pages
//! while the receiver reads and checks the next ones.
//!
//! ```text
//!   repl-recv-N   | read, check 1 | read, check 2 | read, check 3 | ...
//!   repl-fill-N                   | make, write 1     | make, write 2     | ...
//! ```
//!
//! Enters: checked frames. Leaves: room for further ones, once they are in the image. Always holds:
//! frames are written in their order, [`FRAMES`] of them wait at most, and [`Filler::settle`] and the
//! end of a filler wait for all of them: nobody who takes the image over finds it written to.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::apply::{ApplyError, apply};
use crate::engine::spawn;
use crate::engine::status::Counters;
use crate::error::Error;
use crate::ram::Ram;
use crate::wire::Run;

/// Frames that are read ahead of what is in the image: enough for either side to go on while the
/// other does not have the processor.
const FRAMES: usize = 4;

/// The pages of a frame as they are staged, each whole.
#[derive(Debug, Default)]
pub(super) struct Frame {
    pub(super) runs: Vec<Run>,
    pub(super) bytes: Vec<u8>,
    /// Whether nobody has written these pages yet, as far as is known.
    pub(super) is_fresh: bool,
}

pub(super) struct Filler {
    /// `None` once it ends.
    frames: Option<Sender<Frame>>,
    done: Receiver<Result<Frame, ApplyError>>,
    idle: Vec<Frame>,
    under_way: usize,
    thread: Option<JoinHandle<()>>,
}

impl Filler {
    /// For data connection `index`, from 0.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub(super) fn start(index: usize, ram: Ram, counters: Arc<Counters>) -> Result<Self, Error> {
        let (frames, queue) = bounded::<Frame>(FRAMES);
        let (tell, done) = bounded(FRAMES);
        let body = move || {
            for frame in queue {
                let filled = fill(&ram, &counters, &frame).map(|()| frame);
                let failed = filled.is_err();
                if tell.send(filled).is_err() || failed {
                    return;
                }
            }
        };
        let thread = Some(spawn("repl-fill", Some(index), body)?);
        let idle = (0..FRAMES).map(|_| Frame::default()).collect();
        Ok(Self { frames: Some(frames), done, idle, under_way: 0, thread })
    }

    /// Room for a frame; waits while all of it is under way.
    ///
    /// # Errors
    /// [`ApplyError`] of an earlier frame.
    pub(super) fn room(&mut self) -> Result<Frame, ApplyError> {
        self.idle.pop().map_or_else(|| self.next(), Ok)
    }

    /// Has a frame written, whose room came from [`Filler::room`].
    pub(super) fn fill(&mut self, frame: Frame) {
        self.under_way += 1;
        // A thread that has ended has left its error to be found.
        let _ = self.frames.as_ref().map(|frames| frames.send(frame));
    }

    /// Waits until the image has all frames.
    ///
    /// # Errors
    /// [`ApplyError`] of one of them.
    pub(super) fn settle(mut self) -> Result<(), ApplyError> {
        while self.under_way > 0 {
            self.next()?;
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Frame, ApplyError> {
        self.under_way -= 1;
        self.done.recv().expect("each frame is answered, the last one by an error")
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        self.frames = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("A thread that fills the image panicked");
        }
    }
}

fn fill(ram: &Ram, counters: &Counters, frame: &Frame) -> Result<(), ApplyError> {
    let mut pages = 0;
    for run in &frame.runs {
        pages += u64::from(run.count);
        if frame.is_fresh {
            ram.populate(run.first, run.count.into());
        }
    }
    apply(ram, &frame.runs, &frame.bytes)?;
    counters.synced_pages.fetch_add(pages, Ordering::Relaxed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{PAGE_SIZE, PageIndex};
    use crate::testing::memory;
    use crate::wire::Encoding;

    fn page(filler: &mut Filler, first: u64, content: u8) -> Result<(), ApplyError> {
        let mut frame = filler.room()?;
        frame.runs.clear();
        frame.runs.push(Run { first: PageIndex(first), count: 1, encoding: Encoding::Raw });
        frame.bytes.resize(PAGE_SIZE, 0);
        frame.bytes.fill(content);
        frame.is_fresh = content.is_multiple_of(2);
        filler.fill(frame);
        Ok(())
    }

    #[test]
    fn all_is_in_the_image_in_order_once_it_settled() {
        let ram = memory(&[(0, 8)]);
        let counters = Arc::<Counters>::default();
        for settled in [true, false] {
            let mut filler = Filler::start(0, ram.clone(), Arc::clone(&counters)).unwrap();
            for content in 0..200 {
                page(&mut filler, u64::from(content % 8), content).unwrap();
            }
            // Its end waits, too.
            if settled {
                filler.settle().unwrap()
            } else {
                drop(filler)
            }
            let mut bytes = [0; PAGE_SIZE];
            for at in 0..8 {
                assert!(ram.read_page(PageIndex(at), &mut bytes));
                assert_eq!(u64::from(bytes[PAGE_SIZE - 1]), 192 + at);
                assert!(ram.write_page(PageIndex(at), &[0; PAGE_SIZE]));
            }
        }
        assert_eq!(counters.synced_pages.load(Ordering::Relaxed), 400);
    }

    #[test]
    fn what_cannot_be_written_is_told() {
        let ram = memory(&[(0, 8)]);
        let mut filler = Filler::start(0, ram.clone(), Arc::default()).unwrap();
        page(&mut filler, 8, 1).unwrap();
        assert!((0..=FRAMES).any(|_| page(&mut filler, 0, 1).is_err()));
        let mut filler = Filler::start(0, ram, Arc::default()).unwrap();
        page(&mut filler, 8, 1).unwrap();
        assert!(filler.settle().is_err());
    }
}
