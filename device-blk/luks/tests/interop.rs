//! Volumes of QEMU (LUKS1) and cryptsetup (LUKS2), read and written here, and ours read there.
//!
//! cryptsetup gets at the data without a device mapper by re-encrypting it in place, which it does
//! with its own ciphers: data that we wrote and that it has re-encrypted must read the same.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use luks::{FormatOptions, Limits, LuksError, NewKdf, Unlocked, Volume};
use tempfile::TempDir;

const PASSPHRASE: &str = "correct horse";
/// Enough for keys and costs little.
const CHEAP: [&str; 4] = ["--pbkdf-memory", "4096", "--pbkdf-force-iterations", "4"];

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::write(place.key(), PASSPHRASE).unwrap();
        place
    }

    fn key(&self) -> PathBuf {
        self.0.path().join("key")
    }

    fn image(&self, len_bytes: u64) -> PathBuf {
        let path = self.0.path().join("image");
        File::create(&path).unwrap().set_len(len_bytes).unwrap();
        path
    }
}

fn has_tool(name: &str) -> bool {
    let runs = Command::new(name)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !runs {
        eprintln!("skipped: {name} is not installed");
    }
    runs
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", said(&output));
    said(&output)
}

fn cryptsetup(place: &Place, action: &str, image: &Path, more: &[&str]) -> Command {
    let mut command = Command::new("cryptsetup");
    command
        .args([action, "--batch-mode", "--disable-locks", "--key-file"])
        .arg(place.key())
        .args(more)
        .arg(image);
    command
}

fn open(image: &Path) -> (File, Unlocked) {
    let file = File::options().read(true).write(true).open(image).unwrap();
    let volume = Volume::open(&file, PASSPHRASE.as_bytes(), Limits::default()).unwrap();
    (file, volume)
}

/// Bytes that differ from sector to sector.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|place| (place / 512 * 31 + place * 7) as u8)
        .collect()
}

fn write(image: &Path, offset_bytes: u64, data: &[u8]) {
    let (file, volume) = open(image);
    let mut sectors = data.to_vec();
    volume.cipher.encrypt(offset_bytes / 512, &mut sectors);
    file.write_all_at(&sectors, volume.payload_offset_bytes + offset_bytes)
        .unwrap();
}

fn read(image: &Path, offset_bytes: u64, len: usize) -> Vec<u8> {
    let (file, volume) = open(image);
    let mut sectors = vec![0; len];
    file.read_exact_at(&mut sectors, volume.payload_offset_bytes + offset_bytes)
        .unwrap();
    volume.cipher.decrypt(offset_bytes / 512, &mut sectors);
    sectors
}

#[test]
fn qemu_and_we_read_what_the_other_wrote_in_luks1() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    for options in [
        "",
        ",cipher-alg=aes-128,hash-alg=sha512",
        ",hash-alg=sha1,ivgen-alg=plain64",
    ] {
        let place = Place::new();
        let image = place.image(0);
        let secret = format!("secret,id=key,file={}", place.key().display());
        run(Command::new("qemu-img")
            .args(["create", "--object", &secret, "-f", "luks", "-o"])
            .arg(format!("key-secret=key,iter-time=10{options}"))
            .arg(&image)
            .arg("8M"));
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
            let said = run(&mut qemu_io);
            assert!(!said.contains("failed"), "{said}");
        };
        qemu_io(&["write -P 0xa5 1M 64k", "write -P 0x5a 8388096 512"]);
        let (_, volume) = open(&image);
        assert_eq!(volume.payload_len_bytes, 8 << 20, "{options}");
        assert!(read(&image, 1 << 20, 64 << 10) == [0xa5; 64 << 10]);
        assert!(read(&image, (8 << 20) - 512, 512) == [0x5a; 512]);

        write(&image, 4096, &[0xc3; 8192]);
        qemu_io(&["read -P 0xc3 4096 8192", "read -P 0xa5 1M 64k"]);
    }
}

#[test]
fn cryptsetup_unlocks_what_we_made_and_we_what_it_made() {
    if !has_tool("cryptsetup") {
        return;
    }
    for (sector_bytes, key_bits, kdf) in [
        (512, 512, NewKdf::Pbkdf2 { iterations: 1000 }),
        (
            4096,
            256,
            NewKdf::Argon2id {
                memory_kib: 4096,
                passes: 4,
            },
        ),
    ] {
        let place = Place::new();
        let image = place.image(20 << 20);
        let file = File::options().read(true).write(true).open(&image).unwrap();
        let options = FormatOptions {
            sector_bytes,
            key_bits,
            kdf,
            label: "made-here".into(),
            ..FormatOptions::default()
        };
        let made = luks::format(&file, PASSPHRASE.as_bytes(), &options).unwrap();
        run(&mut cryptsetup(
            &place,
            "open",
            &image,
            &["--test-passphrase"],
        ));
        let dump = run(&mut cryptsetup(&place, "luksDump", &image, &[]));
        for expected in [
            made.uuid.as_str(),
            "made-here",
            &format!("sector: {sector_bytes} "),
            &format!("Key:        {key_bits} bits"),
            "offset: 16777216 ",
        ] {
            assert!(dump.contains(expected), "{expected} in {dump}");
        }
        // Its own slot beside ours; either opens, and it has rewritten our header.
        let more = place.0.path().join("more");
        std::fs::write(&more, "another").unwrap();
        run(cryptsetup(&place, "luksAddKey", &image, &CHEAP).arg(&more));
        open(&image);
        let volume = Volume::open(&file, b"another", Limits::default()).unwrap();
        assert_eq!(volume.sector_bytes, sector_bytes);
    }
    for more in [
        &["--pbkdf", "argon2id"][..],
        &["--pbkdf", "argon2i", "--sector-size", "4096"],
        &["--key-size", "256", "--hash", "sha512"],
        &["--offset", "8192", "--label", "x"],
        &["--luks2-metadata-size", "128k"],
    ] {
        let place = Place::new();
        let image = place.image(20 << 20);
        let more = [&["--type", "luks2"], &CHEAP[..], more].concat();
        run(&mut cryptsetup(&place, "luksFormat", &image, &more));
        open(&image);
        let file = File::open(&image).unwrap();
        let error = Volume::open(&file, b"wrong", Limits::default()).unwrap_err();
        assert!(matches!(error, LuksError::WrongPassphrase), "{error}");
    }
    for hash in ["sha1", "sha256", "sha512"] {
        let place = Place::new();
        let image = place.image(20 << 20);
        let more = [
            "--type",
            "luks1",
            "--hash",
            hash,
            "--pbkdf-force-iterations",
            "1000",
        ];
        run(&mut cryptsetup(&place, "luksFormat", &image, &more));
        open(&image);
    }
}

#[test]
fn data_is_the_same_after_cryptsetup_re_encrypted_it() {
    if !has_tool("cryptsetup") {
        return;
    }
    for sector_bytes in [512, 4096] {
        let place = Place::new();
        let image = place.image(18 << 20);
        let file = File::options().read(true).write(true).open(&image).unwrap();
        let options = FormatOptions {
            sector_bytes,
            kdf: NewKdf::Pbkdf2 { iterations: 1000 },
            ..FormatOptions::default()
        };
        luks::format(&file, PASSPHRASE.as_bytes(), &options).unwrap();
        let data = pattern(2 << 20);
        write(&image, 0, &data);
        let mut before = vec![0; 4096];
        file.read_exact_at(&mut before, 17 << 20).unwrap();

        let more = [
            &["--force-offline-reencrypt", "--resilience", "none"],
            &CHEAP[..],
        ]
        .concat();
        run(&mut cryptsetup(&place, "reencrypt", &image, &more));

        let mut after = vec![0; 4096];
        file.read_exact_at(&mut after, 17 << 20).unwrap();
        assert!(before != after, "the volume has another key now");
        assert!(read(&image, 0, data.len()) == data, "{sector_bytes}");
    }
}

#[test]
fn plain_data_that_cryptsetup_encrypted_is_read() {
    if !has_tool("cryptsetup") {
        return;
    }
    let place = Place::new();
    let image = place.image(0);
    let mut plain = pattern(34 << 20);
    std::fs::write(&image, &plain).unwrap();
    let more = [
        &[
            "--encrypt",
            "--type",
            "luks2",
            "--force-offline-reencrypt",
            "--resilience",
            "none",
            "--reduce-device-size",
            "32M",
        ],
        &CHEAP[..],
    ]
    .concat();
    run(&mut cryptsetup(&place, "reencrypt", &image, &more));
    plain.truncate(2 << 20);
    assert!(read(&image, 0, 2 << 20) == plain);
}
