//! A running daemon, its images and its sockets.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// For everything that takes milliseconds on an idle machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Directory with the images, sockets and logs of one test.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An image in which each sector tells its own number.
    pub(crate) fn image(&self, name: &str, sectors: u64) -> PathBuf {
        let path = self.path(name);
        let mut file = File::create(&path).unwrap();
        for sector in 0..sectors {
            file.write_all(&numbered_sector(sector)).unwrap();
        }
        path
    }

    /// `id=NAME,path=NAME.img,socket=NAME.vu`
    pub(crate) fn disk(&self, id: &str) -> String {
        let (image, socket) = (
            self.path(&format!("{id}.img")),
            self.path(&format!("{id}.vu")),
        );
        format!(
            "id={id},path={},socket={}",
            image.display(),
            socket.display()
        )
    }

    pub(crate) fn socket(&self, id: &str) -> PathBuf {
        self.path(&format!("{id}.vu"))
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.path("control")
    }

    pub(crate) fn fds(&self) -> PathBuf {
        self.path("fds")
    }
}

/// What [`Place::image`] puts into a sector.
pub(crate) fn numbered_sector(sector: u64) -> [u8; 512] {
    let mut bytes = [0x5a; 512];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes
}

pub(crate) fn read_image(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    File::open(path)
        .unwrap()
        .read_exact_at(&mut data, offset)
        .unwrap();
    data
}

/// A `device-blk` process; killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts a daemon and waits until it serves.
    pub(crate) fn start(place: &Place, disks: &[&str]) -> Self {
        Self::start_with(place, disks, &[])
    }

    pub(crate) fn start_with(place: &Place, disks: &[&str], more: &[&str]) -> Self {
        Self::start_adjusted(place, disks, more, |_| ())
    }

    pub(crate) fn start_adjusted(
        place: &Place,
        disks: &[&str],
        more: &[&str],
        adjust: impl FnOnce(&mut Command),
    ) -> Self {
        let mut daemon = Self::spawn(place, disks, more, adjust);
        await_true("the daemon serves", || {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("the daemon ended with {status}: {}", daemon.log());
            }
            daemon.log().contains("serving")
        });
        daemon
    }

    /// Starts a daemon that may fail.
    pub(crate) fn spawn(
        place: &Place,
        disks: &[&str],
        more: &[&str],
        adjust: impl FnOnce(&mut Command),
    ) -> Self {
        let log = tempfile::Builder::new()
            .prefix("log-")
            .tempfile_in(place.0.path())
            .unwrap()
            .into_temp_path()
            .keep()
            .unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_device-blk"));
        command
            .arg("--control-socket")
            .arg(place.control())
            .args(disks.iter().flat_map(|disk| ["--disk", disk]))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap());
        adjust(&mut command);
        Self {
            child: command.spawn().unwrap(),
            log,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Sends a signal and waits for the end.
    pub(crate) fn end(&mut self, signal: nix::sys::signal::Signal) -> ExitStatus {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
        self.ended()
    }

    /// Waits for the end.
    pub(crate) fn ended(&mut self) -> ExitStatus {
        await_some("the daemon ends", || self.child.try_wait().unwrap())
    }

    /// Panics when the daemon has died.
    pub(crate) fn assert_alive(&mut self) {
        let ended = self.child.try_wait().unwrap();
        assert!(
            ended.is_none(),
            "the daemon ended with {ended:?}: {}",
            self.log()
        );
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            eprintln!("--- log of the daemon ---\n{log}");
        }
    }
}

/// Polls until `condition` holds.
pub(crate) fn await_true(what: &str, mut condition: impl FnMut() -> bool) {
    await_some(what, || condition().then_some(()));
}

/// Polls until there is something.
pub(crate) fn await_some<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < give_up, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
