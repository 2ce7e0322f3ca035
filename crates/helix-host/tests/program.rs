// SPDX-License-Identifier: MIT OR Apache-2.0

//! The program from outside: options, messages, signals.

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::Peer;
use common::metrics::{figure, figures_at};
use common::program::{Running, helix_host};
use helix_protocol::message::{AuthToken, Config, FrameRequest, Hello, PixelFormat};
use helix_protocol::{Address, Message, encode};
use zerocopy_test_qemu::eventually;

/// Runs it to its end.
fn outcome(arguments: &[&str]) -> (Option<i32>, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = helix_host(arguments).output().unwrap();
    let text = [stdout, stderr].concat();
    (status.code(), String::from_utf8(text).unwrap())
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

#[test]
fn signals_end_it_cleanly_and_remove_its_sockets() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("helix.sock");
        let mut host = Running::start(&[
            "--listen",
            "tcp:127.0.0.1:0",
            "--listen",
            &unix(&path),
            "--encoder",
            "x264enc",
            "--scanout",
            "0=videotestsrc is-live=true ! video/x-raw,width=64,height=64",
        ]);
        let tcp = host.address();
        assert!(
            matches!(tcp, Address::Tcp { port, .. } if port != 0),
            "{tcp}"
        );
        assert_eq!(host.address().to_string(), unix(&path));
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut subscribed = Peer::connect(&unix(&path).parse().unwrap());
        subscribed.subscribe(0);
        subscribed.next_frame();
        let mut idle = Peer::connect(&tcp);
        idle.expect_pong();
        let (code, log) = host.end_by(signal);
        assert_eq!(code, Some(0), "{log}");
        assert!(!path.exists());
        idle.expect_end();
    }
}

#[test]
fn a_stale_unix_socket_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("helix.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let arguments = ["--listen", &unix(&path), "--encoder", "x264enc"];
    let mut host = Running::start(&arguments);
    host.address();
    Peer::connect(&unix(&path).parse().unwrap()).expect_pong();
    let (code, text) = outcome(&arguments);
    assert_eq!(code, Some(1));
    assert!(text.contains("already running"), "{text}");
    Peer::connect(&unix(&path).parse().unwrap()).expect_pong();
    assert_eq!(host.end_by(libc::SIGTERM).0, Some(0));
    // A file that is no socket is somebody's.
    std::fs::write(&path, "precious").unwrap();
    let (code, text) = outcome(&arguments);
    assert_eq!(code, Some(1));
    assert!(text.contains("no socket"), "{text}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn help_names_every_option_and_teaches_by_example() {
    let (code, text) = outcome(&["--help"]);
    assert_eq!(code, Some(0));
    for part in [
        "--listen",
        "--encoder",
        "--scanout",
        "--qemu",
        "--metrics",
        "--token-file",
        "--allow-cid",
        "--max-clients",
        "--max-frame-bytes",
        "--verbose",
        "--log-format",
        "tcp:127.0.0.1:15937",
        "vsock:5000",
        "Examples:",
        "67108864",
    ] {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
    // Its page has a row for each option, and no others.
    let page = include_str!("../../../docs/helix-host.md");
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| `-"))
        .collect::<String>();
    let options = |text: &str| -> BTreeSet<String> {
        text.split(|c: char| !(c == '-' || c.is_ascii_lowercase()))
            .filter(|word| word.starts_with("--") && word.len() > 2)
            .map(str::to_owned)
            .collect()
    };
    let usage = text.split("Examples:").next().unwrap();
    assert_eq!(options(&rows), options(usage));
}

#[test]
fn wrong_arguments_are_explained() {
    let cases: [(&[&str], i32, &[&str]); 12] = [
        (&["--listen", "127.0.0.1:1"], 2, &["tcp:HOST:PORT"]),
        (&["--listen", "tcp:127.0.0.1:x"], 2, &["port"]),
        (&["--max-clients", "0"], 2, &["1.."]),
        (&["--scanout", "videotestsrc"], 2, &["ID=DESCRIPTION"]),
        (&["--qemu", "/run/qmp"], 2, &["dbus:ADDRESS", "qmp:SOCKET"]),
        (&["--metrics", "127.0.0.1:1"], 2, &["tcp:HOST:PORT"]),
        (&["--scanout", "16=videotestsrc"], 2, &["0 to 15"]),
        (
            &["--scanout", "1=videotestsrc", "--scanout", "1=videotestsrc"],
            1,
            &["scanout 1", "twice"],
        ),
        (
            &["--scanout", "1=nosuchsrc ! videoconvert"],
            1,
            &["scanout 1", "nosuchsrc", "gst-launch-1.0"],
        ),
        (
            &["--scanout", "1=audiotestsrc"],
            1,
            &["scanout 1", "audiotestsrc"],
        ),
        (
            &["--encoder", "nosuchenc"],
            1,
            &["nosuchenc", "gst-inspect"],
        ),
        (&["--encoder", "h264parse"], 1, &["h264parse", "no H.264"]),
    ];
    for (arguments, expected, parts) in cases {
        let (code, text) = outcome(arguments);
        assert_eq!(code, Some(expected), "{arguments:?}: {text}");
        for part in parts {
            assert!(text.contains(part), "{arguments:?}: no '{part}' in: {text}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    let with_token = |bytes: &str, mode| {
        std::fs::write(&token, bytes).unwrap();
        std::fs::set_permissions(&token, PermissionsExt::from_mode(mode)).unwrap();
        outcome(&["--token-file", token.to_str().unwrap()])
    };
    for ((code, text), part) in [
        (with_token("secret", 0o644), "chmod 600"),
        (with_token("\n", 0o600), "empty"),
        (with_token(&"x".repeat(2000), 0o600), "1024"),
        (outcome(&["--token-file", "/nonexistent"]), "/nonexistent"),
        (outcome(&["--allow-cid", "3"]), "--listen vsock:PORT"),
    ] {
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains(part), "no '{part}' in: {text}");
    }
    assert_eq!(outcome(&["--allow-cid", "x"]).0, Some(2));
    let (code, text) = outcome(&["--encoder", "x264enc no-such-property=1"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("no-such-property"), "{text}");
}

#[test]
fn the_log_can_be_json_and_warns_of_open_doors() {
    let mut host = Running::start(&[
        "--listen",
        "tcp:0.0.0.0:0",
        "--encoder",
        "auto",
        "--log-format",
        "json",
        "-v",
    ]);
    host.address();
    let (code, log) = host.end_by(libc::SIGTERM);
    assert_eq!(code, Some(0));
    assert!(
        log.lines()
            .all(|line| line.starts_with('{') && line.ends_with('}')),
        "{log}"
    );
    assert!(log.contains("reachable from outside"), "{log}");
    assert!(log.contains("encoder chosen"), "{log}");
}

#[test]
fn a_token_is_never_logged() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "open sesame").unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    let mut host = Running::start(&[
        "-vv",
        "--listen",
        "tcp:0.0.0.0:0",
        "--encoder",
        "x264enc",
        "--token-file",
        file.to_str().unwrap(),
    ]);
    let Address::Tcp { port, .. } = host.address() else {
        panic!("not TCP");
    };
    let address = format!("tcp:127.0.0.1:{port}").parse().unwrap();
    let greeting = |token: &str| Hello {
        auth_token: Some(AuthToken(token.into())),
        ..common::hello()
    };
    Peer::connect(&address).greet(&greeting("open sesame"));
    let mut wrong = Peer::connect(&address);
    let (head, tlvs) = encode::hello(1, &greeting("open barley"));
    wrong.connection.send_with(head, tlvs);
    wrong.next_error();
    wrong.expect_end();
    let (code, log) = host.end_by(libc::SIGTERM);
    assert_eq!(code, Some(0));
    assert!(
        log.contains("HELLO") && log.contains("unencrypted"),
        "{log}"
    );
    assert!(log.contains("the auth token is wrong"), "{log}");
    assert!(!log.contains("sesame") && !log.contains("barley"), "{log}");
    let warned = |text: &str| {
        let hit = |line: &&str| line.contains("WARN") && line.contains(text);
        log.lines().filter(hit).count()
    };
    assert_eq!(warned("HELLO with a wrong token"), 1, "{log}");
    assert_eq!(warned("fewer than 16 bytes"), 1, "{log}");
}

#[test]
fn a_client_does_not_fill_the_log() {
    let mut host = Running::start(&[
        "--listen",
        "tcp:127.0.0.1:0",
        "--encoder",
        "x264enc",
        "--scanout",
        "1=videotestsrc is-live=true ! video/x-raw,width=64,height=64,framerate=1/30",
    ]);
    let mut peer = Peer::connect(&host.address());
    for _ in 0..100 {
        peer.send(encode::subscribe(0));
        peer.send(encode::subscribe(1));
        peer.send(encode::config_req(1, &Config::default()));
        peer.send(encode::ping(2));
        while !matches!(peer.next().message, Message::Pong) {}
    }
    let (code, log) = host.end_by(libc::SIGTERM);
    assert_eq!(code, Some(0));
    assert_eq!(log.matches("subscribed").count(), 1, "{log}");
    assert!(log.lines().count() < 30, "{log}");
}

#[test]
fn too_few_descriptors_turn_clients_away_and_nothing_spins() {
    let mut child = Command::new("sh")
        .args(["-c", "ulimit -n 40; exec \"$0\" \"$@\""])
        .arg(env!("CARGO_BIN_EXE_helix-host"))
        .args(["--listen", "tcp:127.0.0.1:0", "--encoder", "x264enc"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let mut host = Running { child, stdout };
    let address = host.address();
    let Address::Tcp { host: ip, port } = &address else {
        panic!("{address}");
    };
    let crowd: Vec<_> = (0..60)
        .map(|_| std::net::TcpStream::connect((ip.as_str(), *port)).unwrap())
        .collect();
    let before = cpu_ticks(host.child.id());
    std::thread::sleep(std::time::Duration::from_millis(500));
    // Of the 50 ticks of 10 ms that passed.
    let used = cpu_ticks(host.child.id()) - before;
    assert!(used < 15, "{used} ticks");
    drop(crowd);
    // As soon as there are descriptors again, clients are served. Some of the crowd may come
    // first.
    let until = std::time::Instant::now() + common::LONG;
    loop {
        let mut peer = Peer::connect(&address);
        peer.send(encode::ping(1));
        if peer.try_next().is_ok() {
            break;
        }
        assert!(std::time::Instant::now() < until);
    }
    let (code, log) = host.end_by(libc::SIGTERM);
    assert_eq!(code, Some(0), "{log}");
    // Once an episode, not once an attempt.
    assert!(log.matches("trying again").count() < 10, "{log}");
}

/// User and system time of a process, in clock ticks (proc(5), fields 14 and 15 of stat).
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit_once(')').unwrap().1;
    fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|ticks| ticks.parse::<u64>().unwrap())
        .sum()
}

#[test]
fn clients_that_come_and_go_leave_nothing_behind() {
    let mut host = Running::start(&[
        "--listen",
        "tcp:127.0.0.1:0",
        "--encoder",
        "x264enc",
        "--scanout",
        "0=videotestsrc is-live=true ! video/x-raw,width=64,height=64,framerate=60/1",
    ]);
    let address = host.address();
    let pid = host.child.id();
    let picture = common::Rgb::pattern(64, 64, 0);
    let visit = |times: usize| {
        for time in 0..times {
            let mut peer = Peer::connect(&address);
            if time % 4 == 0 {
                peer.subscribe(0);
                peer.next_frame();
            } else {
                peer.encode(&picture, PixelFormat::Bgra, 0, false);
            }
        }
        // The last client may still be going, and the scanout lingers. Then only the thread that
        // accepts is left, and the one of figures.
        let until = std::time::Instant::now() + common::LONG;
        loop {
            if own_threads(pid) == 2 {
                return usage(pid);
            }
            assert!(std::time::Instant::now() < until, "threads stay");
            // /proc tells nobody when it changes.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    };
    let (fds, threads, kilobytes) = visit(20);
    let (fds_after, threads_after, kilobytes_after) = visit(80);
    assert!(fds_after <= fds + 4, "{fds} {fds_after} descriptors");
    // GLib keeps some threads of its pools for later.
    assert!(
        threads_after <= threads + 4,
        "{threads} {threads_after} threads"
    );
    assert!(
        kilobytes_after < kilobytes + 16 * 1024,
        "{kilobytes} {kilobytes_after} KiB"
    );
    assert_eq!(host.end_by(libc::SIGTERM).0, Some(0));
}

#[test]
fn what_a_subscriber_does_not_read_is_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    // Not TCP, whose buffers grow to megabytes.
    let listen = unix(&folder.path().join("helix.sock"));
    let mut host = Running::start(&[
        "--listen",
        &listen,
        "--metrics",
        "tcp:127.0.0.1:0",
        // Frames nearly as large as the pictures.
        "--encoder",
        "x264enc speed-preset=ultrafast pass=quant quantizer=4",
        "--scanout",
        "0=videotestsrc is-live=true pattern=snow ! video/x-raw,width=640,height=480,framerate=60/1",
    ]);
    let address = host.address();
    let metrics = host.metrics();
    let pid = host.child.id();
    let mut peer = Peer::connect(&address);
    peer.subscribe(0);
    let figure = |text: &str, name: &str| {
        figure(
            text,
            &format!("helix_scanout_{name}_total{{scanout=\"0\"}} "),
        )
    };
    // Frames that it has missed so far, bytes of all frames, resident KiB.
    let after = |dropped: u64| {
        eventually("frames that are dropped", || {
            let text = figures_at(&metrics);
            let missed = figure(&text, "dropped_frames");
            (missed >= dropped).then(|| (missed, figure(&text, "bytes"), usage(pid).2))
        })
    };
    // By now all that may wait does.
    let (dropped, bytes, kilobytes) = after(50);
    let (_, bytes_after, kilobytes_after) = after(dropped + 200);
    let passed = usize::try_from((bytes_after - bytes) / 1024).unwrap();
    assert!(passed > 32 * 1024, "{passed} KiB say nothing");
    let kept = kilobytes_after.saturating_sub(kilobytes);
    assert!(kept < passed / 4, "{kept} of {passed} KiB are kept");
    drop(peer);
}

#[test]
fn an_idle_client_keeps_no_memory_for_large_frames() {
    const FRAME: usize = 64 * 1024 * 1024;
    let mut host = Running::start(&["--listen", "tcp:127.0.0.1:0", "--encoder", "x264enc"]);
    let address = host.address();
    let pid = host.child.id();
    let mut peer = Peer::connect(&address);
    peer.expect_pong();
    let before = usage(pid).2;
    // It says nothing that makes sense: no encoder, whose memory is another matter, sees it.
    let (request, _) = common::Rgb::pattern(2, 2, 0).request(PixelFormat::Bgra, 0, 0, false);
    let request = FrameRequest {
        width: 0,
        ..request
    };
    peer.request(&request, vec![1; FRAME]);
    peer.next_error();
    let after = usage(pid).2;
    // Probing the encoder may give some memory back meanwhile.
    assert!(after >= before + FRAME / 1024 / 2, "{before} {after} KiB");
    let until = std::time::Instant::now() + common::LONG;
    while usage(pid).2 > before + FRAME / 1024 / 4 {
        assert!(std::time::Instant::now() < until, "the memory stays");
        // /proc tells nobody when it changes.
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    peer.expect_pong();
}

#[test]
fn a_keyframe_that_does_not_come_is_asked_for_again() {
    let mut host = Running::start(&[
        "-v",
        "--listen",
        "tcp:127.0.0.1:0",
        "--encoder",
        "x264enc",
        "--scanout",
        "0=videotestsrc is-live=true ! video/x-raw,width=64,height=64 ! valve drop=true",
    ]);
    let mut peer = Peer::connect(&host.address());
    peer.subscribe(0);
    let log = BufReader::new(host.child.stderr.take().unwrap());
    let (line, lines) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        for text in log.lines().map_while(Result::ok) {
            if text.contains("asking for a keyframe") && line.send(()).is_err() {
                break;
            }
        }
    });
    for _ in 0..2 {
        lines.recv_timeout(common::LONG).unwrap();
    }
    drop(host);
    reader.join().unwrap();
}

#[test]
fn a_signal_ends_it_while_it_is_still_starting() {
    let folder = tempfile::tempdir().unwrap();
    // GStreamer waits for ever for whoever writes its registry into this pipe.
    let registry = folder.path().join("registry");
    let made = Command::new("mkfifo").arg(&registry).status().unwrap();
    assert!(made.success());
    let mut child = helix_host(&["--listen", "tcp:127.0.0.1:0"])
        .env("GST_REGISTRY", &registry)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let mut host = Running { child, stdout };
    let pid = host.child.id();
    let until = std::time::Instant::now() + common::LONG;
    // /proc tells nobody when it changes.
    let pause = || {
        assert!(std::time::Instant::now() < until);
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    while !catches(pid, libc::SIGTERM) {
        pause();
    }
    // SAFETY: a signal to our own child, which has not been waited for; no memory involved.
    assert_eq!(unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) }, 0);
    let status = loop {
        if let Some(status) = host.child.try_wait().unwrap() {
            break status;
        }
        pause();
    };
    assert_eq!(status.code(), Some(0));
}

/// Whether a process has a handler for a signal (proc(5), SigCgt of status).
fn catches(pid: u32, signal: libc::c_int) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigCgt:"))
        .unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap() & (1 << (signal - 1)) != 0
}

/// Threads that helix-host started itself, by their names.
fn own_threads(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        // One may end between the two looks.
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.starts_with("helix-") && name.trim_end() != "helix-host")
        .count()
}

/// Descriptors, threads and resident KiB of a process.
fn usage(pid: u32) -> (usize, usize, usize) {
    let count = |what: &str| {
        std::fs::read_dir(format!("/proc/{pid}/{what}"))
            .unwrap()
            .count()
    };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next())
        .unwrap()
        .parse()
        .unwrap();
    (count("fd"), count("task"), resident)
}
