//! What `vmm.ping`, `vm.info` and `vm.counters` answer.

use std::collections::BTreeMap;

use api::response::{VmCounters, VmInfo, VmState, VmmPingResponse};
use serde::Serialize;

use super::{Answer, Controller};
use crate::device_manager::Devices;
use crate::request::{Failure, FailureKind, Reply};

/// A value as the body of a 200.
pub(super) fn json<T: Serialize>(value: &T) -> Answer {
    serde_json::to_string(value)
        .map(Reply::Json)
        .map_err(|error| Failure::from_error(FailureKind::Internal, &error))
}

pub(super) fn ping() -> Answer {
    let rdma = replication::HAS_RDMA.then_some("rdma");
    let features = ["kvm", "replication"].into_iter().chain(rdma);
    json(&VmmPingResponse::new(std::process::id(), features.map(str::to_owned).collect()))
}

impl Controller {
    pub(super) fn info(&self) -> Answer {
        // A backup before its take-over shows what it is ready to be, as a VM that does not run.
        let waiting = self.protection.replica();
        let shown = self.machine.as_ref().or(waiting.as_ref());
        let config = shown.map(|machine| machine.config()).or(self.config.as_ref());
        let mut config = config.cloned().ok_or_else(super::lifecycle::no_vm)?;
        // Clients read the names of the terminals from here.
        let devices = self.machine.as_ref().map(|machine| machine.devices());
        if let Some(pty) = devices.and_then(Devices::serial_pty) {
            config.serial.file = Some(pty);
        }
        if let Some(pty) = devices.and_then(Devices::console_pty) {
            config.console.file = Some(pty);
        }
        let state = match &self.machine {
            Some(_) if self.guest_is_down => VmState::Shutdown,
            Some(machine) if machine.is_paused() => VmState::Paused,
            Some(_) => VmState::Running,
            None => VmState::Created,
        };
        let memory_actual_size = config.memory.size;
        let device_tree = shown.map(|machine| machine.devices().tree());
        json(&VmInfo { config, state, memory_actual_size, device_tree })
    }

    pub(super) fn counters(&self) -> Answer {
        let machine = self.running()?;
        let mut all: VmCounters = machine.devices().counters();
        if let Some(info) = self.protection.info() {
            let own: BTreeMap<String, u64> = [
                ("generation", info.generation),
                ("epoch_sealed", info.epoch_sealed),
                ("epoch_committed", info.epoch_committed),
                ("pause_us_max", info.pause_us.max),
                ("commit_latency_us_max", info.commit_latency_us.max),
                ("cow_faults", info.cow_faults),
                ("cow_ahead", info.cow_ahead),
                ("cow_copied", info.cow_copied),
                ("cow_protected", info.cow_protected),
                ("throttled_us", info.throttled_us),
                ("bytes_sent", info.bytes_sent),
                ("bytes_raw", info.bytes_raw),
                ("output_held_bytes", info.output_held_bytes),
            ]
            .map(|(name, value)| (name.to_owned(), value))
            .into();
            all.insert("__replication".into(), own);
        }
        json(&all)
    }
}
