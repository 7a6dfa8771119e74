//! Signatures by ring, which TLS uses already. Only verifying: nothing here has a private key.

use ::ring::signature::{self as ring, UnparsedPublicKey, VerificationAlgorithm};
use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{ErrorKind, Result};
use jsonwebtoken::signature::{Error, Verifier};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, EncodingKey};

static RING: CryptoProvider = CryptoProvider {
    signer_factory: no_signer,
    verifier_factory: verifier,
    key_utils: KeyUtils::new_unimplemented(),
};

/// Makes `jsonwebtoken` use it; a second call changes nothing.
pub(super) fn install() {
    let _ = RING.install_default();
}

fn no_signer(_: &Algorithm, _: &EncodingKey) -> Result<Box<dyn JwtSigner>> {
    Err(ErrorKind::UnsupportedAlgorithm.into())
}

fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>> {
    let algorithm = *algorithm;
    let (rsa, other): (
        Option<&ring::RsaParameters>,
        Option<&'static dyn VerificationAlgorithm>,
    ) = match algorithm {
        Algorithm::RS256 => (Some(&ring::RSA_PKCS1_2048_8192_SHA256), None),
        Algorithm::RS384 => (Some(&ring::RSA_PKCS1_2048_8192_SHA384), None),
        Algorithm::RS512 => (Some(&ring::RSA_PKCS1_2048_8192_SHA512), None),
        Algorithm::ES256 => (None, Some(&ring::ECDSA_P256_SHA256_FIXED)),
        Algorithm::ES384 => (None, Some(&ring::ECDSA_P384_SHA384_FIXED)),
        Algorithm::EdDSA => (None, Some(&ring::ED25519)),
        _ => return Err(ErrorKind::UnsupportedAlgorithm.into()),
    };
    let key = match (key.kind(), rsa, other) {
        (DecodingKeyKind::RsaModulusExponent { n, e }, Some(parameters), _) => Key::Rsa {
            parameters,
            modulus: n.clone(),
            exponent: e.clone(),
        },
        (DecodingKeyKind::SecretOrDer(bytes), _, Some(algorithm)) => Key::Point {
            algorithm,
            bytes: bytes.clone(),
        },
        _ => return Err(ErrorKind::InvalidKeyFormat.into()),
    };
    Ok(Box::new(PublicKey { algorithm, key }))
}

struct PublicKey {
    algorithm: Algorithm,
    key: Key,
}

enum Key {
    Rsa {
        parameters: &'static ring::RsaParameters,
        modulus: Vec<u8>,
        exponent: Vec<u8>,
    },
    Point {
        algorithm: &'static dyn VerificationAlgorithm,
        bytes: Vec<u8>,
    },
}

impl Verifier<Vec<u8>> for PublicKey {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> std::result::Result<(), Error> {
        let verified = match &self.key {
            Key::Rsa {
                parameters,
                modulus,
                exponent,
            } => ring::RsaPublicKeyComponents {
                n: modulus,
                e: exponent,
            }
            .verify(parameters, message, signature),
            Key::Point { algorithm, bytes } => {
                UnparsedPublicKey::new(*algorithm, bytes).verify(message, signature)
            }
        };
        verified.map_err(|_| Error::new())
    }
}

impl JwtVerifier for PublicKey {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}
