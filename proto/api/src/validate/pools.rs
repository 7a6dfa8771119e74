//! Requests about pools.

use std::path::Path;

use tonic::Status;

use crate::controller::{CreatePoolRequest, VolumeSpec, pool_spec::Kind};
use crate::errors::{Violations, invalid_field};
use crate::listen::Address;
use crate::names;

/// The hosts' own.
pub const LOCAL_POOL: &str = "local";

/// The id in `pools/{pool}`.
///
/// # Errors
/// INVALID_ARGUMENT when it is none.
pub fn pool_name(name: &str) -> Result<String, Status> {
    id_of(name)
        .map(str::to_owned)
        .ok_or_else(|| invalid_field("name", "must be pools/{pool}"))
}

/// Checks a request.
///
/// # Errors
/// INVALID_ARGUMENT naming everything that cannot be accepted.
pub fn create_pool_request(request: &CreatePoolRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    let id = &request.pool_id;
    found.require(names::is_id(id), "pool_id", || names::ID_RULE.to_owned());
    found.require(id != LOCAL_POOL, "pool_id", || {
        "is that of the hosts' own pools".to_owned()
    });
    super::fields::request_id(&mut found, &request.request_id);
    let spec = request.pool.as_ref().and_then(|pool| pool.spec.as_ref());
    match spec.and_then(|spec| spec.kind.as_ref()) {
        Some(Kind::Nbd(nbd)) => {
            let is_tcp = matches!(nbd.address.parse(), Ok(Address::Tcp(_)));
            found.require(is_tcp, "pool.spec.nbd.address", || {
                "must be HOST:PORT, which all hosts reach".to_owned()
            });
            let is_file = nbd.tls_file.is_empty() || Path::new(&nbd.tls_file).is_absolute();
            found.require(is_file, "pool.spec.nbd.tls_file", || {
                "must be absolute".to_owned()
            });
        }
        Some(Kind::SharedDirectory(directory)) => {
            let is_absolute = Path::new(&directory.path).is_absolute();
            found.require(is_absolute, "pool.spec.shared_directory.path", || {
                "must be absolute".to_owned()
            });
        }
        Some(Kind::Local(_)) => found.add(
            "pool.spec.local",
            "hosts have their own pools already; name no pool for a volume there",
        ),
        None => found.add(
            "pool.spec",
            "must say where the pool is: nbd or shared_directory",
        ),
    }
    found.into_result()
}

/// Of a volume in a pool that hosts share: what a host makes of volumes is not to be had there.
pub(super) fn of_volume(found: &mut Violations, spec: &VolumeSpec, parent: &str) {
    if spec.pool.is_empty() {
        found.require(spec.export.is_empty(), "volume.spec.export", || {
            "is of volumes in pools that hosts share; name the pool".to_owned()
        });
        return;
    }
    let Some(id) = id_of(&spec.pool) else {
        return found.add("volume.spec.pool", "must be pools/{pool}");
    };
    if id == LOCAL_POOL {
        return;
    }
    let unset = [
        ("host", spec.host.is_empty()),
        ("source_path", spec.source_path.is_empty()),
        ("base", spec.base.is_empty()),
        ("import", spec.import.is_none()),
        ("encrypted", !spec.encrypted),
    ];
    for (field, is_unset) in unset {
        found.require(is_unset, &format!("volume.spec.{field}"), || {
            "is of volumes in the hosts' own pools".to_owned()
        });
    }
    found.require(spec.size_bytes > 0, "volume.spec.size_bytes", || {
        "is missing: it counts against the project's quota".to_owned()
    });
    let project = parent.trim_start_matches("projects/");
    let is_own = spec.export.is_empty()
        || project == names::DEFAULT_PROJECT
        || spec.export.starts_with(&format!("{project}."));
    found.require(is_own, "volume.spec.export", || {
        format!("must begin with \"{project}.\": what is called otherwise is not this project's")
    });
    let is_export = spec.export.len() <= 255 && !spec.export.contains(['@', '/', '\0']);
    found.require(is_export, "volume.spec.export", || {
        "must have at most 255 bytes without '@' and '/'".to_owned()
    });
}

fn id_of(name: &str) -> Option<&str> {
    name.strip_prefix("pools/").filter(|id| names::is_id(id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::{NbdPool, Pool, PoolSpec, SharedDirectory};

    fn creation(id: &str, kind: Kind) -> CreatePoolRequest {
        CreatePoolRequest {
            pool_id: id.into(),
            pool: Some(Pool {
                spec: Some(PoolSpec { kind: Some(kind) }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn pools_that_hosts_cannot_share_are_refused() {
        let nbd = |address: &str| {
            Kind::Nbd(NbdPool {
                address: address.into(),
                ..Default::default()
            })
        };
        create_pool_request(&creation("fast", nbd("10.0.0.1:10809"))).unwrap();
        for (id, kind, named) in [
            ("local", nbd("10.0.0.1:10809"), "pool_id"),
            ("fast", nbd("unix:/run/x"), "nbd.address"),
            (
                "fast",
                Kind::Local(crate::controller::LocalPool {}),
                "spec.local",
            ),
            (
                "fast",
                Kind::SharedDirectory(SharedDirectory { path: "nfs".into() }),
                "shared_directory.path",
            ),
        ] {
            let status = create_pool_request(&creation(id, kind)).unwrap_err();
            let details = format!("{status:?}");
            assert!(details.contains(named), "{named}: {details}");
        }
    }

    #[test]
    fn volume_of_a_shared_pool_is_of_no_host() {
        let violations = |spec: VolumeSpec| {
            let mut found = Violations::new();
            of_volume(&mut found, &spec, "projects/default");
            found
                .into_result()
                .err()
                .map(|status| format!("{status:?}"))
        };
        let shared = VolumeSpec {
            pool: "pools/fast".into(),
            size_bytes: 4096,
            ..Default::default()
        };
        assert_eq!(violations(shared.clone()), None);
        let of_host = VolumeSpec {
            host: "hosts/a".into(),
            ..shared.clone()
        };
        assert!(violations(of_host).unwrap().contains("volume.spec.host"));
        let elsewhere = VolumeSpec {
            pool: "fast".into(),
            ..shared.clone()
        };
        assert!(violations(elsewhere).unwrap().contains("volume.spec.pool"));
        let of_others = VolumeSpec {
            export: "data".into(),
            ..shared.clone()
        };
        let mut found = Violations::new();
        of_volume(&mut found, &of_others, "projects/web");
        let status = found.into_result().unwrap_err();
        assert!(format!("{status:?}").contains("volume.spec.export"));
    }
}
