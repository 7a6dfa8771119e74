//! Certificates of the control plane: who is named in them, who makes them, and what each end of a
//! connection shows and believes.
//!
//! ```text
//! name         whom a certificate is about: a controller, a host, a user, as a SAN URI
//! authority    an authority of our own: makes certificates from requests
//! request      a fresh key, and the request for its certificate
//! material     a certificate with its key, and authorities that are believed; from files or held in memory
//! credentials  rustls's configurations for both ends, made of the material as it is at that moment
//! verify       what is checked of the other end
//! ```
//!
//! Names are URIs `mortise://controllers/NAME`, `mortise://hosts/ID` and `mortise://users/NAME?roles=...`: a host can
//! never pass for a controller, wherever it is and whatever its address is called.

mod authority;
mod credentials;
mod material;
mod name;
mod request;
mod verify;

pub use authority::{Authority, IssueError};
pub use credentials::{Clients, Credentials, Held, Look};
pub use material::{Files, Identity, Material, MaterialError, begins, fingerprint, pem};
pub use name::Name;
pub use request::Request;
pub use verify::Expect;

/// rustls's algorithms: ring's, whatever else is linked.
fn provider() -> std::sync::Arc<rustls::crypto::CryptoProvider> {
    std::sync::Arc::new(rustls::crypto::ring::default_provider())
}

#[cfg(test)]
mod tests;
