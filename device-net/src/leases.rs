//! The service `Leases`, and the clock by which leased NICs stop: see [`crate::guard`].

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use api::boottime::LOOK_INTERVAL;
use api::daemon::{DeviceTable, blocking};
use api::device::leases_server::Leases;
use api::device::{AllowIoRequest, AllowIoResponse};
use api::validate;
use tonic::{Request, Response, Status};

use crate::guard::Guard;
use crate::nic::ServedNic;

/// See the module's description.
pub(crate) struct LeaseService {
    pub(crate) table: Arc<DeviceTable>,
    pub(crate) clock: Arc<Clock>,
}

#[tonic::async_trait]
impl Leases for LeaseService {
    async fn allow_io(
        &self,
        request: Request<AllowIoRequest>,
    ) -> Result<Response<AllowIoResponse>, Status> {
        let request = request.into_inner();
        validate::allow_io_request(&request)?;
        let clock = Arc::clone(&self.clock);
        blocking(&self.table, move |table| {
            let mut nics = table.all_attached::<ServedNic>();
            match request.ids.is_empty() {
                true => nics.retain(|(_, nic)| nic.state().guard.is_leased()),
                false => {
                    let find = |id: &String| Ok((id.clone(), table.attached::<ServedNic>(id)?));
                    nics = request
                        .ids
                        .iter()
                        .map(find)
                        .collect::<Result<_, Status>>()?;
                }
            }
            for (id, nic) in &nics {
                if !nic.state().guard.is_leased() {
                    return Err(Status::failed_precondition(format!(
                        "device {id:?} was not attached as leased: it needs no leave"
                    )));
                }
                nic.state().guard.extend_lease(request.until_boottime_ns);
            }
            // The new end may come before the clock's next look.
            clock.look();
            Ok(AllowIoResponse {
                devices: nics.len() as u32,
            })
        })
        .await
    }
}

/// Ends the time of leased NICs, on a thread that there is once there is one of these.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    watched: Mutex<Watched>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Watched {
    guards: Vec<Weak<Guard>>,
    /// There is the thread.
    runs: bool,
}

impl Clock {
    /// Looks after a NIC's lease, for as long as there is the NIC.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` when there can be no thread.
    pub(crate) fn watch(self: &Arc<Self>, guard: &Arc<Guard>) -> Result<(), Status> {
        let mut watched = self.watched();
        if !watched.runs {
            let clock = Arc::clone(self);
            let thread = thread::Builder::new().name("leases".into());
            thread.spawn(move || clock.run()).map_err(|error| {
                Status::resource_exhausted(format!("cannot start a thread for leases: {error}"))
            })?;
            watched.runs = true;
        }
        watched.guards.push(Arc::downgrade(guard));
        self.more.notify_one();
        Ok(())
    }

    /// Has the thread look at leases now.
    fn look(&self) {
        let _watched = self.watched();
        self.more.notify_one();
    }

    fn run(&self) {
        let mut watched = self.watched();
        loop {
            let mut pause = LOOK_INTERVAL;
            watched.guards.retain(|guard| {
                let Some(guard) = guard.upgrade() else {
                    return false;
                };
                // Whoever extends one that is over sees to it.
                if let Some(left) = guard.heed_lease().filter(|left| !left.is_zero()) {
                    pause = pause.min(left);
                }
                true
            });
            watched = match watched.guards.is_empty() {
                true => self
                    .more
                    .wait(watched)
                    .unwrap_or_else(PoisonError::into_inner),
                false => {
                    let waited = self.more.wait_timeout(watched, pause);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
