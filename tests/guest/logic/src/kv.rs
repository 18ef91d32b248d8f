//! The key-value server's frames on the wire and its records on disk. All numbers are little
//! endian.
//!
//! | Frame, 24 bytes | 0 | 1..4 | 4..8 | 8..16 | 16..24 |
//! |---|---|---|---|---|---|
//! | [`Request`] | operation: 1 get, 2 put, 3 stop | zero | key | value | id |
//! | [`Response`] | status: 0 ok, 1 bad request, 2 not logged | zero | key | value | id |
//!
//! | Record, one sector | 0..4 | 4..8 | 8..16 | 16..20 | 20..24 | 24..32 | 32..40 | 40..512 |
//! |---|---|---|---|---|---|---|---|---|
//! | [`Record`] | `KVLG` | CRC-32 (IEEE) of 8..40 | number | key | zero | value | id | zero |
//!
//! Record n is in sector n of the disk. A put is answered with "ok" only when its record is on
//! stable storage; one that could not be logged has no effect.

use core::fmt;

/// Bytes of a request and of a response.
pub const FRAME_BYTES: usize = 24;
/// Bytes of a record.
pub const SECTOR_BYTES: usize = 512;
/// Keys are below this.
pub const KEYS: u32 = 4096;
/// The key of a stop: an operation that went astray does not end the guest.
pub const STOP_KEY: u32 = 0xdead;

const MAGIC: [u8; 4] = *b"KVLG";
const RECORD_BYTES: usize = 40;
/// Where the bytes begin that the checksum is of.
const SUMMED_FROM: usize = 8;

/// What a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read a key.
    Get,
    /// Write a key.
    Put,
    /// Answer and power off. Its key is [`STOP_KEY`].
    Stop,
}

/// A client's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub operation: Operation,
    pub key: u32,
    /// What to write; of no meaning elsewhere.
    pub value: u64,
    /// The client's own, given back in the response.
    pub id: u64,
}

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok,
    /// No such operation or key, or bytes that should be zero are not.
    BadRequest,
    /// The log is full or the disk failed; nothing was written.
    NotLogged,
}

/// The server's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: Status,
    pub key: u32,
    /// The value read, zero if there is none; of other operations the request's.
    pub value: u64,
    pub id: u64,
}

/// A request that cannot be served. It is answered, and the connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRequest {
    pub key: u32,
    pub value: u64,
    pub id: u64,
}

/// A response that no server sends: its status or its zeroes are something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadResponse;

/// One put, as it is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The sector that it is in.
    pub number: u64,
    pub key: u32,
    pub value: u64,
    pub id: u64,
}

/// A sector that is neither empty nor the record that belongs there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRecord {
    Magic,
    Checksum {
        found: u32,
        computed: u32,
    },
    /// Whole, but of another sector.
    Number {
        found: u64,
    },
    Key {
        found: u32,
    },
    /// A byte that should be zero is not.
    NotZero {
        offset: usize,
    },
}

impl fmt::Display for BadRequest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Request {} is not valid", self.id)
    }
}

impl fmt::Display for BadResponse {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Response is not valid")
    }
}

impl fmt::Display for BadRecord {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => formatter.write_str("Sector does not begin as a record does"),
            Self::Checksum { found, computed } => {
                write!(formatter, "Checksum is {found:#010x}, not {computed:#010x}")
            }
            Self::Number { found } => write!(formatter, "Record is number {found}"),
            Self::Key { found } => write!(formatter, "Record has key {found}"),
            Self::NotZero { offset } => write!(formatter, "Byte {offset} of record is not zero"),
        }
    }
}

impl core::error::Error for BadRequest {}
impl core::error::Error for BadResponse {}
impl core::error::Error for BadRecord {}

/// A frame's fields, whatever they mean.
struct Frame {
    first: u8,
    padding: [u8; 3],
    key: u32,
    value: u64,
    id: u64,
}

impl Frame {
    fn encode(first: u8, key: u32, value: u64, id: u64) -> [u8; FRAME_BYTES] {
        let mut bytes = [0; FRAME_BYTES];
        bytes[0] = first;
        bytes[4..8].copy_from_slice(&key.to_le_bytes());
        bytes[8..16].copy_from_slice(&value.to_le_bytes());
        bytes[16..].copy_from_slice(&id.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; FRAME_BYTES]) -> Self {
        Self {
            first: bytes[0],
            padding: part(bytes, 1),
            key: u32::from_le_bytes(part(bytes, 4)),
            value: u64::from_le_bytes(part(bytes, 8)),
            id: u64::from_le_bytes(part(bytes, 16)),
        }
    }
}

/// `LEN` bytes from `offset` on; zeroes where there are none, which no caller asks for.
fn part<const LEN: usize>(bytes: &[u8], offset: usize) -> [u8; LEN] {
    let mut field = [0; LEN];
    if let Some(found) = bytes.get(offset..offset + LEN) {
        field.copy_from_slice(found);
    }
    field
}

impl Request {
    #[must_use]
    pub fn encode(self) -> [u8; FRAME_BYTES] {
        let operation = match self.operation {
            Operation::Get => 1,
            Operation::Put => 2,
            Operation::Stop => 3,
        };
        Frame::encode(operation, self.key, self.value, self.id)
    }

    pub fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, BadRequest> {
        let Frame { first, padding, key, value, id } = Frame::decode(bytes);
        let operation = match (first, key) {
            (1, 0..KEYS) => Operation::Get,
            (2, 0..KEYS) => Operation::Put,
            (3, STOP_KEY) => Operation::Stop,
            _ => return Err(BadRequest { key, value, id }),
        };
        if padding != [0; 3] {
            return Err(BadRequest { key, value, id });
        }
        Ok(Self { operation, key, value, id })
    }

    /// The response with this request's key and id.
    #[must_use]
    pub fn response(self, status: Status, value: u64) -> Response {
        Response { status, key: self.key, value, id: self.id }
    }
}

impl BadRequest {
    #[must_use]
    pub fn response(self) -> Response {
        let Self { key, value, id } = self;
        Response { status: Status::BadRequest, key, value, id }
    }
}

impl Response {
    #[must_use]
    pub fn encode(self) -> [u8; FRAME_BYTES] {
        let status = match self.status {
            Status::Ok => 0,
            Status::BadRequest => 1,
            Status::NotLogged => 2,
        };
        Frame::encode(status, self.key, self.value, self.id)
    }

    pub fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, BadResponse> {
        let Frame { first, padding, key, value, id } = Frame::decode(bytes);
        let status = match first {
            0 => Status::Ok,
            1 => Status::BadRequest,
            2 => Status::NotLogged,
            _ => return Err(BadResponse),
        };
        if padding != [0; 3] {
            return Err(BadResponse);
        }
        Ok(Self { status, key, value, id })
    }
}

impl Record {
    #[must_use]
    pub fn encode(self) -> [u8; SECTOR_BYTES] {
        let mut sector = [0; SECTOR_BYTES];
        sector[..4].copy_from_slice(&MAGIC);
        sector[8..16].copy_from_slice(&self.number.to_le_bytes());
        sector[16..20].copy_from_slice(&self.key.to_le_bytes());
        sector[24..32].copy_from_slice(&self.value.to_le_bytes());
        sector[32..RECORD_BYTES].copy_from_slice(&self.id.to_le_bytes());
        let sum = crc32fast::hash(&sector[SUMMED_FROM..RECORD_BYTES]);
        sector[4..8].copy_from_slice(&sum.to_le_bytes());
        sector
    }

    /// What sector `number` holds; None where nothing was ever written.
    pub fn decode(number: u64, sector: &[u8; SECTOR_BYTES]) -> Result<Option<Self>, BadRecord> {
        if sector.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if part(sector, 0) != MAGIC {
            return Err(BadRecord::Magic);
        }
        let found = u32::from_le_bytes(part(sector, 4));
        let computed = crc32fast::hash(&sector[SUMMED_FROM..RECORD_BYTES]);
        if found != computed {
            return Err(BadRecord::Checksum { found, computed });
        }
        let mut zeroes = (20..24).chain(RECORD_BYTES..SECTOR_BYTES);
        if let Some(offset) = zeroes.find(|offset| sector[*offset] != 0) {
            return Err(BadRecord::NotZero { offset });
        }
        let record = Self {
            number: u64::from_le_bytes(part(sector, 8)),
            key: u32::from_le_bytes(part(sector, 16)),
            value: u64::from_le_bytes(part(sector, 24)),
            id: u64::from_le_bytes(part(sector, 32)),
        };
        if record.number != number {
            return Err(BadRecord::Number { found: record.number });
        }
        if record.key >= KEYS {
            return Err(BadRecord::Key { found: record.key });
        }
        Ok(Some(record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUE: u64 = 0x1112_1314_1516_1718;
    const ID: u64 = 0x2122_2324_2526_2728;
    const RECORD: Record =
        Record { number: 0x0102_0304_0506_0708, key: 4095, value: VALUE, id: ID };

    fn request(operation: Operation, key: u32) -> Request {
        Request { operation, key, value: VALUE, id: ID }
    }

    /// The sector with its checksum put right.
    fn summed(mut sector: [u8; SECTOR_BYTES]) -> [u8; SECTOR_BYTES] {
        let sum = crc32fast::hash(&sector[8..40]);
        sector[4..8].copy_from_slice(&sum.to_le_bytes());
        sector
    }

    #[test]
    fn requests_are_what_is_documented() {
        let bytes = request(Operation::Put, 0xabc).encode();
        let expected = [
            2, 0, 0, 0, 0xbc, 0x0a, 0, 0, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11, 0x28,
            0x27, 0x26, 0x25, 0x24, 0x23, 0x22, 0x21,
        ];
        assert_eq!(bytes, expected);
        for (operation, first, key) in
            [(Operation::Get, 1, 0), (Operation::Put, 2, 4095), (Operation::Stop, 3, 0xdead)]
        {
            let request = request(operation, key);
            assert_eq!(request.encode()[0], first);
            assert_eq!(Request::decode(&request.encode()), Ok(request));
        }
    }

    #[test]
    fn a_bad_request_is_answered_with_what_it_said() {
        let refused = |bytes: [u8; FRAME_BYTES]| Request::decode(&bytes).unwrap_err();
        let cases = [(Operation::Get, 4096), (Operation::Put, u32::MAX), (Operation::Stop, 0)];
        for (operation, key) in cases {
            let bad = refused(request(operation, key).encode());
            assert_eq!(bad, BadRequest { key, value: VALUE, id: ID });
            let response = Response { status: Status::BadRequest, key, value: VALUE, id: ID };
            assert_eq!(bad.response(), response);
        }
        for (offset, value) in [(0, 0), (0, 4), (0, 255), (1, 1), (2, 1), (3, 128)] {
            let mut bytes = request(Operation::Get, 7).encode();
            bytes[offset] = value;
            assert_eq!(refused(bytes).key, 7, "byte {offset} is {value}");
        }
    }

    #[test]
    fn responses_are_what_is_documented() {
        for (status, first) in [(Status::Ok, 0), (Status::BadRequest, 1), (Status::NotLogged, 2)] {
            let response = request(Operation::Get, 9).response(status, 0x31);
            let bytes = response.encode();
            let mut expected = [0; FRAME_BYTES];
            (expected[0], expected[4], expected[8]) = (first, 9, 0x31);
            expected[16..].copy_from_slice(&ID.to_le_bytes());
            assert_eq!(bytes, expected);
            assert_eq!(Response::decode(&bytes), Ok(response));
        }
        for (offset, value) in [(0, 3), (1, 1), (2, 255), (3, 1)] {
            let mut bytes = [0; FRAME_BYTES];
            bytes[offset] = value;
            assert_eq!(Response::decode(&bytes), Err(BadResponse), "byte {offset} is {value}");
        }
    }

    #[test]
    fn records_are_what_is_documented() {
        let sector = RECORD.encode();
        let mut expected = [0; SECTOR_BYTES];
        expected[..4].copy_from_slice(b"KVLG");
        // From another implementation: Python's zlib.crc32 of bytes 8..40.
        expected[4..8].copy_from_slice(&0xcef5_d83d_u32.to_le_bytes());
        expected[8..16].copy_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
        expected[16..18].copy_from_slice(&[0xff, 0x0f]);
        expected[24..32].copy_from_slice(&VALUE.to_le_bytes());
        expected[32..40].copy_from_slice(&ID.to_le_bytes());
        assert_eq!(sector, expected);
        assert_eq!(Record::decode(RECORD.number, &sector), Ok(Some(RECORD)));
        assert_eq!(Record::decode(7, &[0; SECTOR_BYTES]), Ok(None));
    }

    #[test]
    fn every_damaged_byte_of_a_record_is_seen() {
        for offset in 0..SECTOR_BYTES {
            let mut sector = RECORD.encode();
            sector[offset] ^= 0x10;
            let found = Record::decode(RECORD.number, &sector);
            let right = match offset {
                0..4 => found == Err(BadRecord::Magic),
                4..40 => matches!(found, Err(BadRecord::Checksum { .. })),
                _ => found == Err(BadRecord::NotZero { offset }),
            };
            assert!(right, "byte {offset}: {found:?}");
        }
    }

    #[test]
    fn a_whole_record_in_the_wrong_place_is_seen() {
        let found = Record::decode(3, &RECORD.encode());
        assert_eq!(found, Err(BadRecord::Number { found: RECORD.number }));
        let found = Record::decode(3, &Record { number: 3, key: KEYS, ..RECORD }.encode());
        assert_eq!(found, Err(BadRecord::Key { found: KEYS }));
        let mut sector = Record { number: 3, ..RECORD }.encode();
        sector[21] = 1;
        let found = Record::decode(3, &summed(sector));
        assert_eq!(found, Err(BadRecord::NotZero { offset: 21 }));
    }
}
