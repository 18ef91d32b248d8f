//! The binaries as a shell sees them: exit codes, standard output, standard error.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::{self, JoinHandle};

use api::replication::ReplicationInfo;

const VMM: &str = env!("CARGO_BIN_EXE_cloud-hypervisor");
const REMOTE: &str = env!("CARGO_BIN_EXE_ch-remote");

fn run(program: &str, arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
    read(&output)
}

fn read(output: &Output) -> (i32, String, String) {
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout.clone()).unwrap(),
        String::from_utf8(output.stderr.clone()).unwrap(),
    )
}

#[test]
fn the_version_is_one_that_clients_take() {
    for flag in ["--version", "-V"] {
        let (code, out, _) = run(VMM, &[flag]);
        assert_eq!(code, 0);
        let version = out.strip_prefix("cloud-hypervisor v").unwrap();
        let mut numbers = version.split(['.', '-', '\n']);
        let major: u32 = numbers.next().unwrap().parse().unwrap();
        let _minor: u32 = numbers.next().unwrap().parse().unwrap();
        assert!(major >= 40, "{out}");
    }
}

#[test]
fn a_usage_error_exits_with_two_and_names_the_flag() {
    for (arguments, message) in [
        (&[][..], "nothing to do"),
        (&["--no-such-flag"], "--no-such-flag"),
        (&["--kernel", "/k", "--cpus", "boot=1,cores=2"], "\"cores\" is unknown"),
        (&["--kernel", "/k", "--memory", "size=4Q"], "\"size\" takes a size"),
        (&["--kernel", "/k", "--memory", "size=1G,size=2G"], "\"size\" is given more than once"),
        (&["--kernel", "/k", "--serial", "vga"], "--serial"),
        (&["--cpus", "boot=1"], "--kernel"),
        (&["--initramfs", "/i"], "--kernel"),
        (&["--replicate", "destination_url=tcp:a:1"], "--kernel"),
        (&["--api-socket", "/s", "--replicate", "destination_url=tcp:a:1"], "--kernel"),
        (&["--kernel", "/k", "--replicate", "epoch_ms=5"], "\"destination_url\" is required"),
        (&["--kernel", "/k", "--restore", "source_url=file:///a"], "--restore"),
        (&["--kernel", "/k", "--receive-replica", "receiver_url=tcp:a:1"], "--receive-replica"),
    ] {
        let (code, out, error) = run(VMM, arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}: {error}");
        assert!(error.contains(message), "{arguments:?}: {error}");
    }
}

/// What is said to whoever wants RDMA here.
fn without_rdma() -> &'static str {
    let devices = std::fs::read_dir("/sys/class/infiniband");
    let any = devices.is_ok_and(|mut devices| devices.next().is_some());
    if any { "Cannot resolve 'a.invalid:1'" } else { "This host cannot do RDMA" }
}

#[test]
fn a_configuration_error_exits_with_one_and_the_whole_chain() {
    const VHOST: &str = "vhost_user=on,socket=/s";
    let arguments = ["--kernel", "/k", "--cpus", "boot=4,max=2", "--disk", VHOST];
    let (code, out, error) = run(VMM, &arguments);
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(
        error,
        "Error: The VM's configuration is not valid\n  \
           caused by: cpus.boot_vcpus must be cpus.max_vcpus (2) at most, not 4\n  \
           caused by: disks vhost_user is not supported: it would bypass replication\n"
    );
    for (arguments, message) in [
        (&["--kernel", "/k", "--serial", "tty"][..], "serial.mode Tty contradicts"),
        // Of a name that nobody resolves, should this host have RDMA.
        (&["--receive-replica", "receiver_url=rdma:a.invalid:1"], without_rdma()),
        (
            &["--kernel", "/k", "--replicate", "destination_url=unix:/s,tls_dir=/t"],
            "tls_dir contradicts destination_url",
        ),
        (
            &["--receive-replica", "receiver_url=tcp:127.0.0.1:1,tls_dir=/nonexistent/tls"],
            "Cannot read '/nonexistent/tls/ca-cert.pem': No such file",
        ),
        (&["--api-socket", "fd=999"], "Descriptor 999 of --api-socket is not open"),
        (
            &["--api-socket", "/s", "--event-monitor", "path=/nonexistent/events"],
            "Cannot open the event monitor /nonexistent/events",
        ),
        (
            &["--api-socket", "/s", "--log-file", "/nonexistent/log"],
            "Cannot open the log file /nonexistent/log",
        ),
    ] {
        let (code, _, error) = run(VMM, arguments);
        assert_eq!(code, 1, "{error}");
        assert!(error.contains(message), "{error}");
    }
}

/// A server for one request, which it gives back.
fn answer_once(path: &Path, answer: &'static str) -> JoinHandle<String> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = String::new();
        let mut chunk = [0; 4096];
        loop {
            let count = stream.read(&mut chunk).unwrap();
            request.push_str(std::str::from_utf8(&chunk[..count]).unwrap());
            if let Some((head, body)) = request.split_once("\r\n\r\n") {
                let length = head.split_once("Content-Length: ").unwrap().1;
                let length: usize = length.lines().next().unwrap().parse().unwrap();
                if count == 0 || body.len() >= length {
                    break;
                }
            }
        }
        stream.write_all(answer.as_bytes()).unwrap();
        request
    })
}

/// Runs a command against a server that answers `answer`: the request and what the shell sees.
fn remote(
    arguments: &[&str],
    input: &str,
    answer: &'static str,
) -> (String, (i32, String, String)) {
    remote_to(Stdio::piped(), arguments, input, answer)
}

/// [`remote`] with a standard output of the caller's.
fn remote_to(
    out: Stdio,
    arguments: &[&str],
    input: &str,
    answer: &'static str,
) -> (String, (i32, String, String)) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    let serving = answer_once(&path, answer);
    let mut child = Command::new(REMOTE)
        .arg(format!("--api-socket={}", path.display()))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(out)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    (serving.join().unwrap(), read(&output))
}

const NO_CONTENT: &str = "HTTP/1.1 204 No Content\r\n\r\n";

#[test]
fn every_command_makes_its_request() {
    for (arguments, line, body) in [
        (&["boot"][..], "PUT /api/v1/vm.boot", ""),
        (&["counters"], "GET /api/v1/vm.counters", ""),
        (&["delete"], "PUT /api/v1/vm.delete", ""),
        (&["info"], "GET /api/v1/vm.info", ""),
        (&["nmi"], "PUT /api/v1/vm.nmi", ""),
        (&["pause"], "PUT /api/v1/vm.pause", ""),
        (&["ping"], "GET /api/v1/vmm.ping", ""),
        (&["power-button"], "PUT /api/v1/vm.power-button", ""),
        (&["reboot"], "PUT /api/v1/vm.reboot", ""),
        (&["resume"], "PUT /api/v1/vm.resume", ""),
        (&["shutdown"], "PUT /api/v1/vm.shutdown", ""),
        (&["shutdown-vmm"], "PUT /api/v1/vmm.shutdown", ""),
        (
            &["snapshot", "file:///a"],
            "PUT /api/v1/vm.snapshot",
            "{\"destination_url\":\"file:///a\"}",
        ),
        (
            &["restore", "source_url=file:///a,resume=on"],
            "PUT /api/v1/vm.restore",
            "{\"source_url\":\"file:///a\",\"prefault\":false,\"resume\":true}",
        ),
        (
            &["send-migration", "--local", "unix:/a"],
            "PUT /api/v1/vm.send-migration",
            "{\"destination_url\":\"unix:/a\",\"local\":true}",
        ),
        (
            &["receive-migration", "receiver_url=tcp:a:1"],
            "PUT /api/v1/vm.receive-migration",
            "{\"receiver_url\":\"tcp:a:1\"}",
        ),
        (&["remove-device", "x"], "PUT /api/v1/vm.remove-device", "{\"id\":\"x\"}"),
        (&["stop-replication"], "PUT /api/v1/vm.stop-replication", ""),
        (&["failover"], "PUT /api/v1/vm.failover", "{\"force\":false}"),
        (&["failover", "--force"], "PUT /api/v1/vm.failover", "{\"force\":true}"),
        (&["replication-info"], "GET /api/v1/vm.replication-info", ""),
    ] {
        let (request, (code, out, error)) = remote(arguments, "", NO_CONTENT);
        assert_eq!((code, out.as_str(), error.as_str()), (0, "", ""), "{arguments:?}");
        assert!(request.starts_with(&format!("{line} HTTP/1.1\r\n")), "{request}");
        assert_eq!(request.split_once("\r\n\r\n").unwrap().1, body);
    }
}

#[test]
fn devices_and_replication_are_told_in_option_syntax() {
    for (arguments, line, part) in [
        (["add-disk", "path=/a"], "PUT /api/v1/vm.add-disk", "\"path\":\"/a\""),
        (["add-net", "tap=t"], "PUT /api/v1/vm.add-net", "\"tap\":\"t\""),
        (
            ["replicate", "destination_url=tcp:b:1,epoch_ms=7"],
            "PUT /api/v1/vm.replicate",
            "\"destination_url\":\"tcp:b:1\",\"epoch_ms\":7",
        ),
        (
            ["receive-replica", "receiver_url=tcp:b:1,serial=file:/s"],
            "PUT /api/v1/vm.receive-replica",
            "\"serial\":{\"mode\":\"File\",\"file\":\"/s\"",
        ),
    ] {
        let (request, (code, _, error)) = remote(&arguments, "", NO_CONTENT);
        assert_eq!(code, 0, "{error}");
        assert!(request.starts_with(line) && request.contains(part), "{request}");
    }
}

#[test]
fn a_configuration_comes_from_a_file_or_from_standard_input() {
    let text = "{\"payload\": {}}\n";
    for arguments in [&["create"][..], &["create", "-"]] {
        let (request, (code, ..)) = remote(arguments, text, NO_CONTENT);
        assert_eq!(code, 0);
        assert!(request.ends_with(&format!("\r\n\r\n{text}")), "{request}");
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, text).unwrap();
    let path = file.path().to_str().unwrap();
    let (request, _) = remote(&["create", path], "", NO_CONTENT);
    assert!(request.ends_with(&format!("\r\n\r\n{text}")), "{request}");
    let (code, _, error) = run(REMOTE, &["--api-socket=/s", "create", "/nonexistent"]);
    assert_eq!(code, 1);
    assert!(error.starts_with("Error: Cannot open /nonexistent\n  caused by: No such"), "{error}");
}

#[test]
fn bodies_are_printed_and_refusals_told_whole() {
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{\"a\":1}";
    let (_, (code, out, _)) = remote(&["info"], "", answer);
    assert_eq!((code, out.as_str()), (0, "{\"a\":1}\n"));
    let answer = "HTTP/1.1 404 Not Found\r\nContent-Length: 12\r\n\r\n[\"No\",\"why\"]";
    let (_, (code, out, error)) = remote(&["info"], "", answer);
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(
        error,
        "Error: vm.info failed\n  caused by: Server answered 404 Not Found\n  \
         caused by: No\n  caused by: why\n"
    );
    let (code, _, error) = run(REMOTE, &["--api-socket=/nonexistent", "ping"]);
    assert_eq!(code, 1);
    assert!(error.contains("Cannot connect to the API socket /nonexistent"), "{error}");
    assert_eq!(run(REMOTE, &["--api-socket=/s", "dance"]).0, 2);
    let (code, _, error) = run(REMOTE, &["ping"]);
    assert!(code == 2 && error.contains("needs --api-socket"), "{error}");
    assert_eq!(run(REMOTE, &["--api-socket=/s", "replicate", "cow=x"]).0, 2);
    // The server would have closed the connection by then.
    let watch = ["--api-socket=/s", "replication-info", "--watch", "--interval=61000"];
    let (code, _, error) = run(REMOTE, &watch);
    assert!(code == 2 && error.contains("61000 is not in 10..=30000"), "{error}");
}

#[test]
fn an_answer_that_cannot_be_written_is_an_error_unless_nobody_reads() {
    let info = serde_json::to_string(&ReplicationInfo::default()).unwrap();
    let length = info.len();
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{info}");
    let answer: &'static str = answer.leak();
    for arguments in [&["replication-info"][..], &["replication-info", "--watch"]] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (_, (code, _, error)) = remote_to(full.into(), arguments, "", answer);
        assert_eq!(code, 1, "{error}");
        let said = "Error: Cannot write to standard output\n  caused by: No space left on device";
        assert!(error.starts_with(said), "{error}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let (_, (code, _, error)) = remote_to(writer.into(), arguments, "", answer);
        assert_eq!((code, error.as_str()), (0, ""), "{arguments:?}");
    }
}

#[test]
fn rdma_devices_says_what_this_host_has_without_a_vmm() {
    let (code, out, error) = run(REMOTE, &["rdma-devices"]);
    let devices = std::fs::read_dir("/sys/class/infiniband");
    let names: Vec<String> = devices
        .map(|all| all.map(|one| one.unwrap().file_name().into_string().unwrap()).collect())
        .unwrap_or_default();
    // The exit code says whether this host can do RDMA. (libibverbs warns by itself, too.)
    let refused = error.contains("Error: This host cannot do RDMA\n  caused by: ");
    assert!(matches!((code, refused), (0, false) | (1, true)), "{code}: {error}");
    if error.contains("needs the library") {
        assert_eq!(out, "");
    } else if names.is_empty() {
        assert_eq!(code, 1);
        assert!(error.contains("There is no RDMA device: load the adapter's driver"), "{error}");
    } else {
        assert!(names.iter().all(|name| out.contains(&format!("{name}\n"))), "{out}");
    }
}

#[test]
fn rdma_devices_names_the_package_that_is_missing() {
    // The loader takes this one first, and finds that it is none.
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("libibverbs.so.1"), "").unwrap();
    let mut command = Command::new(REMOTE);
    let command = command.arg("rdma-devices").env("LD_LIBRARY_PATH", directory.path());
    let (code, out, error) = read(&command.output().unwrap());
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(error.starts_with("Error: This host cannot do RDMA\n  caused by: RDMA needs the"));
    assert!(error.contains("install the packages libibverbs1 and ibverbs-providers"), "{error}");
}
