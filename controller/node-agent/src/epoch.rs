//! Whose commands this host obeys. Several controllers share a store and one of them leads; each leader
//! has an epoch that is higher than those before, and its commands carry it. The highest one seen is kept
//! on disk: a leader that was frozen, cut off or forgotten does nothing here once its successor was heard,
//! whatever it still believes. A controller with a store of its own sends none, and is obeyed until the
//! first epoch is seen.
//!
//! Looking (`Get...`, `List...`, `Watch...`) is free to all.
//!
//! Commands wait for their turn, and meanwhile a newer leader may be heard. So whoever carries one out asks
//! again then: see [`Leader`].

use std::{
    convert::Infallible,
    fs::{self, File},
    future::{Ready, ready},
    io::{self, Write as _},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use tonic::{
    Code, Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
};

use crate::faults::Either;

/// Decimal; the controller's `store::leader::EPOCH_METADATA`.
const METADATA: &str = "mortise-epoch";
const FILE: &str = "epoch";

tokio::task_local! {
    static LEADER: Leader;
}

/// Who gave a command.
#[derive(Clone, Debug)]
pub(crate) struct Leader {
    epochs: Arc<Epochs>,
    epoch: u64,
}

/// Another controller leads by the time that a command's turn has come.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the command is of epoch {epoch}; while it waited for its turn epoch {newest} was heard, which alone is obeyed now"
)]
pub(crate) struct Superseded {
    /// Of the command.
    pub(crate) epoch: u64,
    /// As it is.
    pub(crate) newest: u64,
}

impl Leader {
    /// Who gave the command that this task carries out; `None` for what the host does by itself.
    pub(crate) fn of_this_task() -> Option<Self> {
        LEADER.try_with(Self::clone).ok()
    }

    /// # Errors
    /// A newer one was heard.
    pub(crate) fn still_leads(&self) -> Result<(), Superseded> {
        let newest = *self.epochs.newest();
        match self.epoch < newest {
            true => Err(Superseded {
                epoch: self.epoch,
                newest,
            }),
            false => Ok(()),
        }
    }
}

/// Asks again who leads, for the command that this task carries out. For who has got the lock that it
/// waited for.
///
/// # Errors
/// Another one does by now.
pub(crate) fn recheck() -> Result<(), Superseded> {
    Leader::of_this_task().map_or(Ok(()), |leader| leader.still_leads())
}

/// The highest epoch seen.
#[derive(Debug)]
pub(crate) struct Epochs {
    file: PathBuf,
    newest: Mutex<u64>,
}

impl Epochs {
    /// That of an earlier run, in the agent's state directory.
    ///
    /// # Errors
    /// When the file cannot be read: whom to obey is not known then.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Arc<Self>> {
        let file = state_dir.join(FILE);
        let newest = match fs::read_to_string(&file) {
            Ok(text) => text.trim().parse().map_err(|_| {
                let words = format!("{} holds no number: {text:?}", file.display());
                io::Error::new(io::ErrorKind::InvalidData, words)
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        Ok(Arc::new(Self {
            file,
            newest: Mutex::new(newest),
        }))
    }

    /// `inner`, for commands of the newest leader alone.
    pub(crate) fn guard<S>(self: &Arc<Self>, inner: S) -> Obedient<S> {
        Obedient {
            inner,
            epochs: self.clone(),
        }
    }

    /// Whether a command may be obeyed, and of which epoch it is; 0 for none. A higher one than before is on
    /// disk when this returns.
    fn admit(&self, offered: Option<&str>) -> Result<u64, Status> {
        let mut newest = self.newest();
        let Some(text) = offered else {
            return match *newest {
                0 => Ok(0),
                newest => Err(self.refusal(
                    newest,
                    "names no epoch, so it comes from a controller with a store of its own",
                )),
            };
        };
        let offered: u64 = text
            .parse()
            .map_err(|_| Status::invalid_argument(format!("{METADATA}: {text:?} is no number")))?;
        if offered < *newest {
            let words = format!("is of epoch {offered}, whose leader was replaced");
            return Err(self.refusal(*newest, &words));
        }
        if offered > *newest {
            self.save(offered).map_err(|error| {
                Status::unavailable(format!("cannot write {}: {error}", self.file.display()))
            })?;
            tracing::info!(epoch = offered, "another controller leads");
            *newest = offered;
        }
        Ok(offered)
    }

    fn newest(&self) -> MutexGuard<'_, u64> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refusal(&self, newest: u64, why: &str) -> Status {
        let message = format!(
            "this host obeys epoch {newest}, and the command {why}; if the fleet's state was replaced on purpose, remove {} and try again",
            self.file.display()
        );
        let metadata = [("newest", newest.to_string())];
        let metadata = metadata
            .each_ref()
            .map(|(key, value)| (*key, value.as_str()));
        // Not final: whoever leads by right asks again.
        api::errors::status(Code::Unavailable, "STALE_EPOCH", message, &metadata)
    }

    fn save(&self, epoch: u64) -> io::Result<()> {
        let partial = self.file.with_extension("partial");
        let mut file = File::create(&partial)?;
        writeln!(file, "{epoch}")?;
        file.sync_all()?;
        fs::rename(&partial, &self.file)?;
        File::open(self.file.parent().unwrap_or(Path::new("/")))?.sync_all()
    }
}

/// See [`Epochs::guard`].
#[derive(Clone, Debug)]
pub(crate) struct Obedient<S> {
    inner: S,
    epochs: Arc<Epochs>,
}

impl<S: NamedService> NamedService for Obedient<S> {
    const NAME: &'static str = S::NAME;
}

type Answer = Result<http::Response<Body>, Infallible>;

impl<S> Service<http::Request<Body>> for Obedient<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Either<Ready<Answer>, Pin<Box<dyn Future<Output = Answer> + Send>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if is_look(request.uri().path()) {
            return Either::Right(Box::pin(self.inner.call(request)));
        }
        let offered = request.headers().get(METADATA);
        let offered = offered.map(|value| value.to_str().unwrap_or_default());
        match self.epochs.admit(offered) {
            Ok(epoch) => {
                let epochs = Arc::clone(&self.epochs);
                let work = LEADER.scope(Leader { epochs, epoch }, self.inner.call(request));
                Either::Right(Box::pin(work))
            }
            Err(status) => Either::Left(ready(Ok(status.into_http()))),
        }
    }
}

/// Of `/package.Service/Method`.
fn is_look(path: &str) -> bool {
    let method = path.rsplit('/').next().unwrap_or_default();
    ["Get", "List", "Watch"]
        .iter()
        .any(|verb| method.starts_with(verb))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Who leads with this epoch, as soon as that is heard.
    pub(crate) fn leader(epochs: &Arc<Epochs>, epoch: u64) -> Leader {
        epochs.admit(Some(&epoch.to_string())).unwrap();
        let epochs = Arc::clone(epochs);
        Leader { epochs, epoch }
    }

    /// Answers with the HTTP status 200 if whoever asks still leads when the other one was heard.
    #[derive(Clone)]
    struct Slow(Arc<Epochs>, &'static str);

    impl Service<http::Request<Body>> for Slow {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Answer> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<Body>) -> Self::Future {
            let Self(epochs, other) = self.clone();
            Box::pin(async move {
                recheck().unwrap();
                epochs.admit(Some(other)).unwrap();
                let mut answer = http::Response::default();
                if recheck().is_err() {
                    *answer.status_mut() = http::StatusCode::CONFLICT;
                }
                Ok(answer)
            })
        }
    }

    #[tokio::test]
    async fn command_that_waits_learns_of_a_newer_leader() {
        let dir = tempfile::tempdir().unwrap();
        let epochs = Epochs::open(dir.path()).unwrap();
        assert_eq!(recheck(), Ok(()), "what nobody asked for is not refused");
        for (other, status) in [
            ("7", http::StatusCode::OK),
            ("8", http::StatusCode::CONFLICT),
        ] {
            let request = http::Request::post("/mortise.node.v1.NodeAgent/ApplyVm")
                .header(METADATA, "7")
                .body(Body::empty())
                .unwrap();
            let slow = Slow(Arc::clone(&epochs), other);
            let answer = epochs.guard(slow).call(request).await.unwrap();
            assert_eq!(answer.status(), status, "{other}");
        }
        assert_eq!(recheck(), Ok(()));
    }

    #[test]
    fn epochs_never_go_backwards_not_even_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let epochs = Epochs::open(dir.path()).unwrap();
        epochs.admit(None).unwrap();
        epochs.admit(Some("7")).unwrap();
        epochs.admit(Some("7")).unwrap();
        for stale in [Some("6"), None] {
            let error = epochs.admit(stale).unwrap_err();
            assert_eq!(api::errors::reason(&error).as_deref(), Some("STALE_EPOCH"));
            assert_eq!(error.code(), Code::Unavailable);
        }
        let epochs = Epochs::open(dir.path()).unwrap();
        epochs.admit(Some("6")).unwrap_err();
        epochs.admit(Some("8")).unwrap();
        epochs.admit(Some("7")).unwrap_err();
        let error = epochs.admit(Some("-1")).unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
    }

    #[test]
    fn damaged_record_is_no_licence() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "x").unwrap();
        assert!(Epochs::open(dir.path()).is_err());
    }

    #[test]
    fn looking_is_told_from_commanding() {
        assert!(is_look("/mortise.node.v1.NodeAgent/GetHost"));
        assert!(is_look("/mortise.node.v1.NodeAgent/WatchVms"));
        assert!(!is_look("/mortise.node.v1.NodeAgent/ApplyVm"));
        assert!(!is_look("/mortise.node.v1.NodeAgent/SetVolumeKey"));
    }
}
