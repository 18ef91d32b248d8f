//! A copy straight into the backup's memory without a device: a guest that writes at any time, a device that
//! reads at any time and again, a log of dirty pages that is late, checksums, rings, and the first epoch.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::flight::Flight;
use super::window::{Placed, Window};
use crate::backup::suspects::Suspects;
use crate::capture::cow::Share;
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::{PageSet, Ram};
use crate::testing::memory;
use crate::wire::{Encoding, Grant, Run, decode_sums, encode_sums};

const PAGES: u64 = 70;
const BASE: u64 = 1 << 40;
const ALL: Share = Share { index: 0, of: 1 };

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
}

/// A WRITE under way.
struct Under {
    number: u64,
    write: Placed,
    /// What the device has read, as far as it has.
    bytes: Vec<u8>,
    read: usize,
}

struct Copy {
    here: Ram,
    image: Ram,
    window: Window,
    flight: Flight,
    under: Vec<Under>,
    /// Written, and in no harvest yet; the log knows it late.
    dirty: PageSet,
    late: PageSet,
    /// Checksums on their way: a frame each, which is read when the WRITEs before it have completed.
    sums: VecDeque<(u64, Vec<u8>)>,
    is_first_pass: bool,
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
        let grant = |pages, address, key| Grant { pages, address: BASE + address, key };
        let bytes = |pages: u64| pages * PAGE_SIZE as u64;
        // The image lies in one piece there, and is granted in two.
        let grants = [grant(33, 0, 1), grant(PAGES - 33, bytes(33), 2)];
        let mut dirty = PageSet::new(PAGES);
        dirty.insert_range(PageIndex(0), PAGES);
        let here = memory(&[(0, PAGES)]);
        for page in 0..PAGES {
            let fill = if page % 7 == 3 { 0 } else { u8::try_from(page + 1).unwrap() };
            let fill = [fill; PAGE_SIZE];
            assert!(here.write_page(PageIndex(page), &fill));
        }
        Self {
            here,
            image: memory(&[(0, PAGES)]),
            window: Window::new(&grants, PAGES).unwrap(),
            flight: Flight::default(),
            under: vec![],
            dirty,
            late: PageSet::new(PAGES),
            sums: VecDeque::new(),
            is_first_pass: true,
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
        assert!(self.here.write_page(PageIndex(page), &[fill; PAGE_SIZE]));
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

    fn post(&mut self, set: &PageSet) {
        let skips = self.is_first_pass || self.broken == Broken::SkipsZeroes;
        self.is_first_pass = false;
        for group in ALL.groups(set) {
            let (mut writes, mut sums, mut sent) = (vec![], vec![], group);
            for page in group.iter() {
                let bytes = page_of(&self.here, page.0);
                sums.push(crc32fast::hash(&bytes));
                if skips && bytes == [0; PAGE_SIZE] {
                    sent.pages &= !(1 << (page.0 % 64));
                }
            }
            for run in sent.runs() {
                // This side's pieces end elsewhere.
                let left = |page: PageIndex| if page.0 < 20 { 20 - page.0 } else { PAGES - page.0 };
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
            let bytes = page_of(&self.here, page);
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
        set.iter().map(|page| (page.0, page_of(&self.here, page.0))).collect()
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
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..PAGES).prop_map(Step::Guest),
        12 => (any::<usize>(), prop::bool::weighted(0.05)).prop_map(|(which, again)| Step::Device(which, again)),
        2 => Just(Step::Check),
        1 => Just(Step::Log),
    ]
}

/// Whether the backup is what the primary was at the seal of the first epoch, and whether the check says so.
fn run(broken: Broken, passes: &[Vec<Step>], ring: &[Step], last: &[Step]) -> (bool, bool) {
    let mut copy = Copy::new(broken);
    let step = |copy: &mut Copy, step: &Step| match step {
        Step::Guest(page) => copy.guest_writes(*page),
        Step::Device(which, again) => copy.device(*which, *again),
        Step::Check => {
            copy.check(false);
        }
        Step::Log => {
            copy.dirty.union(&copy.late);
            copy.late.clear();
        }
    };
    for steps in passes {
        let mut set = copy.harvest(false);
        if broken == Broken::ReadsFirst {
            // Whatever is written from now to the real harvest is taken for read.
            let before = set.clone();
            copy.post(&before);
            steps.iter().for_each(|next| step(&mut copy, next));
            copy.finish_device();
            copy.harvest(true);
        } else {
            copy.post(&set);
            steps.iter().for_each(|next| step(&mut copy, next));
        }
        if broken != Broken::AtPost {
            copy.finish_device();
            assert_eq!(copy.flight.requests(), 0);
        }
        set.clear();
    }
    // The window is closed; a pass through the rings.
    let set = copy.harvest(false);
    // They are before the frames on the same connection.
    while copy.check(broken == Broken::AtPost) {}
    assert!(copy.sums.is_empty());
    ring.iter().for_each(|next| step(&mut copy, next));
    let contents = copy.contents(&set);
    copy.frames(&set, &contents);
    last.iter().for_each(|next| step(&mut copy, next));
    // The first epoch.
    let set = copy.harvest(true);
    let contents = copy.contents(&set);
    let sealed: VecDeque<_> = (0..PAGES).map(|page| page_of(&copy.here, page)).collect();
    copy.frames(&set, &contents);
    copy.finish_device();
    let is_trusted = copy.suspects.end().is_none();
    let is_equal =
        (0..PAGES).zip(&sealed).all(|(page, bytes)| page_of(&copy.image, page) == *bytes);
    (is_equal, is_trusted)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_image_is_what_the_primary_was_at_the_first_seal(
        passes in prop::collection::vec(prop::collection::vec(any_step(), 0..400), 1..4),
        ring in prop::collection::vec(any_step(), 0..40),
        last in prop::collection::vec(any_step(), 0..40),
    ) {
        let (is_equal, is_trusted) = run(Broken::Nothing, &passes, &ring, &last);
        prop_assert!(is_equal, "the image is another");
        prop_assert!(is_trusted, "a good copy is taken for a bad one");
    }

    /// A device that loses a WRITE: either the pages came again, or the check finds it.
    #[test]
    fn a_write_that_never_arrived_is_found(
        passes in prop::collection::vec(prop::collection::vec(any_step(), 0..400), 1..3),
        ring in prop::collection::vec(any_step(), 0..40),
    ) {
        let (is_equal, is_trusted) = run(Broken::Loses, &passes, &ring, &[]);
        prop_assert!(is_equal || !is_trusted, "a bad copy is taken for a good one");
    }
}

/// The tests above tell builds that are wrong from one that is not.
#[test]
fn builds_that_do_it_in_another_order_are_found() {
    let device = || (0..400).map(|at| Step::Device(at, false));
    // Half of it is read, and then written.
    let mut read_and_written: Vec<_> = device().take(150).collect();
    read_and_written.extend((0..PAGES).map(Step::Guest));
    read_and_written.extend(device());
    let passes = [read_and_written];
    assert_eq!(run(Broken::Nothing, &passes, &[], &[]), (true, true));
    assert!(!run(Broken::ReadsFirst, &passes, &[], &[]).0);
    // Nothing is read before the pass counts as over, and all comes after the epoch that is newer.
    let written = [vec![], (0..PAGES).map(Step::Guest).collect::<Vec<_>>()];
    let mut read: Vec<_> = vec![Step::Device(0, false); 3];
    read.extend((0..PAGES).map(Step::Guest));
    assert_eq!(run(Broken::Nothing, &written, &[], &read), (true, true));
    let late = [vec![Step::Device(0, false); 40]];
    assert!(!run(Broken::AtPost, &late, &[], &read).0);
    // Pages are cleared after the first pass.
    let mut cleared: Vec<_> = device().collect();
    cleared.extend((0..PAGES).flat_map(|page| [Step::Guest(page); 4]));
    cleared.push(Step::Log);
    let cleared = [cleared, vec![]];
    assert_eq!(run(Broken::Nothing, &cleared, &[], &[]), (true, true));
    assert!(!run(Broken::SkipsZeroes, &cleared, &[], &[]).0);
    assert_eq!(run(Broken::Loses, &[vec![]], &[], &[]), (false, false));
}
