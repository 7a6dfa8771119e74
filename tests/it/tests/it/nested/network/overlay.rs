//! One network on two hosts, in a VXLAN between them. The other host is one that the lab booted beside
//! this one: at the far end of eth0 a node agent listens.

use std::net::TcpStream;

use super::lan::{Guest, plan, serve};
use super::world::ip;
use crate::guest_run::BOOT_LIMIT;
use crate::nested::fleet::{Fleet, wait_until_within};

const HERE: &str = "172.16.9.1";
const THERE: &str = "172.16.9.2";
const AGENT: &str = "172.16.9.2:7071";

const PORT: u16 = 5000;
const BYTES: u64 = 1 << 20;

#[test]
fn two_vms_on_two_hosts_exchange_payloads_over_a_vxlan() {
    ip(&format!("addr replace {HERE}/24 dev eth0"));
    ip("link set eth0 up");
    wait_until_within("the other host", BOOT_LIMIT, || {
        TcpStream::connect(AGENT).is_ok()
    });
    let here = Fleet::start();
    let there = Fleet::start_at(AGENT);
    make_network(&here, HERE, THERE, "10.30.0.1", "10.30.0.10-10.30.0.99");
    make_network(&there, THERE, HERE, "10.30.0.2", "10.30.0.110-10.30.0.199");
    let plan = plan(vec![serve(PORT, BYTES)]);
    here.create_vm_named("web", &plan, &["--net=wide"]);
    there.create_vm_named("db", &plan, &["--net=wide"]);
    here.done(&["vm", "start", "web"]);
    there.done(&["vm", "start", "db"]);
    let mut web = Guest::attach(&here, "web");
    let mut db = Guest::attach(&there, "db");
    // Each has its lease from its own host.
    let servers = [&web, &db].map(|guest| guest.name_server.as_str());
    assert_eq!(servers, ["10.30.0.1", "10.30.0.2"]);
    for guest in [&web, &db] {
        assert_eq!(guest.mtu, 1450, "room for the VXLAN's headers is left");
    }

    web.exchanges_payloads_with(&db, PORT, BYTES);
    db.exchanges_payloads_with(&web, PORT, BYTES);
    assert_eq!(web.echoes(&db), 3);

    super::lan::take_apart(&here, &mut [web], "wide");
    db.terminal.power_off();
    there.wait_until_stopped("db");
    there.done(&["vm", "delete", "db"]);
    there.done(&["network", "delete", "wide"]);
}

fn make_network(fleet: &Fleet, own: &str, other: &str, gateway: &str, pool: &str) {
    fleet.done(&[
        "network",
        "create",
        "wide",
        "--kind=host-only",
        "--subnet=10.30.0.0/24",
        "--ipv6-prefix=fd00:30::/64",
        &format!("--gateway={gateway}"),
        &format!("--pool={pool}"),
        "--vni=4711",
        &format!("--underlay={own}"),
        &format!("--peer={other}"),
    ]);
}
