//! An image that answers every request with an error: a stand-in serves it while the disk's own daemon cannot be
//! had and its outage policy says that requests are to fail.
//!
//! Everything that the guest was told of the disk stays as it is. The image beneath is open and locked, so that
//! it is known to be at rest: nothing that a dead daemon left in the kernel comes after the first answer.

use std::sync::Arc;

use super::{Access, DirectIo, Image, Place, Task};

/// See the module's description.
#[derive(Debug)]
pub(crate) struct FailingImage(Arc<dyn Image>);

impl FailingImage {
    /// Fails what is asked of `image`.
    pub(crate) fn new(image: Arc<dyn Image>) -> Self {
        Self(image)
    }
}

impl Image for FailingImage {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn format(&self) -> &'static str {
        self.0.format()
    }

    fn is_read_only(&self) -> bool {
        self.0.is_read_only()
    }

    fn capacity_sectors(&self) -> u64 {
        self.0.capacity_sectors()
    }

    fn physical_block_bytes(&self) -> u32 {
        self.0.physical_block_bytes()
    }

    fn punches_holes(&self) -> bool {
        self.0.punches_holes()
    }

    fn direct(&self) -> Option<DirectIo> {
        None
    }

    fn locate(&self, _access: Access, _offset_bytes: u64, len_bytes: u64) -> Place {
        Place::Worker { len_bytes }
    }

    fn perform(&self, _task: &mut Task<'_>) -> Result<(), i32> {
        Err(libc::EIO)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::image::{OpenOptions, RawImage};

    #[test]
    fn every_task_fails_and_the_disk_looks_the_same() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let options = OpenOptions {
            read_only: false,
            page_cache: true,
            block_bytes: 512,
            lock_patience: Duration::ZERO,
        };
        let raw = RawImage::from_file(file, "disk".to_owned(), options).unwrap();
        let look = |image: &dyn Image| {
            (
                image.capacity_sectors(),
                image.physical_block_bytes(),
                image.punches_holes(),
                image.is_read_only(),
            )
        };
        let before = look(&raw);
        let image = FailingImage::new(Arc::new(raw));
        assert_eq!(look(&image), before);
        for access in [Access::Read, Access::Write] {
            let place = image.locate(access, 4096, 8192);
            assert!(matches!(place, Place::Worker { len_bytes: 8192 }));
        }
        let mut discard = Task::Discard {
            offset_bytes: 0,
            len_bytes: 512,
        };
        for task in [&mut Task::Flush, &mut discard] {
            assert_eq!(image.perform(task), Err(libc::EIO));
        }
        assert!(image.plain_file().is_none() && image.flush_file().is_none());
    }
}
