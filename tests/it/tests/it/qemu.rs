//! QEMU as the VMM of a test guest, with whatever daemons serve its devices.

use std::path::Path;
use std::process::Command;

use guest::plan::Plan;

use crate::process::Process;
use crate::site;

/// QEMU's command line, device by device.
pub(crate) struct Qemu {
    command: Command,
    devices: u32,
    reconnects: bool,
}

impl Qemu {
    /// Two CPUs and shared memory, no device yet.
    pub(crate) fn new(plan: &Plan) -> Self {
        let mut command = Command::new(site::path("QEMU"));
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max"]);
        Self::with(command, plan)
    }

    /// The same where there is a KVM, and QEMU is among the tools.
    pub(crate) fn on_kvm(plan: &Plan) -> Self {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "kvm", "-cpu", "host"]);
        Self::with(command, plan)
    }

    fn with(mut command: Command, plan: &Plan) -> Self {
        command
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-serial", "stdio"])
            .args(["-machine", "q35,memory-backend=ram"])
            .args(["-smp", "2", "-m", "512M", "-object"])
            .arg("memory-backend-memfd,id=ram,size=512M,share=on")
            .arg("-kernel")
            .arg(site::path("GUEST_KERNEL"))
            .arg("-initrd")
            .arg(site::path("GUEST_INITRD"))
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet mitigations=off reboot=t panic=-1 {plan}"
            ));
        Self {
            command,
            devices: 0,
            reconnects: false,
        }
    }

    /// Devices that come after this connect again, a second after their daemon hung up.
    pub(crate) fn reconnecting(self) -> Self {
        Self {
            reconnects: true,
            ..self
        }
    }

    /// A disk served at `socket`; the first is vda.
    pub(crate) fn disk(self, socket: &Path) -> Self {
        self.disk_with(socket, "num-queues=1")
    }

    /// The same, with properties of the device.
    pub(crate) fn disk_with(mut self, socket: &Path, properties: &str) -> Self {
        let chardev = self.chardev(socket);
        self.command.args([
            "-device",
            &format!("vhost-user-blk-pci,chardev={chardev},{properties}"),
        ]);
        self
    }

    /// A NIC served at `socket`.
    pub(crate) fn nic(self, socket: &Path) -> Self {
        self.nic_with(socket, "mac=52:54:00:12:34:56")
    }

    /// The same, with properties of the device.
    pub(crate) fn nic_with(mut self, socket: &Path, properties: &str) -> Self {
        let chardev = self.chardev(socket);
        // QEMU 7.2 dies in msix_set_vector_notifiers when vhost-user-net has MSI-X and no irqfd.
        self.command
            .args(["-netdev", &format!("vhost-user,id=n0,chardev={chardev}")])
            .args([
                "-device",
                &format!("virtio-net-pci,netdev=n0,romfile=,vectors=0,{properties}"),
            ]);
        self
    }

    pub(crate) fn start(self, dir: &Path) -> Process {
        self.start_as(dir, "qemu")
    }

    /// One of several, with a name for its log.
    pub(crate) fn start_as(mut self, dir: &Path, name: &str) -> Process {
        Process::spawn(dir, name, &mut self.command)
    }

    /// For a guest that takes plans from its console.
    pub(crate) fn start_listening(mut self, dir: &Path) -> Process {
        Process::spawn_listening(dir, "qemu", &mut self.command)
    }

    fn chardev(&mut self, socket: &Path) -> String {
        let id = format!("c{}", self.devices);
        self.devices += 1;
        let reconnect = match self.reconnects {
            true => ",reconnect=1",
            false => "",
        };
        self.command.args([
            "-chardev",
            &format!("socket,id={id},path={}{reconnect}", socket.display()),
        ]);
        id
    }
}
