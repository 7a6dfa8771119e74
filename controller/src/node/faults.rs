//! Calls for fault experiments: what to do wrong, and how devices take it.

use api::node::devices_client::DevicesClient;
use api::node::faults_client::FaultsClient;
use api::node::*;
use tonic::Status;

use super::{Node, call};

impl Node {
    /// Arms faults, and renews the time to live of all that the experiment has.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn arm_faults(&self, request: ArmFaultsRequest) -> Result<Vec<FaultStatus>, Status> {
        let mut client = FaultsClient::new(self.connected()?);
        let answer = call("ArmFaults", client.arm_faults(request)).await?;
        Ok(answer.faults)
    }

    /// Ends faults of an experiment, all of them when none is named.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn disarm_faults(
        &self,
        experiment_id: &str,
        fault_ids: Vec<String>,
    ) -> Result<Vec<FaultStatus>, Status> {
        let mut client = FaultsClient::new(self.connected()?);
        let request = DisarmFaultsRequest {
            experiment_id: experiment_id.to_owned(),
            fault_ids,
        };
        let answer = call("DisarmFaults", client.disarm_faults(request)).await?;
        Ok(answer.faults)
    }

    /// What an experiment's faults did so far.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn list_faults(&self, experiment_id: &str) -> Result<Vec<FaultStatus>, Status> {
        let mut client = FaultsClient::new(self.connected()?);
        let request = ListFaultsRequest {
            experiment_id: experiment_id.to_owned(),
        };
        let answer = call("ListFaults", client.list_faults(request)).await?;
        Ok(answer.faults)
    }

    /// Turns the host's switch.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn set_fault_switch(&self, on: bool) -> Result<FaultSwitch, Status> {
        let mut client = FaultsClient::new(self.connected()?);
        let request = SetFaultSwitchRequest { on };
        call("SetFaultSwitch", client.set_fault_switch(request)).await
    }

    /// How a VM's devices are doing, with their newest outages.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn device_details(
        &self,
        vm_id: &str,
        max_outages: u32,
    ) -> Result<Vec<DeviceDetails>, Status> {
        let mut client = DevicesClient::new(self.connected()?);
        let request = GetDevicesRequest {
            vm_id: vm_id.to_owned(),
            max_outages,
        };
        let answer = call("GetDevices", client.get_devices(request)).await?;
        Ok(answer.devices)
    }
}
