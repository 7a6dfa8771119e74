//! Open vSwitch with DPDK, run from where it was unpacked: a database, a switch, and ports.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Result;

use super::super::interrupt;
use super::super::process::Daemon;
use super::namespace;
use super::serving::Bay;
use crate::artifacts::Program;
use crate::inside::child;
use crate::tool;

const BRIDGE: &str = "bridge";
/// How long a change may take until the switch has made it.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the switch does with packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Forwarding {
    /// It learns where addresses are.
    Learning,
    /// It sends them out where they came in.
    Back,
}

/// A running switch.
pub(super) struct OpenVswitch {
    pub(super) daemon: Daemon,
    pub(super) database: Daemon,
    /// One for each port.
    pub(super) sockets: Vec<PathBuf>,
}

/// Starts one with vhost-user ports.
pub(super) fn start(
    bay: &Bay,
    name: &str,
    ports: usize,
    forwarding: Forwarding,
) -> Result<OpenVswitch> {
    let place = Place::prepare(bay, name)?;
    let programs = &bay.dpdk.open_vswitch;
    let database = place.start_database(&programs.database_tool, &programs.database_server)?;
    place.configure()?;
    let mut command = place.command(&programs.vswitchd);
    command
        .arg(place.remote())
        .arg(format!("--unixctl={}", place.file("switch.ctl").display()))
        .stdin(Stdio::null());
    // Each switch makes an interface called ovs-netdev.
    namespace::own(&mut command);
    let control = vec![place.file("switch.ctl")];
    let daemon = Daemon::start_with(name, &mut command, control, &place.dir)?;
    let sockets = place.add_ports(ports, forwarding)?;
    Ok(OpenVswitch {
        daemon,
        database,
        sockets,
    })
}

/// A directory of its own instead of the system's.
struct Place<'a> {
    bay: &'a Bay<'a>,
    dir: PathBuf,
}

impl<'a> Place<'a> {
    fn prepare(bay: &'a Bay, name: &str) -> Result<Self> {
        let dir = bay.ground.run_dir().join(name);
        // Of a contender before.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        Ok(Self { bay, dir })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn remote(&self) -> String {
        format!("unix:{}", self.file("db.sock").display())
    }

    fn command(&self, program: &Program) -> Command {
        let mut command = program.command();
        for variable in [
            "OVS_RUNDIR",
            "OVS_LOGDIR",
            "OVS_DBDIR",
            "OVS_SYSCONFDIR",
            "RUNTIME_DIRECTORY",
        ] {
            command.env(variable, &self.dir);
        }
        let schema = &self.bay.dpdk.open_vswitch.schema;
        command.env("OVS_PKGDATADIR", schema.parent().unwrap_or(Path::new("/")));
        command
    }

    fn start_database(&self, database_tool: &Program, server: &Program) -> Result<Daemon> {
        let file = self.file("conf.db");
        let schema = &self.bay.dpdk.open_vswitch.schema;
        tool::output(
            self.command(database_tool)
                .arg("create")
                .args([&file, schema]),
        )?;
        let socket = self.file("db.sock");
        let mut command = self.command(server);
        command
            .arg(&file)
            .arg(format!("--remote=punix:{}", socket.display()))
            .arg(format!("--unixctl={}", self.file("db.ctl").display()))
            .stdin(Stdio::null());
        Daemon::start_with("database", &mut command, vec![socket], &self.dir)
    }

    /// One polling thread, on the daemon's CPU; memory that is not of huge pages.
    fn configure(&self) -> Result<()> {
        let cpus = self.bay.cpus;
        let extra = format!(
            "--no-pci --no-huge --legacy-mem -m 1024 --no-shconf --file-prefix pmd -d {}",
            self.bay.dpdk.driver_dir.display()
        );
        self.control(&["--no-wait", "init"])?;
        self.control(&[
            "--no-wait",
            "set",
            "Open_vSwitch",
            ".",
            "other_config:dpdk-init=true",
            "other_config:per-port-memory=true",
            &format!("other_config:dpdk-extra=\"{extra}\""),
            &format!("other_config:pmd-cpu-mask={:#x}", 1_u128 << cpus.daemon),
            &format!(
                "other_config:dpdk-lcore-mask={:#x}",
                1_u128 << cpus.frontend
            ),
        ])
    }

    fn add_ports(&self, ports: usize, forwarding: Forwarding) -> Result<Vec<PathBuf>> {
        let userspace = ["--", "set", "bridge", BRIDGE, "datapath_type=netdev"];
        self.control(&[&["add-br", BRIDGE], &userspace[..]].concat())?;
        let names: Vec<String> = (0..ports).map(|port| format!("port{port}")).collect();
        for name in &names {
            let kind = ["--", "set", "Interface", name, "type=dpdkvhostuser"];
            self.control(&[&["add-port", BRIDGE, name], &kind[..]].concat())?;
        }
        if forwarding == Forwarding::Back {
            let socket = self.file(&format!("{BRIDGE}.mgmt"));
            await_files("the bridge", std::slice::from_ref(&socket))?;
            let mut command = self.command(&self.bay.dpdk.open_vswitch.flow_control);
            let bridge = format!("unix:{}", socket.display());
            tool::output(command.args(["add-flow", &bridge, "priority=10,actions=in_port"]))?;
        }
        let sockets: Vec<PathBuf> = names.iter().map(|name| self.file(name)).collect();
        await_files("a port", &sockets)?;
        Ok(sockets)
    }

    fn control(&self, args: &[&str]) -> Result<()> {
        let mut command = self.command(&self.bay.dpdk.open_vswitch.control);
        command
            .arg(format!("--db={}", self.remote()))
            .arg(format!("--timeout={}", PATIENCE.as_secs()))
            .args(args.iter().map(OsStr::new));
        tool::output(&mut command)?;
        Ok(())
    }
}

fn await_files(what: &str, files: &[PathBuf]) -> Result<()> {
    child::poll(&format!("{what} of Open vSwitch"), PATIENCE, || {
        interrupt::check()?;
        Ok(files.iter().all(|file| file.exists()).then_some(()))
    })
}
