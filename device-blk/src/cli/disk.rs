//! One `--disk`: `key=value` parts and flags separated by commas.
//!
//! What describes the disk goes into a [`BlkConfig`], the same as an Attach request has; what must
//! be opened first is kept apart.

use std::os::fd::RawFd;
use std::path::PathBuf;

use api::device::{BlkConfig, NbdSource, Polling, RateLimit, RateLimits};
use api::names;
use api::validate::MAX_BACKING_IMAGES;

use super::MAX_QUEUES;
use request::ID_BYTES;

const KNOWN: &str = "\
    id=, path= or fd= or nbd=, socket= or socket-fd=, format=, backing=, readonly, queues=, \
    serial=, page-cache, block-size=, polling=, cpus=, key-file= or key-fd=, nbd-tls-file= or \
    nbd-tls-fd=, nbd-tls-hostname=, read-iops=, read-bps=, write-iops=, write-bps=, each with \
    -burst as well, slow-ms=";

/// One `--disk`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DiskArg {
    pub(crate) id: String,
    /// None when it is on another host: `config.nbd`.
    pub(crate) image: Option<Source>,
    pub(crate) socket: Source,
    /// None to follow the names in the image.
    pub(crate) backing: Option<Vec<BackingArg>>,
    pub(crate) key: Option<Source>,
    pub(crate) nbd_tls: Option<Source>,
    /// Everything else.
    pub(crate) config: BlkConfig,
}

/// Something to open, or opened by whoever started this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Path(PathBuf),
    Fd(RawFd),
}

/// One `backing=PATH[:FORMAT]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BackingArg {
    pub(crate) path: PathBuf,
    pub(crate) format: String,
}

impl DiskArg {
    /// Descriptors that it names.
    pub(super) fn inherited_fds(&self) -> impl Iterator<Item = RawFd> {
        [
            self.image.as_ref(),
            Some(&self.socket),
            self.key.as_ref(),
            self.nbd_tls.as_ref(),
        ]
        .into_iter()
        .flatten()
        .filter_map(|source| match source {
            Source::Fd(fd) => Some(*fd),
            Source::Path(_) => None,
        })
    }
}

/// Reads one `--disk`.
pub(super) fn parse(spec: &str) -> Result<DiskArg, String> {
    let mut parts = Parts::default();
    for part in spec.split(',') {
        match part.split_once('=') {
            Some((key, value)) => parts.value(key, value)?,
            None => parts.flag(part)?,
        }
    }
    parts.into_disk()
}

/// What was read so far.
#[derive(Default)]
struct Parts {
    id: Option<String>,
    image: Option<Source>,
    socket: Option<Source>,
    backing: Option<Vec<BackingArg>>,
    key: Option<Source>,
    nbd_tls: Option<Source>,
    nbd_tls_hostname: Option<String>,
    config: BlkConfig,
    limits: RateLimits,
}

impl Parts {
    fn flag(&mut self, flag: &str) -> Result<(), String> {
        match flag {
            "readonly" => self.config.read_only = true,
            "page-cache" => self.config.page_cache = true,
            _ => return Err(not_understood(flag)),
        }
        Ok(())
    }

    fn value(&mut self, key: &str, value: &str) -> Result<(), String> {
        let path = || Source::Path(value.into());
        match key {
            "id" => set_once(&mut self.id, key, value.to_owned()),
            "path" => set_once(&mut self.image, "path or fd", path()),
            "fd" => set_once(&mut self.image, "path or fd", fd(key, value)?),
            "socket" => set_once(&mut self.socket, "socket or socket-fd", path()),
            "socket-fd" => set_once(&mut self.socket, "socket or socket-fd", fd(key, value)?),
            "key-file" => set_once(&mut self.key, "key-file or key-fd", path()),
            "key-fd" => set_once(&mut self.key, "key-file or key-fd", fd(key, value)?),
            "nbd-tls-file" => set_once(&mut self.nbd_tls, "nbd-tls-file or nbd-tls-fd", path()),
            "nbd-tls-fd" => set_once(
                &mut self.nbd_tls,
                "nbd-tls-file or nbd-tls-fd",
                fd(key, value)?,
            ),
            "nbd-tls-hostname" => set_once(&mut self.nbd_tls_hostname, key, value.to_owned()),
            "nbd" => set_once(&mut self.config.nbd, key, nbd(value)?),
            "backing" => {
                self.backing.get_or_insert_default().push(backing(value)?);
                Ok(())
            }
            _ => self.setting(key, value),
        }
    }

    /// What may be given again, and the last one holds.
    fn setting(&mut self, key: &str, value: &str) -> Result<(), String> {
        let config = &mut self.config;
        match key {
            "format" => config.format = format(key, value)?,
            "queues" => config.num_queues = queues(value)?,
            "serial" => config.serial = serial(value)?,
            "block-size" => config.block_size = block_size(value)?,
            "polling" => config.polling = polling(value)? as i32,
            "cpus" => config.cpus = cpus(value)?,
            "slow-ms" => config.slow_request_ms = slow_ms(value)?,
            _ => return self.limit(key, value),
        }
        Ok(())
    }

    fn limit(&mut self, key: &str, value: &str) -> Result<(), String> {
        let limits = &mut self.limits;
        let (limit, rest) = match key.split_once('-') {
            Some(("read", rest)) => (&mut limits.read, rest),
            Some(("write", rest)) => (&mut limits.write, rest),
            _ => return Err(not_understood(key)),
        };
        let mut limit_or_new = limit.unwrap_or_default();
        let place = match rest {
            "iops" => &mut limit_or_new.iops,
            "iops-burst" => &mut limit_or_new.burst_ios,
            "bps" => &mut limit_or_new.bytes_per_second,
            "bps-burst" => &mut limit_or_new.burst_bytes,
            _ => return Err(not_understood(key)),
        };
        *place = quantity(key, value)?;
        *limit = Some(limit_or_new);
        Ok(())
    }

    fn into_disk(self) -> Result<DiskArg, String> {
        let id = self.id.ok_or("id= is missing")?;
        if !names::is_id(&id) {
            return Err(format!(
                "id {id:?} must start with a letter and consist of at most 63 of a-z, 0-9 and '-'"
            ));
        }
        let mut config = self.config;
        let nbd_tls = self.nbd_tls;
        match (&self.image, &mut config.nbd) {
            (None, None) => return Err("path= (or fd=, or nbd=) is missing".into()),
            (Some(_), Some(_)) => return Err("nbd= excludes path= and fd=".into()),
            (None, Some(source)) => {
                source.tls_hostname = self.nbd_tls_hostname.unwrap_or_default();
                if nbd_tls.is_none() && !source.tls_hostname.is_empty() {
                    return Err("nbd-tls-hostname= means nothing without nbd-tls-file=".into());
                }
            }
            (Some(_), None) => {
                if nbd_tls.is_some() || self.nbd_tls_hostname.is_some() {
                    return Err("nbd-tls-... means nothing without nbd=".into());
                }
            }
        }
        if self.backing.is_some() && config.format != "qcow2" {
            return Err("backing= means nothing without format=qcow2".into());
        }
        if self.backing.as_ref().map_or(0, Vec::len) > MAX_BACKING_IMAGES {
            return Err(format!("more than {MAX_BACKING_IMAGES} backing="));
        }
        check_bursts("read", self.limits.read)?;
        check_bursts("write", self.limits.write)?;
        if self.limits != RateLimits::default() {
            config.limits = Some(self.limits);
        }
        if config.num_queues == 0 {
            config.num_queues = 1;
        }
        Ok(DiskArg {
            id,
            image: self.image,
            socket: self.socket.ok_or("socket= (or socket-fd=) is missing")?,
            backing: self.backing,
            key: self.key,
            nbd_tls,
            config,
        })
    }
}

fn not_understood(part: &str) -> String {
    format!(
        "{part:?} is not understood; known are {KNOWN} (a path with a comma can be passed as a \
         descriptor)"
    )
}

fn set_once<T>(place: &mut Option<T>, name: &str, value: T) -> Result<(), String> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("{name} is given twice")),
    }
}

fn fd(key: &str, value: &str) -> Result<Source, String> {
    match value.parse() {
        Ok(fd) if fd > 2 => Ok(Source::Fd(fd)),
        _ => Err(format!(
            "{key}={value}: an open descriptor above 2 is wanted"
        )),
    }
}

fn format(key: &str, value: &str) -> Result<String, String> {
    match value {
        "raw" | "qcow2" => Ok(value.to_owned()),
        _ => Err(format!(
            "{key}={value}: raw and qcow2 are served; convert others first, for example with \
             `qemu-img convert -O qcow2 {value}-IMAGE IMAGE.qcow2`"
        )),
    }
}

/// `PATH[:FORMAT]`; only the two known formats are taken off a path.
fn backing(value: &str) -> Result<BackingArg, String> {
    let (path, format) = match value.rsplit_once(':') {
        Some((path, format @ ("raw" | "qcow2"))) => (path, format),
        _ => (value, "qcow2"),
    };
    if path.is_empty() {
        return Err(format!("backing={value}: PATH or PATH:FORMAT is wanted"));
    }
    Ok(BackingArg {
        path: path.into(),
        format: format.to_owned(),
    })
}

/// `ADDRESS/EXPORT[@GENERATION]`, the address `HOST:PORT` or `unix:PATH`.
fn nbd(value: &str) -> Result<NbdSource, String> {
    let wanted = || {
        format!(
            "nbd={value}: HOST:PORT/EXPORT[@GENERATION] or unix:PATH/EXPORT[@GENERATION] is wanted"
        )
    };
    let split = if value.starts_with("unix:") {
        value.rsplit_once('/')
    } else {
        value.split_once('/')
    };
    let (address, rest) = split.ok_or_else(wanted)?;
    let (export, generation) = match rest.rsplit_once('@') {
        Some((export, generation)) => (export, generation.parse().map_err(|_| wanted())?),
        None => (rest, 0),
    };
    if matches!(address, "" | "unix:") {
        return Err(wanted());
    }
    Ok(NbdSource {
        address: address.to_owned(),
        export: export.to_owned(),
        generation,
        ..NbdSource::default()
    })
}

fn queues(value: &str) -> Result<u32, String> {
    match value.parse() {
        Ok(queues) if (1..=MAX_QUEUES).contains(&queues) => Ok(u32::from(queues)),
        _ => Err(format!("queues={value}: 1 to {MAX_QUEUES} are possible")),
    }
}

fn serial(value: &str) -> Result<String, String> {
    let printable = value.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    if value.len() > ID_BYTES || !printable {
        return Err(format!(
            "serial={value}: at most {ID_BYTES} printable ASCII characters fit"
        ));
    }
    Ok(value.to_owned())
}

fn block_size(value: &str) -> Result<u32, String> {
    match value {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err(format!("block-size={value}: 512 and 4096 are possible")),
    }
}

fn polling(value: &str) -> Result<Polling, String> {
    match value {
        "adaptive" => Ok(Polling::Adaptive),
        "never" => Ok(Polling::Never),
        "always" => Ok(Polling::Always),
        _ => Err(format!(
            "polling={value}: adaptive, never and always are possible"
        )),
    }
}

/// `0-3+8`: numbers and ranges joined by `+`, since a comma ends the part.
fn cpus(value: &str) -> Result<Vec<u32>, String> {
    /// Of `cpu_set_t`.
    const MAX_CPUS: u32 = 1024;
    let wanted = || format!("cpus={value}: numbers below {MAX_CPUS} such as 0-3+8 are wanted");
    let mut cpus = Vec::new();
    for range in value.split('+') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let first: u32 = first.parse().map_err(|_| wanted())?;
        let last: u32 = last.parse().map_err(|_| wanted())?;
        if first > last || last >= MAX_CPUS {
            return Err(wanted());
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

fn slow_ms(value: &str) -> Result<u32, String> {
    match value.parse() {
        Ok(ms) if ms > 0 => Ok(ms),
        _ if value == "never" => Ok(u32::MAX),
        _ => Err(format!(
            "slow-ms={value}: milliseconds above 0, or never, are wanted"
        )),
    }
}

/// A number above 0, with K, M, G or T for powers of 1024.
fn quantity(key: &str, value: &str) -> Result<u64, String> {
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'k' | b'K') => (&value[..value.len() - 1], 10),
        Some(b'M') => (&value[..value.len() - 1], 20),
        Some(b'G') => (&value[..value.len() - 1], 30),
        Some(b'T') => (&value[..value.len() - 1], 40),
        _ => (value, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|number| *number > 0)
        .ok_or_else(|| {
            format!("{key}={value}: a number above 0 is wanted, such as 500 or 100M (1024-based)")
        })
}

fn check_bursts(direction: &str, limit: Option<RateLimit>) -> Result<(), String> {
    let limit = limit.unwrap_or_default();
    for (name, rate, burst) in [
        ("iops", limit.iops, limit.burst_ios),
        ("bps", limit.bytes_per_second, limit.burst_bytes),
    ] {
        if burst > 0 && rate == 0 {
            return Err(format!(
                "{direction}-{name}-burst= means nothing without {direction}-{name}="
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_disk_gets_defaults() {
        let disk = parse("id=root,path=/x/root.img,socket=/run/s").unwrap();
        assert_eq!(
            disk,
            DiskArg {
                id: "root".into(),
                image: Some(Source::Path("/x/root.img".into())),
                socket: Source::Path("/run/s".into()),
                backing: None,
                key: None,
                nbd_tls: None,
                config: BlkConfig {
                    num_queues: 1,
                    ..BlkConfig::default()
                },
            }
        );
    }

    #[test]
    fn full_disk_is_read() {
        let disk = parse(
            "id=a,fd=7,socket-fd=8,readonly,page-cache,queues=4,serial=S 1,format=qcow2,\
             backing=/b/one.qcow2,backing=/b/two:x.img:raw,key-fd=9,block-size=4096,\
             polling=never,cpus=0-1+5,slow-ms=50,read-iops=100,read-iops-burst=20,read-bps=10M,\
             write-bps=1G,write-bps-burst=2G",
        )
        .unwrap();
        let fds: Vec<_> = disk.inherited_fds().collect();
        assert_eq!(fds, [7, 8, 9]);
        let config = disk.config;
        assert!(config.read_only && config.page_cache);
        assert_eq!((config.num_queues, config.serial.as_str()), (4, "S 1"));
        assert_eq!((config.block_size, config.slow_request_ms), (4096, 50));
        assert_eq!(config.polling(), Polling::Never);
        assert_eq!(config.cpus, [0, 1, 5]);
        let backing = disk.backing.unwrap();
        assert_eq!(
            (backing[0].path.to_str(), backing[0].format.as_str()),
            (Some("/b/one.qcow2"), "qcow2")
        );
        assert_eq!(
            (backing[1].path.to_str(), backing[1].format.as_str()),
            (Some("/b/two:x.img"), "raw")
        );
        let limits = config.limits.unwrap();
        let read = limits.read.unwrap();
        assert_eq!((read.iops, read.burst_ios), (100, 20));
        assert_eq!(read.bytes_per_second, 10 << 20);
        let write = limits.write.unwrap();
        assert_eq!(
            (write.bytes_per_second, write.burst_bytes),
            (1 << 30, 2 << 30)
        );
    }

    #[test]
    fn remote_disk_is_read() {
        let disk = parse("id=a,nbd=[::1]:10809/vm/1@7,socket=/s,nbd-tls-file=/t.pem").unwrap();
        assert_eq!((disk.image, disk.nbd_tls.is_some()), (None, true));
        let source = disk.config.nbd.unwrap();
        assert_eq!(
            (
                source.address.as_str(),
                source.export.as_str(),
                source.generation
            ),
            ("[::1]:10809", "vm/1", 7)
        );
        let local = parse("id=a,nbd=unix:/run/nbd.sock/vm1,socket=/s").unwrap();
        let source = local.config.nbd.unwrap();
        assert_eq!(
            (
                source.address.as_str(),
                source.export.as_str(),
                source.generation
            ),
            ("unix:/run/nbd.sock", "vm1", 0)
        );
    }

    #[test]
    fn mistakes_are_named() {
        for (spec, named) in [
            ("path=/x,socket=/s", "id="),
            ("id=a,socket=/s", "path="),
            ("id=a,path=/x", "socket="),
            ("id=A,path=/x,socket=/s", "a-z"),
            ("id=a,path=/x,fd=5,socket=/s", "twice"),
            ("id=a,path=/x,socket=/s,queues=65", "64"),
            ("id=a,path=/x,socket=/s,queues=0", "64"),
            ("id=a,path=/x,socket=/s,ro", "\"ro\""),
            ("id=a,fd=1,socket=/s", "above 2"),
            ("id=a,path=/x,socket=/s,serial=123456789012345678901", "20"),
            ("id=a,path=/x,socket=/s,format=vmdk", "qemu-img convert"),
            ("id=a,path=/x,socket=/s,backing=/b", "format=qcow2"),
            ("id=a,path=/x,socket=/s,block-size=1024", "4096"),
            ("id=a,path=/x,socket=/s,polling=maybe", "adaptive"),
            ("id=a,path=/x,socket=/s,cpus=3-1", "0-3+8"),
            ("id=a,path=/x,socket=/s,slow-ms=0", "never"),
            ("id=a,path=/x,socket=/s,read-iops=0", "above 0"),
            ("id=a,path=/x,socket=/s,read-bps=99999999T", "above 0"),
            ("id=a,path=/x,socket=/s,write-iops-burst=5", "write-iops="),
            ("id=a,path=/x,socket=/s,write-weight=5", "write-weight"),
            ("id=a,path=/x,socket=/s,nbd=h:1/e", "excludes"),
            ("id=a,socket=/s,nbd=h:1", "HOST:PORT/EXPORT"),
            ("id=a,socket=/s,nbd=h:1/e@x", "GENERATION"),
            ("id=a,path=/x,socket=/s,nbd-tls-fd=7", "without nbd="),
            ("id=a,path=/x,socket=/s,key-fd=7,key-file=/k", "twice"),
        ] {
            let error = parse(spec).unwrap_err();
            assert!(error.contains(named), "{spec}: {error}");
        }
    }
}
