//! Calls that exchange a host's agent.

use std::time::Duration;

use api::node::agents_client::AgentsClient;
use api::node::*;
use tonic::Status;

use super::{Node, call, deadline};

/// The host runs three programs first, each with a deadline of its own.
const CHECK_TIMEOUT: Duration = Duration::from_secs(60);

impl Node {
    /// Has a binary checked, and the agent exchanged for it.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn upgrade_agent(
        &self,
        request: UpgradeAgentRequest,
    ) -> Result<AgentUpgrade, Status> {
        let mut client = AgentsClient::new(self.connected()?);
        let answer = tokio::time::timeout(CHECK_TIMEOUT, client.upgrade_agent(request)).await;
        let answer = answer.map_err(|_| deadline("UpgradeAgent"))?;
        answer.map(tonic::Response::into_inner)
    }

    /// How the last exchange went.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn get_agent_upgrade(&self) -> Result<AgentUpgrade, Status> {
        let mut client = AgentsClient::new(self.connected()?);
        let request = GetAgentUpgradeRequest {};
        call("GetAgentUpgrade", client.get_agent_upgrade(request)).await
    }

    /// An agent on trial may stay.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn confirm_agent_upgrade(&self, upgrade_id: &str) -> Result<AgentUpgrade, Status> {
        let mut client = AgentsClient::new(self.connected()?);
        let upgrade_id = upgrade_id.to_owned();
        let request = ConfirmAgentUpgradeRequest { upgrade_id };
        call("ConfirmAgentUpgrade", client.confirm_agent_upgrade(request)).await
    }
}
