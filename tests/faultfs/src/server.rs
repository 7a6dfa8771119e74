//! Answers the kernel's requests, as faults want.

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite, TimeOrNow, WriteFlags,
};

use crate::fault::{Effect, Fault, FaultId, Faults, Op, Request};
use crate::files::{Files, OpenFile, locked};

/// Attributes are never cached: files change underneath.
const TTL: Duration = Duration::ZERO;
/// Requests that the kernel lets a test hold; root may ask for so many.
const MAX_HELD: u16 = 4096;

/// What is done with a request in the end.
type Action = Box<dyn FnOnce() + Send>;

/// What tests and server share.
pub(crate) struct Shared {
    faults: Mutex<Faults>,
    held: Mutex<Held>,
    files: Files,
}

#[derive(Default)]
struct Held {
    /// The test is over: nothing is held any more.
    closed: bool,
    actions: Vec<Action>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("faults", &self.faults)
            .field("held", &self.held())
            .finish()
    }
}

impl Shared {
    pub(crate) fn new(files: Files) -> Self {
        Self {
            faults: Mutex::default(),
            held: Mutex::default(),
            files,
        }
    }

    /// See [`OpenFile::forget`].
    pub(crate) fn forget(&self, mut lose: impl FnMut() -> bool) -> io::Result<u64> {
        let files = self.files.all();
        files.iter().map(|file| file.forget(&mut lose)).sum()
    }

    pub(crate) fn inject(&self, fault: Fault) -> FaultId {
        locked(&self.faults).inject(fault)
    }

    pub(crate) fn lift(&self, fault: FaultId) {
        locked(&self.faults).lift(fault);
    }

    pub(crate) fn hits(&self, fault: FaultId) -> u64 {
        locked(&self.faults).hits(fault)
    }

    pub(crate) fn held(&self) -> usize {
        locked(&self.held).actions.len()
    }

    pub(crate) fn release(&self) -> usize {
        let actions = std::mem::take(&mut locked(&self.held).actions);
        let count = actions.len();
        for action in actions {
            action();
        }
        count
    }

    pub(crate) fn close(&self) {
        locked(&self.held).closed = true;
        self.release();
    }

    fn hold(&self, action: Action) {
        let mut held = locked(&self.held);
        if held.closed {
            drop(held);
            action();
        } else {
            held.actions.push(action);
        }
    }
}

/// The file system as FUSE sees it.
pub(crate) struct Server {
    shared: Arc<Shared>,
    later: Later,
    direct_io: DirectIo,
}

/// Who waits for direct I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DirectIo {
    /// Nobody in the kernel, as with local file systems: a process that dies leaves it behind.
    Asynchronous,
    /// The thread that began it.
    Synchronous,
}

/// What a request may do.
struct Permit {
    open: Arc<OpenFile>,
    /// Bytes to move.
    len: usize,
    /// The error to answer with, whatever was done.
    lie: Option<i32>,
    /// Nothing is to be done.
    skip: bool,
}

impl Server {
    pub(crate) fn new(shared: Arc<Shared>, direct_io: DirectIo) -> io::Result<Self> {
        Ok(Self {
            direct_io,
            shared,
            later: Later::spawn()?,
        })
    }

    /// Does `act` with the bytes that may be moved, now or later, or fails.
    fn serve(
        &self,
        file: io::Result<Arc<OpenFile>>,
        request: (Op, u64, u64),
        act: impl FnOnce(io::Result<Permit>) + Send + 'static,
    ) {
        let (op, offset_bytes, len_bytes) = request;
        let file = match file {
            Ok(file) => file,
            Err(error) => return act(Err(error)),
        };
        let names = file.names();
        let effect = locked(&self.shared.faults).apply(&Request {
            op,
            names: &names,
            offset_bytes,
            len_bytes,
        });
        let mut permit = Permit {
            open: file,
            len: len_bytes as usize,
            lie: None,
            skip: false,
        };
        match effect {
            None => act(Ok(permit)),
            Some(Effect::Lie(errno)) if op == Op::Write => {
                permit.lie = Some(errno);
                act(Ok(permit));
            }
            Some(Effect::Fail(errno) | Effect::Lie(errno)) => {
                act(Err(io::Error::from_raw_os_error(errno)));
            }
            Some(Effect::Skip) => {
                permit.skip = true;
                act(Ok(permit));
            }
            Some(Effect::Short(at_most)) => {
                permit.len = permit.len.min(at_most);
                act(Ok(permit));
            }
            Some(Effect::Hold) => self.shared.hold(Box::new(move || act(Ok(permit)))),
            Some(Effect::Delay(delay)) => {
                self.later.after(delay, Box::new(move || act(Ok(permit))));
            }
        }
    }
}

impl Filesystem for Server {
    fn init(&mut self, _: &fuser::Request, config: &mut KernelConfig) -> io::Result<()> {
        if self.direct_io == DirectIo::Asynchronous {
            let asynchronous = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
            asynchronous.map_err(|_| io::Error::from(io::ErrorKind::Unsupported))?;
        }
        // Requests that are held must not keep others waiting in the kernel.
        let _ = config.set_max_background(MAX_HELD);
        Ok(())
    }

    fn lookup(&self, _: &fuser::Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.shared.files.find(name) {
            Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn getattr(&self, _: &fuser::Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.shared.files.attr(inode) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn setattr(
        &self,
        _: &fuser::Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changed = self.shared.files.get(inode).and_then(|open| {
            if let Some(size) = size {
                open.file.set_len(size)?;
            }
            open.attr()
        });
        match changed {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn open(&self, _: &fuser::Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.shared.files.get(inode) {
            Ok(_) => reply.opened(FileHandle(0), FopenFlags::empty()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn create(
        &self,
        _: &fuser::Request,
        _parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match self.shared.files.create(name) {
            Ok(attr) => reply.created(
                &TTL,
                &attr,
                Generation(0),
                FileHandle(0),
                FopenFlags::empty(),
            ),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn rename(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        new_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        answer(reply, self.shared.files.rename(name, new_name));
    }

    fn unlink(&self, _: &fuser::Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.shared.files.remove(name));
    }

    fn read(
        &self,
        _: &fuser::Request,
        inode: INodeNo,
        _: FileHandle,
        offset_bytes: u64,
        len_bytes: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let request = (Op::Read, offset_bytes, u64::from(len_bytes));
        self.serve(
            self.shared.files.get(inode),
            request,
            move |go_on| match go_on
                .and_then(|Permit { open, len, .. }| open.read(offset_bytes, len))
            {
                Ok(data) => reply.data(&data),
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn write(
        &self,
        _: &fuser::Request,
        inode: INodeNo,
        _: FileHandle,
        offset_bytes: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let request = (Op::Write, offset_bytes, data.len() as u64);
        let data = data.to_vec();
        self.serve(self.shared.files.get(inode), request, move |go_on| {
            let written = go_on.and_then(|permit| {
                let Permit { open, len, lie, .. } = &permit;
                let len = *len;
                if !permit.skip {
                    open.write(offset_bytes, &data[..len])?;
                }
                lie.map_or(Ok(len), |errno| Err(io::Error::from_raw_os_error(errno)))
            });
            match written {
                Ok(len) => reply.written(len as u32),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn flush(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsync(
        &self,
        _: &fuser::Request,
        inode: INodeNo,
        _: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        self.serve(
            self.shared.files.get(inode),
            (Op::Sync, 0, 0),
            move |go_on| {
                answer(
                    reply,
                    go_on.and_then(|permit| match permit.skip {
                        true => Ok(()),
                        false => permit.open.sync(),
                    }),
                );
            },
        );
    }

    fn fallocate(
        &self,
        _: &fuser::Request,
        inode: INodeNo,
        _: FileHandle,
        offset_bytes: u64,
        len_bytes: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let request = (Op::Allocate, offset_bytes, len_bytes);
        self.serve(self.shared.files.get(inode), request, move |go_on| {
            let done = go_on.and_then(|Permit { open, skip, .. }| {
                if skip {
                    return Ok(());
                }
                // A cache may write back at any time; so nothing that is older comes later.
                open.forget(|| false)?;
                let (offset, len) = (offset_bytes as libc::off_t, len_bytes as libc::off_t);
                // SAFETY: fallocate takes integers and touches no memory of ours.
                match unsafe { libc::fallocate(open.file.as_raw_fd(), mode, offset, len) } {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
            answer(reply, done);
        });
    }

    fn lseek(
        &self,
        _: &fuser::Request,
        inode: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = self.shared.files.get(inode).and_then(|open| {
            // SAFETY: lseek takes integers; the position is used by nobody.
            match unsafe { libc::lseek(open.file.as_raw_fd(), offset, whence) } {
                -1 => Err(io::Error::last_os_error()),
                offset => Ok(offset),
            }
        });
        match found {
            Ok(offset) => reply.offset(offset),
            Err(error) => reply.error(errno(&error)),
        }
    }
}

fn answer(reply: ReplyEmpty, result: io::Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

/// A thread that does things later; ends with its owner, and then does what is left at once.
struct Later {
    sender: Option<mpsc::Sender<(Instant, Action)>>,
    thread: Option<JoinHandle<()>>,
}

impl Later {
    fn spawn() -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel::<(Instant, Action)>();
        let run = move || {
            let mut waiting: Vec<(Instant, Action)> = Vec::new();
            loop {
                waiting.sort_by_key(|(due, _)| *due);
                let now = Instant::now();
                while waiting.first().is_some_and(|(due, _)| *due <= now) {
                    (waiting.remove(0).1)();
                }
                let next = match waiting.first() {
                    Some((due, _)) => receiver.recv_timeout(due.saturating_duration_since(now)),
                    None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
                };
                match next {
                    Ok(more) => waiting.push(more),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            for (_, action) in waiting {
                action();
            }
        };
        let thread = std::thread::Builder::new()
            .name("faultfs-later".to_owned())
            .spawn(run)?;
        Ok(Self {
            sender: Some(sender),
            thread: Some(thread),
        })
    }

    fn after(&self, delay: Duration, action: Action) {
        if let Some(sender) = &self.sender {
            let _ = sender.send((Instant::now() + delay, action));
        }
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        drop(self.sender.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
