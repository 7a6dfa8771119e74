//! A device daemon whose control service is all right and which hangs up on every frontend. It is this test
//! program, executed again.

use std::{
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use api::{
    daemon::{DeviceTable, Parts, ServedDevice},
    device::Device,
    fds::Inbox,
    listen,
    serve::Services,
};
use tonic::Status;

/// Holds the daemon's command line.
pub(super) const ARGS: &str = "MORTISE_TEST_ARGS";
/// No test lasts longer.
const LIFETIME_S: u32 = 60;

#[test]
#[ignore = "a process that another test starts"]
fn daemon() {
    let Ok(args) = std::env::var(ARGS) else {
        return;
    };
    // SAFETY: it takes an integer and touches no memory.
    unsafe { libc::alarm(LIFETIME_S) };
    let words: Vec<&str> = args.split(' ').collect();
    let after = |option: &str| -> PathBuf {
        let at = words.iter().position(|word| *word == option).unwrap();
        Path::new(words[at + 1]).to_owned()
    };
    let control = listen::unix(&after("--control-socket")).unwrap();
    let (listener, file) = listen::unix_socket(&after("--fd-socket")).unwrap();
    let inbox = Inbox::on(listener, file).unwrap();
    let table = DeviceTable::new("device-blk", Vec::new(), Some(inbox), |parts: Parts| {
        Ok(Arc::new(Repellent::on(parts.listener)) as Arc<dyn ServedDevice>)
    });
    api::daemon::run(&table, Services::new(), control, None).unwrap();
}

struct Repellent {
    ended: Arc<AtomicBool>,
}

impl Repellent {
    fn on(listener: UnixListener) -> Self {
        let ended = Arc::<AtomicBool>::default();
        let is_over = ended.clone();
        listener.set_nonblocking(true).unwrap();
        thread::spawn(move || {
            while !is_over.load(Ordering::SeqCst) {
                drop(listener.accept());
                thread::sleep(Duration::from_millis(1));
            }
        });
        Self { ended }
    }
}

impl ServedDevice for Repellent {
    fn describe(&self) -> Device {
        Device::default()
    }

    fn stop(&self, _: Duration) -> Result<(), Status> {
        self.ended.store(true, Ordering::SeqCst);
        Ok(())
    }
}
