use std::fs::File;
use std::io::{Read, Seek, Write};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::*;

const PATIENCE: Duration = Duration::from_secs(5);

fn inbox() -> (tempfile::TempDir, PathBuf, Inbox) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fds");
    let inbox = Inbox::bind(&path).unwrap();
    (dir, path, inbox)
}

/// Sends raw bytes and descriptors; answers the receiver's byte, if any.
fn send_raw(path: &Path, bytes: &[u8], fds: &[RawFd]) -> Option<u8> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let control = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() {
        &[][..]
    } else {
        &control[..]
    };
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::empty(),
        None,
    )
    .unwrap();
    let mut answer = [0];
    stream
        .read(&mut answer)
        .ok()
        .filter(|len| *len == 1)
        .map(|_| answer[0])
}

#[test]
fn descriptors_arrive_under_their_token_once() {
    let (_dir, path, inbox) = inbox();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"through the socket").unwrap();
    let other = tempfile::tempfile().unwrap();
    send(&path, "disk-0", &[file.as_fd(), other.as_fd()], PATIENCE).unwrap();

    let fds = inbox.take("disk-0").unwrap();
    assert_eq!(fds.len(), 2);
    for fd in &fds {
        let flags = FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).unwrap());
        assert!(
            flags.contains(FdFlag::FD_CLOEXEC),
            "children must not inherit it"
        );
    }
    let mut received = File::from(fds.into_iter().next().unwrap());
    received.rewind().unwrap();
    let mut text = String::new();
    received.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through the socket");
    assert!(inbox.take("disk-0").is_none(), "a token is used up");
}

#[test]
fn token_in_use_is_refused_and_the_first_kept() {
    let (_dir, path, inbox) = inbox();
    let file = tempfile::tempfile().unwrap();
    send(&path, "a", &[file.as_fd()], PATIENCE).unwrap();
    let error = send(&path, "a", &[file.as_fd(), file.as_fd()], PATIENCE).unwrap_err();
    assert!(matches!(error, SendError::Duplicate { .. }), "{error}");
    assert_eq!(inbox.take("a").unwrap().len(), 1);
}

#[test]
fn inbox_is_bounded() {
    let (_dir, path, inbox) = inbox();
    let file = tempfile::tempfile().unwrap();
    for n in 0..MAX_TOKENS {
        send(&path, &format!("t{n}"), &[file.as_fd()], PATIENCE).unwrap();
    }
    let error = send(&path, "one-more", &[file.as_fd()], PATIENCE).unwrap_err();
    assert!(matches!(error, SendError::Full { .. }), "{error}");
    inbox.take("t0").unwrap();
    send(&path, "one-more", &[file.as_fd()], PATIENCE).unwrap();
}

#[test]
fn malformed_messages_are_refused_and_the_inbox_goes_on() {
    let (_dir, path, inbox) = inbox();
    let file = tempfile::tempfile().unwrap();
    let fd = file.as_raw_fd();
    assert_eq!(
        send_raw(&path, b"no-descriptors", &[]),
        Some(ANSWER_MALFORMED)
    );
    assert_eq!(send_raw(&path, b"bad token", &[fd]), Some(ANSWER_MALFORMED));
    assert_eq!(
        send_raw(&path, &[b'x'; MAX_TOKEN_BYTES + 1], &[fd]),
        Some(ANSWER_MALFORMED)
    );
    drop(UnixStream::connect(&path).unwrap());
    send(&path, "good", &[file.as_fd()], PATIENCE).unwrap();
    assert!(inbox.take("good").is_some());
}

#[test]
fn too_many_descriptors_are_refused_and_none_is_leaked() {
    let (_dir, path, inbox) = inbox();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let many = [theirs.as_raw_fd(); MAX_FDS + 1];
    assert_eq!(send_raw(&path, b"many", &many), Some(ANSWER_MALFORMED));
    assert!(inbox.take("many").is_none());
    drop(theirs);
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!((&ours).read(&mut [0]).unwrap(), 0, "a copy is still open");
}

#[test]
fn silent_sender_delays_others_by_no_more_than_its_timeout() {
    let (_dir, path, inbox) = inbox();
    let _silent = UnixStream::connect(&path).unwrap();
    let file = tempfile::tempfile().unwrap();
    send(&path, "after", &[file.as_fd()], MESSAGE_TIMEOUT + PATIENCE).unwrap();
    assert!(inbox.take("after").is_some());
}

#[test]
fn unused_descriptors_are_closed_when_they_expire() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fds");
    let (listener, file) = listen::unix_socket(&path).unwrap();
    let inbox = Inbox::start(listener, file, Duration::from_millis(20)).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&path, "late", &[theirs.as_fd()], PATIENCE).unwrap();
    drop(theirs);
    // Once the inbox has closed its copy, the other end sees a hang-up.
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!((&ours).read(&mut [0]).unwrap(), 0);
    assert!(inbox.take("late").is_none());
}

#[test]
fn dropping_the_inbox_closes_everything() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fds");
    let inbox = Inbox::bind(&path).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&path, "held", &[theirs.as_fd()], PATIENCE).unwrap();
    drop(theirs);
    drop(inbox);
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!((&ours).read(&mut [0]).unwrap(), 0);
    assert!(!path.exists());
}

#[test]
fn nobody_there_is_an_error_by_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nobody");
    let file = tempfile::tempfile().unwrap();
    let begun = Instant::now();
    let error = send(&path, "t", &[file.as_fd()], Duration::from_millis(50)).unwrap_err();
    assert!(begun.elapsed() < PATIENCE);
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
}

#[test]
fn receiver_that_never_answers_is_an_error_by_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deaf");
    let _listener = UnixListener::bind(&path).unwrap();
    let file = tempfile::tempfile().unwrap();
    let error = send(&path, "t", &[file.as_fd()], Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, SendError::Io { .. }), "{error}");
}
