//! The `HostUpgrades` service.

use api::controller::host_upgrades_server::HostUpgrades;
use api::controller::{Operation, UpgradeHostsRequest};
use api::validate::{self, HostSelection};
use futures_util::StreamExt as _;
use tonic::{Request, Response, Status};

use super::{Api, command_status};
use crate::{commands, host_upgrades};

/// Hosts that check binaries at one time.
const MAX_CHECKS: usize = 32;

#[tonic::async_trait]
impl HostUpgrades for Api {
    async fn upgrade_hosts(
        &self,
        request: Request<UpgradeHostsRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let selection = validate::upgrade_hosts_request(&request)?;
        if request.validate_only {
            return Ok(Response::new(self.check_hosts(&selection, &request).await?));
        }
        let operation = commands::upgrade_hosts(&self.store, &selection, &request).await;
        operation.map(Response::new).map_err(command_status)
    }
}

impl Api {
    /// What every host says to the binaries.
    async fn check_hosts(
        &self,
        selection: &HostSelection,
        request: &UpgradeHostsRequest,
    ) -> Result<Operation, Status> {
        let ids = commands::selected_hosts(&self.store, selection).await;
        let ids = ids.map_err(command_status)?;
        let answers = futures_util::stream::iter(ids.clone()).map(|id| async move {
            let checked = match self.hosts.reach(&id) {
                Ok(node) => host_upgrades::check(&node, request).await,
                Err(status) => Err(status.message().to_owned()),
            };
            (id, checked)
        });
        let answers: Vec<_> = answers.buffered(MAX_CHECKS).collect().await;
        let (mut findings, mut refusals) = (Vec::new(), Vec::new());
        for (id, checked) in answers {
            match checked {
                Ok(finding) => findings.push(format!("{id}: {finding}")),
                Err(why) => refusals.push(format!("{id}: {why}")),
            }
        }
        Ok(commands::checked_upgrade(&ids, findings, &refusals))
    }
}
