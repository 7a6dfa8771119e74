//! Guests of a few instructions, run by the real `vmm-core` on `/dev/kvm`.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Anything takes far less, even on a KVM that interprets.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// Where guests are loaded and start, in long mode.
const LOAD: u64 = 0x20_0000;

/// `true` if guests can run here; says why not otherwise.
pub(crate) fn kvm_is_usable(test: &str) -> bool {
    let result = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(err) = &result {
        eprintln!("{test}: skipped, /dev/kvm: {err}");
    }
    result.is_ok()
}

/// 64-bit machine code, put together.
#[derive(Clone, Default)]
pub(crate) struct Code(pub(crate) Vec<u8>);

impl Code {
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub(crate) fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    pub(crate) fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(0x3f8, byte))
    }

    /// Writes S5 to the sleep control register.
    pub(crate) fn shutdown(self) -> Self {
        self.out(0x600, 5 << 2 | 1 << 5).halt()
    }

    /// `cli; hlt; jmp` to the halt.
    pub(crate) fn halt(self) -> Self {
        self.raw(&[0xfa, 0xf4, 0xeb, 0xfd])
    }

    /// `mov dword [address], value`, with an address below 2 GiB or in the last 2 GiB of the first 4.
    pub(crate) fn store32(self, address: u32, value: u32) -> Self {
        let code = self.raw(&[0xbb]).raw(&address.to_le_bytes()); // mov ebx, address
        code.raw(&[0xc7, 0x03]).raw(&value.to_le_bytes())
    }

    /// An ELF kernel without a PVH note.
    pub(crate) fn elf(&self) -> Vec<u8> {
        let code_at = 0x1000;
        let mut image = Vec::new();
        image.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        image.extend([2u16, 62].into_iter().flat_map(u16::to_le_bytes));
        image.extend(1u32.to_le_bytes());
        image.extend([LOAD, 64, 0].into_iter().flat_map(u64::to_le_bytes));
        image.extend(0u32.to_le_bytes());
        image.extend(
            [64u16, 56, 1, 0, 0, 0]
                .into_iter()
                .flat_map(u16::to_le_bytes),
        );
        image.extend([1u32, 5].into_iter().flat_map(u32::to_le_bytes));
        let len = self.0.len() as u64;
        image.extend(
            [code_at, LOAD, LOAD, len, len, 0x1000]
                .into_iter()
                .flat_map(u64::to_le_bytes),
        );
        image.resize(code_at as usize, 0);
        image.extend(&self.0);
        image
    }
}

/// A running `vmm-core`; killed when dropped.
pub(crate) struct Vmm {
    child: Child,
    dir: TempDir,
    output: Receiver<u8>,
    stderr: Receiver<String>,
}

impl Vmm {
    /// Boots `code` with more arguments.
    pub(crate) fn start(code: &Code, args: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("kernel"), code.elf()).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmm-core"))
            .current_dir(dir.path())
            .args([
                "--kernel",
                "kernel",
                "--memory",
                "32M",
                "--console",
                "stdio",
            ])
            .args(["--control-socket", "vmm.sock", "--exit-file", "exit.json"])
            .args(args)
            .env("MORTISE_LOG", "warn")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, output) = channel();
        let mut stdout = child.stdout.take().unwrap();
        thread::spawn(move || {
            let mut byte = [0];
            while matches!(stdout.read(&mut byte), Ok(1)) && sender.send(byte[0]).is_ok() {}
        });
        let (sender, stderr) = channel();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        thread::spawn(move || {
            lines
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        Self {
            child,
            dir,
            output,
            stderr,
        }
    }

    pub(crate) fn control_socket(&self) -> PathBuf {
        self.dir.path().join("vmm.sock")
    }

    pub(crate) fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.child.id() as i32)
    }

    pub(crate) fn type_in(&mut self, bytes: &[u8]) {
        self.child.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// The console's next `len` bytes.
    pub(crate) fn read(&self, len: usize) -> String {
        let started = Instant::now();
        let mut text = String::new();
        while text.len() < len {
            let left = DEADLINE.saturating_sub(started.elapsed());
            match self.output.recv_timeout(left) {
                Ok(byte) => text.push(byte.into()),
                Err(err) => panic!(
                    "{err} after {text:?}; stderr: {:?}",
                    self.stderr.try_iter().collect::<Vec<_>>()
                ),
            }
        }
        text
    }

    /// How the process ended, the rest of the console, standard error and the exit file.
    pub(crate) fn wait(mut self) -> Ended {
        let status = poll(|| self.child.try_wait().unwrap());
        let mut console = String::new();
        while let Ok(byte) = self.output.recv_timeout(DEADLINE) {
            console.push(byte.into());
        }
        let stderr = self.stderr.iter().collect();
        let exit_file =
            std::fs::read_to_string(self.dir.path().join("exit.json")).unwrap_or_default();
        let socket_left = self.control_socket().exists();
        Ended {
            status,
            console,
            stderr,
            exit_file,
            socket_left,
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is left of a `vmm-core`.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) console: String,
    pub(crate) stderr: Vec<String>,
    pub(crate) exit_file: String,
    pub(crate) socket_left: bool,
}

/// Asks again until there is an answer.
pub(crate) fn poll<T>(mut question: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(started.elapsed() < DEADLINE, "nothing within {DEADLINE:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs `vmm-core` with `args` to its end; for those that end at once.
pub(crate) fn run(dir: &Path, args: &[&str]) -> (ExitStatus, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vmm-core"))
        .current_dir(dir)
        .args(args)
        .output()
        .unwrap();
    (
        output.status,
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}
