//! A machine that is lost again and again, and goes on as a replica from its last state.

use super::*;

/// Sectors that the driver uses.
const SECTORS: usize = 24;
/// Requests offered at a time: with three descriptors each they fit the queue.
const BATCH: u16 = 8;

/// Numbers that look random, the same in each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % sides
    }

    fn pause(&mut self) {
        for _ in 0..self.roll(20_000) {
            std::hint::spin_loop();
        }
    }
}

/// What the image contains once all that was sent is answered.
struct Model {
    sectors: Vec<u8>,
    /// A read, and for each of its sectors what it may find.
    reads: Vec<(Sent, usize, Vec<Vec<u8>>)>,
    /// A read may find what is written after it and before it is answered.
    shared: bool,
    next: u8,
}

impl Model {
    fn new(shared: bool) -> Self {
        Self { sectors: vec![0; SECTORS], reads: Vec::new(), shared, next: 1 }
    }

    /// Sends a batch of requests that overlap as they like, on one queue: so in order.
    fn send(&mut self, driver: &mut Driver, dice: &mut Dice) {
        driver.data = DATA;
        self.reads.clear();
        for _ in 0..BATCH {
            let first = dice.roll(u64::try_from(SECTORS).unwrap() - 4);
            let len = usize::try_from(dice.roll(4)).unwrap() + 1;
            let from = usize::try_from(first).unwrap();
            let range = from..from + len;
            match dice.roll(4) {
                0 => {
                    let sent = driver.read(first, len * 512);
                    let now = self.sectors[range].iter().map(|value| vec![*value]);
                    self.reads.push((sent, from, now.collect()));
                }
                1 => {
                    let sectors = u32::try_from(len).unwrap();
                    driver.range(WRITE_ZEROES, first, sectors, 1);
                    self.fill(range, 0);
                }
                _ => {
                    driver.write(first, &vec![self.next; len * 512]);
                    self.fill(range, self.next);
                    // Below what marks output that is lost.
                    self.next = self.next % 99 + 1;
                }
            }
        }
    }

    fn fill(&mut self, range: std::ops::Range<usize>, value: u8) {
        self.sectors[range.clone()].fill(value);
        for (_, first, sectors) in self.reads.iter_mut().filter(|_| self.shared) {
            for (at, allowed) in sectors.iter_mut().enumerate() {
                if range.contains(&(*first + at)) {
                    allowed.push(value);
                }
            }
        }
    }

    fn check(&self, driver: &Driver, image: &TestImage) {
        for (at, value) in self.sectors.iter().enumerate() {
            assert_eq!(image.sector(at), *value, "sector {at}");
        }
        for (sent, _, sectors) in &self.reads {
            assert_eq!(driver.status(*sent), OK);
            for (at, allowed) in sectors.iter().enumerate() {
                let found = driver.bytes(sent.data + u64::try_from(at).unwrap() * 512, 512);
                assert!(found.iter().all(|byte| *byte == found[0]), "a torn read");
                assert!(allowed.contains(&found[0]), "a read got {}", found[0]);
            }
        }
    }
}

#[test]
fn every_request_is_answered_once_wherever_the_machine_is_lost() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    let (mut dice, mut model) = (Dice(7), Model::new(false));
    let mut in_flight = 0;
    for _ in 0..100 {
        model.send(&mut rig.drivers[0], &mut dice);
        dice.pause();
        rig.disk.park();
        let state = rig.disk.save();
        in_flight += rig.state().queues[0].in_flight.len();
        let next = replica(&rig, &state, &image);
        // What the host was still doing ends before the other begins, as the image's lock has it.
        drop(rig);
        rig = next;
        rig.disk.unpark();
        rig.drivers[0].answers(BATCH);
        assert_eq!(rig.drivers[0].unseen(), 0);
        model.check(&rig.drivers[0], &image);
    }
    assert!(in_flight > 0, "no machine was lost with requests in flight");
}

#[test]
fn output_of_an_epoch_that_is_not_committed_is_never_in_the_image() {
    const LOST: u8 = 200;
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    let (mut dice, mut model) = (Dice(11), Model::new(true));
    for round in 0..100u64 {
        rig.disk.hold();
        model.send(&mut rig.drivers[0], &mut dice);
        dice.pause();
        rig.disk.park();
        rig.disk.seal(round);
        let state = rig.disk.save();
        let mut next = replica(&rig, &state, &image);
        rig.disk.unpark();
        // The epoch that is lost: it overwrites all that there is.
        rig.drivers[0].data = DATA + 0x8_0000;
        let lost = rig.drivers[0].write(0, &vec![LOST; SECTORS * 512]);
        if dice.roll(2) == 0 {
            rig.disk.commit(round);
        }
        dice.pause();
        assert_eq!(rig.drivers[0].status(lost), UNTOUCHED);
        rig.disk.discard();
        rig.disk.commit(round + 1);
        drop(rig);
        for sector in 0..SECTORS {
            assert_ne!(image.sector(sector), LOST);
        }
        next.disk.unpark();
        next.drivers[0].answers(BATCH);
        model.check(&next.drivers[0], &image);
        rig = next;
    }
}
