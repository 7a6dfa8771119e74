//! The JSON of a LUKS2 header (LUKS2 specification, section 3).

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::binary::{BINARY_BYTES, BinaryHeader};
use crate::error::LuksError;
use crate::kdf::{Argon2Variant, Cost, Kdf};
use crate::slot::{
    KeyDigest, Layout, Slot, checked_cipher, checked_hash, checked_key_bytes, checked_stripes,
};

/// Key slots that a header may have (`LUKS2_KEYSLOTS_MAX` of libcryptsetup).
const MAX_SLOTS: usize = 32;
/// Bytes of a salt or digest that make sense.
const MAX_SALT_BYTES: usize = 1024;

/// All of it that is understood here.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Metadata {
    pub(crate) keyslots: BTreeMap<String, Keyslot>,
    pub(crate) tokens: serde_json::Map<String, serde_json::Value>,
    pub(crate) segments: BTreeMap<String, Segment>,
    pub(crate) digests: BTreeMap<String, Digest>,
    pub(crate) config: Config,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "type")]
pub(crate) enum Keyslot {
    #[serde(rename = "luks2")]
    Luks2(Luks2Keyslot),
    /// For re-encryption, or of a later version.
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Luks2Keyslot {
    pub(crate) key_size: u64,
    /// 0: not to be tried, 1: normal, 2: first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) priority: Option<u8>,
    pub(crate) af: Af,
    pub(crate) area: Area,
    pub(crate) kdf: KdfObject,
}

#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Af {
    pub(crate) r#type: String,
    pub(crate) stripes: u32,
    pub(crate) hash: String,
}

#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Area {
    pub(crate) r#type: String,
    #[serde(with = "decimal")]
    pub(crate) offset: u64,
    #[serde(with = "decimal")]
    pub(crate) size: u64,
    pub(crate) encryption: String,
    pub(crate) key_size: u64,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(crate) enum KdfObject {
    Pbkdf2 {
        hash: String,
        iterations: u32,
        salt: String,
    },
    Argon2i {
        time: u32,
        memory: u32,
        cpus: u32,
        salt: String,
    },
    Argon2id {
        time: u32,
        memory: u32,
        cpus: u32,
        salt: String,
    },
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Segment {
    pub(crate) r#type: String,
    #[serde(with = "decimal")]
    pub(crate) offset: u64,
    /// A number, or `dynamic`.
    pub(crate) size: String,
    #[serde(with = "decimal", default)]
    pub(crate) iv_tweak: u64,
    #[serde(default)]
    pub(crate) encryption: String,
    #[serde(default)]
    pub(crate) sector_size: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) integrity: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Digest {
    pub(crate) r#type: String,
    pub(crate) keyslots: Vec<String>,
    pub(crate) segments: Vec<String>,
    #[serde(default)]
    pub(crate) hash: String,
    #[serde(default)]
    pub(crate) iterations: u32,
    #[serde(default)]
    pub(crate) salt: String,
    #[serde(default)]
    pub(crate) digest: String,
}

#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Config {
    #[serde(with = "decimal")]
    pub(crate) json_size: u64,
    #[serde(with = "decimal")]
    pub(crate) keyslots_size: u64,
    #[serde(default, skip_serializing_if = "Requirements::is_empty")]
    pub(crate) requirements: Requirements,
}

/// What a program must know to use the volume.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Requirements {
    #[serde(default)]
    pub(crate) mandatory: Vec<String>,
}

impl Requirements {
    fn is_empty(&self) -> bool {
        self.mandatory.is_empty()
    }
}

impl Metadata {
    /// The text in front of the first NUL of `json_area`.
    pub(crate) fn parse(json_area: &[u8]) -> Result<Self, LuksError> {
        let len = json_area
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(json_area.len());
        // The error says where, and quotes names that are in clear in the header anyway.
        serde_json::from_slice(&json_area[..len])
            .map_err(|error| LuksError::malformed(format!("its JSON: {error}")))
    }

    /// What is needed to unlock, checked.
    pub(crate) fn layout(
        &self,
        header: &BinaryHeader,
        has_damaged_copy: bool,
    ) -> Result<Layout, LuksError> {
        self.check_requirements(header)?;
        let headers_end = 2 * header.header_bytes;
        let areas_end = headers_end
            .checked_add(self.config.keyslots_size)
            .ok_or_else(|| LuksError::malformed("keyslots_size is too large"))?;
        let (segment_id, segment) = self.only_segment()?;
        let checked = segment.checked(areas_end)?;
        let (digest, slot_ids) = self.digest_of(segment_id)?;
        if self.keyslots.len() > MAX_SLOTS {
            return Err(LuksError::malformed("there are more than 32 key slots"));
        }
        let mut slots = Vec::new();
        let mut unusable = None;
        for id in slot_ids {
            let Some(Keyslot::Luks2(keyslot)) = self.keyslots.get(id) else {
                continue;
            };
            match keyslot.checked(headers_end, areas_end) {
                Ok(slot) => slots.push((keyslot.priority.unwrap_or(1), slot)),
                // Another slot may do.
                Err(error @ LuksError::Unsupported { .. }) => unusable = Some(error),
                Err(error) => return Err(error),
            }
        }
        slots.retain(|(priority, _)| *priority > 0);
        slots.sort_by_key(|(priority, _)| std::cmp::Reverse(*priority));
        if let (true, Some(error)) = (slots.is_empty(), unusable) {
            return Err(error);
        }
        Ok(Layout {
            version: 2,
            uuid: header.uuid.clone(),
            slots: slots.into_iter().map(|(_, slot)| slot).collect(),
            digest,
            payload_offset_bytes: checked.offset_bytes,
            payload_len_bytes: checked.len_bytes,
            sector_bytes: checked.sector_bytes,
            first_iv: checked.first_iv,
            has_damaged_copy,
        })
    }

    fn check_requirements(&self, header: &BinaryHeader) -> Result<(), LuksError> {
        if let Some(requirement) = self.config.requirements.mandatory.first() {
            return Err(LuksError::Unsupported {
                what: format!("the requirement {requirement:?}"),
                supported: "volumes without requirements (finish a re-encryption first)",
            });
        }
        if self.config.json_size != header.header_bytes - BINARY_BYTES as u64 {
            return Err(LuksError::malformed(
                "json_size does not fit the header's size",
            ));
        }
        Ok(())
    }

    fn only_segment(&self) -> Result<(&str, &Segment), LuksError> {
        let mut segments = self.segments.iter();
        match (segments.next(), segments.next()) {
            (Some((id, segment)), None) => Ok((id, segment)),
            _ => Err(LuksError::Unsupported {
                what: format!("{} segments", self.segments.len()),
                supported: "volumes with one segment",
            }),
        }
    }

    fn digest_of(&self, segment_id: &str) -> Result<(KeyDigest, &[String]), LuksError> {
        let digest = self
            .digests
            .values()
            .find(|digest| digest.segments.iter().any(|id| id == segment_id))
            .ok_or_else(|| LuksError::malformed("no digest belongs to the segment"))?;
        if digest.r#type != "pbkdf2" {
            return Err(LuksError::Unsupported {
                what: format!("a digest of type {:?}", digest.r#type),
                supported: "pbkdf2 digests",
            });
        }
        let hash = checked_hash(&digest.hash)?;
        let expected = decoded(&digest.digest)?;
        // A digest cut short would accept keys that are wrong.
        if expected.len() != hash.digest_bytes() {
            return Err(LuksError::malformed("a digest has not its hash's length"));
        }
        let key_digest = KeyDigest {
            hash,
            iterations: digest.iterations,
            salt: decoded(&digest.salt)?,
            digest: expected,
        };
        Ok((key_digest, &digest.keyslots))
    }
}

/// Where the data lies and how it is encrypted.
struct CheckedSegment {
    offset_bytes: u64,
    len_bytes: Option<u64>,
    sector_bytes: u32,
    first_iv: u64,
}

impl Segment {
    fn checked(&self, areas_end: u64) -> Result<CheckedSegment, LuksError> {
        if self.r#type != "crypt" || self.integrity.is_some() {
            return Err(LuksError::Unsupported {
                what: if self.integrity.is_some() {
                    "integrity protection".to_owned()
                } else {
                    format!("a segment of type {:?}", self.r#type)
                },
                supported: "segments of type crypt without integrity protection",
            });
        }
        checked_cipher(&self.encryption)?;
        if !matches!(self.sector_size, 512 | 4096) {
            return Err(LuksError::Unsupported {
                what: format!("sectors of {} bytes", self.sector_size),
                supported: "sectors of 512 and 4096 bytes",
            });
        }
        let sector_bytes = u64::from(self.sector_size);
        if self.offset == 0 {
            return Err(LuksError::Unsupported {
                what: "a detached header".to_owned(),
                supported: "headers in front of their data",
            });
        }
        if self.offset < areas_end || !self.offset.is_multiple_of(sector_bytes) {
            return Err(LuksError::malformed(
                "the segment overlaps the key slots or is not aligned to its sectors",
            ));
        }
        let len_bytes = match self.size.as_str() {
            "dynamic" => None,
            number => match number.parse::<u64>() {
                Ok(len) if len > 0 && len.is_multiple_of(sector_bytes) => Some(len),
                _ => return Err(LuksError::malformed("the segment's size")),
            },
        };
        Ok(CheckedSegment {
            offset_bytes: self.offset,
            len_bytes,
            sector_bytes: self.sector_size,
            first_iv: self.iv_tweak,
        })
    }
}

impl Luks2Keyslot {
    fn checked(&self, headers_end: u64, areas_end: u64) -> Result<Slot, LuksError> {
        if self.af.r#type != "luks1" || self.area.r#type != "raw" {
            return Err(LuksError::Unsupported {
                what: format!(
                    "a key slot of kind {:?} in {:?}",
                    self.af.r#type, self.area.r#type
                ),
                supported: "key slots of kind luks1 in raw areas",
            });
        }
        checked_cipher(&self.area.encryption)?;
        let (kdf, salt) = self.kdf.checked()?;
        let slot = Slot {
            kdf,
            salt,
            af_hash: checked_hash(&self.af.hash)?,
            stripes: checked_stripes(self.af.stripes)?,
            area_offset_bytes: self.area.offset,
            area_key_bytes: checked_key_bytes(self.area.key_size)?,
            key_bytes: checked_key_bytes(self.key_size)?,
        };
        let end = self.area.offset.checked_add(self.area.size);
        if self.area.offset < headers_end
            || end.is_none_or(|end| end > areas_end)
            || slot.striped_bytes() as u64 > self.area.size
        {
            return Err(LuksError::malformed(
                "a key slot's area lies outside of the space for key slots",
            ));
        }
        Ok(slot)
    }
}

impl KdfObject {
    fn checked(&self) -> Result<(Kdf, Vec<u8>), LuksError> {
        let argon2 = |variant, &passes, &memory_kib, &lanes| Kdf::Argon2 {
            variant,
            cost: Cost {
                memory_kib,
                passes,
                lanes,
            },
        };
        Ok(match self {
            Self::Pbkdf2 {
                hash,
                iterations,
                salt,
            } => {
                let hash = checked_hash(hash)?;
                let iterations = *iterations;
                (Kdf::Pbkdf2 { hash, iterations }, decoded(salt)?)
            }
            Self::Argon2i {
                time,
                memory,
                cpus,
                salt,
            } => (argon2(Argon2Variant::I, time, memory, cpus), decoded(salt)?),
            Self::Argon2id {
                time,
                memory,
                cpus,
                salt,
            } => (
                argon2(Argon2Variant::Id, time, memory, cpus),
                decoded(salt)?,
            ),
            Self::Other => {
                return Err(LuksError::Unsupported {
                    what: "a key derivation that is not known".to_owned(),
                    supported: "pbkdf2, argon2i and argon2id",
                });
            }
        })
    }
}

fn decoded(text: &str) -> Result<Vec<u8>, LuksError> {
    match STANDARD.decode(text) {
        Ok(bytes) if bytes.len() <= MAX_SALT_BYTES => Ok(bytes),
        _ => Err(LuksError::malformed("a salt or digest")),
    }
}

/// Base64 as the header has it.
pub(crate) fn encoded(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// 64-bit numbers are strings (section 3.1).
mod decimal {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(number: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(number)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        text.parse()
            .map_err(|_| D::Error::custom("a number is not decimal"))
    }
}
