//! One module for each noun, and `run`.

pub(crate) mod audit;
pub(crate) mod ca;
pub(crate) mod device;
pub(crate) mod disk;
pub(crate) mod events;
pub(crate) mod fault;
pub(crate) mod host;
pub(crate) mod import;
pub(crate) mod network;
pub(crate) mod nic;
pub(crate) mod op;
pub(crate) mod pool;
pub(crate) mod port_forward;
pub(crate) mod project;
pub(crate) mod run;
pub(crate) mod security_group;
pub(crate) mod state;
pub(crate) mod vm;
pub(crate) mod volume;

use crate::client::Channel;
use api::controller as pb;

use crate::cli::{Format, Global, WaitArgs};
use crate::{client, json};

/// Rows in one request of a list; all pages are fetched.
const PAGE_SIZE: u32 = 500;

/// Waits for `operation` unless told not to, and says what became of it.
async fn conclude(
    global: &Global,
    channel: &Channel,
    operation: pb::Operation,
    wait: WaitArgs,
    doing: &str,
    done: &str,
) -> anyhow::Result<()> {
    let operation = if wait.no_wait {
        operation
    } else {
        client::wait(global, channel, operation, doing, None).await?
    };
    match global.output {
        Format::Json => json::print(&json::value("Operation", &operation)?),
        Format::Table if operation.done => {
            if !global.quiet {
                println!("{done}");
            }
        }
        Format::Table => println!("{}", operation.name),
    }
    Ok(())
}

/// `projects/p`, or all of them.
fn parent(global: &Global, all_projects: bool) -> String {
    format!(
        "projects/{}",
        if all_projects { "-" } else { &global.project }
    )
}
