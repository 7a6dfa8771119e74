//! Users in client certificates: a SAN URI `mortise://users/NAME?roles=operator,viewer&projects=a,b`.
//! Without `projects` it is all of them. That the certificate is genuine is TLS's to say.

use std::collections::BTreeSet;

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

use super::{AuthError, Principal, Role};

const SCHEME: &str = "mortise://users/";

/// The user of a certificate.
///
/// # Errors
/// When it names none, or a role that there is not.
pub fn principal(der: &[u8]) -> Result<Principal, AuthError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| AuthError::NoUser)?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| AuthError::NoUser)?
        .ok_or(AuthError::NoUser)?;
    let uri = names
        .value
        .general_names
        .iter()
        .find_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(SCHEME),
            _ => None,
        });
    user(uri.ok_or(AuthError::NoUser)?)
}

/// `NAME?roles=...&projects=...`
fn user(text: &str) -> Result<Principal, AuthError> {
    let (name, query) = text.split_once('?').unwrap_or((text, ""));
    if name.is_empty() {
        return Err(AuthError::NoUser);
    }
    let mut roles = BTreeSet::new();
    let mut projects = None;
    for part in query.split('&') {
        match part.split_once('=') {
            Some(("roles", words)) => {
                for word in words.split(',').filter(|word| !word.is_empty()) {
                    let role = word.parse::<Role>().map_err(|source| AuthError::BadRole {
                        name: name.to_owned(),
                        source,
                    })?;
                    roles.insert(role);
                }
            }
            Some(("projects", ids)) => {
                projects = Some(
                    ids.split(',')
                        .filter(|id| !id.is_empty())
                        .map(str::to_owned)
                        .collect(),
                );
            }
            _ => {}
        }
    }
    Ok(Principal {
        name: name.to_owned(),
        roles,
        projects,
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn certificate(uris: &[&str]) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["client".into()]).unwrap();
        for uri in uris {
            let uri = SanType::URI((*uri).try_into().unwrap());
            params.subject_alt_names.push(uri);
        }
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn user_and_roles_come_from_the_san() {
        let der =
            certificate(&["mortise://users/alice?roles=operator,fault-injector&projects=a,b"]);
        let alice = principal(&der).unwrap();
        assert_eq!(alice.name, "alice");
        assert!(alice.has(Role::Operator) && alice.has(Role::FaultInjector));
        assert!(alice.may_see("projects/b/vms/v") && !alice.may_see("projects/c"));
        let all = principal(&certificate(&["mortise://users/bob?roles=viewer"])).unwrap();
        assert_eq!(all.projects, None);
    }

    #[test]
    fn certificates_of_others_are_no_users() {
        assert!(matches!(
            principal(&certificate(&[])),
            Err(AuthError::NoUser)
        ));
        let host = certificate(&["mortise://hosts/h1"]);
        assert!(matches!(principal(&host), Err(AuthError::NoUser)));
        assert!(matches!(
            principal(b"no certificate"),
            Err(AuthError::NoUser)
        ));
        let error = principal(&certificate(&["mortise://users/eve?roles=root"])).unwrap_err();
        assert!(matches!(error, AuthError::BadRole { .. }), "{error}");
    }
}
