//! Backends that are not ours: qemu-storage-daemon's vhost-user-blk export, and virtiofsd, which
//! has no configuration space.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::guest::{Driver, Guest, TIMEOUTS, wait_until};

const SECTOR_LEN: usize = 512;
const VIRTIO_BLK_T_IN: u32 = 0;
const VIRTIO_BLK_T_OUT: u32 = 1;
const VIRTIO_BLK_T_FLUSH: u32 = 4;
const FUSE_INIT: u32 = 26;

#[test]
fn qemu_storage_daemon_reads_writes_and_flushes() {
    let directory = tempfile::tempdir().unwrap();
    let Some(_daemon) = Daemon::start(directory.path()) else {
        return;
    };
    let guest = attach(directory.path());
    let mut driver = guest.drive();
    let capacity_sectors = guest.read(driver.device_cfg, 4);
    assert_eq!(capacity_sectors, 2048);
    let block: Vec<u8> = (0..SECTOR_LEN).map(|at| (at % 251) as u8).collect();
    write(&mut driver, 7, &block);
    assert_eq!(read(&mut driver, 7), block);
    flush(&mut driver);
    let image = fs::read(directory.path().join("disk.img")).unwrap();
    assert_eq!(image[7 * SECTOR_LEN..8 * SECTOR_LEN], block);
    driver.set_status(0);
    wait_until("the reset is complete", || driver.status() == 0);
    let mut driver = guest.drive();
    assert_eq!(read(&mut driver, 7), block, "it serves the next driver too");
}

#[test]
fn qemu_storage_daemon_is_killed_and_replaced_under_a_driver() {
    let directory = tempfile::tempdir().unwrap();
    let Some(mut daemon) = Daemon::start(directory.path()) else {
        return;
    };
    let guest = attach(directory.path());
    let mut driver = guest.drive();
    for round in 1..=5u8 {
        write(&mut driver, u64::from(round), &[round; SECTOR_LEN]);
        // In flight, or done and not seen yet, when the daemon dies.
        let head = submit(
            &mut driver,
            VIRTIO_BLK_T_IN,
            u64::from(round),
            &[],
            SECTOR_LEN,
        );
        drop(daemon);
        daemon = Daemon::start(directory.path()).expect("it was there before");
        let answer = driver.complete(head, SECTOR_LEN + 1);
        assert_eq!(
            answer,
            [&[round; SECTOR_LEN][..], &[0]].concat(),
            "round {round}"
        );
        wait_until("the next daemon is connected", || {
            let health = guest.device.health(8);
            health.link.connected && health.link.incarnations == u64::from(round) + 1
        });
    }
    guest.device.pause(TIMEOUTS.stop);
    guest.device.resume();
    assert_eq!(read(&mut driver, 3), [3; SECTOR_LEN]);
}

#[test]
fn virtiofsd_answers_with_the_tag_that_the_request_gave() {
    let directory = tempfile::tempdir().unwrap();
    let (shared, socket) = (
        directory.path().join("shared"),
        directory.path().join("fs.sock"),
    );
    fs::create_dir(&shared).unwrap();
    let mut command = Command::new(program("VIRTIOFSD", "virtiofsd"));
    command
        .arg(format!("--socket-path={}", socket.display()))
        .args(["-o", &format!("source={}", shared.display())])
        .args(["-o", "sandbox=chroot"]);
    let Some(_daemon) = Daemon::spawn(&mut command) else {
        return;
    };
    let tag: String = b"share".iter().map(|byte| format!("{byte:02x}")).collect();
    let parameters = format!("type=fs,queues=2,config=hex:{tag:0<72}01000000");
    let guest = Guest::attach(&parameters, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    assert_eq!(
        guest.read(driver.device_cfg, 8).to_le_bytes(),
        *b"share\0\0\0"
    );
    assert_eq!(
        guest.read(driver.device_cfg + 36, 4),
        1,
        "number of request queues"
    );
    driver.queue = 1;
    // struct fuse_in_header (length, opcode, unique ...), then struct fuse_init_in.
    let mut request = [56u32, FUSE_INIT, 0x1234, 0].map(u32::to_le_bytes).concat();
    request.resize(40, 0);
    request.extend([7u32, 31, 0, 0].map(u32::to_le_bytes).concat());
    let head = driver.submit_with_room(&request, 80);
    let answer = driver.complete(head, 80);
    assert_eq!(
        answer[4..16],
        [0, 0, 0, 0, 0x34, 0x12, 0, 0, 0, 0, 0, 0],
        "no error, same request"
    );
    assert_eq!(answer[16..20], 7u32.to_le_bytes(), "major version");
}

#[test]
fn passt_answers_a_nic_whose_address_only_the_transport_knows() {
    const NET_F_MAC: u64 = 1 << 5;
    const HEADER_LEN: usize = 12;
    const TO_GUEST_GPA: u64 = 0x8_0000;
    const TO_PASST_GPA: u64 = 0x8_1000;
    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
    let (guest_ip, asked_ip) = ([192u8, 0, 2, 9], [192u8, 0, 2, 1]);
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("passt.sock");
    let mut command = Command::new(program("PASST", "passt"));
    command
        .args(["--vhost-user", "--foreground", "--no-map-gw", "--socket"])
        .arg(&socket)
        .args([
            "--address",
            "192.0.2.9",
            "--netmask",
            "24",
            "--gateway",
            "192.0.2.1",
        ]);
    let Some(_daemon) = Daemon::spawn(&mut command) else {
        return;
    };
    let parameters =
        format!("type=net,queues=2,config=hex:5254000102030000,config-features={NET_F_MAC:#x}");
    let guest = Guest::attach(&parameters, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    assert_ne!(driver.features & NET_F_MAC, 0, "the driver uses it");
    assert_eq!(guest.read(driver.device_cfg, 6).to_le_bytes()[..6], MAC);
    // A network card's chains have one direction each: room for what comes, then what goes.
    let (receive, transmit) = (0usize, 1usize);
    guest.memory.write(TO_GUEST_GPA, &[0xee; 2048]);
    driver.rings[receive]
        .add(&[], &[(TO_GUEST_GPA, 2048)])
        .unwrap();
    driver.rings[receive].ask_for_signal();
    // Who has 192.0.2.1? (RFC 826, Ethernet and IPv4)
    let request = [
        &[0; HEADER_LEN][..],
        &[0xff; 6],
        &MAC,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &MAC,
        &guest_ip,
        &[0; 6],
        &asked_ip,
    ]
    .concat();
    guest.memory.write(TO_PASST_GPA, &request);
    // Once, and at once: the rings are being started meanwhile.
    driver.rings[transmit]
        .add(&[(TO_PASST_GPA, request.len() as u32)], &[])
        .unwrap();
    driver.kick(transmit as u64);
    wait_until("passt answers", || {
        driver.rings[receive].pop_used().is_some()
    });
    let answer = guest.memory.read(TO_GUEST_GPA, HEADER_LEN + 42);
    let frame = &answer[HEADER_LEN..];
    assert_eq!((&frame[..6], &frame[12..14]), (&MAC[..], &[8, 6][..]));
    let is_at = (&[0, 2][..], &asked_ip[..]);
    assert_eq!((&frame[20..22], &frame[28..32]), is_at);
}

struct Daemon(Child);

impl Daemon {
    /// `None`, with the reason printed, where it is not installed.
    fn start(directory: &Path) -> Option<Self> {
        let (image, socket) = (directory.join("disk.img"), directory.join("qsd.sock"));
        if !image.exists() {
            fs::write(&image, vec![0; 2048 * SECTOR_LEN]).unwrap();
        }
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(program("QEMU_STORAGE_DAEMON", "qemu-storage-daemon"));
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={}", image.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
                socket.display()
            ));
        Self::spawn(&mut command)
    }

    fn spawn(command: &mut Command) -> Option<Self> {
        match command.stdin(Stdio::null()).spawn() {
            Ok(child) => Some(Self(child)),
            Err(error) => {
                println!("skipped: cannot run {:?} ({error})", command.get_program());
                None
            }
        }
    }
}

/// What the variable says where third-party programs are unpacked and not installed.
fn program(variable: &str, name: &str) -> OsString {
    std::env::var_os(variable).unwrap_or_else(|| name.into())
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn attach(directory: &Path) -> Guest {
    Guest::attach("type=blk", &directory.join("qsd.sock"), TIMEOUTS).unwrap()
}

fn submit(driver: &mut Driver<'_>, kind: u32, sector: u64, data: &[u8], room: usize) -> u16 {
    let header = [
        &kind.to_le_bytes()[..],
        &[0; 4],
        &sector.to_le_bytes(),
        data,
    ]
    .concat();
    driver.submit_with_room(&header, room + 1)
}

fn write(driver: &mut Driver<'_>, sector: u64, data: &[u8]) {
    let head = submit(driver, VIRTIO_BLK_T_OUT, sector, data, 0);
    assert_eq!(driver.complete(head, 1), [0], "write of sector {sector}");
}

fn read(driver: &mut Driver<'_>, sector: u64) -> Vec<u8> {
    let head = submit(driver, VIRTIO_BLK_T_IN, sector, &[], SECTOR_LEN);
    let mut answer = driver.complete(head, SECTOR_LEN + 1);
    assert_eq!(answer.pop(), Some(0), "read of sector {sector}");
    answer
}

fn flush(driver: &mut Driver<'_>) {
    let head = submit(driver, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    assert_eq!(driver.complete(head, 1), [0], "flush");
}
