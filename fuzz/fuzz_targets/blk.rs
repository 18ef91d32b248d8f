#![no_main]

libfuzzer_sys::fuzz_target!(|input: understudy_fuzz::blk::Input| understudy_fuzz::blk::run(input));
