//! ISO 9660 (ECMA-119) with the files' real names twice: by Rock Ridge (IEEE P1282), which Linux prefers,
//! and by Joliet, which Windows reads. Written by hand because a seed is one directory of a few files;
//! a FAT has no simpler layout, and needs code page modules that guests' initramfs often lack.
//!
//! ```text
//! 16  primary volume descriptor     19 to 22  path tables: primary, Joliet's, in both byte orders
//! 17  Joliet's volume descriptor    23, 24    root directory with names by Rock Ridge, in UCS-2
//! 18  terminator                    25 ..     the files, each from a sector of its own
//! ```

/// ECMA-119 6.1.2
const SECTOR_BYTES: usize = 2048;

const PRIMARY: u32 = 16;
const JOLIET: u32 = 17;
const TERMINATOR: u32 = 18;
const PRIMARY_PATHS_LE: u32 = 19;
const JOLIET_PATHS_LE: u32 = 20;
const PRIMARY_PATHS_BE: u32 = 21;
const JOLIET_PATHS_BE: u32 = 22;
const PRIMARY_ROOT: u32 = 23;
const JOLIET_ROOT: u32 = 24;
const FIRST_FILE: u32 = 25;

/// A path table with the root alone.
const PATH_TABLE_BYTES: u32 = 10;
const DIRECTORY: u8 = 2;
/// 1970-01-01: images of the same files are the same.
const DATE: [u8; 7] = [70, 1, 1, 0, 0, 0, 0];
/// "not specified" (ECMA-119 8.4.26.1)
const NO_DATE: &[u8; 17] = b"0000000000000000\0";
/// UCS-2 level 3 (Joliet, supplementary volume descriptor).
const UCS2_LEVEL_3: &[u8; 3] = b"%/E";

/// A file and where its content begins.
struct Placed<'a> {
    name: &'a str,
    content: &'a [u8],
    sector: u32,
}

/// An image with these files in its root, readable by the guest's root only.
///
/// # Panics
/// When the directory outgrows a sector, which a seed's three files are far from.
pub(super) fn image(label: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut sector = FIRST_FILE;
    let mut placed: Vec<Placed<'_>> = Vec::new();
    for (name, content) in files {
        placed.push(Placed {
            name,
            content,
            sector,
        });
        sector += content.len().div_ceil(SECTOR_BYTES) as u32;
    }
    // Directories are sorted (ECMA-119 9.3), in both kinds of names alike.
    placed.sort_by_key(|file| file.name);
    let mut image = vec![0; sector as usize * SECTOR_BYTES];
    let mut put = |at: u32, bytes: &[u8]| {
        let at = at as usize * SECTOR_BYTES;
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(PRIMARY, &descriptor(label, sector, Names::Plain));
    put(JOLIET, &descriptor(label, sector, Names::Ucs2));
    put(TERMINATOR, b"\xffCD001\x01");
    put(
        PRIMARY_PATHS_LE,
        &path_table(PRIMARY_ROOT.to_le_bytes(), [1, 0]),
    );
    put(
        PRIMARY_PATHS_BE,
        &path_table(PRIMARY_ROOT.to_be_bytes(), [0, 1]),
    );
    put(
        JOLIET_PATHS_LE,
        &path_table(JOLIET_ROOT.to_le_bytes(), [1, 0]),
    );
    put(
        JOLIET_PATHS_BE,
        &path_table(JOLIET_ROOT.to_be_bytes(), [0, 1]),
    );
    put(PRIMARY_ROOT, &directory(&placed, Names::Plain));
    put(JOLIET_ROOT, &directory(&placed, Names::Ucs2));
    for file in &placed {
        put(file.sector, file.content);
    }
    image
}

#[derive(Clone, Copy, PartialEq)]
enum Names {
    /// With the real ones by Rock Ridge.
    Plain,
    /// Joliet's.
    Ucs2,
}

impl Names {
    fn root(self) -> u32 {
        match self {
            Self::Plain => PRIMARY_ROOT,
            Self::Ucs2 => JOLIET_ROOT,
        }
    }
}

/// A volume descriptor (ECMA-119 8.4 and 8.5).
fn descriptor(label: &str, sectors: u32, names: Names) -> Vec<u8> {
    let mut sector = vec![0; SECTOR_BYTES];
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    let (kind, paths_le, paths_be) = match names {
        Names::Plain => (1, PRIMARY_PATHS_LE, PRIMARY_PATHS_BE),
        Names::Ucs2 => (2, JOLIET_PATHS_LE, JOLIET_PATHS_BE),
    };
    // Offsets here are byte positions of the standard less one.
    put(0, &[kind]);
    put(1, b"CD001\x01");
    put(8, &text("LINUX", 32, names));
    put(40, &text(label, 32, names));
    put(80, &both_u32(sectors));
    if names == Names::Ucs2 {
        put(88, UCS2_LEVEL_3);
    }
    put(120, &both_u16(1));
    put(124, &both_u16(1));
    put(128, &both_u16(SECTOR_BYTES as u16));
    put(132, &both_u32(PATH_TABLE_BYTES));
    put(140, &paths_le.to_le_bytes());
    put(148, &paths_be.to_be_bytes());
    put(
        156,
        &record(&[0], names.root(), SECTOR_BYTES as u32, DIRECTORY, &[]),
    );
    // Volume set, publisher, preparer, application; then three files' names.
    for at in [190, 318, 446, 574] {
        put(at, &text("", 128, names));
    }
    for at in [702, 739, 776] {
        put(at, &text("", 37, names));
    }
    for at in [813, 830, 847, 864] {
        put(at, NO_DATE);
    }
    put(881, &[1]);
    sector
}

fn path_table(root: [u8; 4], parent: [u8; 2]) -> Vec<u8> {
    [&[1, 0], &root[..], &parent, &[0, 0]].concat()
}

fn directory(files: &[Placed<'_>], names: Names) -> Vec<u8> {
    let root = |identifier: u8, system_use: &[u8]| {
        let bytes = SECTOR_BYTES as u32;
        record(&[identifier], names.root(), bytes, DIRECTORY, system_use)
    };
    let (of_self, of_parent) = match names {
        Names::Plain => {
            let attributes = rock_ridge_attributes(0o040_555, 2);
            let marks = [
                rock_ridge_begins(),
                attributes.clone(),
                rock_ridge_is_meant(),
            ];
            (marks.concat(), attributes)
        }
        Names::Ucs2 => (Vec::new(), Vec::new()),
    };
    let mut directory = root(0, &of_self);
    directory.extend(root(1, &of_parent));
    for file in files {
        let len = file.content.len() as u32;
        directory.extend(match names {
            Names::Plain => {
                let system_use = [
                    rock_ridge_attributes(0o100_400, 1),
                    rock_ridge_name(file.name),
                ];
                let plain = plain_name(file.name);
                record(plain.as_bytes(), file.sector, len, 0, &system_use.concat())
            }
            Names::Ucs2 => record(&ucs2(file.name), file.sector, len, 0, &[]),
        });
    }
    assert!(directory.len() <= SECTOR_BYTES, "a seed has few files");
    directory
}

/// A directory record (ECMA-119 9.1).
fn record(identifier: &[u8], sector: u32, len: u32, flags: u8, system_use: &[u8]) -> Vec<u8> {
    let mut record = vec![0, 0];
    record.extend(both_u32(sector));
    record.extend(both_u32(len));
    record.extend(DATE);
    record.extend([flags, 0, 0]);
    record.extend(both_u16(1));
    record.push(identifier.len() as u8);
    record.extend(identifier);
    if identifier.len().is_multiple_of(2) {
        record.push(0);
    }
    record.extend(system_use);
    if !record.len().is_multiple_of(2) {
        record.push(0);
    }
    record[0] = u8::try_from(record.len()).expect("names are short");
    record
}

/// SUSP's SP.
fn rock_ridge_begins() -> Vec<u8> {
    b"SP\x07\x01\xbe\xef\x00".to_vec()
}

/// SUSP's ER: which extension the entries are of.
fn rock_ridge_is_meant() -> Vec<u8> {
    b"ER\x12\x01\x0a\x00\x00\x01RRIP_1991A".to_vec()
}

/// PX: mode and links; owned by root.
fn rock_ridge_attributes(mode: u32, links: u32) -> Vec<u8> {
    let fields = [mode, links, 0, 0].map(both_u32);
    [&b"PX\x24\x01"[..], &fields.concat()].concat()
}

/// NM
fn rock_ridge_name(name: &str) -> Vec<u8> {
    let mut entry = vec![b'N', b'M', 5 + name.len() as u8, 1, 0];
    entry.extend(name.as_bytes());
    entry
}

/// For readers that know neither extension: capitals, digits and underscores, 8 of them.
fn plain_name(name: &str) -> String {
    let letter = |c: char| match c.to_ascii_uppercase() {
        c if c.is_ascii_alphanumeric() => c,
        _ => '_',
    };
    let short: String = name.chars().take(8).map(letter).collect();
    format!("{short}.;1")
}

fn text(text: &str, len: usize, names: Names) -> Vec<u8> {
    let mut field = match names {
        Names::Plain => text.as_bytes().to_vec(),
        Names::Ucs2 => ucs2(text),
    };
    while field.len() < len {
        match names {
            Names::Plain => field.push(b' '),
            Names::Ucs2 => field.extend([0, b' ']),
        }
    }
    field.truncate(len);
    field
}

fn ucs2(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_be_bytes).collect()
}

/// ECMA-119 7.3.3
fn both_u32(number: u32) -> [u8; 8] {
    let mut both = [0; 8];
    both[..4].copy_from_slice(&number.to_le_bytes());
    both[4..].copy_from_slice(&number.to_be_bytes());
    both
}

/// ECMA-119 7.2.3
fn both_u16(number: u16) -> [u8; 4] {
    let mut both = [0; 4];
    both[..2].copy_from_slice(&number.to_le_bytes());
    both[2..].copy_from_slice(&number.to_be_bytes());
    both
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows the primary descriptor as a reader does; names by Rock Ridge.
    fn read(image: &[u8]) -> Vec<(String, Vec<u8>)> {
        let u32_at = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize;
        let root = u32_at(16 * SECTOR_BYTES + 156 + 2) * SECTOR_BYTES;
        let mut found = Vec::new();
        let mut at = root;
        while image[at] != 0 {
            let len = usize::from(image[at]);
            let record = &image[at..at + len];
            if record[25] & DIRECTORY == 0 {
                let name = record.windows(2).position(|pair| pair == b"NM").unwrap();
                let name = &record[name + 5..name + usize::from(record[name + 2])];
                let content = u32_at(at + 2) * SECTOR_BYTES;
                let content = &image[content..content + u32_at(at + 10)];
                found.push((String::from_utf8(name.to_vec()).unwrap(), content.to_vec()));
            }
            at += len;
        }
        found
    }

    #[test]
    fn files_are_found_by_their_names_in_order() {
        let long = vec![7; 5000];
        let image = image(
            "cidata",
            &[
                ("user-data", &long),
                ("meta-data", b""),
                ("network-config", b"v"),
            ],
        );
        assert_eq!(
            read(&image),
            [
                ("meta-data".to_owned(), vec![]),
                ("network-config".to_owned(), b"v".to_vec()),
                ("user-data".to_owned(), long),
            ]
        );
        assert_eq!(&image[16 * SECTOR_BYTES + 40..][..6], b"cidata");
        assert_eq!(image.len(), (25 + 3 + 1) * SECTOR_BYTES);
    }

    #[test]
    fn same_files_make_the_same_image() {
        let files: [(&str, &[u8]); 1] = [("meta-data", b"instance-id: i-1\n")];
        assert_eq!(image("cidata", &files), image("cidata", &files));
    }
}
