//! `vmctl backup`, `vmctl restore` and `vmctl controller`

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use api::controller as pb;
use api::controller::states_client::StatesClient;
use tokio_stream::StreamExt as _;

use crate::cli::{Format, Global};
use crate::{client, json};

/// Bytes sent in one message.
const PIECE_BYTES: usize = 1 << 20;

/// Writes the controllers' state to a file, which is there once it is whole.
pub(crate) async fn backup(global: &Global, file: &Path) -> anyhow::Result<ExitCode> {
    let mut client = StatesClient::new(client::connect(global).await?);
    let answer = client.backup_state(pb::BackupStateRequest {}).await;
    let mut pieces = answer.map_err(client::failed)?.into_inner();
    let partial = partial(file);
    let writing = || format!("cannot write {}", partial.display());
    let mut out = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .with_context(writing)?;
    let mut bytes = 0;
    let received = async {
        while let Some(piece) = pieces.next().await {
            let content = piece.map_err(client::failed)?.content;
            bytes += content.len();
            out.write_all(&content).with_context(writing)?;
        }
        out.sync_all().with_context(writing)
    };
    if let Err(error) = received.await {
        let _ = std::fs::remove_file(&partial);
        return Err(error);
    }
    std::fs::rename(&partial, file)
        .with_context(|| format!("cannot rename {} to {}", partial.display(), file.display()))?;
    if !global.quiet {
        println!(
            "{}: {bytes} bytes; it holds secrets of seeds",
            file.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Puts a file's state in the place of the controllers'.
pub(crate) async fn restore(global: &Global, file: &Path, force: bool) -> anyhow::Result<ExitCode> {
    let mut source = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    let (sender, pieces) = tokio::sync::mpsc::channel(4);
    let path = file.to_owned();
    let reader = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        let mut content = vec![0; PIECE_BYTES];
        loop {
            let count = source
                .read(&mut content)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let piece = pb::RestoreStateRequest {
                replace: force,
                content: content[..count].to_vec(),
            };
            // A controller that refuses hangs up, and says why.
            if count == 0 || sender.blocking_send(piece).is_err() {
                return Ok(());
            }
        }
    });
    let mut client = StatesClient::new(client::connect(global).await?);
    let pieces = tokio_stream::wrappers::ReceiverStream::new(pieces);
    let answer = client.restore_state(pieces).await;
    let restored = answer.map_err(client::failed)?.into_inner();
    reader.await.context("the file's reader failed")??;
    match global.output {
        Format::Json => json::print(&json::value("RestoreStateResponse", &restored)?),
        Format::Table if global.quiet => {}
        Format::Table => println!(
            "restored {} records of version {}",
            restored.records, restored.backup_version
        ),
    }
    Ok(ExitCode::SUCCESS)
}

/// Says who leads and where the state is.
pub(crate) async fn status(global: &Global) -> anyhow::Result<ExitCode> {
    let mut client = StatesClient::new(client::connect(global).await?);
    let request = pb::GetControllerStatusRequest {};
    let answer = client.get_controller_status(request).await;
    let status = answer.map_err(client::failed)?.into_inner();
    if matches!(global.output, Format::Json) {
        json::print(&json::value("ControllerStatus", &status)?);
        return Ok(ExitCode::SUCCESS);
    }
    let leader = match (status.leads, status.leader_address.as_str()) {
        (true, _) => "this one".to_owned(),
        (false, "") => "none at the moment".to_owned(),
        (false, address) => address.to_owned(),
    };
    println!("version   {}", status.version);
    println!("leader    {leader}");
    if status.epoch > 0 {
        println!("epoch     {}", status.epoch);
    }
    println!("store     {}, revision {}", status.store, status.revision);
    Ok(ExitCode::SUCCESS)
}

fn partial(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}
