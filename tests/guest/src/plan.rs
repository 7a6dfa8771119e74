//! A test guest's work, as words on its kernel command line.
//!
//! `mortise.root=vda mortise.smp=4 mortise.addr=10.0.0.2/24 mortise.net=10.0.0.1:5000,SEED,BYTES
//! mortise.disk=vda,SEED,BYTES mortise.oracle=vda,SEED,BYTES,SECONDS mortise.file-system=vdb,BYTES mortise.folder=TAG,SEED
//! mortise.end=poweroff`; jobs run in the order of their words, and a job may occur several times.
//! A guest whose plan ends with `mortise.end=obey` takes further plans, one a line, from its console.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// A line that ends [`Job::Oracle`] early, on the guest's console.
pub const ENOUGH: &str = "enough";

/// All that a guest does after it came up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Device with an ext4 file system to continue from, as in `/dev`: vda.
    pub root: Option<String>,
    /// In order.
    pub jobs: Vec<Job>,
    /// What comes after the jobs.
    pub end: End,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Job {
    /// Run on each of `cpus` CPUs at once.
    Smp {
        /// How many have to be online.
        cpus: u32,
    },
    /// Have at least that much memory.
    Memory {
        /// Usable, as the kernel counts.
        mib: u64,
    },
    /// Give the first NIC an address, as `A.B.C.D/PREFIX`.
    Address(String),
    /// Let the first NIC be configured by DHCP.
    Dhcp,
    /// Wait until the first NIC has an IPv6 address that reaches further than its link.
    Ipv6,
    /// Ask the name server that DHCP named.
    Resolve {
        /// Asked for as it is.
        name: String,
    },
    /// Wait until the first NIC's cable is plugged in, or is out.
    Carrier {
        /// Plugged in.
        up: bool,
    },
    /// Ask for three echoes.
    Ping {
        /// Who is to answer.
        peer: IpAddr,
    },
    /// Try to connect by TCP, and say what became of it.
    Reach {
        /// Who is to answer.
        peer: SocketAddr,
    },
    /// From now on answer [`Job::Net`] and [`Job::Udp`] of others.
    Serve {
        /// Of both protocols.
        port: u16,
        /// Of the payload that is to arrive by TCP.
        seed: u64,
        /// Each way, by TCP; a multiple of the pattern's block.
        bytes: u64,
    },
    /// Have datagrams answered, and compare the answers.
    Udp {
        /// Where somebody answers.
        peer: SocketAddr,
        /// Of the datagrams; its complement is that of the answers.
        seed: u64,
        /// How many, one after the other.
        datagrams: u64,
    },
    /// Exchange a payload with somebody who listens, and compare hashes.
    Net {
        /// Where somebody listens.
        peer: SocketAddr,
        /// Of the payload to send; its complement is that of the payload to receive.
        seed: u64,
        /// Each way; a multiple of the pattern's block.
        bytes: u64,
    },
    /// Read the NoCloud seed.
    Seed,
    /// From now on answer [`Job::Iperf`] of others. Needs iperf3, which is on the root disk.
    IperfServer {
        /// Of both protocols.
        port: u16,
    },
    /// Have iperf3 send to another guest.
    Iperf {
        /// Who serves.
        peer: SocketAddr,
        /// What is sent.
        protocol: Protocol,
        /// How long.
        seconds: u32,
    },
    /// Write a pattern from the disk's start, flush, read back.
    Disk {
        /// As in `/dev`: vda.
        device: String,
        /// Of the pattern.
        seed: u64,
        /// A multiple of the pattern's block.
        bytes: u64,
    },
    /// Only read a pattern and compare.
    DiskRead {
        /// As in `/dev`: vda.
        device: String,
        /// Of the pattern.
        seed: u64,
        /// A multiple of the pattern's block.
        bytes: u64,
    },
    /// Write, read and flush blocks that describe themselves, and verify all that was acknowledged.
    Oracle {
        /// As in `/dev`: vda.
        device: String,
        /// Of the blocks.
        seed: u64,
        /// From the disk's start; a multiple of 4096.
        bytes: u64,
        /// How long.
        seconds: u64,
    },
    /// After a reboot: see that all of these blocks are whole.
    OracleCheck {
        /// As in `/dev`: vda.
        device: String,
        /// Of the blocks.
        seed: u64,
        /// From the disk's start; a multiple of 4096.
        bytes: u64,
    },
    /// See that a disk has what one guest after the other wrote, then write on for ever.
    Journal {
        /// As in `/dev`: vda.
        device: String,
        /// Of the blocks.
        seed: u64,
        /// From the disk's start; a multiple of 4096.
        bytes: u64,
    },
    /// Make an ext4 file system, write files with fio, trim, check it with e2fsck, read the files
    /// again. Needs these programs, which are on the tools' root disk.
    FileSystem {
        /// As in `/dev`: vdb.
        device: String,
        /// Of the files.
        bytes: u64,
    },
    /// Mount a shared folder, check its `from-host`, write `from-guest`.
    Folder {
        /// The file system's tag.
        tag: String,
        /// Of `from-host`; its complement is that of `from-guest`.
        seed: u64,
    },
}

/// Of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// A stream.
    Tcp,
    /// Datagrams.
    Udp,
}

/// How a guest ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum End {
    /// ACPI S5.
    #[default]
    PowerOff,
    /// Reset; the same plan runs again.
    Reboot,
    /// Wait for the power button, then power off.
    Wait,
    /// Take further plans from the console, one a line, until one ends otherwise.
    Obey,
    /// A shell on the console.
    Shell,
}

/// A word that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadWord(pub String);

impl fmt::Display for BadWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the guest does not understand \"{}\" on its kernel command line",
            self.0
        )
    }
}

impl std::error::Error for BadWord {}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(device) = &self.root {
            write!(f, "mortise.root={device} ")?;
        }
        for job in &self.jobs {
            match job {
                Job::Smp { cpus } => write!(f, "mortise.smp={cpus} ")?,
                Job::Memory { mib } => write!(f, "mortise.memory={mib} ")?,
                Job::Address(cidr) => write!(f, "mortise.addr={cidr} ")?,
                Job::Dhcp => write!(f, "mortise.dhcp=yes ")?,
                Job::Ipv6 => write!(f, "mortise.ipv6=yes ")?,
                Job::Resolve { name } => write!(f, "mortise.resolve={name} ")?,
                Job::Carrier { up: true } => write!(f, "mortise.carrier=up ")?,
                Job::Carrier { up: false } => write!(f, "mortise.carrier=down ")?,
                Job::Ping { peer } => write!(f, "mortise.ping={peer} ")?,
                Job::Reach { peer } => write!(f, "mortise.reach={peer} ")?,
                Job::Serve { port, seed, bytes } => {
                    write!(f, "mortise.serve={port},{seed},{bytes} ")?;
                }
                Job::Udp {
                    peer,
                    seed,
                    datagrams,
                } => write!(f, "mortise.udp={peer},{seed},{datagrams} ")?,
                Job::Net { peer, seed, bytes } => write!(f, "mortise.net={peer},{seed},{bytes} ")?,
                Job::Seed => write!(f, "mortise.seed=yes ")?,
                Job::IperfServer { port } => write!(f, "mortise.iperf-server={port} ")?,
                Job::Iperf {
                    peer,
                    protocol,
                    seconds,
                } => {
                    let protocol = match protocol {
                        Protocol::Tcp => "tcp",
                        Protocol::Udp => "udp",
                    };
                    write!(f, "mortise.iperf={peer},{protocol},{seconds} ")?;
                }
                Job::Disk {
                    device,
                    seed,
                    bytes,
                } => {
                    write!(f, "mortise.disk={device},{seed},{bytes} ")?;
                }
                Job::DiskRead {
                    device,
                    seed,
                    bytes,
                } => {
                    write!(f, "mortise.disk-read={device},{seed},{bytes} ")?;
                }
                Job::Oracle {
                    device,
                    seed,
                    bytes,
                    seconds,
                } => write!(f, "mortise.oracle={device},{seed},{bytes},{seconds} ")?,
                Job::OracleCheck {
                    device,
                    seed,
                    bytes,
                } => write!(f, "mortise.oracle-check={device},{seed},{bytes} ")?,
                Job::Journal {
                    device,
                    seed,
                    bytes,
                } => write!(f, "mortise.journal={device},{seed},{bytes} ")?,
                Job::FileSystem { device, bytes } => {
                    write!(f, "mortise.file-system={device},{bytes} ")?;
                }
                Job::Folder { tag, seed } => write!(f, "mortise.folder={tag},{seed} ")?,
            }
        }
        let end = match self.end {
            End::PowerOff => "poweroff",
            End::Reboot => "reboot",
            End::Wait => "wait",
            End::Obey => "obey",
            End::Shell => "shell",
        };
        write!(f, "mortise.end={end}")
    }
}

impl FromStr for Plan {
    type Err = BadWord;

    /// Reads a kernel command line; words that don't start with `mortise.` are the kernel's.
    fn from_str(cmdline: &str) -> Result<Self, BadWord> {
        let mut plan = Self::default();
        for word in cmdline.split_whitespace() {
            let Some(ours) = word.strip_prefix("mortise.") else {
                continue;
            };
            plan.word(ours).ok_or_else(|| BadWord(word.to_owned()))?;
        }
        Ok(plan)
    }
}

impl Plan {
    fn word(&mut self, word: &str) -> Option<()> {
        let (key, value) = word.split_once('=')?;
        let fields: Vec<&str> = value.split(',').collect();
        let job = match (key, fields.as_slice()) {
            ("smp", [cpus]) => Job::Smp {
                cpus: cpus.parse().ok()?,
            },
            ("memory", [mib]) => Job::Memory {
                mib: mib.parse().ok()?,
            },
            ("addr", [cidr]) => Job::Address((*cidr).to_owned()),
            ("dhcp", ["yes"]) => Job::Dhcp,
            ("ipv6", ["yes"]) => Job::Ipv6,
            ("resolve", [name]) => Job::Resolve {
                name: (*name).to_owned(),
            },
            ("carrier", ["up"]) => Job::Carrier { up: true },
            ("carrier", ["down"]) => Job::Carrier { up: false },
            ("ping", [peer]) => Job::Ping {
                peer: peer.parse().ok()?,
            },
            ("reach", [peer]) => Job::Reach {
                peer: peer.parse().ok()?,
            },
            ("serve", [port, seed, bytes]) => Job::Serve {
                port: port.parse().ok()?,
                seed: seed.parse().ok()?,
                bytes: bytes.parse().ok()?,
            },
            ("udp", [peer, seed, datagrams]) => Job::Udp {
                peer: peer.parse().ok()?,
                seed: seed.parse().ok()?,
                datagrams: datagrams.parse().ok()?,
            },
            ("net", [peer, seed, bytes]) => Job::Net {
                peer: peer.parse().ok()?,
                seed: seed.parse().ok()?,
                bytes: bytes.parse().ok()?,
            },
            ("seed", ["yes"]) => Job::Seed,
            ("iperf-server", [port]) => Job::IperfServer {
                port: port.parse().ok()?,
            },
            ("iperf", [peer, protocol, seconds]) => Job::Iperf {
                peer: peer.parse().ok()?,
                protocol: match *protocol {
                    "tcp" => Protocol::Tcp,
                    "udp" => Protocol::Udp,
                    _ => return None,
                },
                seconds: seconds.parse().ok()?,
            },
            ("disk", [device, seed, bytes]) => Job::Disk {
                device: (*device).to_owned(),
                seed: seed.parse().ok()?,
                bytes: bytes.parse().ok()?,
            },
            ("disk-read", [device, seed, bytes]) => Job::DiskRead {
                device: (*device).to_owned(),
                seed: seed.parse().ok()?,
                bytes: bytes.parse().ok()?,
            },
            ("oracle", [device, seed, bytes, seconds]) => Job::Oracle {
                device: (*device).to_owned(),
                seed: seed.parse().ok()?,
                bytes: bytes.parse().ok()?,
                seconds: seconds.parse().ok()?,
            },
            ("oracle-check", [device, seed, bytes]) => Job::OracleCheck {
                device: (*device).to_owned(),
                seed: seed.parse().ok()?,
                bytes: bytes.parse().ok()?,
            },
            ("journal", [device, seed, bytes]) => Job::Journal {
                device: (*device).to_owned(),
                seed: seed.parse().ok()?,
                bytes: bytes.parse().ok()?,
            },
            ("file-system", [device, bytes]) => Job::FileSystem {
                device: (*device).to_owned(),
                bytes: bytes.parse().ok()?,
            },
            ("folder", [tag, seed]) => Job::Folder {
                tag: (*tag).to_owned(),
                seed: seed.parse().ok()?,
            },
            ("root", [device]) => {
                self.root = Some((*device).to_owned());
                return Some(());
            }
            ("end", [end]) => {
                self.end = match *end {
                    "poweroff" => End::PowerOff,
                    "reboot" => End::Reboot,
                    "wait" => End::Wait,
                    "obey" => End::Obey,
                    "shell" => End::Shell,
                    _ => return None,
                };
                return Some(());
            }
            _ => return None,
        };
        self.jobs.push(job);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_survives_the_command_line() {
        let plan = Plan {
            root: Some("vda".into()),
            jobs: vec![
                Job::Smp { cpus: 4 },
                Job::Memory { mib: 4096 },
                Job::Address("10.0.0.2/24".into()),
                Job::Dhcp,
                Job::Ipv6,
                Job::Resolve {
                    name: "db.lan.internal".into(),
                },
                Job::Carrier { up: true },
                Job::Carrier { up: false },
                Job::Ping {
                    peer: "fd00::1".parse().unwrap(),
                },
                Job::Reach {
                    peer: "10.0.0.1:22".parse().unwrap(),
                },
                Job::Serve {
                    port: 5000,
                    seed: 9,
                    bytes: 4096,
                },
                Job::Udp {
                    peer: "[fd00::1]:5000".parse().unwrap(),
                    seed: 9,
                    datagrams: 100,
                },
                Job::Net {
                    peer: "10.0.0.1:5000".parse().unwrap(),
                    seed: u64::MAX,
                    bytes: 8192,
                },
                Job::Seed,
                Job::IperfServer { port: 5201 },
                Job::Iperf {
                    peer: "10.0.0.1:5201".parse().unwrap(),
                    protocol: Protocol::Udp,
                    seconds: 3,
                },
                Job::Disk {
                    device: "vda".into(),
                    seed: 1,
                    bytes: 4096,
                },
                Job::DiskRead {
                    device: "vdb".into(),
                    seed: 1,
                    bytes: 4096,
                },
                Job::Oracle {
                    device: "vda".into(),
                    seed: 4,
                    bytes: 1 << 20,
                    seconds: 10,
                },
                Job::OracleCheck {
                    device: "vda".into(),
                    seed: 4,
                    bytes: 1 << 20,
                },
                Job::Journal {
                    device: "vda".into(),
                    seed: 5,
                    bytes: 1 << 20,
                },
                Job::FileSystem {
                    device: "vdc".into(),
                    bytes: 1 << 20,
                },
                Job::Folder {
                    tag: "share".into(),
                    seed: 3,
                },
            ],
            end: End::Wait,
        };
        let cmdline = format!("console=ttyS0 quiet {plan} ro");
        assert_eq!(cmdline.parse(), Ok(plan));
    }

    #[test]
    fn an_unknown_word_is_named() {
        let result: Result<Plan, _> = "quiet mortise.dance=1".parse();
        assert_eq!(result, Err(BadWord("mortise.dance=1".into())));
        assert!("mortise.disk=vda,x,1".parse::<Plan>().is_err());
    }
}
