//! Networks made by a real agent, and what they let pass: hosts, guests and servers elsewhere are
//! network namespaces. Needs root, nft, dnsmasq and ip, and BUSYBOX for its DHCP client.

mod agent;
mod cable;
#[path = "../processes/guest.rs"]
#[allow(dead_code)]
mod guest;
mod isolation;
mod namespace;
mod nat;
mod overlay;
mod policy;
mod refusals;
mod switched;
