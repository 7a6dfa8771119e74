//! Encrypted disks: guests see their data, the image never does, and keys stay where they belong.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use api::device::attach_request::{Device as DeviceConfig, Listener};
use api::device::{AttachRequest, BlkConfig, Device, FdRef};
use luks::{FormatOptions, Limits, NewKdf, Volume};
use tonic::{Code, Status};

use crate::control::Manager;
use crate::daemon::{Daemon, Place, await_true};
use crate::driver::Client;
use crate::io::pattern;
use crate::locks::has_tool;

/// Nowhere else in any process.
const PASSPHRASE: &[u8] = b"jbvfZyFy7Yn1ZqUT-only-in-this-test";
const DISK_BYTES: u64 = 8 << 20;
const PAYLOAD_OFFSET_BYTES: u64 = 16 << 20;

/// An encrypted image `a.img`, its key in `key`.
fn encrypted(place: &Place, sector_bytes: u32) -> PathBuf {
    std::fs::write(place.path("key"), PASSPHRASE).unwrap();
    let path = place.path("a.img");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    file.set_len(PAYLOAD_OFFSET_BYTES + DISK_BYTES).unwrap();
    let options = FormatOptions {
        sector_bytes,
        kdf: NewKdf::Pbkdf2 { iterations: 1000 },
        ..FormatOptions::default()
    };
    luks::format(&file, PASSPHRASE, &options).unwrap();
    path
}

fn disk(place: &Place) -> String {
    format!(
        "{},key-file={}",
        place.disk("a"),
        place.path("key").display()
    )
}

/// What the volume holds, without the daemon.
fn decrypted(image: &Path, offset_bytes: u64, len: usize) -> Vec<u8> {
    let file = File::open(image).unwrap();
    let volume = Volume::open(&file, PASSPHRASE, Limits::default()).unwrap();
    let mut sectors = vec![0; len];
    file.read_exact_at(&mut sectors, volume.payload_offset_bytes + offset_bytes)
        .unwrap();
    volume.cipher.decrypt(offset_bytes / 512, &mut sectors);
    sectors
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|&byte| byte == needle[0]) {
        rest = &rest[at..];
        if rest.starts_with(needle) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

#[test]
fn what_is_written_comes_back_and_is_never_stored_plain() {
    for (sector_bytes, extra) in [
        (512, ""),
        (512, ",page-cache"),
        (4096, ",block-size=4096"),
        (512, ",block-size=4096"),
    ] {
        let place = Place::new();
        let image = encrypted(&place, sector_bytes);
        let spec = format!("{}{extra}", disk(&place));
        let mut daemon = Daemon::start(&place, &[&spec]);
        let mut client = Client::connect(&place.socket("a"));
        assert_eq!(u64::from(client.config().capacity), DISK_BYTES / 512);
        // Longer than a bounce buffer, and at addresses that direct I/O would not take.
        for (offset, len, at) in [
            (0, 4096, 0),
            (4096, 64 << 10, 3),
            (1 << 20, (1 << 20) + 4096, 4097),
            (DISK_BYTES - 4096, 4096, 512),
        ] {
            let data = pattern(offset + 1, len);
            client.buffer()[at..at + len].copy_from_slice(&data);
            assert_eq!(client.write_at(0, offset, at, len), 0);
            assert!(
                client.buffer()[at..at + len] == data,
                "the guest's buffer is its own"
            );
            client.buffer()[..at + len].fill(0xee);
            assert_eq!(client.read_at(0, offset, at, len), 0);
            assert!(client.buffer()[at..at + len] == data, "{offset} {extra}");
            assert_eq!(client.flush(), 0);
            assert!(decrypted(&image, offset, len) == data, "{offset} {extra}");
        }
        let stored = std::fs::read(&image).unwrap();
        assert!(!contains(&stored, &pattern(1, 4096)[..64]));

        assert_eq!(client.write_zeroes(4096, 16 << 10, true), 0);
        assert!(client.read(4096, 16 << 10).iter().all(|&byte| byte == 0));
        assert_eq!(client.discard(1 << 20, 1 << 20), 0);
        assert!(
            client.read(4096 + (16 << 10), 4096) == pattern(4097, 64 << 10)[16 << 10..][..4096]
        );
        assert_eq!(
            client.read_at(0, DISK_BYTES, 0, 4096),
            -libc::EIO,
            "past the end"
        );
        daemon.assert_alive();
    }
}

#[test]
fn qemu_reads_what_was_written_through_the_daemon() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let place = Place::new();
    std::fs::write(place.path("key"), PASSPHRASE).unwrap();
    let image = place.path("a.img");
    let secret = format!("secret,id=key,file={}", place.path("key").display());
    let create = Command::new("qemu-img")
        .args(["create", "--object", &secret, "-f", "luks"])
        .args(["-o", "key-secret=key,iter-time=10"])
        .arg(&image)
        .arg("8M")
        .output()
        .unwrap();
    assert!(create.status.success(), "{create:?}");
    let qemu_io = |commands: &[&str]| {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["--object", &secret, "--image-opts"]);
        for command in commands {
            qemu_io.args(["-c", command]);
        }
        qemu_io.arg(format!(
            "driver=luks,key-secret=key,file.filename={}",
            image.display()
        ));
        let output = qemu_io.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{output:?}");
        assert!(!said.contains("failed"), "{said}");
    };
    qemu_io(&["write -P 0x11 2M 64k"]);
    let mut daemon = Daemon::start(&place, &[&disk(&place)]);
    let mut client = Client::connect(&place.socket("a"));
    assert!(client.read(2 << 20, 64 << 10) == [0x11; 64 << 10]);
    assert_eq!(client.write(1 << 20, &[0xa5; 128 << 10]), 0);
    assert_eq!(client.write(DISK_BYTES - 512, &[0x5a; 512]), 0);
    assert_eq!(client.write_zeroes(2 << 20, 4096, false), 0);
    assert_eq!(client.flush(), 0);
    drop(client);
    daemon.end(nix::sys::signal::Signal::SIGTERM);
    qemu_io(&[
        "read -P 0xa5 1M 128k",
        "read -P 0x5a 8388096 512",
        "read -P 0 2M 4k",
        "read -P 0x11 2101248 4k",
    ]);
}

#[test]
fn data_outlives_a_daemon_that_is_killed() {
    let place = Place::new();
    encrypted(&place, 512);
    let mut daemon = Daemon::start(&place, &[&disk(&place)]);
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.write(4096, &pattern(3, 4096)), 0);
    assert_eq!(client.flush(), 0);
    drop(client);
    daemon.end(nix::sys::signal::Signal::SIGKILL);
    let _daemon = Daemon::start(&place, &[&disk(&place)]);
    let mut client = Client::connect(&place.socket("a"));
    assert!(client.read(4096, 4096) == pattern(3, 4096));
}

/// The daemon's error line; it must have ended by itself, without leaving sockets.
fn refusal(place: &Place, spec: &str) -> String {
    let mut daemon = Daemon::spawn(place, &[spec], &[], |_| ());
    let status = daemon.ended();
    let log = daemon.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(!place.socket("a").exists(), "nothing is left behind");
    let error = log
        .lines()
        .find(|line| line.starts_with("device-blk: error: "));
    error.unwrap_or_else(|| panic!("{log}")).to_owned()
}

#[test]
fn wrong_keys_are_refused_with_the_reason() {
    let place = Place::new();
    let image = encrypted(&place, 4096);
    let before = std::fs::read(&image).unwrap();
    let spec = format!("{},block-size=4096", disk(&place));

    std::fs::write(place.path("key"), "wrong").unwrap();
    let error = refusal(&place, &spec);
    assert!(
        error.contains("a.img") && error.contains("no key slot opens"),
        "{error}"
    );
    std::fs::write(place.path("key"), "").unwrap();
    let error = refusal(&place, &spec);
    assert!(error.contains("the key is empty"), "{error}");
    std::fs::remove_file(place.path("key")).unwrap();
    let error = refusal(&place, &spec);
    assert!(error.contains("key"), "{error}");

    std::fs::write(place.path("key"), PASSPHRASE).unwrap();
    let error = refusal(&place, &disk(&place));
    assert!(
        error.contains("sectors of 4096") && error.contains("block size of 4096"),
        "{error}"
    );
    assert!(
        std::fs::read(&image).unwrap() == before,
        "the image is untouched"
    );

    place.image("a.img", 64);
    let error = refusal(&place, &disk(&place));
    assert!(error.contains("no LUKS header"), "{error}");
}

/// Passes `key` by a pipe as descriptor 60.
fn start_with_key_fd(place: &Place, key: &[u8]) -> Daemon {
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(key).unwrap();
    drop(writer);
    let fd = reader.as_raw_fd();
    let daemon = Daemon::spawn(
        place,
        &[&format!("{},key-fd=60", place.disk("a"))],
        &[],
        |command| {
            // SAFETY: dup2 is async-signal-safe and takes integers.
            unsafe {
                command.pre_exec(move || match libc::dup2(fd, 60) {
                    60 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
            }
        },
    );
    await_true("the daemon serves", || daemon.log().contains("serving"));
    daemon
}

/// Mappings of the process that hold `needle`, and whether core files leave them out.
fn mappings_with(pid: u32, needle: &[u8]) -> Vec<(String, bool)> {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut found = Vec::new();
    let mut hit: Option<String> = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(mapping) = hit.take() {
                let left_out = flags.split(' ').any(|flag| flag == "dd");
                found.push((mapping, left_out));
            }
            continue;
        }
        let Some((from, to)) = line.split(' ').next().and_then(|word| word.split_once('-')) else {
            continue;
        };
        let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
        else {
            continue;
        };
        let mut content = vec![0; (to - from) as usize];
        // What cannot be read (vvar) cannot be dumped either.
        if memory.read_exact_at(&mut content, from).is_ok() && contains(&content, needle) {
            hit = Some(line.to_owned());
        }
    }
    found
}

#[test]
fn passphrase_is_nowhere_once_the_disk_is_unlocked() {
    let place = Place::new();
    encrypted(&place, 512);
    let daemon = start_with_key_fd(&place, PASSPHRASE);
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.write(0, &[1; 4096]), 0);

    let pid = daemon.pid();
    for file in ["cmdline", "environ"] {
        let content = std::fs::read(format!("/proc/{pid}/{file}")).unwrap();
        assert!(!contains(&content, PASSPHRASE), "{file}");
    }
    assert!(!contains(daemon.log().as_bytes(), PASSPHRASE));
    assert_eq!(mappings_with(pid, PASSPHRASE), [], "the daemon's memory");
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let entry = entry.unwrap();
        assert_ne!(entry.file_name(), "60", "the key's descriptor is closed");
    }
}

/// Asks the confined daemon to attach `a.img` with a key that is passed in a memfd.
fn attach(manager: &mut Manager, key: &[u8], round: u32) -> Result<Device, Status> {
    let socket = manager.place.socket("a");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    let key_file = memfd(key);
    let token = |what: &str| FdRef {
        token: format!("{what}-{round}"),
    };
    manager.send(&token("socket").token, listener.as_fd());
    manager.send_image(&token("image").token, "a.img");
    manager.send(&token("key").token, key_file.as_fd());
    manager.attach(AttachRequest {
        id: "a".into(),
        listener: Some(Listener::SocketFd(token("socket"))),
        device: Some(DeviceConfig::Blk(BlkConfig {
            image_fd: Some(token("image")),
            key_fd: Some(token("key")),
            ..BlkConfig::default()
        })),
    })
}

fn memfd(content: &[u8]) -> File {
    // SAFETY: the name is a NUL-terminated literal.
    let fd = unsafe { libc::memfd_create(c"key".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memfd");
    // SAFETY: just returned by the kernel and owned by nobody else.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(content).unwrap();
    file
}

#[test]
fn confined_daemon_unlocks_what_it_is_passed() {
    let place = Place::new();
    let image = encrypted(&place, 512);
    // As hard as new volumes are made.
    let file = File::options().read(true).write(true).open(&image).unwrap();
    luks::format(&file, PASSPHRASE, &FormatOptions::default()).unwrap();
    let fds = place.fds().display().to_string();
    let mut daemon = Daemon::start_with(&place, &[], &["--fd-socket", &fds]);
    let mut manager = Manager::of(place);

    let wrong = attach(&mut manager, b"wrong", 0).unwrap_err();
    assert_eq!(wrong.code(), Code::PermissionDenied, "{wrong}");
    assert!(wrong.message().contains("no key slot opens"), "{wrong}");
    assert_eq!(manager.list().len(), 0, "nothing half-made is left");

    let device = attach(&mut manager, PASSPHRASE, 1).unwrap();
    let stats = device.blk.unwrap();
    assert!(stats.encrypted, "{stats:?}");
    assert_eq!(stats.capacity_bytes, DISK_BYTES);
    let mut client = Client::connect(&manager.place.socket("a"));
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    assert_eq!(client.flush(), 0);
    assert!(decrypted(&image, 0, 4096) == pattern(1, 4096));
    assert_eq!(mappings_with(daemon.pid(), PASSPHRASE), []);
    daemon.assert_alive();
}

#[test]
fn volume_key_is_in_memory_that_core_files_leave_out_alone() {
    if !has_tool("cryptsetup") {
        return;
    }
    let place = Place::new();
    let image = place.path("a.img");
    std::fs::write(place.path("key"), PASSPHRASE).unwrap();
    let volume_key = pattern(77, 64);
    std::fs::write(place.path("volume-key"), &volume_key).unwrap();
    File::create(&image)
        .unwrap()
        .set_len(PAYLOAD_OFFSET_BYTES + DISK_BYTES)
        .unwrap();
    let made = Command::new("cryptsetup")
        .args([
            "luksFormat",
            "--type",
            "luks2",
            "--batch-mode",
            "--disable-locks",
        ])
        .args(["--key-size", "512", "--sector-size", "512"])
        .args(["--pbkdf-memory", "4096", "--pbkdf-force-iterations", "4"])
        .arg("--key-file")
        .arg(place.path("key"))
        .arg("--volume-key-file")
        .arg(place.path("volume-key"))
        .arg(&image)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let daemon = Daemon::start(&place, &[&disk(&place)]);
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.write(0, &pattern(1, 256 << 10)), 0);
    assert!(client.read(0, 256 << 10) == pattern(1, 256 << 10));
    for half in volume_key.chunks(32) {
        let found = mappings_with(daemon.pid(), half);
        assert_eq!(
            found.len(),
            1,
            "the expanded key begins with the key: {found:?}"
        );
        assert!(found[0].1, "core files leave it out: {found:?}");
    }
    assert_eq!(mappings_with(daemon.pid(), PASSPHRASE), []);
}
