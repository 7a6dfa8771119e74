//! Process 1 of test guests.
//!
//! Says so first, then does what the kernel command line's [`Plan`] asks for, reporting each
//! job on the console, and ends as the plan says. See the library for plan and reports.

mod disk;
mod dns;
mod file_system;
mod folder;
mod iperf;
mod memory;
mod net;
mod seed;
mod serve;
mod smp;
mod stall;
mod stress;
mod system;
mod writer;

use guest::plan::{End, Job, Plan};
use guest::report::{self, ON_ROOT_DISK_LINE, Report, UP_LINE};

const ON_ROOT_DISK_ARG: &str = "--on-root-disk";

fn main() {
    match on_root_disk() {
        false => report::print_line(UP_LINE.trim_start_matches(report::PREFIX)),
        true => report::print_line(ON_ROOT_DISK_LINE.trim_start_matches(report::PREFIX)),
    }
    let (plan, problem) = match prepare() {
        Ok(plan) => (plan, None),
        Err(error) => (Plan::default(), Some(error)),
    };
    if plan.end == End::Obey {
        system::silence_console();
    }
    carry_out(&plan, problem);
    let end = match plan.end {
        End::Obey => obey(),
        end => end,
    };
    match end {
        End::PowerOff | End::Obey => {}
        End::Reboot => system::reboot(),
        End::Shell => system::shell(),
        End::Wait => {
            if let Err(error) = system::wait_for_power_button() {
                report::print_line(&error);
            }
        }
    }
    system::power_off();
}

/// Does all jobs, whatever becomes of them.
fn carry_out(plan: &Plan, problem: Option<String>) {
    let mut failed = 0;
    for job in &plan.jobs {
        let report = run(job);
        failed += u32::from(report.error().is_some());
        report.print();
    }
    Report::Done {
        failed,
        error: problem,
    }
    .print();
}

/// Carries out what the console says, until a plan ends otherwise or nothing more can come.
fn obey() -> End {
    for line in std::io::stdin().lines() {
        let Ok(line) = line else { break };
        if line.trim().is_empty() {
            continue;
        }
        match line.parse::<Plan>() {
            Ok(plan) => {
                carry_out(&plan, None);
                if plan.end != End::Obey {
                    return plan.end;
                }
            }
            Err(error) => carry_out(&Plan::default(), Some(error.to_string())),
        }
    }
    End::PowerOff
}

fn prepare() -> Result<Plan, String> {
    system::mount_file_systems()?;
    let cmdline = std::fs::read_to_string("/proc/cmdline").map_err(|error| error.to_string())?;
    let plan: Plan = cmdline
        .parse()
        .map_err(|error: guest::plan::BadWord| error.to_string())?;
    if on_root_disk() {
        return Ok(plan);
    }
    system::load_modules("devices")?;
    if plan
        .jobs
        .iter()
        .any(|job| matches!(job, Job::Folder { .. }))
    {
        system::load_modules("folder")?;
    }
    if plan.jobs.contains(&Job::Seed) {
        system::load_modules("seed")?;
    }
    if plan.end == End::Wait {
        system::load_modules("button")?;
    }
    match &plan.root {
        Some(device) => Err(system::continue_from(device, ON_ROOT_DISK_ARG)),
        None => Ok(plan),
    }
}

/// Whether this is the second life, after [`system::continue_from`].
fn on_root_disk() -> bool {
    std::env::args().any(|arg| arg == ON_ROOT_DISK_ARG)
}

fn run(job: &Job) -> Report {
    match job {
        Job::Smp { cpus } => smp::check(*cpus),
        Job::Memory { mib } => memory::check(*mib),
        Job::Address(cidr) => net::set_address(cidr),
        Job::Dhcp => net::configure(),
        Job::Ipv6 => net::wait_for_ipv6(),
        Job::Resolve { name } => dns::resolve(name),
        Job::Carrier { up } => net::wait_for_carrier(*up),
        Job::Ping { peer } => net::ping(*peer),
        Job::Reach { peer } => net::reach(*peer),
        Job::Serve { port, seed, bytes } => serve::start(*port, *seed, *bytes),
        Job::Udp {
            peer,
            seed,
            datagrams,
        } => net::ask(*peer, *seed, *datagrams),
        Job::Net { peer, seed, bytes } => net::exchange(*peer, *seed, *bytes),
        Job::Seed => seed::read(),
        Job::IperfServer { port } => iperf::serve(*port),
        Job::Iperf {
            peer,
            protocol,
            seconds,
        } => iperf::run(*peer, *protocol, *seconds),
        Job::Disk {
            device,
            seed,
            bytes,
        } => disk::write_and_verify(device, *seed, *bytes),
        Job::DiskRead {
            device,
            seed,
            bytes,
        } => disk::verify(device, *seed, *bytes),
        Job::Oracle {
            device,
            seed,
            bytes,
            seconds,
        } => stress::run(device, *seed, *bytes, *seconds),
        Job::OracleCheck {
            device,
            seed,
            bytes,
        } => stress::check(device, *seed, *bytes),
        Job::Journal {
            device,
            seed,
            bytes,
        } => writer::run(device, *seed, *bytes),
        Job::FileSystem { device, bytes } => file_system::check(device, *bytes),
        Job::Folder { tag, seed } => folder::check(tag, *seed),
    }
}
