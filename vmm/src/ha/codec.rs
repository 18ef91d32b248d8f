//! The binary form of an epoch's machine state: a version, then postcard.
//!
//! Fields of [`MachineState`] are positional in postcard, so any change of them is a new version.

use replication::guest::GuestError;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::machine::MachineState;

/// The version of the layout that this build writes and reads.
const VERSION: u16 = 3;

/// An epoch's machine state is not usable.
#[derive(Debug, Error)]
pub enum CodecError {
    #[error("The machine state has version {found}, this build reads {VERSION}")]
    Version { found: u16 },
    #[error("The machine state is cut short")]
    Short,
    #[error("The machine state has {0} bytes too many")]
    Trailing(usize),
    #[error("The machine state cannot be encoded")]
    Encode(#[source] postcard::Error),
    #[error("The machine state cannot be decoded")]
    Decode(#[source] postcard::Error),
}

/// What a seal captured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Captured {
    pub machine: MachineState,
    /// A person had paused the VM: it stays paused after a take-over.
    pub paused: bool,
}

impl replication::guest::MachineState for Captured {
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        out.extend_from_slice(&VERSION.to_le_bytes());
        postcard::to_io(self, out).map_err(CodecError::Encode)?;
        Ok(())
    }
}

/// The state behind the bytes of one epoch.
pub fn decode(bytes: &[u8]) -> Result<Captured, CodecError> {
    let (version, body) = bytes.split_first_chunk::<2>().ok_or(CodecError::Short)?;
    let found = u16::from_le_bytes(*version);
    if found != VERSION {
        return Err(CodecError::Version { found });
    }
    let (captured, rest) = postcard::take_from_bytes(body).map_err(CodecError::Decode)?;
    if rest.is_empty() { Ok(captured) } else { Err(CodecError::Trailing(rest.len())) }
}

#[cfg(test)]
pub(super) mod tests {
    use devices::serial::SerialState;
    use hypervisor::VmState;
    use replication::guest::MachineState as _;

    use super::*;
    use devices::pci::config::ConfigState;
    use devices::pci::msix::MsixState;
    use devices::pci::virtio::{CommonState, VirtioPciState};
    use devices::virtio::console::state::ConsoleState;
    use devices::virtio::state::DeviceState;

    use crate::device_manager::pci::PciState;
    use crate::device_manager::{DevicesState, PlatformState};

    /// Bytes of the kernel's `struct kvm_irqchip`, which begins with its number.
    const IRQCHIP_BYTES: usize = 520;

    fn vm_state() -> VmState {
        // The clock, then each controller behind its length.
        let mut bytes = postcard::to_allocvec(&0_u64).unwrap();
        for id in 0..3_u8 {
            let mut chip = vec![0; IRQCHIP_BYTES];
            chip[0] = id;
            bytes.extend(postcard::to_allocvec(&chip).unwrap());
        }
        postcard::from_bytes(&bytes).unwrap()
    }

    /// What a machine without vCPUs would capture.
    pub fn captured(serial: bool) -> Captured {
        let platform = PlatformState {
            serial: serial.then(SerialState::default),
            pm: devices::acpi::pm::PmState::default(),
            cmos: devices::legacy::cmos::CmosState::default(),
            i8042: devices::legacy::i8042::I8042State::default(),
            wish: None,
        };
        let pci = PciState {
            address: 0,
            bridge: ConfigState { registers: vec![0; 64] },
            functions: vec![],
        };
        let devices = DevicesState { platform, pci };
        let machine = MachineState { vcpus: vec![], vm: vm_state(), devices };
        Captured { machine, paused: true }
    }

    /// What a console without a driver would add to that.
    pub fn console_function() -> VirtioPciState {
        let common = CommonState {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: 0xffff,
            status: 0,
            config_generation: 0,
            isr: 0,
            queue_select: 0,
            queues: vec![],
        };
        VirtioPciState {
            id: "__console".into(),
            slot: 2,
            config: ConfigState { registers: vec![0; 64] },
            msix: MsixState { entries: vec![] },
            common,
            device: DeviceState::Console(ConsoleState::default()),
        }
    }

    fn encoded() -> Vec<u8> {
        let mut bytes = Vec::new();
        captured(true).encode(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_was_captured_is_decoded() {
        let decoded = decode(&encoded()).unwrap();
        assert!(decoded.paused && decoded.machine.vcpus.is_empty());
        assert_eq!(decoded.machine.devices, captured(true).machine.devices);
    }

    #[test]
    fn another_version_is_refused_unread() {
        let mut bytes = encoded();
        bytes[0] = 7;
        assert!(matches!(decode(&bytes), Err(CodecError::Version { found: 7 })));
        bytes.truncate(2);
        assert!(matches!(decode(&bytes), Err(CodecError::Version { found: 7 })));
    }

    #[test]
    fn every_cut_is_refused() {
        let bytes = encoded();
        assert!(matches!(decode(&[]), Err(CodecError::Short)));
        assert!(matches!(decode(&bytes[..1]), Err(CodecError::Short)));
        for end in 2..bytes.len() {
            let refused = decode(&bytes[..end]);
            assert!(matches!(refused, Err(CodecError::Decode(_))), "{end} bytes");
        }
    }

    #[test]
    fn bytes_behind_the_state_are_refused() {
        let mut bytes = encoded();
        bytes.extend([0; 3]);
        assert!(matches!(decode(&bytes), Err(CodecError::Trailing(3))));
    }
}
