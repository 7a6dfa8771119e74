//! Disks with blocks of 4096 bytes, and drivers that do not keep to them.

use crate::daemon::{Daemon, Place, numbered_sector, read_image};
use crate::driver::Client;

const BLOCK: usize = 4096;

#[test]
fn disk_of_large_blocks_serves_whole_blocks_and_refuses_parts() {
    for more in ["", ",page-cache"] {
        let place = Place::new();
        let image = place.image("d.img", 8 * 100 + 3);
        let disk = format!("{},block-size=4096{more}", place.disk("d"));
        let mut daemon = Daemon::start(&place, &[&disk]);
        let mut client = Client::connect(&place.socket("d"));
        let config = client.config();
        assert_eq!(u32::from(config.blk_size), BLOCK as u32);
        assert_eq!(u64::from(config.capacity), 800, "whole blocks");

        let data = client.read(5 * BLOCK as u64, 2 * BLOCK);
        assert_eq!(data[..512], numbered_sector(40));
        assert_eq!(client.write(6 * BLOCK as u64, &[7; BLOCK]), 0);
        // Memory is as the driver likes it, also past the page cache.
        assert_eq!(
            client.transfer(true, 0, &[(512, 512), (2048 + 8, BLOCK - 512)]),
            0
        );
        for (offset, len) in [(512, BLOCK), (0, 512), (800 * 512, BLOCK)] {
            assert!(client.read_at(0, offset, 0, len) < 0, "{len} at {offset}");
            assert!(client.write_at(0, offset, 0, len) < 0, "{len} at {offset}");
        }
        assert!(client.write_zeroes(512, BLOCK as u64, false) < 0);
        assert_eq!(
            client.write_zeroes(7 * BLOCK as u64, BLOCK as u64, false),
            0
        );
        assert_eq!(client.flush(), 0);
        assert_eq!(read_image(&image, 6 * BLOCK as u64, BLOCK), [7; BLOCK]);
        assert_eq!(read_image(&image, 7 * BLOCK as u64, BLOCK), [0; BLOCK]);
        daemon.assert_alive();
    }
}
