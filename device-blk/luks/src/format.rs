//! Making a new LUKS2 volume.

use std::collections::BTreeMap;
use std::fs::File;

use rand::TryRngCore;
use rand::rngs::OsRng;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::error::LuksError;
use crate::hash::Hash;
use crate::kdf::{Argon2Variant, Budget, Cost, Kdf, Limits};
use crate::luks2::binary::{BINARY_BYTES, BinaryHeader, Copy};
use crate::luks2::metadata::{
    Af, Area, Config, Digest, KdfObject, Keyslot, Luks2Keyslot, Metadata, Requirements, Segment,
    encoded,
};
use crate::slot::{KeyDigest, Slot};
use crate::{af, area, protected};

/// Where `cryptsetup` begins data too: room for headers and 32 key slots.
pub const DEFAULT_PAYLOAD_OFFSET_BYTES: u64 = 16 << 20;

/// As `cryptsetup` makes them: 16 KiB a copy, 12 KiB of JSON.
const HEADER_BYTES: u64 = 16 << 10;
const AREA_ALIGN_BYTES: usize = 4096;
const SALT_BYTES: usize = 32;
/// Room for one key slot of the largest key.
const MIN_PAYLOAD_OFFSET_BYTES: u64 = 1 << 20;
/// The volume key is random, so that guessing it is hopeless at any speed (libcryptsetup's least).
const DIGEST_ITERATIONS: u32 = 1000;
/// What making a volume may cost; the options' own bounds are lower.
const FORMAT_LIMITS: Limits = Limits {
    max_memory_kib: 4 << 20,
    max_work: 1 << 30,
};

/// How a new volume is to be.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Unit of encryption, 512 or 4096. With 4096 disks are faster and have blocks of 4096 bytes.
    pub sector_bytes: u32,
    /// Of the volume key: 256 (AES-128) or 512 (AES-256).
    pub key_bits: u32,
    /// Where data begins; a multiple of 4096, 1 MiB at least.
    pub payload_offset_bytes: u64,
    /// How the passphrase is hardened.
    pub kdf: NewKdf,
    /// At most 47 bytes.
    pub label: String,
}

impl Default for FormatOptions {
    fn default() -> Self {
        Self {
            sector_bytes: 512,
            key_bits: 512,
            payload_offset_bytes: DEFAULT_PAYLOAD_OFFSET_BYTES,
            kdf: NewKdf::default(),
            label: String::new(),
        }
    }
}

/// Key derivation of a new key slot. Each attach pays for it again, the one after a crash too,
/// for which a guest waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewKdf {
    /// For passphrases that people make up.
    Argon2id {
        /// 32 to 4194304.
        memory_kib: u32,
        /// 4 at least.
        passes: u32,
    },
    /// PBKDF2 with SHA-256: enough for a key of 32 random bytes or more.
    Pbkdf2 {
        /// 1000 at least.
        iterations: u32,
    },
}

impl Default for NewKdf {
    /// 64 MiB, about a quarter of a second.
    fn default() -> Self {
        Self::Argon2id {
            memory_kib: 64 << 10,
            passes: 4,
        }
    }
}

/// A volume that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Formatted {
    /// As written into the header.
    pub uuid: String,
    /// Where data begins.
    pub payload_offset_bytes: u64,
}

/// Makes a new volume in `file`, with one key slot; all that is in the file before the payload is
/// lost, and what follows becomes unreadable. The header is durable when this returns.
///
/// # Errors
/// The options are impossible, the file is too short, or the kernel refused.
pub fn format(
    file: &File,
    passphrase: &[u8],
    options: &FormatOptions,
) -> Result<Formatted, LuksError> {
    options.check(area::file_len(file)?)?;
    let planned = Plan::sealed(options, passphrase);
    protected::wipe_stack();
    let (plan, key_area) = planned?;
    let json = serde_json::to_vec(&plan.metadata(options))
        .expect("maps with string keys can be written as JSON");
    let uuid = Uuid::new_v4().to_string();
    let header = || -> Result<BinaryHeader, LuksError> {
        let mut salt = [0; 64];
        fill_random(&mut salt)?;
        Ok(BinaryHeader::new(
            HEADER_BYTES,
            uuid.clone(),
            options.label.clone(),
            salt,
        ))
    };
    // The primary header comes last: while it is missing there is no volume.
    const ACTION: &str = "write the LUKS2 header";
    let sync = || file.sync_data().map_err(LuksError::io(ACTION));
    area::write(file, 0, &[0; AREA_ALIGN_BYTES], ACTION)?;
    area::write(file, plan.slot.area_offset_bytes, &key_area, ACTION)?;
    let secondary = header()?.to_bytes(Copy::Secondary, &json);
    area::write(file, HEADER_BYTES, &secondary, ACTION)?;
    sync()?;
    area::write(file, 0, &header()?.to_bytes(Copy::Primary, &json), ACTION)?;
    sync()?;
    Ok(Formatted {
        uuid,
        payload_offset_bytes: options.payload_offset_bytes,
    })
}

impl FormatOptions {
    fn check(&self, file_len_bytes: u64) -> Result<(), LuksError> {
        let refuse = |what| Err(LuksError::Options { what });
        if !matches!(self.sector_bytes, 512 | 4096) {
            return refuse("sectors have 512 or 4096 bytes");
        }
        if !matches!(self.key_bits, 256 | 512) {
            return refuse("keys have 256 or 512 bits");
        }
        if self.payload_offset_bytes < MIN_PAYLOAD_OFFSET_BYTES
            || !self.payload_offset_bytes.is_multiple_of(4096)
            || self.payload_offset_bytes > 1 << 40
        {
            return refuse("data begins at a multiple of 4096, at 1 MiB at least");
        }
        if self.label.len() > 47 || self.label.contains('\0') {
            return refuse("labels have at most 47 bytes and no NUL");
        }
        let kdf_is_possible = match self.kdf {
            NewKdf::Argon2id { memory_kib, passes } => {
                (32..=4 << 20).contains(&memory_kib) && (4..=64).contains(&passes)
            }
            NewKdf::Pbkdf2 { iterations } => (1000..=1 << 30).contains(&iterations),
        };
        if !kdf_is_possible {
            return refuse(
                "Argon2id takes 32 to 4194304 KiB and 4 to 64 passes, PBKDF2 1000 iterations at least",
            );
        }
        let least_bytes = self.payload_offset_bytes + u64::from(self.sector_bytes);
        if file_len_bytes < least_bytes {
            return Err(LuksError::TooSmall {
                len_bytes: file_len_bytes,
                payload_offset_bytes: self.payload_offset_bytes,
            });
        }
        Ok(())
    }

    fn kdf(&self) -> Kdf {
        match self.kdf {
            NewKdf::Argon2id { memory_kib, passes } => Kdf::Argon2 {
                variant: Argon2Variant::Id,
                cost: Cost {
                    memory_kib,
                    passes,
                    lanes: 1,
                },
            },
            NewKdf::Pbkdf2 { iterations } => Kdf::Pbkdf2 {
                hash: Hash::Sha256,
                iterations,
            },
        }
    }
}

/// What is to be written, the volume key included.
struct Plan {
    volume_key: Zeroizing<Vec<u8>>,
    slot: Slot,
    area_bytes: usize,
    digest: KeyDigest,
}

impl Plan {
    fn new(options: &FormatOptions) -> Result<Self, LuksError> {
        let key_bytes = options.key_bits as usize / 8;
        let volume_key = random(key_bytes)?;
        let slot = Slot {
            kdf: options.kdf(),
            salt: random(SALT_BYTES)?.to_vec(),
            af_hash: Hash::Sha256,
            stripes: af::STRIPES,
            area_offset_bytes: 2 * HEADER_BYTES,
            area_key_bytes: 64,
            key_bytes,
        };
        let mut digest = KeyDigest {
            hash: Hash::Sha256,
            iterations: DIGEST_ITERATIONS,
            salt: random(SALT_BYTES)?.to_vec(),
            digest: vec![0; Hash::Sha256.digest_bytes()],
        };
        digest.hash.pbkdf2(
            &volume_key,
            &digest.salt,
            digest.iterations,
            &mut digest.digest,
        );
        Ok(Self {
            area_bytes: slot.striped_bytes().next_multiple_of(AREA_ALIGN_BYTES),
            volume_key,
            slot,
            digest,
        })
    }

    /// With what is to be stored in its key slot.
    #[inline(never)]
    fn sealed(
        options: &FormatOptions,
        passphrase: &[u8],
    ) -> Result<(Self, Zeroizing<Vec<u8>>), LuksError> {
        let plan = Self::new(options)?;
        let key_area = plan.key_area(passphrase)?;
        Ok((plan, key_area))
    }

    fn key_area(&self, passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>, LuksError> {
        let random = random(self.area_bytes)?;
        let mut budget = Budget::new(FORMAT_LIMITS);
        self.slot
            .seal(&self.volume_key, passphrase, random, &mut budget)
    }

    fn metadata(&self, options: &FormatOptions) -> Metadata {
        let id = || "0".to_owned();
        let keyslot = Luks2Keyslot {
            key_size: self.slot.key_bytes as u64,
            priority: None,
            af: Af {
                r#type: "luks1".to_owned(),
                stripes: self.slot.stripes,
                hash: "sha256".to_owned(),
            },
            area: Area {
                r#type: "raw".to_owned(),
                offset: self.slot.area_offset_bytes,
                size: self.area_bytes as u64,
                encryption: "aes-xts-plain64".to_owned(),
                key_size: self.slot.area_key_bytes as u64,
            },
            kdf: kdf_object(&self.slot),
        };
        let segment = Segment {
            r#type: "crypt".to_owned(),
            offset: options.payload_offset_bytes,
            size: "dynamic".to_owned(),
            iv_tweak: 0,
            encryption: "aes-xts-plain64".to_owned(),
            sector_size: options.sector_bytes,
            integrity: None,
        };
        let digest = Digest {
            r#type: "pbkdf2".to_owned(),
            keyslots: vec![id()],
            segments: vec![id()],
            hash: "sha256".to_owned(),
            iterations: self.digest.iterations,
            salt: encoded(&self.digest.salt),
            digest: encoded(&self.digest.digest),
        };
        Metadata {
            keyslots: BTreeMap::from([(id(), Keyslot::Luks2(keyslot))]),
            tokens: serde_json::Map::new(),
            segments: BTreeMap::from([(id(), segment)]),
            digests: BTreeMap::from([(id(), digest)]),
            config: Config {
                json_size: HEADER_BYTES - BINARY_BYTES as u64,
                // libcryptsetup takes 128 MiB at most.
                keyslots_size: (options.payload_offset_bytes - 2 * HEADER_BYTES).min(128 << 20),
                requirements: Requirements::default(),
            },
        }
    }
}

fn kdf_object(slot: &Slot) -> KdfObject {
    let salt = encoded(&slot.salt);
    match &slot.kdf {
        Kdf::Pbkdf2 { iterations, .. } => KdfObject::Pbkdf2 {
            hash: "sha256".to_owned(),
            iterations: *iterations,
            salt,
        },
        Kdf::Argon2 { cost, .. } => KdfObject::Argon2id {
            time: cost.passes,
            memory: cost.memory_kib,
            cpus: cost.lanes,
            salt,
        },
    }
}

fn random(len_bytes: usize) -> Result<Zeroizing<Vec<u8>>, LuksError> {
    let mut bytes = Zeroizing::new(vec![0; len_bytes]);
    fill_random(&mut bytes)?;
    Ok(bytes)
}

fn fill_random(bytes: &mut [u8]) -> Result<(), LuksError> {
    OsRng.try_fill_bytes(bytes).map_err(|error| LuksError::Io {
        action: "get random bytes",
        source: std::io::Error::other(error),
    })
}
