#![no_main]

libfuzzer_sys::fuzz_target!(|input: understudy_fuzz::net::Input| understudy_fuzz::net::run(input));
