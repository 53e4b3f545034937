//! Two machines and a cable, made of network namespaces.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{During as _, Failure, Outcome};

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
    /// Of the namespaces, left and right: no other has them, in this process or another.
    names: [String; 2],
}

impl Host {
    const BOTH: [Self; 2] = [Self::Left, Self::Right];

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
        // From here on dropping it undoes what has been done.
        let this = Self { names: ["l", "r"].map(|end| format!("mfd{}-{number}{end}", std::process::id())) };
        let [left, right] = &this.names;
        for name in [left, right] {
            run(&format!("ip netns add {name}"))?;
        }
        run(&format!("ip -n {left} link add wire type veth peer name wire netns {right}"))?;
        for host in Host::BOTH {
            let name = this.name(host);
            run(&format!("ip -n {name} addr add {}/24 dev wire", host.address()))?;
            run(&format!("ip -n {name} link set wire up"))?;
            run(&format!("ip -n {name} link set lo up"))?;
        }
        Ok(this)
    }

    /// Moves the calling thread to a host; what it and the threads that it makes open from now on
    /// is there.
    ///
    /// # Errors
    /// When the system cannot.
    pub fn enter(&self, host: Host) -> Outcome {
        let there = File::open(format!("/run/netns/{}", self.name(host)))?;
        Ok(move_into_link_name_space(there.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// What a command begins with to run at a host, where it has the host's `lo`, too. It becomes
    /// the command.
    pub fn inside(&self, host: Host) -> [&str; 4] {
        ["ip", "netns", "exec", self.name(host)]
    }

    /// From now on the cable takes that many Mbit/s in each direction, whatever it took before.
    ///
    /// # Errors
    /// When the system cannot.
    pub fn shape(&self, mbit: u32) -> Outcome {
        for name in &self.names {
            // Two segments of the largest size fit into the burst; the queue holds 50 ms.
            let shaper = format!("tbf rate {mbit}mbit burst 256kb latency 50ms");
            run(&format!("tc -n {name} qdisc replace dev wire root {shaper}"))?;
        }
        Ok(())
    }

    /// From now on nothing arrives at either end, and neither end is told: both send to a card that
    /// does not exist.
    ///
    /// # Errors
    /// When the system cannot.
    pub fn cut(&self) -> Outcome {
        for host in Host::BOTH {
            let (name, peer) = (self.name(host), host.other().address());
            run(&format!(
                "ip -n {name} neigh replace {peer} lladdr 02:00:00:00:00:99 dev wire nud permanent"
            ))?;
        }
        Ok(())
    }

    /// Gives a host one more address, in the other's network.
    ///
    /// # Errors
    /// When the system cannot.
    pub fn add_address(&self, host: Host, address: &str) -> Outcome {
        run(&format!("ip -n {} addr add {address}/24 dev wire", self.name(host)))
    }

    fn name(&self, host: Host) -> &str {
        let [left, right] = &self.names;
        match host {
            Host::Left => left,
            Host::Right => right,
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            // It may be that it was never made.
            let _ = run(&format!("ip netns del {name}"));
        }
    }
}

fn run(command: &str) -> Outcome {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap_or_default()).args(words).output().during(command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(Failure::new(format!("{command}: {}", said.trim()))) }
}
