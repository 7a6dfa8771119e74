//! `vmctl volume import`: finds the files of a foreign disk, sends them with their checksums, and
//! has the host make a volume of them.
//!
//! How much the host has of each file is the host's to say: this side keeps nothing, and the same
//! command again, of the same unchanged files for the same volume, finds the same upload.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::client::Channel;
use anyhow::{Context as _, bail};
use api::controller as pb;
use api::controller::uploads_client::UploadsClient;
use api::controller::volumes_client::VolumesClient;
use api::names::Name;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::{conclude, parent};
use crate::cli::volume::{ForeignFormat, ImageFormat};
use crate::cli::{Global, WaitArgs};
use crate::{client, spec};

mod parts;

/// In one message.
const CHUNK_BYTES: usize = 512 << 10;
/// Chunks that are read ahead of the connection.
const CHUNKS_AHEAD: usize = 4;
/// How long nothing may arrive at the host before the import is given up; it can be gone on with.
const AWAY_TIMEOUT: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// What was typed.
pub(super) struct Import {
    pub(super) file: PathBuf,
    pub(super) name: String,
    pub(super) format: ForeignFormat,
    pub(super) to: ImageFormat,
    pub(super) size: Option<u64>,
    pub(super) wait: WaitArgs,
}

/// A disk of another hypervisor.
#[derive(Debug)]
pub(super) struct Foreign {
    /// As qemu-img calls it.
    pub(super) format: &'static str,
    /// The image, then what belongs to it.
    pub(super) parts: Vec<Part>,
}

/// A file of a disk.
#[derive(Debug)]
pub(super) struct Part {
    /// As other files of the disk call it.
    pub(super) name: String,
    pub(super) path: PathBuf,
}

/// A part that is being sent.
struct Source {
    name: String,
    file: Arc<File>,
    size_bytes: u64,
    sum: Sha256,
    /// So much went into the sum.
    summed_bytes: u64,
}

/// Imports one disk.
pub(super) async fn run(global: &Global, import: Import) -> anyhow::Result<()> {
    let foreign = parts::find(&import.file, import.format)?;
    let mut sources = Vec::new();
    for part in &foreign.parts {
        sources.push(Source::open(part)?);
    }
    let channel = client::connect(global).await?;
    let volume = Name::volume(&global.project, &import.name);
    if !import.wait.no_wait {
        refuse_existing(&channel, &volume).await?;
    }
    let upload = Name::upload(&global.project, &upload_id(&volume, &foreign)?);
    let total = sources.iter().map(|source| source.size_bytes).sum();
    let mut progress = client::Progress::new(global.quiet, &format!("sending {}", import.name));
    send_all(&channel, &upload, &mut sources, total, &mut progress).await?;
    drop(progress);

    let mut sha256 = Vec::new();
    for source in sources {
        sha256.push(source.finish().await?);
    }
    let spec = pb::VolumeSpec {
        size_bytes: import.size.unwrap_or(0),
        format: import.to.name().to_owned(),
        import: Some(pb::ImportSource {
            upload: upload.to_string(),
            format: foreign.format.to_owned(),
            file: foreign.parts[0].name.clone(),
            sha256,
        }),
        ..Default::default()
    };
    let request = pb::CreateVolumeRequest {
        parent: parent(global, false),
        volume_id: import.name.clone(),
        volume: Some(pb::Volume {
            spec: Some(spec),
            ..Default::default()
        }),
        request_id: client::request_id(None),
        ..Default::default()
    };
    let answer = VolumesClient::new(channel.clone())
        .create_volume(request)
        .await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let doing = format!("importing volume {}", import.name);
    let done = format!("volume {} is ready", import.name);
    let concluded = conclude(global, &channel, operation, import.wait, &doing, &done).await;
    if concluded.is_err() {
        forget_failed(&channel, &volume).await;
    }
    concluded
}

/// What could not be imported leaves no volume behind. Its files stay on the host for a day, for the
/// case that what was in the way can be removed there.
async fn forget_failed(channel: &Channel, volume: &Name) {
    let mut client = VolumesClient::new(channel.clone());
    let name = volume.to_string();
    let found = client
        .get_volume(pb::GetVolumeRequest { name: name.clone() })
        .await;
    let status = found.map(|found| found.into_inner().status.unwrap_or_default());
    if status.is_ok_and(|status| status.phase() == pb::VolumePhase::Failed) {
        let request = pb::DeleteVolumeRequest {
            name,
            ..Default::default()
        };
        // Should this fail, `volume list` shows it with the reason.
        let _ = client.delete_volume(request).await;
    }
}

/// Before gigabytes are sent for nothing.
async fn refuse_existing(channel: &Channel, volume: &Name) -> anyhow::Result<()> {
    let request = pb::GetVolumeRequest {
        name: volume.to_string(),
    };
    match VolumesClient::new(channel.clone())
        .get_volume(request)
        .await
    {
        Ok(_) => bail!(
            "volume {} exists already; choose another name or delete it first",
            volume.id
        ),
        Err(status) if status.code() == Code::NotFound => Ok(()),
        Err(status) => Err(client::failed(status)),
    }
}

/// The same files, unchanged, for the same volume are the same upload.
fn upload_id(volume: &Name, foreign: &Foreign) -> anyhow::Result<String> {
    let mut sum = Sha256::new();
    sum.update(volume.to_string());
    for part in &foreign.parts {
        let path = spec::absolute(&part.path)?;
        let metadata = fs::metadata(&part.path).with_context(|| path.clone())?;
        let figures = (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
        sum.update(format!("\0{path}\0{figures:?}"));
    }
    let digest = sum.finalize();
    Ok(format!("import-{}", hex(&digest[..12])))
}

async fn send_all(
    channel: &Channel,
    upload: &Name,
    sources: &mut [Source],
    total: u64,
    progress: &mut client::Progress,
) -> anyhow::Result<()> {
    let mut client = UploadsClient::new(channel.clone());
    let create = pb::CreateUploadRequest {
        parent: format!("projects/{}", upload.project),
        upload_id: upload.id.clone(),
        files: sources
            .iter()
            .map(|source| pb::UploadFile {
                name: source.name.clone(),
                size_bytes: source.size_bytes,
                received_bytes: 0,
            })
            .collect(),
        ..Default::default()
    };
    let mut arrived_at = Instant::now();
    let mut most = 0;
    loop {
        let sent = match client.create_upload(create.clone()).await {
            Ok(known) => {
                let known = known.into_inner().files;
                let here: u64 = known.iter().map(|file| file.received_bytes).sum();
                if here > most {
                    most = here;
                    arrived_at = Instant::now();
                }
                let mut seen = Seen {
                    received: known.iter().map(|file| file.received_bytes).collect(),
                    total,
                    progress,
                };
                seen.show();
                let sent = send(&mut client, upload, sources, &mut seen).await;
                let here = seen.received.iter().sum();
                if here > most {
                    most = here;
                    arrived_at = Instant::now();
                }
                sent
            }
            Err(status) => Err(SendError::Host(status)),
        };
        match sent {
            Ok(()) => return Ok(()),
            Err(SendError::Host(status))
                if is_passing(&status) && arrived_at.elapsed() < AWAY_TIMEOUT =>
            {
                progress.show("the connection broke; going on when it is back");
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            Err(SendError::Host(status)) => {
                let hint = match is_passing(&status) {
                    true => "; the same command again goes on from here",
                    false => "",
                };
                return Err(anyhow::anyhow!("{:#}{hint}", client::failed(status)));
            }
            Err(SendError::Here(error)) => return Err(error),
        }
    }
}

/// What the host has.
struct Seen<'a> {
    received: Vec<u64>,
    total: u64,
    progress: &'a mut client::Progress,
}

impl Seen<'_> {
    fn show(&mut self) {
        let done = self.received.iter().sum();
        self.progress.show_bytes("", done, self.total);
    }
}

enum SendError {
    Host(Status),
    Here(anyhow::Error),
}

/// Sends what the host does not have yet, over one stream.
async fn send(
    client: &mut UploadsClient<Channel>,
    upload: &Name,
    sources: &mut [Source],
    seen: &mut Seen<'_>,
) -> Result<(), SendError> {
    for (index, source) in sources.iter().enumerate() {
        if seen.received[index] > source.size_bytes {
            let problem = format!("the host has more of {} than there is", source.name);
            return Err(SendError::Here(anyhow::anyhow!(problem)));
        }
    }
    let sizes: Vec<u64> = sources.iter().map(|source| source.size_bytes).collect();
    if seen.received == sizes {
        return Ok(());
    }
    let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
    let answers = client.write_upload(ReceiverStream::new(receiver));
    let (offsets, name) = (seen.received.clone(), upload.to_string());
    {
        // Both at once: the host answers once it has the first chunk.
        let feeding = feed(sources, &offsets, &name, sender);
        let reading = async {
            let mut answers = answers.await.map_err(SendError::Host)?.into_inner();
            while let Some(answer) = answers.message().await.map_err(SendError::Host)? {
                if let Some(received) = seen.received.get_mut(answer.file as usize) {
                    *received = answer.received_bytes;
                }
                seen.show();
            }
            Ok(())
        };
        tokio::pin!(feeding, reading);
        let mut fed = false;
        loop {
            tokio::select! {
                outcome = &mut feeding, if !fed => {
                    outcome.map_err(SendError::Here)?;
                    fed = true;
                }
                outcome = &mut reading => {
                    outcome?;
                    break;
                }
            }
        }
    }
    if seen.received == sizes {
        Ok(())
    } else {
        Err(SendError::Host(Status::unavailable(
            "the stream ended early",
        )))
    }
}

/// Reads and sums up what is to be sent. Ends early when nobody takes it any more.
async fn feed(
    sources: &mut [Source],
    offsets: &[u64],
    upload: &str,
    sender: mpsc::Sender<pb::WriteUploadRequest>,
) -> anyhow::Result<()> {
    for (index, source) in sources.iter_mut().enumerate() {
        let mut offset = offsets[index];
        source.sum_up_to(offset).await?;
        while offset < source.size_bytes {
            let data = source.chunk(offset).await?;
            source.note(offset, &data);
            let len_bytes = data.len() as u64;
            let request = pb::WriteUploadRequest {
                name: upload.to_owned(),
                file: index as u32,
                offset,
                data,
            };
            if sender.send(request).await.is_err() {
                return Ok(());
            }
            offset += len_bytes;
        }
    }
    Ok(())
}

impl Source {
    fn open(part: &Part) -> anyhow::Result<Self> {
        let path = part.path.display();
        let mut file = File::open(&part.path).with_context(|| format!("cannot open {path}"))?;
        // A block device's metadata has no length.
        let size_bytes = file
            .seek(SeekFrom::End(0))
            .with_context(|| format!("cannot measure {path}"))?;
        if size_bytes == 0 {
            bail!("{path} is empty; copy it again");
        }
        Ok(Self {
            name: part.name.clone(),
            file: Arc::new(file),
            size_bytes,
            sum: Sha256::new(),
            summed_bytes: 0,
        })
    }

    async fn chunk(&self, offset: u64) -> anyhow::Result<Vec<u8>> {
        let (file, left) = (self.file.clone(), self.size_bytes - offset);
        let reading = tokio::task::spawn_blocking(move || {
            let mut data = vec![0; left.min(CHUNK_BYTES as u64) as usize];
            file.read_exact_at(&mut data, offset).map(|()| data)
        });
        reading
            .await?
            .with_context(|| format!("cannot read {} (it became shorter?)", self.name))
    }

    /// Adds what the sum does not have yet of these bytes; there is no gap before them.
    fn note(&mut self, offset: u64, data: &[u8]) {
        let known = (self.summed_bytes - offset).min(data.len() as u64) as usize;
        self.sum.update(&data[known..]);
        self.summed_bytes += (data.len() - known) as u64;
    }

    async fn sum_up_to(&mut self, end: u64) -> anyhow::Result<()> {
        while self.summed_bytes < end {
            let offset = self.summed_bytes;
            let data = self.chunk(offset).await?;
            let wanted = (end - offset).min(data.len() as u64) as usize;
            self.note(offset, &data[..wanted]);
        }
        Ok(())
    }

    async fn finish(mut self) -> anyhow::Result<Vec<u8>> {
        self.sum_up_to(self.size_bytes).await?;
        Ok(self.sum.finalize().to_vec())
    }
}

/// Worth another attempt: the host tells where to go on.
fn is_passing(status: &Status) -> bool {
    client::is_away(status) || matches!(status.code(), Code::OutOfRange | Code::Internal)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The first bytes of a file.
fn head(path: &Path, len_bytes: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(len_bytes as u64)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}
