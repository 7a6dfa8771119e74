//! The words for machines on the command line, and the API's spec that they make.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context as _;
use api::controller as pb;
use api::names::Name;

use crate::cli::{MachineArgs, RestartArg};
use crate::{placement, port_forward, seed};

/// Parses `512M`, `4G`, `1T`, `64K` or a plain number of bytes. `MiB` and `MB` mean the same: powers
/// of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let error = || format!("{text:?} is no size; write a number and K, M, G or T, such as 512M");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..]
        .to_ascii_uppercase()
        .trim_end_matches("IB")
        .trim_end_matches('B')
    {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(error()),
    };
    let number: u64 = digits.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

/// `--disk`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskArg {
    source: DiskSource,
    options: pb::Disk,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum DiskSource {
    Image(PathBuf),
    Volume(String),
    Nbd,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let first = words.next().unwrap_or_default();
        let mut options = pb::Disk::default();
        let source = match first.split_once('=') {
            Some(("nbd", export)) => {
                options.nbd = Some(parse_nbd(export)?);
                DiskSource::Nbd
            }
            Some(("volume", name)) => DiskSource::Volume(name.to_owned()),
            Some(("path", path)) => DiskSource::Image(path.into()),
            _ if first.is_empty() => return Err("name an image or volume=NAME first".to_owned()),
            _ => DiskSource::Image(first.into()),
        };
        for word in words {
            match word.split_once('=') {
                None if matches!(word, "readonly" | "ro") => options.read_only = true,
                None if word == "page-cache" => options.page_cache = true,
                Some((name, value)) if disk_option(&mut options, name, value)? => {}
                _ => {
                    return Err(format!(
                        "{word:?} is no option of a disk; there are readonly, page-cache, queues=N, serial=TEXT, name=NAME, format=raw|qcow2, block-size=512|4096, polling=adaptive|never|always, cpus=0-3+6, slow-ms=N, read-iops=, read-bps=, write-iops=, write-bps= (each also with -burst), and for nbd tls=FILE and tls-hostname=NAME"
                    ));
                }
            }
        }
        Ok(Self { source, options })
    }
}

/// Takes one option; false if there is none of this name.
fn disk_option(disk: &mut pb::Disk, name: &str, value: &str) -> Result<bool, String> {
    match name {
        "queues" => disk.num_queues = parse_number("queues", value)?,
        "serial" => disk.serial = value.to_owned(),
        "name" => disk.name = value.to_owned(),
        "format" => disk.format = value.to_owned(),
        "block-size" => disk.block_size = parse_number("block-size", value)?,
        "polling" => disk.polling = parse_polling(value)? as i32,
        "cpus" => disk.cpus = parse_cpus(value)?,
        "slow-ms" => disk.slow_request_ms = parse_number("slow-ms", value)?,
        "tls" | "tls-hostname" => {
            let Some(nbd) = &mut disk.nbd else {
                return Err(format!("{name}= is for nbd=ADDRESS/EXPORT"));
            };
            match name {
                "tls" => nbd.tls_file = value.to_owned(),
                _ => nbd.tls_hostname = value.to_owned(),
            }
        }
        _ => return limit_option(disk, name, value),
    }
    Ok(true)
}

fn limit_option(disk: &mut pb::Disk, name: &str, value: &str) -> Result<bool, String> {
    let Some((direction, figure)) = name.split_once('-') else {
        return Ok(false);
    };
    if !matches!(direction, "read" | "write")
        || !matches!(figure, "iops" | "bps" | "iops-burst" | "bps-burst")
    {
        return Ok(false);
    }
    let number = parse_size(value)?;
    let limits = disk.limits.get_or_insert_default();
    let rate = match direction {
        "read" => limits.read.get_or_insert_default(),
        _ => limits.write.get_or_insert_default(),
    };
    match figure {
        "iops" => rate.iops = number,
        "bps" => rate.bytes_per_second = number,
        "iops-burst" => rate.burst_ios = number,
        _ => rate.burst_bytes = number,
    }
    Ok(true)
}

/// `adaptive`, `never` or `always`.
pub(crate) fn parse_polling(text: &str) -> Result<pb::Polling, String> {
    match text {
        "adaptive" => Ok(pb::Polling::Adaptive),
        "never" => Ok(pb::Polling::Never),
        "always" => Ok(pb::Polling::Always),
        _ => Err(format!("polling={text}: give adaptive, never or always")),
    }
}

/// `0-3+6`: commas separate the disk's options.
fn parse_cpus(text: &str) -> Result<Vec<u32>, String> {
    let error = || format!("cpus={text}: give numbers and ranges joined by +, such as 0-3+6");
    let mut cpus = Vec::new();
    for part in text.split('+') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: u32 = first.parse().map_err(|_| error())?;
        let last: u32 = last.parse().map_err(|_| error())?;
        // The API refuses more, and says so; this keeps a typing error from filling the memory.
        if last < first || last - first > 1 << 16 {
            return Err(error());
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

/// `ADDRESS/EXPORT[@GENERATION]`
fn parse_nbd(text: &str) -> Result<pb::NbdSource, String> {
    let error = || {
        format!(
            "nbd={text}: give HOST:PORT/EXPORT or unix:PATH/EXPORT, and @GENERATION if the server wants one"
        )
    };
    let (text, generation) = match text.rsplit_once('@') {
        Some((text, number)) => (text, number.parse().map_err(|_| error())?),
        None => (text, 0),
    };
    // A socket's path has slashes itself; a host's address has none.
    let parts = match text.starts_with("unix:") {
        true => text.rsplit_once('/'),
        false => text.split_once('/'),
    };
    let (address, export) = parts.ok_or_else(error)?;
    Ok(pb::NbdSource {
        address: address.to_owned(),
        export: export.to_owned(),
        generation,
        ..Default::default()
    })
}

/// `--net`
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct NetArg(pb::Nic);

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut nic = pb::Nic::default();
        for (index, word) in text.split(',').filter(|word| !word.is_empty()).enumerate() {
            let is_first = index == 0;
            match word.split_once('=') {
                Some(("tap", name)) => nic.tap = name.to_owned(),
                Some(("host-cidr", cidr)) => nic.host_cidr = cidr.to_owned(),
                Some(("bridge", name)) => nic.bridge = name.to_owned(),
                None if word == "user" => {
                    nic.user.get_or_insert_default();
                }
                Some(("port-forward", text)) => {
                    nic.port_forwards.push(port_forward::parse(text)?);
                }
                Some(("host-loopback", address)) => {
                    nic.user.get_or_insert_default().host_loopback = address.to_owned();
                }
                None if word == "allow-spoofing" => nic.allow_spoofing = true,
                None if word == "track-flows" => nic.track_flows = true,
                None if is_first => nic.network = word.to_owned(),
                Some(("network", name)) => nic.network = name.to_owned(),
                Some(("ip", address)) if address.contains(':') => {
                    nic.ipv6_address = address.to_owned();
                }
                Some(("ip", address)) => nic.ipv4_address = address.to_owned(),
                Some(("sg", group)) => nic.security_groups.push(group.to_owned()),
                Some(("vlan", number)) => nic.vlan = parse_number("vlan", number)?,
                Some(("trunk", number)) => nic.trunk_vlans.push(parse_number("trunk", number)?),
                Some(("mac", mac)) => nic.mac = mac.to_owned(),
                Some(("queues", number)) => nic.queue_pairs = parse_number("queues", number)?,
                Some(("mtu", number)) => nic.mtu = parse_number("mtu", number)?,
                Some(("name", name)) => nic.name = name.to_owned(),
                _ => {
                    return Err(format!(
                        "{word:?} is no option of a NIC; there are NETWORK (first), ip=, sg=, vlan=, trunk=, allow-spoofing, track-flows, user, port-forward=, host-loopback=, tap=, host-cidr=, bridge=, mac=, queues=, mtu= and name="
                    ));
                }
            }
        }
        Ok(Self(nic))
    }
}

/// `--vhost-user`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct VhostUserArg(pb::VhostUserDevice);

impl FromStr for VhostUserArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut device = pb::VhostUserDevice::default();
        for word in text.split(',') {
            match word.split_once('=') {
                Some(("type", kind)) => device.r#type = kind.to_owned(),
                Some(("socket", path)) => device.socket = path.to_owned(),
                Some(("queues", number)) => device.num_queues = parse_number("queues", number)?,
                Some(("queue-size", number)) => {
                    device.queue_size = parse_number("queue-size", number)?;
                }
                Some(("config", bytes)) => device.config = parse_config(bytes)?,
                Some(("name", name)) => device.name = name.to_owned(),
                _ => {
                    return Err(format!(
                        "{word:?} is no option; there are type=, socket=, queues=, queue-size=, config= and name="
                    ));
                }
            }
        }
        if device.r#type.is_empty() || device.socket.is_empty() {
            return Err("type= and socket= are needed".to_owned());
        }
        Ok(Self(device))
    }
}

/// `--share`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShareArg(pb::VhostUserDevice);

/// Bytes of the tag in a file system's configuration space (Virtio 1.2 section 5.11.4).
const FS_TAG_BYTES: usize = 36;

impl FromStr for ShareArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((tag, socket)) = text.split_once('=').filter(|(_, path)| !path.is_empty()) else {
            return Err("give TAG=SOCKET, the socket that virtiofsd listens on".to_owned());
        };
        if !(1..=FS_TAG_BYTES).contains(&tag.len()) || tag.contains('\0') {
            return Err(format!(
                "a tag has 1 to {FS_TAG_BYTES} bytes, not {}",
                tag.len()
            ));
        }
        let mut config = tag.as_bytes().to_vec();
        config.resize(FS_TAG_BYTES, 0);
        config.extend(1u32.to_le_bytes()); // num_request_queues
        Ok(Self(pb::VhostUserDevice {
            r#type: "fs".to_owned(),
            socket: socket.to_owned(),
            num_queues: 2, // hiprio and one for requests
            config,
            ..Default::default()
        }))
    }
}

/// `hex:` and digits, or `str:` and text.
fn parse_config(text: &str) -> Result<Vec<u8>, String> {
    let bytes = match text.split_once(':') {
        Some(("hex", digits)) => bytes_of_hex(digits),
        Some(("str", text)) => Some(text.as_bytes().to_vec()),
        _ => None,
    };
    bytes.ok_or_else(|| {
        format!("config={text}: give hex: and an even number of digits, or str: and text")
    })
}

fn bytes_of_hex(digits: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    let nibble = |digit: u8| char::from(digit).to_digit(16);
    let byte = |pair: &[u8; 2]| Some((nibble(pair[0])? << 4 | nibble(pair[1])?) as u8);
    pairs
        .iter()
        .map(byte)
        .collect::<Option<_>>()
        .filter(|_| rest.is_empty())
}

fn parse_number(option: &str, text: &str) -> Result<u32, String> {
    text.parse()
        .map_err(|_| format!("{option}={text}: {text:?} is no number"))
}

/// Puts what was typed over `base`.
///
/// # Errors
/// When the current directory is not known, or a volume's name is wrong.
pub(crate) fn vm_spec(
    args: MachineArgs,
    mut spec: pb::VmSpec,
    project: &str,
) -> anyhow::Result<pb::VmSpec> {
    if let Some(kernel) = args.kernel {
        spec.kernel = absolute(&kernel)?;
    }
    if let Some(initramfs) = args.initramfs {
        spec.initramfs = absolute(&initramfs)?;
    }
    if let Some(cmdline) = args.cmdline {
        spec.cmdline = cmdline;
    }
    spec.vcpus = args.cpus.unwrap_or(spec.vcpus);
    spec.memory_bytes = args.memory.unwrap_or(spec.memory_bytes);
    if args.warm_spare {
        spec.warm_spare = true;
    }
    if let Some(restart) = args.restart {
        spec.set_restart_policy(match restart {
            RestartArg::Never => pb::RestartPolicy::Never,
            RestartArg::SameHost => pb::RestartPolicy::SameHost,
            RestartArg::Anywhere => pb::RestartPolicy::Anywhere,
        });
    }
    if let Some(order) = args.autostart {
        spec.autostart = true;
        spec.autostart_order = order;
    }
    if let Some(seconds) = args.shutdown_grace {
        spec.shutdown_grace_ms = seconds.saturating_mul(1000);
    }
    for disk in args.disks {
        spec.disks.push(api_disk(disk, project)?);
    }
    seed::add(&args.seed, &mut spec)?;
    placement::apply(&args.placement, &mut spec)?;
    for net in args.nets {
        spec.nics.push(api_nic(net.0, project)?);
    }
    let shares = args.shares.into_iter().map(|share| share.0);
    let others = args.vhost_user.into_iter().map(|device| device.0);
    for mut device in others.chain(shares) {
        device.socket = absolute(Path::new(&device.socket))?;
        spec.vhost_user.push(device);
    }
    Ok(spec)
}

/// Gives networks and security groups their full names.
fn api_nic(mut nic: pb::Nic, project: &str) -> anyhow::Result<pb::Nic> {
    if !nic.network.is_empty() {
        nic.network = network_name(&nic.network, project)?.to_string();
    }
    for group in &mut nic.security_groups {
        *group = security_group_name(group, project)?.to_string();
    }
    Ok(nic)
}

/// A network by its short or its full name.
///
/// # Errors
/// When it is neither.
pub(crate) fn network_name(text: &str, project: &str) -> anyhow::Result<Name> {
    let name = if text.contains('/') {
        Name::parse_network(text)
    } else {
        Name::parse_network(&Name::network(project, text).to_string())
    };
    Ok(name?)
}

/// A security group by its short or its full name.
///
/// # Errors
/// When it is neither.
pub(crate) fn security_group_name(text: &str, project: &str) -> anyhow::Result<Name> {
    let name = if text.contains('/') {
        Name::parse_security_group(text)
    } else {
        Name::parse_security_group(&Name::security_group(project, text).to_string())
    };
    Ok(name?)
}

/// A fault experiment by its short or its full name.
///
/// # Errors
/// When it is neither.
pub(crate) fn fault_experiment_name(text: &str, project: &str) -> anyhow::Result<Name> {
    let name = if text.contains('/') {
        Name::parse_fault_experiment(text)
    } else {
        Name::parse_fault_experiment(&Name::fault_experiment(project, text).to_string())
    };
    Ok(name?)
}

fn api_disk(disk: DiskArg, project: &str) -> anyhow::Result<pb::Disk> {
    let source = match disk.source {
        DiskSource::Image(path) => Some(pb::disk::Source::Path(absolute(&path)?)),
        DiskSource::Volume(name) => Some(pb::disk::Source::Volume(
            volume_name(&name, project)?.to_string(),
        )),
        DiskSource::Nbd => None,
    };
    let mut disk = pb::Disk {
        source,
        ..disk.options
    };
    if let Some(nbd) = disk.nbd.as_mut().filter(|nbd| !nbd.tls_file.is_empty()) {
        nbd.tls_file = absolute(Path::new(&nbd.tls_file))?;
    }
    Ok(disk)
}

/// A VM by its short or its full name.
///
/// # Errors
/// When it is neither.
pub(crate) fn vm_name(text: &str, project: &str) -> anyhow::Result<Name> {
    let full = if text.contains('/') {
        text.to_owned()
    } else {
        Name::vm(project, text).to_string()
    };
    Ok(Name::parse_vm(&full)?)
}

/// A volume by its short or its full name.
///
/// # Errors
/// When it is neither.
pub(crate) fn volume_name(text: &str, project: &str) -> anyhow::Result<Name> {
    let full = if text.contains('/') {
        text.to_owned()
    } else {
        Name::volume(project, text).to_string()
    };
    Ok(Name::parse_volume(&full)?)
}

/// What a path means here. The host may be another machine, so the file need not exist.
///
/// # Errors
/// When the current directory is gone, or the path is not UTF-8.
pub(crate) fn absolute(path: &Path) -> anyhow::Result<String> {
    let path = std::path::absolute(path)
        .with_context(|| format!("cannot tell what {} means here", path.display()))?;
    let text = path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4GiB"), Ok(4 << 30));
        assert_eq!(parse_size("4gb"), Ok(4 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        for bad in ["", "M", "1X", "-1M", "1.5G", "99999999T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn disks_are_images_or_volumes_with_options() {
        let disk: DiskArg = "/img.raw,readonly,queues=4,serial=s1".parse().unwrap();
        let disk = api_disk(disk, "default").unwrap();
        assert_eq!(disk.source, Some(pb::disk::Source::Path("/img.raw".into())));
        assert_eq!(
            (disk.read_only, disk.num_queues, disk.serial.as_str()),
            (true, 4, "s1")
        );
        let volume = api_disk("volume=data".parse().unwrap(), "p").unwrap();
        assert_eq!(
            volume.source,
            Some(pb::disk::Source::Volume("projects/p/volumes/data".into()))
        );
        for bad in ["", ",readonly", "/img,speed=9", "/img,queues=x"] {
            assert!(bad.parse::<DiskArg>().is_err(), "{bad}");
        }
    }

    #[test]
    fn disks_have_limits_formats_and_remote_sources() {
        let text = "a.qcow2,format=qcow2,block-size=4096,polling=never,cpus=0-1+3,read-iops=1000,\
                    write-bps=64M,write-bps-burst=1G,page-cache,slow-ms=20";
        let disk = api_disk(text.parse().unwrap(), "default").unwrap();
        assert_eq!((disk.format.as_str(), disk.block_size), ("qcow2", 4096));
        assert_eq!(disk.polling(), pb::Polling::Never);
        assert_eq!(disk.cpus, [0, 1, 3]);
        let limits = disk.limits.unwrap();
        assert_eq!(limits.read.unwrap().iops, 1000);
        let write = limits.write.unwrap();
        assert_eq!(
            (write.bytes_per_second, write.burst_bytes),
            (64 << 20, 1 << 30)
        );
        let nbd = "nbd=10.0.0.2:10809/pool/a@7,tls=/ca.pem,tls-hostname=store";
        let disk = api_disk(nbd.parse().unwrap(), "default").unwrap();
        let nbd = disk.nbd.unwrap();
        assert_eq!(
            (nbd.address.as_str(), nbd.export.as_str()),
            ("10.0.0.2:10809", "pool/a")
        );
        assert_eq!((nbd.generation, nbd.tls_file.as_str()), (7, "/ca.pem"));
        assert_eq!(disk.source, None);
        for bad in [
            "/a,cpus=3-1",
            "/a,tls=x",
            "/a,polling=maybe",
            "nbd=here",
            "/a,read-speed=1",
        ] {
            assert!(bad.parse::<DiskArg>().is_err(), "{bad}");
        }
    }

    #[test]
    fn relative_images_become_absolute() {
        let disk = api_disk("img.raw".parse().unwrap(), "default").unwrap();
        let Some(pb::disk::Source::Path(path)) = disk.source else {
            panic!()
        };
        assert_eq!(
            Path::new(&path),
            std::env::current_dir().unwrap().join("img.raw")
        );
    }

    #[test]
    fn nets_and_vhost_user_devices() {
        assert_eq!("".parse::<NetArg>().unwrap(), NetArg::default());
        let net: NetArg = "host-cidr=10.0.0.1/24,mtu=9000".parse().unwrap();
        assert_eq!((net.0.host_cidr.as_str(), net.0.mtu), ("10.0.0.1/24", 9000));
        assert!("speed=1".parse::<NetArg>().is_err());
        let net: NetArg = "front,ip=10.0.0.5,ip=fd00::5,sg=web,port-forward=tcp:8080:80"
            .parse()
            .unwrap();
        let nic = api_nic(net.0, "p").unwrap();
        assert_eq!(nic.network, "projects/p/networks/front");
        assert_eq!(
            (nic.ipv4_address.as_str(), nic.ipv6_address.as_str()),
            ("10.0.0.5", "fd00::5")
        );
        assert_eq!(nic.security_groups, ["projects/p/securityGroups/web"]);
        assert_eq!(nic.port_forwards[0].guest_port, 80);
        let net: NetArg = "lan,vlan=10,trunk=20,trunk=30".parse().unwrap();
        assert_eq!((net.0.vlan, &net.0.trunk_vlans[..]), (10, &[20, 30][..]));
        let fs: VhostUserArg = "type=fs,socket=/s,queues=1".parse().unwrap();
        assert_eq!((fs.0.r#type.as_str(), fs.0.num_queues), ("fs", 1));
        assert!("type=fs".parse::<VhostUserArg>().is_err());
    }

    #[test]
    fn configuration_space_is_hex_or_text() {
        let config = |text: &str| {
            let device = format!("type=fs,socket=/s,config={text}").parse::<VhostUserArg>();
            device.map(|device| device.0.config)
        };
        assert_eq!(config("hex:00fFa1"), Ok(vec![0x00, 0xff, 0xa1]));
        assert_eq!(config("str:a:b"), Ok(b"a:b".to_vec()));
        for bad in ["hex:abc", "hex:+1", "hex:\u{e9}", "abcd", ""] {
            assert!(config(bad).unwrap_err().contains("config="), "{bad}");
        }
    }

    #[test]
    fn share_has_its_tag_and_queues_in_its_configuration_space() {
        let share: ShareArg = "home=/run/fs.sock".parse().unwrap();
        assert_eq!((share.0.r#type.as_str(), share.0.num_queues), ("fs", 2));
        assert_eq!(share.0.socket, "/run/fs.sock");
        assert_eq!(share.0.config.len(), 40);
        assert_eq!(&share.0.config[..5], b"home\0");
        assert_eq!(&share.0.config[36..], 1u32.to_le_bytes());
        let long = format!("{}=/s", "t".repeat(37));
        for bad in ["home", "=/s", "home=", long.as_str()] {
            assert!(bad.parse::<ShareArg>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_short_or_full() {
        assert_eq!(vm_name("web", "p").unwrap(), Name::vm("p", "web"));
        assert_eq!(
            vm_name("projects/q/vms/web", "p").unwrap(),
            Name::vm("q", "web")
        );
        assert!(vm_name("Web", "p").is_err());
    }
}
