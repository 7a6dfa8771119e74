//! The host's certificate: how it is got with a token, where it is, and how the next one is got in time.
//!
//! ```text
//! STATE_DIR/tls/host.pem          key and certificate, in one file: they change together
//! STATE_DIR/tls/authorities.pem   who makes controllers' certificates
//! STATE_DIR/tls/controllers       where to renew, one address on a line
//! STATE_DIR/tls/joining           the id and key of a host that has no answer yet: asking again is safe
//! ```

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, anyhow, bail, ensure};
use api::{
    controller::{
        IssuedCertificate, JoinHostRequest, RenewHostCertificateRequest,
        certificates_client::CertificatesClient,
    },
    listen::Address,
    tls,
};
use pki::{Clients, Credentials, Expect, Files, Held, Identity, Name, Request};
use tonic::{Response, Status, transport::Channel};

use crate::{
    cli::{Cli, JoinArgs},
    host,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// A part of its lifetime, out of 100, after which a certificate is renewed.
const RENEW_AFTER: u32 = 50;
/// Clocks are set; so long is slept at most.
const MAX_SLEEP: Duration = Duration::from_secs(60);
/// Between two attempts to renew: one in so many parts of the lifetime, but within these bounds.
const ATTEMPTS: u32 = 40;
const RETRY_INTERVALS: (Duration, Duration) =
    (Duration::from_millis(200), Duration::from_secs(600));

/// What the agent serves with, if TLS is to be spoken; the certificate is renewed from now on, if it is
/// ours to renew.
///
/// # Errors
/// When there is nothing to show, or others would get in.
pub(crate) fn serve(cli: &Cli, state_dir: &Path) -> anyhow::Result<Option<tls::Server>> {
    let listen = &cli.listen;
    ensure!(
        listen.is_private() || cli.insecure,
        "--listen {listen}: without TLS whoever is on that network can run VMs here; have this host join (node-agent join --help) and write --listen https://{listen}, or add --insecure"
    );
    if !listen.is_tls() {
        return Ok(None);
    }
    let own = Kept::of(state_dir);
    let given = (&cli.tls_cert, &cli.tls_key, &cli.client_ca);
    let files = match given {
        (Some(chain), Some(key), Some(authorities)) => Files {
            identity: Some((chain.clone(), key.clone())),
            authorities: authorities.clone(),
        },
        _ => own.files(),
    };
    let credentials = Credentials::of_files(files).context(
        "this host has no certificate; have it join first (node-agent join --help), or give --tls-cert, --tls-key and --client-ca",
    )?;
    if given.0.is_none() {
        let shown = credentials.now().identity.as_ref().and_then(Identity::name);
        let id = host::kept_id(&state_dir.join(host::ID_FILE))?;
        let name = Name::Host(id);
        ensure!(
            shown.as_ref() == Some(&name),
            "the certificate in {} is not that of {name}; have this host join again",
            own.0.display()
        );
        tokio::spawn(renew(own, credentials.clone()));
    }
    let known = credentials.clone();
    let server = tls::Server::new(move || credentials.server(Clients::Controllers));
    Ok(Some(server.watching(move |chain| {
        known.watch_client(Clients::Controllers, chain)
    })))
}

/// Joins with a token.
///
/// # Errors
/// When the controller is not the one that the hash names, or does not let this host in.
pub(crate) async fn join(args: &JoinArgs) -> anyhow::Result<()> {
    ensure!(
        args.address.is_tls(),
        "--address {}: controllers reach hosts by TLS: https://HOST:PORT",
        args.address
    );
    ensure!(
        args.controllers.iter().all(Address::is_tls),
        "--controller is where it speaks TLS: https://HOST:PORT"
    );
    let state_dir = std::path::absolute(&args.state_dir)?;
    let kept = Kept::of(&state_dir);
    kept.make()?;
    let id_file = state_dir.join(host::ID_FILE);
    let fresh = !id_file.exists();
    let (id, request) = kept.joining(&id_file)?;
    let found = Arc::new(OnceLock::new());
    let hash = args.ca_hash.to_ascii_lowercase();
    let expect = Expect::Pinned(hash, found.clone());
    let nobody = Held::default().credentials();
    let client = tls::Client::new(move || nobody.client(expect.clone()));
    let asked = JoinHostRequest {
        token: args.token.clone(),
        host_id: id,
        fresh,
        address: args.address.to_string(),
        request: request.der.clone(),
    };
    let answer = call(&args.controllers, &client, |mut client| {
        let asked = asked.clone();
        async move { client.join_host(asked).await }
    });
    let answer = answer.await?;
    let host = answer.host;
    let id = host.trim_start_matches("hosts/").to_owned();
    let issued = answer.certificate.unwrap_or_default();
    if fresh {
        write(&id_file, id.as_bytes())?;
    }
    write(&kept.controllers(), lines(&args.controllers).as_bytes())?;
    kept.keep(&issued, &request, &Name::Host(id))?;
    let _ = fs::remove_file(kept.unanswered());
    println!("joined as {host}");
    Ok(())
}

/// Gets the next certificate when half of the present one's lifetime has passed, for ever.
async fn renew(kept: Kept, credentials: Credentials) {
    loop {
        let Some(identity) = credentials.now().identity.clone() else {
            return;
        };
        let due = identity.after(RENEW_AFTER);
        if let Ok(left) = due.duration_since(SystemTime::now()) {
            tokio::time::sleep(left.min(MAX_SLEEP)).await;
            continue;
        }
        let (begins, ends) = identity.validity();
        match renewed(&kept, &credentials, &identity).await {
            Ok(()) => tracing::info!("the host's certificate was renewed"),
            Err(error) => {
                let left = ends.duration_since(SystemTime::now()).unwrap_or_default();
                let error = format!("{error:#}");
                tracing::warn!(
                    error,
                    left_s = left.as_secs(),
                    "cannot renew the certificate"
                );
                let lifetime = ends.duration_since(begins).unwrap_or_default();
                let pause = lifetime / ATTEMPTS;
                tokio::time::sleep(pause.clamp(RETRY_INTERVALS.0, RETRY_INTERVALS.1)).await;
            }
        }
    }
}

async fn renewed(kept: &Kept, credentials: &Credentials, present: &Identity) -> anyhow::Result<()> {
    let name = present.name().context("the certificate names nobody")?;
    let request = Request::new()?;
    let known = credentials.clone();
    let client = tls::Client::new(move || known.client(Expect::Controller));
    let path = kept.controllers();
    let controllers = fs::read_to_string(&path);
    let controllers = controllers.with_context(|| format!("reading {}", path.display()))?;
    let controllers: Result<Vec<Address>, _> = controllers.lines().map(str::parse).collect();
    let controllers = controllers.with_context(|| format!("reading {}", path.display()))?;
    let asked = RenewHostCertificateRequest {
        request: request.der.clone(),
    };
    let issued = call(&controllers, &client, |mut client| {
        let asked = asked.clone();
        async move { client.renew_host_certificate(asked).await }
    });
    kept.keep(&issued.await?, &request, &name)
}

/// Asks one controller after the other until one answers.
async fn call<T, F>(
    controllers: &[Address],
    tls: &tls::Client,
    ask: impl Fn(CertificatesClient<Channel>) -> F,
) -> anyhow::Result<T>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let mut last = anyhow!("no controller is known");
    for controller in controllers {
        let channel = api::connect::secured(controller, Some(tls), CONNECT_TIMEOUT).await;
        let channel = match channel {
            Ok(channel) => channel,
            Err(error) => {
                last = error.into();
                continue;
            }
        };
        let asked = ask(CertificatesClient::new(channel));
        match tokio::time::timeout(CALL_TIMEOUT, asked).await {
            Ok(Ok(answer)) => return Ok(answer.into_inner()),
            // It answered; another one knows the same.
            Ok(Err(status)) if api::errors::reason(&status).is_some() => {
                bail!("{controller}: {}", api::errors::explain(&status));
            }
            Ok(Err(status)) => {
                let why = tls::distrust(&status);
                let why = why.unwrap_or_else(|| api::errors::explain(&status));
                last = anyhow!("{controller}: {why}");
            }
            Err(_) => last = anyhow!("{controller} did not answer in time"),
        }
    }
    Err(last)
}

fn lines(addresses: &[Address]) -> String {
    let lines = addresses.iter().map(|address| format!("{address}\n"));
    lines.collect()
}

/// Where it is kept.
struct Kept(PathBuf);

impl Kept {
    fn of(state_dir: &Path) -> Self {
        Self(state_dir.join("tls"))
    }

    fn host(&self) -> PathBuf {
        self.0.join("host.pem")
    }

    fn authorities(&self) -> PathBuf {
        self.0.join("authorities.pem")
    }

    fn controllers(&self) -> PathBuf {
        self.0.join("controllers")
    }

    fn unanswered(&self) -> PathBuf {
        self.0.join("joining")
    }

    fn files(&self) -> Files {
        Files {
            identity: Some((self.host(), self.host())),
            authorities: self.authorities(),
        }
    }

    fn make(&self) -> anyhow::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
            .with_context(|| format!("making {}", self.0.display()))
    }

    /// The id and key to join with: those of an attempt that had no answer, or new ones.
    fn joining(&self, id_file: &Path) -> anyhow::Result<(String, Request)> {
        let unanswered = fs::read_to_string(self.unanswered()).unwrap_or_default();
        if let Some((id, key)) = unanswered.split_once('\n')
            && let Ok(request) = Request::again(key)
        {
            return Ok((id.to_owned(), request));
        }
        let id = match fs::read_to_string(id_file) {
            Ok(id) => id.trim().to_owned(),
            Err(_) => uuid::Uuid::new_v4().to_string(),
        };
        let request = Request::new()?;
        let text = format!("{id}\n{}", request.key_pem);
        write(&self.unanswered(), text.as_bytes())?;
        Ok((id, request))
    }

    /// Keeps what a controller made, if it is what was asked for. Whom to believe comes first: the
    /// certificate may be of a new authority.
    fn keep(
        &self,
        issued: &IssuedCertificate,
        request: &Request,
        name: &Name,
    ) -> anyhow::Result<()> {
        let identity = Identity::from_pem(issued.chain.as_bytes(), request.key_pem.as_bytes());
        let identity = identity.context("the controller's answer is no certificate")?;
        ensure!(
            identity.name().as_ref() == Some(name),
            "the controller's answer is not the certificate of {name}"
        );
        write(&self.authorities(), issued.authorities.as_bytes())?;
        let both = format!("{}{}", request.key_pem, issued.chain);
        write(&self.host(), both.as_bytes())
    }
}

/// All of it or nothing, for this user alone.
fn write(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let written = || -> io::Result<()> {
        let partial = path.with_extension("partial");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&partial)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&partial, path)?;
        fs::File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    written().with_context(|| format!("writing {}", path.display()))
}
