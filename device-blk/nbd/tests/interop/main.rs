//! Both ends against QEMU's: its server for our client, its client for our server, in the clear
//! and with TLS.

mod parties;
mod tls;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nbd::Address;
use nbd::client::{Command, Options, State};
use nix::sys::signal::Signal;

use parties::{
    MIB, Own, QemuNbd, await_true, connect, has_tool, image, options, pattern, run, said,
};

#[test]
fn client_reads_and_writes_what_qemu_serves() {
    if !has_tool("qemu-nbd") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let image = image(place.path(), "a.img", 16 * MIB);
    let socket = place.path().join("nbd");
    let _server = QemuNbd::start(&image, &socket, &[]);
    let options = Options {
        connections: 4,
        ..options()
    };
    let client = connect(&Address::Unix(socket), options).unwrap();
    assert_eq!(client.size_bytes(), 16 * MIB);
    let data = pattern(1, 3 << 20);
    client.write_at(512 * 3, data.clone()).unwrap();
    assert!(client.read_at(512 * 3, data.len() as u32).unwrap() == data);
    for may_unmap in [false, true] {
        let zeroes = Command::WriteZeroes {
            offset_bytes: MIB,
            len_bytes: 1 << 20,
            may_unmap,
            fua: true,
        };
        client.perform(zeroes).unwrap();
    }
    assert!(client.read_at(MIB, 1 << 20).unwrap() == vec![0; 1 << 20]);
    let trim = Command::Trim {
        offset_bytes: 8 * MIB,
        len_bytes: 4 << 20,
    };
    client.perform(trim).unwrap();
    client.perform(Command::Flush).unwrap();
    let mut found = vec![0; 4096];
    let file = std::fs::File::open(&image).unwrap();
    file.read_exact_at(&mut found, 512 * 3).unwrap();
    assert_eq!(found, data[..4096]);
}

#[test]
fn what_a_server_cannot_give_is_named() {
    if !has_tool("qemu-nbd") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let image = image(place.path(), "a.img", MIB);
    let socket = place.path().join("nbd");
    let _server = QemuNbd::start(&image, &socket, &["-r"]);
    let address = Address::Unix(socket);
    let elsewhere = Options {
        export: "elsewhere".into(),
        ..options()
    };
    let error = connect(&address, elsewhere).unwrap_err();
    assert!(error.contains("no export \"elsewhere\""), "{error}");
    let error = connect(&address, options()).unwrap_err();
    assert!(error.contains("attach it read-only"), "{error}");
    let generation = Options {
        generation: Some(nbd::Generation(3)),
        read_only: true,
        ..options()
    };
    let error = connect(&address, generation).unwrap_err();
    assert!(error.contains("does not check generations"), "{error}");
    let read_only = Options {
        read_only: true,
        ..options()
    };
    let client = connect(&address, read_only).unwrap();
    assert_eq!(client.write_at(0, vec![1; 512]), Err(libc::EROFS));
    assert_eq!(client.read_at(0, 512).unwrap(), vec![0; 512]);
}

/// Writers write blocks and read them back; meanwhile the server is killed and started again, or
/// stands still and goes on.
#[test]
fn killed_and_stopped_servers_cost_no_request() {
    if !has_tool("qemu-nbd") {
        return;
    }
    const BLOCK_BYTES: u64 = 64 << 10;
    let place = tempfile::tempdir().unwrap();
    let image = image(place.path(), "a.img", 16 * MIB);
    let socket = place.path().join("nbd");
    let mut server = QemuNbd::start(&image, &socket, &[]);
    let options = Options {
        connections: 2,
        stall_timeout: Duration::from_millis(300),
        ..options()
    };
    let client = Arc::new(connect(&Address::Unix(socket.clone()), options).unwrap());
    let is_done = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4_u64)
        .map(|writer| {
            let (client, is_done) = (Arc::clone(&client), Arc::clone(&is_done));
            std::thread::spawn(move || {
                let mut written = 0;
                while !is_done.load(Ordering::Acquire) {
                    let offset = (writer * 32 + written % 32) * BLOCK_BYTES;
                    let data = pattern(writer * 1000 + written, BLOCK_BYTES as usize);
                    client.write_at(offset, data.clone()).unwrap();
                    let found = client.read_at(offset, BLOCK_BYTES as u32).unwrap();
                    assert!(found == data, "writer {writer}, block {written}");
                    written += 1;
                }
                written
            })
        })
        .collect();
    for round in 0..4 {
        if round < 2 {
            drop(server);
            std::fs::remove_file(&socket).unwrap();
            server = QemuNbd::start(&image, &socket, &[]);
        } else {
            server.signal(Signal::SIGSTOP);
            await_true("the silence is noticed", || {
                client.status().state == State::Stalled
            });
            server.signal(Signal::SIGCONT);
        }
        // Who stands still loses no session.
        let reconnects = (round + 1).min(2);
        await_true("requests are served again", || {
            let status = client.status();
            status.reconnects == reconnects && status.state == State::Serving
        });
        client.perform(Command::Flush).unwrap();
    }
    is_done.store(true, Ordering::Release);
    for writer in writers {
        assert!(writer.join().unwrap() > 0);
    }
}

#[test]
fn qemu_uses_what_we_serve() {
    if !has_tool("qemu-io") || !has_tool("qemu-img") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let path = image(place.path(), "a.img", 16 * MIB);
    let socket = place.path().join("nbd");
    let _server = Own::on_unix(&path, &socket);
    let url = format!("nbd+unix:///disk?socket={}", socket.display());
    let mut args = vec!["-f", "raw"];
    for command in [
        "write -P 0xa5 0 3M",
        "write -f -P 0x5a 3146240 1024",
        "read -P 0xa5 0 3M",
        "read -P 0x5a 3146240 1024",
        "write -z 1M 64k",
        "write -z -u 2M 64k",
        "read -P 0 1M 64k",
        "read -P 0 2M 64k",
        "discard 4M 1M",
        "flush",
        "aio_write -P 7 8M 1M",
        "aio_write -P 8 9M 1M",
        "aio_read -P 0xa5 0 64k",
        "aio_flush",
    ] {
        args.extend(["-c", command]);
    }
    args.push(&url);
    let done = run("qemu-io", &args);
    let text = said(&done);
    assert!(done.status.success() && !text.contains("ailed"), "{text}");

    // Its client asks for block sizes and base:allocation, opens and closes.
    let info = said(&run(
        "qemu-img",
        &["info", "--output=json", "-f", "raw", &url],
    ));
    assert!(info.contains("\"virtual-size\": 16777216"), "{info}");
    let map = said(&run(
        "qemu-img",
        &["map", "--output=json", "-f", "raw", &url],
    ));
    assert!(map.contains("\"zero\": true, \"data\": false"), "{map}");
    let path = path.to_str().unwrap();
    let copy = place.path().join("copy.qcow2");
    let copy = copy.to_str().unwrap();
    for args in [
        ["compare", "-U", "-f", "raw", "-F", "raw", &url, path].as_slice(),
        // A whole conversion over the wire, and back.
        &["convert", "-f", "raw", "-O", "qcow2", &url, copy],
        &["compare", "-f", "qcow2", "-F", "raw", copy, path],
        &["convert", "-n", "-f", "qcow2", "-O", "raw", copy, &url],
        &["compare", "-f", "qcow2", "-F", "raw", copy, path],
    ] {
        let done = run("qemu-img", args);
        assert!(done.status.success(), "{args:?}: {}", said(&done));
    }
    let missing = run(
        "qemu-io",
        &["-c", "read 0 512", &url.replace("/disk", "/elsewhere")],
    );
    assert!(!missing.status.success(), "{}", said(&missing));
}
