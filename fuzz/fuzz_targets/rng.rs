#![no_main]

libfuzzer_sys::fuzz_target!(|input: understudy_fuzz::rng::Input| understudy_fuzz::rng::run(input));
