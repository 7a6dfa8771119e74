//! Real processes in network namespaces: a host is killed, or cut off.

use failover::{Loss, Settings, run};

fn lose(loss: Loss) {
    let settings = Settings {
        bin_dir: Settings::beside_this_program().unwrap(),
        loss,
    };
    let report = run(&settings, &mut |step| println!("{step}")).unwrap();
    assert!(report.is_good(), "{report:#?}");
}

#[test]
#[ignore = "long: half a minute; `cargo lab demo --hosts 2` does the same"]
fn vm_of_a_killed_host_runs_once_on_the_other_one_with_its_disk() {
    lose(Loss::Kill);
}

#[test]
fn host_that_was_cut_off_stops_its_vm_before_it_runs_elsewhere() {
    lose(Loss::Partition);
}
