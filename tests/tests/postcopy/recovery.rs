//! A link that breaks while pages follow: the guest waits, and nothing is lost.
#![allow(clippy::indexing_slicing, clippy::expect_used, reason = "test code may panic")]

use std::os::unix::net::UnixStream;

use multifd_engine::{Channel, MigrationState, PostcopyEnd};
use multifd_tests::{Failure, Outcome};

use crate::author::content;
use crate::memory::{Kind, Pair, check, load, start, text};
use crate::open_files::{is_open, socket};

const PAGES: usize = 600;

#[test]
fn over_another_link_what_is_missing_comes_and_pending_faults_are_asked_for_again() -> Outcome {
    let Pair { mut author, mut guest, memory } =
        Pair::switched(&[(Kind::Anonymous, PAGES), (Kind::Memfd, PAGES)])?;
    guest.loaded().map_err(text)?;
    let touching: Vec<_> = (0..4)
        .map(|thread| {
            let memory = memory.clone();
            start(move || {
                let (block, page) = (thread % 2, 31 + 100 * thread);
                assert!(load(&memory[block], page) == content(block, page, false));
            })
        })
        .collect();
    // Each has asked, and gets nothing before the link is gone, again and again.
    let mut asked: Vec<_> = (0..4).map(|_| author.request()).collect::<Outcome<_>>()?;
    asked.sort_unstable();
    let mut links = Vec::new();
    for round in 0..3 {
        for page in (round * 50..round * 50 + 20).filter(|page| *page != 31) {
            author.host_page(0, page)?;
        }
        author.cut()?;
        let end = guest.wait().map_err(text)?;
        let PostcopyEnd::Paused(why) = end else { return Err(Failure::new("not paused")) };
        assert!(!why.source_may_resume(), "{why}");
        assert_eq!(guest.state(), MigrationState::PostcopyPaused);
        let (ours, theirs) = UnixStream::pair()?;
        links.push(socket(&theirs));
        let recovering = start(move || author.recover(ours));
        guest.recover_over(Channel::try_from(theirs)?, None).map_err(text)?;
        author = recovering.join().map_err(|_| Failure::new("the source panicked"))??;
        assert_eq!(links.iter().filter(|link| is_open(link)).count(), 1, "links that are gone are closed");
        let mut again: Vec<_> = (0..4).map(|_| author.request()).collect::<Outcome<_>>()?;
        again.sort_unstable();
        assert_eq!(asked, again);
    }
    for (block, page) in asked {
        author.host_page(block, page)?;
    }
    for thread in touching {
        thread.join().map_err(|_| Failure::new("a page is not the source's"))?;
    }
    author.background()?;
    let finishing = start(move || author.finish());
    let end = guest.wait().map_err(text)?;
    let PostcopyEnd::Completed(report) = end else { return Err(Failure::new("paused at the end")) };
    assert_eq!(report.progress.recoveries, 3);
    finishing.join().map_err(|_| Failure::new("the source panicked"))??;
    check(&memory);
    Ok(())
}

/// What a paused destination hears over a new link may be wrong, too: it is paused as before.
#[test]
fn a_recovery_that_is_none_leaves_the_guest_paused() -> Outcome {
    let Pair { author, mut guest, memory } = Pair::switched(&[(Kind::Anonymous, PAGES)])?;
    guest.loaded().map_err(text)?;
    let unasked = guest.recover_over(Channel::try_from(UnixStream::pair()?.1)?, None);
    assert!(unasked.is_err_and(|error| error.to_string().contains("not paused")));
    author.cut()?;
    assert!(matches!(guest.wait().map_err(text)?, PostcopyEnd::Paused(_)));
    let unknown = multifd_wire::BlockName::try_from("another")?;
    for said in [
        multifd_wire::Command::RecvBitmap(unknown),
        multifd_wire::Command::PostcopyListen,
        multifd_wire::Command::Packaged(12),
    ] {
        let (ours, theirs) = UnixStream::pair()?;
        let mut wrong = crate::author::Author::new(ours, &[])?;
        guest.recover_over(Channel::try_from(theirs)?, None).map_err(text)?;
        wrong.command(said)?;
        assert!(matches!(guest.wait().map_err(text)?, PostcopyEnd::Paused(_)));
    }
    let (ours, theirs) = UnixStream::pair()?;
    let recovering = start(move || author.recover(ours));
    guest.recover_over(Channel::try_from(theirs)?, None).map_err(text)?;
    let mut author = recovering.join().map_err(|_| Failure::new("the source panicked"))??;
    author.background()?;
    let finishing = start(move || author.finish());
    assert!(matches!(guest.wait().map_err(text)?, PostcopyEnd::Completed(_)));
    finishing.join().map_err(|_| Failure::new("the source panicked"))??;
    check(&memory);
    Ok(())
}
