//! What one connection sends, made into an image as a backup does; what `auto` makes of links; and
//! what encodings take on this machine.

use std::time::{Duration, Instant};

use api::replication::Compression;
use proptest::prelude::*;

use super::*;
use crate::ids::PAGE_SIZE;
use crate::transport::Part;
use crate::wire::{Run, Runs, staged_bytes, take_content, unpack};

const PAGES: usize = 40;
/// Pages of the property below: so few that each is written again and again.
const FEW: usize = 8;

/// A connection without a wire: pages in, an image out.
struct Line {
    encoder: Encoder,
    image: Vec<Page>,
    sent: Vec<(PageIndex, Encoding)>,
    /// Bytes of contents.
    bytes: usize,
}

impl Line {
    fn new(compression: Compression) -> Self {
        let encoder = Encoder::new(compression, 1);
        Self { encoder, image: vec![[0; PAGE_SIZE]; PAGES], sent: vec![], bytes: 0 }
    }

    /// One frame of `pages` of `memory`; returns it as it is staged.
    fn frame(&mut self, memory: &[Page], pages: &[usize]) -> (Vec<Run>, Vec<u8>) {
        let (mut runs, mut kept) = (Runs::default(), vec![]);
        for number in pages {
            let page = PageIndex(*number as u64);
            let encoding = self.encoder.encode(page, &memory[*number]);
            assert!(runs.push(page, encoding));
            self.sent.push((page, encoding));
            if encoding == Encoding::Raw {
                kept.push(Part::from(&memory[*number][..]));
            }
        }
        let mut parts = vec![];
        self.encoder.contents(&kept, &mut parts);
        let contents: Vec<u8> =
            parts.iter().flat_map(|part: &Part<'_>| part.bytes).copied().collect();
        self.bytes += contents.len();
        let cost = staged_bytes(runs.as_slice(), &contents).unwrap();
        let (mut staged_runs, mut staged) = (vec![], vec![]);
        unpack(runs.as_slice(), &contents, &mut staged_runs, &mut staged).unwrap();
        assert_eq!(staged.len(), cost);
        assert!(cost <= kept.len().max(pages.len()) * PAGE_SIZE);
        (staged_runs, staged)
    }

    fn apply(&mut self, (runs, staged): (Vec<Run>, Vec<u8>)) {
        let mut rest = &staged[..];
        for run in runs {
            for number in run.first.0..run.first.0 + u64::from(run.count) {
                let page = &mut self.image[usize::try_from(number).unwrap()];
                let content = take_content(run.encoding, &mut rest).unwrap();
                match run.encoding {
                    Encoding::Zero => page.fill(0),
                    Encoding::Raw => page.copy_from_slice(content),
                    Encoding::Delta => delta::ranges(content).for_each(|range| {
                        let (at, new) = range.unwrap();
                        page[at..at + new.len()].copy_from_slice(new);
                    }),
                    Encoding::Lz4 => panic!("decoded before it was staged"),
                }
            }
        }
        assert!(rest.is_empty());
    }

    fn out(&mut self, took: Duration) {
        self.encoder.sent(64 * 4096, took);
    }

    fn count(&self, wanted: Encoding) -> usize {
        self.sent.iter().filter(|(_, encoding)| *encoding == wanted).count()
    }
}

fn any_compression() -> impl Strategy<Value = Compression> {
    prop_oneof![
        Just(Compression::Auto),
        Just(Compression::None),
        Just(Compression::Delta),
        Just(Compression::Lz4)
    ]
}

/// What the guest does to a page: nothing, a few bytes, much, all zero. There are few places and
/// few values, so that bytes are again what they were some epochs ago.
fn change(page: &mut Page, how: u8, at: usize, value: u8) {
    let (at, value) = (at % 8 * 512, value % 3);
    match how % 5 {
        0 => {}
        1 => page[at] = value,
        2 => page[at..PAGE_SIZE.min(at + 300)].fill(value),
        3 => page.iter_mut().zip(0u32..).for_each(|(byte, at)| {
            *byte = (at.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0] ^ value;
        }),
        _ => page.fill(0),
    }
}

proptest! {
    /// Two epochs are sent before the first is applied, now and then there is a copy anew, and
    /// `auto` changes its mind all the time.
    #[test]
    fn the_image_is_what_was_sent(
        compression in any_compression(),
        epochs in prop::collection::vec(
            (
                prop::collection::vec((0..FEW, any::<u8>(), any::<usize>(), any::<u8>()), 0..40),
                0u8..8,
                0u8..4,
            ),
            1..25,
        ),
    ) {
        let mut line = Line::new(compression);
        let mut memory = line.image.clone();
        let mut staged = vec![];
        for (number, (changes, kind, choice)) in epochs.into_iter().enumerate() {
            let is_copy = number == 0 || kind == 0;
            let mut pages: Vec<usize> = changes.iter().map(|(page, ..)| *page).collect();
            for (page, how, at, value) in changes {
                change(&mut memory[page], how, at, value);
            }
            pages.sort_unstable();
            pages.dedup();
            if is_copy {
                // What was in flight is gone.
                staged.clear();
                pages = (0..PAGES).collect();
            }
            if compression == Compression::Auto {
                line.encoder.choice = Choice { delta: choice & 1 == 1, lz4: choice & 2 == 2 };
            }
            line.encoder.begin(EpochId(if is_copy { 0 } else { number as u64 }));
            let frame = line.frame(&memory, &pages);
            line.out(Duration::ZERO);
            staged.push((frame, memory.clone()));
            let depth = if is_copy { 0 } else { usize::from(kind % 3) };
            while staged.len() > depth {
                let (frame, sealed) = staged.remove(0);
                line.apply(frame);
                prop_assert!(line.image == sealed, "epoch {}", number);
            }
        }
        let uses = |encoding| line.sent.iter().any(|(_, found)| *found == encoding);
        let (may_delta, may_lz4) = match compression {
            Compression::Auto => (true, true),
            Compression::None => (false, false),
            Compression::Delta => (true, false),
            Compression::Lz4 => (false, true),
        };
        prop_assert!(may_delta || !uses(Encoding::Delta));
        prop_assert!(may_lz4 || !uses(Encoding::Lz4));
    }

    #[test]
    fn random_contents_never_panic(
        runs in prop::collection::vec((0u64..100, 1u32..5, 0usize..4), 1..8),
        contents in prop::collection::vec(any::<u8>(), 0..9000),
        lengths in prop::collection::vec((0usize..9000, 0u8..12), 0..6),
    ) {
        let mut contents = contents;
        for (at, length) in lengths {
            if let Some([low, high]) = contents.get_mut(at..at + 2) {
                (*low, *high) = (length, 0);
            }
        }
        let all = [Encoding::Zero, Encoding::Raw, Encoding::Delta, Encoding::Lz4];
        let runs: Vec<_> = runs.iter().map(|(first, count, encoding)| {
            Run { first: PageIndex(*first), count: *count, encoding: all[*encoding] }
        }).collect();
        let (mut staged_runs, mut staged) = (vec![], vec![]);
        let cost = staged_bytes(&runs, &contents);
        let done = unpack(&runs, &contents, &mut staged_runs, &mut staged);
        if let (Ok(cost), Ok(())) = (cost, done) {
            prop_assert_eq!(cost, staged.len());
        }
    }
}

/// Text-like pages that LZ4 halves at least, and that change a little between two epochs.
fn memory(epoch: u32) -> Vec<Page> {
    let page = |number: usize| {
        let mut page = [0; PAGE_SIZE];
        for (at, byte) in page.iter_mut().enumerate() {
            let word = (at / 4 % 97) * (number + 3);
            *byte = (word.to_le_bytes()[0] & 0x1F) + 1;
        }
        page[..4].copy_from_slice(&(epoch + 1).to_le_bytes());
        page
    };
    (0..PAGES).map(page).collect()
}

/// Sends epochs, in each all pages under 64 numbers so that the samples are among them, over a link
/// that takes so long for a page.
fn epochs(line: &mut Line, first: u32, count: u32, ns_of_page: u64) {
    for epoch in first..first + count {
        let memory = memory(epoch);
        line.encoder.begin(EpochId((epoch + 1).into()));
        for frame in 0..32u64 {
            let mut kept = vec![];
            let mut bytes = 0;
            for number in 0..PAGES as u64 {
                let page = PageIndex(frame * 64 + number);
                let content = &memory[usize::try_from(number).unwrap()];
                let encoding = line.encoder.encode(page, content);
                line.sent.push((page, encoding));
                if encoding == Encoding::Raw {
                    kept.push(Part::from(&content[..]));
                }
            }
            let mut parts = vec![];
            line.encoder.contents(&kept, &mut parts);
            bytes += parts.iter().map(|part: &Part<'_>| part.bytes.len()).sum::<usize>();
            let took = Duration::from_nanos(ns_of_page * bytes as u64 / 4096);
            line.encoder.sent(bytes as u64, took);
        }
    }
}

#[test]
fn auto_sends_pages_as_they_are_on_a_link_that_is_faster_than_looking_at_them() {
    let mut line = Line::new(Compression::Auto);
    // A link that takes no time: nothing can pay.
    epochs(&mut line, 0, 50, 0);
    assert_eq!(line.count(Encoding::Raw), line.sent.len());
    // And nothing was looked at but samples.
    let samples = line.sent.iter().filter(|(page, _)| is_sample(*page)).count();
    assert!(samples > 0 && samples * 32 < line.sent.len(), "{samples} of {}", line.sent.len());
}

#[test]
fn auto_takes_to_deltas_on_a_slow_link_and_leaves_them_when_they_do_not_help() {
    let mut line = Line::new(Compression::Auto);
    let slow = 1_000_000;
    epochs(&mut line, 0, 20, slow);
    line.sent.clear();
    epochs(&mut line, 20, 5, slow);
    assert!(line.count(Encoding::Delta) * 10 > line.sent.len() * 9);
    // The link becomes so fast that not even a comparison pays.
    epochs(&mut line, 25, 20, slow);
    line.encoder.auto.as_mut().unwrap().costs.link = Default::default();
    epochs(&mut line, 45, 5, 0);
    line.sent.clear();
    epochs(&mut line, 50, 5, 0);
    assert_eq!(line.count(Encoding::Raw), line.sent.len());
    // It is slow again.
    epochs(&mut line, 55, 20, slow);
    line.sent.clear();
    epochs(&mut line, 75, 5, slow);
    assert!(line.count(Encoding::Delta) * 10 > line.sent.len() * 9);
}

#[test]
fn auto_compresses_a_first_copy_over_a_slow_link() {
    let mut line = Line::new(Compression::Auto);
    let memory = memory(1);
    for round in 0..40 {
        line.encoder.begin(EpochId(0));
        for frame in 0..32u64 {
            for number in 0..PAGES as u64 {
                let page = PageIndex(frame * 64 + number);
                let content = &memory[usize::try_from(number).unwrap()];
                let encoding = line.encoder.encode(page, content);
                if round > 30 {
                    line.sent.push((page, encoding));
                }
            }
            line.encoder.sent(PAGES as u64 * 4096, Duration::from_millis(20));
        }
    }
    // One frame in 64 goes as it is.
    assert!(line.count(Encoding::Lz4) * 20 > line.sent.len() * 19);
    assert!(line.count(Encoding::Raw) > 0);
}

/// The socket takes everything at once; only how it arrives tells that the link is slow.
#[test]
fn auto_sees_a_slow_link_behind_a_large_buffer() {
    let mut line = Line::new(Compression::Auto);
    let mut asked = 0;
    for epoch in 0..12 {
        // Where a job begins, as a sender does it.
        line.encoder.begin(EpochId((epoch + 1).into()));
        line.encoder.arrived(|| {
            asked += 1;
            Some(Delivery { bytes_per_s: 20_000_000, is_least: false })
        });
        line.sent.clear();
        epochs(&mut line, epoch, 1, 1);
        let compact = line.sent.iter().filter(|(_, encoding)| *encoding != Encoding::Raw).count();
        let is_chosen = compact * 10 > line.sent.len() * 9;
        assert!(is_chosen || epoch < 5, "{compact} of {} in epoch {epoch}", line.sent.len());
    }
    assert!(asked > 0);
}

#[test]
fn what_fits_a_buffer_is_no_reason_to_ask_how_it_arrived() {
    let mut line = Line::new(Compression::Auto);
    for epoch in 1..100 {
        line.encoder.begin(EpochId(epoch));
        line.encoder.arrived(|| panic!("asked"));
        line.encoder.sent(100 << 10, Duration::ZERO);
        line.encoder.arrived(|| panic!("asked"));
    }
    let mut asked = 0;
    line.encoder.begin(EpochId(100));
    for _ in 0..1024 {
        line.encoder.sent(64 << 10, Duration::ZERO);
        line.encoder.arrived(|| {
            asked += 1;
            None
        });
    }
    assert_eq!(asked, 16, "once for each 4 MiB");
}

/// What is sent to learn, and not because it pays, is less than a hundredth.
#[test]
fn frames_that_go_as_they_are_are_few() {
    let mut auto = Auto::default();
    let (mut plain, mut all) = (0, 0);
    // Pages of text become a thirtieth: a frame that is not compressed is thirty of them.
    for _ in 0..100_000 {
        let (is_plain, bytes) = (auto.is_plain(), if auto.is_plain() { 262_144 } else { 8_000 });
        auto.sent(bytes, Duration::from_micros(100), is_plain);
        plain += if is_plain { bytes } else { 0 };
        all += bytes;
    }
    assert!(plain > 0 && plain * 100 < all, "{plain} of {all}");
}

#[test]
fn sixty_four_changed_bytes_of_a_page_are_a_tenth_of_it_on_the_wire() {
    let mut line = Line::new(Compression::Delta);
    let mut memory = memory(0);
    let all: Vec<usize> = (0..PAGES).collect();
    line.encoder.begin(EpochId(1));
    let frame = line.frame(&memory, &all);
    line.apply(frame);
    line.out(Duration::ZERO);
    for page in &mut memory {
        page.iter_mut().step_by(64).for_each(|byte| *byte = !*byte);
    }
    let before = line.bytes;
    line.encoder.begin(EpochId(2));
    let frame = line.frame(&memory, &all);
    line.apply(frame);
    assert!(line.image == memory);
    // With the head of a frame and the longest runs: one for each page.
    let bytes = line.bytes - before + 48 + 16 * PAGES;
    assert!(bytes * 10 <= PAGES * PAGE_SIZE, "{bytes} bytes for {PAGES} pages");
}

/// Best of some rounds, in nanoseconds for a page.
fn ns(pages: usize, mut round: impl FnMut()) -> u128 {
    let mut once = || {
        let began = Instant::now();
        round();
        began.elapsed().as_nanos() / pages as u128
    };
    (0..30).map(|_| once()).min().unwrap()
}

/// `cargo test --release -p replication --lib costs_of_encodings -- --ignored --nocapture`: what a
/// page takes on this machine, beside a plain copy of it. Nothing is asserted.
#[test]
#[ignore = "measures, asserts nothing"]
fn costs_of_encodings() {
    const COUNT: usize = 2048;
    let noise = |seed: usize| -> Page {
        let mut state = (seed as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        std::array::from_fn(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
    };
    let noise: Vec<Page> = (0..COUNT).map(noise).collect();
    let text: Vec<Page> = memory(0).into_iter().cycle().take(COUNT).collect();
    let mut to = noise.clone();
    let copy = ns(COUNT, || to.copy_from_slice(std::hint::black_box(&noise)));
    let line = |name: &str, ns: u128, bytes: usize| {
        let ratio = ns * 100 / copy.max(1);
        println!(
            "{name:44} {ns:6} ns  {:3}.{:02} copies  {bytes:5} bytes",
            ratio / 100,
            ratio % 100
        );
    };
    line("copy of a page", copy, PAGE_SIZE);
    let is_any = ns(COUNT, || {
        std::hint::black_box(noise.iter().filter(|page| is_zero(page)).count());
    });
    line("zero? a page of noise", is_any, 0);
    for (name, step) in
        [("nothing", PAGE_SIZE * 2), ("64 bytes, apart", 64), ("512 bytes, apart", 8)]
    {
        let mut changed = noise.clone();
        for page in &mut changed {
            page.iter_mut().step_by(step.min(PAGE_SIZE)).for_each(|byte| *byte = !*byte);
        }
        if step > PAGE_SIZE {
            changed.clone_from(&noise);
        }
        let (mut known, mut out) = (noise.clone(), Vec::with_capacity(4 << 20));
        let (mut now, mut next) = (&changed, &noise);
        let took = ns(COUNT, || {
            out.clear();
            for (old, new) in known.iter_mut().zip(now) {
                std::hint::black_box(delta::diff(old, new, &mut out));
            }
            std::mem::swap(&mut now, &mut next);
        });
        line(&format!("delta of {name}"), took, out.len() / COUNT);
        let one = &out[..out.len() / COUNT];
        let mut page = noise[0];
        let took = ns(COUNT, || {
            for _ in 0..COUNT {
                for range in delta::ranges(std::hint::black_box(one)) {
                    let (at, new) = range.unwrap();
                    page[at..at + new.len()].copy_from_slice(new);
                }
            }
        });
        line("  made into the page again", took, 0);
    }
    let mut known = noise.clone();
    let (mut now, mut next) = (&text, &noise);
    let mut out = Vec::with_capacity(4 << 20);
    let took = ns(COUNT, || {
        for (old, new) in known.iter_mut().zip(now) {
            std::hint::black_box(delta::diff(old, new, &mut out));
        }
        std::mem::swap(&mut now, &mut next);
    });
    line("delta given up, all bytes changed", took, 0);
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let program = program.as_chunks::<PAGE_SIZE>().0.iter().filter(|page| !is_zero(page));
    let program: Vec<Page> = program.take(COUNT).copied().collect();
    for (name, pages) in [("noise", &noise), ("text", &text), ("this program", &program)] {
        let (mut compressor, mut block) = (Compressor::default(), Vec::with_capacity(8 << 20));
        let took = ns(COUNT, || {
            block.clear();
            for page in pages {
                std::hint::black_box(compressor.compress(page, &mut block));
            }
        });
        line(&format!("lz4 of a page of {name}"), took, block.len() / COUNT);
        let mut room = vec![0; lz4_flex::block::get_maximum_output_size(16 * PAGE_SIZE)];
        let mut bytes = 0;
        let took = ns(COUNT, || {
            bytes = 0;
            for pages in pages.chunks_exact(16) {
                let flat = std::hint::black_box(pages.as_flattened());
                bytes += lz4_flex::block::compress_into(flat, &mut room).unwrap();
            }
        });
        line(&format!("lz4 of 16 pages of {name} together"), took, bytes / COUNT);
    }
    let mut block = Vec::new();
    assert!(Compressor::default().compress(&text[0], &mut block));
    let mut page = noise[0];
    let took = ns(COUNT, || {
        (0..COUNT).for_each(|_| lz4::decompress(std::hint::black_box(&block), &mut page).unwrap());
    });
    line("lz4 of text made into the page again", took, 0);
}
