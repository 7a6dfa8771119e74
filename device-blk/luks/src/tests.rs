//! Volumes made by ourselves, whole and spoilt.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use crate::luks2::binary::{BINARY_BYTES, BinaryHeader, Copy};
use crate::{FormatOptions, Limits, LuksError, NewKdf, Unlocked, Volume, format};

const PASSPHRASE: &[u8] = b"correct horse\n";
const HEADER_BYTES: u64 = 16 << 10;

fn options() -> FormatOptions {
    FormatOptions {
        payload_offset_bytes: 1 << 20,
        kdf: NewKdf::Pbkdf2 { iterations: 1000 },
        ..FormatOptions::default()
    }
}

fn formatted(options: &FormatOptions) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(options.payload_offset_bytes + (1 << 20) + 512)
        .unwrap();
    let made = format(&file, PASSPHRASE, options).unwrap();
    assert_eq!(Volume::read(&file).unwrap().uuid(), made.uuid);
    file
}

fn open(file: &File) -> Result<Unlocked, LuksError> {
    Volume::open(file, PASSPHRASE, Limits::default())
}

/// Writes both copies of the header anew with another JSON.
fn change(file: &File, change: impl FnOnce(&mut Value)) {
    let mut start = vec![0; HEADER_BYTES as usize];
    file.read_exact_at(&mut start, 0).unwrap();
    let header = BinaryHeader::parse(&start, Copy::Primary, 0).unwrap();
    let text = start[BINARY_BYTES..].split(|&byte| byte == 0).next();
    let mut json: Value = serde_json::from_slice(text.unwrap()).unwrap();
    change(&mut json);
    let json = serde_json::to_vec(&json).unwrap();
    for (copy, at) in [(Copy::Primary, 0), (Copy::Secondary, HEADER_BYTES)] {
        file.write_all_at(&header.to_bytes(copy, &json), at)
            .unwrap();
    }
}

#[test]
fn new_volume_opens_with_its_passphrase_alone() {
    for options in [
        options(),
        FormatOptions {
            sector_bytes: 4096,
            key_bits: 256,
            label: "a label".into(),
            kdf: NewKdf::Argon2id {
                memory_kib: 64,
                passes: 4,
            },
            ..options()
        },
    ] {
        let file = formatted(&options);
        let volume = open(&file).unwrap();
        assert_eq!(volume.payload_offset_bytes, 1 << 20);
        assert_eq!(volume.sector_bytes, options.sector_bytes);
        let whole_sectors = (1 << 20) + if options.sector_bytes == 512 { 512 } else { 0 };
        assert_eq!(volume.payload_len_bytes, whole_sectors);
        assert!(!volume.has_fixed_len);
        for wrong in [&b"correct horse"[..], b"", b"x"] {
            let error = Volume::open(&file, wrong, Limits::default()).unwrap_err();
            assert!(matches!(error, LuksError::WrongPassphrase), "{error}");
        }
    }
}

#[test]
fn nothing_that_is_printed_has_a_key_in_it() {
    let file = formatted(&options());
    let shown = format!("{:?}", open(&file).unwrap());
    assert!(!shown.contains('['), "{shown}");
}

#[test]
fn each_format_has_keys_of_its_own() {
    let [one, other] = [options(), options()].map(|options| {
        let mut data = [0; 512];
        open(&formatted(&options))
            .unwrap()
            .cipher
            .encrypt(0, &mut data);
        data
    });
    assert_ne!(one, other);
}

#[test]
fn either_copy_of_the_header_suffices() {
    let file = formatted(&options());
    file.write_all_at(&[0; 4096], 0).unwrap();
    assert!(Volume::read(&file).unwrap().has_damaged_copy());
    assert!(open(&file).is_ok(), "the secondary copy");

    let file = formatted(&options());
    assert!(!Volume::read(&file).unwrap().has_damaged_copy());
    file.write_all_at(&[1], HEADER_BYTES + 5000).unwrap();
    assert!(Volume::read(&file).unwrap().has_damaged_copy());
    assert!(open(&file).is_ok(), "the primary copy");

    file.write_all_at(&[1], 5000).unwrap();
    let error = open(&file).unwrap_err();
    assert!(matches!(error, LuksError::Damaged), "{error}");
}

#[test]
fn newer_copy_counts() {
    let file = formatted(&options());
    let mut start = vec![0; HEADER_BYTES as usize];
    file.read_exact_at(&mut start, 0).unwrap();
    let mut newer = BinaryHeader::parse(&start, Copy::Primary, 0).unwrap();
    newer.sequence += 1;
    newer.uuid = "newer".into();
    let json = start[BINARY_BYTES..]
        .split(|&byte| byte == 0)
        .next()
        .unwrap();
    file.write_all_at(&newer.to_bytes(Copy::Secondary, json), HEADER_BYTES)
        .unwrap();
    assert_eq!(Volume::read(&file).unwrap().uuid(), "newer");
}

#[test]
fn files_without_a_header_are_told_apart() {
    let file = tempfile::tempfile().unwrap();
    for len_bytes in [0, 5, 4096, 1 << 20] {
        file.set_len(len_bytes).unwrap();
        let error = open(&file).unwrap_err();
        assert!(matches!(error, LuksError::NoHeader), "{len_bytes}: {error}");
    }
    file.write_all_at(b"LUKS\xba\xbe\0\x09", 0).unwrap();
    let error = open(&file).unwrap_err();
    assert!(error.to_string().contains("version 9"), "{error}");
}

#[test]
fn cut_off_files_are_refused() {
    for len_bytes in [1 << 20, (1 << 20) + 511, 600 << 10, 100 << 10] {
        let file = formatted(&options());
        file.set_len(len_bytes).unwrap();
        let error = open(&file).unwrap_err();
        assert!(matches!(error, LuksError::TooSmall { .. }), "{error}");
    }
    for len_bytes in [16 << 10, 5000, 4096, 600] {
        let file = formatted(&options());
        file.set_len(len_bytes).unwrap();
        assert!(open(&file).is_err(), "{len_bytes}");
    }
}

#[test]
fn fixed_segment_does_not_grow_with_the_file() {
    let file = formatted(&options());
    change(&file, |json| json["segments"]["0"]["size"] = json!("8192"));
    let volume = open(&file).unwrap();
    assert_eq!(
        (volume.payload_len_bytes, volume.has_fixed_len),
        (8192, true)
    );
    change(&file, |json| {
        json["segments"]["0"]["size"] = json!("1099511627776")
    });
    assert!(matches!(
        open(&file).unwrap_err(),
        LuksError::TooSmall { .. }
    ));
}

#[test]
fn hostile_metadata_is_refused() {
    type Change = fn(&mut Value);
    let changes: &[(&str, Change)] = &[
        ("offset", |j| {
            j["keyslots"]["0"]["area"]["offset"] = json!("0")
        }),
        ("offset", |j| {
            j["keyslots"]["0"]["area"]["offset"] = json!("18446744073709551615");
        }),
        ("size", |j| {
            j["keyslots"]["0"]["area"]["size"] = json!("4096")
        }),
        ("size", |j| {
            j["keyslots"]["0"]["area"]["size"] = json!("18446744073709551615")
        }),
        ("size", |j| j["keyslots"]["0"]["area"]["size"] = json!(4096)),
        ("stripes", |j| {
            j["keyslots"]["0"]["af"]["stripes"] = json!(0)
        }),
        ("stripes", |j| {
            j["keyslots"]["0"]["af"]["stripes"] = json!(4_000_000_000_u32)
        }),
        ("key size", |j| j["keyslots"]["0"]["key_size"] = json!(0)),
        ("key size", |j| {
            j["keyslots"]["0"]["key_size"] = json!(1_u64 << 60)
        }),
        ("area key", |j| {
            j["keyslots"]["0"]["area"]["key_size"] = json!(16)
        }),
        ("cipher", |j| {
            j["keyslots"]["0"]["area"]["encryption"] = json!("cipher_null-ecb")
        }),
        ("iterations", |j| {
            j["keyslots"]["0"]["kdf"]["iterations"] = json!(u32::MAX)
        }),
        ("salt", |j| j["keyslots"]["0"]["kdf"]["salt"] = json!("!")),
        ("memory", |j| {
            j["keyslots"]["0"]["kdf"] = json!({
                "type": "argon2id", "time": 4, "memory": 100_000_000, "cpus": 4,
                "salt": "AAAAAAAAAAAAAAAAAAAAAA=="
            });
        }),
        ("kdf", |j| {
            j["keyslots"]["0"]["kdf"] = json!({"type": "scrypt"})
        }),
        ("no slot", |j| j["keyslots"] = json!({})),
        ("priority", |j| j["keyslots"]["0"]["priority"] = json!(0)),
        ("reencrypt", |j| {
            j["keyslots"]["0"]["type"] = json!("reencrypt")
        }),
        ("segment", |j| j["segments"]["0"]["offset"] = json!("4096")),
        ("segment", |j| {
            j["segments"]["0"]["offset"] = json!("1049000")
        }),
        ("segment", |j| j["segments"]["0"]["offset"] = json!("0")),
        ("segment", |j| j["segments"]["0"]["size"] = json!("513")),
        ("segment", |j| j["segments"]["0"]["size"] = json!("0")),
        ("sector", |j| {
            j["segments"]["0"]["sector_size"] = json!(1024)
        }),
        ("sector", |j| j["segments"]["0"]["sector_size"] = json!(0)),
        ("cipher", |j| {
            j["segments"]["0"]["encryption"] = json!("aes-cbc-essiv:sha256")
        }),
        ("integrity", |j| {
            j["segments"]["0"]["integrity"] = json!({"type": "hmac"})
        }),
        ("linear", |j| j["segments"]["0"]["type"] = json!("linear")),
        ("two", |j| j["segments"]["1"] = j["segments"]["0"].clone()),
        ("none", |j| j["segments"] = json!({})),
        ("digest", |j| j["digests"]["0"]["segments"] = json!([])),
        ("digest", |j| j["digests"]["0"]["digest"] = json!("")),
        ("digest", |j| j["digests"]["0"]["digest"] = json!("AAAA")),
        ("digest", |j| {
            j["digests"]["0"]["iterations"] = json!(u32::MAX)
        }),
        ("requirements", |j| {
            j["config"]["requirements"] = json!({"mandatory": ["online-reencrypt-v2"]});
        }),
        ("json_size", |j| j["config"]["json_size"] = json!("16384")),
        ("keyslots_size", |j| {
            j["config"]["keyslots_size"] = json!("18446744073709551615");
        }),
        ("not an object", |j| *j = json!([])),
    ];
    for (what, spoil) in changes {
        let file = formatted(&options());
        change(&file, spoil);
        let error = open(&file).expect_err(what);
        assert!(!matches!(error, LuksError::Io { .. }), "{what}: {error}");
    }
}

#[test]
fn deep_json_is_refused() {
    let file = formatted(&options());
    let mut start = vec![0; HEADER_BYTES as usize];
    file.read_exact_at(&mut start, 0).unwrap();
    let header = BinaryHeader::parse(&start, Copy::Primary, 0).unwrap();
    let deep = vec![b'['; 12 << 10];
    file.write_all_at(&header.to_bytes(Copy::Primary, &deep), 0)
        .unwrap();
    file.write_all_at(&header.to_bytes(Copy::Secondary, &deep), HEADER_BYTES)
        .unwrap();
    assert!(matches!(
        open(&file).unwrap_err(),
        LuksError::Malformed { .. }
    ));
}

#[test]
fn slot_of_an_unknown_kind_beside_a_good_one_does_no_harm() {
    let file = formatted(&options());
    change(&file, |json| {
        let mut other = json["keyslots"]["0"].clone();
        other["kdf"] = json!({"type": "scrypt"});
        json["keyslots"]["1"] = other;
        json["keyslots"]["2"] = json!({"type": "reencrypt", "mode": "reencrypt"});
        json["digests"]["0"]["keyslots"] = json!(["2", "1", "0"]);
        json["tokens"]["0"] = json!({"type": "anything", "keyslots": []});
    });
    assert!(open(&file).is_ok());
}

#[test]
fn impossible_options_are_refused_and_nothing_is_written() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 << 20).unwrap();
    file.write_all_at(b"precious", 0).unwrap();
    for options in [
        FormatOptions {
            sector_bytes: 1024,
            ..options()
        },
        FormatOptions {
            key_bits: 384,
            ..options()
        },
        FormatOptions {
            payload_offset_bytes: 4096,
            ..options()
        },
        FormatOptions {
            payload_offset_bytes: (1 << 20) + 512,
            ..options()
        },
        FormatOptions {
            payload_offset_bytes: 2 << 20,
            ..options()
        },
        FormatOptions {
            label: "x".repeat(48),
            ..options()
        },
        FormatOptions {
            kdf: NewKdf::Pbkdf2 { iterations: 1 },
            ..options()
        },
        FormatOptions {
            kdf: NewKdf::Argon2id {
                memory_kib: u32::MAX,
                passes: 4,
            },
            ..options()
        },
    ] {
        assert!(format(&file, PASSPHRASE, &options).is_err(), "{options:?}");
    }
    let mut head = [0; 8];
    file.read_exact_at(&mut head, 0).unwrap();
    assert_eq!(&head, b"precious");
}

#[test]
fn descriptors_for_direct_io_are_read_and_formatted() {
    use std::os::unix::fs::OpenOptionsExt;
    let place = tempfile::NamedTempFile::new().unwrap();
    place.as_file().set_len(2 << 20).unwrap();
    let Ok(direct) = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(place.path())
    else {
        return;
    };
    format(&direct, PASSPHRASE, &options()).unwrap();
    assert!(open(&direct).is_ok());
}
