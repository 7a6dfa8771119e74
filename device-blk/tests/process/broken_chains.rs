//! Requests whose descriptors make no sense are answered, and the ring goes on: the frontend of
//! [`crate::crash`] panics when the daemon reports it broken.

use crate::crash::Guest;
use crate::daemon::{Daemon, Place, await_some};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const HEADER_GPA: u64 = 0x4_0000;
const STATUS_GPA: u64 = 0x4_1000;
const DATA_GPA: u64 = 0x5_0000;
const OUTSIDE_GPA: u64 = 1 << 40;

const OK: u8 = 0;
const IOERR: u8 = 1;
const NO_STATUS: u8 = 0xff;

type Desc = (u64, u32, u16, u16);

const HEADER: Desc = (HEADER_GPA, 16, NEXT, 1);
const fn data(flags: u16) -> Desc {
    (DATA_GPA, 512, flags | NEXT, 2)
}
const STATUS: Desc = (STATUS_GPA, 1, WRITE, 0);

struct Served {
    guest: Guest,
    daemon: Daemon,
    _place: Place,
}

impl Served {
    /// A read of the first sector, with these descriptors: its status, and the used length.
    fn request(&mut self, descs: &[Desc]) -> (u8, u32) {
        let Guest {
            memory,
            driver,
            kick,
            ..
        } = &mut self.guest;
        memory.write(HEADER_GPA, &[0; 16]);
        memory.write(STATUS_GPA, &[NO_STATUS]);
        for (index, &(gpa, len, flags, next)) in (0..).zip(descs) {
            driver.set_desc(index, gpa, len, flags, next);
        }
        driver.push_avail(0);
        kick.write(1).unwrap();
        let used = await_some("a request completes", || driver.pop_used());
        assert_eq!(used.0, 0);
        self.daemon.assert_alive();
        (memory.read(STATUS_GPA, 1)[0], used.1)
    }
}

#[test]
fn broken_requests_report_ioerr_where_they_can_and_the_disk_serves_on() {
    let place = Place::new();
    place.image("a.img", 64);
    let daemon = Daemon::start(&place, &[&place.disk("a")]);
    let guest = Guest::boot(&place);
    let mut served = Served {
        guest,
        daemon,
        _place: place,
    };
    let sound = [HEADER, data(WRITE), STATUS];
    let answered: [(&str, Vec<Desc>); 6] = [
        (
            "data outside memory",
            vec![HEADER, (OUTSIDE_GPA, 512, WRITE | NEXT, 2), STATUS],
        ),
        (
            "header outside memory",
            vec![(OUTSIDE_GPA, 16, NEXT, 1), data(WRITE), STATUS],
        ),
        (
            "no data bytes",
            vec![HEADER, (DATA_GPA, 0, WRITE | NEXT, 2), STATUS],
        ),
        (
            "written before read",
            vec![data(WRITE), HEADER, data(0), STATUS],
        ),
        (
            "4 GiB in one direction",
            vec![
                HEADER,
                (DATA_GPA, u32::MAX, WRITE | NEXT, 2),
                (DATA_GPA, u32::MAX, WRITE | NEXT, 3),
                STATUS,
            ],
        ),
        ("giant", vec![HEADER, (0, 4 << 20, WRITE | NEXT, 2), STATUS]),
    ];
    for (what, mut descs) in answered {
        let last = descs.len() - 1;
        for (index, desc) in descs[..last].iter_mut().enumerate() {
            desc.3 = index as u16 + 1;
        }
        // What counts as written is what was written from the first writable byte on.
        let writable: u64 = descs
            .iter()
            .filter(|desc| desc.2 & WRITE != 0)
            .map(|desc| u64::from(desc.1))
            .sum();
        let used_len = u32::from(writable == 1);
        assert_eq!(served.request(&descs), (IOERR, used_len), "{what}");
        assert_eq!(served.request(&sound), (OK, 513), "after {what}");
    }
    let unanswered: [(&str, &[Desc]); 6] = [
        ("a loop", &[HEADER, (DATA_GPA, 512, WRITE | NEXT, 0)]),
        ("a loop of one", &[(DATA_GPA, 512, WRITE | NEXT, 0)]),
        (
            "next past the ring",
            &[HEADER, (STATUS_GPA, 1, WRITE | NEXT, 4096)],
        ),
        (
            "indirect, which was not negotiated",
            &[(DATA_GPA, 48, INDIRECT, 0)],
        ),
        (
            "no bytes at all",
            &[(HEADER_GPA, 0, NEXT, 1), (STATUS_GPA, 0, WRITE, 0)],
        ),
        (
            "status outside memory",
            &[HEADER, data(WRITE), (OUTSIDE_GPA, 1, WRITE, 0)],
        ),
    ];
    for (what, descs) in unanswered {
        assert_eq!(served.request(descs), (NO_STATUS, 0), "{what}");
        assert_eq!(served.request(&sound), (OK, 513), "after {what}");
    }
}
