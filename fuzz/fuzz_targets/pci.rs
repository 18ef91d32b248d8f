#![no_main]

libfuzzer_sys::fuzz_target!(|input: understudy_fuzz::pci::Input| understudy_fuzz::pci::run(input));
