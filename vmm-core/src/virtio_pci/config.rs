//! What a device request says: `tag=disk0,type=blk,socket=PATH[,queues=N][,queue-size=N]...`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Ring size when the request names none.
const DEFAULT_QUEUE_SIZE: u16 = 256;
/// Split rings have at most this many descriptors (Virtio 1.2 section 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;
/// Most queues a device can have: doorbells and MSI-X table share one 32 KiB BAR.
pub(super) const MAX_QUEUES: u16 = 128;
/// Most bytes of configuration space a vhost-user message carries.
pub(super) const MAX_CONFIG_LEN: u16 = 256;
/// Feature bits that belong to device types (Virtio 1.2 section 2.2).
pub(super) const TYPE_FEATURES: u64 = 0x00ff_ffff | 0x3fff << 50;
/// The device type is added to 0x1040 to make a PCI device ID (Virtio 1.2 section 4.1.2).
const MAX_DEVICE_TYPE: u16 = 0x3f;

/// A virtio device number (Virtio 1.2 chapter 5), and all that a transport needs to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceType(u16);

impl DeviceType {
    /// Network card.
    pub const NET: Self = Self(1);
    /// Block device.
    pub const BLK: Self = Self(2);
    /// Entropy source.
    pub const RNG: Self = Self(4);
    /// Socket device.
    pub const VSOCK: Self = Self(19);
    /// File system.
    pub const FS: Self = Self(26);

    const NAMES: [(&str, Self); 5] = [
        ("net", Self::NET),
        ("blk", Self::BLK),
        ("rng", Self::RNG),
        ("vsock", Self::VSOCK),
        ("fs", Self::FS),
    ];

    /// The virtio device number.
    #[must_use]
    pub fn number(self) -> u16 {
        self.0
    }

    /// PCI class code: base class, subclass, programming interface.
    #[must_use]
    pub fn pci_class(self) -> u32 {
        match self {
            Self::NET => 0x02_00_00,
            Self::BLK | Self::FS => 0x01_80_00,
            Self::VSOCK => 0x07_80_00,
            _ => 0xff_00_00,
        }
    }

    /// Queues when neither request nor backend say how many.
    #[must_use]
    pub fn default_queues(self) -> u16 {
        match self {
            Self::NET | Self::FS => 2,
            Self::VSOCK => 3,
            _ => 1,
        }
    }

    /// Bytes of device configuration space when the request does not say: the fields that
    /// drivers read without a feature bit that asks for more (Virtio 1.2 sections 5.x.4).
    #[must_use]
    pub fn default_config_len(self) -> u16 {
        match self {
            Self::BLK => 60,
            Self::NET => 12,
            Self::VSOCK => 8,
            Self::FS => 40,
            _ => 0,
        }
    }
}

impl FromStr for DeviceType {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if let Some((_, device_type)) = Self::NAMES.iter().find(|(name, _)| *name == text) {
            return Ok(*device_type);
        }
        match text.parse() {
            Ok(number) if (1..=MAX_DEVICE_TYPE).contains(&number) => Ok(Self(number)),
            _ => Err(ConfigError::DeviceType(text.to_owned())),
        }
    }
}

impl fmt::Display for DeviceType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMES
            .iter()
            .find(|(_, device_type)| device_type == self)
        {
            Some((name, _)) => formatter.write_str(name),
            None => write!(formatter, "{}", self.0),
        }
    }
}

/// One vhost-user device of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostUserDeviceConfig {
    /// Name of the device in this machine, for people.
    pub tag: String,
    /// What the guest finds.
    pub device_type: DeviceType,
    /// Where the backend listens.
    pub socket: PathBuf,
    /// Virtqueues; `None` asks the backend. A backend that serves its configuration space
    /// promises queues there, so the guest then sees no fewer than the backend has.
    pub queues: Option<u16>,
    /// Largest ring the driver may set up, a power of two.
    pub queue_size: u16,
    /// Bytes of device configuration space; `None` takes the device type's usual length.
    pub config_size: Option<u16>,
    /// Device configuration space for a backend that does not serve one itself.
    pub config: Vec<u8>,
    /// Features that merely say what is in that configuration space, such as VIRTIO_NET_F_MAC. The
    /// guest is offered them, and the backend is told nothing of them.
    pub config_features: u64,
}

/// A device request that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not `key=value`.
    #[error("device parameter {0:?} is not key=value")]
    NoValue(String),
    /// Nobody knows this key.
    #[error(
        "unknown device parameter {0:?}: use tag, type, socket, queues, queue-size, config-size, config or config-features"
    )]
    UnknownKey(String),
    /// A key is missing.
    #[error("device parameter {0}= is missing")]
    Missing(&'static str),
    /// Not a device type.
    #[error(
        "device type {0:?} is not known: use blk, net, fs, vsock, rng or a virtio device number from 1 to 63"
    )]
    DeviceType(String),
    /// A number out of range.
    #[error("device parameter {key}={value} is not possible: {expected}")]
    Value {
        /// The parameter.
        key: &'static str,
        /// What it was set to.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
}

impl FromStr for VhostUserDeviceConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let (mut tag, mut device_type, mut socket) = (None, None, None);
        let (mut queues, mut queue_size, mut config_size) = (None, DEFAULT_QUEUE_SIZE, None);
        let (mut config, mut config_features) = (Vec::new(), 0);
        for parameter in text.split(',') {
            let (key, value) = parameter
                .split_once('=')
                .ok_or_else(|| ConfigError::NoValue(parameter.to_owned()))?;
            match key {
                "tag" => tag = Some(value.to_owned()),
                "type" => device_type = Some(value.parse()?),
                "socket" => socket = Some(PathBuf::from(value)),
                "queues" => {
                    queues = Some(number("queues", value, "give 1 to 128", |count| {
                        (1..=MAX_QUEUES).contains(&count)
                    })?);
                }
                "queue-size" => {
                    queue_size = number(
                        "queue-size",
                        value,
                        "give a power of two from 2 to 32768",
                        |size| size.is_power_of_two() && (2..=MAX_QUEUE_SIZE).contains(&size),
                    )?;
                }
                "config-size" => {
                    config_size = Some(number(
                        "config-size",
                        value,
                        "give 0 to 256 bytes",
                        |size| size <= MAX_CONFIG_LEN,
                    )?);
                }
                "config" => config = config_bytes(value)?,
                "config-features" => config_features = feature_bits(value)?,
                _ => return Err(ConfigError::UnknownKey(key.to_owned())),
            }
        }
        Ok(Self {
            tag: tag
                .filter(|tag: &String| !tag.is_empty())
                .ok_or(ConfigError::Missing("tag"))?,
            device_type: device_type.ok_or(ConfigError::Missing("type"))?,
            socket: socket
                .filter(|path| !path.as_os_str().is_empty())
                .ok_or(ConfigError::Missing("socket"))?,
            queues,
            queue_size,
            config_size,
            config,
            config_features,
        })
    }
}

fn number(
    key: &'static str,
    value: &str,
    expected: &'static str,
    possible: impl Fn(u16) -> bool,
) -> Result<u16, ConfigError> {
    let number = value.parse().ok().filter(|number| possible(*number));
    number.ok_or_else(|| ConfigError::Value {
        key,
        value: value.to_owned(),
        expected,
    })
}

/// `hex:` and digits, or `str:` and text.
fn config_bytes(value: &str) -> Result<Vec<u8>, ConfigError> {
    let bytes = match value.split_once(':') {
        Some(("hex", digits)) => bytes_of_hex(digits),
        Some(("str", text)) => Some(text.as_bytes().to_owned()),
        _ => None,
    };
    bytes
        .filter(|bytes| bytes.len() <= usize::from(MAX_CONFIG_LEN))
        .ok_or_else(|| ConfigError::Value {
            key: "config",
            value: value.to_owned(),
            expected: "give hex: and an even number of digits, or str: and text, of at most 256 bytes",
        })
}

/// `0x` and digits: bits of the device type (Virtio 1.2 section 2.2).
fn feature_bits(value: &str) -> Result<u64, ConfigError> {
    let digits = value
        .strip_prefix("0x")
        .filter(|digits| !digits.starts_with('+'));
    let bits = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
    bits.filter(|bits| bits & !TYPE_FEATURES == 0)
        .ok_or_else(|| ConfigError::Value {
            key: "config-features",
            value: value.to_owned(),
            expected: "give 0x and digits, with bits 0 to 23 and 50 to 63 only",
        })
}

fn bytes_of_hex(digits: &str) -> Option<Vec<u8>> {
    if !digits.is_ascii() || !digits.len().is_multiple_of(2) {
        return None;
    }
    let pairs = (0..digits.len()).step_by(2);
    pairs
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<VhostUserDeviceConfig, ConfigError> {
        text.parse()
    }

    #[test]
    fn minimal_request_leaves_the_rest_to_backend_and_defaults() {
        let config = parse("tag=disk0,type=blk,socket=/run/blk.sock").unwrap();
        assert_eq!(
            (config.tag.as_str(), config.device_type),
            ("disk0", DeviceType::BLK)
        );
        assert_eq!(config.socket, PathBuf::from("/run/blk.sock"));
        assert_eq!(
            (config.queues, config.queue_size, config.config_size),
            (None, 256, None)
        );
    }

    #[test]
    fn every_parameter_is_taken() {
        let text = "tag=share,type=26,socket=s,queues=2,queue-size=128,config-size=40,config=hex:7461,config-features=0x28";
        let config = parse(text).unwrap();
        assert_eq!(config.device_type, DeviceType::FS);
        assert_eq!(
            (config.queues, config.queue_size, config.config_size),
            (Some(2), 128, Some(40))
        );
        assert_eq!(
            (config.config.as_slice(), config.config_features),
            (&b"ta"[..], 0x28)
        );
        assert_eq!(
            parse("tag=a,type=fs,socket=s,config=str:tag:x")
                .unwrap()
                .config,
            b"tag:x"
        );
    }

    #[test]
    fn impossible_requests_name_the_parameter() {
        let cases = [
            ("tag=a,type=blk", "socket= is missing"),
            ("tag=,type=blk,socket=s", "tag= is missing"),
            ("type=blk,socket=s,tag", "\"tag\" is not key=value"),
            ("tag=a,type=disk,socket=s", "device type \"disk\""),
            ("tag=a,type=64,socket=s", "device type \"64\""),
            ("tag=a,type=blk,socket=s,queues=0", "queues=0"),
            ("tag=a,type=blk,socket=s,queues=129", "queues=129"),
            ("tag=a,type=blk,socket=s,queue-size=100", "queue-size=100"),
            ("tag=a,type=blk,socket=s,queue-size=1", "queue-size=1"),
            ("tag=a,type=blk,socket=s,config-size=257", "config-size=257"),
            ("tag=a,type=fs,socket=s,config=hex:abc", "config=hex:abc"),
            ("tag=a,type=fs,socket=s,config=hex:\u{e9}", "config=hex:"),
            ("tag=a,type=fs,socket=s,config=abcd", "config=abcd"),
            (
                "tag=a,type=net,socket=s,config-features=32",
                "config-features=32",
            ),
            (
                "tag=a,type=net,socket=s,config-features=0x100000000",
                "bits 0 to 23 and 50 to 63",
            ),
            (
                "tag=a,type=blk,socket=s,image=/x",
                "unknown device parameter \"image\"",
            ),
        ];
        for (text, expected) in cases {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{text}: {message}");
        }
    }
}
