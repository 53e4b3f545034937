//! Connections that are not of the migration: none of them ends it, whenever they come, over plain
//! and encrypted connections.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use multifd_engine::Destination;
use multifd_tests::peer::{Lane, Memory, Recorder, Recording, Step, Style};
use multifd_tests::{Authority, Failure, Member, Outcome, Scratch};
use multifd_transports::{Channel, DialOptions, Endpoint, TlsClient, TlsServer, dial};
use multifd_wire::{Command, InitialPacket, ReturnMessage};
use rustix::net::sockopt::set_socket_linger;

use crate::fixture::memory;

/// The destination's: no stranger may make anything wait for so long.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Behind the first sync point, and behind the second; a source has pings of its own before them.
const PINGS: [u32; 2] = [0x7001, 0x7002];

/// What a stranger says, and how it leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stranger {
    Closes,
    Resets,
    TwoBytes,
    FourNuls,
    Http,
    TlsHello,
    HalfAHello,
    PlainHeader,
    NoCertificate,
    Silent,
    Crowd,
    SecondSource,
    LateChannel,
    OtherSource,
}

/// When it comes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    /// Before the source.
    Before,
    /// The source has passed its first sync point, with all of its channels.
    Middle,
    /// Channels can join no more.
    Complete,
}

/// How the source moves its guest.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Way {
    channels: u8,
    announced: bool,
    encrypted: bool,
}

const SINGLE: Way = Way { channels: 0, announced: false, encrypted: false };
const TWO: Way = Way { channels: 2, announced: false, encrypted: false };
const TWO_ANNOUNCED: Way = Way { channels: 2, announced: true, encrypted: false };
const ENCRYPTED: Way = Way { channels: 2, announced: false, encrypted: true };

impl Stranger {
    const ALL: [Self; 14] = [
        Self::Closes,
        Self::Resets,
        Self::TwoBytes,
        Self::FourNuls,
        Self::Http,
        Self::TlsHello,
        Self::HalfAHello,
        Self::PlainHeader,
        Self::NoCertificate,
        Self::Silent,
        Self::Crowd,
        Self::SecondSource,
        Self::LateChannel,
        Self::OtherSource,
    ];

    /// Over plain connections, main's header is main's, and a channel that comes before the source
    /// is one of its channels.
    fn is_one(self, way: Way, when: When) -> bool {
        match self {
            Self::PlainHeader => way.encrypted || when != When::Before,
            Self::SecondSource => when != When::Before,
            Self::LateChannel => when != When::Before,
            Self::OtherSource => way.encrypted,
            _ => true,
        }
    }

    /// Comes, says its piece, and gives what is to stay open. A listener that is closed refuses it,
    /// which is as good.
    fn send_strangers(
        self,
        endpoint: &Endpoint,
        certificates: &Path,
        strange_channels: &mut Vec<Channel>,
    ) -> io::Result<Vec<TcpStream>> {
        let Endpoint::Tcp { host, port } = endpoint else { return Err(io::Error::other("not TCP")) };
        let connect = || TcpStream::connect((host.as_str(), *port));
        let say = |bytes: &[u8]| {
            let mut stream = connect()?;
            stream.write_all(bytes)?;
            Ok(vec![stream])
        };
        let hello = |channel| InitialPacket { uuid: [0; 16], channel }.encode();
        match self {
            Self::Closes => connect().map(drop).map(|()| Vec::new()),
            Self::Resets => {
                set_socket_linger(connect()?, Some(Duration::ZERO))?;
                Ok(Vec::new())
            }
            Self::TwoBytes => say(b"QE").map(drop).map(|()| Vec::new()),
            Self::FourNuls => say(&[0; 4]),
            Self::Http => say(b"GET / HTTP/1.1\r\n\r\n"),
            Self::TlsHello => say(&[&[22, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3][..], &[7; 194]].concat()),
            Self::HalfAHello => say(&hello(1)[..30]),
            Self::PlainHeader => say(b"QEVM\0\0\0\x03"),
            // A client of the same CA, which says that it is the source's first channel.
            Self::OtherSource => {
                let tls = TlsClient::from_directory(&certificates.join("other")).map_err(io::Error::other)?;
                let deadline = Duration::from_secs(1);
                let options = DialOptions { tls: Some(tls), deadline, ..DialOptions::default() };
                if let Ok(channel) = dial(endpoint, &options) {
                    let _ = channel.send_all(&hello(0));
                    strange_channels.push(channel);
                }
                Ok(Vec::new())
            }
            Self::NoCertificate => {
                let tls =
                    TlsClient::from_directory(&certificates.join("without")).map_err(io::Error::other)?;
                // Where nothing listens it is tried again until then.
                let deadline = Duration::from_secs(1);
                let options = DialOptions { tls: Some(tls), deadline, ..DialOptions::default() };
                // A plain listener, or none: then there is nothing to say.
                if let Ok(channel) = dial(endpoint, &options) {
                    let _ = channel.send_all(b"QEVM\0\0\0\x03");
                    let _ = channel.recv(&mut [0; 1]);
                }
                Ok(Vec::new())
            }
            Self::Silent => Ok(vec![connect()?]),
            Self::Crowd => (0..260).map(|_| connect()).collect(),
            Self::SecondSource => Ok([say(b"QEVM\0\0\0\x03")?, say(&hello(0))?, say(&hello(1))?]
                .into_iter()
                .flatten()
                .collect()),
            Self::LateChannel => say(&hello(2)),
        }
    }
}

/// A source that moves its guest, and stops for a moment where strangers are to come.
struct Sound<'a> {
    endpoint: &'a Endpoint,
    tls: Option<TlsClient>,
    lanes: Vec<(Lane, Channel)>,
    heard: Vec<u8>,
}

impl Sound<'_> {
    fn play(&mut self, recording: &Recording, mut at_ping: impl FnMut(u32)) -> Outcome {
        for step in &recording.steps {
            let Step::Send { lane, bytes, .. } = step else { continue };
            self.lane(*lane)?.send_all(bytes)?;
            if let Some(number) = PINGS.into_iter().find(|number| ping(*number) == *bytes) {
                self.hear(ReturnMessage::Pong(number))?;
                at_ping(number);
            }
        }
        self.hear(ReturnMessage::Shut(0))
    }

    fn lane(&mut self, lane: Lane) -> Outcome<&Channel> {
        let index = match self.lanes.iter().position(|(of, _)| *of == lane) {
            Some(index) => index,
            None => {
                let options = DialOptions { tls: self.tls.clone(), ..DialOptions::default() };
                let channel = dial(self.endpoint, &options)?;
                channel.set_timeout(Some(TIMEOUT))?;
                self.lanes.push((lane, channel));
                self.lanes.len() - 1
            }
        };
        Ok(&self.lanes[index].1)
    }

    fn hear(&mut self, wanted: ReturnMessage) -> Outcome {
        loop {
            while let Ok(Some((message, used))) = ReturnMessage::parse(&self.heard) {
                self.heard.drain(..used);
                if message == wanted {
                    return Ok(());
                }
            }
            let mut piece = [0; 256];
            match self.lane(Lane::Main)?.recv(&mut piece)? {
                0 => return Err(Failure::new(format!("the return path ended before {wanted:?}"))),
                count => self.heard.extend(&piece[..count]),
            }
        }
    }
}

fn ping(number: u32) -> Vec<u8> {
    let mut recorder = Recorder::new(Style::default());
    recorder.command(Command::Ping(number));
    recorder.recording().bytes(Lane::Main)
}

/// A sound migration with a ping behind its first sync point and one behind its second.
fn recording(channels: u8) -> (Memory, Recording) {
    let memory = memory();
    let mut recorder = Recorder::new(Style { channels, ..Style::default() });
    recorder.setup(&memory);
    recorder.command(Command::Ping(PINGS[0]));
    recorder.part(&memory, &memory.all());
    recorder.command(Command::Ping(PINGS[1]));
    recorder.end(&memory, &memory.every(2, 0));
    (memory, recorder.finish())
}

/// The migration ends well, and its guest is whole.
fn survives(way: Way, when: When, strangers: &[Stranger]) -> Outcome {
    let scratch = Scratch::new()?;
    let [good, without, other] = ["good", "without", "other"].map(|name| scratch.path(name));
    let authority = Authority::new("test CA")?;
    authority.issue(&good, Some(&Member::server()), Some(&Member::client()))?;
    authority.issue(&without, Some(&Member::server()), None)?;
    authority.issue(&other, None, Some(&Member::new("another source", &[])))?;
    let (memory, recording) = recording(way.channels);
    let blocks = memory.provide(0xa5)?;
    let mut builder = Destination::builder(blocks.clone()).timeout(TIMEOUT);
    if way.announced {
        builder = builder.channels(usize::from(way.channels));
    }
    if way.encrypted {
        builder = builder.tls(TlsServer::from_directory(&good)?);
    }
    let destination = builder.listen(&Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 0 })?;
    let endpoint = destination.endpoint();
    let tls = way.encrypted.then(|| TlsClient::from_directory(&good)).transpose()?;
    let (begun, canceller) = (Instant::now(), destination.canceller());
    let (played, result) = thread::scope(|scope| {
        let source = scope.spawn(|| {
            let (mut stay, mut channels) = (Vec::new(), Vec::new());
            let mut send_strangers = || {
                for stranger in strangers {
                    let sent = stranger.send_strangers(&endpoint, scratch.dir(), &mut channels);
                    stay.extend(sent.unwrap_or_default());
                }
            };
            if when == When::Before {
                send_strangers();
            }
            let mut sound = Sound { endpoint: &endpoint, tls, lanes: Vec::new(), heard: Vec::new() };
            let played = sound.play(&recording, |number| match (number, when) {
                (number, When::Middle) if number == PINGS[0] => send_strangers(),
                (number, When::Complete) if number == PINGS[1] => send_strangers(),
                _ => {}
            });
            if played.is_err() {
                canceller.cancel();
            }
            played
        });
        let result = destination.receive().and_then(|arrived| arrived.accept());
        (source.join().unwrap(), result)
    });
    result.map_err(|error| Failure::new(error.chain()))?;
    played?;
    if begun.elapsed() >= TIMEOUT {
        return Err(Failure::new("it took a timeout"));
    }
    memory.check(&blocks)
}

/// Each stranger alone, side by side, and then all at once.
fn all_survive(way: Way, when: When) -> Outcome {
    let strangers: Vec<_> = Stranger::ALL.into_iter().filter(|it| it.is_one(way, when)).collect();
    let cells: Vec<_> = strangers.iter().map(std::slice::from_ref).collect();
    thread::scope(|scope| {
        let running: Vec<_> = cells.iter().map(|cell| scope.spawn(|| survives(way, when, cell))).collect();
        for (cell, run) in cells.iter().zip(running) {
            let outcome = run.join().unwrap();
            outcome.unwrap_or_else(|failure| panic!("{way:?} {when:?} {cell:?}: {failure}"));
        }
    });
    survives(way, when, &strangers)
}

#[test]
fn strangers_before_the_source_do_not_end_its_migration() -> Outcome {
    [SINGLE, TWO, TWO_ANNOUNCED, ENCRYPTED].into_iter().try_for_each(|way| all_survive(way, When::Before))
}

#[test]
fn strangers_in_the_middle_do_not_end_the_migration() -> Outcome {
    [SINGLE, TWO, TWO_ANNOUNCED, ENCRYPTED].into_iter().try_for_each(|way| all_survive(way, When::Middle))
}

#[test]
fn strangers_when_all_channels_are_there_do_not_end_the_migration() -> Outcome {
    [SINGLE, TWO, TWO_ANNOUNCED, ENCRYPTED].into_iter().try_for_each(|way| all_survive(way, When::Complete))
}

/// From the first sync point on the system refuses connections: nothing listens any more.
#[test]
fn the_listener_is_closed_when_all_channels_are_there() -> Outcome {
    for way in [SINGLE, TWO, TWO_ANNOUNCED] {
        let (memory, recording) = recording(way.channels);
        let mut builder = Destination::builder(memory.provide(0)?).timeout(TIMEOUT);
        if way.announced {
            builder = builder.channels(usize::from(way.channels));
        }
        let destination = builder.listen(&Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 0 })?;
        let endpoint = destination.endpoint();
        let (result, refused) = thread::scope(|scope| {
            let source = scope.spawn(|| {
                let (mut sound, mut refused) =
                    (Sound { endpoint: &endpoint, tls: None, lanes: Vec::new(), heard: Vec::new() }, false);
                let played = sound.play(&recording, |_| {
                    let connected =
                        Stranger::Closes.send_strangers(&endpoint, Path::new(""), &mut Vec::new());
                    refused =
                        matches!(connected, Err(error) if error.kind() == io::ErrorKind::ConnectionRefused);
                });
                played.map(|()| refused)
            });
            let result = destination.receive().and_then(|arrived| arrived.accept());
            (result, source.join().unwrap())
        });
        result?;
        assert!(refused?, "{way:?}");
    }
    Ok(())
}

/// From the moment at which the source is told of success, connections come as fast as they can.
#[test]
fn connections_at_the_very_end_do_not_hold_up_the_guest() -> Outcome {
    for way in [SINGLE, TWO] {
        let (memory, recording) = recording(way.channels);
        let blocks = memory.provide(0xa5)?;
        let destination = Destination::builder(blocks.clone()).timeout(TIMEOUT);
        let destination = destination.listen(&Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 0 })?;
        let endpoint = destination.endpoint();
        let (ended, over) = std::sync::mpsc::channel::<()>();
        let (result, took) = thread::scope(|scope| {
            scope.spawn(|| {
                let mut sound =
                    Sound { endpoint: &endpoint, tls: None, lanes: Vec::new(), heard: Vec::new() };
                let _ = sound.play(&recording, |_| {});
                // The channels stay open, too.
                let _ = { over }.recv();
                drop(sound);
            });
            let arrived = destination.receive();
            let (done, stop) = std::sync::mpsc::channel::<()>();
            let crowd = scope.spawn(|| {
                let (stop, mut stay) = (stop, Vec::new());
                for number in (3..=u8::MAX - 1).cycle() {
                    if stop.try_recv() == Err(std::sync::mpsc::TryRecvError::Disconnected) {
                        break;
                    }
                    let Endpoint::Tcp { host, port } = &endpoint else { break };
                    let Ok(mut stream) = TcpStream::connect((host.as_str(), *port)) else { continue };
                    let _ = stream.write_all(&InitialPacket { uuid: [0; 16], channel: number }.encode());
                    stay.push(stream);
                    stay.drain(..stay.len().saturating_sub(300));
                }
            });
            let begun = Instant::now();
            let result = arrived.and_then(|arrived| arrived.accept());
            let took = begun.elapsed();
            drop((done, ended));
            crowd.join().unwrap();
            (result, took)
        });
        result?;
        assert!(took < TIMEOUT / 2, "{took:?}");
        memory.check(&blocks)?;
    }
    Ok(())
}

/// A channel that has more pages when main has ended has them for itself.
#[test]
fn pages_after_the_end_of_the_main_stream_are_thrown_away() -> Outcome {
    let (memory, recording) = recording(2);
    let blocks = memory.provide(0xa5)?;
    let destination = Destination::builder(blocks.clone()).timeout(TIMEOUT);
    let destination = destination.listen(&Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 0 })?;
    let endpoint = destination.endpoint();
    let packet = {
        let position = recording.position("packet", 0);
        let Some(Step::Send { lane: Lane::Channel(0), bytes, .. }) = recording.steps.get(position) else {
            panic!("not on channel 0")
        };
        let pages = u32::from_be_bytes(bytes[16..20].try_into()?);
        [&bytes[..], &vec![0xee; usize::try_from(pages)? * 4096]].concat()
    };
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let (closed, is_closed) = std::sync::mpsc::channel();
    let (ended, over) = std::sync::mpsc::channel::<()>();
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            let gone = gone;
            let mut sound = Sound { endpoint: &endpoint, tls: None, lanes: Vec::new(), heard: Vec::new() };
            for step in &recording.steps {
                if let Step::Send { lane, bytes, .. } = step {
                    sound.lane(*lane).and_then(|lane| Ok(lane.send_all(bytes)?)).unwrap();
                }
            }
            let _ = gone.recv();
            let channel = sound.lane(Lane::Channel(0)).unwrap();
            let _ = channel.set_timeout(Some(Duration::from_secs(10)));
            let _ = channel.send_all(&packet);
            let outcome = channel.recv(&mut [0]);
            let silent = matches!(&outcome, Err(error) if error.kind() == io::ErrorKind::TimedOut);
            closed.send(!silent).unwrap();
            // Main stays until the guest has been taken over.
            let _ = { over }.recv();
        });
        let arrived = destination.receive();
        drop(go);
        let closed = is_closed.recv_timeout(TIMEOUT).unwrap_or(false);
        assert!(closed, "the channel was not closed");
        let result = arrived.and_then(|arrived| arrived.accept());
        drop(ended);
        result
    });
    result?;
    memory.check(&blocks)
}

/// A destination that never hears of its source says whom it heard instead.
#[test]
fn a_destination_that_only_saw_strangers_says_what_the_last_one_was() -> Outcome {
    for (stranger, says) in [
        (Stranger::TlsHello, "the peer speaks TLS, and this side is not set up for it"),
        (Stranger::Http, "magic 0x47455420, expected 0x5145564d (main) or 0x11223344 (channel)"),
        (Stranger::TwoBytes, "the connection ended after 2 bytes"),
    ] {
        let destination = Destination::builder(memory().provide(0)?).timeout(Duration::from_secs(2));
        let destination = destination.listen(&Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 0 })?;
        let stay = stranger.send_strangers(&destination.endpoint(), Path::new(""), &mut Vec::new())?;
        let error = destination.receive().err().ok_or_else(|| Failure::new("it succeeded"))?.chain();
        for part in [
            "no main channel on tcp:127.0.0.1:",
            "1 connection refused, the last: accept, tcp:127.0.0.1:",
            says,
        ] {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
        for mut stream in stay {
            let _ = stream.read(&mut [0]);
        }
    }
    Ok(())
}
