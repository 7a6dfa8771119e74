//! Commands on projects.

use api::controller as pb;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::{CommandError, MAX_ATTEMPTS, quota};
use crate::model::{self, ProjectRecord, project_key};
use crate::plan::Stored;
use crate::reconciler::decode;
use crate::store::{SharedStore, StoreError, Transaction};

/// One project.
///
/// # Errors
/// When there is none of that id.
pub async fn get_project(
    store: &SharedStore,
    id: &str,
) -> Result<Stored<ProjectRecord>, CommandError> {
    let item = store.get(&project_key(id)).await?;
    let item = item.ok_or_else(|| CommandError::NotFound {
        what: format!("project {id}"),
    })?;
    Ok(Stored {
        record: decode(&item.key, &item.value)?,
        revision: item.revision,
    })
}

/// What users see of a project.
pub fn visible_project(record: &ProjectRecord) -> pb::Project {
    let mut project = record.project.clone();
    project.etag = model::etag(&project.uid, project.generation);
    project
}

/// Makes a project.
///
/// # Errors
/// When there is one of that id, unless by this very request.
pub async fn create_project(
    store: &SharedStore,
    request: &pb::CreateProjectRequest,
) -> Result<pb::Project, CommandError> {
    let id = &request.project_id;
    let given = request.project.clone().unwrap_or_default();
    let fingerprint = Sha256::digest(request.encode_to_vec()).to_vec();
    let record = ProjectRecord {
        project: pb::Project {
            name: format!("projects/{id}"),
            uid: model::new_uid(),
            generation: 1,
            create_time: Some(model::now()),
            display_name: given.display_name,
            quota: given.quota,
            ..Default::default()
        },
        deleting: false,
        request_id: request.request_id.clone(),
        fingerprint: fingerprint.clone(),
    };
    let exists = || CommandError::AlreadyExists {
        what: format!("project {id}"),
    };
    if let Some(item) = store.get(&project_key(id)).await? {
        let there: ProjectRecord = decode(&item.key, &item.value)?;
        if request.request_id.is_empty() || there.request_id != request.request_id {
            return Err(exists());
        }
        if there.fingerprint != fingerprint {
            return Err(CommandError::RequestIdReused {
                request_id: request.request_id.clone(),
            });
        }
        return Ok(visible_project(&there));
    }
    if request.validate_only {
        return Ok(visible_project(&record));
    }
    let event = model::new_event(&record.project.name, "PROJECT_CREATED", "");
    let transaction = Transaction::new()
        .if_absent(project_key(id))
        .put(project_key(id), record.encode_to_vec())
        .put(event.name.clone(), event.encode_to_vec());
    match store.commit(transaction).await {
        Ok(_) => Ok(visible_project(&record)),
        Err(StoreError::Conflict { .. }) => Err(exists()),
        Err(error) => Err(error.into()),
    }
}

/// Changes what `change` changes; the default project comes to be by that.
///
/// # Errors
/// When there is none of that id, or it is not as `etag` says.
pub async fn update_project(
    store: &SharedStore,
    id: &str,
    etag: &str,
    change: impl Fn(&mut pb::Project),
) -> Result<pb::Project, CommandError> {
    for _ in 0..MAX_ATTEMPTS {
        let found = match get_project(store, id).await {
            Ok(stored) => Some(stored),
            Err(CommandError::NotFound { .. }) if id == api::names::DEFAULT_PROJECT => None,
            Err(error) => return Err(error),
        };
        let key = project_key(id);
        let (mut record, transaction) = match found {
            Some(stored) => (
                stored.record,
                Transaction::new().if_unchanged(key.clone(), stored.revision),
            ),
            None => (default_project(), Transaction::new().if_absent(key.clone())),
        };
        check_project_etag(&record, etag)?;
        change(&mut record.project);
        record.project.generation += 1;
        let event = model::new_event(&record.project.name, "PROJECT_UPDATED", "");
        let transaction = transaction
            .put(key, record.encode_to_vec())
            .put(event.name.clone(), event.encode_to_vec());
        match store.commit(transaction).await {
            Ok(_) => return Ok(visible_project(&record)),
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(CommandError::Store(StoreError::Conflict {
        key: project_key(id),
    }))
}

/// The project that is there without having been made.
pub fn default_project() -> ProjectRecord {
    ProjectRecord {
        project: pb::Project {
            name: format!("projects/{}", api::names::DEFAULT_PROJECT),
            uid: model::new_uid(),
            ..Default::default()
        },
        ..Default::default()
    }
}

/// Removes a project. It is marked first: whoever is making something in it at this moment compares the
/// project, and finds it changed.
///
/// # Errors
/// When there is none, it is not as `etag` says, or anything is in it.
pub async fn delete_project(store: &SharedStore, id: &str, etag: &str) -> Result<(), CommandError> {
    let Stored {
        mut record,
        revision,
    } = get_project(store, id).await?;
    check_project_etag(&record, etag)?;
    let in_use = || CommandError::ProjectInUse {
        project: id.to_owned(),
    };
    if !quota::is_empty(store, id).await? {
        return Err(in_use());
    }
    record.deleting = true;
    let key = project_key(id);
    let marked = Transaction::new()
        .if_unchanged(key.clone(), revision)
        .put(key.clone(), record.encode_to_vec());
    let revision = store.commit(marked).await?;
    if !quota::is_empty(store, id).await? {
        record.deleting = false;
        let unmarked = Transaction::new()
            .if_unchanged(key.clone(), revision)
            .put(key, record.encode_to_vec());
        store.commit(unmarked).await?;
        return Err(in_use());
    }
    let event = model::new_event(&record.project.name, "PROJECT_DELETED", "");
    let transaction = Transaction::new()
        .if_unchanged(key.clone(), revision)
        .delete(key)
        .delete(model::quota_fence_key(id))
        .put(event.name.clone(), event.encode_to_vec());
    store.commit(transaction).await?;
    Ok(())
}

fn check_project_etag(record: &ProjectRecord, given: &str) -> Result<(), CommandError> {
    let etag = model::etag(&record.project.uid, record.project.generation);
    if given.is_empty() || given == etag {
        return Ok(());
    }
    Err(CommandError::EtagMismatch {
        what: record.project.name.clone(),
        given: given.to_owned(),
        etag,
    })
}
