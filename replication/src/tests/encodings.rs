//! Pages on the wire as deltas and as LZ4 blocks.

use std::sync::atomic::Ordering;

use api::replication::{Compression, Cow};

use super::pair::{Backup, Primary, Proxy};
use super::scripted::Script;
use super::{Random, Workers, receive_options, replicate, small_machine, until};
use crate::encode::lz4::Compressor;
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::observer::Event;
use crate::ownership::HostIdentity;
use crate::testing::{Machine, MemoryBuilder, checksum, counters, memory};
use crate::wire::Encoding;

/// `epochs` with a guest that writes and sends a little of each page; returns the bytes of pages
/// and of the wire, of what came after the first copy.
fn replicated(compression: Compression, connections: u32, cow: Cow, epochs: u64) -> (u64, u64) {
    let backup = Backup::start(None);
    let machine = small_machine();
    let workers = Workers::start(&machine, 4, 1);
    let mut options = replicate(&backup.url(), None);
    (options.compression, options.connections, options.cow) = (compression, connections, cow);
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    let before = primary.handle.info();
    let after = until(|| primary.handle.info(), |info| info.epoch_committed >= epochs);
    primary.handle.failover(false).unwrap();
    primary.handle.join();
    workers.join();
    assert_eq!(backup.wrong(), Vec::<String>::new(), "{compression:?}");
    assert!(backup.log.compared.load(Ordering::Acquire) >= epochs, "{compression:?}");
    let image = backup.log.started.lock().unwrap().clone().unwrap();
    assert_eq!(checksum(&image), checksum(machine.ram()), "{compression:?}");
    (after.bytes_raw - before.bytes_raw, after.bytes_sent - before.bytes_sent)
}

#[test]
fn the_image_is_the_primary_s_at_every_seal_with_each_encoding() {
    for connections in [1, 3] {
        replicated(Compression::None, connections, Cow::Hybrid, 300);
        replicated(Compression::Auto, connections, Cow::Hybrid, 600);
        // Pages that are mostly zero compress well.
        let (raw, sent) = replicated(Compression::Lz4, connections, Cow::Hybrid, 600);
        assert!(sent * 2 < raw, "{sent} of {raw}");
        let (raw, sent) = replicated(Compression::Delta, connections, Cow::Hybrid, 1000);
        assert!(sent * 3 < raw, "{sent} of {raw}");
    }
}

#[test]
fn deltas_are_of_the_seal_in_each_way_of_keeping_pages() {
    for cow in [Cow::Off, Cow::Copy] {
        let (raw, sent) = replicated(Compression::Delta, 2, cow, 300);
        assert!(sent < raw, "{sent} of {raw}");
    }
}

#[test]
fn cut_at_random_moments_deltas_leave_a_whole_image() {
    let mut random = Random(0xDE17A);
    let mut takeovers = 0;
    for seed in 0..16 {
        let dir = tempfile::tempdir().unwrap();
        let backup = Backup::start(Some(dir.path()));
        let proxy = Proxy::plain(backup.port());
        let machine = small_machine();
        let workers = Workers::start(&machine, 3, seed);
        let mut options = replicate(&proxy.url(), Some(dir.path()));
        options.compression = Compression::Delta;
        let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
        let epochs = 30 + random.next() % 30;
        until(|| primary.handle.info(), |info| info.epoch_committed >= epochs);
        if seed % 2 == 0 {
            proxy.cut();
        } else {
            backup.handle.failover(false).unwrap();
        }
        primary.handle.join();
        let is_taken = machine.is_destroyed();
        if is_taken {
            backup.handle.join();
            takeovers += 1;
            let image = backup.log.started.lock().unwrap().clone().expect("the replica runs");
            let has = counters(&image);
            assert!(has.iter().zip(machine.released()).all(|(has, heard)| *has >= heard));
        }
        machine.power_off();
        workers.join();
        // The image at the take-over is that of the last acknowledged seal.
        assert_eq!(backup.wrong(), Vec::<String>::new(), "seed {seed}");
    }
    assert!(takeovers >= 8, "{takeovers}");
}

fn write(machine: &Machine, pages: std::ops::Range<u64>, content: impl Fn(u64) -> [u8; PAGE_SIZE]) {
    machine.run(|ram| {
        pages.for_each(|page| assert!(ram.write_page(PageIndex(page), &content(page))));
    });
}

/// Between two epochs all pages go over another way: what was sent before is not in the image.
#[test]
fn after_a_copy_anew_deltas_are_against_what_was_sent_since() {
    let mut options = receive_options(None);
    options.staging_size = 1 << 20;
    let builder = MemoryBuilder { lenient: true, ..MemoryBuilder::default() };
    let backup = Backup::with(builder, options);
    let machine = Machine::new(memory(&[(0, 1024)]));
    let mut options = replicate(&backup.url(), None);
    options.compression = Compression::Delta;
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    // All that was written is committed, and nothing is under way.
    let settle = || {
        let said = machine.work(0, PageIndex(0), 0).unwrap();
        let heard = || machine.released().first().copied().unwrap_or(0);
        until(|| primary.handle.info(), |_| heard() >= said)
    };
    for round in 1..4u8 {
        write(&machine, 1..200, |_| [round; PAGE_SIZE]);
        settle();
    }
    // 4 MiB at once, where 1 MiB can be staged.
    write(&machine, 1..1024, |page| {
        let mut content = [9; PAGE_SIZE];
        content[..8].copy_from_slice(&page.to_le_bytes());
        content
    });
    primary.events.wait(|event| *event == Event::Resynced).unwrap();
    settle();
    // Against the content of before the copy, this would be one byte.
    write(&machine, 1..200, |page| {
        let mut content = [3; PAGE_SIZE];
        content[usize::try_from(page).unwrap()] = 4;
        content
    });
    let before = settle();
    write(&machine, 1..200, |page| {
        let mut content = [3; PAGE_SIZE];
        content[usize::try_from(page).unwrap()] = 5;
        content
    });
    let info = settle();
    let (raw, sent) = (info.bytes_raw - before.bytes_raw, info.bytes_sent - before.bytes_sent);
    assert!(raw > 190 * 4096 && sent * 10 < raw, "deltas again: {sent} of {raw}");
    primary.handle.failover(false).unwrap();
    primary.handle.join();
    let image = backup.log.started.lock().unwrap().clone().unwrap();
    assert_eq!(checksum(&image), checksum(machine.ram()));
}

/// A page with content, in the first epoch, and then `contents` for it and the page after it.
fn hostile(encoding: Encoding, contents: &[u8], text: &str) {
    let mut script = Script::start();
    script.pages(1, 3..5);
    script.end(1);
    script.seal(1, 1, 2);
    script.acked(1);
    // A good page comes first: nothing of the frame is taken.
    let contents = [&[0xCD; PAGE_SIZE][..], contents].concat();
    script.frame(2, &[(3..4, Encoding::Raw), (4..5, encoding)], &contents);
    script.hears_abort(text);
    script.backup.handle.failover(true).unwrap();
    let image = script.backup.log.started.lock().unwrap().clone().unwrap();
    let mut page = [0; PAGE_SIZE];
    for number in 3..5 {
        assert!(image.read_page(PageIndex(number), &mut page));
        assert!(page == [0xAB; PAGE_SIZE], "page {number} after {text}");
    }
}

fn with_length(content: &[u8]) -> Vec<u8> {
    [&u16::try_from(content.len()).unwrap().to_le_bytes()[..], content].concat()
}

#[test]
fn a_bad_delta_is_refused_and_the_image_untouched() {
    let delta = |delta: &[u8], text| hostile(Encoding::Delta, &with_length(delta), text);
    delta(&[0xFF, 0x1F, 2, 9, 9], "ends outside of its page");
    delta(&[1, 1, 9, 0, 1, 9], "two ranges for one");
    delta(&[1, 3, 9], "without the bytes of a range");
    delta(&[0; 2049], "too long");
    let contents = |contents: &[u8], text| hostile(Encoding::Delta, contents, text);
    contents(&[7, 0, 1, 1, 9], "length of the contents");
    contents(&[3, 0, 1, 1, 9, 9], "bytes left over");
    contents(&[1], "length of the contents");
}

#[test]
fn a_bad_block_is_refused_and_the_image_untouched() {
    let block = |block: &[u8], text| hostile(Encoding::Lz4, &with_length(block), text);
    let of = |bytes: usize| lz4_flex::block::compress(&vec![7; bytes]);
    block(&of(PAGE_SIZE + 1), "broken or more than a page");
    block(&of(1 << 18), "broken or more than a page");
    block(&of(100), "less than a page");
    block(&[0; 3585], "too long");
}

#[test]
fn good_deltas_and_blocks_of_a_peer_are_applied_in_order() {
    let mut script = Script::start();
    script.pages(1, 3..6);
    script.end(1);
    script.seal(1, 1, 3);
    script.acked(1);
    let mut block = Vec::new();
    assert!(Compressor::default().compress(&[0xEE; PAGE_SIZE], &mut block));
    // The last byte of one page, nothing of the next, a whole other.
    let contents = [with_length(&[0xFF, 0x1F, 1, 9]), with_length(&[]), with_length(&block)];
    let runs = [(3..5, Encoding::Delta), (5..6, Encoding::Lz4)];
    script.frame(2, &runs, &contents.concat());
    script.end(2);
    script.seal(2, 1, 3);
    script.acked(2);
    let delta = with_length(&[0xFE, 0x1F, 1, 8]);
    script.frame(3, &[(3..4, Encoding::Delta), (4..5, Encoding::Zero)], &delta);
    script.end(3);
    script.seal(3, 1, 2);
    script.acked(3);
    let Script { backup, .. } = script;
    until(|| backup.handle.info(), |info| info.last_error.is_some());
    backup.handle.failover(true).unwrap();
    let image = backup.log.started.lock().unwrap().clone().unwrap();
    let read = |number| {
        let mut page = [0; PAGE_SIZE];
        assert!(image.read_page(PageIndex(number), &mut page));
        page
    };
    let first = read(3);
    assert!(first[..4094] == [0xAB; 4094] && first[4094..] == [8, 9]);
    assert!(read(4) == [0; PAGE_SIZE] && read(5) == [0xEE; PAGE_SIZE]);
}

#[test]
fn staging_holds_pages_however_small_they_were_on_the_wire() {
    let mut script = Script::start();
    let mut block = Vec::new();
    assert!(Compressor::default().compress(&[0xEE; PAGE_SIZE], &mut block));
    let contents = with_length(&block).repeat(64);
    for from in (0..17).map(|frame| frame * 64) {
        script.frame(1, &[(from..from + 64, Encoding::Lz4)], &contents);
    }
    script.aborted("exceeds the staging");
}

/// What an epoch of deltas takes is what its deltas take.
#[test]
fn an_epoch_of_deltas_fits_a_small_staging() {
    let mut options = receive_options(None);
    options.staging_size = 1 << 20;
    let backup = Backup::with(MemoryBuilder::default(), options);
    let mut script = Script::greeted(backup, super::scripted::offer());
    script.say(&crate::wire::Message::Paired(crate::ids::Generation(1)));
    let contents = with_length(&[0, 1, 7]).repeat(64);
    for from in (0..16).map(|frame| frame * 64) {
        script.frame(1, &[(from..from + 64, Encoding::Delta)], &contents);
    }
    script.end(1);
    script.seal(1, 1, 1024);
    script.acked(1);
}

/// What the pages of the measurement below become in each epoch.
fn rewrite(machine: &Machine, work: &str, epoch: u64) {
    write(machine, 1..1001, |page| {
        let mut content = [0; PAGE_SIZE];
        let mut state = page.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let is_new = ["noise", "new text"].contains(&work);
        state ^= if is_new { epoch << 20 } else { 0 };
        for (at, byte) in content.iter_mut().enumerate() {
            if !work.ends_with("text") || at % 8 == 0 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
            }
            *byte = state.to_le_bytes()[3];
        }
        let fill = if work.ends_with("text") { epoch } else { page };
        content[..8].copy_from_slice(&fill.to_le_bytes());
        if !is_new {
            content[512..576].fill(epoch.to_le_bytes()[0]);
        }
        content
    });
}

/// `cargo test --release -p replication --lib costs_of_an_epoch -- --ignored --nocapture`: commit
/// latency of epochs of 1000 pages, and their bytes, over loopback and over a slow link. Over a link that
/// the kernel makes slow: the same with `loopback` alone, in a namespace whose loopback is (`unshare -n`,
/// `tc qdisc add dev lo root tbf rate 400mbit burst 256kb latency 50ms`).
#[test]
#[ignore = "measures, asserts nothing"]
fn costs_of_an_epoch() {
    let all = [Compression::None, Compression::Auto, Compression::Delta, Compression::Lz4];
    for megabytes_s in [0, 100] {
        for work in ["noise", "64 bytes", "text", "new text"] {
            for round in 0..5 {
                for compression in all {
                    let (us, bytes, first) = epoch_costs(compression, megabytes_s << 20, work);
                    let link = if megabytes_s == 0 { "loopback" } else { "100 MB/s" };
                    println!(
                        "{link} {work:9} {round} {compression:5?} {us:6} us {bytes:8} bytes {first:?}"
                    );
                }
            }
        }
    }
}

/// Median commit latency in microseconds, bytes of an epoch, and KB of the first ones in turn.
fn epoch_costs(compression: Compression, bytes_s: u64, work: &str) -> (u64, u64, Vec<u64>) {
    const EPOCHS: u64 = 60;
    let mut options = receive_options(None);
    options.staging_size = 64 << 20;
    let builder = MemoryBuilder { lenient: true, ..MemoryBuilder::default() };
    let backup = Backup::with(builder, options);
    let link = (bytes_s > 0).then(|| Proxy::slow(backup.port(), bytes_s));
    let url = link.as_ref().map_or_else(|| backup.url(), Proxy::url);
    let machine = Machine::new(memory(&[(0, 2048)]));
    rewrite(&machine, work, 0);
    let mut options = replicate(&url, None);
    (options.compression, options.connections, options.epoch_ms) = (compression, 1, 1000);
    options.epoch_min_ms = 1;
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    let (mut times, mut first, mut start) = (vec![], vec![], 0);
    for epoch in 1..=EPOCHS {
        if epoch == EPOCHS / 2 {
            start = primary.handle.info().bytes_sent;
        }
        let info = primary.handle.info();
        let (before, sent) = (info.epoch_committed, info.bytes_sent);
        rewrite(&machine, work, epoch);
        machine.work(0, PageIndex(0), 0).unwrap();
        let info = until(|| primary.handle.info(), |info| info.epoch_committed > before);
        if epoch <= 8 {
            first.push((info.bytes_sent - sent) / 1000);
        }
        if epoch >= EPOCHS / 2 {
            times.push(info.commit_latency_us.last);
        }
    }
    let bytes = (primary.handle.info().bytes_sent - start) / (EPOCHS / 2 + 1);
    primary.handle.stop().unwrap();
    times.sort_unstable();
    (times[times.len() / 2], bytes, first)
}
