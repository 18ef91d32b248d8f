//! ACPI with reduced hardware (ACPI 6.5, section 4.1): what a guest sees of power management.

mod dsdt;
/// Sleep, reset and event registers.
pub mod pm;
/// Builds the tables.
pub mod tables;
