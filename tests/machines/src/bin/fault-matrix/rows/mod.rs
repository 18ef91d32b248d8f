//! All rows, in the order of the table.
//!
//! - [`steps`]: a process is killed or hangs at a step of the protocol
//! - [`claims`]: both live, and one dies or hangs on its way to the ownership
//! - [`handovers`]: a host is lost in a switch-over
//! - [`switches`]: what is asked during a switch-over, and a host that is lost right after it
//! - [`kinds`]: a host is killed in pairs of other kinds
//! - [`frozen`]: a process stands still for longer than the time-out, and wakes
//! - [`cuts`]: the network between hosts and arbiter
//! - [`second`]: a process is killed at a step of a later pair
//! - [`asking`]: the arbiter is lost, or hears and is not heard, as it is asked
//! - [`directory`]: the arbiter's directory fails as it is asked
//! - [`storage`]: the images of the disks
//! - [`clocks`]: wall clocks that jump
//! - [`life`]: what a person or the guest does to a VM that is protected

mod asking;
mod claims;
mod clocks;
mod cuts;
mod directory;
mod frozen;
mod handovers;
mod kinds;
mod life;
mod second;
mod steps;
mod storage;
mod switches;

use crate::row::Row;

pub fn all() -> Vec<Row> {
    let mut rows = steps::rows();
    rows.extend(claims::rows());
    rows.extend(handovers::rows());
    rows.extend(switches::rows());
    rows.extend(kinds::rows());
    rows.extend(frozen::rows());
    rows.extend(cuts::rows());
    rows.extend(asking::rows());
    rows.extend(directory::rows());
    rows.extend(storage::rows());
    rows.extend(clocks::rows());
    rows.extend(life::rows());
    rows.extend(second::rows());
    rows
}
