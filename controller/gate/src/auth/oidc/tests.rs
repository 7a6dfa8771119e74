//! Tokens of a provider that lives in this test.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

struct Signer {
    key: EcdsaKeyPair,
    kid: &'static str,
}

impl Signer {
    fn new(kid: &'static str) -> Self {
        let random = SystemRandom::new();
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        let key = EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap();
        Self { key, kid }
    }

    fn jwks(&self) -> String {
        let point = self.key.public_key().as_ref();
        let (x, y) = point[1..].split_at(32);
        json!({"keys": [{
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.kid,
            "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
        }]})
        .to_string()
    }

    fn sign(&self, claims: &Value) -> String {
        let header = json!({"alg": "ES256", "typ": "JWT", "kid": self.kid});
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(&header), part(claims));
        let signature = self.key.sign(&SystemRandom::new(), message.as_bytes());
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature.unwrap()))
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

fn claims() -> Value {
    json!({
        "iss": "https://id.example", "aud": ["mortise", "other"], "sub": "alice",
        "exp": now() + 600, "realm": {"roles": ["operator", "of-another-application"]},
        "projects": "a b",
    })
}

fn provider(keys: Source) -> Provider {
    Provider {
        issuer: "https://id.example".into(),
        audience: "mortise".into(),
        keys,
        name_claim: "sub".into(),
        roles_claim: "realm.roles".into(),
        projects_claim: "projects".into(),
    }
}

#[tokio::test]
async fn tokens_of_the_provider_are_taken_and_others_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("jwks.json");
    let signer = Signer::new("k1");
    std::fs::write(&file, signer.jwks()).unwrap();
    let oidc = Oidc::start(provider(Source::File(file))).await.unwrap();

    let alice = oidc.verify(&signer.sign(&claims())).unwrap();
    assert_eq!(alice.name, "alice");
    assert!(alice.has(Role::Operator) && !alice.has(Role::Admin));
    assert!(alice.may_see("projects/b") && !alice.may_see("projects/c"));

    let refused = |token: &str| oidc.verify(token).unwrap_err().to_string();
    let with = |name: &str, value: Value| {
        let mut claims = claims();
        claims[name] = value;
        signer.sign(&claims)
    };
    assert!(refused(&with("exp", json!(now() - 600))).contains("expired"));
    assert!(refused(&with("nbf", json!(now() + 600))).contains("not valid yet"));
    assert!(refused(&with("iss", json!("https://evil.example"))).contains("issuer"));
    assert!(refused(&with("aud", json!("another"))).contains("audience"));
    assert!(refused(&with("sub", json!(""))).contains("no claim sub"));
    let mut endless = claims();
    endless.as_object_mut().unwrap().remove("exp");
    assert!(refused(&signer.sign(&endless)).contains("no claim exp"));

    // Another key of the same name, an unknown one, and none at all.
    assert!(refused(&Signer::new("k1").sign(&claims())).contains("signature"));
    assert!(refused(&Signer::new("k2").sign(&claims())).contains("no key \"k2\""));
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let unsigned = format!("{}.{}.", part(json!({"alg": "none"})), part(claims()));
    assert!(
        refused(&unsigned).contains("no JWT"),
        "{}",
        refused(&unsigned)
    );
    let symmetric = format!("{}.{}.AAAA", part(json!({"alg": "HS256"})), part(claims()));
    assert!(refused(&symmetric).contains("not accepted"));
}

#[tokio::test]
async fn keys_come_from_a_url_too() {
    let signer = Signer::new("k1");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/keys?all=1", listener.local_addr().unwrap());
    let jwks = signer.jwks();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(stream.read_u8().await.unwrap());
        }
        let length = jwks.len();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{jwks}");
        stream.write_all(answer.as_bytes()).await.unwrap();
        String::from_utf8(request).unwrap()
    });
    let oidc = Oidc::start(provider(Source::new(&url, None)))
        .await
        .unwrap();
    assert!(
        server
            .await
            .unwrap()
            .starts_with("GET /keys?all=1 HTTP/1.1\r\n")
    );
    assert_eq!(oidc.verify(&signer.sign(&claims())).unwrap().name, "alice");
}

#[tokio::test]
async fn file_without_keys_is_no_start() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("jwks.json");
    assert!(
        Oidc::start(provider(Source::File(file.clone())))
            .await
            .is_err()
    );
    std::fs::write(&file, "{}").unwrap();
    assert!(Oidc::start(provider(Source::File(file))).await.is_err());
}
