//! Every kind of request, and what a driver does right and wrong with one.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::virtio::device::{ActivateError, DeviceType};

/// A request's kind, sector, data out and room in, and its status.
type Case = (&'static str, u32, u64, Vec<u8>, usize, u8);

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| seed.wrapping_add(u8::try_from(at % 251).unwrap())).collect()
}

#[test]
fn what_is_written_is_in_the_image_and_read_again() {
    let file = file();
    let mut rig = Rig::on_file(config(&file));
    let driver = &mut rig.drivers[0];
    let text = pattern(3, 4096 + 512);
    let sent = driver.write(5, &text);
    assert_eq!(driver.end(sent), (OK, 1));
    let mut found = vec![0; text.len()];
    file.as_file().read_exact_at(&mut found, 5 * 512).unwrap();
    assert_eq!(found, text);
    let sent = driver.read(6, 4096);
    assert_eq!(driver.end(sent), (OK, 4097));
    assert_eq!(driver.bytes(sent.data, 4096), text[512..]);
    let sent = driver.send(FLUSH, 0, &[], 0);
    assert_eq!(driver.end(sent), (OK, 1));
    let expected = [("write_bytes", 4608), ("read_bytes", 4096), ("write_ops", 1)];
    for (name, value) in expected.into_iter().chain([("read_ops", 1), ("flush_ops", 1)]) {
        assert_eq!(rig.counter(name), value, "{name}");
    }
    assert_eq!(rig.counter("errors"), 0);
    until("an interrupt for each", || rig.irq.queues.load(Ordering::SeqCst) >= 1);
}

#[test]
fn what_the_disk_writes_to_memory_is_seen_by_the_bitmap() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    let memory = Arc::clone(&rig.memory);
    let bitmap = memory.find_region(GuestAddress(0)).unwrap().bitmap();
    let driver = &mut rig.drivers[0];
    driver.data = 0x20_0000;
    let (room, _) = (driver.room(3 * 4096), driver.room(4096));
    let status = driver.room(1);
    driver.data = 0x30_0000;
    let header = driver.header(IN, 0);
    let head = driver.chain(&[(header, 16, 0), (room, 3 * 4096, WRITE), (status, 1, WRITE)]);
    driver.offer(head);
    driver.kick();
    assert_eq!(driver.end(Sent { head, data: room, status }), (OK, 3 * 4096 + 1));
    let used = driver.used_ring();
    // The driver wrote to none of them.
    for address in [room, room + 4096, room + 8192, status, used] {
        assert!(bitmap.dirty_at(usize::try_from(address).unwrap()), "{address:x}");
    }
    assert!(!bitmap.dirty_at(usize::try_from(room).unwrap() + 3 * 4096));
}

#[test]
fn zeroes_and_discards_change_their_range_only() {
    let file = file();
    file.as_file().write_all_at(&[0x55; 64 << 10], 0).unwrap();
    let mut rig = Rig::on_file(config(&file));
    let driver = &mut rig.drivers[0];
    for (kind, sector, flags) in [(WRITE_ZEROES, 8, 0), (WRITE_ZEROES, 24, 1), (DISCARD, 40, 0)] {
        let sent = driver.range(kind, sector, 8, flags);
        assert_eq!(driver.end(sent), (OK, 1), "{kind} {flags}");
    }
    let bytes = fs::read(file.path()).unwrap();
    assert_eq!(bytes.len(), IMAGE_BYTES);
    for block in 0..16 {
        let expected = if [1, 3, 5].contains(&block) { 0 } else { 0x55 };
        assert!(bytes[block * 4096..][..4096].iter().all(|byte| *byte == expected), "{block}");
    }
    assert!(file.as_file().metadata().unwrap().blocks() * 512 < 64 << 10);
    assert_eq!((rig.counter("write_zeroes_ops"), rig.counter("discard_ops")), (2, 1));
}

#[test]
fn an_image_that_is_not_sparse_keeps_its_room() {
    let file = file();
    file.as_file().write_all_at(&[0x55; 64 << 10], 0).unwrap();
    let mut rig = Rig::on_file(BlkConfig { sparse: false, ..config(&file) });
    assert_eq!(rig.disk.features() & (F_DISCARD | F_WRITE_ZEROES), F_WRITE_ZEROES);
    let driver = &mut rig.drivers[0];
    let sent = driver.range(DISCARD, 40, 8, 0);
    assert_eq!(driver.end(sent), (UNSUPP, 1));
    // To give the room back is a permission.
    let sent = driver.range(WRITE_ZEROES, 8, 8, 1);
    assert_eq!(driver.end(sent), (OK, 1));
    let bytes = fs::read(file.path()).unwrap();
    assert!(bytes[4096..8192].iter().all(|byte| *byte == 0) && bytes[40 * 512] == 0x55);
    assert!(file.as_file().metadata().unwrap().blocks() * 512 >= 64 << 10);
}

#[test]
fn a_disk_says_its_serial_or_its_id() {
    let file = file();
    for (serial, expected) in
        [(None, "_disk0"), (Some("a serial number of the disk"), "a serial number of t")]
    {
        let mut rig = Rig::on_file(BlkConfig { serial: serial.map(Into::into), ..config(&file) });
        let driver = &mut rig.drivers[0];
        let sent = driver.send(GET_ID, 0, &[], 20);
        assert_eq!(driver.end(sent), (OK, 21));
        let mut bytes = expected.as_bytes().to_vec();
        bytes.resize(20, 0);
        assert_eq!(driver.bytes(sent.data, 20), bytes);
        let sent = driver.send(GET_ID, 0, &[], 19);
        assert_eq!(driver.end(sent), (IOERR, 1));
    }
}

#[test]
fn wrong_requests_get_errors_and_the_disk_goes_on() {
    let file = file();
    let mut rig = Rig::on_file(config(&file));
    let driver = &mut rig.drivers[0];
    let last = u64::try_from(IMAGE_BYTES / 512).unwrap() - 1;
    let sector = [0xaa; 512];
    let wrong: Vec<Case> = vec![
        ("past the end", OUT, last, vec![1; 1024], 0, IOERR),
        ("outside", OUT, last + 1, sector.to_vec(), 0, IOERR),
        ("overflow in sectors", OUT, u64::MAX, sector.to_vec(), 0, IOERR),
        ("overflow in bytes", IN, u64::MAX >> 9, vec![], 512, IOERR),
        ("half a sector", OUT, 0, vec![1; 256], 0, IOERR),
        ("a sector and a byte", IN, 0, vec![], 513, IOERR),
        ("no data to write", OUT, 0, vec![], 0, IOERR),
        ("no room to read", IN, 0, vec![], 0, IOERR),
        ("a range that is too short", DISCARD, 0, vec![0; 15], 0, IOERR),
        ("two ranges", DISCARD, 0, range_bytes(0, 8, 0).repeat(2), 0, IOERR),
        ("nothing discarded", DISCARD, 0, range_bytes(0, 0, 0), 0, IOERR),
        ("a huge discard", DISCARD, 0, range_bytes(0, u32::MAX, 0), 0, IOERR),
        ("a wild discard", DISCARD, 0, range_bytes(u64::MAX, 8, 0), 0, IOERR),
        ("a discard with unmap", DISCARD, 0, range_bytes(0, 8, 1), 0, UNSUPP),
        ("a flag that is not", WRITE_ZEROES, 0, range_bytes(0, 8, 2), 0, UNSUPP),
        ("many zeroes", WRITE_ZEROES, 0, range_bytes(0, WRITE_ZEROES_SECTORS_MAX + 1, 0), 0, IOERR),
        ("zeroes past the end", WRITE_ZEROES, 0, range_bytes(last, 2, 0), 0, IOERR),
        ("SCSI", 2, 0, vec![], 0, UNSUPP),
        ("secure erase", 14, 0, range_bytes(0, 8, 0), 0, UNSUPP),
        ("nonsense", u32::MAX, 0, vec![], 0, UNSUPP),
    ];
    let count = u64::try_from(wrong.len()).unwrap();
    for (what, kind, sector, out, room, status) in wrong {
        let sent = driver.send(kind, sector, &out, room);
        assert_eq!(driver.end(sent), (status, 1), "{what}");
    }
    assert!(fs::read(file.path()).unwrap().iter().all(|byte| *byte == 0));
    let sent = driver.write(last, &sector);
    assert_eq!(driver.end(sent), (OK, 1));
    assert_eq!(rig.counter("errors"), count);
    assert!(rig.irq.resets.lock().unwrap().is_empty());
}

#[test]
fn a_readonly_disk_is_not_written() {
    let file = file();
    let mut rig = Rig::on_file(BlkConfig { readonly: true, ..config(&file) });
    assert_eq!(rig.disk.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    let driver = &mut rig.drivers[0];
    let sent = driver.write(0, &[1; 512]);
    assert_eq!(driver.end(sent), (IOERR, 1));
    let sent = driver.range(DISCARD, 0, 8, 0);
    assert_eq!(driver.end(sent), (UNSUPP, 1));
    let sent = driver.read(0, 512);
    assert_eq!(driver.end(sent), (OK, 513));
    let sent = driver.send(FLUSH, 0, &[], 0);
    assert_eq!(driver.end(sent), (OK, 1));
}

#[test]
fn the_hosts_error_is_the_guests() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    let driver = &mut rig.drivers[0];
    for (op, kind) in [(Op::Read(512, 512), IN), (Op::Write(512, 512), OUT), (Op::Flush, FLUSH)] {
        *image.broken.lock().unwrap() = Some(op);
        let out = if kind == OUT { vec![1; 512] } else { vec![] };
        let sent = driver.send(kind, 1, &out, if kind == IN { 512 } else { 0 });
        assert_eq!(driver.end(sent), (IOERR, 1));
        if kind == IN {
            assert_eq!(driver.bytes(sent.data, 512), [0; 512]);
        }
    }
    assert_eq!(rig.counter("errors"), 3);
    assert_eq!(rig.counter("write_ops"), 0);
}

#[test]
fn requests_longer_than_a_buffer_go_piece_by_piece() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    let driver = &mut rig.drivers[0];
    let len = 2 * buffer::BUFFER_BYTES_MAX / 4 * 3;
    let text = pattern(9, len);
    let sent = driver.write(1, &text);
    assert_eq!(driver.end(sent), (OK, 1));
    assert_eq!(image.bytes.lock().unwrap()[512..][..len], text);
    assert_eq!(image.begun().len(), 2);
    let sent = driver.read(1, len);
    assert_eq!(driver.end(sent), (OK, u32::try_from(len).unwrap() + 1));
    assert_eq!(driver.bytes(sent.data, len), text);
    // The second piece fails.
    let second = 512 + u64::try_from(buffer::BUFFER_BYTES_MAX).unwrap();
    *image.broken.lock().unwrap() = Some(Op::Read(second, len - buffer::BUFFER_BYTES_MAX));
    driver.memory.write_obj(UNTOUCHED, GuestAddress(sent.status)).unwrap();
    driver.offer(sent.head);
    driver.kick();
    assert_eq!(driver.end(sent), (IOERR, 1));
}

#[test]
fn a_request_may_be_cut_anywhere() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    let driver = &mut rig.drivers[0];
    // Virtio 1.2, 2.7.4: no assumption about the framing. Header in three, data at odd places.
    let mut bytes = driver.bytes(0, 0);
    bytes.extend([1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend(pattern(1, 1024));
    let at = driver.place(&bytes);
    let status = driver.place(&[UNTOUCHED]);
    let parts = [(at, 3, 0), (at + 3, 0, 0), (at + 3, 12, 0), (at + 15, 100, 0)];
    let parts = parts.into_iter().chain([(at + 115, 925, 0), (status, 1, WRITE)]);
    let head = driver.chain(&parts.collect::<Vec<_>>());
    driver.offer(head);
    driver.kick();
    assert_eq!(driver.end(Sent { head, data: 0, status }), (OK, 1));
    assert_eq!(image.bytes.lock().unwrap()[7 * 512..][..1024], pattern(1, 1024));
    // A read whose status byte follows the data in the same descriptor.
    let header = driver.header(IN, 7);
    let room = driver.place(&[UNTOUCHED; 1025]);
    let head = driver.chain(&[(header, 16, 0), (room, 600, WRITE), (room + 600, 425, WRITE)]);
    driver.offer(head);
    driver.kick();
    assert_eq!(driver.end(Sent { head, data: room, status: room + 1024 }), (OK, 1025));
    assert_eq!(driver.bytes(room, 1024), pattern(1, 1024));
}

#[test]
fn indirect_tables_are_for_who_negotiated_them() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    for negotiated in [true, false] {
        if !negotiated {
            rig.disk.reset();
            rig.memory = memory();
            rig.drivers = vec![Driver::new(&rig.memory, 0)];
            rig.activate_with(rig.disk.features() & !F_INDIRECT_DESC);
        }
        let driver = &mut rig.drivers[0];
        let header = driver.header(OUT, 3);
        let (data, status) = (driver.place(&[7; 512]), driver.place(&[UNTOUCHED]));
        let table = driver.room(48);
        driver.store(table, 0, Descriptor::new(header, 16, NEXT, 2));
        driver.store(table, 2, Descriptor::new(data, 512, NEXT, 1));
        driver.store(table, 1, Descriptor::new(status, 1, WRITE, 0));
        let head = driver.chain(&[(table, 48, INDIRECT)]);
        driver.offer(head);
        driver.kick();
        let expected = if negotiated { (OK, 1) } else { (UNTOUCHED, 0) };
        assert_eq!(driver.end(Sent { head, data, status }), expected);
    }
    assert_eq!(image.sector(3), 7);
}

#[test]
fn queues_work_beside_each_other() {
    let file = file();
    let mut rig = Rig::on_file(BlkConfig { num_queues: 3, ..config(&file) });
    for round in 0..100u8 {
        let mut sent = Vec::new();
        for driver in &mut rig.drivers {
            driver.data = u64::from(driver.index) * QUEUE_BYTES + DATA;
            let first = u64::from(driver.index) * 1000;
            let mine = (0..8).map(|at| (at, driver.write(first + at, &[round; 512])));
            sent.push(mine.collect::<Vec<_>>());
        }
        for (driver, sent) in rig.drivers.iter_mut().zip(sent) {
            let mut heads: Vec<_> = driver.answers(8).into_iter().map(|(head, _)| head).collect();
            heads.sort_unstable();
            let mut expected: Vec<_> = sent.iter().map(|(_, sent)| sent.head).collect();
            expected.sort_unstable();
            assert_eq!(heads, expected);
            assert!(sent.iter().all(|(_, sent)| driver.status(*sent) == OK));
        }
    }
    let bytes = fs::read(file.path()).unwrap();
    for index in 0..3 {
        assert!(bytes[index * 512_000..][..8 * 512].iter().all(|byte| *byte == 99));
    }
}

#[test]
fn an_event_index_saves_interrupts() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    let driver = &mut rig.drivers[0];
    // used_event, at the end of the available ring: not before the eighth answer.
    driver.put(driver.available_ring() + 4 + u64::from(SIZE) * 2, 7u16);
    for _ in 0..7 {
        let sent = driver.write(0, &[1; 512]);
        driver.end(sent);
    }
    thread::sleep(MOMENT);
    assert_eq!(rig.irq.queues.load(Ordering::SeqCst), 0);
    let sent = driver.write(0, &[1; 512]);
    driver.end(sent);
    until("the interrupt", || rig.irq.queues.load(Ordering::SeqCst) == 1);
}

#[test]
fn without_flush_a_write_is_durable_when_it_is_answered() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    rig.disk.reset();
    rig.activate_with(rig.disk.features() & !F_FLUSH);
    let driver = &mut rig.drivers[0];
    let sent = driver.write(0, &[1; 512]);
    assert_eq!(driver.end(sent), (OK, 1));
    assert_eq!(image.begun(), [Op::Write(0, 512), Op::Flush]);
}

#[test]
fn a_disk_that_is_kept_durable_answers_what_would_outlive_its_host() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    let answered = rig.drivers[0].write(0, &[1; 512]);
    rig.drivers[0].end(answered);
    image.block();
    let under_way = rig.drivers[0].write(1, &[2; 512]);
    until("the write", || image.begun().len() == 2);
    image.unblock();
    // What was answered before, and what is under way whatever it was begun as.
    let kept = rig.disk.keep_durable().unwrap();
    let driver = &mut rig.drivers[0];
    driver.end(under_way);
    let begun = image.begun();
    assert!(begun[2..].contains(&Op::Flush), "{begun:?}");
    let also = rig.disk.keep_durable().unwrap();
    drop(kept);
    let before = image.begun().len();
    let sent = rig.drivers[0].write(2, &[3; 512]);
    rig.drivers[0].end(sent);
    assert_eq!(image.begun()[before..], [Op::Write(1024, 512), Op::Flush]);
    drop(also);
    let sent = rig.drivers[0].write(3, &[4; 512]);
    rig.drivers[0].end(sent);
    assert_eq!(image.begun().last(), Some(&Op::Write(1536, 512)));
    *image.broken.lock().unwrap() = Some(Op::Flush);
    assert!(rig.disk.keep_durable().is_err());
}

#[test]
fn the_configuration_space_is_that_of_the_specification() {
    let file = file();
    let disk = Disk::new(BlkConfig { num_queues: 4, ..config(&file) }).unwrap();
    assert_eq!(disk.device_type(), DeviceType::Block);
    assert_eq!(disk.queue_sizes(), [SIZE; 4]);
    let bits = [2, 6, 9, 10, 12, 13, 14, 28, 29];
    assert_eq!(disk.features(), bits.iter().map(|bit| 1 << bit).sum::<u64>());
    let mut space = [0xff; 80];
    disk.read_config(0, &mut space);
    let field = |at: usize, len: usize| {
        space[at..at + len].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let expected = [
        ("capacity", 0, 8, 8192),
        ("size_max", 8, 4, 0),
        ("seg_max", 12, 4, 30),
        ("geometry", 16, 4, 0),
        ("blk_size", 20, 4, 512),
        ("physical_block_exp", 24, 1, 3),
        ("alignment_offset", 25, 1, 0),
        ("min_io_size", 26, 2, 8),
        ("opt_io_size", 28, 4, 0),
        ("writeback", 32, 1, 0),
        ("num_queues", 34, 2, 4),
        ("max_discard_sectors", 36, 4, 1 << 22),
        ("max_discard_seg", 40, 4, 1),
        ("discard_sector_alignment", 44, 4, 8),
        ("max_write_zeroes_sectors", 48, 4, 1 << 17),
        ("max_write_zeroes_seg", 52, 4, 1),
        ("write_zeroes_may_unmap", 56, 1, 1),
        ("what follows", 57, 8, 0),
    ];
    for (name, at, len, value) in expected {
        assert_eq!(field(at, len), value, "{name}");
    }
    let mut byte = [0xff];
    for offset in [60, 4096, u64::MAX] {
        disk.read_config(offset, &mut byte);
        assert_eq!(byte, [0]);
    }
    disk.read_config(1, &mut byte);
    assert_eq!(byte, [0x20]);
}

#[test]
fn only_raw_images_are_taken_for_raw() {
    let file = file();
    file.as_file().write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
    let error = Disk::new(config(&file)).err().unwrap();
    let BlkError::Image(error @ ImageError::Format(..)) = error else { panic!("{error}") };
    assert!(error.to_string().contains("qcow2"), "{error}");
    Disk::new(BlkConfig { image_type: ImageType::Raw, ..config(&file) }).unwrap();
    file.as_file().write_all_at(b"vhdxfile", 0).unwrap();
    assert!(Disk::new(config(&file)).is_err());
    let directory = BlkConfig { path: std::env::temp_dir(), ..config(&file) };
    assert!(matches!(Disk::new(directory), Err(BlkError::Image(ImageError::Kind(_)))));
    let nowhere = BlkConfig { path: "/nonexistent/image".into(), ..config(&file) };
    assert!(matches!(Disk::new(nowhere), Err(BlkError::Image(ImageError::Read(..)))));
    for (num_queues, queue_size) in [(0, 128), (257, 2), (1, 100), (1, 1), (1, 2048), (17, 1024)] {
        assert!(Disk::new(BlkConfig { num_queues, queue_size, ..config(&file) }).is_err());
    }
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let file = file();
    let disk = |readonly| Disk::new(BlkConfig { readonly, ..config(&file) }).unwrap();
    let writer = disk(false);
    writer.attach().unwrap();
    for readonly in [false, true] {
        // A second disk is made, and does not get the image.
        let error = disk(readonly).attach().unwrap_err();
        let path = file.path().to_str().unwrap();
        assert!(error.what.contains(path) && error.what.contains("in use"), "{error}");
    }
    assert!(writer.attach().is_err());
    drop(writer);
    let readers = [disk(true), disk(true)];
    readers.iter().for_each(|reader| reader.attach().unwrap());
    assert!(disk(false).attach().is_err());
    drop(readers);
    disk(false).attach().unwrap();
    file.as_file().set_len(4096).unwrap();
    let small = disk(false);
    file.as_file().set_len(512).unwrap();
    assert!(small.attach().unwrap_err().what.contains("shrunk"));
}

#[test]
fn a_disk_without_its_image_does_not_begin() {
    let file = file();
    let rig = Rig::bare(config(&file));
    let activation = |queues| Activation {
        memory: Arc::clone(&rig.memory),
        features: rig.disk.features(),
        queues,
        interrupt: Arc::<Irq>::default(),
    };
    let error = rig.disk.activate(activation(vec![rig.drivers[0].active()])).unwrap_err();
    assert!(matches!(error, ActivateError::NotAttached), "{error}");
    rig.disk.attach().unwrap();
    let error = rig.disk.activate(activation(vec![])).unwrap_err();
    assert!(matches!(error, ActivateError::Queues { found: 0, needed: 1 }), "{error}");
}

#[test]
fn past_the_page_cache() {
    // Beside the build, since a temporary file system may not know O_DIRECT.
    let file = NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let mut rig = Rig::on_file(BlkConfig { direct: true, ..config(&file) });
    let driver = &mut rig.drivers[0];
    let text = pattern(77, 3 * 512);
    let sent = driver.write(3, &text);
    assert_eq!(driver.end(sent), (OK, 1));
    let sent = driver.read(3, text.len());
    assert_eq!(driver.end(sent).0, OK);
    assert_eq!(driver.bytes(sent.data, text.len()), text);
}

#[test]
fn threads_are_named_after_the_disk() {
    let file = file();
    let named = |id: &str, suffix| BlkConfig { id: id.into(), ..config(&file) }.thread_name(suffix);
    assert_eq!(named("_disk12", "_q3"), "_disk12_q3");
    assert_eq!(named("a-long-name-of-a-disk", "_q255"), "a-long-nam_q255");
    assert_eq!(named("ééééééééééé", "_io1"), "ééééé_io1");
}
