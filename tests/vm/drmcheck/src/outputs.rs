// SPDX-License-Identifier: MIT OR Apache-2.0

//! Outputs that the host connects while the guest runs.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use drm::control::{Device, connector};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use crate::Outcome;
use crate::node::{Kind, Node, VIRTIO_GPU};

/// The kernel's own events; group 2 would be udev's (linux/netlink.h).
const KERNEL_EVENTS: u32 = 1;

/// Returns when the connector `name` is connected and prefers `size`, in pixels; without a size, when
/// it is not connected.
pub fn wait_for(name: &str, size: Option<(u16, u16)>, limit: Duration) -> Outcome<()> {
    let deadline = Instant::now() + limit;
    let node = Node::open(VIRTIO_GPU, Kind::Primary)?;
    // Listens before it looks, so that no change falls between.
    let events = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(events.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
    loop {
        let outputs = outputs(&node)?;
        let there = outputs.iter().any(|output| {
            output.name == name
                && match size {
                    Some(size) => output.connected && output.preferred == Some(size),
                    None => !output.connected,
                }
        });
        let left = deadline.saturating_duration_since(Instant::now());
        if there || left.is_zero() {
            for output in &outputs {
                println!("{output}");
            }
        }
        if there {
            return Ok(());
        }
        if left.is_zero() {
            return Err(format!("{name}, wanted with {size:?}, is not so after {limit:?}").into());
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut wanted = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        if poll(&mut wanted, timeout)? > 0 {
            match recv(events.as_raw_fd(), &mut [0; 8192], MsgFlags::MSG_DONTWAIT) {
                // What it says does not matter, nor does how much of it was lost (netlink(7), ENOBUFS):
                // the outputs are looked at again.
                Ok(_) | Err(Errno::ENOBUFS) => {}
                Err(error) => return Err(format!("read the kernel's events: {error}").into()),
            }
        }
    }
}

/// What there is to say about a connector.
struct Output {
    name: String,
    connected: bool,
    /// Of the first mode, which is the preferred one (drm_mode_sort() in drm_modes.c).
    preferred: Option<(u16, u16)>,
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = if self.connected {
            "connected"
        } else {
            "disconnected"
        };
        write!(f, "output {} {state}", self.name)?;
        match self.preferred {
            Some((width, height)) => write!(f, " {width}x{height}"),
            None => Ok(()),
        }
    }
}

fn outputs(node: &Node) -> Outcome<Vec<Output>> {
    let mut outputs = Vec::new();
    for handle in node.resource_handles()?.connectors() {
        // With a probe: the kernel's list of modes is as old as the last one.
        let info = node.get_connector(*handle, true)?;
        outputs.push(Output {
            name: info.to_string(),
            connected: info.state() == connector::State::Connected,
            preferred: info.modes().first().map(drm::control::Mode::size),
        });
    }
    Ok(outputs)
}
