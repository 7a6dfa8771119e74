//! A name server's answers (RFC 1035, RFC 3596).

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use guest::report::Report;

const SERVER_FILE: &str = "/tmp/name-server";
const PORT: u16 = 53;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
const RECURSION_DESIRED: u16 = 1 << 8;
const RESPONSE: u16 = 1 << 15;
const ERROR_MASK: u16 = 0xf;
const TRIES: u32 = 5;

/// Remembers whom to ask; empty for nobody.
pub(crate) fn use_server(address: &str) -> Result<(), String> {
    fs::write(SERVER_FILE, address).map_err(|error| format!("{SERVER_FILE}: {error}"))
}

/// All addresses of a name, of both families.
pub(crate) fn resolve(name: &str) -> Report {
    let found = ask(name, TYPE_A).and_then(|mut addresses| {
        addresses.extend(ask(name, TYPE_AAAA)?);
        Ok(addresses)
    });
    let (addresses, error) = match found {
        Ok(addresses) if addresses.is_empty() => (addresses, Some("it has no address".into())),
        Ok(addresses) => (addresses, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    Report::Resolve {
        name: name.to_owned(),
        addresses: addresses.iter().map(IpAddr::to_string).collect(),
        error,
    }
}

fn ask(name: &str, kind: u16) -> Result<Vec<IpAddr>, String> {
    let text = fs::read_to_string(SERVER_FILE).unwrap_or_default();
    let server: IpAddr = text
        .trim()
        .parse()
        .map_err(|_| "DHCP named no name server".to_owned())?;
    let any: SocketAddr = match server {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let at = |error: std::io::Error| format!("asking {server}: {error}");
    let socket = UdpSocket::bind(any).map_err(at)?;
    socket.connect((server, PORT)).map_err(at)?;
    let patience = Duration::from_secs(2);
    socket.set_read_timeout(Some(patience)).map_err(at)?;
    let id = kind;
    let mut problem = None;
    for _ in 0..TRIES {
        let mut buffer = [0; 1500];
        let said = socket
            .send(&question(id, name, kind))
            .and_then(|_| socket.recv(&mut buffer));
        match said {
            Ok(len) => {
                return answers(&buffer[..len], id, kind)
                    .ok_or_else(|| format!("{server} says something that is no answer"))?;
            }
            Err(error) => problem = Some(at(error)),
        }
    }
    Err(problem.unwrap_or_default())
}

fn question(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut message = Vec::new();
    for word in [id, RECURSION_DESIRED, 1, 0, 0, 0] {
        message.extend(word.to_be_bytes());
    }
    for label in name.split('.').filter(|label| !label.is_empty()) {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(kind.to_be_bytes());
    message.extend(CLASS_IN.to_be_bytes());
    message
}

/// `None` for what is no answer to this question.
fn answers(message: &[u8], id: u16, kind: u16) -> Option<Result<Vec<IpAddr>, String>> {
    let flags = word(message, 2)?;
    if word(message, 0)? != id || flags & RESPONSE == 0 {
        return None;
    }
    if flags & ERROR_MASK != 0 {
        return Some(Err(format!("the name server says {}", flags & ERROR_MASK)));
    }
    let mut at = 12;
    for _ in 0..word(message, 4)? {
        at = after_name(message, at)? + 4;
    }
    let mut found = Vec::new();
    for _ in 0..word(message, 6)? {
        at = after_name(message, at)?;
        let len = usize::from(word(message, at + 8)?);
        let data = message.get(at + 10..at + 10 + len)?;
        if word(message, at)? == kind {
            found.push(match kind {
                TYPE_A => IpAddr::from(<[u8; 4]>::try_from(data).ok()?),
                _ => IpAddr::from(<[u8; 16]>::try_from(data).ok()?),
            });
        }
        at += 10 + len;
    }
    Some(Ok(found))
}

fn word(message: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(
        message.get(at..at + 2)?.try_into().ok()?,
    ))
}

/// Where a name ends that begins at `at`; a pointer is its end.
fn after_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            0xc0.. => return Some(at + 2),
            len => at += 1 + usize::from(len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_behind_a_pointer_is_read() {
        let mut message = question(7, "db.lan.internal", TYPE_A);
        message[2] |= 0x80;
        message[7] = 1;
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 10, 1, 2, 3]);
        assert_eq!(
            answers(&message, 7, TYPE_A),
            Some(Ok(vec![IpAddr::from([10, 1, 2, 3])]))
        );
        assert_eq!(answers(&message[..message.len() - 1], 7, TYPE_A), None);
        assert_eq!(answers(&message, 8, TYPE_A), None);
        message[3] |= 3;
        assert!(answers(&message, 7, TYPE_A).unwrap().is_err());
    }
}
