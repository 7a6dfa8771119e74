//! `vmctl vm`

use std::io::Read as _;
use std::process::ExitCode;

use crate::client::Channel;
use anyhow::Context as _;
use api::controller as pb;
use api::controller::vms_client::VmsClient;
use api::validate::SEED_DISK;

use super::{PAGE_SIZE, conclude, parent};
use crate::cli::{Format, Global, VmCommand, VmCreateArgs};
use crate::{client, console, json, output, port_forward, spec};

/// Runs one command.
pub(crate) async fn run(global: &Global, command: VmCommand) -> anyhow::Result<ExitCode> {
    match command {
        VmCommand::Create(args) => create(global, *args).await?,
        VmCommand::List {
            all_projects,
            filter,
            order_by,
        } => list(global, all_projects, filter, order_by).await?,
        VmCommand::Show { name } => show(global, &name).await?,
        VmCommand::Start { name, wait } => {
            let name = spec::vm_name(&name, &global.project)?;
            let channel = client::connect(global).await?;
            let request = pb::StartVmRequest {
                name: name.to_string(),
                request_id: client::request_id(None),
                ..Default::default()
            };
            let answer = VmsClient::new(channel.clone()).start_vm(request).await;
            let operation = answer.map_err(client::failed)?.into_inner();
            let doing = format!("starting vm {}", name.id);
            let done = format!("vm {} is running", name.id);
            conclude(global, &channel, operation, wait, &doing, &done).await?;
        }
        VmCommand::Stop { name, force, wait } => {
            let name = spec::vm_name(&name, &global.project)?;
            let channel = client::connect(global).await?;
            let request = pb::StopVmRequest {
                name: name.to_string(),
                request_id: client::request_id(None),
                force,
                ..Default::default()
            };
            let answer = VmsClient::new(channel.clone()).stop_vm(request).await;
            let operation = answer.map_err(client::failed)?.into_inner();
            let doing = format!("stopping vm {}", name.id);
            let done = format!("vm {} is stopped", name.id);
            conclude(global, &channel, operation, wait, &doing, &done).await?;
        }
        VmCommand::Reset { name } => {
            let name = spec::vm_name(&name, &global.project)?;
            let channel = client::connect(global).await?;
            let request = pb::ResetVmRequest {
                name: name.to_string(),
            };
            let answer = VmsClient::new(channel).reset_vm(request).await;
            let vm = answer.map_err(client::failed)?.into_inner();
            match global.output {
                Format::Json => json::print(&json::value("Vm", &vm)?),
                Format::Table => println!("vm {} was reset", name.id),
            }
        }
        VmCommand::Console { name, new_only } => {
            let name = spec::vm_name(&name, &global.project)?;
            let channel = client::connect(global).await?;
            let from = if new_only { u64::MAX } else { 0 };
            console::attach(global, &channel, &name, from).await?;
        }
        VmCommand::Delete { name, force, wait } => {
            let name = spec::vm_name(&name, &global.project)?;
            let channel = client::connect(global).await?;
            let operation = delete(&channel, &name.to_string(), force).await?;
            let doing = format!("deleting vm {}", name.id);
            let done = format!("vm {} is deleted", name.id);
            conclude(global, &channel, operation, wait, &doing, &done).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(global: &Global, args: VmCreateArgs) -> anyhow::Result<()> {
    let base = match &args.file {
        Some(path) => json::parse("VmSpec", &read(path)?)?,
        None => pb::VmSpec::default(),
    };
    let spec = spec::vm_spec(args.machine, base, &global.project)?;
    let channel = client::connect(global).await?;
    let request = pb::CreateVmRequest {
        parent: parent(global, false),
        vm_id: args.name.clone(),
        vm: Some(pb::Vm {
            spec: Some(spec),
            ..Default::default()
        }),
        request_id: client::request_id(args.request_id),
        validate_only: args.validate_only,
    };
    let answer = VmsClient::new(channel.clone()).create_vm(request).await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let told = operation.metadata.as_ref();
    let told = told.map_or(&[][..], |metadata| &metadata.placement);
    if !told.is_empty() && global.output == Format::Table && !global.quiet {
        crate::placement::print(told);
    }
    let doing = format!("creating vm {}", args.name);
    let done = match args.validate_only {
        true if fits(&operation) => format!("vm {} could be created", args.name),
        true => format!(
            "vm {} could be created, and no host can have it now",
            args.name
        ),
        false => format!(
            "vm {} is created; start it: vmctl vm start {}",
            args.name, args.name
        ),
    };
    conclude(global, &channel, operation, args.wait, &doing, &done).await
}

/// Some host can have it, or none said anything.
fn fits(operation: &pb::Operation) -> bool {
    let metadata = operation.metadata.as_ref();
    let placement = metadata.map_or(&[][..], |metadata| &metadata.placement);
    placement.is_empty() || placement.iter().any(|host| host.refusals.is_empty())
}

fn read(path: &std::path::Path) -> anyhow::Result<String> {
    let mut text = String::new();
    if path.as_os_str() == "-" {
        std::io::stdin()
            .read_to_string(&mut text)
            .context("cannot read stdin")?;
    } else {
        text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(text)
}

/// Asks for a deletion.
pub(super) async fn delete(
    channel: &Channel,
    name: &str,
    force: bool,
) -> anyhow::Result<pb::Operation> {
    let request = pb::DeleteVmRequest {
        name: name.to_owned(),
        request_id: client::request_id(None),
        force,
        ..Default::default()
    };
    let answer = VmsClient::new(channel.clone()).delete_vm(request).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(client::failed)
}

async fn list(
    global: &Global,
    all_projects: bool,
    filter: Option<String>,
    order_by: Option<String>,
) -> anyhow::Result<()> {
    let mut client = VmsClient::new(client::connect(global).await?);
    let mut vms = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = pb::ListVmsRequest {
            parent: parent(global, all_projects),
            page_size: PAGE_SIZE,
            page_token,
            filter: filter.clone().unwrap_or_default(),
            order_by: order_by.clone().unwrap_or_default(),
            ..Default::default()
        };
        let page = client
            .list_vms(request)
            .await
            .map_err(client::failed)?
            .into_inner();
        vms.extend(page.vms);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if global.output == Format::Json {
        let vms: anyhow::Result<Vec<_>> = vms.iter().map(|vm| json::value("Vm", vm)).collect();
        json::print(&vms?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = vms
        .iter()
        .map(|vm| {
            let status = vm.status.clone().unwrap_or_default();
            let spec = vm.spec.clone().unwrap_or_default();
            let name = if all_projects {
                vm.name.clone()
            } else {
                output::id(&vm.name)
            };
            let phase = if vm.deleting {
                "deleting".to_owned()
            } else {
                output::phase(&status)
            };
            vec![
                name,
                phase,
                spec.vcpus.to_string(),
                output::size(spec.memory_bytes),
                devices(&spec).to_string(),
                output::or_dash(&output::id(&status.host)),
                output::age(vm.create_time),
                note(&status),
            ]
        })
        .collect();
    output::table(
        &[
            "NAME", "PHASE", "CPUS", "MEMORY", "DEVICES", "HOST", "AGE", "NOTE",
        ],
        &rows,
    );
    Ok(())
}

/// The one thing worth knowing about a VM beside its phase.
fn note(status: &pb::VmStatus) -> String {
    if status.stale {
        return "host does not answer".to_owned();
    }
    match &status.error {
        Some(error) => error.message.clone(),
        None => output::or_dash(&status.stop_reason),
    }
}

async fn show(global: &Global, name: &str) -> anyhow::Result<()> {
    let name = spec::vm_name(name, &global.project)?;
    let channel = client::connect(global).await?;
    let vm = client::get_vm(&channel, &name.to_string())
        .await
        .map_err(client::failed)?;
    if global.output == Format::Json {
        json::print(&json::value("Vm", &vm)?);
        return Ok(());
    }
    let spec = vm.spec.clone().unwrap_or_default();
    let status = vm.status.clone().unwrap_or_default();
    let number = |number: u64| {
        if number == 0 {
            String::new()
        } else {
            number.to_string()
        }
    };
    let running = status.phase() == pb::VmPhase::Running;
    output::fields(&[
        ("Name", vm.name.clone()),
        ("Phase", output::phase(&status)),
        (
            "Wanted",
            output::word(vm.desired_power().as_str_name(), "DESIRED_POWER_"),
        ),
        (
            "Deleting",
            if vm.deleting {
                "yes".to_owned()
            } else {
                String::new()
            },
        ),
        (
            "Error",
            status
                .error
                .as_ref()
                .map(|error| error.message.clone())
                .unwrap_or_default(),
        ),
        ("Stopped by", status.stop_reason.clone()),
        ("Host", status.host.clone()),
        (
            "Stale",
            if status.stale {
                "the host does not answer".to_owned()
            } else {
                String::new()
            },
        ),
        ("CPUs", spec.vcpus.to_string()),
        ("Memory", output::size(spec.memory_bytes)),
        ("Kernel", spec.kernel.clone()),
        ("Initramfs", spec.initramfs.clone()),
        ("Command line", spec.cmdline.clone()),
        ("Created", output::time(vm.create_time)),
        (
            "Up for",
            if running {
                output::age(status.started_at)
            } else {
                String::new()
            },
        ),
        (
            "First output",
            match status.boot_ms {
                0 => String::new(),
                boot_ms => format!("{boot_ms} ms after start"),
            },
        ),
        ("Resets", number(status.resets)),
        ("Etag", vm.etag.clone()),
    ]);
    show_devices(&spec, &status);
    show_processes(&status);
    Ok(())
}

fn devices(spec: &pb::VmSpec) -> usize {
    let seed = usize::from(spec.cloud_init.is_some());
    spec.disks.len() + spec.nics.len() + spec.vhost_user.len() + seed
}

fn show_devices(spec: &pb::VmSpec, status: &pb::VmStatus) {
    let disks = spec.disks.iter().map(|disk| {
        let source = match &disk.source {
            Some(pb::disk::Source::Path(path)) => path.clone(),
            Some(pb::disk::Source::Volume(volume)) => format!("volume {}", output::id(volume)),
            None => String::new(),
        };
        let mode = if disk.read_only { " (read-only)" } else { "" };
        (disk.name.clone(), "disk", format!("{source}{mode}"))
    });
    let nics = spec.nics.iter().map(|nic| {
        let network = nic
            .network
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        let groups = nic.security_groups.iter();
        let groups: Vec<String> = groups.map(|group| output::id(group)).collect();
        let groups = groups.join(" ");
        let words = [
            ("network", &network),
            ("ipv4", &nic.ipv4_address),
            ("ipv6", &nic.ipv6_address),
            ("groups", &groups),
            ("tap", &nic.tap),
            ("bridge", &nic.bridge),
            ("host-cidr", &nic.host_cidr),
            ("mac", &nic.mac),
        ];
        let words = words
            .iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(word, value)| format!("{word} {value}"));
        let user = nic.user.iter().map(|_| "user network".to_owned());
        let ports = nic.port_forwards.iter().map(port_forward::shown);
        let words: Vec<String> = user.chain(words).chain(ports).collect();
        (nic.name.clone(), "nic", words.join(", "))
    });
    let seed = spec.cloud_init.iter().map(|seed| {
        let files = [
            ("user-data", seed.user_data_bytes),
            ("meta-data", seed.meta_data_bytes),
            ("network-config", seed.network_config_bytes),
        ];
        let given = files.iter().filter(|(_, len)| *len > 0);
        let mut given: Vec<String> = given
            .map(|(name, len)| format!("{name} of {len} bytes"))
            .collect();
        match seed.ssh_keys.len() {
            0 => {}
            1 => given.push("1 ssh key".to_owned()),
            count => given.push(format!("{count} ssh keys")),
        }
        (SEED_DISK.to_owned(), "cloud-init", given.join(", "))
    });
    let others = spec.vhost_user.iter().map(|device| {
        (
            device.name.clone(),
            "vhost-user",
            format!("{} {}", device.r#type, device.socket),
        )
    });
    let rows: Vec<Vec<String>> = disks
        .chain(nics)
        .chain(others)
        .chain(seed)
        .map(|(name, kind, what)| {
            let health = status.devices.iter().find(|device| device.name == name);
            let health = match health {
                None => "-".to_owned(),
                Some(device) if !device.connected => "unreachable".to_owned(),
                Some(_) => "connected".to_owned(),
            };
            vec![name, kind.to_owned(), health, output::or_dash(&what)]
        })
        .collect();
    if !rows.is_empty() {
        println!();
        output::table(&["DEVICE", "KIND", "DAEMON", "BACKED BY"], &rows);
    }
}

fn show_processes(status: &pb::VmStatus) {
    let rows: Vec<Vec<String>> = status
        .processes
        .iter()
        .map(|process| {
            // Of several VMs, where it is a network's.
            let name = match process.network.as_str() {
                "" => process.name.clone(),
                network => format!("{} ({network})", process.name),
            };
            vec![
                name,
                process.pid.to_string(),
                output::size(process.rss_kib << 10),
                output::size(process.pss_kib << 10),
                process.restarts.to_string(),
                version(process),
                output::or_dash(&process.devices.join(",")),
                output::or_dash(&process.sandbox.join(",")),
            ]
        })
        .collect();
    if !rows.is_empty() {
        println!();
        let header = [
            "PROCESS", "PID", "RSS", "PSS", "RESTARTS", "VERSION", "DEVICES", "SANDBOX",
        ];
        output::table(&header, &rows);
    }
}

/// With the build, of a daemon that was upgraded.
fn version(process: &pb::Process) -> String {
    match process.build.as_str() {
        "" => output::or_dash(&process.version),
        build => format!("{} ({build})", process.version),
    }
}
