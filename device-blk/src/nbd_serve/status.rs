//! Tells in a file whom a server refused.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Weak;
use std::time::Duration;

use nbd::server::Server;

const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Longer than any text, so that one write replaces another.
const TEXT_BYTES: usize = 160;

/// Writes what changed, for as long as there is a server. Readers find one whole line, padded with
/// spaces.
pub(super) fn keep(server: &Weak<Server>, file: &File) {
    let mut written = String::new();
    while let Some(server) = server.upgrade() {
        if let Some(fence) = server.fence() {
            let refusals = fence.refusals();
            let text = format!(
                "{{\"generation\":{},\"refused_clients\":{},\"refused_writes\":{}}}",
                fence.generation(),
                refusals.clients,
                refusals.writes
            );
            if text != written {
                let line = format!("{text:<width$}\n", width = TEXT_BYTES - 1);
                match file.write_all_at(line.as_bytes(), 0) {
                    Ok(()) => {
                        if !written.is_empty() {
                            tracing::info!("{text}");
                        }
                        written = text;
                    }
                    Err(error) => tracing::warn!("cannot tell who was refused: {error}"),
                }
            }
        }
        drop(server);
        std::thread::sleep(LOOK_INTERVAL);
    }
}
