//! Reading structures out of physical memory, whoever wrote them.

/// Physical memory as a parser sees it.
pub trait Physical {
    /// Fills `buffer` from `address` on; false where there is no such memory.
    fn read(&self, address: u64, buffer: &mut [u8]) -> bool;

    fn read_u8(&self, address: u64) -> Option<u8> {
        let mut bytes = [0; 1];
        self.read(address, &mut bytes).then_some(bytes[0])
    }

    fn read_u32(&self, address: u64) -> Option<u32> {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes).then(|| u32::from_le_bytes(bytes))
    }

    fn read_u64(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes).then(|| u64::from_le_bytes(bytes))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::Physical;

    /// Memory that begins at an address of its own.
    pub(crate) struct Image {
        pub start: u64,
        pub bytes: Vec<u8>,
    }

    impl Physical for Image {
        fn read(&self, address: u64, buffer: &mut [u8]) -> bool {
            let Some(offset) = address.checked_sub(self.start) else { return false };
            let Ok(offset) = usize::try_from(offset) else { return false };
            let Some(end) = offset.checked_add(buffer.len()) else { return false };
            let Some(bytes) = self.bytes.get(offset..end) else { return false };
            buffer.copy_from_slice(bytes);
            true
        }
    }

    #[test]
    fn outside_is_none() {
        let image = Image { start: 16, bytes: vec![1, 0, 0, 0, 9] };
        assert_eq!(image.read_u32(16), Some(1));
        assert_eq!(image.read_u8(20), Some(9));
        assert_eq!(image.read_u32(17), Some(0x0900_0000));
        assert_eq!(image.read_u32(18), None);
        assert_eq!(image.read_u64(0), None);
    }
}
