//! The command line client: one command, one request; but for `rdma-devices`, which looks at this host.
//!
//! The body of a successful answer goes to standard output; the chain of errors goes to standard
//! error, with exit code 1. A usage error exits with 2.
#![forbid(unsafe_code)]

mod command;
mod output;
mod rdma_devices;
mod watch;

use std::io::{self, IoSlice, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use api::client::{Client, ClientError};
use api::response::BUILD_VERSION;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use command::Command;

/// Remote control of a running cloud-hypervisor.
#[derive(Debug, Parser)]
#[command(name = "ch-remote", version = BUILD_VERSION)]
#[command(
    override_usage = "ch-remote --api-socket <PATH> <COMMAND>\n       ch-remote rdma-devices"
)]
struct Cli {
    /// The socket that cloud-hypervisor was started with; all commands but rdma-devices need it
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if let Command::RdmaDevices = cli.command {
        return rdma_devices::run();
    }
    let Some(socket) = cli.api_socket else {
        let message = "this command needs --api-socket <PATH>";
        Cli::command().error(ErrorKind::MissingRequiredArgument, message).exit();
    };
    if let Command::ReplicationInfo { watch: true, interval, .. } = cli.command {
        return watch::run(&socket, interval);
    }
    let request = cli.command.request()?;
    let mut client = Client::connect(&socket)?;
    let body = client
        .call_by(request.method, request.name, request.body.as_deref(), |stream, bytes| {
            send(stream, bytes, &request.fds)
        })
        .with_context(|| format!("{} failed", request.name))?;
    if !body.is_empty() {
        output::print(&format!("{body}\n"))?;
    }
    Ok(())
}

/// Sends the first bytes of a request, and `fds` with them (unix(7), SCM_RIGHTS).
fn send(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> io::Result<usize> {
    let bytes = [IoSlice::new(bytes)];
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
    Ok(sendmsg::<()>(stream.as_raw_fd(), &bytes, rights, MsgFlags::MSG_NOSIGNAL, None)?)
}

/// The whole chain: ours, then what the server says, outermost cause first.
fn report(error: &anyhow::Error) {
    let mut causes: Vec<_> = error.chain().skip(1).map(ToString::to_string).collect();
    if let Some(ClientError::Refused { chain, .. }) = error.downcast_ref() {
        causes.extend_from_slice(chain);
    }
    let mut text = format!("Error: {error}\n");
    for cause in causes {
        text.push_str(&format!("  caused by: {cause}\n"));
    }
    // Where nobody can be told, the exit code still says it.
    let _ = io::stderr().write_all(text.as_bytes());
}
