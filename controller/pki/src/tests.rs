//! Both ends of a handshake, in memory.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConnection, ServerConnection};

use super::*;

const LIFETIME: Duration = Duration::from_secs(3600);

fn identity(authority: &Authority, name: &Name, lifetime: Duration) -> Identity {
    let request = Request::new().unwrap();
    let chain = authority
        .issue(&request.der, name, &[], lifetime, None)
        .unwrap();
    Identity::from_pem(pem(&chain).as_bytes(), request.key_pem.as_bytes()).unwrap()
}

fn held(authority: &Authority, identity: Option<Identity>) -> Credentials {
    let held = Held::default();
    held.replace(Material {
        identity,
        authorities: vec![authority.certificate().clone()],
    });
    held.credentials()
}

fn controller() -> Name {
    Name::Controller("c".into())
}

fn host(id: &str) -> Name {
    Name::Host(id.into())
}

/// The whole handshake; what either end says against it.
fn shake(
    server: (&Credentials, Clients),
    client: (&Credentials, Expect),
) -> Result<(), rustls::Error> {
    let server = server.0.server(server.1).unwrap();
    let client = client.0.client(client.1).unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    let mut client = ClientConnection::new(client, name).unwrap();
    for _ in 0..4 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        server.read_tls(&mut wire.as_slice()).unwrap();
        server.process_new_packets()?;
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        client.read_tls(&mut wire.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    assert!(!server.is_handshaking() && !client.is_handshaking());
    Ok(())
}

fn host_of(id: &str) -> Expect {
    Expect::Host(id.into(), SystemTime::UNIX_EPOCH)
}

#[test]
fn hosts_and_controllers_of_one_authority_trust_each_other() {
    let authority = Authority::new().unwrap();
    let agent = held(&authority, Some(identity(&authority, &host("h"), LIFETIME)));
    let leader = held(
        &authority,
        Some(identity(&authority, &controller(), LIFETIME)),
    );
    shake((&agent, Clients::Controllers), (&leader, host_of("h"))).unwrap();
    let seen = Arc::new(OnceLock::new());
    let any = Expect::AnyHost(seen.clone());
    shake((&agent, Clients::Controllers), (&leader, any)).unwrap();
    assert_eq!(seen.get().unwrap(), "h");
    // And the other way round, as when a host renews.
    shake((&leader, Clients::Anybody), (&agent, Expect::Controller)).unwrap();
    let nobody = held(&authority, None);
    shake((&leader, Clients::Anybody), (&nobody, Expect::Controller)).unwrap();
}

#[test]
fn who_is_somebody_else_is_refused() {
    let authority = Authority::new().unwrap();
    let [h, g] = ["h", "g"].map(|id| {
        let identity = identity(&authority, &host(id), LIFETIME);
        held(&authority, Some(identity))
    });
    let leader = identity(&authority, &controller(), LIFETIME);
    let leader = held(&authority, Some(leader));
    let text = |error: rustls::Error| match error {
        rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => {
            other.to_string()
        }
        other => other.to_string(),
    };
    let foreign = shake((&g, Clients::Controllers), (&leader, host_of("h")));
    let foreign = text(foreign.unwrap_err());
    assert!(
        foreign.contains("mortise://hosts/g, not that of hosts/h"),
        "{foreign}"
    );
    let posing = shake((&h, Clients::Anybody), (&g, Expect::Controller));
    let posing = text(posing.unwrap_err());
    assert!(posing.contains("no controller"), "{posing}");
    let intruder = shake((&h, Clients::Controllers), (&g, host_of("h")));
    let intruder = text(intruder.unwrap_err());
    assert!(
        intruder.contains("hosts/g, which is no controller"),
        "{intruder}"
    );
    let nobody = held(&authority, None);
    let nobody = shake((&h, Clients::Controllers), (&nobody, host_of("h")));
    assert!(
        matches!(nobody, Err(rustls::Error::NoCertificatesPresented)),
        "{nobody:?}"
    );
    let later = SystemTime::now() + Duration::from_secs(1);
    let withdrawn = shake(
        (&h, Clients::Controllers),
        (&leader, Expect::Host("h".into(), later)),
    );
    let withdrawn = text(withdrawn.unwrap_err());
    assert!(withdrawn.contains("withdrawn"), "{withdrawn}");
}

#[test]
fn other_authorities_and_expired_certificates_are_refused() {
    let [ours, theirs] = [(); 2].map(|()| Authority::new().unwrap());
    let agent = held(&ours, Some(identity(&ours, &host("h"), LIFETIME)));
    let stranger = identity(&theirs, &controller(), LIFETIME);
    let stranger = held(&ours, Some(stranger));
    let error = shake((&agent, Clients::Controllers), (&stranger, host_of("h")));
    assert!(
        matches!(
            error,
            Err(rustls::Error::InvalidCertificate(
                rustls::CertificateError::UnknownIssuer
            ))
        ),
        "{error:?}"
    );
    // Certificates hold whole seconds: this one ended with the last.
    let expired = identity(&ours, &controller(), Duration::ZERO);
    while SystemTime::now() <= expired.validity().1 + Duration::from_secs(1) {
        std::thread::yield_now();
    }
    let expired = held(&ours, Some(expired));
    let error = shake((&agent, Clients::Controllers), (&expired, host_of("h"))).unwrap_err();
    assert!(error.to_string().contains("expired"), "{error}");
    let error = shake((&expired, Clients::Anybody), (&agent, Expect::Controller)).unwrap_err();
    assert!(error.to_string().contains("expired"), "{error}");
}

#[test]
fn whoever_knows_the_hash_believes_that_authority_alone() {
    let [ours, theirs] = [(); 2].map(|()| Authority::new().unwrap());
    let leader = held(&ours, Some(identity(&ours, &controller(), LIFETIME)));
    let newcomer = Held::default().credentials();
    let pinned = |authority: &Authority, found: &Arc<OnceLock<_>>| {
        Expect::Pinned(fingerprint(authority.certificate()), found.clone())
    };
    let found = Arc::new(OnceLock::new());
    shake(
        (&leader, Clients::Anybody),
        (&newcomer, pinned(&ours, &found)),
    )
    .unwrap();
    assert_eq!(found.get(), Some(ours.certificate()));
    let found = Arc::new(OnceLock::new());
    let error = shake(
        (&leader, Clients::Anybody),
        (&newcomer, pinned(&theirs, &found)),
    );
    assert!(error.is_err() && found.get().is_none());
    // An authority in the chain that did not make the certificate proves nothing.
    let request = Request::new().unwrap();
    let mut chain = theirs
        .issue(&request.der, &controller(), &[], LIFETIME, None)
        .unwrap();
    chain.push(ours.certificate().clone());
    let posing = Identity::from_pem(pem(&chain).as_bytes(), request.key_pem.as_bytes()).unwrap();
    let posing = held(&theirs, Some(posing));
    let error = shake(
        (&posing, Clients::Anybody),
        (&newcomer, pinned(&ours, &found)),
    );
    assert!(error.is_err() && found.get().is_none());
}

#[test]
fn what_is_in_the_files_counts_for_the_next_connection() {
    let dir = tempfile::tempdir().unwrap();
    let [old, new] = [(); 2].map(|()| Authority::new().unwrap());
    let path = |name: &str| dir.path().join(name);
    let write = |authority: &Authority| {
        let request = Request::new().unwrap();
        let chain = authority.issue(&request.der, &host("h"), &[], LIFETIME, None);
        std::fs::write(path("key"), &request.key_pem).unwrap();
        std::fs::write(path("chain"), pem(&chain.unwrap())).unwrap();
        std::fs::write(path("ca"), pem([old.certificate(), new.certificate()])).unwrap();
    };
    write(&old);
    let agent = Credentials::of_files(Files {
        identity: Some((path("chain"), path("key"))),
        authorities: path("ca"),
    })
    .unwrap();
    let [before, after] = [&old, &new].map(|authority| {
        held(
            authority,
            Some(identity(authority, &controller(), LIFETIME)),
        )
    });
    shake((&agent, Clients::Controllers), (&before, host_of("h"))).unwrap();
    assert!(shake((&agent, Clients::Controllers), (&after, host_of("h"))).is_err());
    write(&new);
    shake((&agent, Clients::Controllers), (&after, host_of("h"))).unwrap();
    // Half-written files change nothing.
    std::fs::write(path("key"), "").unwrap();
    shake((&agent, Clients::Controllers), (&after, host_of("h"))).unwrap();
}

#[test]
fn authorities_are_loaded_again_and_take_only_keys_from_requests() {
    let authority = Authority::new().unwrap();
    let again = Authority::load(authority.certificate().to_vec(), &authority.key_der()).unwrap();
    let identity = identity(&again, &host("h"), LIFETIME);
    assert_eq!(identity.name(), Some(host("h")));
    let (begins, ends) = identity.validity();
    assert!(begins < SystemTime::now() && SystemTime::now() < ends);
    assert!(identity.after(50) > begins && identity.after(50) < ends);
    let request = Request::new().unwrap();
    let mut forged = request.der.clone();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    assert!(
        again
            .issue(&forged, &host("h"), &[], LIFETIME, None)
            .is_err()
    );
    let same = Request::again(&request.key_pem).unwrap();
    assert_eq!(
        Authority::key_of(&request.der).unwrap(),
        Authority::key_of(&same.der).unwrap()
    );
    let other = Request::new().unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(again.key_der()));
    let chain = again
        .issue(&other.der, &host("h"), &[], LIFETIME, None)
        .unwrap();
    assert!(Identity::new(chain, key).is_err(), "a key of somebody else");
}
