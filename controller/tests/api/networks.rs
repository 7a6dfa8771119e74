//! Networks and security groups over gRPC, on a simulated host.

use std::collections::BTreeSet;

use api::controller as pb;
use tonic::{Code, Status};

use crate::harness::{Controller, Site, create_vm, poll, vm_name};

fn network_name(id: &str) -> String {
    format!("projects/default/networks/{id}")
}

fn group_name(id: &str) -> String {
    format!("projects/default/securityGroups/{id}")
}

fn create_network(id: &str, spec: pb::NetworkSpec) -> pb::CreateNetworkRequest {
    pb::CreateNetworkRequest {
        parent: "projects/default".into(),
        network_id: id.into(),
        network: Some(pb::Network {
            spec: Some(spec),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn nat() -> pb::NetworkSpec {
    pb::NetworkSpec {
        kind: pb::NetworkKind::Nat as i32,
        ..Default::default()
    }
}

/// A VM with one NIC.
fn vm_with(id: &str, nic: pb::Nic) -> pb::CreateVmRequest {
    let mut request = create_vm(id);
    request.vm.as_mut().unwrap().spec.as_mut().unwrap().nics = vec![nic];
    request
}

fn nic_in(network: &str) -> pb::Nic {
    pb::Nic {
        network: network_name(network),
        ..Default::default()
    }
}

async fn make_network(c: &Controller, id: &str, spec: pb::NetworkSpec) {
    let operation = c.networks().create_network(create_network(id, spec)).await;
    c.succeeded(operation.unwrap().into_inner()).await;
}

async fn network(c: &Controller, id: &str) -> pb::Network {
    let request = pb::GetNetworkRequest {
        name: network_name(id),
    };
    c.networks()
        .get_network(request)
        .await
        .unwrap()
        .into_inner()
}

async fn make_vm(c: &Controller, request: pb::CreateVmRequest) -> Result<pb::Nic, Status> {
    let id = request.vm_id.clone();
    let operation = c.vms().create_vm(request).await?.into_inner();
    c.succeeded(operation).await;
    Ok(c.vm(&id).await.spec.unwrap().nics.remove(0))
}

async fn delete_vm(c: &Controller, id: &str) {
    let request = pb::DeleteVmRequest {
        name: vm_name(id),
        force: true,
        ..Default::default()
    };
    let operation = c.vms().delete_vm(request).await.unwrap().into_inner();
    c.succeeded(operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn vlans_of_nics_reach_the_host() {
    let site = Site::new().await;
    let c = &site.controller;
    let lan = pb::NetworkSpec {
        kind: pb::NetworkKind::Isolated as i32,
        datapath: pb::Datapath::Switch as i32,
        vlan_aware: true,
        ..Default::default()
    };
    make_network(c, "lan", lan).await;
    assert!(site.host.network("lan").unwrap().vlan_aware);
    let nic = pb::Nic {
        vlan: 10,
        trunk_vlans: vec![20, 30],
        ..nic_in("lan")
    };
    let made = make_vm(c, vm_with("web", nic)).await.unwrap();
    assert_eq!((made.vlan, &made.trunk_vlans[..]), (10, &[20, 30][..]));
    let told = site.host.spec("web").nics.remove(0);
    assert_eq!((told.vlan, &told.trunk_vlans[..]), (10, &[20, 30][..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn network_is_made_with_defaults_and_goes_when_nobody_uses_it() {
    let site = Site::new().await;
    let c = &site.controller;
    make_network(c, "front", nat()).await;
    let made = network(c, "front").await;
    let spec = made.spec.unwrap();
    assert_eq!(spec.ipv4_cidr, "10.64.0.0/24");
    assert_eq!(spec.ipv4_gateway, "10.64.0.1");
    assert_eq!(
        (spec.dhcp(), spec.dns_domain.as_str()),
        (true, "front.internal")
    );
    let status = made.status.unwrap();
    assert_eq!(status.phase(), pb::NetworkPhase::Ready);
    assert_eq!(
        (status.ipv4_addresses_free, status.bridge.as_str()),
        (253, "mb-front")
    );
    make_network(c, "back", nat()).await;
    assert_eq!(
        network(c, "back").await.spec.unwrap().ipv4_cidr,
        "10.64.1.0/24"
    );

    let nic = make_vm(c, vm_with("web", nic_in("front"))).await.unwrap();
    assert_eq!(nic.ipv4_address, "10.64.0.2");
    assert!(nic.mac.starts_with("52:54:"), "{}", nic.mac);
    let told = poll("the endpoint", || {
        site.host
            .network("front")
            .and_then(|spec| spec.endpoints.into_iter().next())
    });
    assert_eq!(
        (told.vm_id.as_str(), told.hostname.as_str()),
        ("web", "web")
    );
    assert_eq!((told.mac, told.ipv4_address), (nic.mac, nic.ipv4_address));

    let delete = pb::DeleteNetworkRequest {
        name: network_name("front"),
        ..Default::default()
    };
    let refused = c
        .networks()
        .delete_network(delete.clone())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("vm web"),
        "{}",
        refused.message()
    );
    delete_vm(c, "web").await;
    let operation = c
        .networks()
        .delete_network(delete)
        .await
        .unwrap()
        .into_inner();
    c.succeeded(operation).await;
    assert_eq!(site.host.network("front"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_are_given_once_even_to_vms_that_come_at_once() {
    let site = Site::new().await;
    let c = &site.controller;
    let mut spec = nat();
    spec.ipv4_cidr = "10.20.0.0/29".into();
    make_network(c, "small", spec).await;
    // .2 to .6: the ends and the gateway are taken.
    let requests = (0..5).map(|n| vm_with(&format!("vm{n}"), nic_in("small")));
    let creating: Vec<_> = requests
        .map(|request| {
            let mut vms = c.vms();
            tokio::spawn(async move { vms.create_vm(request).await })
        })
        .collect();
    for one in creating {
        one.await.unwrap().unwrap();
    }
    let mut addresses = BTreeSet::new();
    for n in 0..5 {
        let spec = c.vm(&format!("vm{n}")).await.spec.unwrap();
        addresses.insert(spec.nics[0].ipv4_address.clone());
    }
    assert_eq!(addresses.len(), 5, "{addresses:?}");
    let exhausted = make_vm(c, vm_with("late", nic_in("small")))
        .await
        .unwrap_err();
    assert_eq!(exhausted.code(), Code::ResourceExhausted);
    assert!(
        exhausted.message().starts_with("vm.spec.nics[0].network: "),
        "{}",
        exhausted.message()
    );
    delete_vm(c, "vm3").await;
    let nic = make_vm(c, vm_with("late", nic_in("small"))).await.unwrap();
    assert!(addresses.contains(&nic.ipv4_address), "what vm3 had");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_clash_names_the_field_and_the_owner() {
    let site = Site::new().await;
    let c = &site.controller;
    let mut spec = nat();
    spec.ipv4_cidr = "10.20.0.0/24".into();
    spec.ipv6_prefix = "fd00:20::/64".into();
    make_network(c, "front", spec.clone()).await;
    let host_only = pb::NetworkSpec {
        kind: pb::NetworkKind::HostOnly as i32,
        ..Default::default()
    };
    make_network(c, "inner", host_only).await;
    let forward = pb::PortForward {
        protocol: "tcp".into(),
        host_port: 8080,
        guest_port: 80,
        ..Default::default()
    };
    let full = pb::Nic {
        mac: "52:54:00:12:34:05".into(),
        ipv4_address: "10.20.0.5".into(),
        port_forwards: vec![forward.clone()],
        ..nic_in("front")
    };
    let nic = make_vm(c, vm_with("web", full.clone())).await.unwrap();
    assert_eq!(nic.ipv6_address, "fd00:20::5054:ff:fe12:3405");

    let cases = [
        (
            "mac",
            Code::AlreadyExists,
            pb::Nic {
                ipv4_address: String::new(),
                port_forwards: vec![],
                ..full.clone()
            },
        ),
        (
            "ipv4_address",
            Code::AlreadyExists,
            pb::Nic {
                mac: String::new(),
                port_forwards: vec![],
                ..full.clone()
            },
        ),
        (
            "port_forwards",
            Code::AlreadyExists,
            pb::Nic {
                port_forwards: vec![forward.clone()],
                ..nic_in("front")
            },
        ),
        (
            "ipv4_address",
            Code::InvalidArgument,
            pb::Nic {
                ipv4_address: "10.21.0.5".into(),
                ..nic_in("front")
            },
        ),
        (
            "ipv4_address",
            Code::InvalidArgument,
            pb::Nic {
                ipv4_address: "10.20.0.1".into(),
                ..nic_in("front")
            },
        ),
        (
            "ipv6_address",
            Code::InvalidArgument,
            pb::Nic {
                ipv6_address: "fd00:21::5".into(),
                ..nic_in("front")
            },
        ),
        ("network", Code::FailedPrecondition, nic_in("nowhere")),
        (
            "port_forwards",
            Code::InvalidArgument,
            pb::Nic {
                port_forwards: vec![forward],
                ..nic_in("inner")
            },
        ),
        (
            "vlan",
            Code::InvalidArgument,
            pb::Nic {
                vlan: 10,
                ..nic_in("front")
            },
        ),
        (
            "trunk_vlans",
            Code::InvalidArgument,
            pb::Nic {
                trunk_vlans: vec![10, 20],
                ..nic_in("inner")
            },
        ),
        (
            "security_groups[0]",
            Code::FailedPrecondition,
            pb::Nic {
                security_groups: vec![group_name("none")],
                ..nic_in("front")
            },
        ),
    ];
    for (field, code, nic) in cases {
        let refused = make_vm(c, vm_with("other", nic)).await.unwrap_err();
        assert_eq!(refused.code(), code, "{field}: {}", refused.message());
        let start = format!("vm.spec.nics[0].{field}: ");
        let text = api::errors::explain(&refused);
        assert!(text.starts_with(&start), "{text}");
    }
    let overlapping = c
        .networks()
        .create_network(create_network("other", spec))
        .await
        .unwrap_err();
    assert_eq!(overlapping.code(), Code::AlreadyExists);
    assert!(
        overlapping.message().contains("networks/front"),
        "{}",
        overlapping.message()
    );
    // Of the refused ones nothing is claimed.
    make_vm(c, vm_with("other", nic_in("front"))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn port_forwards_move_while_the_vm_lives_and_are_free_again() {
    let site = Site::new().await;
    let c = &site.controller;
    make_network(c, "front", nat()).await;
    for id in ["web", "db"] {
        make_vm(c, vm_with(id, nic_in("front"))).await.unwrap();
    }
    let forward = |vm: &str, ports: &[u32]| {
        let port_forwards = ports.iter().map(|port| pb::PortForward {
            protocol: "tcp".into(),
            host_port: *port,
            guest_port: 80,
            ..Default::default()
        });
        pb::UpdateNicRequest {
            nic: Some(pb::VmNic {
                name: format!("{}/nics/nic0", vm_name(vm)),
                spec: Some(pb::Nic {
                    port_forwards: port_forwards.collect(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["spec.port_forwards".into()],
            }),
            ..Default::default()
        }
    };
    let mut nics = pb::nics_client::NicsClient::new(c.channel.clone());
    nics.update_nic(forward("web", &[8080, 8081]))
        .await
        .unwrap();
    let refused = nics.update_nic(forward("db", &[8080])).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    assert!(
        refused.message().contains("vm web"),
        "{}",
        refused.message()
    );
    nics.update_nic(forward("web", &[8081])).await.unwrap();
    nics.update_nic(forward("db", &[8080])).await.unwrap();
    poll("both forwards", || {
        let spec = site.host.network("front")?;
        let ports = |vm: &str| {
            let mut of_vm = spec
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.vm_id == vm);
            Some(of_vm.next()?.port_forwards.first()?.host_port)
        };
        (ports("web") == Some(8081) && ports("db") == Some(8080)).then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn network_that_a_host_cannot_make_says_why_and_is_tried_again() {
    let site = Site::new().await;
    let c = &site.controller;
    site.host.refuse_networks(Some(Status::failed_precondition(
        "program nft is not there",
    )));
    let operation = c
        .networks()
        .create_network(create_network("front", nat()))
        .await;
    let operation = c.done(operation.unwrap().into_inner()).await;
    assert_eq!(operation.error.unwrap().message, "program nft is not there");
    let status = network(c, "front").await.status.unwrap();
    assert_eq!(status.phase(), pb::NetworkPhase::Failed);
    site.host.refuse_networks(None);
    crate::harness::poll_async(
        "the network",
        || async { network(c, "front").await.status.unwrap().phase() },
        |phase| *phase == pb::NetworkPhase::Ready,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_become_addresses_and_follow_their_members() {
    let site = Site::new().await;
    let c = &site.controller;
    make_network(c, "front", nat()).await;
    let group = |id: &str, rules| pb::CreateSecurityGroupRequest {
        parent: "projects/default".into(),
        security_group_id: id.into(),
        security_group: Some(pb::SecurityGroup {
            rules,
            ..Default::default()
        }),
    };
    let from_admins = pb::SecurityRule {
        direction: pb::TrafficDirection::Ingress as i32,
        protocol: "tcp".into(),
        first_port: 22,
        security_group: group_name("admins"),
        ..Default::default()
    };
    let early = c
        .security_groups()
        .create_security_group(group("ssh", vec![from_admins.clone()]))
        .await;
    assert_eq!(
        early.unwrap_err().code(),
        Code::FailedPrecondition,
        "admins is not there yet"
    );
    for request in [
        group("admins", vec![]),
        group("ssh", vec![from_admins.clone()]),
    ] {
        c.security_groups()
            .create_security_group(request)
            .await
            .unwrap();
    }
    let member_of = |id: &str| pb::Nic {
        security_groups: vec![group_name(id)],
        ..nic_in("front")
    };
    make_vm(c, vm_with("web", member_of("ssh"))).await.unwrap();
    let admin = make_vm(c, vm_with("ops", member_of("admins")))
        .await
        .unwrap();
    let told = poll("the member", || {
        let spec = site.host.network("front")?;
        (spec.groups.first()?.addresses == [admin.ipv4_address.clone()]).then_some(spec)
    });
    let web = told
        .endpoints
        .iter()
        .find(|endpoint| endpoint.vm_id == "web")
        .unwrap();
    assert!(web.filtered);
    let rule = &web.rules[0];
    assert_eq!(
        (
            rule.protocol,
            rule.first_port,
            rule.last_port,
            rule.group.as_str()
        ),
        (6, 22, 22, "admins")
    );

    let delete = pb::DeleteSecurityGroupRequest {
        name: group_name("admins"),
        ..Default::default()
    };
    let refused = c
        .security_groups()
        .delete_security_group(delete)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    delete_vm(c, "ops").await;
    poll("the member's end", || {
        let spec = site.host.network("front")?;
        spec.groups.first()?.addresses.is_empty().then_some(())
    });
    let update = pb::UpdateSecurityGroupRequest {
        security_group: Some(pb::SecurityGroup {
            name: group_name("ssh"),
            rules: vec![],
            ..Default::default()
        }),
    };
    let changed = c
        .security_groups()
        .update_security_group(update)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (changed.generation, changed.members),
        (2, vec!["web/nic0".to_owned()])
    );
    poll("the change", || {
        let spec = site.host.network("front")?;
        (spec.endpoints[0].filtered && spec.endpoints[0].rules.is_empty()).then_some(())
    });
}
