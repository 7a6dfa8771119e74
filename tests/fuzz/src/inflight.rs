//! An in-flight region with anything in it: the successor takes over no more than the ring holds, nothing
//! twice, and leaves nothing behind.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use vhost_user::inflight::InflightRegion;
use vhost_user::ring::{Ring, RingConfig, RingFormat, Successor};

use crate::input::Input;
use crate::ring::{Guest, config, with_guest};

/// The ring's shape, how long the region is, the region, and what is in memory.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let shape = input.bytes(4);
    let len = usize::from(input.half());
    let region = input.bytes(len);
    with_guest(input.0, |guest| {
        let config = config(&mut Input(shape), guest);
        let format = RingFormat::of(config.features);
        let Ok((_, file)) = InflightRegion::create(format, 1, config.size) else {
            return;
        };
        let len = (InflightRegion::needed_bytes(format, 1, config.size) as usize).min(region.len());
        file.write_all_at(&region[..len], 0).expect("it is memory");
        if let Some(mut ring) = start(&config, &file) {
            replay(&mut ring, guest);
            assert_eq!(
                ring.finish(Successor::Told).in_flight,
                0,
                "all were completed"
            );
            let again = start(&config, &file);
            let left = again.map_or(0, |ring| ring.left_to_resubmit());
            assert_eq!(left, 0, "what was completed is forgotten");
        }
    });
}

fn start(config: &RingConfig, file: &File) -> Option<Ring> {
    let format = RingFormat::of(config.features);
    let len_bytes = InflightRegion::needed_bytes(format, 1, config.size);
    let region = InflightRegion::map(file, 0, len_bytes, format, 1, config.size);
    Ring::start(RingConfig {
        inflight: region.expect("just made").queue(0, config.size),
        memory: config.memory.clone(),
        call: None,
        ..*config
    })
    .ok()
}

fn replay(ring: &mut Ring, guest: &Guest) {
    let left = ring.left_to_resubmit();
    assert!(left <= ring.size(), "{left} to resubmit");
    let mut heads = HashSet::new();
    let mut held = Vec::new();
    for _ in 0..left {
        // The driver may have broken the ring meanwhile.
        let Ok(Some(chain)) = ring.pop() else { break };
        guest.touch(&chain);
        assert!(heads.insert(chain.head()), "twice");
        held.push(chain);
    }
    for chain in held {
        ring.complete(chain, 0);
    }
    ring.notify();
}
