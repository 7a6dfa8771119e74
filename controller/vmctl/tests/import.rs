//! `vmctl volume import` through a real controller and agent: images that QEMU's own tool makes
//! come in as it reads them, and nothing else comes in.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
const MIB: u64 = 1 << 20;

/// A standalone controller with an agent; both end with it.
struct Home {
    dir: tempfile::TempDir,
    controller: Child,
    endpoint: String,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_vmctl")).with_file_name("controller");
        let mut controller = Command::new(program)
            .args(["--standalone", "--listen", "127.0.0.1:0", "--state-dir"])
            .arg(dir.path().join("s"))
            .arg("--run-dir")
            .arg(dir.path().join("r"))
            .env("MORTISE_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the controller is built: cargo build");
        let mut line = String::new();
        BufReader::new(controller.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap();
        let home = Self {
            endpoint: format!("http://{address}"),
            controller,
            dir,
        };
        let connected = || {
            let hosts: Value =
                serde_json::from_slice(&home.vmctl(&["host", "list", "-o", "json"]).stdout).ok()?;
            hosts
                .as_array()?
                .iter()
                .any(|host| host["connected"] == true)
                .then_some(())
        };
        poll("the agent", connected);
        home
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command
            .current_dir(self.dir.path())
            .env("MORTISE_ENDPOINT", &self.endpoint)
            .args(args)
            .stdin(Stdio::null());
        command
    }

    fn vmctl(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) {
        let output = self.vmctl(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where the volume's bytes are.
    fn image(&self, volume: &str) -> PathBuf {
        let output = self.vmctl(&["volume", "show", volume, "-o", "json"]);
        let shown: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{}", stderr(&output)));
        shown["status"]["path"].as_str().unwrap().into()
    }

    /// 16 MiB with some content at both ends and between.
    fn original(&self) -> PathBuf {
        let path = self.path("original.raw");
        let file = File::create(&path).unwrap();
        file.set_len(16 * MIB).unwrap();
        for (seed, at) in [(1, 0), (2, 5 * MIB + 512), (3, 16 * MIB - 8192)] {
            file.write_all_at(&noise(seed, 8192), at).unwrap();
        }
        path
    }

    fn agent(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.path("r/node-agent.pid")).ok()?;
        text.trim().parse().ok().map(Pid::from_raw)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = self.controller.kill();
        let _ = self.controller.wait();
        if let Some(agent) = self.agent() {
            let _ = kill(agent, Signal::SIGTERM);
        }
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn poll<T>(what: &str, mut question: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Bytes that no compressor or converter finds anything in (xorshift).
fn noise(seed: u64, len_bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len_bytes / 8)
        .flat_map(|_| next().to_le_bytes())
        .collect()
}

fn qemu_img(args: &[&str], dir: &Path) {
    let output = Command::new("qemu-img")
        .args(args)
        .current_dir(dir)
        .output()
        .expect("qemu-img is in PATH: run by cargo lab test, or install qemu-utils");
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        stderr(&output)
    );
}

#[test]
fn disks_of_every_hypervisor_come_in_as_qemu_reads_them() {
    let home = Home::new();
    home.original();
    for (volume, file, format, options) in [
        ("sparse", "a.vmdk", "vmdk", "subformat=monolithicSparse"),
        ("flat", "b.vmdk", "vmdk", "subformat=monolithicFlat"),
        ("split", "c.vmdk", "vmdk", "subformat=twoGbMaxExtentSparse"),
        ("stream", "d.vmdk", "vmdk", "subformat=streamOptimized"),
        ("dynamic", "e.vhd", "vpc", "subformat=dynamic,force_size=on"),
        ("fixed", "f.vhd", "vpc", "subformat=fixed,force_size=on"),
        ("hyperv", "g.vhdx", "vhdx", "subformat=dynamic"),
        ("vbox", "h.vdi", "vdi", "static=off"),
        ("qemu", "i.qcow2", "qcow2", "cluster_size=4096"),
        ("desktop", "j.hds", "parallels", "cluster_size=1048576"),
    ] {
        let mut args = vec!["convert", "-f", "raw", "-O", format, "-o", options];
        if format == "qcow2" {
            args.push("-c");
        }
        qemu_img(
            &[&args[..], &["original.raw", file]].concat(),
            home.dir.path(),
        );
        let to = if volume == "stream" { "qcow2" } else { "raw" };
        home.ok(&["volume", "import", file, volume, "--to", to]);
        let image = home.image(volume);
        let image = image.to_str().unwrap();
        qemu_img(
            &["compare", "-f", "raw", "-F", to, "original.raw", image],
            home.dir.path(),
        );
        qemu_img(
            &["compare", "-f", format, "-F", to, file, image],
            home.dir.path(),
        );
    }
    assert_eq!(
        fs::read_dir(home.path("s/node/uploads")).unwrap().count(),
        0,
        "what was imported is not kept twice"
    );
}

#[test]
fn image_that_refers_elsewhere_is_refused_and_leaves_no_volume() {
    let home = Home::new();
    let dir = home.dir.path();
    let secret = home.original();
    let secret = secret.to_str().unwrap();
    qemu_img(
        &[
            "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", "a.qcow2",
        ],
        dir,
    );
    let data_file = format!("data_file={}", home.path("data.raw").display());
    qemu_img(
        &[
            "create", "-q", "-f", "qcow2", "-o", &data_file, "b.qcow2", "1M",
        ],
        dir,
    );
    // vmctl does not take this for a descriptor; QEMU does, and is kept in.
    let descriptor = format!(
        "\n# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
         createType=\"monolithicFlat\"\nRW 2048 FLAT \"{secret}\" 0\n"
    );
    fs::write(home.path("c.vmdk"), descriptor).unwrap();
    for (file, format, problem) in [
        ("a.qcow2", "auto", "backing file"),
        ("b.qcow2", "auto", "data file"),
        ("c.vmdk", "vmdk", "original.raw"),
        ("original.raw", "vdi", "cannot be read as vdi"),
    ] {
        let output = home.vmctl(&["volume", "import", file, "bad", "--format", format]);
        assert_eq!(output.status.code(), Some(1), "{file}");
        assert!(
            stderr(&output).contains(problem),
            "{file}: {}",
            stderr(&output)
        );
        let gone = || {
            let listed = home.vmctl(&["volume", "list", "-o", "json"]);
            (String::from_utf8_lossy(&listed.stdout).trim() == "[]").then_some(())
        };
        poll("the end of the failed volume", gone);
        assert_eq!(
            fs::read_dir(home.path("s/node/volumes")).unwrap().count(),
            0
        );
    }
}

#[test]
fn import_goes_on_after_vmctl_and_the_agent_were_killed() {
    let home = Home::new();
    let content = noise(7, 192 << 20);
    fs::write(home.path("big.raw"), &content).unwrap();
    let arrived = || {
        let uploads = fs::read_dir(home.path("s/node/uploads")).ok()?;
        let file = uploads.flatten().next()?.path().join("files/big.raw");
        let len_bytes = fs::metadata(file).ok()?.len();
        (len_bytes > 4 * MIB).then_some(len_bytes)
    };
    let import = ["volume", "import", "big.raw", "big"];
    let mut first = home.command(&import).stderr(Stdio::null()).spawn().unwrap();
    let before = poll("some of the file", arrived);
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(before < content.len() as u64, "it was not complete");

    let second = home
        .command(&import)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    kill(home.agent().unwrap(), Signal::SIGKILL).unwrap();
    let output = second.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        fs::read(home.image("big")).unwrap() == content,
        "every byte arrived"
    );
}
