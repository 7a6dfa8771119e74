//! Hosts that join with a token and are reached by TLS, with real agents: who is believed, who is not, and
//! that certificates are exchanged while both run.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::SystemTime;

use api::connect;
use api::controller as pb;
use api::controller::certificates_client::CertificatesClient;
use api::controller::events_client::EventsClient;
use api::controller::hosts_client::HostsClient;
use api::controller::watch_events_response::Message;
use api::errors::reason;
use api::listen::Address;
use api::tls;
use pki::{Credentials, Expect, Files};
use tonic::transport::Channel;
use tonic::{Code, Streaming};

use crate::harness::{PATIENCE, built, poll, poll_async};

/// A controller on a Unix socket, for its own user, and by TLS, for everybody else; killed when dropped.
struct Secured {
    child: Child,
    https: String,
    local: Channel,
}

impl Secured {
    async fn start(dir: &Path, args: &[&str]) -> Self {
        let socket = format!("unix:{}", dir.join("c.sock").display());
        let mut child = Command::new(env!("CARGO_BIN_EXE_controller"))
            .args(["--listen", &socket, "--listen", "https://127.0.0.1:0"])
            .arg("--state-dir")
            .arg(dir.join("state"))
            .args(args)
            .env("MORTISE_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(dir.join("controller.log")).unwrap())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut address = || {
            let line = lines.next().unwrap().unwrap();
            line.strip_prefix("listening on ").expect(&line).to_owned()
        };
        let (unix, https) = (address(), address());
        let unix: Address = unix.parse().unwrap();
        let local = connect::address(&unix, PATIENCE).await.unwrap();
        Self {
            child,
            https,
            local,
        }
    }

    fn certificates(&self) -> CertificatesClient<Channel> {
        CertificatesClient::new(self.local.clone())
    }

    async fn token(&self, host: &str, ttl_s: u32) -> pb::CreateHostTokenResponse {
        let host = host.to_owned();
        let request = pb::CreateHostTokenRequest { host, ttl_s };
        let made = self.certificates().create_host_token(request).await;
        made.unwrap().into_inner()
    }

    async fn hosts(&self) -> Vec<pb::Host> {
        let mut client = HostsClient::new(self.local.clone());
        let listed = client.list_hosts(pb::ListHostsRequest::default()).await;
        listed.unwrap().into_inner().hosts
    }

    /// Waits until the only host answers.
    async fn connected(&self) -> pb::Host {
        let one = |hosts: &Vec<pb::Host>| hosts.iter().any(|host| host.connected);
        poll_async("the host", || self.hosts(), one).await.remove(0)
    }

    /// A viewer's certificate and key in NAME.pem and NAME.key; who is believed, and when it ends.
    async fn user(&self, dir: &Path, name: &str, lifetime_s: u32) -> (String, SystemTime) {
        let made = pki::Request::new().unwrap();
        let request = pb::IssueUserCertificateRequest {
            user: name.into(),
            roles: vec!["viewer".into()],
            request: made.der,
            lifetime_s,
            ..Default::default()
        };
        let issued = self.certificates().issue_user_certificate(request).await;
        let issued = issued.unwrap().into_inner();
        std::fs::write(dir.join(format!("{name}.pem")), issued.chain).unwrap();
        std::fs::write(dir.join(format!("{name}.key")), made.key_pem).unwrap();
        let end = SystemTime::try_from(issued.expire_time.unwrap()).unwrap();
        (issued.authorities, end)
    }

    /// By TLS, with the certificate in these files.
    async fn remote(&self, files: Files) -> Channel {
        let credentials = Credentials::of_files(files).unwrap();
        let client = tls::Client::new(move || credentials.client(Expect::Controller));
        let address: Address = self.https.parse().unwrap();
        connect::secured(&address, Some(&client), PATIENCE)
            .await
            .unwrap()
    }
}

impl Drop for Secured {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A machine with an agent, if one was started; killed when dropped.
struct Machine {
    dir: PathBuf,
    address: String,
    agent: Option<Child>,
}

impl Machine {
    /// At a loopback address that nobody else has: a host has to know its port before it is bound.
    fn new(dir: &Path, name: &str) -> Self {
        static NUMBER: AtomicU8 = AtomicU8::new(1);
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        Self {
            dir,
            address: format!("https://127.{}.{low}.{number}:7071", high.max(1)),
            agent: None,
        }
    }

    fn join(&self, controller: &str, token: &str, ca_hash: &str) -> Output {
        Command::new(built("node-agent"))
            .args(["join", "--controller", controller, "--token", token])
            .args(["--ca-hash", ca_hash, "--address", &self.address])
            .arg("--state-dir")
            .arg(self.dir.join("state"))
            .output()
            .unwrap()
    }

    fn joined(&self, controller: &Secured, token: &pb::CreateHostTokenResponse) -> String {
        let output = self.join(&controller.https, &token.secret, &token.ca_hash);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let said = String::from_utf8(output.stdout).unwrap();
        said.trim()
            .strip_prefix("joined as ")
            .expect(&said)
            .to_owned()
    }

    /// Why it was not let in.
    fn refused(&self, controller: &Secured, token: &str, ca_hash: &str) -> String {
        let output = self.join(&controller.https, token, ca_hash);
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn start(&mut self) {
        let child = Command::new(built("node-agent"))
            .args(["--listen", &self.address])
            .arg("--state-dir")
            .arg(self.dir.join("state"))
            .arg("--run-dir")
            .arg(self.dir.join("run"))
            .env("MORTISE_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(self.log()).unwrap())
            .spawn()
            .unwrap();
        self.agent = Some(child);
    }

    fn stop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().unwrap();
            agent.wait().unwrap();
        }
    }

    fn log(&self) -> PathBuf {
        self.dir.join("agent.log")
    }

    fn certificate(&self) -> PathBuf {
        self.dir.join("state/tls/host.pem")
    }

    fn files(&self) -> Files {
        Files {
            identity: Some((self.certificate(), self.certificate())),
            authorities: self.dir.join("state/tls/authorities.pem"),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }
}

/// All events from now on.
async fn watch(channel: Channel) -> Streaming<pb::WatchEventsResponse> {
    let request = pb::WatchEventsRequest {
        after_revision: u64::MAX,
        ..Default::default()
    };
    let watching = EventsClient::new(channel).watch_events(request).await;
    watching.unwrap().into_inner()
}

/// Waits until a log says something.
fn says(log: &Path, what: &str) {
    poll(what, || {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        text.contains(what).then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn host_joins_once_with_its_token_and_is_refused_when_it_was_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let c = Secured::start(dir.path(), &[]).await;
    let token = c.token("", 0).await;
    let mut machine = Machine::new(dir.path(), "a");
    let imposter = machine.refused(&c, &token.secret, &"0".repeat(64));
    assert!(
        imposter.contains("not the one that --ca-hash names"),
        "{imposter}"
    );
    let name = machine.joined(&c, &token);
    machine.start();
    let host = c.connected().await;
    assert_eq!((&host.name, &host.address), (&name, &machine.address));

    let other = Machine::new(dir.path(), "b");
    let used = other.refused(&c, &token.secret, &token.ca_hash);
    assert!(used.contains(&format!("was used by {name}")), "{used}");
    let unknown = format!("{}0", &token.secret[..token.secret.len() - 1]);
    let unknown = match unknown == token.secret {
        true => format!("{}1", &token.secret[..token.secret.len() - 1]),
        false => unknown,
    };
    let unknown = other.refused(&c, &unknown, &token.ca_hash);
    assert!(unknown.contains("is not known here"), "{unknown}");
    let short = c.token("", 1).await;
    let end = SystemTime::try_from(short.host_token.clone().unwrap().expire_time.unwrap());
    let end = end.unwrap();
    poll("the token's end", || {
        (SystemTime::now() > end).then_some(())
    });
    let expired = other.refused(&c, &short.secret, &short.ca_hash);
    assert!(expired.contains("this token expired at"), "{expired}");
    // Whoever has an id keeps it.
    let named = c.token("hosts/h7", 0).await;
    let foreign = machine.refused(&c, &named.secret, &named.ca_hash);
    assert!(
        foreign.contains(&format!("is for hosts/h7, and this is {name}")),
        "{foreign}"
    );
    let open = c.token("", 0).await;
    let known = machine.refused(&c, &open.secret, &open.ca_hash);
    assert!(known.contains("needs a token of its own"), "{known}");
    // A new one takes the name that was chosen for it.
    assert_eq!(other.joined(&c, &named), "hosts/h7");

    let mut hosts = HostsClient::new(c.local.clone());
    let request = pb::DeleteHostRequest {
        name: name.clone(),
        force: true,
        ..Default::default()
    };
    hosts.delete_host(request).await.unwrap();
    let mut renewing = CertificatesClient::new(c.remote(machine.files()).await);
    let request = pki::Request::new().unwrap().der;
    let request = pb::RenewHostCertificateRequest { request };
    let refused = renewing.renew_host_certificate(request).await.unwrap_err();
    assert_eq!(
        reason(&refused).as_deref(),
        Some("HOST_DELETED"),
        "{refused}"
    );
    let open = machine.refused(&c, &open.secret, &open.ca_hash);
    assert!(open.contains("needs a token of its own"), "{open}");
    let again = c.token(&name, 0).await;
    assert_eq!(machine.joined(&c, &again), name);
    // The agent that runs shows its new certificate; the one from before would not do.
    let answers =
        |hosts: &Vec<pb::Host>| hosts.iter().any(|host| host.name == name && host.connected);
    poll_async("the host is back", || c.hosts(), answers).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused_by_hosts_and_controllers() {
    let dir = tempfile::tempdir().unwrap();
    let [ours, theirs] = ["ours", "theirs"].map(|name| dir.path().join(name));
    std::fs::create_dir_all(&ours).unwrap();
    std::fs::create_dir_all(&theirs).unwrap();
    let c = Secured::start(&ours, &[]).await;
    let mut machine = Machine::new(dir.path(), "a");
    machine.joined(&c, &c.token("", 0).await);
    machine.start();
    c.connected().await;

    // A controller of another installation that knows where the host is.
    let stranger = Secured::start(&theirs, &["--node", &machine.address]).await;
    says(
        &theirs.join("controller.log"),
        "is not of an authority that is trusted here",
    );
    assert!(stranger.hosts().await.is_empty());
    // Another host's agent, and somebody without a certificate.
    let other = Machine::new(dir.path(), "b");
    other.joined(&c, &c.token("hosts/b", 0).await);
    let address: Address = machine.address.parse().unwrap();
    for (files, why) in [
        (other.files(), "hosts/b, which is no controller"),
        (
            Files {
                identity: None,
                ..other.files()
            },
            "showed no certificate",
        ),
    ] {
        let credentials = Credentials::of_files(files).unwrap();
        let any = Expect::AnyHost(Default::default());
        let client = tls::Client::new(move || credentials.client(any.clone()));
        // In TLS 1.3 a client learns what the server thinks of it with the first answer.
        let channel = connect::secured(&address, Some(&client), PATIENCE).await;
        if let Ok(channel) = channel {
            let mut client = api::node::node_agent_client::NodeAgentClient::new(channel);
            let asked = client.get_host(api::node::GetHostRequest {}).await;
            assert!(asked.is_err(), "{asked:?}");
        }
        says(&machine.log(), why);
    }
    // Its own controller is not disturbed.
    c.connected().await;

    // By TLS nobody is let in for being there, and certificates have roles.
    let authorities = other.files().authorities;
    let nobody = Files {
        identity: None,
        authorities: authorities.clone(),
    };
    let mut nobody = HostsClient::new(c.remote(nobody).await);
    let refused = nobody.list_hosts(pb::ListHostsRequest::default()).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
    let made = pki::Request::new().unwrap();
    let request = pb::IssueUserCertificateRequest {
        user: "alice".into(),
        roles: vec!["viewer".into()],
        request: made.der,
        ..Default::default()
    };
    let issued = c.certificates().issue_user_certificate(request).await;
    let [chain, key] = ["alice.pem", "alice.key"].map(|name| dir.path().join(name));
    std::fs::write(&chain, issued.unwrap().into_inner().chain).unwrap();
    std::fs::write(&key, made.key_pem).unwrap();
    let alice = Files {
        identity: Some((chain, key)),
        authorities,
    };
    let alice = c.remote(alice).await;
    let mut hosts = HostsClient::new(alice.clone());
    let listed = hosts.list_hosts(pb::ListHostsRequest::default()).await;
    assert_eq!(listed.unwrap().into_inner().hosts.len(), 2);
    let refused = CertificatesClient::new(alice)
        .create_host_token(pb::CreateHostTokenRequest::default())
        .await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_certificate_is_refused_and_a_new_one_is_taken_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let c = Secured::start(dir.path(), &["--certificate-lifetime", "4"]).await;
    let mut machine = Machine::new(dir.path(), "a");
    let name = machine.joined(&c, &c.token("", 0).await);
    let identity = machine.files().read().unwrap().identity.unwrap();
    let (_, end) = identity.validity();
    let over = || (SystemTime::now() > end + std::time::Duration::from_secs(1)).then_some(());
    poll("its end", over);
    machine.start();
    says(&machine.log(), "cannot renew the certificate");
    says(&dir.path().join("controller.log"), "has expired");
    assert!(c.hosts().await.iter().all(|host| !host.connected));

    // A controller that gives longer ones; the agent goes on.
    drop(c);
    let c = Secured::start(dir.path(), &[]).await;
    machine.joined(&c, &c.token(&name, 0).await);
    assert_eq!(c.connected().await.name, name);
}

#[tokio::test(flavor = "multi_thread")]
async fn host_that_joins_again_leaves_no_certificate_behind() {
    let dir = tempfile::tempdir().unwrap();
    let c = Secured::start(dir.path(), &[]).await;
    let mut machine = Machine::new(dir.path(), "a");
    let name = machine.joined(&c, &c.token("", 0).await);
    machine.start();
    c.connected().await;
    let stolen = dir.path().join("stolen.pem");
    std::fs::copy(machine.certificate(), &stolen).unwrap();
    assert_eq!(machine.joined(&c, &c.token(&name, 0).await), name);

    // Whoever has the old one gets no new one for it,
    let files = Files {
        identity: Some((stolen.clone(), stolen.clone())),
        ..machine.files()
    };
    let mut renewing = CertificatesClient::new(c.remote(files).await);
    let request = pki::Request::new().unwrap().der;
    let request = pb::RenewHostCertificateRequest { request };
    let refused = renewing.renew_host_certificate(request).await.unwrap_err();
    assert!(refused.message().contains("counts no more"), "{refused}");
    // and is not taken for the host, which is believed with its new one.
    let answers = |hosts: &Vec<pb::Host>| hosts.iter().any(|host| host.connected);
    poll_async("the host with its new certificate", || c.hosts(), answers).await;
    machine.stop();
    std::fs::copy(&stolen, machine.certificate()).unwrap();
    machine.start();
    says(
        &dir.path().join("controller.log"),
        "was withdrawn when the host was deleted or joined again",
    );
    let away = |hosts: &Vec<pb::Host>| hosts.iter().all(|host| !host.connected);
    poll_async("the old certificate is refused", || c.hosts(), away).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_end_with_the_certificate_and_with_its_authority() {
    let dir = tempfile::tempdir().unwrap();
    let c = Secured::start(dir.path(), &[]).await;
    let authorities = dir.path().join("authorities.pem");
    let short = c.user(dir.path(), "short", 8).await;
    let long = c.user(dir.path(), "long", 3600).await;
    std::fs::write(&authorities, &short.0).unwrap();
    let files = |name: &str| Files {
        identity: Some((
            dir.path().join(format!("{name}.pem")),
            dir.path().join(format!("{name}.key")),
        )),
        authorities: authorities.clone(),
    };
    let mut ending = watch(c.remote(files("short")).await).await;
    let mut going_on = watch(c.remote(files("long")).await).await;
    // It ends by itself, and not before its certificate does.
    let over = tokio::time::timeout(PATIENCE, async {
        while let Ok(Some(_)) = ending.message().await {}
    });
    over.await.expect("the stream ends with its certificate");
    // Certificates tell whole seconds.
    assert!(SystemTime::now() + std::time::Duration::from_secs(1) >= short.1);
    assert!(SystemTime::now() < long.1);

    // The other one goes on until its authority is deleted.
    let rotated = c
        .certificates()
        .rotate_authority(pb::RotateAuthorityRequest {})
        .await;
    rotated.unwrap();
    let told = tokio::time::timeout(PATIENCE, async {
        let event =
            |message: &pb::WatchEventsResponse| matches!(message.message, Some(Message::Event(_)));
        while !event(&going_on.message().await.unwrap().expect("it goes on")) {}
    });
    told.await.expect("events go on");
    let first = c
        .certificates()
        .list_authorities(pb::ListAuthoritiesRequest {})
        .await;
    let first = first.unwrap().into_inner().authorities.remove(0);
    let request = pb::DeleteAuthorityRequest {
        name: first.name,
        force: true,
    };
    c.certificates().delete_authority(request).await.unwrap();
    let over = tokio::time::timeout(PATIENCE, async {
        while let Ok(Some(_)) = going_on.message().await {}
    });
    over.await.expect("the stream ends with its authority");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_authorities_are_exchanged_under_running_connections() {
    let dir = tempfile::tempdir().unwrap();
    let c = Secured::start(dir.path(), &["--certificate-lifetime", "20"]).await;
    let mut machine = Machine::new(dir.path(), "a");
    machine.joined(&c, &c.token("", 0).await);
    let first = std::fs::read(machine.certificate()).unwrap();
    machine.start();
    let host = c.connected().await;
    let request = pb::RotateAuthorityRequest {};
    let rotated = c.certificates().rotate_authority(request).await;
    let rotated = rotated.unwrap().into_inner();

    // The host renews in time, and is then certified by the new authority.
    let authorities = || async {
        let request = pb::ListAuthoritiesRequest {};
        let listed = c.certificates().list_authorities(request).await;
        listed.unwrap().into_inner().authorities
    };
    let moved = |all: &Vec<pb::Authority>| all.len() == 2 && all[0].hosts == 0 && all[1].hosts == 1;
    let all = poll_async("the host's next certificate", authorities, moved).await;
    assert!(all[1].active && all[1].name == rotated.name, "{all:?}");
    let request = pb::DeleteAuthorityRequest {
        name: all[1].name.clone(),
        force: false,
    };
    let refused = c
        .certificates()
        .delete_authority(request)
        .await
        .unwrap_err();
    assert_eq!(reason(&refused).as_deref(), Some("AUTHORITY_ACTIVE"));
    let renewed = || {
        let now = std::fs::read(machine.certificate()).unwrap();
        (now != first).then_some(())
    };
    poll("the host keeps it", renewed);
    let request = pb::DeleteAuthorityRequest {
        name: all[0].name.clone(),
        force: false,
    };
    c.certificates().delete_authority(request).await.unwrap();
    // Connections go on with what either end has renewed, and new ones are of the new authority alone.
    c.connected().await;
    drop(c);
    let c = Secured::start(dir.path(), &["--certificate-lifetime", "20"]).await;
    assert_eq!(c.connected().await.name, host.name);
    assert_eq!(c.token("", 0).await.ca_hash, rotated.sha256);
}
