//! From text to an [`Expression`].

use std::str::FromStr;

use super::{Expression, Node, Side, Term, ethertype_of};
use crate::address::{Cidr, Mac};
use crate::packet::{ICMP, ICMPV6, IGMP, SCTP, TCP, UDP};
use crate::policy::Family;

/// Far more than a person writes.
const MAX_TEXT_LEN_BYTES: usize = 4096;
const MAX_NODES: usize = 512;
/// Parentheses and negations within one another.
const MAX_DEPTH: usize = 64;

/// Why a filter cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// At a word.
    #[error("{message}, at {word:?} (character {position}) of the filter")]
    At {
        /// What is wrong.
        message: String,
        /// Where it is.
        word: String,
        /// Of the word's first character, from 1.
        position: usize,
    },
    /// Something is missing.
    #[error("{0}, at the end of the filter")]
    End(String),
    /// As a whole.
    #[error(
        "the filter is too long; at most {MAX_TEXT_LEN_BYTES} characters and {MAX_NODES} terms"
    )]
    TooLong,
}

impl FromStr for Expression {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text.len() > MAX_TEXT_LEN_BYTES {
            return Err(ParseError::TooLong);
        }
        let mut parser = Parser {
            words: split(text),
            next: 0,
            nodes: Vec::new(),
            last: None,
        };
        if !parser.words.is_empty() {
            parser.expression(0)?;
            if parser.peek().is_some() {
                return Err(parser.wrong("\"and\" or \"or\" is wanted"));
            }
        }
        Ok(Self {
            nodes: parser.nodes,
        })
    }
}

/// A word and the position of its first character, from 1.
#[derive(Clone, Copy, Debug)]
struct Word<'a> {
    text: &'a str,
    position: usize,
}

fn split(text: &str) -> Vec<Word<'_>> {
    let mut words = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start();
        let Some(first) = rest.chars().next() else {
            return words;
        };
        let ends_word = |c: char| c.is_whitespace() || "()!&|".contains(c);
        let len_bytes = match first {
            '(' | ')' | '!' => 1,
            '&' | '|' => rest.len() - rest.trim_start_matches(first).len(),
            _ => rest.find(ends_word).unwrap_or(rest.len()),
        };
        let (word, behind) = rest.split_at(len_bytes);
        words.push(Word {
            text: word,
            position: text[..text.len() - rest.len()].chars().count() + 1,
        });
        rest = behind;
    }
}

/// The words before a value.
#[derive(Clone, Copy, Debug)]
struct Qualifiers<'a> {
    protocol: Option<&'a str>,
    side: Side,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Host,
    Net,
    Port,
    PortRange,
    Protocol,
}

struct Parser<'a> {
    words: Vec<Word<'a>>,
    next: usize,
    nodes: Vec<Node>,
    last: Option<Qualifiers<'a>>,
}

impl<'a> Parser<'a> {
    fn expression(&mut self, depth: usize) -> Result<usize, ParseError> {
        let mut left = self.unary(depth)?;
        loop {
            let node: fn(usize, usize) -> Node = match self.peek() {
                Some("and" | "&&") => Node::And,
                Some("or" | "||") => Node::Or,
                _ => return Ok(left),
            };
            self.next += 1;
            let right = self.unary(depth)?;
            left = self.push(node(left, right))?;
        }
    }

    fn unary(&mut self, depth: usize) -> Result<usize, ParseError> {
        if depth > MAX_DEPTH {
            return Err(self.wrong("too many parentheses and negations within one another"));
        }
        match self.peek() {
            Some("not" | "!") => {
                self.next += 1;
                let inner = self.unary(depth + 1)?;
                self.push(Node::Not(inner))
            }
            Some("(") => {
                self.next += 1;
                let inner = self.expression(depth + 1)?;
                self.expect(")", "a parenthesis is not closed")?;
                Ok(inner)
            }
            _ => {
                let term = self.term()?;
                self.push(Node::Term(term))
            }
        }
    }

    fn term(&mut self) -> Result<Term, ParseError> {
        match self.peek() {
            Some("vlan") => {
                self.next += 1;
                let Some(id) = self.peek().filter(|word| starts_with_digit(word)) else {
                    return Ok(Term::Vlan(None));
                };
                let id = id.parse().ok().filter(|&id: &u16| id < 4096);
                let id = id.ok_or_else(|| self.wrong("a VLAN has a number from 0 to 4095"))?;
                self.next += 1;
                Ok(Term::Vlan(Some(id)))
            }
            Some("less") => self.length().map(Term::AtMost),
            Some("greater") => self.length().map(Term::AtLeast),
            Some(word) => match alone(word) {
                // Words that may also begin a longer term, unless nothing fitting follows.
                Some(term) if !self.goes_on_after_protocol() => {
                    self.next += 1;
                    Ok(term)
                }
                _ => self.qualified(),
            },
            None => Err(self.wrong("a term is missing")),
        }
    }

    fn length(&mut self) -> Result<usize, ParseError> {
        self.next += 1;
        let number = self.peek().and_then(|word| word.parse().ok());
        let number = number.ok_or_else(|| self.wrong("a number of bytes is wanted"))?;
        self.next += 1;
        Ok(number)
    }

    fn goes_on_after_protocol(&self) -> bool {
        let is_protocol = self.peek().is_some_and(is_protocol_qualifier);
        let following = self.words.get(self.next + 1).map(|word| word.text);
        is_protocol
            && matches!(
                following,
                Some(
                    "src"
                        | "dst"
                        | "host"
                        | "net"
                        | "port"
                        | "portrange"
                        | "proto"
                        | "broadcast"
                        | "multicast"
                )
            )
    }

    /// `[protocol] [side] [kind] value`
    fn qualified(&mut self) -> Result<Term, ParseError> {
        let start = self.next;
        let protocol = self.peek().filter(|word| is_protocol_qualifier(word));
        self.next += usize::from(protocol.is_some());
        if let Some(cast @ ("broadcast" | "multicast")) = self.peek() {
            let term = match (protocol, cast) {
                (None | Some("ether"), "broadcast") => Term::EtherBroadcast,
                (None | Some("ether"), _) => Term::EtherMulticast,
                (Some("ip"), "multicast") => Term::IpMulticast(Family::Ipv4),
                (Some("ip6"), "multicast") => Term::IpMulticast(Family::Ipv6),
                _ => return Err(self.wrong("this goes with ether; multicast also with ip and ip6")),
            };
            self.next += 1;
            return Ok(term);
        }
        let side = self.side();
        let kind = self.kind();
        let has_words = self.next > start;
        let Some(value) = self.peek().filter(|word| is_value(word)) else {
            return Err(self.wrong(if has_words {
                "a value is missing"
            } else {
                "unknown word; known are host, net, port, portrange, src, dst, ether, ip, ip6, arp, \
                 rarp, tcp, udp, sctp, icmp, icmp6, igmp, esp, ah, gre, proto, vlan, less, greater, \
                 broadcast, multicast, and, or, not"
            }));
        };
        let default_kind = if value.contains('/') {
            Kind::Net
        } else {
            Kind::Host
        };
        let qualifiers = match self.last {
            Some(last) if !has_words => last,
            _ => Qualifiers {
                protocol,
                side: side.unwrap_or(Side::Either),
                kind: kind.unwrap_or(default_kind),
            },
        };
        let term = self.value(qualifiers, value)?;
        self.next += 1;
        self.last = Some(qualifiers);
        Ok(term)
    }

    fn side(&mut self) -> Option<Side> {
        let words = self.words[self.next..].iter().map(|word| word.text);
        let words: Vec<_> = words.take(3).collect();
        let (side, count) = match words[..] {
            ["src", "or" | "||", "dst"] | ["dst", "or" | "||", "src"] => (Side::Either, 3),
            ["src", "and" | "&&", "dst"] | ["dst", "and" | "&&", "src"] => (Side::Both, 3),
            ["src", ..] => (Side::Source, 1),
            ["dst", ..] => (Side::Destination, 1),
            _ => return None,
        };
        self.next += count;
        Some(side)
    }

    fn kind(&mut self) -> Option<Kind> {
        let kind = match self.peek()? {
            "host" => Kind::Host,
            "net" => Kind::Net,
            "port" => Kind::Port,
            "portrange" => Kind::PortRange,
            "proto" => Kind::Protocol,
            _ => return None,
        };
        self.next += 1;
        Some(kind)
    }

    fn value(&self, qualifiers: Qualifiers<'_>, value: &str) -> Result<Term, ParseError> {
        let Qualifiers {
            protocol,
            side,
            kind,
        } = qualifiers;
        match (kind, protocol) {
            (Kind::Host, Some("ether")) => match value.parse::<Mac>() {
                Ok(mac) => Ok(Term::EtherHost(side, mac)),
                Err(error) => Err(self.wrong(&error.to_string())),
            },
            (Kind::Host | Kind::Net, None | Some("ip" | "ip6" | "arp" | "rarp")) => {
                let cidr: Cidr = value
                    .parse()
                    .map_err(|error| self.wrong(&format!("{error}")))?;
                if kind == Kind::Host && value.contains('/') {
                    return Err(self.wrong("a prefix goes with net"));
                }
                Ok(Term::Net(side, cidr, protocol.and_then(ethertype_of)))
            }
            (Kind::Port | Kind::PortRange, None | Some("tcp" | "udp" | "sctp")) => {
                let (first, last) = match value.split_once('-') {
                    Some(ends) if kind == Kind::PortRange => ends,
                    _ => (value, value),
                };
                match (first.parse(), last.parse()) {
                    (Ok(first), Ok(last)) if first <= last => {
                        let number = protocol.and_then(ip_protocol);
                        Ok(Term::Ports(side, first, last, number))
                    }
                    _ if kind == Kind::PortRange => {
                        Err(self.wrong("a range of ports looks like 8000-8080"))
                    }
                    _ => Err(self.wrong("a port is a number from 0 to 65535")),
                }
            }
            (Kind::Protocol, Some("ether")) => number(value)
                .or_else(|| ethertype_of(value.trim_start_matches('\\')))
                .map(Term::Ethertype)
                .ok_or_else(|| {
                    self.wrong("an ethertype is a number like 0x88cc, ip, ip6, arp or rarp")
                }),
            (Kind::Protocol, None | Some("ip" | "ip6")) => {
                let family = match protocol {
                    Some("ip") => Some(Family::Ipv4),
                    Some(_) => Some(Family::Ipv6),
                    None => None,
                };
                number(value)
                    .and_then(|number| u8::try_from(number).ok())
                    .or_else(|| ip_protocol(value.trim_start_matches('\\')))
                    .map(|number| Term::Protocol(family, number))
                    .ok_or_else(|| {
                        self.wrong("a protocol is a number from 0 to 255, or a name like tcp")
                    })
            }
            (_, Some(protocol)) => {
                let kind = match kind {
                    Kind::Host => "host",
                    Kind::Net => "net",
                    Kind::Port => "port",
                    Kind::PortRange => "portrange",
                    Kind::Protocol => "proto",
                };
                Err(self.wrong(&format!("{protocol} does not go with {kind}")))
            }
        }
    }

    fn push(&mut self, node: Node) -> Result<usize, ParseError> {
        if self.nodes.len() == MAX_NODES {
            return Err(ParseError::TooLong);
        }
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    fn peek(&self) -> Option<&'a str> {
        self.words.get(self.next).map(|word| word.text)
    }

    fn expect(&mut self, wanted: &str, message: &str) -> Result<(), ParseError> {
        if self.peek() != Some(wanted) {
            return Err(self.wrong(message));
        }
        self.next += 1;
        Ok(())
    }

    /// An error at the next word.
    fn wrong(&self, message: &str) -> ParseError {
        let message = message.to_owned();
        match self.words.get(self.next) {
            Some(word) => ParseError::At {
                message,
                word: word.text.to_owned(),
                position: word.position,
            },
            None => ParseError::End(message),
        }
    }
}

/// Terms of a single word.
fn alone(word: &str) -> Option<Term> {
    if let Some(ethertype) = ethertype_of(word) {
        return Some(Term::Ethertype(ethertype));
    }
    let family = match word {
        "icmp" => Some(Family::Ipv4),
        "igmp" => Some(Family::Ipv4),
        "icmp6" => Some(Family::Ipv6),
        _ => None,
    };
    ip_protocol(word).map(|number| Term::Protocol(family, number))
}

fn ip_protocol(word: &str) -> Option<u8> {
    Some(match word {
        "icmp" => ICMP,
        "igmp" => IGMP,
        "tcp" => TCP,
        "udp" => UDP,
        "gre" => 47,
        "esp" => 50,
        "ah" => 51,
        "icmp6" => ICMPV6,
        "sctp" => SCTP,
        _ => return None,
    })
}

fn is_protocol_qualifier(word: &str) -> bool {
    matches!(
        word,
        "ether" | "ip" | "ip6" | "arp" | "rarp" | "tcp" | "udp" | "sctp"
    )
}

fn is_value(word: &str) -> bool {
    !matches!(word, "(" | ")" | "and" | "or" | "not" | "!")
        && !word.starts_with(['&', '|'])
        && (starts_with_digit(word)
            || word.contains([':', '.', '\\'])
            || ip_protocol(word).is_some()
            || ethertype_of(word).is_some())
}

fn starts_with_digit(word: &str) -> bool {
    word.starts_with(|first: char| first.is_ascii_digit())
}

fn number(text: &str) -> Option<u16> {
    match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
