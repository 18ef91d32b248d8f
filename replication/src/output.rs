//! The rule that output follows. The bytes themselves are held in the VMM, behind
//! [`crate::guest::Guest`]'s `hold_output`, `seal_output`, `commit_output` and `pass_output`.
//!
//! ```text
//!  first sync     | hold_output      seal(1)      seal(2)     ack(1)        ack(2)
//!  ---------------+-------------------+------------+-----------+-------------+------->
//!  leaves at once | tagged 1 ...      | tagged 2 ..|           | 1 leaves    | 2 leaves
//! ```
//!
//! - Output is held from the moment that the arbiter's record says PAIR, before the first seal.
//! - What the guest sent before seal n is tagged n before the guest runs again.
//! - Tag n leaves on ack(n) of the record's generation, and on nothing else.
//! - Everything leaves once the record says that this host owns the VM alone.
//! - Nothing leaves when the peer owns it: the VM is destroyed with what it held.
//!
//! [`crate::protocol::primary`] decides each of these; the engine carries them out in order.
