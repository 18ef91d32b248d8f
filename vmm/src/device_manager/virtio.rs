//! Which virtio devices a configuration asks for, in the order of their slots.
//!
//! The first one gets slot 1, and the order is a part of what a guest sees: a device is in the
//! same slot at each boot, after a restore and on the backup.

use std::sync::Arc;

use api::config::VmConfig;
use devices::virtio::device::VirtioDevice;
use devices::virtio::rng::Rng;

use super::pci::PciError;

const RNG_ID: &str = "__rng";

/// Makes the devices; none of them has taken anything of the host yet.
pub fn devices(config: &VmConfig) -> Result<Vec<Arc<dyn VirtioDevice>>, PciError> {
    let made = |source| PciError::Make { id: RNG_ID.into(), source };
    let rng = Rng::new(RNG_ID, config.rng.src.clone()).map_err(made)?;
    Ok(vec![Arc::new(rng)])
}
