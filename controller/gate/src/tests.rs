//! Requests of all kinds of callers, through a real server.

use std::sync::Mutex;

use api::controller as pb;
use api::controller::projects_client::ProjectsClient;
use api::controller::projects_server::{Projects, ProjectsServer};
use api::serve::{self, Services};
use sha2::{Digest as _, Sha256};
use store::embedded::EmbeddedStore;
use store::{Range, SharedStore};
use tonic::transport::Channel;
use tonic::{Request, Response};

use super::*;
use crate::auth::Tokens;

/// Remembers who asked.
#[derive(Clone, Default)]
struct Handler {
    callers: Arc<Mutex<Vec<(Principal, String)>>>,
}

#[tonic::async_trait]
impl Projects for Handler {
    async fn get_project(
        &self,
        request: Request<pb::GetProjectRequest>,
    ) -> Result<Response<pb::Project>, Status> {
        let caller = request.extensions().get::<Principal>().unwrap().clone();
        let id = request.extensions().get::<RequestId>().unwrap().0.clone();
        self.callers.lock().unwrap().push((caller, id));
        let name = request.into_inner().name;
        Ok(Response::new(pb::Project {
            name,
            ..Default::default()
        }))
    }
    async fn list_projects(
        &self,
        _: Request<pb::ListProjectsRequest>,
    ) -> Result<Response<pb::ListProjectsResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn create_project(
        &self,
        request: Request<pb::CreateProjectRequest>,
    ) -> Result<Response<pb::Project>, Status> {
        match request.into_inner().project_id.as_str() {
            "taken" => Err(errors::status(Code::AlreadyExists, "TAKEN", "taken", &[])),
            "slow" => std::future::pending().await,
            _ => Ok(Response::new(Default::default())),
        }
    }
    async fn update_project(
        &self,
        _: Request<pb::UpdateProjectRequest>,
    ) -> Result<Response<pb::Project>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn delete_project(
        &self,
        _: Request<pb::DeleteProjectRequest>,
    ) -> Result<Response<pb::DeleteProjectResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
}

struct Site {
    client: ProjectsClient<Channel>,
    handler: Handler,
    store: SharedStore,
    _dir: tempfile::TempDir,
}

/// A server on TCP, where nobody is local, with these tokens: (token, roles, projects).
async fn site(tokens: &[(&str, &str, Option<&str>)], per_second: u32) -> Site {
    let dir = tempfile::tempdir().unwrap();
    let entries: Vec<serde_json::Value> = tokens
        .iter()
        .map(|(token, roles, projects)| {
            let digest = Sha256::digest(token.as_bytes());
            let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
            serde_json::json!({
                "name": format!("{token}-user"), "sha256": hex,
                "roles": words(roles), "projects": projects.map(words),
            })
        })
        .collect();
    let file = dir.path().join("tokens.json");
    std::fs::write(&file, serde_json::to_vec(&entries).unwrap()).unwrap();
    let store: SharedStore = Arc::new(EmbeddedStore::open(&dir.path().join("s.redb")).unwrap());
    let authenticator = if tokens.is_empty() {
        Authenticator::off()
    } else {
        Authenticator::off().with_tokens(Tokens::open(&file).unwrap())
    };
    let gate = Gate::new(
        authenticator,
        Rate::new(per_second),
        Audit::start(store.clone()),
    );
    let handler = Handler::default();
    let services = Services::new().with(gate.guard(ProjectsServer::new(handler.clone())));
    let listener = api::listen::tcp("127.0.0.1:0").unwrap();
    let address = listener.address();
    tokio::spawn(async move {
        serve::on(listener, services, std::future::pending())
            .await
            .unwrap();
    });
    let channel = api::connect::address(&address, Duration::from_secs(30))
        .await
        .unwrap();
    Site {
        client: ProjectsClient::new(channel),
        handler,
        store,
        _dir: dir,
    }
}

fn with_token<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = format!("Bearer {token}").parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    request
}

fn get(project: &str) -> pb::GetProjectRequest {
    pb::GetProjectRequest {
        name: format!("projects/{project}"),
    }
}

fn create(id: &str) -> pb::CreateProjectRequest {
    pb::CreateProjectRequest {
        project_id: id.into(),
        ..Default::default()
    }
}

/// Waits until there are so many entries.
async fn audited(site: &Site, count: usize) -> Vec<pb::AuditEntry> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let items = site
            .store
            .list(Range::all(audit::PREFIX))
            .await
            .unwrap()
            .items;
        if items.len() >= count {
            use prost::Message as _;
            return items
                .iter()
                .map(|item| pb::AuditEntry::decode(item.value.as_slice()).unwrap())
                .collect();
        }
        assert!(
            Instant::now() < deadline,
            "{} entries of {count}",
            items.len()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_get_as_far_as_their_roles() {
    let mut site = site(&[("v", "viewer", None), ("a", "admin", None)], 0).await;
    let nobody = site.client.get_project(get("p")).await.unwrap_err();
    assert_eq!(nobody.code(), Code::Unauthenticated);
    assert_eq!(errors::reason(&nobody).unwrap(), "NO_CREDENTIALS");
    assert!(
        nobody
            .message()
            .contains("mortise.controller.v1.Projects/GetProject"),
        "{nobody}"
    );
    let unknown = site
        .client
        .get_project(with_token("x", get("p")))
        .await
        .unwrap_err();
    assert_eq!(errors::reason(&unknown).unwrap(), "UNKNOWN_TOKEN");

    let answer = site
        .client
        .get_project(with_token("v", get("p")))
        .await
        .unwrap();
    let id = answer
        .metadata()
        .get(REQUEST_ID)
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    assert_eq!(
        answer.into_inner().name,
        "projects/p",
        "the message arrives whole"
    );
    let (caller, seen_id) = site.handler.callers.lock().unwrap()[0].clone();
    assert_eq!((caller.name.as_str(), seen_id), ("v-user", id));

    let refused = site
        .client
        .create_project(with_token("v", create("p")))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let info = refused.get_details_error_info().unwrap();
    assert_eq!(info.reason, "ROLE_MISSING");
    assert_eq!(info.metadata["role"], "admin");
    assert_eq!(info.metadata["caller"], "v-user");
    assert!(
        refused
            .message()
            .contains("Projects/CreateProject needs the role admin"),
        "{refused}"
    );
    site.client
        .create_project(with_token("a", create("p")))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_stay_in_their_projects() {
    let mut site = site(&[("p", "admin", Some("p"))], 0).await;
    site.client
        .get_project(with_token("p", get("p")))
        .await
        .unwrap();
    let refused = site
        .client
        .get_project(with_token("p", get("q")))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(errors::reason(&refused).unwrap(), "PROJECT_DENIED");
    assert!(refused.message().contains("p-user"), "{refused}");
    let refused = site
        .client
        .create_project(with_token("p", create("q")))
        .await
        .unwrap_err();
    assert_eq!(errors::reason(&refused).unwrap(), "PROJECT_DENIED");
    // A name that could not be read might be anybody's.
    let none = pb::DeleteProjectRequest::default();
    let refused = site
        .client
        .delete_project(with_token("p", none))
        .await
        .unwrap_err();
    assert_eq!(errors::reason(&refused).unwrap(), "PROJECT_DENIED");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_something_or_is_refused_is_in_the_audit_log() {
    let mut site = site(&[("a", "admin", None)], 0).await;
    site.client
        .get_project(with_token("a", get("p")))
        .await
        .unwrap();
    let mut request = with_token("a", create("new"));
    request
        .metadata_mut()
        .insert(REQUEST_ID, "mine-1".parse().unwrap());
    site.client.create_project(request).await.unwrap();
    site.client
        .create_project(with_token("a", create("taken")))
        .await
        .unwrap_err();
    site.client.get_project(get("p")).await.unwrap_err();
    let entries = audited(&site, 3).await;
    let of = |code: Code| {
        entries
            .iter()
            .find(|entry| entry.code == code as i32)
            .unwrap()
    };
    let made = of(Code::Ok);
    assert_eq!(made.caller, "a-user");
    assert_eq!(made.roles, ["admin"]);
    assert_eq!(made.method, "mortise.controller.v1.Projects/CreateProject");
    assert_eq!(made.resource, "projects/new");
    assert_eq!(made.request_id, "mine-1");
    assert!(made.peer.starts_with("127.0.0.1:"), "{made:?}");
    assert_eq!(of(Code::AlreadyExists).reason, "TAKEN");
    let refused = of(Code::Unauthenticated);
    assert_eq!(
        (refused.caller.as_str(), refused.reason.as_str()),
        ("", "NO_CREDENTIALS")
    );
    assert_eq!(entries.len(), 3, "looking leaves no entry: {entries:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_that_hangs_up_leaves_an_entry() {
    let mut site = site(&[("a", "admin", None)], 0).await;
    let mut request = with_token("a", create("slow"));
    request.set_timeout(Duration::from_millis(200));
    site.client.create_project(request).await.unwrap_err();
    let entries = audited(&site, 1).await;
    assert_eq!(entries[0].resource, "projects/slow");
    assert_ne!(entries[0].code, Code::Ok as i32);
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_requests_are_told_when_to_come_back() {
    let mut site = site(&[("a", "admin", None), ("b", "admin", None)], 1).await;
    let mut refused = None;
    for _ in 0..10 {
        if let Err(status) = site.client.get_project(with_token("a", get("p"))).await {
            refused = Some(status);
            break;
        }
    }
    let refused = refused.expect("ten at once are more than two");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(errors::reason(&refused).unwrap(), "RATE_LIMITED");
    let retry = refused
        .get_details_retry_info()
        .unwrap()
        .retry_delay
        .unwrap();
    assert!(
        retry > Duration::ZERO && retry <= Duration::from_secs(1),
        "{retry:?}"
    );
    site.client
        .get_project(with_token("b", get("p")))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_credentials_set_up_everybody_is_local() {
    let mut site = site(&[], 1).await;
    for _ in 0..5 {
        site.client.get_project(get("p")).await.unwrap();
    }
    site.client.create_project(create("p")).await.unwrap();
    assert_eq!(audited(&site, 1).await[0].caller, "local");
    assert_eq!(
        site.handler.callers.lock().unwrap()[0].0,
        Principal::local()
    );
}

#[tokio::test]
async fn flood_of_an_open_method_leaves_others_their_allowance() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.json");
    std::fs::write(&file, "[]").unwrap();
    let store: SharedStore = Arc::new(EmbeddedStore::open(&dir.path().join("s.redb")).unwrap());
    let authenticator = Authenticator::off().with_tokens(Tokens::open(&file).unwrap());
    let gate = Gate::new(authenticator, Rate::new(1), Audit::start(store));
    let [join, renew] = ["JoinHost", "RenewHostCertificate"]
        .map(|method| format!("mortise.controller.v1.Certificates/{method}"));
    let nobody = Credentials::default();
    let flooded = (0..10).any(|_| gate.admit(&join, &nobody, "192.0.2.1:5").is_err());
    assert!(flooded, "one address has an allowance");
    assert!(gate.admit(&join, &nobody, "192.0.2.2:5").is_ok());
    let host = Credentials {
        certificate: Some(b"a host's".to_vec()),
        ..Default::default()
    };
    assert!(gate.admit(&renew, &host, "192.0.2.1:6").is_ok());
}
