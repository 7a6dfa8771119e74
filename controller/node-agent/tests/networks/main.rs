//! Networks made by a real agent, and what they let pass: hosts, guests and servers elsewhere are
//! network namespaces. Needs root, nft, dnsmasq and ip, and BUSYBOX for its DHCP client.

mod agent;
mod isolation;
mod namespace;
mod nat;
mod overlay;
mod refusals;
