//! Files on their way here: STATE_DIR/uploads/ID, with one file each under its own name in `files`
//! and `upload.json`, which says what is to come. How much of a file has arrived is its length, so
//! that there is nothing else to lose when this agent or the sender ends.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{ImportError, ImportRequest, convert, io_error};
use crate::{record, spec::Format, volumes::Creation};

const VERSION: u32 = 1;
/// Nobody wrote to it for so long: it is given up.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// At one time; each may fill the disk.
const MAX_UPLOADS: usize = 32;

/// All uploads of this host. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Imports {
    dir: PathBuf,
    qemu_img: Option<PathBuf>,
    /// Held while a chunk is checked and written: a sender that was cut off may still be writing
    /// when it comes back.
    writing: Arc<Mutex<HashMap<String, Arc<Mutex<()>>>>>,
}

/// An upload and how far it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Upload {
    /// As the sender chose it.
    pub(crate) id: String,
    /// In the order in which they were announced.
    pub(crate) files: Vec<UploadFile>,
}

/// A file of an upload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UploadFile {
    /// A checked name without a path.
    pub(crate) name: String,
    /// As announced.
    pub(crate) size_bytes: u64,
    /// What is here.
    #[serde(skip)]
    pub(crate) received_bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Announced {
    version: u32,
    files: Vec<UploadFile>,
}

impl Imports {
    /// Opens STATE_DIR/uploads. `qemu_img` converts what is not raw.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub(crate) fn open(state_dir: &Path, qemu_img: Option<PathBuf>) -> io::Result<Self> {
        let dir = state_dir.join("uploads");
        fs::create_dir_all(&dir)?;
        let imports = Self {
            dir,
            qemu_img,
            writing: Arc::default(),
        };
        imports.expire(SystemTime::now());
        Ok(imports)
    }

    /// Begins an upload, or tells how far the one of these files is.
    ///
    /// # Errors
    /// When the id belongs to other files, or there is no room.
    pub(crate) fn create(&self, id: &str, files: Vec<UploadFile>) -> Result<Upload, ImportError> {
        self.expire(SystemTime::now());
        match self.get(id) {
            Err(ImportError::NoUpload { .. }) => {}
            Err(error) => return Err(error),
            Ok(upload) => {
                let announced = |files: &[UploadFile]| -> Vec<(String, u64)> {
                    files
                        .iter()
                        .map(|file| (file.name.clone(), file.size_bytes))
                        .collect()
                };
                if announced(&upload.files) == announced(&files) {
                    return Ok(upload);
                }
                return Err(ImportError::OtherFiles { id: id.to_owned() });
            }
        }
        let count = fs::read_dir(&self.dir)
            .map_err(io_error("reading", &self.dir))?
            .count();
        if count >= MAX_UPLOADS {
            return Err(ImportError::TooMany { count });
        }
        let needed = files
            .iter()
            .fold(0, |sum: u64, file| sum.saturating_add(file.size_bytes));
        let free = nix::sys::statvfs::statvfs(&self.dir).map_or(u64::MAX, |stat| {
            stat.blocks_available() * stat.fragment_size()
        });
        if needed > free {
            return Err(ImportError::NoSpace {
                needed_mib: needed >> 20,
                free_mib: free >> 20,
                dir: self.dir.clone(),
            });
        }
        let content = self.files_dir(id);
        fs::create_dir_all(&content).map_err(io_error("making", &content))?;
        let announced = Announced {
            version: VERSION,
            files,
        };
        record::save_json(&self.announcement(id), &announced)?;
        self.get(id)
    }

    /// How far an upload is.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn get(&self, id: &str) -> Result<Upload, ImportError> {
        let path = self.announcement(id);
        if !path.exists() {
            return Err(ImportError::NoUpload { id: id.to_owned() });
        }
        let mut announced: Announced = record::load_json(&path, VERSION)?;
        for file in &mut announced.files {
            let path = self.files_dir(id).join(&file.name);
            file.received_bytes = match fs::metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
                found => found.map_err(io_error("looking at", &path))?.len(),
            };
        }
        Ok(Upload {
            id: id.to_owned(),
            files: announced.files,
        })
    }

    /// Adds a chunk where file number `index` ends, and answers where it ends then.
    ///
    /// # Errors
    /// When it is for another place, or cannot be written.
    pub(crate) fn write(
        &self,
        upload: &Upload,
        index: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<u64, ImportError> {
        let id = &upload.id;
        let file = upload
            .files
            .get(index as usize)
            .ok_or_else(|| ImportError::NoFile {
                id: id.clone(),
                file: index.to_string(),
            })?;
        let lock = self.lock_of(id);
        let _writing = lock.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.announcement(id).exists() {
            return Err(ImportError::NoUpload { id: id.clone() });
        }
        let path = self.files_dir(id).join(&file.name);
        let opened = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("opening", &path))?;
        let end = opened
            .metadata()
            .map_err(io_error("measuring", &path))?
            .len();
        if end != offset {
            return Err(ImportError::Offset {
                file: file.name.clone(),
                end,
                offset,
            });
        }
        let end = end + data.len() as u64;
        if end > file.size_bytes {
            return Err(ImportError::TooLong {
                file: file.name.clone(),
                size_bytes: file.size_bytes,
            });
        }
        opened
            .write_all_at(data, offset)
            .map_err(io_error("writing", &path))?;
        Ok(end)
    }

    /// Gives an upload up. One that is not there is no error.
    ///
    /// # Errors
    /// When its files cannot be removed.
    pub(crate) fn delete(&self, id: &str) -> Result<(), ImportError> {
        let dir = self.dir.join(id);
        let lock = self.lock_of(id);
        let _writing = lock.lock().unwrap_or_else(PoisonError::into_inner);
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("removing", &dir)(error));
            }
            _ => {}
        }
        self.writing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id);
        Ok(())
    }

    /// The volume is complete: its files are no longer needed.
    pub(crate) fn finished(&self, id: &str) {
        if let Err(error) = self.delete(id) {
            tracing::warn!(upload = id, "{}", crate::vm::error_chain(&error));
        }
    }

    /// Checks the files of a complete upload, and looks at the image.
    ///
    /// # Errors
    /// When they are not complete, damaged, or no image that can be taken.
    pub(crate) fn open_source(
        &self,
        import: &ImportRequest,
        target: Format,
        creation: &Creation,
    ) -> Result<convert::ImportSource, ImportError> {
        let upload = self.get(&import.upload)?;
        for file in &upload.files {
            if file.received_bytes != file.size_bytes {
                return Err(ImportError::Incomplete {
                    file: file.name.clone(),
                    received_bytes: file.received_bytes,
                    size_bytes: file.size_bytes,
                });
            }
        }
        if upload.files.len() != import.sha256.len()
            || !upload.files.iter().any(|file| file.name == import.file)
        {
            return Err(ImportError::NoFile {
                id: upload.id,
                file: import.file.clone(),
            });
        }
        let dir = self.files_dir(&import.upload);
        let verified = convert::verify(&dir, &upload.files, &import.sha256, creation);
        if let Err(ImportError::Checksum { .. }) = &verified {
            // What was sent wrong is not sent again if the next attempt finds it here.
            self.finished(&import.upload);
        }
        verified?;
        creation.begin("inspecting", 0);
        convert::ImportSource::inspect(self.qemu_img.as_deref(), &dir, import, target)
    }

    /// Removes uploads that nobody has written to for a day.
    pub(crate) fn expire(&self, now: SystemTime) {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        for id in entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
        {
            let touched = |path: PathBuf| fs::metadata(path).and_then(|meta| meta.modified()).ok();
            let files = fs::read_dir(self.files_dir(&id))
                .into_iter()
                .flatten()
                .flatten();
            let last = files
                .filter_map(|file| touched(file.path()))
                .chain(touched(self.announcement(&id)))
                .chain(touched(self.dir.join(&id)))
                .max();
            let age = last.and_then(|last| now.duration_since(last).ok());
            if age.is_some_and(|age| age > LIFETIME) {
                tracing::info!(upload = id, "expired");
                self.finished(&id);
            }
        }
    }

    fn lock_of(&self, id: &str) -> Arc<Mutex<()>> {
        self.writing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(id.to_owned())
            .or_default()
            .clone()
    }

    fn announcement(&self, id: &str) -> PathBuf {
        self.dir.join(id).join("upload.json")
    }

    fn files_dir(&self, id: &str) -> PathBuf {
        self.dir.join(id).join("files")
    }
}

/// Opens a file of an upload for reading.
pub(super) fn open_file(path: &Path) -> Result<File, ImportError> {
    File::open(path).map_err(io_error("opening", path))
}
