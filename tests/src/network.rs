//! Two machines and a cable, made of network namespaces.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{Failure, Outcome};

/// One end of the cable.
#[derive(Clone, Copy, Debug)]
pub enum Host {
    /// 10.77.0.1
    Left,
    /// 10.77.0.2
    Right,
}

/// Two network namespaces with a pair of virtual network cards between them; gone on drop.
#[derive(Debug)]
pub struct Network {
    /// Of all names that it gives.
    prefix: String,
}

impl Host {
    /// Its address.
    pub fn address(self) -> &'static str {
        match self {
            Self::Left => "10.77.0.1",
            Self::Right => "10.77.0.2",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
        }
    }

    fn letter(self) -> char {
        match self {
            Self::Left => 'l',
            Self::Right => 'r',
        }
    }
}

impl Network {
    /// Why there can be none here, if so.
    pub fn missing() -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("network namespaces are root's".to_owned());
        }
        let network = Self::new();
        network.err().map(|failure| format!("no network namespaces: {failure}"))
    }

    /// Makes it.
    ///
    /// # Errors
    /// When the system cannot.
    pub fn new() -> Outcome<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let this = Self { prefix: format!("mfd{}-{number}", std::process::id()) };
        let [left, right] = [Host::Left, Host::Right].map(|host| this.name(host));
        for name in [&left, &right] {
            ip(&format!("netns add {name}"))?;
        }
        ip(&format!("-n {left} link add wire type veth peer name wire netns {right}"))?;
        for host in [Host::Left, Host::Right] {
            let name = this.name(host);
            ip(&format!("-n {name} addr add {}/24 dev wire", host.address()))?;
            ip(&format!("-n {name} link set wire up"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        Ok(this)
    }

    /// Moves the calling thread to a host; what it and the threads that it makes open from now on is there.
    ///
    /// # Errors
    /// When the system cannot.
    pub fn enter(&self, host: Host) -> Outcome {
        let there = File::open(format!("/run/netns/{}", self.name(host)))?;
        Ok(move_into_link_name_space(there.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// From now on nothing arrives at either end, and nobody is told: both send to a card that does not exist.
    ///
    /// # Errors
    /// When the system cannot.
    pub fn cut(&self) -> Outcome {
        for host in [Host::Left, Host::Right] {
            let (name, peer) = (self.name(host), host.other().address());
            ip(&format!("-n {name} neigh replace {peer} lladdr 02:00:00:00:00:99 dev wire nud permanent"))?;
        }
        Ok(())
    }

    /// Gives a host one more address, in the other's network.
    ///
    /// # Errors
    /// When the system cannot.
    pub fn add_address(&self, host: Host, address: &str) -> Outcome {
        ip(&format!("-n {} addr add {address}/24 dev wire", self.name(host)))
    }

    fn name(&self, host: Host) -> String {
        format!("{}{}", self.prefix, host.letter())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in [Host::Left, Host::Right] {
            // It may be that it was never made.
            let _ = ip(&format!("netns del {}", self.name(host)));
        }
    }
}

fn ip(arguments: &str) -> Outcome {
    let output = Command::new("ip").args(arguments.split(' ')).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format!("ip {arguments}: {}: {}", output.status, said.trim())))
}
