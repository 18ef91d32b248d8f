#![no_main]

use understudy_fuzz::console;

libfuzzer_sys::fuzz_target!(|input: console::Input| console::run(input));
