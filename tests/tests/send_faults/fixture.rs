//! A source, and the script of its destination.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use multifd_engine::codecs::parse_codec;
use multifd_engine::{Control, DeviceState, Error, Precopy, Report, Source, ZeroPages};
use multifd_tests::peer::{Incoming, Memory, PAGE, Sink, devices};
use multifd_tests::{Failure, Outcome};
use multifd_transports::Endpoint;
use multifd_wire::Configuration;

/// The timeout of sources under test.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(400);

/// A source that does not get there fails its test for what it says then, not for its time.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// How the source goes about it.
#[derive(Clone)]
pub(crate) struct Way {
    pub(crate) channels: usize,
    pub(crate) codec: &'static str,
    pub(crate) return_path: bool,
    pub(crate) timeout: Duration,
    /// Pages of RAM; a socket takes some 50 before anything is read.
    pub(crate) pages: usize,
    /// Bytes of device state.
    pub(crate) device_state: usize,
    /// Wishes checksums and a digest.
    pub(crate) checks: bool,
}

impl Default for Way {
    fn default() -> Self {
        let timeout = Duration::from_secs(20);
        let (channels, codec, device_state) = (0, "none", 100);
        Self { channels, codec, return_path: true, timeout, pages: 2000, device_state, checks: true }
    }
}

/// How a migration ended, and how long it took from the connection on.
pub(crate) struct Ended {
    pub(crate) result: Result<Report, Error>,
    pub(crate) took: Duration,
}

impl Way {
    pub(crate) fn channels(channels: usize) -> Self {
        Self { channels, ..Self::default() }
    }

    pub(crate) fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    pub(crate) fn source(&self) -> Outcome<Source> {
        let mut memory = Memory::zero(&[("pc.ram", self.pages)]);
        // Nothing compresses it, so that it does not fit in a socket.
        for (number, at) in memory.all().into_iter().enumerate() {
            let word =
                |index: usize| (number * PAGE + index).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
            let content: Vec<u8> = (1..=PAGE / 8).flat_map(word).collect();
            memory.set(at, &content);
        }
        let (machine, capabilities) = ("pc-q35-10.0".to_owned(), Vec::new());
        let configuration = Configuration::new(machine).with_capabilities(capabilities);
        let builder = Source::builder(memory.provide_content()?, configuration)
            .paused_guest()
            .channels(self.channels)
            .codec(parse_codec(self.codec)?)
            .zero_pages(ZeroPages::None)
            .return_path(self.return_path)
            .checksums(self.checks)
            .digest(self.checks)
            .timeout(self.timeout);
        Ok(builder.build()?)
    }

    fn device_state(&self) -> Outcome<DeviceState> {
        Ok(DeviceState::from_tail([devices::padding(self.device_state), devices::tail()].concat())?)
    }

    /// Moves a guest to an endpoint with or without a listener.
    pub(crate) fn send_to(&self, endpoint: &Endpoint) -> Outcome<Ended> {
        let (source, state) = (self.source()?, self.device_state()?);
        let begun = Instant::now();
        let whole = |mut precopy: Precopy| {
            precopy.round()?;
            precopy.stop_copy()?.commit(&state)
        };
        let result = source.connect(endpoint).and_then(whole);
        Ok(Ended { result, took: begun.elapsed() })
    }

    /// Moves a guest to a scripted destination. The script's connections stay until the source has
    /// ended.
    pub(crate) fn send(&self, script: impl FnOnce(&mut Incoming) -> Outcome + Send) -> Outcome<Ended> {
        let sink = Sink::unix()?;
        thread::scope(|scope| {
            let destination = scope.spawn(|| {
                let mut incoming = sink.accept(self.channels)?;
                script(&mut incoming).map(|()| incoming)
            });
            let ended = self.send_to(sink.endpoint())?;
            let incoming = destination.join().map_err(|_| Failure::new("the script panicked"))?;
            match (incoming, &ended.result) {
                (Ok(_), _) => Ok(ended),
                (Err(failure), Err(error)) => {
                    Err(Failure::new(format!("{failure}; the source: {}", error.chain())))
                }
                (Err(failure), Ok(_)) => Err(failure),
            }
        })
    }
}

impl Ended {
    /// The error; `says` are parts of its text. The guest may run on, or not.
    #[track_caller]
    pub(crate) fn failed(self, may_resume: bool, says: &[&str]) -> Error {
        let error = self.result.expect_err("the migration succeeded");
        let chain = error.chain();
        assert_eq!(error.source_may_resume(), may_resume, "{chain}");
        let missing: Vec<_> = says.iter().filter(|part| !chain.contains(**part)).collect();
        assert!(missing.is_empty(), "{chain:?} does not say {missing:?}");
        error
    }
}

/// Cancels once the source has `reached` what it cannot leave by itself, or after a while, and
/// tells when.
pub(crate) fn cancel_when(reached: impl Fn() -> bool, control: &Control) -> Instant {
    let begun = Instant::now();
    while !reached() && begun.elapsed() < LONGEST_WAIT {
        thread::yield_now();
    }
    control.cancel();
    Instant::now()
}

#[test]
fn a_polite_destination_is_served() -> Outcome {
    use multifd_tests::peer::Stage;
    use multifd_wire::ReturnMessage;
    for codec in ["none", "zlib:1", "zstd:1"] {
        for channels in [0, 1, 3] {
            for return_path in [true, false] {
                let codec = if channels == 0 { "none" } else { codec };
                let ended = Way { codec, return_path, ..Way::channels(channels) }.send(|destination| {
                    destination.read_to(Stage::Finished)?;
                    destination.say(&ReturnMessage::Shut(0));
                    Ok(())
                })?;
                assert_eq!(ended.result?.confirmed, return_path);
            }
        }
    }
    let _: Arc<dyn multifd_engine::codecs::Codec> = parse_codec("zstd")?;
    Ok(())
}
