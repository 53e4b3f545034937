//! A back-end in this process, with a userfaultfd and mappings of its own: it does what a test
//! says.
#![expect(unsafe_code, reason = "the requests of a userfaultfd have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use multifd_engine::PAGE;
use multifd_engine::vhost::VhostUser;
use multifd_engine::vhost::vhost::vhost_user::message::FrontendReq;
use multifd_engine::vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MmapRegion, VolatileMemory};
use multifd_tests::virtio::Memory;

use super::faulting;
use crate::guest::{SOON, attach};
use crate::script::{self, Answer, Journal};

const API: libc::Ioctl = 0xc018_aa3f;
const REGISTER: libc::Ioctl = 0xc020_aa00;
const UNREGISTER: libc::Ioctl = 0x8010_aa01;
const WAKE: libc::Ioctl = 0x8010_aa02;
const MODE_MISSING: u64 = 1;

/// A userfaultfd of this process.
pub struct Userfault(File);

impl Userfault {
    pub fn new() -> Self {
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: a new descriptor that nothing else owns.
        let userfault = Self(unsafe { File::from_raw_fd(fd as i32) });
        userfault.ask(API, &mut [0xaa_u64, 0, 0]).unwrap();
        userfault
    }

    pub fn duplicate(&self) -> OwnedFd {
        self.0.try_clone().unwrap().into()
    }

    pub fn register(&self, region: &MmapRegion) {
        let (at, len) = (region.as_ptr() as u64, region.size() as u64);
        self.ask(REGISTER, &mut [at, len, MODE_MISSING, 0]).unwrap();
    }

    pub fn unregister(&self, region: &MmapRegion) {
        // It may never have been registered.
        _ = self.ask(UNREGISTER, &mut [region.as_ptr() as u64, region.size() as u64]);
    }

    /// Wakes who waits for a page, which is not there.
    pub fn wake(&self, region: &MmapRegion, page: usize) {
        let at = region.as_ptr() as u64 + (page * PAGE) as u64;
        self.ask(WAKE, &mut [at, PAGE as u64]).unwrap();
    }

    fn ask<const WORDS: usize>(&self, request: libc::Ioctl, words: &mut [u64; WORDS]) -> io::Result<()> {
        // SAFETY: each of the requests reads and writes as many words as it is given here.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, words.as_mut_ptr()) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

/// What a test may read and change of such a back-end.
pub struct Faulting {
    pub userfault: Arc<Userfault>,
    pub mapped: Vec<Arc<MmapRegion>>,
    pub user: Option<VhostUser>,
    pub journal: Journal,
    reading: Mutex<Vec<JoinHandle<()>>>,
}

impl Faulting {
    /// Serves as a good back-end does, but for what `odd` answers.
    pub fn start(memory: &Memory, odd: impl FnMut(u32) -> Option<Answer> + Send + 'static) -> Self {
        Self::start_with(memory, move |_, _| odd)
    }

    /// The same; what answers is made with the userfaultfd and the mappings.
    pub fn start_with<O: FnMut(u32) -> Option<Answer> + Send + 'static>(
        memory: &Memory,
        make: impl FnOnce(&Arc<Userfault>, &[Arc<MmapRegion>]) -> O,
    ) -> Self {
        let userfault = Arc::new(Userfault::new());
        let map = |region: &multifd_engine::vm_memory::GuestRegionMmap<_>| {
            let file = region.file_offset().cloned().unwrap();
            Arc::new(MmapRegion::from_file(file, region.len() as usize).unwrap())
        };
        let mapped: Vec<_> = memory.iter().map(map).collect();
        let odd = make(&userfault, &mapped);
        let answer = answer(Arc::clone(&userfault), mapped.clone(), odd);
        let (socket, journal) = script::start_with_bodies(answer);
        let user = Some(attach(socket, faulting()).user.timeout(SOON));
        Self { userfault, mapped, user, journal, reading: Mutex::default() }
    }

    pub fn take_user(&mut self) -> VhostUser {
        self.user.take().unwrap()
    }

    /// A thread of the back-end's reads a page, and gives its first word.
    pub fn read(&self, block: usize, page: usize) -> Reading {
        let region = Arc::clone(&self.mapped[block]);
        let (give, word) = std::sync::mpsc::channel();
        let read = move || {
            // The test may have failed by now.
            _ = give.send(read_word(&region, page));
        };
        self.reading.lock().unwrap().push(std::thread::Builder::new().spawn(read).unwrap());
        Reading(word)
    }

    /// The requests that it was asked, by number.
    pub fn asked(&self) -> Vec<u32> {
        self.journal.lock().unwrap().iter().map(|(request, _)| *request).collect()
    }
}

impl Drop for Faulting {
    fn drop(&mut self) {
        // Threads that wait go on.
        self.mapped.iter().for_each(|region| self.userfault.unregister(region));
        self.reading.lock().unwrap().drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// What a thread of a back-end's reads.
pub struct Reading(std::sync::mpsc::Receiver<u64>);

impl Reading {
    pub fn word(self) -> u64 {
        self.0.recv_timeout(SOON).unwrap()
    }

    pub fn waits(&self) -> bool {
        self.0.try_recv().is_err()
    }
}

pub fn read_word(region: &MmapRegion, page: usize) -> u64 {
    region.as_volatile_slice().read_obj(page * PAGE).unwrap()
}

fn answer(
    userfault: Arc<Userfault>,
    mapped: Vec<Arc<MmapRegion>>,
    mut odd: impl FnMut(u32) -> Option<Answer> + Send + 'static,
) -> impl FnMut(u32, &[u8]) -> Answer + Send + 'static {
    move |request, body| {
        // What confirms a table has no answer, and is none of its own.
        if request == u32::from(FrontendReq::SET_MEM_TABLE) && body.len() == 8 {
            return Answer::Silence;
        }
        if let Some(answer) = odd(request) {
            return answer;
        }
        if request == u32::from(FrontendReq::POSTCOPY_ADVISE) {
            return Answer::Descriptor(userfault.duplicate());
        }
        if request == u32::from(FrontendReq::SET_MEM_TABLE) {
            mapped.iter().for_each(|region| userfault.register(region));
            return Answer::Body(table(body, &mapped));
        }
        Answer::Usual
    }
}

/// The same table with the addresses of these mappings.
fn table(body: &[u8], mapped: &[Arc<MmapRegion>]) -> Vec<u8> {
    let mut reply = body.to_vec();
    for (entry, region) in reply[8..].chunks_mut(32).zip(mapped) {
        entry[16..24].copy_from_slice(&(region.as_ptr() as u64).to_ne_bytes());
    }
    reply
}
