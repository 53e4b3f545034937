//! The kernel's vhost, as far as a machine without /dev/vhost-net goes.

use std::path::Path;
use std::sync::Arc;

use multifd_engine::vhost::vhost::Error;
use multifd_engine::vhost::vhost::vhost_kern::VhostKernBackend;
use multifd_engine::vhost::vhost::vhost_kern::net::Net;
use multifd_engine::vhost::{VhostDevice, VhostDevices, VhostKernel};

use multifd_tests::virtio::Memory;

use crate::guest::{devices, memory};

/// What a VMM with a tap does. The types say that kernel devices go where vhost-user's go.
fn with_vhost_net(net: Net<Arc<Memory>>, tap: std::fs::File, devices: &VhostDevices) {
    devices.add(VhostDevice::new("nic", VhostKernel::net(net, tap), 1 << 32)).unwrap();
}

#[test]
fn without_the_kernels_vhost_opening_it_says_so() {
    if Path::new("/dev/vhost-net").exists() {
        let tap = std::fs::File::open("/dev/null").unwrap();
        return with_vhost_net(Net::new(Arc::new(memory())).unwrap(), tap, &devices(&memory()));
    }
    let error = Net::new(Arc::new(memory())).map(drop);
    let Err(Error::VhostOpen(cause)) = error else { panic!("{error:?}") };
    assert_eq!(cause.kind(), std::io::ErrorKind::NotFound);
}

/// A descriptor that is no vhost device.
struct Null(std::fs::File, Arc<Memory>);

impl std::os::fd::AsRawFd for Null {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

impl VhostKernBackend for Null {
    type AS = Arc<Memory>;

    fn mem(&self) -> &Self::AS {
        &self.1
    }
}

#[test]
fn a_system_call_that_fails_blocks_the_migration_by_the_devices_name() {
    let memory = memory();
    let devices = devices(&memory);
    let null = Null(std::fs::File::open("/dev/null").unwrap(), Arc::new(memory.clone()));
    let device = VhostDevice::new("nic", VhostKernel::new(null, |_, _, _| Ok(())), 1 << 32);
    devices.add(device).unwrap();
    let [blocker] = &devices.blockers()[..] else { panic!("one device") };
    let text =
        "vhost device nic: asking for its features: failure in vhost ioctl: Inappropriate ioctl for device";
    assert!(blocker.chain().starts_with(text), "{}", blocker.chain());
    let error = devices.start().unwrap_err().chain();
    assert!(
        error.starts_with("vhost device nic: setting features 0x100000000: failure in vhost ioctl"),
        "{error}"
    );
}
