//! The protocol's core: pure state machines. No I/O, no clock, no thread, no unsafe.
//!
//! Enters: events, time among them. Leaves: actions, which the engines carry out in order.
//! Always holds, whatever the order of events:
//!
//! - a primary commits epoch n only on ack(n) of its generation, lets everything out only after a
//!   won claim or before any output of its session was held, and destroys its guest only once the record
//!   says that the backup owns it;
//! - a backup never acknowledges again once it has claimed, and starts only after a won claim (or
//!   a person's word where there is no arbiter), from the last epoch that it acknowledged;
//! - a primary writes the backup's memory only while that is open to it, and a backup acknowledges nothing
//!   before it is closed again ([`window`]), no more of it than is open, and never again once something went
//!   another way ([`advance`]).
//!
//! Why acks that a stopped and woken primary finds in its socket are good: the backup sent them
//! before it stopped acknowledging, and whatever it starts from is that epoch or a later one, so
//! the output that they release is output of the state that goes on. What the guest sent since
//! belongs to epochs without an ack and stays held until the claim, which is lost, destroys it.

pub mod advance;
pub mod asking;
pub mod backup;
pub mod ownership;
pub mod primary;
pub mod window;
