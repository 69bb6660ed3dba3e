//! One row's entry in the index of the cache: of fixed size, with checksums of itself and of the row's data.

/// Bytes of an entry.
pub(super) const ENTRY: usize = 56;
/// Bytes of an image in the data: place, hash, height, width.
pub(super) const IMAGE: usize = 4 + 16 + 4 + 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Sample = 1,
    Dropped = 2,
    Problem = 3,
}

/// Where a row's data is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) row: u32,
    pub(super) kind: Kind,
    pub(super) truncated: bool,
    /// Tokens; of a problem: bytes of its reason.
    pub(super) ids: u32,
    /// Runs; of a problem: bytes of its message.
    pub(super) runs: u32,
    pub(super) targets: u32,
    /// Images, behind the runs.
    pub(super) images: u32,
    /// Bytes of the notes, behind the images.
    pub(super) notes: u32,
    pub(super) offset: u64,
    pub(super) checksum: u64,
}

impl Entry {
    /// Bytes of a sample's ids, runs and images.
    pub(super) fn tokens_size(&self) -> u64 {
        u64::from(self.ids) * 4 + u64::from(self.runs) * 8 + u64::from(self.images) * IMAGE as u64
    }

    pub(super) fn without_tokens(row: u32, kind: Kind, ids: u32, runs: u32) -> Self {
        Self { row, kind, truncated: false, ids, runs, targets: 0, images: 0, notes: 0, offset: 0, checksum: 0 }
    }

    /// Bytes in the data file.
    pub(super) fn size(&self) -> u64 {
        match self.kind {
            Kind::Sample => self.tokens_size() + u64::from(self.notes),
            Kind::Dropped => 0,
            Kind::Problem => u64::from(self.ids) + u64::from(self.runs),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[0..4].copy_from_slice(&self.row.to_le_bytes());
        bytes[4] = self.kind as u8;
        bytes[5] = u8::from(self.truncated);
        bytes[8..12].copy_from_slice(&self.ids.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.runs.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.targets.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.notes.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.images.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.offset.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.checksum.to_le_bytes());
        let own = checksum(&bytes[..48]);
        bytes[48..56].copy_from_slice(&own.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        if u64_at(48)? != checksum(&bytes[..48]) {
            return None;
        }
        let kind = match bytes[4] {
            1 => Kind::Sample,
            2 => Kind::Dropped,
            3 => Kind::Problem,
            _ => return None,
        };
        Some(Self {
            row: u32_at(0)?,
            kind,
            truncated: bytes[5] == 1,
            ids: u32_at(8)?,
            runs: u32_at(12)?,
            targets: u32_at(16)?,
            notes: u32_at(20)?,
            images: u32_at(24)?,
            offset: u64_at(32)?,
            checksum: u64_at(40)?,
        })
    }
}

/// The first eight bytes of the hash.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    let hash = blake3::hash(bytes);
    let mut head = [0; 8];
    head.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(head)
}
