//! With TLS: who is let in, and who is not.

use std::net::TcpListener;
use std::path::Path;

use nbd::client::{Command, Options};
use nbd::{Address, TlsClient, TlsServer};

use crate::parties::{MIB, Own, QemuNbd, connect, has_tool, image, options, pattern, run, said};

/// Issues certificates.
struct Authority(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

/// A certificate and its key, as PEM.
struct Identity {
    certificate: String,
    key: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let names = &mut params.distinguished_name;
        names.push(rcgen::DnType::CommonName, name);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        let key = rcgen::KeyPair::generate().unwrap();
        Self(rcgen::CertifiedIssuer::self_signed(params, key).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    /// For a host, or a client.
    fn issue(&self, name: &str) -> Identity {
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let names = &mut params.distinguished_name;
        names.push(rcgen::DnType::CommonName, name);
        params.extended_key_usages = vec![
            rcgen::ExtendedKeyUsagePurpose::ServerAuth,
            rcgen::ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.key_usages = vec![
            rcgen::KeyUsagePurpose::DigitalSignature,
            rcgen::KeyUsagePurpose::KeyEncipherment,
        ];
        let key = rcgen::KeyPair::generate().unwrap();
        Identity {
            certificate: params.signed_by(&key, &self.0).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }

    /// This CA and an identity, in one, as our ends want them.
    fn with(&self, identity: &Identity) -> Vec<u8> {
        let Identity { certificate, key } = identity;
        format!("{}{certificate}{key}", self.pem()).into_bytes()
    }

    /// The same in the files that QEMU looks for.
    fn store(&self, place: &Path, end: &str, identity: &Identity) {
        std::fs::create_dir_all(place).unwrap();
        let write = |name: String, text: &str| std::fs::write(place.join(name), text).unwrap();
        write("ca-cert.pem".into(), &self.pem());
        write(format!("{end}-cert.pem"), &identity.certificate);
        write(format!("{end}-key.pem"), &identity.key);
    }
}

#[test]
fn only_whom_the_authority_knows_is_let_in() {
    let place = tempfile::tempdir().unwrap();
    let path = image(place.path(), "a.img", 4 * MIB);
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp {
        host: "localhost".into(),
        port: listener.local_addr().unwrap().port(),
    };
    let tls = TlsServer::from_pem(&ours.with(&ours.issue("localhost"))).unwrap();
    let _server = Own::start(&path, listener.into(), Some(tls));
    let with = |pem: &[u8], host: &str| {
        let tls = Some(TlsClient::from_pem(pem, host).unwrap());
        connect(&address, Options { tls, ..options() })
    };

    let known = ours.with(&ours.issue("client"));
    let client = with(&known, "localhost").unwrap();
    assert!(client.status().is_encrypted);
    let data = pattern(5, 2 << 20);
    client.write_at(0, data.clone()).unwrap();
    assert!(client.read_at(0, data.len() as u32).unwrap() == data);

    let error = with(&known, "elsewhere").unwrap_err();
    assert!(error.contains("not valid for name"), "{error}");
    let wrong_authority = theirs.with(&ours.issue("client"));
    let error = with(&wrong_authority, "localhost").unwrap_err();
    assert!(error.contains("UnknownIssuer"), "{error}");
    let error = with(ours.pem().as_bytes(), "localhost").unwrap_err();
    assert!(error.contains("CertificateRequired"), "{error}");
    let impostor = ours.with(&theirs.issue("client"));
    let error = with(&impostor, "localhost").unwrap_err();
    assert!(error.contains("UnknownCA"), "{error}");
    let error = connect(&address, options()).unwrap_err();
    assert!(error.contains("demands TLS"), "{error}");
}

#[test]
fn tls_is_not_done_without_when_it_was_asked_for() {
    let place = tempfile::tempdir().unwrap();
    let path = image(place.path(), "a.img", MIB);
    let socket = place.path().join("nbd");
    let _server = Own::on_unix(&path, &socket);
    let authority = Authority::new("ours");
    let tls = TlsClient::from_pem(authority.pem().as_bytes(), "localhost").unwrap();
    let options = Options {
        tls: Some(tls),
        ..options()
    };
    let error = connect(&Address::Unix(socket), options).unwrap_err();
    assert!(error.contains("no TLS"), "{error}");
}

#[test]
fn pem_that_is_of_no_use_is_told_apart() {
    let authority = Authority::new("ours");
    let Identity { certificate, key } = authority.issue("localhost");
    let error = |pem: &str| {
        let refused = TlsClient::from_pem(pem.as_bytes(), "h").unwrap_err();
        refused.to_string()
    };
    assert!(error("").contains("no CA certificate"));
    assert!(error(&key).contains("belongs to the key"));
    assert!(error("-----BEGIN CERTIFICATE-----\nx\n").contains("PEM"));
    assert!(error(&format!("{certificate}{key}")).contains("no CA certificate"));
    assert!(TlsServer::from_pem(authority.pem().as_bytes()).is_err());
    let bad_host = TlsClient::from_pem(authority.pem().as_bytes(), "a b").unwrap_err();
    assert!(bad_host.to_string().contains("\"a b\""));
}

#[test]
fn client_speaks_tls_with_qemu() {
    if !has_tool("qemu-nbd") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let path = image(place.path(), "a.img", 8 * MIB);
    let authority = Authority::new("ours");
    let credentials = place.path().join("pki");
    authority.store(&credentials, "server", &authority.issue("localhost"));
    let socket = place.path().join("nbd");
    let object = format!(
        "tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir={}",
        credentials.display()
    );
    let creds = ["--object", &object, "--tls-creds", "tls0"];
    let _server = QemuNbd::start(&path, &socket, &creds);
    let pem = authority.with(&authority.issue("client"));
    let options = Options {
        tls: Some(TlsClient::from_pem(&pem, "localhost").unwrap()),
        connections: 2,
        ..options()
    };
    let client = connect(&Address::Unix(socket), options).unwrap();
    let data = pattern(9, 4 << 20);
    client.write_at(MIB, data.clone()).unwrap();
    assert!(client.read_at(MIB, data.len() as u32).unwrap() == data);
    client.perform(Command::Flush).unwrap();
}

#[test]
fn qemu_speaks_tls_with_our_server() {
    if !has_tool("qemu-img") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let path = image(place.path(), "a.img", 8 * MIB);
    std::fs::write(&path, pattern(3, 8 << 20)).unwrap();
    let authority = Authority::new("ours");
    let credentials = place.path().join("pki");
    authority.store(&credentials, "client", &authority.issue("client"));
    let server_pem = authority.with(&authority.issue("localhost"));
    let tls = TlsServer::from_pem(&server_pem).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let _server = Own::start(&path, listener.into(), Some(tls));
    let object = format!(
        "tls-creds-x509,id=tls0,endpoint=client,dir={}",
        credentials.display()
    );
    let source = format!(
        "driver=nbd,host=127.0.0.1,port={port},export=disk,tls-creds=tls0,tls-hostname=localhost"
    );
    let copy = place.path().join("copy.img");
    let mut args = vec!["convert", "--object", &object, "--image-opts", &source];
    args.extend(["-O", "raw", copy.to_str().unwrap()]);
    let done = run("qemu-img", &args);
    assert!(done.status.success(), "{}", said(&done));
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&path).unwrap());
}
