//! The service `Agents`.

use std::sync::Arc;
use std::time::Duration;

use api::node::agents_server::Agents;
use api::node::{
    AgentUpgrade, ConfirmAgentUpgradeRequest, GetAgentUpgradeRequest, Job, JobState,
    UpgradeAgentRequest, VmPhase,
};
use api::validate;
use lease::Stage;
use tonic::{Request, Response, Status};

use crate::{
    agent::Agent,
    leases,
    successor::{DEFAULT_CONFIRM_WITHIN, ExchangeError, Successor},
    vm::error_chain,
};

/// How long a host is without an agent in an exchange, besides the trial: for two to end and one to begin.
const AWAY_BESIDES: Duration = Duration::from_secs(8);
/// Less than this no agent can come up in, whatever the lease.
const SHORTEST_TRIAL: Duration = Duration::from_secs(5);

/// Serves a [`Successor`].
#[derive(Clone)]
pub(crate) struct AgentsService {
    agent: Arc<Agent>,
    successor: Arc<Successor>,
}

impl AgentsService {
    /// For this agent.
    pub(crate) fn new(agent: Arc<Agent>, successor: Arc<Successor>) -> Self {
        Self { agent, successor }
    }

    /// What a new agent that renews nothing may have, so that the old one is back before VMs under the
    /// host's lease stand still.
    fn before_the_lease_ends(&self) -> Option<Duration> {
        let Stage::Held { until } = self.agent.env.leases.stage() else {
            return None;
        };
        let left = leases::now().until(until);
        Some(left.saturating_sub(AWAY_BESIDES).max(SHORTEST_TRIAL))
    }

    /// What would have to begin anew if the agent ended now.
    async fn busy(&self) -> Option<String> {
        let is_under_way = |job: &Job| {
            !matches!(
                job.state(),
                JobState::Done | JobState::Failed | JobState::Cancelled
            )
        };
        let jobs = self.agent.jobs.list();
        if let Some(job) = jobs.iter().find(|job| is_under_way(job)) {
            return Some(format!("the job {} ({})", job.job_id, job.kind));
        }
        for vm in self.agent.all().await {
            let status = vm.status();
            let word = match status.phase() {
                VmPhase::Starting => "started",
                VmPhase::Stopping => "stopped",
                _ => continue,
            };
            return Some(format!("VM {} is being {word}", status.id));
        }
        None
    }
}

#[tonic::async_trait]
impl Agents for AgentsService {
    async fn upgrade_agent(
        &self,
        request: Request<UpgradeAgentRequest>,
    ) -> Result<Response<AgentUpgrade>, Status> {
        let mut request = request.into_inner();
        validate::upgrade_agent_request(&request)?;
        if let Some(left) = self.before_the_lease_ends() {
            let wished = match request.confirm_within_ms {
                0 => DEFAULT_CONFIRM_WITHIN,
                ms => Duration::from_millis(ms.into()),
            };
            let within = wished.min(left).as_millis();
            request.confirm_within_ms = u32::try_from(within).unwrap_or(u32::MAX);
        }
        let upgrade = self.successor.upgrade(&request, self.busy());
        Ok(Response::new(upgrade.await?))
    }

    async fn get_agent_upgrade(
        &self,
        _: Request<GetAgentUpgradeRequest>,
    ) -> Result<Response<AgentUpgrade>, Status> {
        Ok(Response::new(self.successor.status()))
    }

    async fn confirm_agent_upgrade(
        &self,
        request: Request<ConfirmAgentUpgradeRequest>,
    ) -> Result<Response<AgentUpgrade>, Status> {
        let id = request.into_inner().upgrade_id;
        Ok(Response::new(self.successor.confirm(&id)?))
    }
}

impl From<ExchangeError> for Status {
    fn from(error: ExchangeError) -> Self {
        Self::new(error.code(), error_chain(&error))
    }
}
