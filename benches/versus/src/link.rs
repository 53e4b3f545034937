//! A link of a given rate: a network namespace at its far end, where the destination runs.
//!
//! It ends with this value. Names and addresses are of a range that is for measurements (RFC 2544).

use std::process::Command;

use multifd_tests::{During, Failure, Outcome};

const NAMESPACE: &str = "multifd-versus";
const NEAR: &str = "multifd-near";
const FAR: &str = "multifd-far";

/// Both ends of the link, in a network of their own.
const NEAR_ADDRESS: &str = "198.18.77.1/30";
const FAR_ADDRESS: &str = "198.18.77.2/30";

/// While it lives, what is sent to [`Link::HOST`] goes over it.
pub(crate) struct Link;

impl Link {
    /// The destination's address.
    pub(crate) const HOST: &str = "198.18.77.2";

    /// What a command begins with to run at the far end.
    pub(crate) const FAR_END: [&str; 4] = ["ip", "netns", "exec", NAMESPACE];

    /// A link of so many Mbit/s towards the destination, and unlimited back.
    pub(crate) fn new(mbit: u32) -> Outcome<Self> {
        // From here on dropping it undoes what has been done.
        let link = Self;
        run(&format!("ip netns add {NAMESPACE}"))?;
        run(&format!("ip link add {NEAR} type veth peer name {FAR} netns {NAMESPACE}"))?;
        run(&format!("ip address add {NEAR_ADDRESS} dev {NEAR}"))?;
        run(&format!("ip link set {NEAR} up"))?;
        run(&format!("ip -n {NAMESPACE} address add {FAR_ADDRESS} dev {FAR}"))?;
        run(&format!("ip -n {NAMESPACE} link set {FAR} up"))?;
        // Two segments of the largest size fit into the burst; the queue holds 50 ms.
        run(&format!("tc qdisc add dev {NEAR} root tbf rate {mbit}mbit burst 256kb latency 50ms"))?;
        Ok(link)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The near end of the pair goes with the far end, and that with its namespace.
        for command in [format!("ip link del {NEAR}"), format!("ip netns del {NAMESPACE}")] {
            let _ = run(&command);
        }
    }
}

fn run(command: &str) -> Outcome {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap_or_default()).args(words).output().during(command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(Failure::new(format!("{command}: {}", said.trim()))) }
}
