#![no_main]

libfuzzer_sys::fuzz_target!(|input: understudy_fuzz::wire::Input| understudy_fuzz::wire::run(
    input
));
