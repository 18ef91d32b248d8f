//! Interrupt routes: which pin or message an interrupt line of the VM (GSI) stands for.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_irq_routing_entry,
};

/// Pins of the IOAPIC, and so the GSIs below which messages have no place.
pub const IOAPIC_PINS: u32 = 24;
/// Pins of one PIC.
const PIC_PINS: u32 = 8;

/// One interrupt line and where it leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A pin of the IOAPIC, and of the PICs for lines below 16.
    Pin { gsi: u32 },
    /// A message, as a PCI function's MSI-X entry holds it.
    Message { gsi: u32, address: u64, data: u32 },
}

impl Route {
    pub(crate) fn entries(self) -> impl Iterator<Item = kvm_irq_routing_entry> {
        let (first, second) = match self {
            Self::Pin { gsi } => (pin(gsi, KVM_IRQCHIP_IOAPIC, gsi), pic(gsi)),
            Self::Message { gsi, address, data } => (message(gsi, address, data), None),
        };
        [Some(first), second].into_iter().flatten()
    }
}

fn pic(gsi: u32) -> Option<kvm_irq_routing_entry> {
    if gsi < PIC_PINS {
        Some(pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi))
    } else if gsi < 2 * PIC_PINS {
        Some(pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - PIC_PINS))
    } else {
        None
    }
}

fn pin(gsi: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    entry
}

fn message(gsi: u32, address: u64, data: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    (entry.u.msi.address_lo, entry.u.msi.address_hi) = halves(address);
    entry.u.msi.data = data;
    entry
}

/// The low and the high 32 bits of an address.
pub(crate) fn halves(address: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_low_pin_reaches_pic_and_ioapic() {
        let chips: Vec<_> = Route::Pin { gsi: 12 }
            .entries()
            .map(|entry| {
                assert_eq!(entry.gsi, 12);
                // SAFETY: the entry was built as an interrupt controller's.
                let chip = unsafe { entry.u.irqchip };
                (chip.irqchip, chip.pin)
            })
            .collect();
        assert_eq!(chips, [(KVM_IRQCHIP_IOAPIC, 12), (KVM_IRQCHIP_PIC_SLAVE, 4)]);
        assert_eq!(Route::Pin { gsi: 16 }.entries().count(), 1);
    }

    #[test]
    fn an_address_splits_into_halves() {
        assert_eq!(halves(0x1122_3344_5566_7788), (0x5566_7788, 0x1122_3344));
    }
}
