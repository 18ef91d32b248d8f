//! The test guest on a real `/dev/kvm`, in the least machine that can run it.

mod machine;
mod verdict;
mod workloads;
