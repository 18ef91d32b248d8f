//! A copy straight into the backup's memory without a device: memories that are registered piece by piece, or come
//! short, a guest that writes at any time, a device that
//! reads at any time and again, a log of dirty pages that is late, checksums, rings, and the first epoch.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::flight::Flight;
use super::window::{Placed, Window};
use crate::backup::suspects::Suspects;
use crate::capture::cow::Share;
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::protocol::advance::{self, Next, Side};
use crate::ram::{PageSet, Ram};
use crate::testing::memory;
use crate::wire::{Encoding, Grant, Run, decode_sums, encode_sums};

const PAGES: u64 = 70;
const BASE: u64 = 1 << 40;
const ALL: Share = Share { index: 0, of: 1 };
/// Where the pieces of either side end.
const ENDS_HERE: [u64; 3] = [20, 45, PAGES];
const ENDS_THERE: [u64; 4] = [7, 33, 64, PAGES];

/// What a build does wrong, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// A pass is over when its WRITEs are posted.
    AtPost,
    /// The dirty log is read after the pages.
    ReadsFirst,
    /// The device loses a WRITE and says that it is done.
    Loses,
    /// Zero pages are left out of later passes, too.
    SkipsZeroes,
    /// A part goes as far as this side is, whether the backup is or not.
    Early,
    /// A part has what was in one before, and leaves out zero pages all the same.
    TakesAgain,
    /// What has not gone when one side comes short does not go at all.
    Forgets,
    /// When one side comes short the rings are next, with WRITEs under way.
    Turns,
    /// The backup takes back what it told of when it comes short.
    GivesBack,
}

/// What became of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ended {
    /// The backup is what the primary was at the seal of the first epoch.
    is_equal: bool,
    /// The check of it says so.
    is_trusted: bool,
    /// No WRITE went where nothing was open.
    is_clean: bool,
}

const GOOD: Ended = Ended { is_equal: true, is_trusted: true, is_clean: true };

/// A WRITE under way.
struct Under {
    number: u64,
    write: Placed,
    /// What the device has read, as far as it has.
    bytes: Vec<u8>,
    read: usize,
}

struct Copy {
    ram: Ram,
    image: Ram,
    window: Window,
    flight: Flight,
    under: Vec<Under>,
    /// Written, and in no harvest yet; the log knows it late.
    dirty: PageSet,
    late: PageSet,
    /// Harvested, and in no pass yet.
    pending: PageSet,
    /// How far either side is; what the primary's device may write in fact.
    here: Side,
    there: Side,
    open: u64,
    /// Pages that the parts of the first pass had.
    sent: u64,
    faults: usize,
    /// Checksums on their way: a frame each, which is read when the WRITEs before it have completed.
    sums: VecDeque<(u64, Vec<u8>)>,
    suspects: Suspects,
    versions: u8,
    broken: Broken,
    lost: u64,
}

fn page_of(ram: &Ram, page: u64) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    assert!(ram.read_page(PageIndex(page), &mut bytes));
    bytes
}

impl Copy {
    fn new(broken: Broken) -> Self {
        let mut dirty = PageSet::new(PAGES);
        dirty.insert_range(PageIndex(0), PAGES);
        let ram = memory(&[(0, PAGES)]);
        for page in 0..PAGES {
            let fill = if page % 7 == 3 { 0 } else { u8::try_from(page + 1).unwrap() };
            let fill = [fill; PAGE_SIZE];
            assert!(ram.write_page(PageIndex(page), &fill));
        }
        Self {
            ram,
            image: memory(&[(0, PAGES)]),
            window: Window::new(PAGES),
            flight: Flight::default(),
            under: vec![],
            dirty,
            late: PageSet::new(PAGES),
            pending: PageSet::new(PAGES),
            here: Side { pages: 0, is_over: false },
            there: Side { pages: 0, is_over: false },
            open: 0,
            sent: 0,
            faults: 0,
            sums: VecDeque::new(),
            suspects: Suspects::default(),
            versions: 100,
            broken,
            lost: 0,
        }
    }

    fn guest_writes(&mut self, page: u64) {
        self.versions = self.versions.wrapping_add(1);
        // Now and then it clears a page.
        let fill = if self.versions.is_multiple_of(4) { 0 } else { self.versions };
        assert!(self.ram.write_page(PageIndex(page), &[fill; PAGE_SIZE]));
        self.late.insert(PageIndex(page));
    }

    /// What the log knows by now; of a guest that stands, all.
    fn harvest(&mut self, stands: bool) -> PageSet {
        if stands {
            self.dirty.union(&self.late);
            self.late.clear();
        }
        std::mem::replace(&mut self.dirty, PageSet::new(PAGES))
    }

    /// This side registers another piece, or none any more.
    fn widen_here(&mut self, is_good: bool) {
        if self.here.is_over {
            return;
        }
        let next = ENDS_HERE.iter().copied().find(|end| *end > self.here.pages).unwrap();
        if is_good {
            self.here.pages = next;
        }
        self.here.is_over = !is_good || next == PAGES;
    }

    /// The backup does, and says so.
    fn widen_there(&mut self, is_good: bool) {
        if self.there.is_over {
            return;
        }
        let at = ENDS_THERE.iter().position(|end| *end > self.there.pages).unwrap();
        let (first, next) = (self.there.pages, ENDS_THERE[at]);
        if is_good {
            self.there.pages = next;
            self.open = self.open.max(next);
            // The image lies in one piece there.
            let address = BASE + first * PAGE_SIZE as u64;
            let grant = Grant { pages: next - first, address, key: u32::try_from(at).unwrap() };
            assert!(self.broken == Broken::Early || self.window.widen(&[grant]));
        } else if self.broken == Broken::GivesBack {
            self.open = 0;
        }
        self.there.is_over = !is_good || next == PAGES;
    }

    /// The engine looks at what is next; whether the first pass is over, and all of it went straight.
    fn advance(&mut self) -> Option<bool> {
        let is_over = self.flight.requests() == 0 || self.broken == Broken::AtPost;
        let comes_short = |side: Side| side.is_over && side.pages < PAGES;
        let turns =
            self.broken == Broken::Turns && (comes_short(self.here) || comes_short(self.there));
        if !is_over && !turns {
            return None;
        }
        if self.broken == Broken::ReadsFirst {
            // Whatever was written from the reading to the harvest is taken for read.
            self.harvest(true);
        } else {
            let set = self.harvest(false);
            self.pending.union(&set);
        }
        let there = match self.broken {
            Broken::Early => Side { pages: PAGES, is_over: true },
            _ => self.there,
        };
        match advance::next(self.here, there, self.sent, PAGES) {
            Next::Straight { first, pages } => {
                self.sent = first + pages;
                let first = if self.broken == Broken::TakesAgain { 0 } else { first };
                let mut set = PageSet::new(PAGES);
                set.insert_range(PageIndex(first), self.sent - first);
                set.intersect(&self.pending);
                self.pending.subtract(&set);
                self.post(&set, true);
                None
            }
            Next::Wait => (self.sent == PAGES).then_some(true),
            Next::Rings | Next::Close => {
                if self.broken == Broken::Forgets {
                    self.pending.clear();
                }
                Some(false)
            }
        }
    }

    fn post(&mut self, set: &PageSet, is_first: bool) {
        let skips = is_first || self.broken == Broken::SkipsZeroes;
        for group in ALL.groups(set) {
            let (mut writes, mut sums, mut sent) = (vec![], vec![], group);
            for page in group.iter() {
                let bytes = page_of(&self.ram, page.0);
                sums.push(crc32fast::hash(&bytes));
                if skips && bytes == [0; PAGE_SIZE] {
                    sent.pages &= !(1 << (page.0 % 64));
                }
            }
            for run in sent.runs() {
                // This side's pieces end elsewhere.
                let left = |page: PageIndex| {
                    let end = ENDS_HERE.iter().find(|end| **end > page.0).unwrap();
                    if *end <= self.here.pages { end - page.0 } else { 0 }
                };
                assert!(self.window.writes(run, left, &mut writes));
            }
            for write in writes {
                let number = self.flight.post(1, 1, None);
                let bytes = vec![0; usize::try_from(write.pages).unwrap() * PAGE_SIZE];
                self.under.push(Under { number, write, bytes, read: 0 });
            }
            let mut payload = vec![];
            encode_sums(group.number as u64, group.pages, sums.into_iter(), &mut payload);
            self.sums.push_back((self.flight.next(), payload));
        }
    }

    /// The device goes on with one of its WRITEs: half a page is read, or, at the end, all of it is there. It
    /// may begin again.
    fn device(&mut self, which: usize, again: bool) {
        if self.under.is_empty() {
            return;
        }
        let at = which % self.under.len();
        let under = &mut self.under[at];
        if again && under.read > 0 {
            under.read = 0;
            return;
        }
        if under.read < under.bytes.len() {
            let page = under.write.first.0 + (under.read / PAGE_SIZE) as u64;
            let offset = under.read % PAGE_SIZE;
            let half = PAGE_SIZE / 2;
            let bytes = page_of(&self.ram, page);
            under.bytes[under.read..under.read + half]
                .copy_from_slice(&bytes[offset..offset + half]);
            under.read += half;
            return;
        }
        let Under { number, write, bytes, .. } = self.under.swap_remove(at);
        assert!(self.flight.complete(number));
        if self.broken == Broken::Loses && self.lost == 0 {
            self.lost = write.pages;
            return;
        }
        // Where the address says, not where the page's number does.
        let first = (write.to.address - BASE) / PAGE_SIZE as u64;
        self.faults += usize::from(first + write.pages > self.open);
        let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
        for (page, bytes) in (first..).zip(pages) {
            assert!(self.image.write_page(PageIndex(page), bytes));
        }
    }

    fn finish_device(&mut self) {
        while !self.under.is_empty() {
            self.device(0, false);
        }
    }

    /// Frames, and software that puts them into the image.
    fn frames(&mut self, set: &PageSet, contents: &BTreeMap<u64, [u8; PAGE_SIZE]>) {
        for page in set.iter() {
            let run = Run { first: page, count: 1, encoding: Encoding::Raw };
            self.suspects.replaced(&[run]);
            assert!(self.image.write_page(page, &contents[&page.0]));
        }
    }

    fn contents(&self, set: &PageSet) -> BTreeMap<u64, [u8; PAGE_SIZE]> {
        set.iter().map(|page| (page.0, page_of(&self.ram, page.0))).collect()
    }

    /// The backup compares a frame's checksums, if that is to be seen; `false`: none is. In a build that is wrong
    /// the device may be later than the frame.
    fn check(&mut self, is_forced: bool) -> bool {
        let is_there =
            |after: u64| is_forced || self.under.iter().all(|under| under.number >= after);
        let Some((_, payload)) = self.sums.pop_front_if(|(after, _)| is_there(*after)) else {
            return false;
        };
        for sums in &decode_sums(&payload, PAGES).unwrap() {
            self.suspects.compare(&self.image, sums);
        }
        true
    }
}

/// What else happens while something is done.
#[derive(Clone, Copy, Debug)]
enum Step {
    Guest(u64),
    Device(usize, bool),
    /// The backup reads a frame.
    Check,
    /// The log hears of what was written.
    Log,
    /// A side registers another piece, or fails to.
    Here(bool),
    There(bool),
}

/// All of both, but for what failed.
const ALL_PIECES: [Step; 7] = [
    Step::Here(true),
    Step::Here(true),
    Step::Here(true),
    Step::There(true),
    Step::There(true),
    Step::There(true),
    Step::There(true),
];

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..PAGES).prop_map(Step::Guest),
        12 => (any::<usize>(), prop::bool::weighted(0.05)).prop_map(|(which, again)| Step::Device(which, again)),
        2 => Just(Step::Check),
        1 => Just(Step::Log),
    ]
}

fn any_opening_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => any_step(),
        1 => prop::bool::weighted(0.9).prop_map(Step::Here),
        1 => prop::bool::weighted(0.9).prop_map(Step::There),
    ]
}

impl Copy {
    fn step(&mut self, step: Step) {
        match step {
            Step::Guest(page) => self.guest_writes(page),
            Step::Device(which, again) => self.device(which, again),
            Step::Check => {
                self.check(false);
            }
            Step::Log => {
                self.dirty.union(&self.late);
                self.late.clear();
            }
            Step::Here(is_good) => self.widen_here(is_good),
            Step::There(is_good) => self.widen_there(is_good),
        }
    }

    /// The first pass, in parts as pieces come; whether all of it went straight.
    fn open(&mut self, steps: &[Step]) -> bool {
        if self.broken == Broken::Early {
            let grant = Grant { pages: PAGES, address: BASE, key: 0 };
            assert!(self.window.widen(&[grant]));
        }
        // In the end all comes that has not failed.
        let rest = ALL_PIECES.into_iter().chain(std::iter::repeat(Step::Device(0, false)));
        for step in steps.iter().copied().chain(rest) {
            if let Some(is_whole) = self.advance() {
                return is_whole;
            }
            self.step(step);
        }
        unreachable!("the device goes on for ever")
    }

    /// A whole pass, of what was harvested.
    fn pass(&mut self, steps: &[Step]) {
        let mut set = self.harvest(false);
        set.union(&self.pending);
        self.pending.clear();
        self.post(&set, false);
        steps.iter().for_each(|step| self.step(*step));
        if self.broken != Broken::AtPost {
            self.finish_device();
            assert_eq!(self.flight.requests(), 0);
        }
    }
}

fn run(
    broken: Broken,
    opening: &[Step],
    passes: &[Vec<Step>],
    ring: &[Step],
    last: &[Step],
) -> Ended {
    let mut copy = Copy::new(broken);
    if copy.open(opening) {
        passes.iter().for_each(|steps| copy.pass(steps));
    }
    let is_late = matches!(broken, Broken::AtPost | Broken::Turns);
    if !is_late {
        assert_eq!(copy.flight.requests(), 0);
        // The window is closed.
        copy.open = 0;
    }
    // A pass through the rings.
    let mut set = copy.harvest(false);
    set.union(&copy.pending);
    // They are before the frames on the same connection.
    while copy.check(is_late) {}
    assert!(copy.sums.is_empty());
    ring.iter().for_each(|step| copy.step(*step));
    let contents = copy.contents(&set);
    copy.frames(&set, &contents);
    last.iter().for_each(|step| copy.step(*step));
    // The first epoch.
    let set = copy.harvest(true);
    let contents = copy.contents(&set);
    let sealed: VecDeque<_> = (0..PAGES).map(|page| page_of(&copy.ram, page)).collect();
    copy.frames(&set, &contents);
    copy.finish_device();
    let is_trusted = copy.suspects.end().is_none();
    let is_equal =
        (0..PAGES).zip(&sealed).all(|(page, bytes)| page_of(&copy.image, page) == *bytes);
    Ended { is_equal, is_trusted, is_clean: copy.faults == 0 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Pieces that come in any order beside the guest and the device, on either side, and may come short.
    #[test]
    fn the_image_is_what_the_primary_was_at_the_first_seal(
        opening in prop::collection::vec(any_opening_step(), 0..600),
        passes in prop::collection::vec(prop::collection::vec(any_step(), 0..400), 0..3),
        ring in prop::collection::vec(any_step(), 0..40),
        last in prop::collection::vec(any_step(), 0..40),
    ) {
        prop_assert_eq!(run(Broken::Nothing, &opening, &passes, &ring, &last), GOOD);
    }

    /// A device that loses a WRITE: either the pages came again, or the check finds it.
    #[test]
    fn a_write_that_never_arrived_is_found(
        opening in prop::collection::vec(any_opening_step(), 0..400),
        passes in prop::collection::vec(prop::collection::vec(any_step(), 0..400), 0..2),
        ring in prop::collection::vec(any_step(), 0..40),
    ) {
        let ended = run(Broken::Loses, &opening, &passes, &ring, &[]);
        prop_assert!(ended.is_equal || !ended.is_trusted, "a bad copy is taken for a good one");
    }
}

/// The tests above tell builds that are wrong from one that is not.
#[test]
fn builds_that_do_it_in_another_order_are_found() {
    let device = |count| std::iter::repeat_n(Step::Device(0, false), count);
    let written = || (0..PAGES).map(Step::Guest);
    // Some of a part is read, and then written.
    let mut read_and_written = ALL_PIECES.to_vec();
    read_and_written.extend(device(30).chain(written()));
    assert_eq!(run(Broken::Nothing, &read_and_written, &[], &[], &[]), GOOD);
    assert!(!run(Broken::ReadsFirst, &read_and_written, &[], &[], &[]).is_equal);
    // Nothing is read before the pass counts as over, and all comes after the epoch that is newer.
    let mut read: Vec<_> = device(3).collect();
    read.extend(written());
    let passes = [vec![], written().collect()];
    assert_eq!(run(Broken::Nothing, &ALL_PIECES, &passes, &[], &read), GOOD);
    let late = [device(40).collect()];
    assert!(!run(Broken::AtPost, &ALL_PIECES, &late, &[], &read).is_equal);
    // Pages are cleared after the first pass.
    let mut cleared: Vec<_> = (0..PAGES).flat_map(|page| [Step::Guest(page); 4]).collect();
    cleared.push(Step::Log);
    let cleared = [cleared, vec![]];
    assert_eq!(run(Broken::Nothing, &[], &cleared, &[], &[]), GOOD);
    assert!(!run(Broken::SkipsZeroes, &[], &cleared, &[], &[]).is_equal);
    let lost = run(Broken::Loses, &[], &[], &[], &[]);
    assert!(!lost.is_equal && !lost.is_trusted);
}

/// The same, of memories that are registered piece by piece.
#[test]
fn builds_that_take_pieces_in_another_way_are_found() {
    let device = |count| std::iter::repeat_n(Step::Device(0, false), count);
    // This side is further than the backup.
    let mut early = vec![Step::Here(true), Step::There(true)];
    early.extend(device(200));
    assert_eq!(run(Broken::Nothing, &early, &[], &[], &[]), GOOD);
    assert!(!run(Broken::Early, &early, &[], &[], &[]).is_clean);
    // A page of the first part is cleared before the second one.
    let mut cleared = vec![Step::Here(true), Step::There(true)];
    cleared.extend(device(40).chain([Step::Guest(2); 4]).chain([Step::Log]));
    assert_eq!(run(Broken::Nothing, &cleared, &[], &[], &[]), GOOD);
    assert!(!run(Broken::TakesAgain, &cleared, &[], &[], &[]).is_equal);
    // Either side comes short, with a part under way or none.
    for fails in [Step::Here(false), Step::There(false)] {
        for read in [0, 1, 5, 40] {
            let mut short = vec![Step::Here(true), Step::There(true)];
            short.extend(device(read).chain([fails]));
            assert_eq!(run(Broken::Nothing, &short, &[], &[], &[]), GOOD);
            assert!(!run(Broken::Forgets, &short, &[], &[], &[]).is_equal);
        }
        // What a WRITE has read is written by the guest, which goes by a frame, and then it arrives.
        let mut short = vec![Step::Here(true), Step::There(true)];
        short.extend(device(5).chain([Step::Guest(0), Step::Log, fails]));
        assert_eq!(run(Broken::Nothing, &short, &[], &[], &[]), GOOD);
        assert!(!run(Broken::Turns, &short, &[], &[], &[]).is_equal);
    }
    let mut short = vec![Step::Here(true), Step::There(true)];
    short.extend(device(5).chain([Step::There(false)]));
    assert!(!run(Broken::GivesBack, &short, &[], &[], &[]).is_clean);
}
